"""Usage in SQLite: a file of its own, or tables beside the keys. Exactly once, rolled up, kept for a time.

It writes to ``usage_*`` tables alone, over a connection that is closed before a fork. Opening one for each batch
took a tenth to a fifth of the time of 1,000 events, and half of that of 10.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

from .._fork import hold_across_fork, notice_fork
from ..exceptions import StoreUnavailable
from ..stores.sqlite_wal import turn_to_wal
from . import rollup
from .layout import IDENTITY, VERSION, newer, prepare, transaction, version_of
from .reader import Ask, Cell, Row
from .rollup import MOST_DISTINCT, MOST_NETWORKS, Bucket, Column, Expired, Known, Retention
from .sinks import Batch

__all__ = ["Retention", "SQLiteReader", "SQLiteSink"]

_PRUNE_EVERY: Final = 60.0
_PRUNE_ROWS: Final = 1_000
_WAIT: Final = 5.0
_CACHE: Final = (
    64 << 10
)  # KiB, of which only what a batch touches is taken: beyond it, pages are written twice
_MAPPED: Final = 1 << 30
_ADDED: Final[Mapping[Column, str]] = {
    "route": "insert into usage_routes values (?, ?, ?, ?, ?, ?) on conflict do update "
    "set calls = calls + excluded.calls, last = max(last, excluded.last)",
    "address": "insert into usage_addresses values (?, ?, ?, ?, ?, ?) on conflict do update "
    "set calls = calls + excluded.calls, last = max(last, excluded.last)",
}
_KNOWN: Final[Mapping[Column, str]] = {
    "route": "select route from usage_routes where key_id = ? and step = ? and start = ?",
    "address": "select address from usage_addresses where key_id = ? and step = ? and start = ?",
}

_File: TypeAlias = tuple[int, int]
"""Device and inode."""


class SQLiteSink:
    """Keeps events in an SQLite file, made (0600) where there is none, now or later. See `Retention`."""

    def __init__(self, path: Path | str, *, retention: Retention = Retention()) -> None:  # noqa: B008 - immutable
        self._idle: list[tuple[sqlite3.Connection, _File | None]] = []
        self.path = Path(path).absolute()
        self._retention = retention
        self._pruned = float("-inf")
        self._known = Known()
        hold_across_fork(self)

    def write(self, batch: Batch) -> None:
        """Store a batch, unless it is stored already. Then forget a little of what is too old."""
        connection, file = self._take()
        try:
            with transaction(connection):
                if _first_time(connection, batch):
                    _store(connection, batch, self._known)
            if time.monotonic() - self._pruned > _PRUNE_EVERY:
                self._prune(connection, 2 * len(batch.events))
            connection.execute("pragma shrink_memory")
        except BaseException:
            connection.close()
            raise
        self._idle.append((connection, file))

    def close(self) -> None:
        """Close the file, which the next batch opens again."""
        while True:
            try:
                connection, _ = self._idle.pop()
            except IndexError:  # not asked before: another thread may be faster
                return
            connection.close()

    __del__ = before_fork = close

    def after_fork(self, *, child: bool) -> None:
        """Close what a fork in C has copied: see the key store's pool. Parent and child open the file again."""
        if child:
            self.close()

    def _take(self) -> tuple[sqlite3.Connection, _File | None]:
        notice_fork()
        file = _file(self.path)
        try:
            connection, opened = self._idle.pop()
        except IndexError:
            return self._open()
        if opened == file:
            return connection, file
        connection.close()  # another file has its name by now, or none
        self._known = Known()
        return self._open()

    def _open(self) -> tuple[sqlite3.Connection, _File | None]:
        # Opened and closed by us, a file of keys would lose its locks: only one that is not there is made.
        if not self.path.exists():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        file = _file(self.path)  # before it is opened: one that takes its place meanwhile is noticed
        connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"pragma cache_size = -{_CACHE}")
            turn_to_wal(connection)
            prepare(connection)
            connection.execute("pragma synchronous=normal")  # SIGKILL is covered, power loss is not
        except BaseException:
            connection.close()
            raise
        return connection, file

    def _prune(self, connection: sqlite3.Connection, most: int) -> None:
        """Forget a bounded number of rows, in a transaction of its own: nobody waits long for it.

        Twice as many events as came with the batch, so that they go faster than they come. With more to go,
        the next batch goes on.
        """
        left = max(_PRUNE_ROWS, most)
        with transaction(connection):
            for old in rollup.expired(self._retention, time.time_ns() // 1000):
                left -= _forget(connection, old, left)
        if left > 0:
            self._pruned = time.monotonic()


def _file(path: Path) -> _File | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _forget(connection: sqlite3.Connection, old: Expired, most: int) -> int:
    identity = IDENTITY[old.table]
    condition = "step = :step and " if old.step else ""
    if old.table == "usage_events":
        condition = "id <> (select max(id) from usage_events) and "  # or its number would be given again
    gone = connection.execute(
        f"delete from {old.table} where ({identity}) in "  # noqa: S608 - words of ours
        f"(select {identity} from {old.table} where {condition}{old.column} < :oldest limit :most)",
        {"step": old.step, "oldest": old.oldest, "most": most},
    )
    return gone.rowcount


def _first_time(connection: sqlite3.Connection, batch: Batch) -> bool:
    done = connection.execute(
        "insert into usage_batches values (?, ?, ?) on conflict(producer) do update "
        "set sequence = excluded.sequence, at = excluded.at where excluded.sequence > sequence",
        (batch.producer, batch.sequence, time.time_ns() // 1000),
    )
    return done.rowcount == 1


def _store(connection: sqlite3.Connection, batch: Batch, known: Known) -> None:
    connection.executemany(
        "insert into usage_events(event_id, time, key_id, machine_id, address, method, route, status, reason, "
        "outcome, service, environment, duration, request_id) values (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        [event[1:] for event in batch.events],
    )
    connection.executemany(
        "insert into usage_series values (?, ?, ?, ?, ?) on conflict do update set calls = calls + excluded.calls",
        rollup.series(batch.events),
    )
    connection.executemany(
        "insert into usage_keys values (?, ?, ?, ?, ?) on conflict do update set calls = calls + excluded.calls, "
        "first = min(first, excluded.first), last = max(last, excluded.last)",
        rollup.keys(batch.events),
    )
    for column, added in _ADDED.items():
        connection.executemany(added, list(_counts(connection, batch, column, known)))
    _store_refusals(connection, batch)


def _counts(
    connection: sqlite3.Connection, batch: Batch, column: Column, known: Known
) -> Iterator[tuple[Cell, ...]]:
    def read(places: Sequence[Bucket]) -> Iterator[tuple[Bucket, str]]:
        return ((place, value) for place in places for (value,) in connection.execute(_KNOWN[column], place))

    wanted = rollup.tallies(batch.events, column)
    here = known.among(column, wanted, read)
    for place, values in wanted.items():
        for value, tally in rollup.capped(values, here[place], MOST_DISTINCT[place[1]]).items():
            yield *place, value, *tally


def _store_refusals(connection: sqlite3.Connection, batch: Batch) -> None:
    for (minute, reason), networks in rollup.by_minute(batch.refusals).items():
        rows = connection.execute(
            "select network from usage_refusals where minute = ? and reason = ?", (minute, reason)
        )
        kept = rollup.capped(networks, {network for (network,) in rows}, MOST_NETWORKS)
        connection.executemany(
            "insert into usage_refusals values (?, ?, ?, ?) on conflict do update set count = count + excluded.count",
            [(minute, reason, network, tally.calls) for network, tally in kept.items()],
        )


class SQLiteReader:
    """Reads the file of an `SQLiteSink`; changes nothing in it."""

    prefix = ""

    def __init__(self, path: Path | str) -> None:
        self._uri = f"file:{quote(str(Path(path).absolute()))}?mode=ro"

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Ask]:
        """See `Reader.snapshot`."""
        try:
            with contextlib.closing(
                sqlite3.connect(self._uri, uri=True, timeout=_WAIT, isolation_level=None)
            ) as connection:
                connection.execute(f"pragma mmap_size = {_MAPPED}")
                connection.execute("begin")
                _check(connection)

                def ask(statement: str, values: Mapping[str, Cell]) -> Sequence[Row]:
                    return connection.execute(statement, values).fetchall()

                yield ask
        except sqlite3.Error as error:
            raise StoreUnavailable(
                "the usage file cannot be read: has anything been recorded in it?"
            ) from error


def _check(connection: sqlite3.Connection) -> None:
    found = version_of(connection)
    if found > VERSION:
        raise newer()
    if found < VERSION:
        raise StoreUnavailable(
            "the usage file has no tables of this version yet: they are made, or brought up to date, with the next "
            "call that is recorded"
        )
