"""The fault simulation: what no seed may show, and that it can show it (docs/design/simulation.md)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from simulation import bugs
from simulation.scenario import Bug, run

pytestmark = pytest.mark.slow

SEEDS = 200
SEEDS_TO_CATCH = 1_000
"""How many may pass before a bug must have shown: each does within 50, as the code is."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_every_invariant_holds(first: int) -> None:
    for seed in range(first, first + 20):
        violation = run(seed).violation
        assert violation is None, f"{violation}: replay it with make simulate SEED={seed}"


def test_a_seed_replays_to_the_last_event() -> None:
    once, again = (run(7, traced=True) for _ in range(2))
    assert once.trace == again.trace
    assert len(once.trace) > 100


def test_most_answers_are_judged() -> None:
    """A simulation in which nothing happens holds every invariant."""
    outcomes = [run(seed) for seed in range(30)]
    assert sum(outcome.judged for outcome in outcomes) > 1_000
    assert sum(outcome.stale for outcome in outcomes) > 10


@pytest.mark.parametrize("bug", bugs.ALL.values(), ids=bugs.ALL.keys())
def test_a_deliberate_bug_is_caught(bug: type[Bug]) -> None:
    caught = set()
    for seed in range(SEEDS_TO_CATCH):
        violation = run(seed, bug()).violation
        if violation is not None:
            caught.add(violation.invariant)
            if bug.invariant in caught:
                return
    pytest.fail(f"no seed showed invariant ({bug.invariant}) broken; shown were {caught or 'none'}")
