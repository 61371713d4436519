"""Real faults under real load: four processes verify while their store is changed, taken away and given back.

Each store comes with what is done to it. The figures (how fast, not whether) are the
benchmarks' business; here only what must never happen is asserted. The processes' clocks are real, so the bound has
to pass in real time: each sleep is a bound or a fault's length with its slack, and waits for nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support.broken import (
    Broken,
    Kind,
    postgresql_cut_off,
    postgresql_killed,
    redis_cut_off,
    redis_frozen,
    redis_killed,
    sqlite_file,
)
from support.fleet import Fleet

pytestmark = pytest.mark.alone

OTHERS = 400
MAX_STALENESS = 1.0
SLACK = 1.5
"""Seconds that two loaded cores may add to a bound: four processes and a server share them."""


class Estate(NamedTuple):
    """A store under load, and its administrator."""

    broken: Broken
    keys: Keys
    target: str  # the id of the key all processes ask about
    load: Fleet


@pytest.fixture
def estate(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Estate]:
    kind: Kind = request.param
    with ExitStack() as stack:
        broken = stack.enter_context(kind(tmp_path))
        open_store(broken.url, create=True).close()
        keys = stack.enter_context(Keys(broken.url, peppers=parse_peppers(PEPPER)))
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon").id
        names = [f"Production - {number}" for number in range(OTHERS + 1)]
        made = [keys.create_key(machine, name=name, environment="prod") for name in names]
        texts = [new.secret.reveal() for new in made]
        yield Estate(
            broken,
            keys,
            made[0].key.id,
            Fleet(stack, broken.verifying_url, PEPPER, texts[0], texts[1:], max_staleness=MAX_STALENESS),
        )


def outcomes(reports: list[dict[str, Any]], phase: str, what: str) -> set[str]:
    return {outcome for report in reports for outcome in report[phase]["outcomes"][what]}


@pytest.mark.parametrize("estate", [sqlite_file, redis_killed, postgresql_killed], indirect=True)
def test_a_key_disabled_under_load_is_refused_by_every_process_within_the_bound(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    estate.load.begin("before")
    estate.load.begin("during", 0)
    estate.keys.disable_key(estate.target)
    committed = time.monotonic()
    time.sleep(MAX_STALENESS + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    last = max(report["during"]["last_accepted"] for report in reports)
    record_property("milliseconds from commit to last acceptance", round((last - committed) * 1000, 1))
    assert last < committed + MAX_STALENESS + SLACK
    assert outcomes(reports, "before", "target") == {"accepted"}
    assert outcomes(reports, "after", "target") == {"key_inactive"}
    assert outcomes(reports, "after", "other") == {"accepted"}
    assert outcomes(reports, "after", "unknown") == {"unknown_key"}
    assert estate.keys.key(estate.target).status == "inactive"


@pytest.mark.parametrize("estate", [redis_cut_off, postgresql_cut_off], indirect=True)
def test_pitfall_18_with_the_feed_cut_a_disabled_key_is_not_accepted_beyond_the_bound(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    """The administrator reaches the store, the verifiers hear and reach nothing."""
    estate.load.begin("before")
    estate.load.begin("cut", 0)
    estate.broken.take_away()
    estate.keys.disable_key(estate.target)
    committed = time.monotonic()
    time.sleep(MAX_STALENESS + SLACK)
    estate.load.begin("deaf")
    estate.load.begin("healing", 0)
    estate.broken.give_back()
    time.sleep(1.0 + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    last = max(report["cut"]["last_accepted"] for report in reports)
    record_property("milliseconds from commit to last acceptance", round((last - committed) * 1000, 1))
    assert last < committed + MAX_STALENESS + SLACK
    for what in ("target", "other", "unknown"):
        assert outcomes(reports, "deaf", what) == {"store_unavailable"}
    assert outcomes(reports, "healing", "target") <= {"store_unavailable", "key_inactive"}
    assert outcomes(reports, "after", "target") == {"key_inactive"}
    assert outcomes(reports, "after", "other") == {"accepted"}


@pytest.mark.parametrize(
    "estate", [sqlite_file, redis_killed, redis_frozen, postgresql_killed], indirect=True
)
def test_a_store_that_goes_away_under_load_is_an_outage_and_is_used_again_when_it_is_back(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    estate.load.begin("before")
    estate.load.begin("outage", 0)
    estate.broken.take_away()
    time.sleep(MAX_STALENESS + 1.0)
    estate.load.begin("recovery", 0)
    back = time.monotonic()
    estate.broken.give_back()
    time.sleep(1.0 + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    for phase in ("outage", "recovery"):
        for what in ("target", "other"):
            assert outcomes(reports, phase, what) <= {"accepted", "store_unavailable"}
        assert outcomes(reports, phase, "unknown") <= {"unknown_key", "store_unavailable"}
    assert outcomes(reports, "outage", "other") >= {"store_unavailable"}
    assert outcomes(reports, "after", "target") == {"accepted"}
    assert outcomes(reports, "after", "other") == {"accepted"}
    recovered = max(report["recovery"]["first_accepted"] for report in reports) - back
    record_property("seconds until an uncached call was answered again", round(recovered, 3))
    assert 0 < recovered < 1.0 + SLACK
    before = max(report["before"]["threads"] for report in reports)
    assert max(report["outage"]["threads"] for report in reports) <= before + 1, "threads pile up"
