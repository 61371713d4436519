"""Pages of events, the newest first. Each looks at a bounded number of rows, however many there are.

A page begins below a position (time, id) and not after so many rows: events that arrive meanwhile neither shift
what comes next nor show it twice, and the thousandth page costs what the first does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from ..exceptions import InvalidInput
from .event import VERSION, Event
from .reader import Ask, Cell, Row

EXAMINED: Final = 50_000
"""Rows a page looks at, at most; fewer where `PATIENCE` is over before: a cold disk reads 5,000 a second."""
PATIENCE: Final = 0.15
"""Seconds after which a page begins no further stretch. The first has `STRETCH` rows, each next one twice as many."""
STRETCH: Final = 250
MOST: Final = 10_000
"""Events on a page, at most."""
_SAMPLE: Final = 20_000
_LAST: Final = (1 << 63) - 1
_COLUMNS: Final = (
    "event_id, time, key_id, machine_id, address, method, route, status, reason, outcome, service, "
    "environment, duration, request_id"
)
_CURSOR: Final = re.compile(r"([0-9a-f]{1,16})\.([0-9a-f]{1,16})")

_Part: TypeAlias = tuple[tuple[str, Cell], ...]
"""Conditions that an index answers: none (all events in order of time), or one column and its value."""


class Position(NamedTuple):
    """Where a page ends: the next one is below it."""

    time: int
    id: int


class Page(list[Event]):
    """Events, and ``cursor``, which names the next page; None where there is none.

    A page may be short, or empty, and still have a cursor: what is rare takes several to find.
    """

    def __init__(self, events: Iterable[Event], cursor: str | None) -> None:
        super().__init__(events)
        self.cursor = cursor


@dataclass(frozen=True)
class Wanted:
    """Which events: those whose columns are ``equal``, at ``since`` or later, and below ``top``.

    ``keys`` are those of the machine that is asked about; None where none is.
    """

    equal: Mapping[str, Cell]
    since: int
    top: Position
    keys: Sequence[str] | None = None


def position(cursor: str | None, until: int | None) -> Position:
    """Give where to begin. Raises `InvalidInput` for a cursor that no page gave."""
    end = Position(_LAST if until is None else until, 0)
    if cursor is None:
        return end
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise InvalidInput("this is no cursor: give the one that came with the page before")
    return min(end, Position(min(int(found[1], 16), _LAST), min(int(found[2], 16), _LAST)))


def read_page(ask: Ask, prefix: str, wanted: Wanted, limit: int) -> Page:
    """Read the next page."""
    if not 1 <= limit <= MOST:
        raise InvalidInput(f"a page has 1 to {MOST} events")
    return _Search(ask, f"{prefix}usage_events", wanted).page(limit)


@dataclass(frozen=True)
class _Search:
    ask: Ask
    table: str
    wanted: Wanted

    def page(self, limit: int) -> Page:
        """Search each part, and put them together as far down as all of them have been searched."""
        parts, deadline = self._narrowest(), time.monotonic() + PATIENCE
        rows: list[Row] = []
        floor: Position | None = None
        for part in parts:
            found, reached = self._part(part, limit, EXAMINED // len(parts), deadline)
            rows += found
            floor = reached if floor is None or (reached is not None and reached > floor) else floor
        rows = [row for row in rows if floor is None or _place(row) >= floor]
        rows.sort(key=_place, reverse=True)
        if len(rows) > limit or (len(rows) == limit and floor is not None):
            rows = rows[:limit]
            floor = _place(rows[-1])
        return Page(
            (Event(VERSION, *row[1:]) for row in rows),
            None if floor is None else f"{floor.time:x}.{floor.id:x}",
        )

    def _narrowest(self) -> Sequence[_Part]:
        """Choose the filter with the fewest events: it finds them by its index, the others are compared."""
        choices: list[Sequence[_Part]] = [
            [((column, value),)] for column, value in self.wanted.equal.items() if column != "machine_id"
        ]
        if self.wanted.keys is not None:
            choices.append([(("key_id", key),) for key in self.wanted.keys])
        if len(choices) > 1:
            return min(choices, key=lambda parts: sum(map(self._size, parts)))
        return choices[0] if choices else [()]

    def _size(self, part: _Part) -> int:
        values = self._values(part, self.wanted.top) | {"sample": _SAMPLE}
        statement = f"select count(*) from (select 1 as one {self._below(part)} limit :sample) sampled"  # noqa: S608 - words of ours
        return int(self.ask(statement, values)[0][0])

    def _part(
        self, part: _Part, limit: int, most: int, deadline: float
    ) -> tuple[Sequence[Row], Position | None]:
        """Give a part's newest events that fit, and how far down it was searched; None: to the end."""
        rest = self._rest(part)
        if not rest:
            rows = self._stretch(part, {}, self.wanted.top, limit, limit)
            return rows, _place(rows[-1]) if len(rows) == limit else None
        found: list[Row] = []
        reached: Position | None = self.wanted.top
        examined, stretch = 0, min(STRETCH, most) or 1
        while reached is not None and len(found) < limit:
            found += self._stretch(part, rest, reached, stretch, limit - len(found))
            if len(found) == limit:
                return found, _place(found[-1])
            reached = self._end(part, reached, stretch)
            examined += stretch
            if examined >= most or time.monotonic() > deadline:
                break
            stretch = min(2 * stretch, most - examined)
        return found, reached

    def _rest(self, part: _Part) -> dict[str, Cell]:
        """Name the filters the part's index does not answer."""
        return {
            column: value
            for column, value in self.wanted.equal.items()
            if (column, value) not in part and not (column == "machine_id" and self._of_machine(part))
        }

    def _stretch(
        self, part: _Part, rest: Mapping[str, Cell], top: Position, most: int, limit: int
    ) -> Sequence[Row]:
        """Look at so many rows below a position, and give the first that fit."""
        rows = f"select id, {_COLUMNS} {self._below(part)} order by time desc, id desc limit :most"
        if not rest:
            return self.ask(rows, self._values(part, top) | {"most": most})
        # The subquery's own bound keeps its order, and ends the search early: no database here sorts again.
        compared = " and ".join(f"{column} = :{column}" for column in rest)
        return self.ask(
            f"select * from ({rows}) found where {compared} limit :matching",  # noqa: S608 - words of ours
            {**self._values(part, top), **rest, "most": most, "matching": limit},
        )

    def _end(self, part: _Part, top: Position, most: int) -> Position | None:
        """Give the last of so many rows below a position; None where there are fewer."""
        rows = self.ask(
            f"select id, '', time {self._below(part)} order by time desc, id desc limit 1 offset :passed",
            self._values(part, top) | {"passed": most - 1},
        )
        return _place(rows[0]) if rows else None

    def _of_machine(self, part: _Part) -> bool:
        return self.wanted.keys is not None and bool(part) and part[0][1] in self.wanted.keys

    def _below(self, part: _Part) -> str:
        conditions = "".join(f"{column} = :{column} and " for column, _ in part)
        return (
            f"from {self.table} where {conditions}time >= :since and time <= :top "
            "and (time < :top or id < :below)"
        )

    def _values(self, part: _Part, top: Position) -> dict[str, Cell]:
        return {"since": self.wanted.since, "top": top.time, "below": top.id} | dict(part)


def _place(row: Row) -> Position:
    return Position(int(row[2]), int(row[0]))
