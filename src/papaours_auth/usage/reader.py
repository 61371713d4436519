"""How questions reach the tables: statements in words that every database here knows, over one snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from ..exceptions import InvalidInput
from .sinks import file_of, is_sql

Cell: TypeAlias = str | int | None
Row: TypeAlias = Sequence[Any]  # Any: a database's cells, whose types the tables fix
Ask: TypeAlias = Callable[[str, Mapping[str, Cell]], Sequence[Row]]
"""Run a statement with ``:names`` in it, and give its rows."""

_CALENDAR_END: Final = 253_402_300_799_999_999


class Reader(Protocol):
    """Opens snapshots of the tables a sink writes. ``prefix`` stands before their names."""

    @property
    def prefix(self) -> str:
        """What stands before ``usage_events``, and the others."""

    def snapshot(self) -> AbstractContextManager[Ask]:
        """Hold one state of all tables. Raises `StoreUnavailable`."""


def open_reader(place: Path | str) -> Reader:
    """Open a file, or a URL as `open_sink` takes them. Raises `ConfigurationError`."""
    if isinstance(place, str) and is_sql(place):
        from .sql import open_reader as open_sql_reader  # importing us loads no driver

        return open_sql_reader(place)
    from .sqlite import SQLiteReader

    return SQLiteReader(file_of(place) if isinstance(place, str) and "://" in place else place)


def micro(moment: datetime) -> int:
    """Give a moment in µs since 1970. Raises `InvalidInput` for a time without its zone."""
    if moment.tzinfo is None:
        raise InvalidInput("a time without its zone could mean any of them: give one")
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond


def moment(microseconds: int) -> datetime:
    """Give the moment, in UTC; the calendar's last one for what a clock that was wrong has left beyond it."""
    seconds, rest = divmod(min(int(microseconds), _CALENDAR_END), 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
