"""Run benchmarks by name; without one, all of them in a quarter of an hour.

`--scale 0.1` runs a tenth of the rounds. Exits with 0 also where a goal is missed: the table says so.
"""

from __future__ import annotations

import argparse
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
    "signs",
)


SHORTER: Final = {"usage": 0.05, "usage_questions": 0.1}
"""What would take longer than all others together runs at a part of its scale among them."""


def scale_of(name: str, scale: float, *, alone: bool) -> float:
    return scale if alone else scale * SHORTER.get(name, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    unknown = set(arguments.name) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: use {', '.join(NAMES)}")
    for name in arguments.name or NAMES:
        begin = time.monotonic()
        scale = scale_of(name, arguments.scale, alone=bool(arguments.name))
        result = import_module(f"benchmarks.{name}").run(scale)
        result.scale, result.seconds = scale, round(time.monotonic() - begin, 1)
        show(result)
        print(f"  ({result.seconds:.0f} s)", flush=True)
        if not arguments.no_write:
            write(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
