"""Instructions a call takes, counted by callgrind: unlike times, they repeat on a noisy machine.

All subjects are made in each process, whichever is called: a process that calls none tells what the interpreter's
start and the making took, and is taken off the others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from papaours_auth import AsyncAuthenticator, Authenticator, open_async_store

from . import floor, middleware
from .harness import Loop, Result, looped
from .subjects import TRUST, new_peppers, one_key

CALLS: Final = 2_000
OTHER_HEADERS: Final = 8
_TOTAL: Final = re.compile(r"Collected : (\d+)")


def run() -> Result:
    """Count what the guard judges."""
    result = Result("instructions", "Instructions a call takes, by callgrind")
    names = ("authenticate", "floor", "asgi ours", "asgi bare", "asgi theirs")
    found = counted(*names)
    if None in found.values():
        result.left_out.append(ABSENT)
        return result
    ours, bottom, asgi, bare, theirs = (float(found[name] or 0) for name in names)
    result.add("instructions: authenticate / the floor", ours / bottom)
    result.add("instructions: ASGI middleware / Starlette's", (asgi - bare) / (theirs - bare))
    for name, value in (("authenticate", ours), ("the floor", bottom), ("ASGI middleware adds", asgi - bare)):
        result.add(f"instructions: {name}", value, "instructions")
    return result


ABSENT: Final = "instruction counts: valgrind is not installed, or cannot run this Python"


def counted(*subjects: str) -> dict[str, float | None]:
    """Count the instructions of one call of each, side by side. None where callgrind cannot."""
    if shutil.which("valgrind") is None:
        return dict.fromkeys(subjects)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        start = pool.submit(_total, "none")
        totals = {subject: pool.submit(_total, subject) for subject in subjects}
    return {subject: _each(start.result(), total.result()) for subject, total in totals.items()}


def _each(start: int | None, total: int | None) -> float | None:
    return None if start is None or total is None else (total - start) / CALLS


def _total(subject: str) -> int | None:
    asked = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
            *(sys.executable, "-m", "benchmarks.instructions", subject),
        ],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    found = _TOTAL.search(asked.stderr)
    return int(found[1]) if found and asked.returncode == 0 else None


def _loops() -> dict[str, Callable[[], Loop]]:
    """Give how to make each subject. All start alike: the same imports, stores and keys."""
    peppers, store = new_peppers(), open_async_store("memory://")
    key = one_key(store.sync, peppers)[0]
    # No thread: its wakings would be counted.
    options: Any = {"environment": "prod", "peppers": peppers, "max_staleness": TRUST, "watch": False}
    blocking, awaiting = Authenticator(store.sync, **options), AsyncAuthenticator(store, **options)
    blocking.start()
    for engine in (blocking, awaiting):
        engine.refresh()
    blocking.authenticate(key)
    if blocking.cached(key.encode()) is None:
        raise RuntimeError("the key is not in the cache, so something else would be counted")
    asgi = middleware.asgi_loops(awaiting, key, OTHER_HEADERS)
    return {
        "authenticate": lambda: looped(blocking.authenticate, key.encode()),
        "none": lambda: lambda _: 0.0,
        "floor": lambda: looped(floor.floor(key.encode()), key.encode()),
        "asgi ours": lambda: asgi["ours"],
        "asgi bare": lambda: asgi["bare"],
        "asgi theirs": lambda: asgi["theirs"],
    }


if __name__ == "__main__":
    _loops()[sys.argv[1]]()(CALLS)
