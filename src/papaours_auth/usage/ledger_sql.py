"""The ledger of a watch in PostgreSQL, MySQL or MariaDB, and SQLite by SQLAlchemy, beside the tables of an `SQLSink`.

Numbers of events are given out before they are committed, so one may appear below others that were read already.
docs/design/signs.md says how `SQLLedger.settled` tells when none can any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    MetaData,
    Table,
    Text,
    insert,
    select,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import SQLAlchemyError

from ..exceptions import StoreUnavailable
from ..stores.sql_drivers import read_url
from ..stores.sql_level import AtLevel
from ..stores.sql_lock import alone
from .ledger import Desk, prefixed
from .reader import Ask, Cell, Row
from .sql import _WRITING, DEFAULT_PREFIX, SQLReader, _patient, twice
from .sql_tables import _ID, _LOCK, _LOCK_SECONDS, _text, check_version

__all__ = ["SQLLedger", "SignsTables", "open_ledger"]

# Whoever adds events holds this lock on their table, from before it takes numbers until they can be read.
_AT_WORK_POSTGRESQL: Final = """
select virtualtransaction from pg_locks where locktype = 'relation' and mode = 'RowExclusiveLock' and granted
  and database = (select oid from pg_database where datname = current_database())
  and relation = cast(:events as regclass)
"""
_LONG: Final = Text().with_variant(
    mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)


def open_ledger(url: str) -> SQLLedger:
    """Open a URL as `open_sink` takes them."""
    place = _patient(read_url(url), url)
    ledger = SQLLedger(place.engine(reading=False), prefix=place.tables.prefix, schema=place.tables.schema)
    ledger.owned = True
    return ledger


class SignsTables:
    """The tables of signs under one prefix and schema. ``metadata`` is for Alembic."""

    def __init__(self, prefix: str, schema: str | None) -> None:
        self._prefix = prefix
        self.metadata = MetaData(schema=schema)
        signs = self._table(
            "signs",
            Column("place", _text(128), primary_key=True),
            _words("kind", 16),
            *_numbers("seen", "weight"),
            Column("state", _LONG, nullable=False),
        )
        Index(f"{signs.name}_worth", signs.c.kind, signs.c.weight, signs.c.seen)
        self.position = self._table("signs_position", _key_number("one"), *_numbers("event", "turn"))
        self._table(
            "signs_refusals",
            _key_number("minute"),
            *(Column(name, _text(64), primary_key=True) for name in ("reason", "network")),
            *_numbers("count"),
        )
        self._table("signs_told", Column("reader", _text(128), primary_key=True), *_numbers("turn", "alert"))
        alerts = self._table(
            "alerts",
            Column("id", _ID, primary_key=True, autoincrement=True),
            *(_words(name, 16) for name in ("sign", "kind")),
            *(_words(name, 64) for name in ("subject", "machine_id")),
            _words("severity", 16),
            *_numbers("first", "last", "findings"),
            Column("evidence", _LONG, nullable=False),
            *_numbers("muted_until", "turn"),
        )
        Index(f"{alerts.name}_subject", alerts.c.subject, alerts.c.kind, alerts.c.sign, alerts.c.id)
        Index(f"{alerts.name}_last", alerts.c.last)
        Index(f"{alerts.name}_turn", alerts.c.turn, alerts.c.id)

    def _table(self, name: str, *columns: Column[int] | Column[str]) -> Table:
        return Table(
            f"{self._prefix}usage_{name}",
            self.metadata,
            *columns,
            mysql_engine="InnoDB",
            mysql_charset="utf8mb4",
            sqlite_autoincrement=name == "alerts",  # a number is never given twice
        )


def _words(name: str, length: int) -> Column[str]:
    return Column(name, _text(length), nullable=False)


def _numbers(*names: str) -> Iterator[Column[int]]:
    for name in names:
        yield Column(name, BigInteger, nullable=False)


def _key_number(name: str) -> Column[int]:
    return Column(name, BigInteger, primary_key=True, autoincrement=False)


class _Waiting(NamedTuple):
    """Up to which number all is settled; and up to which it will be, once these are done."""

    settled: int
    top: int
    at_work: frozenset[str]


class SQLLedger(SQLReader):
    """See `Ledger`. The engine stays the caller's to close."""

    def __init__(self, engine: Engine, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> None:
        super().__init__(engine, prefix=prefix, schema=schema)
        self._signs = SignsTables(prefix, schema)
        self._writes = AtLevel(engine, _WRITING[engine.dialect.name])
        self._waiting = _Waiting(0, 0, frozenset())

    def prepare(self) -> None:
        """See `Ledger.prepare`."""
        with _answering(), self._writes.connect() as connection:
            if (
                check_version(connection, self._tables) is None
            ):  # before anything is made in another's database
                raise _unreadable()
            with alone(connection, _LOCK, _LOCK_SECONDS):
                self._signs.metadata.create_all(connection)
                if connection.execute(select(self._signs.position)).first() is None:
                    connection.execute(insert(self._signs.position).values(one=1, event=0, turn=0))
                connection.commit()

    @contextmanager
    def reading(self) -> Iterator[Ask]:
        """See `Ledger.reading`."""
        with self.snapshot() as ask:
            yield lambda statement, values: ask(prefixed(statement, self.prefix), values)

    @contextmanager
    def writing(self) -> Iterator[Desk]:
        """See `Ledger.writing`."""
        with _answering(), twice(self._lock) as connection:

            def ask(statement: str, values: Mapping[str, Cell]) -> Sequence[Row]:
                return connection.execute(text(prefixed(statement, self.prefix)), values).all()

            def do(statement: str, rows: Sequence[Mapping[str, Cell]]) -> None:
                if rows:
                    connection.execute(text(prefixed(statement, self.prefix)), rows)

            yield Desk(ask, do)
            connection.commit()

    def settled(self, top: int) -> int:
        """See `Ledger.settled`. Who was at work after a number could be read may still add those below it."""
        waiting = self._waiting
        with _answering():
            now = self._at_work()
        if not now:
            return top
        if waiting.at_work & now:
            return waiting.settled
        self._waiting = _Waiting(waiting.top, top, now)
        return waiting.top

    def _at_work(self) -> frozenset[str]:
        """Name the transactions that may have taken numbers and can not be read yet."""
        name = self._engine.dialect.name
        if name == "sqlite":
            return frozenset()  # one process writes at a time
        if name == "postgresql":
            with self._writes.connect() as connection:
                rows = connection.execute(text(_AT_WORK_POSTGRESQL), {"events": f"{self.prefix}usage_events"})
                return frozenset(row[0] for row in rows)
        # A batch raises its producer's mark first: those that only a dirty read sees are at work.
        marks = select(self._tables.batches.c.producer, self._tables.batches.c.sequence)
        dirty = AtLevel(self._engine, "READ UNCOMMITTED")
        with dirty.connect() as connection:
            begun = connection.execute(marks).all()
        with self._writes.connect() as connection:
            kept: dict[str, int] = {row[0]: row[1] for row in connection.execute(marks)}
        return frozenset(
            f"{producer} {sequence}" for producer, sequence in begun if kept.get(producer, -1) < sequence
        )

    def _lock(self) -> Connection:
        """Begin, and lock the position."""
        connection = self._writes.connect()
        try:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("begin immediate")
            connection.execute(select(self._signs.position).with_for_update()).all()
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise _unreadable() from error


def _unreadable() -> StoreUnavailable:
    return StoreUnavailable(
        "the usage tables cannot be read or written: has anything been recorded in them, and does the server answer?"
    )
