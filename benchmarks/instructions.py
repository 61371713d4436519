"""Instructions a call takes, counted by callgrind: unlike times, they repeat on a noisy machine.

A subject runs twice, for few and for many calls; the difference leaves out the interpreter's start.
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
from typing import Final

from papaours_auth import Authenticator, open_store

from . import floor
from .subjects import TRUST, new_peppers, one_key

FEW, MANY = 500, 3_500
_TOTAL: Final = re.compile(r"Collected : (\d+)")


def counted(*subjects: str) -> list[float | None]:
    """Count the instructions of one call of each, side by side. None where callgrind cannot."""
    if shutil.which("valgrind") is None:
        return [None] * len(subjects)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        totals = {
            (subject, calls): pool.submit(_total, subject, calls)
            for subject in subjects
            for calls in (FEW, MANY)
        }
    return [_each(totals[subject, FEW].result(), totals[subject, MANY].result()) for subject in subjects]


def _each(few: int | None, many: int | None) -> float | None:
    return None if few is None or many is None else (many - few) / (MANY - FEW)


def _total(subject: str, calls: int) -> int | None:
    asked = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
            *(sys.executable, "-m", "benchmarks.instructions", subject, str(calls)),
        ],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    found = _TOTAL.search(asked.stderr)
    return int(found[1]) if found and asked.returncode == 0 else None


def _authenticate() -> tuple[Callable[[bytes], object], bytes]:
    peppers, store = new_peppers(), open_store("memory://")
    key = one_key(store, peppers)[0].encode()
    # No thread: its wakings would be counted.
    authenticator = Authenticator(
        store, environment="prod", peppers=peppers, max_staleness=TRUST, watch=False
    )
    authenticator.start()
    authenticator.refresh()
    authenticator.authenticate(key)
    if authenticator.cached(key) is None:
        raise RuntimeError("the key is not in the cache, so something else would be counted")
    return authenticator.authenticate, key


def _floor() -> tuple[Callable[[bytes], object], bytes]:
    key = b"pk_prod_" + b"x" * 36
    _authenticate()  # so that both start alike
    return floor.floor(key), key


def main(subject: str, calls: int) -> None:
    call, key = {"authenticate": _authenticate, "floor": _floor}[subject]()
    for _ in range(calls):
        call(key)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
