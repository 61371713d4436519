"""Usage: what was recorded, asked about. Reads the file of an `SQLiteSink`; changes nothing in it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from ..exceptions import InvalidInput, StoreUnavailable
from .event import VERSION, Event

Cell = str | int
_COLUMNS = (
    "event_id, time, key_id, machine_id, address, method, route, status, reason, outcome, service, "
    "environment, duration, request_id"
)


class LastUse(NamedTuple):
    """A key's first and last call, accepted or refused, and how many there were."""

    key_id: str
    machine_id: str
    first: datetime
    last: datetime
    calls: int


class Count(NamedTuple):
    """How many calls there were of something: a route, an address, the start of a minute."""

    of: str
    calls: int


class Usage:
    """Answers from an SQLite file. ``last_used`` is behind a call by the recorder's interval and the sink's delay.

    Raises `StoreUnavailable` where the file cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self._uri = f"file:{quote(str(Path(path).absolute()))}?mode=ro"

    def last_used(self, key_id: str) -> LastUse | None:
        """Give a key's last use; None where it was never used."""
        rows = self._rows("select * from usage_keys where key_id = ?", [key_id])
        return _last_use(rows[0]) if rows else None

    def unused_since(self, moment: datetime) -> list[LastUse]:
        """List keys that were used once, but not since then, the longest unused first."""
        rows = self._rows("select * from usage_keys where last < ? order by last", [_micro(moment)])
        return [_last_use(row) for row in rows]

    def history(
        self,
        *,
        key_id: str | None = None,
        machine_id: str | None = None,
        address: str | None = None,
        route: str | None = None,
        status: int | None = None,
        since: datetime | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Event]:
        """List events, the newest first, a page at a time."""
        given: list[tuple[str, Cell | None]] = [
            ("key_id = ?", key_id),
            ("machine_id = ?", machine_id),
            ("address = ?", address),
            ("route = ?", route),
            ("status = ?", status),
            ("time >= ?", None if since is None else _micro(since)),
        ]
        used = [(clause, value) for clause, value in given if value is not None]
        where = " and ".join(clause for clause, _ in used) or "true"
        statement = f"select {_COLUMNS} from usage_events where {where} order by time desc limit ? offset ?"  # noqa: S608 - words of ours
        return [
            Event(VERSION, *row)
            for row in self._rows(statement, [*(value for _, value in used), limit, offset])
        ]

    def series(
        self, key_id: str, step: Literal["minute", "hour", "day"], since: datetime
    ) -> list[tuple[datetime, int]]:
        """Give a key's calls per minute, hour or day; steps without any are left out."""
        rows = self._rows(
            "select start, sum(calls) from usage_series where step = ? and key_id = ? and start >= ? "
            "group by start order by start",
            [step, key_id, _micro(since)],
        )
        return [(_moment(start), calls) for start, calls in rows]

    def by_route(self, key_id: str, since: datetime) -> list[Count]:
        """Count a key's calls by route, the most called first, as far back as events are kept."""
        return self._count("route", key_id, since)

    def by_address(self, key_id: str, since: datetime) -> list[Count]:
        """Count a key's calls by address: after a rotation, who still uses the old key."""
        return self._count("address", key_id, since)

    def _count(self, column: Literal["route", "address"], key_id: str, since: datetime) -> list[Count]:
        statement = (
            f"select {column}, count(*) from usage_events where key_id = ? and time >= ? "  # noqa: S608 - likewise
            "group by 1 order by 2 desc, 1"
        )
        return [Count(*row) for row in self._rows(statement, [key_id, _micro(since)])]

    # Any: SQLite's cells, whose types the strict tables fix.
    def _rows(self, statement: str, values: Sequence[Cell]) -> list[Any]:
        try:
            with contextlib.closing(sqlite3.connect(self._uri, uri=True, timeout=5.0)) as connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StoreUnavailable(
                "the usage file cannot be read: has anything been recorded in it?"
            ) from error


def _micro(moment: datetime) -> int:
    if moment.tzinfo is None:
        raise InvalidInput("a time without its zone could mean any of them: give one")
    return int(moment.timestamp() * 1e6)


def _moment(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def _last_use(row: tuple[str, str, int, int, int]) -> LastUse:
    key, machine, first, last, calls = row
    return LastUse(key, machine, _moment(first), _moment(last), calls)
