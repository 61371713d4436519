"""Usage and AsyncUsage: what was recorded, asked about. They read the tables of a sink and change nothing in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import update_wrapper
from pathlib import Path
from typing import Concatenate, Final, NamedTuple, ParamSpec, TypeVar

from ..exceptions import InvalidInput
from ..model import Key
from .history import Page, Wanted, position, read_page
from .reader import Ask, Cell, Reader, Row, micro, moment, open_reader
from .rollup import DAY, STEPS, Column, Counted, Step

__all__ = ["AsyncUsage", "Count", "LastUse", "Page", "Report", "StillUsed", "Usage", "rotations"]

_EVER: Final = 0
_NEVER: Final = 1 << 62
_WEEK: Final = 7 * DAY
_KEY: Final = "key_id, machine_id, first, last, calls"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class LastUse(NamedTuple):
    """A key's first and last call, accepted or refused, and how many there were."""

    key_id: str
    machine_id: str
    first: datetime
    last: datetime
    calls: int


class Count(NamedTuple):
    """How many calls a route or an address had, and when the last was. "other": those beyond the bound."""

    of: str
    calls: int
    last: datetime


class StillUsed(NamedTuple):
    """The use of a key since a moment, such as its rotation: by whom, for what."""

    key_id: str
    machine_id: str
    since: datetime
    last: datetime
    calls: int
    addresses: list[Count]
    routes: list[Count]


class Report(NamedTuple):
    """A machine's use since a day: ``statuses`` and ``days`` are calls by status and by day."""

    machine_id: str
    since: datetime
    calls: int
    keys: list[LastUse]
    statuses: dict[int, int]
    routes: list[Count]
    addresses: list[Count]
    days: list[tuple[datetime, int]]


class Usage:
    """Answers from a file, a URL as sinks take them, or an opened reader; each from one snapshot.

    A call shows in all answers at most twice the recorder's interval after it ended (1 s by default), and the
    time the sink takes to write its batch; until then, and while the sink is away, in none. Times are exact.

    Counts by route and address are by whole hours (UTC) up to a week, by whole days beyond it: those of ``since``
    and ``until`` are counted whole, but nothing is listed whose last call was before ``since``.

    Raises `StoreUnavailable` where the tables cannot be read, `InvalidInput` for a time without its zone.
    """

    def __init__(self, source: Path | str | Reader) -> None:
        self._reader = open_reader(source) if isinstance(source, Path | str) else source

    def last_used(self, key_id: str) -> LastUse | None:
        """Give a key's last use; None where it was never used."""
        with self._asking() as query:
            return next(iter(query.keys("key_id = :key", {"key": key_id})), None)

    def last_uses(self, *, machine_id: str | None = None) -> list[LastUse]:
        """List the last uses of all keys, or a machine's, the latest first."""
        with self._asking() as query:
            return query.uses(machine_id)

    def unused_since(self, moment: datetime, *, machine_id: str | None = None) -> list[LastUse]:
        """List keys that were used once, but not since then, the longest unused first."""
        uses = [use for use in self.last_uses(machine_id=machine_id) if micro(use.last) < micro(moment)]
        return uses[::-1]

    def history(
        self,
        *,
        key_id: str | None = None,
        machine_id: str | None = None,
        address: str | None = None,
        route: str | None = None,
        status: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """List events, the newest first, a page at a time: the next one is below ``cursor``, the page's own.

        From ``since``, and before ``until``. A page looks at 50,000 events at most, so one may be short.
        """
        given: dict[str, Cell] = {
            "key_id": key_id, "machine_id": machine_id, "address": address, "route": route, "status": status,
        }  # fmt: skip
        equal = {column: value for column, value in given.items() if value is not None}
        start, top = _since(since), position(cursor, None if until is None else micro(until))
        with self._asking() as query:
            keys = None if machine_id is None else query.keys_of(None, machine_id)
            if keys is not None and not keys:
                return Page([], None)
            return read_page(query.ask, self._reader.prefix, Wanted(equal, start, top, keys), limit)

    def series(
        self,
        key_id: str | None = None,
        step: Step = "hour",
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        machine_id: str | None = None,
    ) -> list[tuple[datetime, int]]:
        """Give a key's or a machine's calls per minute, hour or day; steps without any are left out."""
        if step not in STEPS:
            raise InvalidInput("a step is a minute, an hour or a day")
        span = _span(since, until, STEPS[step])
        with self._asking() as query:
            return query.series(query.keys_of(key_id, machine_id), step, span)

    def by_route(
        self,
        key_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        machine_id: str | None = None,
        limit: int = 1_000,
    ) -> list[Count]:
        """Count a key's or a machine's calls by route, the most called first."""
        return self._count("route", key_id, since, until, machine_id, limit)

    def by_address(
        self,
        key_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        machine_id: str | None = None,
        limit: int = 1_000,
    ) -> list[Count]:
        """Count a key's or a machine's calls by address."""
        return self._count("address", key_id, since, until, machine_id, limit)

    def _count(
        self,
        column: Column,
        key_id: str | None,
        since: datetime | None,
        until: datetime | None,
        machine_id: str | None,
        limit: int,
    ) -> list[Count]:
        step = _fine_enough(since, until)
        span = _span(since, until, STEPS[step])
        with self._asking() as query:
            return query.counts(column, query.keys_of(key_id, machine_id), step, span, _since(since), limit)

    def still_used(self, key_id: str, since: datetime, *, limit: int = 20) -> StillUsed | None:
        """Tell who still uses a key after its rotation at ``since`` (see `rotations`); None where nobody does."""
        after, step = micro(since), _fine_enough(since, None)
        span = _span(since, None, STEPS[step])
        with self._asking() as query:
            use = next(iter(query.keys("key_id = :key", {"key": key_id})), None)
            if use is None or micro(use.last) < after:
                return None
            addresses = query.counts("address", [key_id], step, span, after, _NEVER)
            routes = query.counts("route", [key_id], step, span, after, limit)
        calls = sum(count.calls for count in addresses)
        return StillUsed(key_id, use.machine_id, since, use.last, calls, addresses[:limit], routes)

    def report(self, machine_id: str, since: datetime, *, limit: int = 20) -> Report:
        """Sum up a machine's use, in whole days (UTC) from the one of ``since``."""
        span = _span(since, None, DAY)
        with self._asking() as query:
            uses = query.uses(machine_id)
            keys = [use.key_id for use in uses]
            statuses = query.statuses(keys, span)
            return Report(
                machine_id,
                moment(span.start),
                sum(statuses.values()),
                uses,
                statuses,
                query.counts("route", keys, "day", span, span.start, limit),
                query.counts("address", keys, "day", span, span.start, limit),
                query.series(keys, "day", span),
            )

    def _asking(self) -> _Asking:
        return _Asking(self._reader)


def rotations(keys: Iterable[Key]) -> dict[str, datetime]:
    """Tell which of these keys were replaced, and when the first key that replaces each was made."""
    found: dict[str, datetime] = {}
    for key in keys:
        if key.replaces is not None:
            found[key.replaces] = min(found.get(key.replaces, key.created_at), key.created_at)
    return found


class _Span(NamedTuple):
    """From the start of a step to the end of another; µs."""

    start: int
    end: int


def _since(since: datetime | None) -> int:
    return _EVER if since is None else micro(since)


def _span(since: datetime | None, until: datetime | None, step: int) -> _Span:
    return _Span(_since(since) // step * step, _NEVER if until is None else micro(until))


def _fine_enough(since: datetime | None, until: datetime | None) -> Counted:
    """Choose hours for a week, days for more: a month of hours of a busy key takes a second to read."""
    end = time.time_ns() // 1000 if until is None else micro(until)
    return "hour" if end - _since(since) <= _WEEK else "day"


class _Asking:
    """A snapshot held while a question is answered."""

    def __init__(self, reader: Reader) -> None:
        self._prefix = reader.prefix
        self._snapshot = reader.snapshot()

    def __enter__(self) -> _Query:
        return _Query(self._snapshot.__enter__(), self._prefix)

    def __exit__(self, *exc_info: object) -> bool | None:
        return self._snapshot.__exit__(*exc_info)  # type: ignore[arg-type]  # what a `with` gives


@dataclass(frozen=True)
class _Query:
    """The statements."""

    ask: Ask
    prefix: str

    def keys(self, condition: str, values: Mapping[str, Cell]) -> list[LastUse]:
        rows = self.ask(
            f"select {_KEY} from {self.prefix}usage_keys where {condition} order by last desc, key_id",  # noqa: S608 - words of ours
            values,
        )
        return [_last_use(row) for row in rows]

    def uses(self, machine_id: str | None) -> list[LastUse]:
        if machine_id is None:
            return self.keys("0 = 0", {})
        return self.keys("machine_id = :machine", {"machine": machine_id})

    def keys_of(self, key_id: str | None, machine_id: str | None) -> list[str]:
        """Name the keys that are asked about. Raises `InvalidInput` where neither or both are given."""
        if (key_id is None) == (machine_id is None):
            raise InvalidInput("name a key or a machine: one of them")
        return [key_id] if key_id is not None else [use.key_id for use in self.uses(machine_id)]

    def series(self, keys: Sequence[str], step: Step, span: _Span) -> list[tuple[datetime, int]]:
        rows = self._summed(
            "start, sum(calls)", "usage_series", "step = :step and ", keys, span, {"step": step}
        )
        return [(moment(start), int(calls)) for start, calls in rows]

    def statuses(self, keys: Sequence[str], span: _Span) -> dict[int, int]:
        rows = self._summed("status, sum(calls)", "usage_series", "step = 'day' and ", keys, span, {})
        return {int(status): int(calls) for status, calls in rows}

    def _summed(
        self,
        what: str,
        table: str,
        condition: str,
        keys: Sequence[str],
        span: _Span,
        more: Mapping[str, Cell],
    ) -> Sequence[Row]:
        if not keys:
            return []
        names, values = _named(keys)
        by = what.partition(",")[0]
        return self.ask(
            f"select {what} from {self.prefix}{table} where {condition}key_id in ({names}) "  # noqa: S608 - likewise
            f"and start >= :start and start < :end group by {by} order by {by}",
            {**values, **more, "start": span.start, "end": span.end},
        )

    def counts(
        self, column: Column, keys: Sequence[str], step: Counted, span: _Span, after: int, limit: int
    ) -> list[Count]:
        """Count what was called after a moment: in its own step too, nothing is listed whose last call was before."""
        if not keys:
            return []
        names, values = _named(keys)
        rows = self.ask(
            f"select {column}, sum(calls), max(last) from {self.prefix}usage_{_PLURAL[column]} "  # noqa: S608 - likewise
            f"where key_id in ({names}) and step = :step and start >= :start and start < :end and last >= :after "
            f"group by {column} order by 2 desc, 1 limit :most",
            {**values, "step": step, "start": span.start, "end": span.end, "after": after, "most": limit},
        )
        return [Count(of, int(calls), moment(last)) for of, calls, last in rows]


_PLURAL: Final[Mapping[Column, str]] = {"route": "routes", "address": "addresses"}


def _named(keys: Sequence[str]) -> tuple[str, dict[str, Cell]]:
    values: dict[str, Cell] = {f"k{place}": key for place, key in enumerate(keys)}
    return ", ".join(f":{name}" for name in values), values


def _last_use(row: Row) -> LastUse:
    key, machine, first, last, calls = row
    return LastUse(key, machine, moment(first), moment(last), int(calls))


def _in_thread(
    method: Callable[Concatenate[Usage, _P], _R],
) -> Callable[Concatenate[AsyncUsage, _P], Awaitable[_R]]:
    def call(self: AsyncUsage, /, *args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_R]:
        return asyncio.to_thread(method, self.sync, *args, **kwargs)

    update_wrapper(call, method)
    return call


class AsyncUsage:
    """`Usage` for event loops: each method is the one of the same name, awaited, run in a thread."""

    def __init__(self, source: Path | str | Reader | Usage) -> None:
        self.sync = source if isinstance(source, Usage) else Usage(source)

    last_used = _in_thread(Usage.last_used)
    last_uses = _in_thread(Usage.last_uses)
    unused_since = _in_thread(Usage.unused_since)
    history = _in_thread(Usage.history)
    series = _in_thread(Usage.series)
    by_route = _in_thread(Usage.by_route)
    by_address = _in_thread(Usage.by_address)
    still_used = _in_thread(Usage.still_used)
    report = _in_thread(Usage.report)
