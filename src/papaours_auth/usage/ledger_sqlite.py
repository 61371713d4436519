"""The ledger of a watch in the file that an `SQLiteSink` fills. It is opened for each call, and may cross a fork."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ..exceptions import StoreUnavailable
from .layout import transaction
from .ledger import Desk
from .reader import Ask, Cell, Row

_TABLES: Final = """
create table if not exists usage_signs(place text not null unique, kind text not null, seen integer not null,
  weight integer not null, state text not null) strict;
create index if not exists usage_signs_worth on usage_signs(kind, weight, seen);
create table if not exists usage_signs_position(one integer primary key check(one = 1), event integer not null,
  turn integer not null) strict;
create table if not exists usage_signs_refusals(minute integer not null, reason text not null,
  network text not null, count integer not null, primary key(minute, reason, network)) strict, without rowid;
create table if not exists usage_signs_told(reader text primary key, turn integer not null,
  alert integer not null) strict, without rowid;
insert or ignore into usage_signs_position values (1, 0, 0);
create table if not exists usage_alerts(id integer primary key autoincrement, sign text not null,
  kind text not null, subject text not null, machine_id text not null, severity text not null,
  first integer not null, last integer not null, findings integer not null, evidence text not null,
  muted_until integer not null, turn integer not null) strict;
create index if not exists usage_alerts_subject on usage_alerts(subject, kind, sign, id);
create index if not exists usage_alerts_last on usage_alerts(last);
create index if not exists usage_alerts_turn on usage_alerts(turn, id)
"""
_WAIT: Final = 5.0


class SQLiteLedger:
    """See `Ledger`."""

    def __init__(self, path: Path | str) -> None:
        self._uri = f"file:{quote(str(Path(path).absolute()))}?mode=rw"

    def prepare(self) -> None:
        """See `Ledger.prepare`."""
        with self._open() as connection:
            connection.execute(
                "select 1 from usage_events limit 1"
            )  # before anything is made in another's file
            with transaction(connection):
                for statement in _TABLES.split(";"):  # `executescript` would commit
                    connection.execute(statement)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Ask]:
        """See `Ledger.reading`."""
        with self._open() as connection:
            connection.execute("begin")
            yield _asking(connection)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Desk]:
        """See `Ledger.writing`."""
        with self._open() as connection, transaction(connection):
            yield Desk(_asking(connection), connection.executemany)

    def settled(self, top: int) -> int:
        """Give the top: one process writes at a time, so events appear in the order of their numbers."""
        return top

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self._uri, uri=True, timeout=_WAIT, isolation_level=None)
            ) as connection:
                connection.execute("pragma synchronous=normal")  # as the sink has it
                yield connection
        except sqlite3.Error as error:
            raise StoreUnavailable(
                "the usage file cannot be read: has anything been recorded in it?"
            ) from error


def _asking(connection: sqlite3.Connection) -> Ask:
    def ask(statement: str, values: Mapping[str, Cell]) -> Sequence[Row]:
        return connection.execute(statement, values).fetchall()

    return ask
