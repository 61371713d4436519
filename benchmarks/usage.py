"""What recording costs a call, and whether events reach SQLite as fast as they come, in memory that stays flat.

Costs are differences of rounds that take turns in one process, each at its 10th percentile: the recorder's own thread
and a busy machine only ever add. The steady runs are a process of their own on one core, in which the app's thread
serves cached calls at a fixed rate and records each.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from papaours_auth import AsyncAuthenticator, Authenticator, Identity, open_async_store, open_store
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.usage import Batch, CallableSink, Outcome, Recorder, begin_call
from papaours_auth.usage.sqlite import SQLiteSink
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

from .harness import Loop, Result, driven, interleave, looped, percentile
from .middleware import asgi_app
from .plots import Plot
from .subjects import TRUST, new_peppers, one_key

GOAL_NS: Final = 400
RATE: Final = 50_000
MINUTES: Final = 10.0
FLAT: Final = 1.05
MEMORY_RATE: Final = 2_000
"""Events a second in the long run: its file reaches 300 MB."""
COMPLETED: Final = Outcome.COMPLETED
QUIET: Final = 0.1
BURST: Final = 0.005
"""Seconds of calls that come at once."""
HEADERS: Final = [(b"x-header-%d" % number, b"value") for number in range(8)]


def run(scale: float = 1.0) -> Result:
    result = Result("usage", "What recording costs a call, and what the flusher keeps up with")
    with TemporaryDirectory() as folder:
        _cost(result, Path(folder), scale)
        _keeping_up(result, Path(folder), max(1.0, 20 * scale))
        _memory(result, Path(folder), max(2.0, 60 * MINUTES * scale))
    return result


# what a call pays


def _cost(result: Result, folder: Path, scale: float) -> None:
    peppers, store = new_peppers(), open_async_store("memory://")
    key = one_key(store.sync, peppers)[0].encode()
    options: Any = {"environment": "prod", "peppers": peppers, "max_staleness": TRUST}
    with (
        Authenticator(store.sync, **options) as authenticator,
        Recorder(CallableSink(lambda _: None), interval=3600, max_pending=1_000_000) as memory,
        Recorder(CallableSink(lambda _: None), interval=3600, spool=folder / "cost") as spool,
    ):
        recorders = {"in memory": memory, "in the spool": spool}
        loops = verification(authenticator, key, recorders)
        _added(result, "cached verification", loops, recorders, scale, goal=GOAL_NS)
        _added(result, "WSGI middleware", wsgi(authenticator, key, recorders), recorders, scale)
        waiting = AsyncAuthenticator(store, **options)
        _added(result, "ASGI middleware", asyncio.run(asgi(waiting, key, recorders)), recorders, scale)
        asyncio.run(waiting.aclose())
        result.add("events lost meanwhile", memory.stats().lost + spool.stats().lost, "events", goal=0)


def _added(
    result: Result,
    what: str,
    loops: Mapping[str, Loop],
    recorders: Mapping[str, Recorder],
    scale: float,
    goal: float | None = None,
) -> None:
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(max(2, int(100 * scale))):
        for name, values in interleave(loops, rounds=3, count=300).items():
            found[name] += values
        for recorder in recorders.values():
            recorder.flush()
    bare = percentile(found["bare"], QUIET)
    for name in recorders:
        took = percentile(found[name], QUIET)
        wanted = goal if name == "in memory" else None
        result.add(f"{what}: recording {name} adds", took - bare, "ns", goal=wanted)
        result.add(f"{what}: recorded {name} / not recorded", took / bare)


def verification(
    authenticator: Authenticator, key: bytes, recorders: Mapping[str, Recorder]
) -> dict[str, Loop]:
    authenticator.authenticate(key)

    def recorded(recorder: Recorder) -> Callable[[], None]:
        def call() -> None:
            made = begin_call(authenticator.authenticate(key), "192.0.2.7", "GET")
            made.status = 200
            if recorder.spooled:
                recorder.sent(made)
            recorder.done(made, COMPLETED)

        return call

    def bare() -> None:
        authenticator.authenticate(key)

    return {
        "bare": looped(bare),
        **{name: looped(recorded(recorder)) for name, recorder in recorders.items()},
    }


async def asgi(
    authenticator: AsyncAuthenticator, key: bytes, recorders: Mapping[str, Recorder]
) -> dict[str, Loop]:
    await authenticator.authenticate(key)
    scope = {
        "type": "http", "method": "GET", "path": "/contracts", "root_path": "", "client": ("192.0.2.7", 1),
        "headers": [*HEADERS, (b"x-api-key", key)],
    }  # fmt: skip

    async def receive() -> Any:
        return {}

    async def send(message: Any) -> None:
        pass

    def loop(usage: Recorder | None) -> Loop:
        app = ASGIMiddleware(asgi_app, authenticator=authenticator, usage=usage)
        return driven(lambda: app({**scope}, receive, send))

    return {"bare": loop(None), **{name: loop(recorder) for name, recorder in recorders.items()}}


def wsgi(authenticator: Authenticator, key: bytes, recorders: Mapping[str, Recorder]) -> dict[str, Loop]:
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/contracts", "SCRIPT_NAME": "", "REMOTE_ADDR": "192.0.2.7",
        "HTTP_X_API_KEY": key.decode(),
    }  # fmt: skip

    def answer(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def loop(usage: Recorder | None) -> Loop:
        app = WSGIMiddleware(answer, authenticator=authenticator, usage=usage)

        def call() -> None:
            body = app({**environ}, lambda *_: bytes)
            for _ in body:
                pass
            close = getattr(body, "close", None)
            if close is not None:
                close()

        return looped(call)

    return {"bare": loop(None), **{name: loop(recorder) for name, recorder in recorders.items()}}


# a steady load


def _keeping_up(result: Result, folder: Path, seconds: float) -> None:
    for kept in ("in memory", "in the spool"):
        found = _apart(folder, rate=RATE, seconds=seconds, spool=kept == "in the spool")
        what = f"{RATE:,} events/s {kept}"
        result.add(f"{what}: served", found["served"], "calls/s", goal=RATE * 0.98, at_most=False)
        result.add(
            f"{what}: of one core, serving included",
            found["core"],
            "cores",
            goal=1.0,
            note="processor time, so that a busy machine does not count",
        )
        result.add(f"{what}: not delivered in time or lost", found["behind"], "events", goal=RATE)
        result.add(f"{what}: lost", found["lost"], "events", goal=0)
        result.add(f"{what}: from call to SQLite, median", found["lag"], "s")
        result.add(f"{what}: from call to SQLite, p99", found["lag99"], "s")
        result.add(f"{what}: SQLite", found["bytes"], "bytes/event")


def _memory(result: Result, folder: Path, seconds: float) -> None:
    found = _apart(folder, rate=MEMORY_RATE, seconds=seconds, spool=True)
    sizes = found["rss"]
    begun = sizes[: max(1, len(sizes) // 10)]
    result.add(
        f"memory: last tenth / first tenth of {seconds / 60:.1f} minutes",
        statistics.median(sizes[-len(begun) :]) / statistics.median(begun),
        goal=FLAT,
        note=f"RSS, at {MEMORY_RATE:,} events/s with a spool; the first 2 s not counted",
    )
    result.add("memory: at the end", sizes[-1] / 2**20, "MB")
    minutes = [seconds / 60 * number / len(sizes) for number in range(len(sizes))]
    points = list(zip(minutes, [size / 2**20 for size in sizes], strict=True))
    result.plots.append(
        Plot("usage-memory", "Memory while events are recorded", "lines", "minutes", "MB", {"RSS": points})
    )


def _apart(folder: Path, **given: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.usage", json.dumps(given)]
    with TemporaryDirectory(dir=folder) as apart:
        done = subprocess.run([*command, apart], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Timed:
    """SQLite, and how old the oldest and the newest event of each batch were when it had them."""

    def __init__(self, path: Path) -> None:
        self._inner = SQLiteSink(path)
        self.lags: list[float] = []

    def write(self, batch: Batch) -> None:
        self._inner.write(batch)
        now = time.time()
        self.lags += [now - batch.events[place].time / 1e6 for place in (0, -1) if batch.events]


def steady(folder: Path, *, rate: int, seconds: float, spool: bool) -> dict[str, Any]:
    """Serve cached calls at a rate, on one core, and record each."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    peppers, store = new_peppers(), open_store("memory://")
    key = one_key(store, peppers)[0].encode()
    sink, worked = Timed(folder / "usage.db"), time.process_time()
    with (
        Authenticator(store, environment="prod", peppers=peppers, max_staleness=TRUST) as authenticator,
        Recorder(sink, spool=folder / "spool" if spool else None) as recorder,
    ):
        recorder.start()
        begun = time.monotonic()
        sizes = serve(recorder, lambda: authenticator.authenticate(key), rate, seconds)
        took = time.monotonic() - begun
        stats = recorder.stats()
    worked = time.process_time() - worked
    stored = recorder.stats().delivered
    return {
        "served": stats.recorded / took,
        "core": worked / stats.recorded * rate,
        "behind": stats.recorded - stats.delivered,
        "lost": recorder.stats().lost,
        "lag": statistics.median(sink.lags),
        "lag99": percentile(sink.lags, 0.99),
        "bytes": (folder / "usage.db").stat().st_size / stored,
        "rss": sizes,
    }


def serve(
    recorder: Recorder, authenticate: Callable[[], Identity], rate: int, seconds: float
) -> Sequence[int]:
    """Make the calls, in bursts; give the resident memory of each second after the second one."""
    sizes: list[int] = []
    begun = time.monotonic()
    made = 0
    while (passed := time.monotonic() - begun) < seconds:
        while made < passed * rate:
            call = begin_call(authenticate(), "192.0.2.7", "GET")
            call.route = "/contracts"
            call.status = 200
            recorder.sent(call)
            recorder.done(call, COMPLETED)
            made += 1
        if passed - 1 > len(sizes):
            sizes.append(resident())
        time.sleep(BURST)
    return sizes[1:] or [resident()]


def resident() -> int:
    """Give the memory that is ours alone: pages of the spool's files are shared, and the kernel's to keep."""
    _, whole, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(whole) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(steady(Path(sys.argv[2]), **json.loads(sys.argv[1]))))
