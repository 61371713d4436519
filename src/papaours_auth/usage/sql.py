"""Usage in PostgreSQL, MySQL or MariaDB, and SQLite by SQLAlchemy Core. Exactly once, like SQLite's own sink.

A batch is one transaction, and rows are added in the order of their identity: two producers never wait for each
other in a circle. A child of a fork starts with new connections and leaves its parent's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Select,
    Table,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .._fork import hold_across_fork
from ..exceptions import ConfigurationError, StoreUnavailable
from ..stores.sql_drivers import Place, read_url
from . import rollup
from .event import Event
from .reader import Ask, Cell, Row
from .rollup import MOST_DISTINCT, MOST_NETWORKS, Column, Expired, Known, Retention
from .sinks import Batch
from .sql_tables import UsageTables, check_version, prepare

__all__ = ["SQLReader", "SQLSink", "UsageTables", "open_reader", "open_sink"]

DEFAULT_PREFIX: Final = "papaours_"
READ_TIMEOUT: Final = 10.0
"""Seconds an answer may take where the URL names no ``timeout``: people wait for these, no request does."""

_PRUNE_EVERY: Final = 60.0
_PRUNE_ROWS: Final = 1_000
_CHUNK: Final = 1_000
_WRITING: Final = {
    "postgresql": "READ COMMITTED",
    "mysql": "READ COMMITTED",
    "mariadb": "READ COMMITTED",
    "sqlite": "SERIALIZABLE",
}
_READING: Final = _WRITING | dict.fromkeys(("postgresql", "mysql", "mariadb"), "REPEATABLE READ")

_Cells = Mapping[str, Cell]


def open_sink(url: str) -> SQLSink:
    """Open a URL. Nothing is asked of the server: the first batch makes the tables."""
    place = read_url(url)
    sink = SQLSink(place.engine(reading=False), prefix=place.tables.prefix, schema=place.tables.schema)
    sink.owned = True
    return sink


def open_reader(url: str) -> SQLReader:
    """Open a URL for questions."""
    place = _patient(read_url(url), url)
    reader = SQLReader(place.engine(reading=False), prefix=place.tables.prefix, schema=place.tables.schema)
    reader.owned = True
    return reader


def _patient(place: Place, url: str) -> Place:
    return place if "timeout=" in url else place._replace(timeout=READ_TIMEOUT)


class SQLSink:
    """Keeps events over an engine, which stays the caller's to close. ``prefix`` and ``schema`` say in which tables.

    Raises `ConfigurationError` for a database that was not tried.
    """

    owned = False

    def __init__(
        self,
        engine: Engine,
        *,
        prefix: str = DEFAULT_PREFIX,
        schema: str | None = None,
        retention: Retention = Retention(),  # noqa: B008 - immutable
    ) -> None:
        self._tables = UsageTables(prefix, schema)
        self._engine = _tried(engine)
        self._writes = engine.execution_options(isolation_level=_WRITING[engine.dialect.name])
        self._retention = retention
        self._ready = False
        self._pruned = float("-inf")
        self._known = Known()
        hold_across_fork(self)

    def write(self, batch: Batch) -> None:
        """Store a batch, unless it is stored already. Then forget a little of what is too old."""
        if not self._ready:
            self.create()
        self._twice(lambda connection: _write(connection, self._tables, batch, self._known))
        if time.monotonic() - self._pruned > _PRUNE_EVERY:
            self._twice(lambda connection: self._prune(connection, 2 * len(batch.events)))

    def create(self) -> None:
        """Make the tables, safely with others doing the same."""
        with self._writes.connect() as connection:
            prepare(connection, self._tables)
            connection.commit()
        self._ready = True

    def _twice(self, work: Callable[[Connection], None]) -> None:
        """Work in a transaction; once more where the connection had died in the pool, as one learns by using it."""
        try:
            self._once(work)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            self._once(work)

    def _once(self, work: Callable[[Connection], None]) -> None:
        with self._writes.connect() as connection:
            work(connection)
            connection.commit()

    def _prune(self, connection: Connection, most: int) -> None:
        """Forget a bounded number of rows, in a transaction of its own; with more to go, the next batch goes on."""
        left = max(_PRUNE_ROWS, most)
        for old in rollup.expired(self._retention, time.time_ns() // 1000):
            left -= _forget(connection, self._tables.named(old.table), old, left)
        if left > 0:
            self._pruned = time.monotonic()

    def before_fork(self) -> None:
        """Do nothing: the parent's connections stay the parent's."""

    def after_fork(self, *, child: bool) -> None:
        """Start with new connections in a child."""
        if child:
            _leave(self._engine)

    def __del__(self) -> None:
        if self.owned:  # nobody else can close what a URL opened
            self._engine.dispose()


class SQLReader:
    """Reads the tables of an `SQLSink`; changes nothing in them. The engine stays the caller's to close."""

    owned = False

    def __init__(self, engine: Engine, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> None:
        self._tables = UsageTables(prefix, schema)
        self.prefix = f"{schema}.{prefix}" if schema else prefix
        self._engine = _tried(engine)
        self._reads = engine.execution_options(isolation_level=_READING[engine.dialect.name])
        hold_across_fork(self)

    @contextmanager
    def snapshot(self) -> Iterator[Ask]:
        """See `Reader.snapshot`."""
        try:
            with self._begun() as connection:

                def ask(statement: str, values: _Cells) -> Sequence[Row]:
                    return connection.execute(text(statement), values).all()

                yield ask
        except SQLAlchemyError as error:
            raise StoreUnavailable(
                "the usage tables cannot be read: has anything been recorded in them, and does the server answer?"
            ) from error

    def _begun(self) -> Connection:
        """Begin a snapshot; once more where the connection had died in the pool, as one learns by using it."""
        try:
            return self._begin()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return self._begin()

    def _begin(self) -> Connection:
        connection = self._reads.connect()
        try:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("begin")  # its driver begins at the first write alone
            check_version(connection, self._tables)
        except BaseException:
            connection.close()
            raise
        return connection

    def before_fork(self) -> None:
        """Do nothing: the parent's connections stay the parent's."""

    def after_fork(self, *, child: bool) -> None:
        """Start with new connections in a child."""
        if child:
            _leave(self._engine)

    def __del__(self) -> None:
        if self.owned:  # nobody else can close what a URL opened
            self._engine.dispose()


_abandoned: list[object] = []  # never closed: that would be using the parent's connections


def _leave(engine: Engine) -> None:
    _abandoned.append(engine.pool)
    engine.dispose(close=False)


def _tried(engine: Engine) -> Engine:
    if engine.dialect.name not in _WRITING:
        raise ConfigurationError(
            "usage is kept in PostgreSQL, MySQL, MariaDB or SQLite: no other database was tried"
        )
    return engine


# a batch


def _write(connection: Connection, tables: UsageTables, batch: Batch, known: Known) -> None:
    # The mark before the events: who looks for signs tells by it who is at work (`ledger_sql.py`).
    if not _first_time(connection, tables.batches, batch):
        return
    # Keys first: whoever adds to a key's row holds it to the end, so the bounds below are exact.
    _add(connection, tables.keys, [_row(tables.keys, found) for found in rollup.keys(batch.events)])
    _insert(connection, tables.events, batch.events)
    _add(connection, tables.series, [_series(found) for found in rollup.series(batch.events)])
    counted: tuple[tuple[Table, Column], ...] = ((tables.routes, "route"), (tables.addresses, "address"))
    for table, column in counted:
        _add(connection, table, list(_counts(connection, table, batch, column, known)))
    _add(connection, tables.refusals, list(_refusals(connection, tables.refusals, batch)))


def _first_time(connection: Connection, table: Table, batch: Batch) -> bool:
    """Raise the producer's mark, or tell that it is as high already. Two who write its first batch: one fails."""
    values = {"sequence": batch.sequence, "at": time.time_ns() // 1000}
    mine = table.c.producer == batch.producer
    if connection.execute(
        update(table).where(mine, table.c.sequence < batch.sequence).values(values)
    ).rowcount:
        return True
    if connection.scalar(select(exists().where(mine))):
        return False
    connection.execute(insert(table).values(producer=batch.producer, **values))
    return True


def _insert(connection: Connection, table: Table, events: Sequence[Event]) -> None:
    columns = Event._fields[1:]
    for part in range(0, len(events), _CHUNK):
        rows = [dict(zip(columns, event[1:], strict=True)) for event in events[part : part + _CHUNK]]
        connection.execute(insert(table), rows)


def _row(table: Table, values: Sequence[Cell]) -> dict[str, Cell]:
    return dict(zip(table.c.keys(), values, strict=True))


def _series(found: tuple[rollup.Step, int, str, int, int]) -> dict[str, Cell]:
    step, start, key, status, calls = found
    return {"key_id": key, "step": step, "start": start, "status": status, "calls": calls}


def _counts(
    connection: Connection, table: Table, batch: Batch, column: Column, known: Known
) -> Iterator[dict[str, Cell]]:
    for (key, step, start), values in rollup.tallies(batch.events, column).items():
        mine = table.c.key_id == key, table.c.step == step, table.c.start == start
        rows = select(table.c[column]).where(*mine)

        def read(rows: Select[Any] = rows) -> set[str]:
            return set(connection.scalars(rows))

        here = known.among((column, key, step, str(start)), values, read)
        for value, tally in rollup.capped(values, here, MOST_DISTINCT[step]).items():
            yield {"key_id": key, "step": step, "start": start, column: value, **tally._asdict()}


def _refusals(connection: Connection, table: Table, batch: Batch) -> Iterator[dict[str, Cell]]:
    for (minute, reason), values in rollup.by_minute(batch.refusals).items():
        here = select(table.c.network).where(table.c.minute == minute, table.c.reason == reason)
        known = set(connection.scalars(here))
        for network, tally in rollup.capped(values, known, MOST_NETWORKS).items():
            yield {"minute": minute, "reason": reason, "network": network, "count": tally.calls}


# adding to rows


class _Given(Protocol):
    def __getitem__(self, name: str, /) -> ColumnElement[Any]: ...


class _Words(NamedTuple):
    """What the databases call the same thing."""

    given: _Given
    least: Callable[..., ColumnElement[Any]]
    most: Callable[..., ColumnElement[Any]]


def _add(connection: Connection, table: Table, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Add to the rows there are, and make those there are not."""
    if rows:
        connection.execute(_adding(connection.dialect.name, table), list(rows))


def _adding(dialect: str, table: Table) -> Insert:
    if dialect in ("mysql", "mariadb"):
        made = mysql.insert(table)
        words = _Words(made.inserted, func.least, func.greatest)
        return made.on_duplicate_key_update(**_changes(table, words))
    if dialect == "postgresql":
        other = postgresql.insert(table)
        words = _Words(other.excluded, func.least, func.greatest)
        return other.on_conflict_do_update(
            index_elements=list(table.primary_key), set_=_changes(table, words)
        )
    own = sqlite.insert(table)
    words = _Words(own.excluded, func.min, func.max)
    return own.on_conflict_do_update(index_elements=list(table.primary_key), set_=_changes(table, words))


def _changes(table: Table, words: _Words) -> dict[str, ColumnElement[Any]]:
    changes: dict[str, ColumnElement[Any]] = {}
    for name, change in (("calls", None), ("count", None), ("first", words.least), ("last", words.most)):
        if name in table.c:
            before, given = table.c[name], words.given[name]
            changes[name] = before + given if change is None else change(before, given)
    return changes


def _forget(connection: Connection, table: Table, old: Expired, most: int) -> int:
    """Name rows first, then delete those: MySQL bounds no subquery of a `delete`."""
    too_old = select(*table.primary_key).where(table.c[old.column] < old.oldest).limit(most)
    if old.step is not None:
        too_old = too_old.where(table.c.step == old.step)
    if old.table == "usage_events":  # or SQLite would give its number again
        too_old = too_old.where(table.c.id != select(func.max(table.c.id)).scalar_subquery())
    rows = connection.execute(too_old).all()
    if rows:
        names = [f"this_{column.name}" for column in table.primary_key]
        this = (column == bindparam(name) for column, name in zip(table.primary_key, names, strict=True))
        connection.execute(delete(table).where(*this), [dict(zip(names, row, strict=True)) for row in rows])
    return len(rows)
