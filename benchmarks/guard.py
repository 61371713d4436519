"""`make bench-guard`: the ratios that repeat, in a short run; fails where one is worse than noise explains.

Times are judged by the better of up to `TRIES` runs: a slow neighbour can spoil one, a regression spoils all. A try
in which the floor differs from itself is not judged at all. Instruction counts repeat to a percent, so theirs decide
at once; where valgrind is not installed, they are left out.

A bound stands above what was last accepted by the noise seen over twenty runs on a busy machine, on the processor
where the ratio is worst: two codes are not slowed alike. Where something became slower for a good reason, change the
bound here and say so in the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from . import floor, instructions, middleware
from .harness import Figure, Result, show

BOUNDS: Final = {
    "Authenticator.authenticate / the floor": 1.18,  # seen 1.04 to 1.15
    "Authenticator.cached / the floor": 1.02,  # 0.85 to 0.99
    "ASGI, 0 other headers: added / Starlette's added": 1.32,  # 1.13 to 1.23
    "ASGI, 30 other headers: added / Starlette's added": 1.4,  # 1.17 to 1.34
    # 3.14 before a refusal from below was answered and bodies were passed on whole; 3.42 to 3.54 since.
    "WSGI, 0 other headers: added / hand-written guard's added": 3.9,
}
COUNTED: Final = {
    "instructions: authenticate / the floor": 1.15,  # 1.13
    "instructions: ASGI middleware / Starlette's": 1.26,  # 1.22 to 1.23
}
CONTROL: Final = "the floor again (control) / the floor"
NOISE: Final = 0.06
"""How far the floor may differ from itself in a try that is judged."""
TRIES: Final = 4


def main() -> int:
    counted = instructions.run()
    show(counted)
    worse = [*regressions([counted], COUNTED, needed=not counted.left_out), *timed(measured, TRIES)]
    if worse:
        print("\nbench-guard: slower than noise explains:", *worse, sep="\n  ")
        return 1
    print("\nbench-guard: no regression")
    return 0


def measured() -> list[Result]:
    """Measure once, in some seconds."""
    results = [floor.run(0.1, count_instructions=False), middleware.run(0.25)]
    for result in results:
        show(result)
    return results


def timed(measure: Callable[[], list[Result]], tries: int) -> list[str]:
    """Give the regressions that every try showed, of those quiet enough to be judged."""
    worse: list[str] | None = None
    for _ in range(tries):
        results = measure()
        if unsteady(results):
            print("\nbench-guard: the floor differs from itself, so this try is not judged")
            continue
        found = regressions(results, BOUNDS)
        worse = found if worse is None else [line for line in worse if _name(line) in map(_name, found)]
        if not worse:
            return []
    if worse is None:
        print("\nbench-guard: this machine is too busy for times to be judged")
    return worse or []


def regressions(results: Sequence[Result], bounds: Mapping[str, float], *, needed: bool = True) -> list[str]:
    """Name the ratios above their bounds and, where they are needed, the bounds without a ratio."""
    found = _figures(results)
    worse = [
        f"{name}: {found[name].value:.3f} > {bound}"
        for name, bound in bounds.items()
        if name in found and found[name].value > bound
    ]
    lost = [f"{name}: not measured" for name in bounds if name not in found]
    return worse + (lost if needed else [])


def unsteady(results: Sequence[Result]) -> bool:
    control = _figures(results).get(CONTROL)
    return control is not None and abs(control.value - 1) > NOISE


def _figures(results: Sequence[Result]) -> dict[str, Figure]:
    return {figure.name: figure for result in results for figure in result.figures}


def _name(line: str) -> str:
    return line.rpartition(":")[0]


if __name__ == "__main__":
    raise SystemExit(main())
