"""What verifiers ask of a SQL store, and how the answers are read.

Each question bears a random word that its answer must bring back, also where nothing is found: on a connection that
somebody else uses too, the answer to another question must never be believed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from sqlalchemy import BigInteger, Connection, Select, Subquery, bindparam, literal_column, select, true

from ..exceptions import ConfigurationError, StoreUnavailable
from ..model import Record
from ..verify import PARTITIONS
from . import Description, Epoch, Found, PepperRecord
from .records import KEY_COLUMNS, MACHINE_COLUMNS, read_key, read_machine
from .sql_tables import SCHEMA_VERSION, Tables

LOG_READ: Final = 10_000
"""Changes a watcher reads at once: further behind, it drops its whole cache."""

_DIGEST, _FIRST_KEY, _FIRST_MACHINE = 5, 6, 6 + len(KEY_COLUMNS)

_WORD: Final = bindparam("word", type_=BigInteger).label("word")
"""A random number of 63 bits that the answer must bring back: see `ask`."""
_ONE: Final = select(literal_column("1").label("one")).subquery("asked")

Row: TypeAlias = Sequence[Any]


@dataclass(frozen=True)
class Statements:
    """What is asked on the way of every request, made once."""

    tables: Tables

    @cached_property
    def lookup(self) -> Select[Any]:
        """A key with its machine, by any of some digests, and the tip: one snapshot."""
        meta, digests = self.tables.meta, self.tables.digests
        keys, machines = self.tables.keys, self.tables.machines
        wanted = digests.c.digest.in_(bindparam("digests", expanding=True))
        kept = (
            select(
                *self._mark,
                digests.c.digest,
                *(keys.c[name] for name in KEY_COLUMNS),
                *(machines.c[name] for name in MACHINE_COLUMNS),
            )
            .select_from(
                meta.outerjoin(digests, wanted)
                .outerjoin(keys, keys.c.id == digests.c.key_id)
                .outerjoin(machines, machines.c.id == keys.c.machine_id)
            )
            .subquery("kept")
        )
        return _in_any_case(kept).limit(1)

    @cached_property
    def tip(self) -> Select[Any]:
        """The tip alone: no row where there is none."""
        return select(_WORD, *self._mark)

    @cached_property
    def log(self) -> Select[Any]:
        """The changes from one tip to another, both included."""
        changes = self.tables.changes.c
        return (
            select(_WORD, changes.seq, changes.nonce, changes.kind, changes.subject)
            .select_from(
                _ONE.outerjoin(self.tables.changes, changes.seq.between(bindparam("known"), bindparam("tip")))
            )
            .order_by(changes.seq)
            .limit(LOG_READ + 1)
        )

    @cached_property
    def describe(self) -> Select[Any]:
        """Whose store it is, its tip, and its peppers: one snapshot."""
        meta, peppers = self.tables.meta, self.tables.peppers
        kept = (
            select(*self._mark, meta.c.minted_only, peppers.c.id, peppers.c.proof, peppers.c.status)
            .select_from(meta.outerjoin(peppers, true()))
            .subquery("kept")
        )
        return _in_any_case(kept).order_by(kept.c.id)

    @property
    def _mark(self) -> tuple[Any, ...]:
        meta = self.tables.meta.c
        return meta.installation, meta.schema_version, meta.seq, meta.nonce


def _in_any_case(kept: Subquery) -> Select[Any]:
    """Select the word and what is kept: one row where nothing is, so that the word comes back then too."""
    return select(_WORD, *kept.c).select_from(_ONE.outerjoin(kept, true()))


def read_tip(row: Row | None) -> Epoch:
    """Read the tip from an answer's first columns. Raises for what is no store, or one of another schema."""
    if row is None or row[1] is None:
        raise StoreUnavailable(
            "the SQL store has no installation mark: run 'papaours-auth init' on a new one, or restore a backup"
        )
    check_schema(row[2])
    return Epoch(row[3], bytes(row[4]))


def check_schema(version: int) -> None:
    """Raise `ConfigurationError` for a schema that is not read here."""
    if version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"the SQL store has schema {version} and this papaours-auth reads {SCHEMA_VERSION}: "
            + ("upgrade this one" if version > SCHEMA_VERSION else "run 'papaours-auth init' on it")
        )


def found(rows: Sequence[Row]) -> Found:
    """Read the answer to a lookup."""
    row = rows[0]
    epochs = {0: read_tip(row)}
    if row[_DIGEST] is None:
        return Found(None, epochs)
    key = read_key(row[_FIRST_KEY:_FIRST_MACHINE])
    return Found(Record(key, read_machine(row[_FIRST_MACHINE:]), bytes(row[_DIGEST])), epochs)


def described(rows: Sequence[Row]) -> Description:
    """Read whose store this is, and its peppers."""
    read_tip(rows[0])
    peppers = (PepperRecord(row[6], bytes(row[7]), row[8]) for row in rows if row[6] is not None)
    return Description(rows[0][1], tuple(peppers))


def minted_only(rows: Sequence[Row]) -> Sequence[int]:
    """Read from the same answer where no foreign key was ever added (`News.minted_only`)."""
    return range(PARTITIONS) if rows[0][5] else ()


class Stray(StoreUnavailable):
    """An answer to another question. What else its connection has in store belongs to somebody else too."""


def ask(
    connection: Connection, statement: Select[Any], values: Mapping[str, Any], *, may_be_empty: bool = False
) -> Sequence[Row]:
    """Ask for what bears a word. Raises `Stray` where another one, or none, comes back: close the connection then."""
    word = int.from_bytes(os.urandom(8), "big") >> 1
    rows: Sequence[Row] = connection.execute(statement, {"word": word, **values}).all()
    if any(row[0] != word for row in rows) or not (rows or may_be_empty):
        raise Stray(
            "the SQL store gave the answer to another question, so its connections are closed: does anything share "
            "them, a process that was forked or a proxy?"
        )
    return rows


def ask_pooled(
    connection: Connection, statement: Select[Any], values: Mapping[str, Any], *, may_be_empty: bool = False
) -> Sequence[Row]:
    """Ask over a connection of a pool, which is emptied for a stray answer: what forked once was forked whole."""
    try:
        return ask(connection, statement, values, may_be_empty=may_be_empty)
    except Stray:
        connection.invalidate()
        connection.engine.dispose()
        raise


def changes_between(rows: Sequence[Row], since: Epoch, tip: Epoch) -> list[tuple[str, str]] | None:
    """Give what led from one epoch to another; None where either is not in the log, or the way is too long."""
    if len(rows) > LOG_READ or rows[0][1] is None:
        return None
    if [Epoch(row[1], bytes(row[2])) for row in (rows[0], rows[-1])] != [since, tip]:
        return None
    return [(row[3], row[4]) for row in rows[1:]]
