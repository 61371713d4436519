"""Usage in PostgreSQL, MySQL or MariaDB, and SQLite by SQLAlchemy Core. Exactly once, like SQLite's own sink.

A batch is one transaction, and rows are added in the order of their identity: two producers never wait for each
other in a circle. A child of a fork starts with new connections and leaves its parent's alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Table,
    bindparam,
    column,
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
from ..stores.sql_level import AtLevel
from . import rollup
from .event import Event
from .reader import Ask, Cell, Row
from .rollup import MOST_DISTINCT, MOST_NETWORKS, Bucket, Column, Expired, Known, Retention
from .sinks import Batch
from .sql_tables import UsageTables, check_version, prepare

if TYPE_CHECKING:
    import psycopg

__all__ = ["SQLReader", "SQLSink", "UsageTables", "open_reader", "open_sink"]

DEFAULT_PREFIX: Final = "papaours_"
READ_TIMEOUT: Final = 10.0
"""Seconds an answer may take where the URL names no ``timeout``: people wait for these, no request does."""

_PRUNE_EVERY: Final = 60.0
_PRUNE_ROWS: Final = 1_000
_CHUNK: Final = 1_000
_EVENT: Final = Event._fields[1:]
_ROWS: Final = "rows"
_NAMED: Final = re.compile(r"%\(\w+\)s")
_WRITING: Final = {
    "postgresql": "READ COMMITTED",
    "mysql": "READ COMMITTED",
    "mariadb": "READ COMMITTED",
    "sqlite": "SERIALIZABLE",
}
_READING: Final = _WRITING | dict.fromkeys(("postgresql", "mysql", "mariadb"), "REPEATABLE READ")

_T = TypeVar("_T")
_Cells = Mapping[str, Cell]
_Insert: TypeAlias = mysql.Insert | postgresql.Insert | sqlite.Insert


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


def twice(work: Callable[[], _T]) -> _T:
    """Work over a connection; once more where it had died in the pool, as one learns by using it."""
    try:
        return work()
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
    return work()


def _patient(place: Place, url: str) -> Place:
    return place if "timeout=" in url else place._replace(timeout=READ_TIMEOUT)


class _OverEngine:
    """What stands over an engine: the caller's to close, or ``owned``."""

    owned = False
    _engine: Engine

    def before_fork(self) -> None:
        """Do nothing: the parent's connections stay the parent's."""

    def after_fork(self, *, child: bool) -> None:
        """Start with new connections in a child."""
        if child:
            _leave(self._engine)

    def __del__(self) -> None:
        if self.owned:  # nobody else can close what a URL opened
            self._engine.dispose()


class SQLSink(_OverEngine):
    """Keeps events over an engine, which stays the caller's to close. ``prefix`` and ``schema`` say in which tables.

    Raises `ConfigurationError` for a database that was not tried.
    """

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
        self._writes = AtLevel(engine, _WRITING[engine.dialect.name])
        self._retention = retention
        self._ready = False
        self._pruned = float("-inf")
        self._known = Known()
        hold_across_fork(self)

    def write(self, batch: Batch) -> None:
        """Store a batch, unless it is stored already. Then forget a little of what is too old."""
        if not self._ready:
            self.create()
        twice(lambda: self._once(lambda connection: _write(connection, self._tables, batch, self._known)))
        if time.monotonic() - self._pruned > _PRUNE_EVERY:
            twice(lambda: self._once(lambda connection: self._prune(connection, 2 * len(batch.events))))

    def create(self) -> None:
        """Make the tables, safely with others doing the same."""
        with self._writes.connect() as connection:
            prepare(connection, self._tables)
            connection.commit()
        self._ready = True

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


class SQLReader(_OverEngine):
    """Reads the tables of an `SQLSink`; changes nothing in them. The engine stays the caller's to close."""

    def __init__(self, engine: Engine, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> None:
        self._tables = UsageTables(prefix, schema)
        self.prefix = f"{schema}.{prefix}" if schema else prefix
        self._engine = _tried(engine)
        self._reads = AtLevel(engine, _READING[engine.dialect.name])
        hold_across_fork(self)

    @contextmanager
    def snapshot(self) -> Iterator[Ask]:
        """See `Reader.snapshot`."""
        try:
            with twice(self._begin) as connection:

                def ask(statement: str, values: _Cells) -> Sequence[Row]:
                    return connection.execute(text(statement), values).all()

                yield ask
        except SQLAlchemyError as error:
            raise StoreUnavailable(
                "the usage tables cannot be read: has anything been recorded in them, and does the server answer?"
            ) from error

    def _begin(self) -> Connection:
        """Begin a snapshot."""
        connection = self._reads.connect()
        try:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("begin")  # its driver begins at the first write alone
            check_version(connection, self._tables)
        except BaseException:
            connection.close()
            raise
        return connection


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
    _add(connection, tables.keys, rollup.keys(batch.events))
    _insert(connection, tables.events, batch.events)
    series = [(key, step, start, *counted) for step, start, key, *counted in rollup.series(batch.events)]
    _add(connection, tables.series, series)
    counted: tuple[tuple[Table, Column], ...] = ((tables.routes, "route"), (tables.addresses, "address"))
    for table, counts in counted:
        _add(connection, table, list(_counts(connection, table, batch, counts, known)))
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
    if connection.dialect.driver == "psycopg":
        _copy(connection, table, events)
    else:
        rows = [event[1:] for event in events]
        _put(connection, _inserting(connection.dialect.name, table, _EVENT), _EVENT, rows)


def _copy(connection: Connection, table: Table, events: Sequence[Event]) -> None:
    """Insert by COPY: 9 µs an event, client and server together, where JSON takes 15 and a statement each 46."""
    quote = connection.dialect.identifier_preparer
    names = ", ".join(map(quote.quote, _EVENT))
    driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
    with (
        driver.cursor() as cursor,
        cursor.copy(f"copy {quote.format_table(table)} ({names}) from stdin") as copy,
    ):
        for event in events:
            copy.write_row(event[1:])


def _counts(
    connection: Connection, table: Table, batch: Batch, column: Column, known: Known
) -> Iterator[Row]:
    wanted = rollup.tallies(batch.events, column)
    here = known.among(column, wanted, lambda places: _read(connection, table, column, places))
    for place, values in wanted.items():
        for value, tally in rollup.capped(values, here[place], MOST_DISTINCT[place[1]]).items():
            yield *place, value, *tally


def _read(
    connection: Connection, table: Table, column: Column, places: Sequence[Bucket]
) -> Iterator[tuple[Bucket, str]]:
    """Read a column's values: a statement for each start, of which a batch has few, and so many keys.

    The other way round where the keys are fewer: a dead process may have left days of one key's calls.
    """
    for step in MOST_DISTINCT:
        wanted = [(key, start) for key, of, start in places if of == step]
        by_key = len({key for key, _ in wanted}) < len({start for _, start in wanted})
        one, other = (table.c.key_id, table.c.start) if by_key else (table.c.start, table.c.key_id)
        groups: dict[Any, list[Any]] = {}  # Any: a key and its starts, or a start and its keys
        for key, start in wanted:
            groups.setdefault(key if by_key else start, []).append(start if by_key else key)
        for this, those in groups.items():
            for first in range(0, len(those), _CHUNK):
                rows = select(other, table.c[column]).where(
                    table.c.step == step, one == this, other.in_(those[first : first + _CHUNK])
                )
                for that, value in connection.execute(rows):
                    yield ((this, step, that) if by_key else (that, step, this)), value


def _refusals(connection: Connection, table: Table, batch: Batch) -> Iterator[Row]:
    for (minute, reason), values in rollup.by_minute(batch.refusals).items():
        here = select(table.c.network).where(table.c.minute == minute, table.c.reason == reason)
        known = set(connection.scalars(here))
        for network, tally in rollup.capped(values, known, MOST_NETWORKS).items():
            yield minute, reason, network, tally.calls


# adding to rows


class _Given(Protocol):
    def __getitem__(self, name: str, /) -> ColumnElement[Any]: ...


class _Words(NamedTuple):
    """What the databases call the same thing."""

    given: _Given
    least: Callable[..., ColumnElement[Any]]
    most: Callable[..., ColumnElement[Any]]


def _add(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Add to the rows there are, and make those there are not."""
    _put(connection, _adding(connection.dialect.name, table), table.c.keys(), rows)


def _put(connection: Connection, statement: Insert, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Insert rows, many with a statement, but no more than are soon answered for."""
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        if connection.dialect.name in ("mysql", "mariadb"):
            single = str(statement.compile(dialect=connection.dialect, column_keys=names))
            connection.exec_driver_sql(multiplied(single, len(names), len(part)), tuple(chain(*part)))
            continue
        named = [dict(zip(names, row, strict=True)) for row in part]
        connection.execute(statement, {_ROWS: named} if connection.dialect.name == "postgresql" else named)


def multiplied(single: str, columns: int, rows: int) -> str:
    """Have the insertion of one row insert many: PyMySQL would not, where MySQL 8 has its ``AS new``."""
    row = f"({', '.join(['%s'] * columns)})"
    return _NAMED.sub("%s", single).replace(row, ", ".join([row] * rows))


def _inserting(dialect: str, table: Table, names: Sequence[str]) -> _Insert:
    """Write the insertion of a row; on PostgreSQL, of all rows of a document."""
    if dialect in ("mysql", "mariadb"):
        return mysql.insert(table)
    if dialect == "sqlite":
        return sqlite.insert(table)
    rows = func.json_to_recordset(bindparam(_ROWS, type_=postgresql.JSON))
    given = rows.table_valued(*(column(name, table.c[name].type) for name in names))
    return postgresql.insert(table).from_select(names, select(*given.render_derived(with_types=True).c))


def _adding(dialect: str, table: Table) -> Insert:
    made = _inserting(dialect, table, table.c.keys())
    if isinstance(made, mysql.Insert):
        words = _Words(made.inserted, func.least, func.greatest)
        return made.on_duplicate_key_update(**_changes(table, words))
    least, most = (func.min, func.max) if dialect == "sqlite" else (func.least, func.greatest)
    words = _Words(made.excluded, least, most)
    return made.on_conflict_do_update(index_elements=list(table.primary_key), set_=_changes(table, words))


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
