"""``make simulate``: many seeds, or one with its trace."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from . import bugs
from .scenario import run


def failing(seeds: range, bug: str) -> list[tuple[int, str]]:
    logging.disable()
    found = []
    for seed in seeds:
        outcome = run(seed, bugs.ALL[bug]() if bug else None)
        if outcome.violation is not None:
            found.append((seed, str(outcome.violation)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one alone and print what happens")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--bug", choices=sorted(bugs.ALL), default="")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, options.bug)
    began = time.perf_counter()
    last = options.first + options.count
    chunks = [range(start, min(start + 50, last)) for start in range(options.first, last, 50)]
    with ProcessPoolExecutor(options.jobs) as pool:
        found = [one for chunk in pool.map(failing, chunks, repeat(options.bug)) for one in chunk]
    bug = f" ARGS='--bug {options.bug}'" if options.bug else ""
    for seed, violation in found[:20]:
        print(f"{violation}\n    replay it with: make simulate SEED={seed}{bug}")
    spent = time.perf_counter() - began
    print(f"{options.count} seeds, {len(found)} fail; {options.count / spent:.0f} seeds a second")
    return 1 if found else 0


def replay(seed: int, bug: str) -> int:
    logging.disable()
    outcome = run(seed, bugs.ALL[bug]() if bug else None, traced=True)
    print("\n".join(outcome.trace))
    print(f"seed {seed}: {outcome.violation or 'every invariant holds'} ({outcome.judged} answers judged)")
    return 1 if outcome.violation is not None else 0


if __name__ == "__main__":
    sys.exit(main())
