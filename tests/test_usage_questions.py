"""What people ask about the use of keys, answered from what was recorded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from papaours_auth.exceptions import InvalidInput, StoreUnavailable
from papaours_auth.usage import Batch, Event
from papaours_auth.usage.questions import Usage
from papaours_auth.usage.sqlite import SQLiteSink

NOW = datetime.now(UTC).replace(second=0, microsecond=0)


def event(minutes_ago: int, key: str, route: str, address: str, status: int = 200) -> Event:
    at = int((NOW - timedelta(minutes=minutes_ago)).timestamp() * 1e6)
    return Event(
        1,
        f"e-{minutes_ago}",
        at,
        key,
        "m-1",
        address,
        "GET",
        route,
        status,
        "",
        "completed",
        "",
        "prod",
        5,
        "",
    )


@pytest.fixture
def usage(tmp_path: Path) -> Usage:
    events = [
        event(50, "old", "/a", "192.0.2.1"),
        event(9, "new", "/a", "192.0.2.1"),
        event(8, "new", "/a", "192.0.2.2", 404),
        event(8, "new", "/b", "192.0.2.1"),
    ]
    SQLiteSink(tmp_path / "usage ?.db").write(Batch("p", 1, events))
    return Usage(tmp_path / "usage ?.db")


def test_the_questions_are_answered(usage: Usage) -> None:
    hour = NOW - timedelta(hours=1)
    last = usage.last_used("new")
    assert last is not None
    assert (last.last, last.calls) == (NOW - timedelta(minutes=8), 3)
    assert usage.last_used("never") is None
    assert [use.key_id for use in usage.unused_since(NOW - timedelta(minutes=20))] == ["old"]
    assert usage.by_route("new", hour) == [("/a", 2), ("/b", 1)]
    assert usage.by_address("new", hour) == [("192.0.2.1", 2), ("192.0.2.2", 1)]
    assert [calls for _, calls in usage.series("new", "minute", hour)] == [1, 2]


def test_history_is_filtered_and_paged(usage: Usage) -> None:
    assert len(usage.history()) == 4
    assert [found.route for found in usage.history(limit=1, offset=3)] == ["/a"]
    assert [found.address for found in usage.history(key_id="new", status=404)] == ["192.0.2.2"]
    assert usage.history(machine_id="' or 1=1 --") == []


def test_what_cannot_be_answered_says_so(usage: Usage, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        usage.unused_since(datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point
    with pytest.raises(StoreUnavailable):
        Usage(tmp_path / "absent.db").last_used("new")
