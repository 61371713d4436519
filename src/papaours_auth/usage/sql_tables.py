"""The tables of usage in a SQL server, as SQLAlchemy metadata: the same columns as in SQLite (`layout.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    func,
    insert,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from ..stores.sql_lock import Lock, alone
from .layout import VERSION, newer

_LOCK: Final = Lock("papaours-auth usage schema", 0x7061706F7575, "usage")
_LOCK_SECONDS: Final = 30
_ID: Final = BigInteger().with_variant(Integer, "sqlite")  # the one type SQLite counts up


def _text(length: int) -> TypeEngine[str]:
    """Text compared byte by byte: MySQL's own collations take É for e."""
    exact = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return Text().with_variant(exact, "mysql", "mariadb")


class UsageTables:
    """The tables under one prefix and schema. ``metadata`` is for Alembic."""

    def __init__(self, prefix: str, schema: str | None) -> None:
        self.prefix = prefix
        self.schema = schema
        self.metadata = MetaData(schema=schema)
        self.version = self._table(
            "schema", Column("version", Integer, primary_key=True, autoincrement=False)
        )
        self.batches = self._table(
            "batches", *self._identity(producer=64), self._number("sequence"), self._number("at")
        )
        self.events = self._events()
        self.series = self._series()
        self.routes = self._counts("routes", "route", 256)
        self.addresses = self._counts("addresses", "address", 64)
        self.keys = self._table(
            "keys",
            *self._identity(key_id=64),
            self._words("machine_id", 64),
            *(self._number(name) for name in ("first", "last", "calls")),
        )
        self.refusals = self._table(
            "refusals",
            Column("minute", BigInteger, primary_key=True, autoincrement=False),
            *self._identity(reason=64, network=64),
            self._number("count"),
        )

    def named(self, name: str) -> Table:
        """Give the table that SQLite calls by this name."""
        return self.metadata.tables[
            f"{self.schema}.{self.prefix}{name}" if self.schema else self.prefix + name
        ]

    def _table(self, name: str, *columns: Column[int] | Column[str]) -> Table:
        return Table(
            f"{self.prefix}usage_{name}",
            self.metadata,
            *columns,
            mysql_engine="InnoDB",
            mysql_charset="utf8mb4",
        )

    def _identity(self, **lengths: int) -> Iterator[Column[str]]:
        for name, length in lengths.items():
            yield Column(name, _text(length), primary_key=True)

    def _words(self, name: str, length: int) -> Column[str]:
        return Column(name, _text(length), nullable=False)

    def _number(self, name: str) -> Column[int]:
        return Column(name, BigInteger, nullable=False)

    def _events(self) -> Table:
        lengths = {"key_id": 64, "machine_id": 64, "address": 64, "method": 16, "route": 256}
        more = {"reason": 64, "outcome": 16, "service": 64, "environment": 64}
        table = self._table(
            "events",
            Column("id", _ID, primary_key=True, autoincrement=True),
            self._words("event_id", 128),
            self._number("time"),
            *(self._words(*column) for column in lengths.items()),
            self._number("status"),
            *(self._words(*column) for column in more.items()),
            self._number("duration"),
            self._words("request_id", 64),
        )
        Index(f"{table.name}_time", table.c.time, table.c.id)
        for name, column in (
            ("key", "key_id"),
            ("address", "address"),
            ("route", "route"),
            ("status", "status"),
        ):
            Index(f"{table.name}_{name}", table.c[column], table.c.time, table.c.id)
        return table

    def _series(self) -> Table:
        table = self._table(
            "series",
            *self._identity(key_id=64, step=16),
            Column("start", BigInteger, primary_key=True, autoincrement=False),
            Column("status", BigInteger, primary_key=True, autoincrement=False),
            self._number("calls"),
        )
        Index(f"{table.name}_start", table.c.step, table.c.start)
        return table

    def _counts(self, name: str, column: str, length: int) -> Table:
        table = self._table(
            name,
            *self._identity(key_id=64, step=16),
            Column("start", BigInteger, primary_key=True, autoincrement=False),
            *self._identity(**{column: length}),
            self._number("calls"),
            self._number("last"),
        )
        Index(f"{table.name}_start", table.c.step, table.c.start)
        return table


def prepare(connection: Connection, tables: UsageTables) -> None:
    """Make what is missing, safely with others doing the same. The caller commits. Raises `ConfigurationError`."""
    with alone(connection, _LOCK, _LOCK_SECONDS):
        tables.metadata.create_all(connection)
        if check_version(connection, tables) is None:
            connection.execute(insert(tables.version).values(version=VERSION))


def check_version(connection: Connection, tables: UsageTables) -> int | None:
    """Read which version made the tables; None where none has yet. Raises `ConfigurationError` for a newer one."""
    found: int | None = connection.scalar(select(func.max(tables.version.c.version)))
    if found is not None and found > VERSION:
        raise newer()
    return found
