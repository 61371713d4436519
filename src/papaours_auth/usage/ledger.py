"""Where a watch reads events and keeps what it found: the protocol, and how it is opened. Each kind has its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias

from .reader import Ask, Cell, Row
from .sinks import file_of, is_sql

Do: TypeAlias = Callable[[str, Sequence[Mapping[str, Cell]]], object]
"""Run a statement with ``:names`` in it, once for each row of values."""

_TABLE: Final = re.compile(r"\busage_")
_AT_ONCE: Final = 500  # names in one statement


class Desk(NamedTuple):
    """What a transaction can do."""

    ask: Ask
    do: Do


class Ledger(Protocol):
    """The tables of usage and those of signs, in one database. Statements name tables as SQLite does: ``usage_…``.

    Statements are in words that every database here knows. All methods raise `StoreUnavailable`.
    """

    def prepare(self) -> None:
        """Make the tables of signs where those of usage are, safely with others doing the same."""

    def reading(self) -> AbstractContextManager[Ask]:
        """Hold one state of all tables."""

    def writing(self) -> AbstractContextManager[Desk]:
        """Hold the ledger alone, until all that was done is kept, or nothing."""

    def settled(self, top: int) -> int:
        """Give the number below which no event can appear any more, at most ``top``, which was read before."""


def open_ledger(place: Path | str | Ledger) -> Ledger:
    """Open a file, or a URL as `open_sink` takes them. Raises `ConfigurationError`."""
    if isinstance(place, str) and is_sql(place):
        from .ledger_sql import open_ledger as open_sql_ledger  # importing us loads no driver

        return open_sql_ledger(place)
    if isinstance(place, Path | str):
        from .ledger_sqlite import SQLiteLedger

        return SQLiteLedger(file_of(place) if isinstance(place, str) and "://" in place else place)
    return place


def ask_of_each(ask: Ask, statement: str, names: Collection[str]) -> list[Row]:
    """Ask with ``in (:names)``, of some hundred names at a time."""
    listed = list(names)
    rows: list[Row] = []
    for part in range(0, len(listed), _AT_ONCE):
        values: dict[str, Cell] = {
            f"n{place}": name for place, name in enumerate(listed[part : part + _AT_ONCE])
        }
        marks = ", ".join(f":{name}" for name in values)
        rows += ask(statement.replace(":names", marks), values)
    return rows


@lru_cache(maxsize=256)
def prefixed(statement: str, prefix: str) -> str:
    """Put a prefix before the tables that a statement names."""
    return _TABLE.sub(f"{prefix}usage_", statement) if prefix else statement
