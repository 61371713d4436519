"""`make bench-guard`: the ratios that repeat, in a short run; fails where one is worse than noise explains.

A bound stands above the ratio last accepted by more than the spread seen on a busy machine; instruction counts
repeat to a percent, so theirs is tight. Where something became slower for a good reason, change the bound here
and say so in the commit.
"""

from __future__ import annotations

from typing import Final

from . import floor, middleware
from .harness import Result, show

BOUNDS: Final = {
    "Authenticator.authenticate / the floor": 1.25,
    "Authenticator.cached / the floor": 1.05,
    "instructions: authenticate / the floor (callgrind)": 1.16,
    "ASGI, 0 other headers: added / Starlette's added": 1.7,
    "ASGI, 30 other headers: added / Starlette's added": 1.7,
    "WSGI, 0 other headers: added / hand-written guard's added": 3.6,
}
TRIES: Final = 2
"""A slow neighbour can spoil a run; a regression spoils both."""


def regressions(results: list[Result], bounds: dict[str, float] = BOUNDS) -> list[str]:
    """Name the ratios above their bounds, and the bounds without a ratio (instruction counts may be absent)."""
    found = {figure.name: figure.value for result in results for figure in result.figures}
    worse = [
        f"{name}: {found[name]:.2f} > {bound}" for name, bound in bounds.items() if found.get(name, 0) > bound
    ]
    lost = [f"{name}: not measured" for name in bounds if name not in found and "callgrind" not in name]
    return worse + lost


def main() -> int:
    worse: list[str] = []
    for attempt in range(TRIES):
        results = [floor.run(0.2, count_instructions=attempt == 0), middleware.run(0.3)]
        for result in results:
            show(result)
        found = regressions(results)
        worse = found if attempt == 0 else [line for line in worse if _again(line, found)]
        if not worse:
            print("\nbench-guard: no regression")
            return 0
    print("\nbench-guard: slower than noise explains:", *worse, sep="\n  ")
    return 1


def _again(line: str, found: list[str]) -> bool:
    """Tell whether a finding came again. Instruction counts need no second try."""
    return "callgrind" in line or any(other.rpartition(":")[0] == line.rpartition(":")[0] for other in found)


if __name__ == "__main__":
    raise SystemExit(main())
