"""Usage in SQLite: a file of its own, or tables beside the keys. Exactly once, rolled up, kept for a time.

It writes to ``usage_*`` tables alone and opens the file for each batch, so nothing crosses a fork.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from .event import Event
from .sinks import Batch

_SECOND: Final = 1_000_000
_DAY: Final = 86_400 * _SECOND
_STEPS: Final = {"minute": 60 * _SECOND, "hour": 3600 * _SECOND, "day": _DAY}
_LONGEST: Final = 90 * _DAY
_PRUNE_EVERY: Final = 60.0
_PRUNE_ROWS: Final = 20_000
_TABLES: Final = """
create table if not exists usage_batches(producer text primary key, sequence integer not null, at integer not null)
  strict, without rowid;
create table if not exists usage_events(id integer primary key, event_id text not null, time integer not null,
  key_id text not null, machine_id text not null, address text not null, method text not null, route text not null,
  status integer not null, reason text not null, outcome text not null, service text not null,
  environment text not null, duration integer not null, request_id text not null) strict;
create index if not exists usage_events_time on usage_events(time);
create index if not exists usage_events_key on usage_events(key_id, time);
create table if not exists usage_series(step text not null, start integer not null, key_id text not null,
  status integer not null, calls integer not null, primary key(step, start, key_id, status)) strict, without rowid;
create table if not exists usage_keys(key_id text primary key, machine_id text not null, first integer not null,
  last integer not null, calls integer not null) strict, without rowid;
create table if not exists usage_refusals(minute integer not null, reason text not null, network text not null,
  count integer not null, primary key(minute, reason, network)) strict, without rowid;
"""


class Retention(NamedTuple):
    """For how many days each thing is kept."""

    events: float = 30
    minute: float = 2
    hour: float = 90
    day: float = 3 * 365


class SQLiteSink:
    """Keeps events in an SQLite file, made (0600) where there is none."""

    def __init__(self, path: Path | str, *, retention: Retention = Retention()) -> None:  # noqa: B008 - immutable
        self.path = Path(path).absolute()
        self._retention = retention
        self._pruned = float("-inf")
        self._ready = False

    def write(self, batch: Batch) -> None:
        """Store a batch, unless it is stored already."""
        with self._open() as connection:
            connection.execute("begin immediate")
            with _transaction(connection):
                if _first_time(connection, batch):
                    _store(connection, batch)
                due = time.monotonic() - self._pruned > _PRUNE_EVERY
                # With more to go, the next batch goes on: events do not come faster than they go.
                if due and self._prune(connection, time.time_ns() // 1000):
                    self._pruned = time.monotonic()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if (
            not self._ready and not self.path.exists()
        ):  # opened and closed, a file of keys would lose its locks
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(self.path, timeout=5.0, isolation_level=None)) as connection:
            if not self._ready:
                connection.execute("pragma journal_mode=wal")
                connection.executescript(_TABLES)
                self._ready = True
            connection.execute("pragma synchronous=normal")  # SIGKILL is covered, power loss is not
            yield connection

    def _prune(self, connection: sqlite3.Connection, now: int) -> bool:
        """Forget what is too old, a bounded number of rows at a time; false where more is to go."""
        gone = connection.execute(
            "delete from usage_events where id in (select id from usage_events where time < ? limit ?)",
            (now - int(self._retention.events * _DAY), _PRUNE_ROWS),
        )
        for step in _STEPS:
            oldest = now - int(getattr(self._retention, step) * _DAY)
            connection.execute("delete from usage_series where step = ? and start < ?", (step, oldest))
        connection.execute("delete from usage_refusals where minute < ?", (now - _LONGEST,))
        connection.execute("delete from usage_batches where at < ?", (now - _LONGEST,))
        return gone.rowcount < _PRUNE_ROWS


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")


def _first_time(connection: sqlite3.Connection, batch: Batch) -> bool:
    done = connection.execute(
        "insert into usage_batches values (?, ?, ?) on conflict(producer) do update "
        "set sequence = excluded.sequence, at = excluded.at where excluded.sequence > sequence",
        (batch.producer, batch.sequence, time.time_ns() // 1000),
    )
    return done.rowcount == 1


def _store(connection: sqlite3.Connection, batch: Batch) -> None:
    connection.executemany(
        "insert into usage_events(event_id, time, key_id, machine_id, address, method, route, status, reason, "
        "outcome, service, environment, duration, request_id) values (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        [(event.event_id, event.time, *event[3:]) for event in batch.events],
    )
    connection.executemany(
        "insert into usage_series values (?, ?, ?, ?, ?) on conflict do update set calls = calls + excluded.calls",
        _series(batch.events),
    )
    connection.executemany(
        "insert into usage_keys values (?, ?, ?, ?, ?) on conflict do update set calls = calls + excluded.calls, "
        "first = min(first, excluded.first), last = max(last, excluded.last)",
        _keys(batch.events),
    )
    connection.executemany(
        "insert into usage_refusals values (?, ?, ?, ?) on conflict do update set count = count + excluded.count",
        batch.refusals,
    )


def _series(events: Sequence[Event]) -> list[tuple[str, int, str, int, int]]:
    counted = Counter((event.time // _STEPS["minute"], event.key_id, event.status) for event in events)
    sums: Counter[tuple[str, int, str, int]] = Counter()
    for (minute, key, status), calls in counted.items():
        for step, width in _STEPS.items():
            start = minute * _STEPS["minute"] // width * width
            sums[(step, start, key, status)] += calls
    return [(*entry, calls) for entry, calls in sums.items()]


def _keys(events: Sequence[Event]) -> list[tuple[str, str, int, int, int]]:
    seen: dict[str, tuple[str, int, int, int]] = {}
    for event in events:
        machine, first, last, calls = seen.get(event.key_id, (event.machine_id, event.time, event.time, 0))
        seen[event.key_id] = (machine, min(first, event.time), max(last, event.time), calls + 1)
    return [(key, *values) for key, values in seen.items()]
