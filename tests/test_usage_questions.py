"""What people ask about the use of keys, answered from what was recorded: the same from every database."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from papaours_auth.exceptions import ConfigurationError, InvalidInput, StoreUnavailable
from papaours_auth.model import Key
from papaours_auth.usage import Batch, Event, Outcome, Recorder, Sink, begin_call, open_sink
from papaours_auth.usage.history import Page
from papaours_auth.usage.questions import AsyncUsage, Count, Usage, rotations
from papaours_auth.usage.reader import Ask, Cell, Row, micro, moment, open_reader
from papaours_auth.usage.sqlite import SQLiteReader, SQLiteSink
from support.servers import wait_until
from support.sql_servers import SERVERS, SQLServer
from support.usage import CALLER

NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)
MINUTE = timedelta(minutes=1)


def event(
    at: datetime,
    key: str = "new",
    route: str = "/a",
    address: str = "192.0.2.1",
    status: int = 200,
    machine: str = "m-1",
) -> Event:
    return Event(
        1, f"e-{micro(at)}", micro(at), key, machine, address, "GET", route, status, "", "completed", "", "prod", 5,
        "",
    )  # fmt: skip


class Place:
    """A sink, and the questions about what it has taken."""

    def __init__(self, url: str) -> None:
        self.sink: Sink = open_sink(url)
        self.usage = Usage(url)
        self._sequence = 0

    def write(self, *events: Event) -> None:
        self._sequence += 1
        self.sink.write(Batch("p", self._sequence, events))


@pytest.fixture(params=["sqlite", *SERVERS, "sqlalchemy+sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = f"{request.param}:///{tmp_path}/usage.db"
    if request.param in SERVERS:
        server: SQLServer = request.getfixturevalue(f"{request.param}_server")
        url = server.url(server.database())
    return Place(url)


@pytest.fixture
def usage(place: Place) -> Usage:
    place.write(
        event(NOON - 50 * MINUTE, "old"),
        event(NOON - 9 * MINUTE),
        event(NOON - 8 * MINUTE, address="192.0.2.2", status=404),
        event(NOON - 8 * MINUTE, route="/b"),
        event(NOON - 3 * MINUTE, "other", machine="m-2"),
    )
    return place.usage


HOUR_AGO = NOON - timedelta(hours=1)


def counted(counts: list[Count]) -> list[tuple[str, int]]:
    return [(count.of, count.calls) for count in counts]


def test_keys_tell_when_they_were_last_used(usage: Usage) -> None:
    last = usage.last_used("new")
    assert last is not None
    assert (last.first, last.last, last.calls) == (NOON - 9 * MINUTE, NOON - 8 * MINUTE, 3)
    assert usage.last_used("never") is None
    assert [use.key_id for use in usage.last_uses()] == ["other", "new", "old"]
    assert [use.key_id for use in usage.last_uses(machine_id="m-1")] == ["new", "old"]
    assert [use.key_id for use in usage.unused_since(NOON - 5 * MINUTE)] == ["old", "new"]
    assert usage.unused_since(NOON - 5 * MINUTE, machine_id="m-2") == []
    assert [use.key_id for use in usage.unused_since(NOON - 8 * MINUTE)] == ["old"]


def test_calls_are_counted_by_route_address_and_time(usage: Usage) -> None:
    assert counted(usage.by_route("new", HOUR_AGO)) == [("/a", 2), ("/b", 1)]
    assert usage.by_route("new", HOUR_AGO, limit=1) == [Count("/a", 2, NOON - 8 * MINUTE)]
    assert counted(usage.by_address("new", HOUR_AGO)) == [("192.0.2.1", 2), ("192.0.2.2", 1)]
    assert counted(usage.by_route(machine_id="m-1")) == [("/a", 3), ("/b", 1)]
    assert usage.by_route(machine_id="absent") == usage.by_route("new", until=NOON - timedelta(days=2)) == []
    assert [calls for _, calls in usage.series("new", "minute", HOUR_AGO)] == [1, 2]
    assert usage.series("new", "hour", HOUR_AGO) == [(NOON - timedelta(hours=1), 3)]
    assert [calls for _, calls in usage.series(step="day", machine_id="m-1")] == [4]
    assert usage.series("new", "hour", until=HOUR_AGO) == usage.series(machine_id="absent") == []


def test_counts_leave_out_what_was_last_called_before(place: Place) -> None:
    """An hour is counted whole, but nobody is named who did not call since."""
    place.write(
        event(NOON + 5 * MINUTE, address="192.0.2.1"),
        event(NOON + 6 * MINUTE, address="192.0.2.2"),
        event(NOON + 20 * MINUTE, address="192.0.2.2"),
    )
    assert counted(place.usage.by_address("new", NOON + 10 * MINUTE)) == [("192.0.2.2", 2)]
    assert counted(place.usage.by_address("new", NOON + 5 * MINUTE, NOON + 6 * MINUTE)) == [
        ("192.0.2.2", 2),
        ("192.0.2.1", 1),
    ]


def test_who_still_uses_a_key_after_its_rotation(place: Place) -> None:
    rotated = NOON + 10 * MINUTE
    place.write(
        event(NOON + 5 * MINUTE, "old", "/before", "192.0.2.1"),
        event(NOON + 11 * MINUTE, "old", "/a", "192.0.2.2"),
        event(NOON + 130 * MINUTE, "old", "/b", "192.0.2.3"),
        event(NOON + 140 * MINUTE, "old", "/b", "192.0.2.3"),
    )
    found = place.usage.still_used("old", rotated)
    assert found is not None
    assert (found.machine_id, found.since, found.calls) == ("m-1", rotated, 3)
    assert found.last == NOON + 140 * MINUTE
    assert counted(found.addresses) == [("192.0.2.3", 2), ("192.0.2.2", 1)]
    assert found.routes == [
        Count("/b", 2, NOON + 140 * MINUTE),
        Count("/a", 1, NOON + 11 * MINUTE),
    ]
    assert place.usage.still_used("old", NOON + 141 * MINUTE) is None
    assert place.usage.still_used("never", rotated) is None


def test_beyond_a_week_days_are_counted_whole(place: Place) -> None:
    long_ago = NOON - timedelta(days=20)
    place.write(
        event(long_ago - timedelta(hours=2), address="192.0.2.1"),
        event(long_ago - timedelta(hours=1), address="192.0.2.2"),
        event(long_ago + timedelta(hours=1), address="192.0.2.2"),
        event(NOON, address="192.0.2.3"),
    )
    wanted = [("192.0.2.2", 2), ("192.0.2.3", 1)]
    assert counted(place.usage.by_address("new", long_ago)) == wanted
    assert counted(place.usage.by_address("new", long_ago, long_ago + timedelta(days=2))) == [
        ("192.0.2.2", 1)
    ]
    found = place.usage.still_used("new", long_ago)
    assert found is not None
    assert counted(found.addresses) == wanted


def test_a_rotation_is_the_first_key_that_replaces_another() -> None:
    def key(id_: str, at: datetime, replaces: str | None) -> Key:
        return Key(id_, "m-1", id_, "prod", "", "abcd", "active", at, "a", None, replaces, (), {})

    made = [key("1", NOON, None), key("2", NOON + MINUTE, "1"), key("3", NOON + 2 * MINUTE, "1")]
    assert rotations(made) == rotations(made[::-1]) == {"1": NOON + MINUTE}


def test_a_report_sums_up_a_machine_in_whole_days(place: Place, usage: Usage) -> None:
    report = usage.report("m-1", NOON)
    assert report.since == NOON - timedelta(hours=12)
    assert report.calls == 4
    assert report.statuses == {200: 3, 404: 1}
    assert [use.key_id for use in report.keys] == ["new", "old"]
    assert counted(report.routes) == [("/a", 3), ("/b", 1)]
    assert counted(report.addresses) == [("192.0.2.1", 3), ("192.0.2.2", 1)]
    assert report.days == [(report.since, 4)]
    place.write(event(NOON - timedelta(days=1), route="/earlier"))
    assert usage.report("m-1", NOON) == report._replace(keys=usage.last_uses(machine_id="m-1"))
    assert usage.report("absent", NOON).calls == 0


# history


def walked(usage: Usage, limit: int, **filters: Any) -> list[str]:  # Any: those of `history`
    """Read all pages, and name what was in them."""
    names: list[str] = []
    page = usage.history(limit=limit, **filters)
    while True:
        assert len(page) <= limit
        names += [found.event_id for found in page]
        if page.cursor is None:
            return names
        page = usage.history(limit=limit, cursor=page.cursor, **filters)


@pytest.mark.parametrize(("examined", "patience"), [(10, 60.0), (50_000, 60.0), (50_000, -1.0)])
def test_history_is_what_a_search_of_all_events_finds(
    place: Place, monkeypatch: pytest.MonkeyPatch, examined: int, patience: float
) -> None:
    """Whatever the filters, in pages of whatever length, also where a page gives up looking."""
    monkeypatch.setattr("papaours_auth.usage.history.EXAMINED", examined)
    monkeypatch.setattr("papaours_auth.usage.history.PATIENCE", patience)
    monkeypatch.setattr("papaours_auth.usage.history.STRETCH", 8)
    drawn = random.Random(7)
    machines = {"k0": "m0", "k1": "m0", "k2": "m0", "k3": "m1"}
    events = []
    for number in range(120):
        key = drawn.choice(list(machines))
        at = NOON + timedelta(seconds=drawn.randint(0, 60))  # many at the same moment
        events.append(
            event(at, key, drawn.choice("ab"), drawn.choice("xyz"), drawn.choice((200, 200, 200, 404)), machines[key])
            ._replace(event_id=f"e{number}")
        )  # fmt: skip
    place.write(*events[:60])
    place.write(*events[60:])
    choices: dict[str, list[Any]] = {
        "key_id": ["k0", "k3", "never"], "machine_id": ["m0", "m1", "never"], "address": ["x", "never"],
        "route": ["a"], "status": [200, 404, 500], "since": [NOON + timedelta(seconds=20)],
        "until": [NOON + timedelta(seconds=40)],
    }  # fmt: skip
    for _ in range(20):
        names = drawn.sample(list(choices), drawn.randint(0, 4))
        filters = {name: drawn.choice(choices[name]) for name in names}
        newest = sorted(enumerate(events), key=lambda item: (item[1].time, item[0]), reverse=True)
        wanted = [found.event_id for _, found in newest if _fits(found, filters)]
        assert walked(place.usage, drawn.choice((3, 7, 1_000)), **filters) == wanted, filters


def _fits(found: Event, filters: Mapping[str, Any]) -> bool:
    bounds = {"since": lambda at: found.time >= micro(at), "until": lambda at: found.time < micro(at)}
    return all(
        bounds[name](value) if name in bounds else getattr(found, name) == value
        for name, value in filters.items()
    )


def test_pages_stay_right_while_events_arrive(place: Place) -> None:
    place.write(*(event(NOON + MINUTE * number) for number in range(20)))
    names = []
    page = place.usage.history(limit=3)
    for number in range(20):
        names += [found.event_id for found in page]
        if page.cursor is None:
            break
        place.write(event(NOON + MINUTE * (100 + number)))  # newer than all
        page = place.usage.history(limit=3, cursor=page.cursor)
    assert names == [f"e-{micro(NOON + MINUTE * number)}" for number in range(19, -1, -1)]


def test_a_page_that_gave_up_looking_says_where_to_go_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.usage.history.EXAMINED", 10)
    place.write(
        event(NOON, route="/a", address="y"),
        *(event(NOON + MINUTE * number, route="/a", address="x") for number in range(1, 21)),
        *(event(NOON + MINUTE * number, route="/b", address="y") for number in range(1, 26)),
    )
    pages = [place.usage.history(route="/a", address="y", limit=2)]
    while (cursor := pages[-1].cursor) is not None:
        pages.append(place.usage.history(route="/a", address="y", limit=2, cursor=cursor))
    assert [len(page) for page in pages] == [0, 0, 1]


def test_keys_of_a_machine_are_put_together_as_far_down_as_all_were_searched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key's search gives up above where another's has found something: that is for a later page."""
    monkeypatch.setattr("papaours_auth.usage.history.EXAMINED", 10)
    place.write(
        *(event(NOON + MINUTE * number, "k1") for number in range(10, 30)),
        event(NOON + timedelta(seconds=150), "k1", status=404),
        *(event(NOON + MINUTE * number, "k2", status=404) for number in range(5)),
        *(event(NOON + MINUTE * number, "k3", status=404, machine="m-2") for number in range(50)),
    )
    found = walked(place.usage, 3, machine_id="m-1", status=404)
    assert found == [f"e-{micro(NOON + MINUTE * number)}" for number in (4, 3, 2.5, 2, 1, 0)]


def test_a_page_goes_on_stretch_by_stretch_and_finds_each_event_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.usage.history.STRETCH", 8)
    events = [event(NOON + MINUTE * number, route="ab"[number % 2]) for number in range(100)]
    place.write(*events)
    page = place.usage.history(key_id="new", route="a", status=200, limit=1_000)
    assert page == [found for found in events[::-1] if found.route == "a"]
    assert page.cursor is None


def test_a_page_out_of_patience_begins_no_further_stretch(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write(*(event(NOON + MINUTE * number, address="x", route="/a") for number in range(40)))
    place.write(*(event(NOON + MINUTE * number, address="y", route="/b") for number in range(40)))
    monkeypatch.setattr("papaours_auth.usage.history.STRETCH", 10)
    assert place.usage.history(address="x", route="/b").cursor is None
    monkeypatch.setattr("papaours_auth.usage.history.PATIENCE", -1.0)
    page = place.usage.history(address="x", route="/b")
    assert page == []
    assert page.cursor is not None
    assert page.cursor.startswith(f"{micro(NOON + MINUTE * 30):x}.")


def test_a_page_of_the_last_events_has_no_next_one(usage: Usage) -> None:
    assert usage.history(limit=5).cursor is not None  # it was full: whether there is more, the next one tells
    assert usage.history(limit=6).cursor is None
    assert usage.history(cursor=usage.history(limit=5).cursor) == Page([], None)


def test_no_filter_makes_sqlite_sort_or_read_all(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    SQLiteSink(path).write(Batch("p", 1, [event(NOON, machine=f"m-{number}") for number in range(3)]))
    plans: list[str] = []

    class Explaining(SQLiteReader):
        @contextlib.contextmanager
        def snapshot(self) -> Iterator[Ask]:
            with super().snapshot() as ask:

                def explain(statement: str, values: Mapping[str, Cell]) -> Any:
                    if "usage_events" in statement:
                        plans.extend(row[3] for row in ask(f"explain query plan {statement}", values))
                    return ask(statement, values)

                yield explain

    usage = Usage(Explaining(path))
    for filters in (
        {},
        {"key_id": "new"},
        {"address": "x"},
        {"route": "/a"},
        {"status": 200},
        {"machine_id": "m-1"},
    ):
        usage.history(**filters)
        usage.history(**{"status": 404, "key_id": "new", **filters})  # type: ignore[arg-type]
    assert plans
    assert not [plan for plan in plans if "TEMP B-TREE" in plan or plan.startswith("SCAN usage")]


# what cannot be answered


@pytest.mark.parametrize(
    "ask",
    [
        lambda usage: usage.unused_since(datetime(2026, 1, 1)),  # noqa: DTZ001 - that is the point
        lambda usage: usage.history(since=datetime(2026, 1, 1)),  # noqa: DTZ001
        lambda usage: usage.history(cursor="1; drop table"),
        lambda usage: usage.history(limit=0),
        lambda usage: usage.history(limit=10_001),
        lambda usage: usage.series("a", "week"),
        lambda usage: usage.series(),
        lambda usage: usage.by_route("a", machine_id="b"),
    ],
)
def test_what_cannot_be_meant_is_refused(usage: Usage, ask: Callable[[Usage], object]) -> None:
    with pytest.raises(InvalidInput):
        ask(usage)


def test_a_filter_is_no_statement(usage: Usage) -> None:
    assert usage.history(machine_id="' or 1=1 --") == []
    assert usage.history(route="' or 1=1 --") == []


def test_where_nothing_was_recorded_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="recorded"):
        Usage(tmp_path / "absent.db").last_used("new")
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(StoreUnavailable, match="next call"):
        Usage(tmp_path / "empty.db").last_used("new")


@pytest.mark.parametrize("url", ["redis://localhost", "sqlite:///", "nonsense://x"])
def test_a_url_that_answers_nothing_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_reader(url)


def test_a_path_is_read_as_it_is(tmp_path: Path) -> None:
    SQLiteSink(tmp_path / "usage ?.db").write(Batch("p", 1, [event(NOON)]))
    assert len(Usage(tmp_path / "usage ?.db").history()) == 1


def test_a_clock_that_was_wrong_breaks_no_answer(place: Place) -> None:
    wrong = event(NOON)._replace(time=1 << 62)
    place.write(wrong, event(NOON))
    last = place.usage.last_used("new")
    assert last is not None
    assert last.last.year == 9999
    assert place.usage.history() == [wrong, event(NOON)]
    assert place.usage.report("m-1", NOON).calls == 2
    assert moment(micro(NOON)) == NOON


# how far behind


def test_last_used_is_the_calls_own_time_and_at_most_two_intervals_behind(tmp_path: Path) -> None:
    """Where the recorder's own thread delivers: when a call began, not when it was delivered."""
    path, interval = tmp_path / "usage.db", 0.2
    with Recorder(f"sqlite:///{path}", interval=interval, spool=tmp_path / "spool") as recorder:
        usage = Usage(path)
        ended = []
        for number in range(3):
            began = datetime.now(UTC)
            call = begin_call(CALLER, None, "GET")
            made = datetime.now(UTC)
            call.status = 200
            recorder.sent(call)
            recorder.done(call, Outcome.COMPLETED)
            wait_until(lambda: _calls(usage) == number + 1, 10, what="the call")  # noqa: B023 - waited for here
            ended.append(datetime.now(UTC) - began)
            last = usage.last_used("key-1")
            assert last is not None
            clocks = timedelta(milliseconds=1)  # the two are not read at once
            assert began - clocks <= last.last <= made + clocks
        assert min(ended) < timedelta(seconds=2 * interval + 0.5)  # the least disturbed one


def _calls(usage: Usage) -> int:
    try:
        last = usage.last_used("key-1")
    except StoreUnavailable:
        return 0
    return last.calls if last is not None else 0


# event loops


def test_event_loops_have_the_same_answers(usage: Usage) -> None:
    twin = AsyncUsage(usage)

    async def ask() -> None:
        assert await twin.last_used("new") == usage.last_used("new")
        assert await twin.last_uses() == usage.last_uses()
        assert await twin.unused_since(NOON) == usage.unused_since(NOON)
        assert await twin.history(status=404) == usage.history(status=404)
        assert await twin.series("new", "day", NOON) == usage.series("new", "day", NOON)
        assert await twin.by_route("new") == usage.by_route("new")
        assert await twin.by_address("new") == usage.by_address("new")
        assert await twin.still_used("new", HOUR_AGO) == usage.still_used("new", HOUR_AGO)
        assert await twin.report("m-1", NOON) == usage.report("m-1", NOON)

    asyncio.run(ask())


def test_event_loops_are_not_held_up(tmp_path: Path) -> None:
    """The answer waits for what the loop does meanwhile."""
    gone_on = threading.Event()

    class Slow:
        prefix = ""

        @contextlib.contextmanager
        def snapshot(self) -> Iterator[Ask]:
            if not gone_on.wait(10):
                raise StoreUnavailable("the loop stood still")

            def ask(statement: str, values: Mapping[str, Cell]) -> list[Row]:
                return []

            yield ask

    async def run() -> None:
        asked = asyncio.ensure_future(AsyncUsage(Slow()).last_used("new"))
        await asyncio.sleep(0)
        gone_on.set()
        assert await asked is None

    asyncio.run(run())


def test_every_question_has_its_twin() -> None:
    def names(of: type) -> set[str]:
        return {name for name in vars(of) if not name.startswith("_")}

    assert names(AsyncUsage) == names(Usage)
