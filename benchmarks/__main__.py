"""Run benchmarks by name; without one, all of them in a quarter of an hour.

`--scale 0.1` runs a tenth of the rounds. Exits with 0 also where a goal is missed: the table says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib import import_module
from typing import Final

from .harness import show, write

NAMES: Final = (
    "floor",
    "middleware",
    "peers",
    "cold",
    "flood",
    "timing",
    "threads",
    "server",
    "revocation",
    "mass_revocation",
    "outage",
    "usage",
    "usage_questions",
    "usage_sinks",
    "signs",
)


SHORTER: Final = {
    "usage": 0.05,
    "usage_questions": 0.02,
    "usage_sinks": 0.3,
    "mass_revocation": 0.5,
    "signs": 0.34,
}
"""What would take too long runs at a part of its scale among the others: all take a quarter of an hour."""


def scale_of(name: str, scale: float, *, alone: bool) -> float:
    return scale if alone else scale * SHORTER.get(name, 1.0)


def _apart(name: str, scale: float, *, no_write: bool) -> None:
    """Run one in a process of its own: the memory that another has left behind is not its own."""
    options = ["--no-write"] if no_write else []
    subprocess.run([sys.executable, "-m", "benchmarks", name, "--scale", str(scale), *options], check=True)


def _run(name: str, scale: float, *, no_write: bool) -> None:
    begin = time.monotonic()
    result = import_module(f"benchmarks.{name}").run(scale)
    result.scale, result.seconds = scale, round(time.monotonic() - begin, 1)
    show(result)
    print(f"  ({result.seconds:.0f} s)", flush=True)
    if not no_write:
        write(result)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    unknown = set(arguments.name) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: use {', '.join(NAMES)}")
    names = arguments.name or NAMES
    for name in names:
        scale = scale_of(name, arguments.scale, alone=bool(arguments.name))
        if len(names) > 1:
            _apart(name, scale, no_write=arguments.no_write)
        else:
            _run(name, scale, no_write=arguments.no_write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
