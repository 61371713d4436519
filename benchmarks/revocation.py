"""From the commit that disables a key to its last acceptance anywhere: four processes under load, on one store.

All clocks are the machine's one monotonic clock. With the feed cut no announcement arrives and nothing is polled
early: what remains is the reading of the epoch every quarter of ``max_staleness``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, cast

from papaours_auth import Authenticator, Keys, Refused, open_store
from papaours_auth.authenticator import DEFAULT_MAX_STALENESS
from papaours_auth.stores import Epoch, Feed, Reading, Store

from .harness import Result, percentile
from .plots import Plot, histogram
from .subjects import Place, left_out_stores, place, shared_stores

PROCESSES: Final = 4
REVOKED, REVOKED_CUT = 200, 12
GOAL: Final = 50.0
BURST: Final = 50  # calls between two pauses of a millisecond


def run(scale: float = 1.0) -> Result:
    result = Result("revocation", f"Disable to last acceptance, {PROCESSES} processes under load")
    fed: dict[str, list[float]] = {}
    for name in shared_stores():
        with place(name) as there:
            fed[name] = revoked(there, max(2, int(REVOKED * scale)), cut=False)
            _report(result, name, fed[name], GOAL)
        with place(name) as there:
            times = revoked(there, max(2, int(REVOKED_CUT * scale)), cut=True)
            _report(result, f"{name}, feed cut", times, DEFAULT_MAX_STALENESS * 1000)
    shares = {name: histogram(times) for name, times in fed.items()}
    result.plots.append(
        Plot("revocation", "Disable to last acceptance", "steps", "ms", "share of changes", shares, log="x")
    )
    result.left_out += left_out_stores()
    return result


def _report(result: Result, name: str, times: list[float], goal: float) -> None:
    for share, what in ((0.5, "p50"), (0.99, "p99"), (1.0, "longest")):
        is_goal = what == ("longest" if "cut" in name else "p99")
        result.add(f"{name}: {what}", percentile(times, share), "ms", goal=goal if is_goal else None)


def revoked(there: Place, count: int, *, cut: bool) -> list[float]:
    """Disable so many keys, one after the other; give the milliseconds to the last acceptance of each."""
    with Keys(there.url, peppers=there.peppers) as admin, ExitStack() as stack:
        owner = admin.create_machine("Service de facturation", organisation="cfa-lyon")
        made = [
            admin.create_key(owner.id, name=f"Banc {number}", environment="prod") for number in range(count)
        ]
        texts = "".join(new.secret.reveal() + "\n" for new in made)
        workers = [stack.enter_context(_worker(there, texts, cut=cut)) for _ in range(PROCESSES)]
        for worker in workers:
            stack.callback(worker.kill)  # where something went wrong here: they would wait for it
        times = []
        for number, new in enumerate(made):
            for worker in workers:
                _expect(worker, f"accepted {number}")
            time.sleep(random.uniform(0.0, 0.03))
            admin.disable_key(new.key.id)
            committed = time.monotonic()
            last = max(float(_expect(worker, f"refused {number}")) for worker in workers)
            times.append(max(0.0, last - committed) * 1000)
    return times


def _worker(there: Place, texts: str, *, cut: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.revocation", there.url, "cut" if cut else "fed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PAPAOURS_PEPPER": there.secret},
    )
    if process.stdin is None:
        raise RuntimeError("the process has no standard input")
    process.stdin.write(texts)
    process.stdin.close()
    return process


def _expect(worker: subprocess.Popen[str], words: str) -> str:
    """Read a line that begins with these words; give the rest."""
    line = worker.stdout.readline().strip() if worker.stdout is not None else ""
    if not line.startswith(words):
        raise RuntimeError(f"a process was to say {words!r} and said {line!r}")
    return line.removeprefix(words).strip()


class _Deaf:
    """A feed that hears nothing, and is only read."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._woken = threading.Event()

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        return self._feed.read(known)

    def wait(self, timeout: float) -> None:
        self._woken.wait(timeout)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._feed.close()


class _Cut:
    """A store whose feeds are deaf."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def feed(self) -> Feed:
        return _Deaf(self._store.feed())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def work(url: str, texts: Sequence[str], *, cut: bool) -> None:
    """Present each key until it is refused, and say when it was last accepted."""
    store = open_store(url)
    given = cast("Store", _Cut(store)) if cut else store
    with Authenticator(given, environment="prod") as door:
        for number, text in enumerate(texts):
            door.authenticate(text)
            print(f"accepted {number}", flush=True)
            print(f"refused {number} {_last_acceptance(door, text)}", flush=True)
    store.close()


def _last_acceptance(door: Authenticator, text: str) -> float:
    last = time.monotonic()
    while True:
        for _ in range(BURST):
            asked = time.monotonic()
            try:
                door.authenticate(text)
            except Refused:
                return last
            last = asked
        time.sleep(0.001)


if __name__ == "__main__":
    work(sys.argv[1], sys.stdin.read().split(), cut=sys.argv[2] == "cut")
