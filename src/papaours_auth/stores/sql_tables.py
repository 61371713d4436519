"""The tables of a SQL store, as SQLAlchemy metadata, and how they are made.

The same columns as in SQLite's schema 2. `meta` also holds the schema's version and the tip of the change log:
the one row every change locks first, so that numbers are without gaps and in the order of the commits.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterator
from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    case,
    exists,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import TypeEngine

from ..exceptions import ConfigurationError
from .records import journal_text, next_epoch
from .sql_lock import Lock, alone

logger = logging.getLogger("papaours_auth")

SCHEMA_VERSION: Final = 2
DEFAULT_PREFIX: Final = "papaours_"
LOCK_SECONDS: Final = 30
"""How long one process waits for another that is making the tables."""

_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,23}", re.ASCII)
_NO_TRIGGER_RIGHT: Final = (
    1142,
    1227,
    1419,
)  # MySQL: no TRIGGER right, no SUPER, binary logging without trust
_LOCK: Final = Lock("papaours-auth schema", 0x7061706F757273, "SQL store's")  # "papaours"


def _exact(length: int) -> TypeEngine[str]:
    """Text compared byte by byte: MySQL's own collations take É for e."""
    return Text().with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


def _long() -> TypeEngine[str]:
    return Text().with_variant(
        mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


def _bytes(length: int) -> TypeEngine[bytes]:
    return LargeBinary().with_variant(mysql.BINARY(length), "mysql", "mariadb")


class Tables:
    """The six tables under one prefix and schema. ``metadata`` is for Alembic."""

    def __init__(self, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> None:
        for what, name in (("prefix", prefix), ("schema", schema)):
            if name and not _NAME.fullmatch(name):
                raise ConfigurationError(
                    f"the {what} of a SQL store is 1 to 24 characters of a-z, 0-9 and _, and begins with no digit"
                )
        self.prefix = prefix
        self.schema = schema or None
        self.metadata = MetaData(schema=self.schema)
        self.meta = self._meta()
        self.peppers = self._peppers()
        self.machines = self._machines()
        self.keys = self._keys()
        self.digests = self._digests()
        self.changes = self._changes()

    @property
    def channel(self) -> str:
        """PostgreSQL's name for the announcements. Another store's under the same name only wake us once more."""
        return f"{self.schema or ''}.{self.prefix}changes"

    def _table(self, name: str, *items: Column[int] | Column[str] | Column[bytes] | CheckConstraint) -> Table:
        return Table(
            self.prefix + name, self.metadata, *items, mysql_engine="InnoDB", mysql_charset="utf8mb4"
        )

    def _check(self, name: str, condition: str) -> CheckConstraint:
        return CheckConstraint(text(condition), name=f"{self.prefix}{name}")

    def _meta(self) -> Table:
        return self._table(
            "meta",
            Column("only_row", SmallInteger, primary_key=True, autoincrement=False),
            Column("installation", _exact(32), nullable=False),
            Column("created_at", BigInteger, nullable=False),
            Column("schema_version", Integer, nullable=False),
            Column("seq", BigInteger, nullable=False),
            Column("nonce", _bytes(16), nullable=False),
            Column("minted_only", SmallInteger, nullable=False, server_default="0"),
            self._check("meta_has_one_row", "only_row = 1"),
        )

    def _peppers(self) -> Table:
        return self._table(
            "peppers",
            Column("id", _exact(128), primary_key=True),
            Column("proof", _bytes(32), nullable=False),
            Column("status", _exact(16), nullable=False),
            self._check("pepper_status", "status in ('accept', 'primary', 'retired')"),
        )

    def _machines(self) -> Table:
        return self._table(
            "machines",
            Column("id", _exact(128), primary_key=True),
            Column("name", _exact(255), nullable=False),
            Column("organisation", _exact(255), nullable=False),
            Column("status", _exact(16), nullable=False),
            Column("created_at", BigInteger, nullable=False),
            Column("created_by", _exact(255), nullable=False),
            Column("description", _long(), nullable=False),
            Column("system", SmallInteger, nullable=False),
            Column("grants", _long(), nullable=False),
            Column("attributes", _long(), nullable=False),
            self._check("machine_status", "status in ('active', 'inactive')"),
        )

    def _keys(self) -> Table:
        table = self._table(
            "keys",
            Column("id", _exact(128), primary_key=True),
            Column("machine_id", _exact(128), ForeignKey(self.machines.c.id), nullable=False),
            Column("name", _exact(255), nullable=False),
            Column("environment", _exact(64), nullable=False),
            Column("usage", _exact(255), nullable=False),
            Column("last4", _exact(4), nullable=False),
            Column("status", _exact(16), nullable=False),
            Column("created_at", BigInteger, nullable=False),
            Column("created_by", _exact(255), nullable=False),
            Column("expires_at", BigInteger),
            Column("replaces", _exact(128)),
            Column("networks", _long(), nullable=False),
            Column("attributes", _long(), nullable=False),
            self._check("key_status", "status in ('active', 'inactive')"),
        )
        Index(f"{self.prefix}keys_of_machine", table.c.machine_id)
        return table

    def _digests(self) -> Table:
        table = self._table(
            "digests",
            Column("digest", _bytes(32), primary_key=True),
            Column("key_id", _exact(128), ForeignKey(self.keys.c.id), nullable=False),
            Column("pepper_id", _exact(128), ForeignKey(self.peppers.c.id), nullable=False),
            Column("algorithm", _exact(32), nullable=False),
        )
        Index(f"{self.prefix}digests_of_key", table.c.key_id)
        Index(f"{self.prefix}digests_of_pepper", table.c.pepper_id)
        return table

    def _changes(self) -> Table:
        table = self._table(
            "changes",
            Column("seq", BigInteger, primary_key=True, autoincrement=False),
            Column("nonce", _bytes(16), nullable=False),
            Column("at", BigInteger, nullable=False),
            Column("actor", _exact(255), nullable=False),
            Column("kind", _exact(64), nullable=False),
            Column("subject", _exact(128), nullable=False),
            Column("before", _long(), nullable=False),
            Column("after", _long(), nullable=False),
        )
        Index(f"{self.prefix}changes_of_subject", table.c.subject, table.c.seq)
        return table


def create(connection: Connection, tables: Tables) -> None:
    """Make what is missing of the tables, their guards and the installation mark; migrate. The caller commits.

    Safe with others doing the same, and after one that died in the middle.
    """
    with alone(connection, _LOCK, LOCK_SECONDS):
        tables.metadata.create_all(connection)
        _guard_journal(connection, tables)
        _migrate(connection, tables)
        _mark(connection, tables)


def _migrate(connection: Connection, tables: Tables) -> None:
    """Bring schema 1 to schema 2. Alembic may have added the column already, but not what it should say."""
    meta, changes = tables.meta, tables.changes
    there = inspect(connection).get_columns(meta.name, schema=tables.schema)
    if "minted_only" not in {column["name"] for column in there}:
        table = connection.dialect.identifier_preparer.format_table(meta)
        column = CreateColumn(meta.c.minted_only).compile(dialect=connection.dialect)
        connection.exec_driver_sql(f"alter table {table} add column {column}")
    imported = exists().where(changes.c.kind == "key.imported")
    connection.execute(
        update(meta)
        .where(meta.c.schema_version == 1)
        .values(schema_version=2, minted_only=case((imported, 0), else_=1))
    )


def _mark(connection: Connection, tables: Tables) -> None:
    if connection.execute(select(tables.meta.c.only_row)).first() is not None:
        return
    if connection.execute(select(tables.changes.c.seq).limit(1)).first() is not None:
        raise ConfigurationError("the SQL store has lost its installation mark: restore it from a backup")
    installation, now, epoch = secrets.token_hex(16), time.time_ns() // 1000, next_epoch(None)
    connection.execute(
        insert(tables.changes).values(
            seq=epoch.seq, nonce=epoch.nonce, at=now, actor="papaours-auth", kind="store.created",
            subject=installation, before=journal_text({}), after=journal_text({}),
        )
    )  # fmt: skip
    connection.execute(
        insert(tables.meta).values(
            only_row=1, installation=installation, created_at=now, schema_version=SCHEMA_VERSION,
            seq=epoch.seq, nonce=epoch.nonce, minted_only=1,
        )
    )  # fmt: skip


def _guard_journal(connection: Connection, tables: Tables) -> None:
    """Let the database itself refuse to change or remove a line of the journal."""
    quoted = connection.dialect.identifier_preparer
    table = quoted.format_table(tables.changes)
    schema = f"{quoted.quote_schema(tables.schema)}." if tables.schema else ""
    guards = {
        "postgresql": _postgresql_guards,
        "mysql": _mysql_guards,
        "mariadb": _mysql_guards,
        "sqlite": _sqlite_guards,
    }[connection.dialect.name]
    try:
        for statement in guards(table, schema, tables.prefix):
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        number = error.orig.args[0] if error.orig is not None and error.orig.args else None
        if number not in _NO_TRIGGER_RIGHT:
            raise
        logger.warning(
            "the journal is guarded by convention alone: this MySQL account may make no triggers (error %s)",
            number,
        )


def _postgresql_guards(table: str, schema: str, prefix: str) -> Iterator[str]:
    function = f"{schema}{prefix}keep_changes"
    yield (
        f"create or replace function {function}() returns trigger language plpgsql as "
        "$$ begin raise exception 'the journal is append-only'; end $$"
    )
    for name, events, each in (
        ("stand", "update or delete", "row"),
        ("are_kept", "truncate", "statement"),
    ):
        yield (
            f"create or replace trigger {prefix}changes_{name} before {events} on {table} "
            f"for each {each} execute function {function}()"
        )


def _mysql_guards(table: str, schema: str, prefix: str) -> Iterator[str]:
    for name, event in (("stand", "update"), ("are_kept", "delete")):
        yield (
            f"create trigger if not exists {schema}{prefix}changes_{name} before {event} on {table} "
            "for each row signal sqlstate '45000' set message_text = 'the journal is append-only'"
        )


def _sqlite_guards(table: str, schema: str, prefix: str) -> Iterator[str]:
    for name, event in (("stand", "update"), ("are_kept", "delete")):
        yield (
            f"create trigger if not exists {schema}{prefix}changes_{name} before {event} on "
            f"{table.rpartition('.')[2]} begin select raise(abort, 'the journal is append-only'); end"
        )


def is_missing(connection: Connection, tables: Tables) -> bool:
    """Tell whether the tables are not there at all (rather than not to be read)."""
    return not inspect(connection).has_table(tables.meta.name, schema=tables.schema)
