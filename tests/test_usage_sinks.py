"""Sinks in databases: the contract on each, what they add up, for how long they keep it, and older files."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.event
from sqlalchemy import Engine, create_engine, text

from papaours_auth.exceptions import ConfigurationError, StoreUnavailable
from papaours_auth.testing import SinkContract
from papaours_auth.usage import Batch, Event, Recorder, Refusals, Sink, open_sink, rollup
from papaours_auth.usage.questions import Usage
from papaours_auth.usage.rollup import DAY, HOUR, OTHER, SECOND, Bucket, Retention, Tally
from papaours_auth.usage.sql import SQLReader, SQLSink, multiplied
from papaours_auth.usage.sqlite import SQLiteSink
from support.sql_servers import SERVERS, SQLServer
from support.usage import call

NOW = time.time_ns() // 1000
TODAY = NOW // DAY * DAY
BY_KEY = "select key_id, status, count(*) from {}usage_events group by 1, 2"


def event(at: int = NOW, key: str = "key_1", *, route: str = "/a", address: str = "192.0.2.1") -> Event:
    return Event(1, "p-1-1", at, key, "m-1", address, "GET", route, 200, "", "completed", "", "prod", 5, "")


# the contract


class TestSQLite(SinkContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "usage.db"

    def open(self) -> Sink:
        return open_sink(f"sqlite:///{self.path}")

    def stored(self) -> Mapping[tuple[str, int], int]:
        with closing(sqlite3.connect(self.path)) as connection:
            return {(key, status): calls for key, status, calls in connection.execute(BY_KEY.format(""))}


class BySQLAlchemy(SinkContract):
    """Sinks over engines of their own."""

    url: str

    def open(self) -> Sink:
        sink = open_sink(self.url)
        assert isinstance(sink, SQLSink)
        self.opened = sink
        return sink

    def stored(self) -> Mapping[tuple[str, int], int]:
        with self.opened._engine.connect() as connection:
            rows = connection.execute(text(BY_KEY.format("papaours_"))).all()
        return {(key, status): calls for key, status, calls in rows}


class TestSQLiteBySQLAlchemy(BySQLAlchemy):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.url = f"sqlalchemy+sqlite:///{tmp_path}/usage.db"


class TestPostgreSQL(BySQLAlchemy):
    @pytest.fixture(autouse=True)
    def _database(self, postgresql_server: SQLServer) -> None:
        self.url = postgresql_server.url(postgresql_server.database())


class TestMariaDB(BySQLAlchemy):
    @pytest.fixture(autouse=True)
    def _database(self, mariadb_server: SQLServer) -> None:
        self.url = mariadb_server.url(mariadb_server.database())


class TestMySQL(BySQLAlchemy):
    @pytest.fixture(autouse=True)
    def _database(self, mysql_server: SQLServer) -> None:
        self.url = mysql_server.url(mysql_server.database())


# what is added up, and for how long it is kept: the same in all


@pytest.fixture(params=["sqlite", "sqlalchemy+sqlite", *SERVERS])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in SERVERS:
        server: SQLServer = request.getfixturevalue(f"{request.param}_server")
        return server.url(server.database())
    return f"{request.param}:///{tmp_path}/usage.db"


class Place:
    """A sink and what it wrote."""

    def __init__(self, url: str) -> None:
        self.sink = open_sink(url)
        assert isinstance(self.sink, SQLSink | SQLiteSink)
        if isinstance(self.sink, SQLSink):
            self.engine, self.prefix = self.sink._engine, "papaours_"
        else:
            self.engine, self.prefix = create_engine(f"sqlite:///{self.sink.path}"), ""
        self.sequence = 0

    def write(self, *events: Event, refusals: list[Refusals] | None = None) -> None:
        self.sequence += 1
        self.sink.write(Batch("p", self.sequence, events, refusals or []))

    def keep(self, retention: Retention) -> None:
        self.sink._retention = retention  # type: ignore[attr-defined]  # one of ours, as asserted above
        self.sink._pruned = float("-inf")  # type: ignore[attr-defined]  # a minute later

    def rows(self, what: str, table: str) -> list[tuple[object, ...]]:
        with self.engine.connect() as connection:
            found = connection.execute(text(f"select {what} from {self.prefix}usage_{table}")).all()
        return [tuple(int(cell) if not isinstance(cell, str) else cell for cell in row) for row in found]


@pytest.fixture
def place(url: str) -> Iterator[Place]:
    place = Place(url)
    yield place
    place.engine.dispose()


def test_batches_add_up_by_step_key_route_and_address(place: Place) -> None:
    place.write(event(TODAY), event(TODAY + HOUR, route="/b"))
    place.write(event(TODAY + HOUR + 1), event(TODAY - 1))
    assert sorted(place.rows("step, start, calls", "series where step <> 'minute'")) == [
        ("day", TODAY - DAY, 1),
        ("day", TODAY, 3),
        ("hour", TODAY - HOUR, 1),
        ("hour", TODAY, 1),
        ("hour", TODAY + HOUR, 2),
    ]
    assert place.rows("first, last, calls", "keys") == [(TODAY - 1, TODAY + HOUR + 1, 4)]
    assert sorted(place.rows("start, route, calls, last", "routes where step = 'hour'")) == [
        (TODAY - HOUR, "/a", 1, TODAY - 1),
        (TODAY, "/a", 1, TODAY),
        (TODAY + HOUR, "/a", 1, TODAY + HOUR + 1),
        (TODAY + HOUR, "/b", 1, TODAY + HOUR),
    ]
    assert sorted(place.rows("start, address, calls, last", "addresses where step = 'day'")) == [
        (TODAY - DAY, "192.0.2.1", 1, TODAY - 1),
        (TODAY, "192.0.2.1", 3, TODAY + HOUR + 1),
    ]


def test_what_comes_late_moves_no_last_use_back(place: Place) -> None:
    hour = NOW // HOUR * HOUR
    place.write(event(hour + 9))
    place.write(event(hour + 5))
    assert place.rows("first, last, calls", "keys") == [(hour + 5, hour + 9, 2)]
    for table in ("routes", "addresses"):
        assert place.rows("calls, last", f"{table} where step = 'hour'") == [(2, hour + 9)]


def test_a_flood_of_new_routes_and_addresses_takes_a_bounded_number_of_rows(place: Place) -> None:
    place.write(event(NOW, route="/known"), event(NOW, route="/known"))
    for part in range(3):
        names = [f"{part}.{number}" for number in range(150)]
        place.write(
            *(event(NOW, route=f"/{name}", address=name) for name in names), event(NOW, route="/known")
        )
    for table in ("routes", "addresses"):
        for step, most in rollup.MOST_DISTINCT.items():
            assert place.rows("count(*), sum(calls)", f"{table} where step = '{step}'") == [(most + 1, 455)]
    assert place.rows("calls", f"routes where route = '{OTHER}' and step = 'hour'") == [(251,)]
    assert place.rows("calls", "routes where route = '/known' and step = 'day'") == [(5,)]


def test_what_has_rows_is_read_by_few_statements_whether_keys_or_hours_are_many(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted are SQLAlchemy's statements: the sink of a file reads its own rows by no round trip."""
    for module in ("sql", "sqlite"):
        monkeypatch.setattr(f"papaours_auth.usage.{module}.MOST_DISTINCT", {"hour": 1, "day": 1})
    first, second = Place(url), Place(url)  # another process, which knows of no row
    many_hours = [(f"key_{number % 2}", TODAY + number * HOUR) for number in range(24)]
    many_keys = [(f"key_{number}", NOW) for number in range(10, 34)]
    first.write(*(event(at, key, route="/a") for key, at in [*many_hours, *many_keys]))
    asked: list[str] = []

    def note(*given: Any) -> None:
        if given[2].startswith("SELECT") and "usage_routes" in given[2] and "LIMIT" not in given[2]:
            asked.append(given[2])

    sqlalchemy.event.listen(second.engine, "before_cursor_execute", note)
    second.sequence = 1
    for wanted in (many_hours, many_keys):
        asked.clear()
        second.write(*(event(at, key, route=route) for key, at in wanted for route in ("/a", "/b", "/b")))
        assert (len(asked) > 0) == isinstance(second.sink, SQLSink)
        assert len(asked) <= 3, "a statement for each of two keys or for one hour, and one for the day"
    for step, buckets in (("hour", 24 + 24), ("day", 2 + 24)):
        rows = first.rows("route, count(*), sum(calls)", f"routes where step = '{step}' group by route")
        assert sorted(rows) == [("/a", buckets, 96), (OTHER, buckets, 96)]
    for place in (first, second):
        place.engine.dispose()


def test_a_flood_of_networks_takes_a_bounded_number_of_rows(place: Place) -> None:
    minute = NOW // (60 * SECOND) * 60 * SECOND
    flood = [
        Refusals(minute, "unknown_key", f"10.{number // 256}.{number % 256}.0/24", 2)
        for number in range(1_500)
    ]
    place.write(refusals=flood[:800])
    place.write(refusals=flood)
    assert place.rows("count(*), sum(count)", "refusals") == [(rollup.MOST_NETWORKS + 1, 4_600)]


def test_what_is_too_old_goes_a_bounded_number_of_rows_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "sql" if isinstance(place.sink, SQLSink) else "sqlite"
    monkeypatch.setattr(f"papaours_auth.usage.{module}._PRUNE_ROWS", 10)
    place.keep(Retention(events=9_999, minute=9_999, hour=9_999, day=9_999))
    place.write(*(event(TODAY - 40 * DAY + number) for number in range(25)), event(NOW))
    place.keep(Retention(events=1, minute=1, hour=1, day=50))
    left = []
    for _ in range(6):
        place.write()
        left.append(place.rows("count(*)", "events")[0][0])
    assert left[:3] == [16, 6, 1]
    assert (
        sorted(place.rows("step, start = :day".replace(":day", str(TODAY)), "series where start % 2 = 0"))
        != []
    )
    assert {(step, start) for step, start in place.rows("step, start", "series") if step != "day"} == {
        ("minute", NOW // 60_000_000 * 60_000_000),
        ("hour", NOW // HOUR * HOUR),
    }
    assert len(place.rows("start", "series where step = 'day'")) == 2
    for table in ("routes", "addresses"):
        assert sorted(place.rows("step, calls", table)) == [("day", 1), ("day", 25), ("hour", 1)]
    assert place.rows("calls", "keys") == [(26,)]


def test_a_large_batch_takes_more_with_it_than_it_brings(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "sql" if isinstance(place.sink, SQLSink) else "sqlite"
    monkeypatch.setattr(f"papaours_auth.usage.{module}._PRUNE_ROWS", 10)
    place.keep(Retention(events=9_999, minute=9_999, hour=9_999, day=9_999))
    place.write(*(event(TODAY - 40 * DAY + number) for number in range(100)))
    place.keep(Retention(events=1, minute=9_999, hour=9_999, day=9_999))
    place.write(*(event(NOW) for _ in range(20)))
    assert place.rows("count(*)", "events") == [(80,)]


def test_the_most_called_of_what_is_new_is_kept_first() -> None:
    values = {"/a": Tally(1, 5), "/b": Tally(3, 6), "/c": Tally(2, 9), OTHER: Tally(1, 7)}
    assert rollup.capped(values, set(), 2) == {"/b": (3, 6), "/c": (2, 9), OTHER: (2, 7)}
    assert rollup.capped(values, {"/a", OTHER}, 2) == {"/a": (1, 5), "/b": (3, 6), OTHER: (3, 9)}
    assert rollup.capped({"/a": Tally(1, 1)}, {"/b"}, 1) == {OTHER: (1, 1)}


def test_what_has_a_row_is_asked_for_once_and_again_where_something_is_new() -> None:
    asked: list[list[Bucket]] = []
    rows = {"k": {"/a", "/b"}, "l": {"/a"}}

    def among(known: rollup.Known, **wanted: str) -> dict[str, AbstractSet[str]]:
        def read(places: Sequence[Bucket]) -> Iterator[tuple[Bucket, str]]:
            asked.append(list(places))
            return ((place, value) for place in places for value in rows.get(place[0], ()))

        values: dict[Bucket, dict[str, Tally]] = {
            (key, "hour", 0): {value: Tally(1, 1)} for key, value in wanted.items()
        }
        return {key: found for (key, *_), found in known.among("route", values, read).items()}

    known = rollup.Known(most=10)
    assert among(known, k="/a", l="/a") == {"k": {"/a", "/b"}, "l": {"/a"}}
    assert among(known, k="/b", l="/a") == {"k": {"/a", "/b"}, "l": {"/a"}}
    rows["k"] = {"/a", "/b", "/c"}
    assert among(known, k="/c", l="/a") == {"k": {"/a", "/b", "/c"}, "l": {"/a"}}
    assert asked == [[("k", "hour", 0), ("l", "hour", 0)], [("k", "hour", 0)]]
    for number in range(100):
        among(known, **{f"key_{number}": "/a"})
        assert sum(1 + len(values) for values in known._found.values()) == known._held <= 10


# the connection to a file


def kept(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("select producer from usage_batches order by 1")]


def test_a_file_is_opened_once_until_the_sink_is_closed(tmp_path: Path) -> None:
    sink, path = SQLiteSink(tmp_path / "usage.db"), tmp_path / "usage.db"
    sink.write(Batch("a", 1, [event()]))
    ((connection, _),) = sink._idle
    thread = threading.Thread(target=sink.write, args=(Batch("b", 1, [event()]),))
    thread.start()
    thread.join()
    assert [held for held, _ in sink._idle] == [connection]
    assert path.with_name("usage.db-wal").exists()
    sink.close()
    assert not path.with_name("usage.db-wal").exists()  # nobody has it open
    sink.write(Batch("c", 1, [event()]))
    assert kept(path) == ["a", "b", "c"]


def test_a_recorder_closes_the_file_that_it_opened(tmp_path: Path) -> None:
    with Recorder(f"sqlite:///{tmp_path}/usage.db") as recorder:
        call(recorder)
        assert recorder.flush()
        assert (tmp_path / "usage.db-wal").exists()
    assert not (tmp_path / "usage.db-wal").exists()
    recorder.start()
    call(recorder)
    recorder.close()
    assert recorder.stats().delivered == 1
    assert len(Usage(tmp_path / "usage.db").history()) == 2


def test_a_file_that_was_removed_or_replaced_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    sink, other = SQLiteSink(path), SQLiteSink(tmp_path / "other.db")
    sink.write(Batch("a", 1, [event()]))
    for part in tmp_path.glob("usage.db*"):
        part.unlink()
    sink.write(Batch("b", 1, [event()]))
    assert kept(path) == ["b"]
    assert path.stat().st_mode & 0o777 == 0o600
    other.write(Batch("c", 1, [event()]))
    other.close()
    for part in tmp_path.glob("usage.db-*"):
        part.unlink()
    (tmp_path / "other.db").replace(path)
    sink.write(Batch("d", 1, [event()]))
    assert kept(path) == ["c", "d"]


def test_after_an_error_the_file_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = SQLiteSink(tmp_path / "usage.db")
    sink.write(Batch("a", 1, [event()]))
    ((connection, _),) = sink._idle
    with monkeypatch.context() as patch:
        patch.setattr("papaours_auth.usage.sqlite._KNOWN", {"route": "nonsense", "address": "nonsense"})
        with pytest.raises(sqlite3.Error):
            sink.write(Batch("b", 1, [event(route="/new")]))
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("select 1")
    sink.write(Batch("b", 1, [event()]))
    assert kept(tmp_path / "usage.db") == ["a", "b"]


def test_pitfall_22_a_fork_takes_no_connection_to_the_file_along(tmp_path: Path) -> None:
    sink = SQLiteSink(tmp_path / "usage.db")
    sink.write(Batch("parent", 1, [event()]))
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 2 if sink._idle else 0
            sink.write(Batch("child", 1, [event()]))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    sink.write(Batch("parent", 2, [event()]))
    assert kept(tmp_path / "usage.db") == ["child", "parent"]


# tables of another version

FORMER = """
create table usage_batches(producer text primary key, sequence integer not null, at integer not null)
  strict, without rowid;
create table usage_events(id integer primary key, event_id text not null, time integer not null,
  key_id text not null, machine_id text not null, address text not null, method text not null, route text not null,
  status integer not null, reason text not null, outcome text not null, service text not null,
  environment text not null, duration integer not null, request_id text not null) strict;
create index usage_events_time on usage_events(time);
create index usage_events_key on usage_events(key_id, time);
create table usage_series(step text not null, start integer not null, key_id text not null,
  status integer not null, calls integer not null, primary key(step, start, key_id, status)) strict, without rowid;
create table usage_keys(key_id text primary key, machine_id text not null, first integer not null,
  last integer not null, calls integer not null) strict, without rowid;
create table usage_refusals(minute integer not null, reason text not null, network text not null,
  count integer not null, primary key(minute, reason, network)) strict, without rowid;
"""


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """A file as the first version left it: three calls, of one batch."""
    path = tmp_path / "usage.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FORMER)
        rows = [event(TODAY, route="/a"), event(TODAY + 1, route="/a"), event(TODAY + 2, route="/b")]
        connection.executemany(
            f"insert into usage_events values (null, {', '.join('?' * 14)})", [row[1:] for row in rows]
        )
        for step in ("minute", "hour", "day"):
            connection.execute("insert into usage_series values (?, ?, 'key_1', 200, 3)", (step, TODAY))
        connection.execute("insert into usage_keys values ('key_1', 'm-1', ?, ?, 3)", (TODAY, TODAY + 2))
        connection.execute("insert into usage_batches values ('p', 4, ?)", (NOW,))
        connection.commit()
    return path


def test_a_file_of_the_former_layout_is_brought_up_to_date_and_loses_nothing(former: Path) -> None:
    with pytest.raises(StoreUnavailable, match="next call"):
        Usage(former).last_used("key_1")
    sink = SQLiteSink(former)
    sink.write(Batch("p", 4, [event(TODAY + 3)]))  # was stored before
    sink.write(Batch("p", 5, [event(TODAY + 3)]))
    usage, since = Usage(former), datetime.fromtimestamp(TODAY / 1e6, UTC)
    assert [(count.of, count.calls) for count in usage.by_route("key_1", since)] == [("/a", 3), ("/b", 1)]
    assert usage.by_address("key_1", since)[0].last == since + timedelta(microseconds=3)
    assert usage.series("key_1", "day", since) == [(since, 4)]
    assert len(usage.history(route="/a")) == 3
    SQLiteSink(former).write(Batch("p", 6, [event(TODAY + 4)]))  # the next start does nothing twice
    assert [count.calls for count in usage.by_route("key_1", since)] == [4, 1]


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("papaours_auth.usage.layout._MOVED", "insert into usage_series select 1; nonsense")
        with pytest.raises(sqlite3.Error):
            SQLiteSink(former).write(Batch("p", 5, [event(TODAY + 3)]))
    SQLiteSink(former).write(Batch("p", 5, [event(TODAY + 3)]))
    assert Usage(former).report("m-1", datetime.fromtimestamp(TODAY / 1e6, UTC)).calls == 4


def test_a_process_of_the_former_version_may_still_write(former: Path) -> None:
    """A rolling upgrade: what it does not know of, it does not count."""
    SQLiteSink(former).write(Batch("new", 1, [event(TODAY + 3)]))
    with closing(sqlite3.connect(former)) as connection:
        connection.execute(
            "insert into usage_series values (?, ?, ?, ?, ?) on conflict do update "
            "set calls = calls + excluded.calls",
            ("day", TODAY, "key_1", 200, 5),
        )
        connection.commit()
    since = datetime.fromtimestamp(TODAY / 1e6, UTC)
    assert Usage(former).series("key_1", "day", since) == [(since, 9)]


def test_tables_of_a_newer_version_are_left_alone(place: Place, url: str) -> None:
    place.write(event())
    with place.engine.begin() as connection:
        connection.execute(text(f"update {place.prefix}usage_schema set version = 99"))
    with pytest.raises(ConfigurationError, match="newer"):
        open_sink(url).write(Batch("q", 1, [event()]))
    with pytest.raises(ConfigurationError, match="newer"):
        Usage(url).last_used("key_1")


# engines


def test_pitfall_22_a_fork_leaves_parent_and_child_with_connections_of_their_own(
    postgresql_server: SQLServer,
) -> None:
    url = postgresql_server.url(postgresql_server.database())
    sink = open_sink(url)
    assert isinstance(sink, SQLSink)
    usage = Usage(url)
    sink.write(Batch("parent", 1, [event()]))
    assert len(usage.history()) == 1
    child = os.fork()
    if not child:
        code = 1
        try:
            sink.write(Batch("child", 1, [event()]))
            code = 0 if len(usage.history()) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    sink.write(Batch("parent", 2, [event()]))
    assert len(usage.history()) == 3


def test_a_connection_that_died_in_the_pool_costs_no_batch_and_no_answer(
    postgresql_server: SQLServer,
) -> None:
    name = postgresql_server.database()
    sink, usage = open_sink(postgresql_server.url(name)), Usage(postgresql_server.url(name))
    for sequence in (1, 2, 3):
        sink.write(Batch("p", sequence, [event()]))
        assert len(usage.history()) == sequence
        postgresql_server.execute(
            f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
        )


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/own.db")
    yield engine
    engine.dispose()


def test_an_apps_own_engine_and_prefix(engine: Engine) -> None:
    SQLSink(engine, prefix="auth_").write(Batch("p", 1, [event()]))
    usage = Usage(SQLReader(engine, prefix="auth_"))
    last = usage.last_used("key_1")
    assert last is not None
    assert last.calls == 1


def test_another_driver_of_postgresql_takes_the_same(
    postgresql_server: SQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = postgresql_server.database()
    url = postgresql_server.url(name)
    copying, other = open_sink(url), open_sink(url)
    odd = event(NOW + 1, route='/é\\"{}\t\\N', address="")
    copying.write(Batch("p", 1, [odd]))
    assert isinstance(other, SQLSink)
    other.create()  # connected
    monkeypatch.setattr(other._engine.dialect, "driver", "another")  # COPY is psycopg's
    other.write(Batch("q", 1, [odd, *(event(NOW - number) for number in range(2_500))]))
    newest, before = Usage(url).history(limit=2)
    assert newest == before == odd
    found = postgresql_server.execute("select count(*) from papaours_usage_events", database=name)
    assert found == [(2_502,)]


def test_many_rows_go_in_a_statement_whatever_the_server_calls_the_given_ones() -> None:
    for tail in ("", " AS new ON DUPLICATE KEY UPDATE a = new.a", " ON DUPLICATE KEY UPDATE a = VALUES(a)"):
        for marks in ("%s, %s", "%(a)s, %(b)s"):  # what a driver calls its parameters
            single = f"INSERT INTO t (a, b) VALUES ({marks}){tail}"
            assert multiplied(single, 2, 3) == (
                f"INSERT INTO t (a, b) VALUES (%s, %s), (%s, %s), (%s, %s){tail}"
            )


@pytest.fixture(params=["mariadb", "mysql"])
def either(request: pytest.FixtureRequest) -> SQLServer:
    server: SQLServer = request.getfixturevalue(f"{request.param}_server")
    return server


def test_connections_that_mysql_ended_cost_neither_a_batch_nor_an_answer(either: SQLServer) -> None:
    name = either.database()
    sink, usage = open_sink(either.url(name)), Usage(either.url(name))
    for number in range(1, 4):
        sink.write(Batch("p", number, [event()]))
        last = usage.last_used("key_1")
        assert last is not None
        assert last.calls == number
        either.end_connections(name)


def test_who_makes_the_tables_for_too_long_is_not_waited_for(
    either: SQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.usage.sql_tables._LOCK_SECONDS", 0)
    url = either.url(either.database())
    other, sink = open_sink(url), open_sink(url)
    assert isinstance(other, SQLSink)
    with other._engine.connect() as connection:
        connection.execute(text("select get_lock('papaours-auth usage schema', 0)"))
        with pytest.raises(ConfigurationError, match="too long"):
            sink.write(Batch("p", 1, [event()]))
        connection.execute(text("select release_lock('papaours-auth usage schema')"))
    sink.write(Batch("p", 1, [event()]))


def test_a_schema_of_its_own_on_postgresql(postgresql_server: SQLServer) -> None:
    name = postgresql_server.database()
    postgresql_server.execute("create schema audit authorization papaours", database=name)
    url = f"{postgresql_server.url(name)}?schema=audit&prefix=auth_&timeout=20"
    open_sink(url).write(Batch("p", 1, [event()]))
    assert len(Usage(url).history(machine_id="m-1", address="192.0.2.1")) == 1
    assert postgresql_server.execute("select calls from audit.auth_usage_keys", database=name) == [(1,)]


def test_a_database_that_was_not_tried_is_refused() -> None:
    engine = create_engine("sqlite://")
    engine.dialect.name = "oracle"
    with pytest.raises(ConfigurationError, match="tried"):
        SQLSink(engine)
    with pytest.raises(ConfigurationError, match="tried"):
        SQLReader(engine)


def test_tables_that_are_not_there_say_so(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        Usage(f"sqlalchemy+sqlite:///{tmp_path}/absent.db").last_used("key_1")
