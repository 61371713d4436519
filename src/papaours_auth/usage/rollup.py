"""What is added up of a batch, and for how long what is kept: the same for every database.

All of it is bounded. In an hour or a day a key has so many routes and addresses of its own (`MOST_DISTINCT`), and
the rest are one row, `OTHER`: whoever calls a new path with each request fills no disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Literal, NamedTuple, TypeAlias

from .event import Event, Refusals

SECOND: Final = 1_000_000
"""All times are µs since 1970."""
HOUR: Final = 3600 * SECOND
DAY: Final = 24 * HOUR
STEPS: Final[Mapping[Step, int]] = {"minute": 60 * SECOND, "hour": HOUR, "day": DAY}
OTHER: Final = "other"
MOST_DISTINCT: Final[Mapping[Counted, int]] = {"hour": 200, "day": 400}
MOST_NETWORKS: Final = 1_000
"""Networks with refusals that a minute has of its own, for each reason."""
LONGEST: Final = 90 * DAY
"""How long a producer's last sequence is remembered: a spool found later may be delivered twice."""

Step: TypeAlias = Literal["minute", "hour", "day"]
Counted: TypeAlias = Literal["hour", "day"]
"""The steps in which routes and addresses are counted."""
Column: TypeAlias = Literal["route", "address"]
Bucket: TypeAlias = tuple[str, Counted, int]
"""Where a column's values are counted: key, step and its start."""


class Retention(NamedTuple):
    """For how many days each thing is kept: events, and counts by the minute, the hour and the day."""

    events: float = 30
    minute: float = 2
    hour: float = 90
    day: float = 3 * 365


class Tally(NamedTuple):
    """How many calls, and when the last of them was."""

    calls: int
    last: int

    def and_also(self, other: Tally) -> Tally:
        """Put two together."""
        return Tally(self.calls + other.calls, max(self.last, other.last))


_NONE: Final = Tally(0, 0)
_NOTHING: Final[AbstractSet[str]] = frozenset()


class Expired(NamedTuple):
    """Rows of a table that are too old: those whose ``column`` is below ``oldest``."""

    table: str
    column: str
    oldest: int
    step: Step | None = None


def expired(retention: Retention, now: int) -> list[Expired]:
    """Name what is to be forgotten at a moment."""

    def before(days: float) -> int:
        return now - int(days * DAY)

    return [
        Expired("usage_events", "time", before(retention.events)),
        *(Expired("usage_series", "start", before(getattr(retention, step)), step) for step in STEPS),
        *(
            Expired(table, "start", before(getattr(retention, step)), step)
            for table in ("usage_routes", "usage_addresses")
            for step in MOST_DISTINCT
        ),
        Expired("usage_refusals", "minute", now - LONGEST),
        Expired("usage_batches", "at", now - LONGEST),
    ]


def series(events: Iterable[Event]) -> list[tuple[Step, int, str, int, int]]:
    """Count by step, its start, key and status."""
    width = STEPS["minute"]
    counted = Counter((event.time // width, event.key_id, event.status) for event in events)
    sums: Counter[tuple[Step, int, str, int]] = Counter()
    for (minute, key, status), calls in counted.items():
        for step, longer in STEPS.items():
            sums[(step, minute * width // longer * longer, key, status)] += calls
    return sorted((*entry, calls) for entry, calls in sums.items())


def keys(events: Iterable[Event]) -> list[tuple[str, str, int, int, int]]:
    """Give each key's machine, first and last call, and how many there were."""
    seen: dict[str, tuple[str, int, int, int]] = {}
    for event in events:
        machine, first, last, calls = seen.get(event.key_id, (event.machine_id, event.time, event.time, 0))
        seen[event.key_id] = (machine, min(first, event.time), max(last, event.time), calls + 1)
    return sorted((key, *values) for key, values in seen.items())


def tallies(events: Sequence[Event], column: Column) -> dict[Bucket, dict[str, Tally]]:
    """Tally a column's values in each bucket."""
    place = Event._fields.index(column)
    ordered = sorted(events, key=lambda event: event.time)
    entries = [(event.key_id, event.time // HOUR, str(event[place])) for event in ordered]
    last = dict(
        zip(entries, (event.time for event in ordered), strict=True)
    )  # of equal entries the latest stays
    found: dict[Bucket, dict[str, Tally]] = {}
    for entry, calls in Counter(entries).items():
        key, hour, value = entry
        for step in MOST_DISTINCT:
            values = found.setdefault((key, step, hour * HOUR // STEPS[step] * STEPS[step]), {})
            values[value] = Tally(calls, last[entry]).and_also(values.get(value, _NONE))
    return dict(sorted(found.items()))


def by_minute(refusals: Iterable[Refusals]) -> dict[tuple[int, str], dict[str, Tally]]:
    """Tally the networks of refusals, for each minute and reason."""
    found: dict[tuple[int, str], dict[str, Tally]] = {}
    for entry in refusals:
        networks = found.setdefault((entry.minute, entry.reason), {})
        one = Tally(entry.calls, entry.minute)
        networks[entry.network] = one.and_also(networks.get(entry.network, _NONE))
    return dict(sorted(found.items()))


def capped(values: Mapping[str, Tally], known: AbstractSet[str], most: int) -> dict[str, Tally]:
    """Keep values that have a row (``known``), and new ones, the most called first, while there is room."""
    room = most - len(known - {OTHER})
    kept: dict[str, Tally] = {}
    for value, tally in sorted(values.items(), key=lambda item: (-item[1].calls, item[0])):
        if value not in known and value != OTHER:
            room -= 1
        name = value if value in known or room >= 0 else OTHER
        kept[name] = kept[name].and_also(tally) if name in kept else tally
    return dict(sorted(kept.items()))


class Known:
    """Values that were seen to have rows, so that a batch without new ones asks for none. ``most`` bounds them.

    Nothing is put in that was not read: a batch that fails leaves nothing wrong behind.
    """

    def __init__(self, most: int = 200_000) -> None:
        self._most = most
        self._held = 0
        self._found: dict[tuple[Column, Bucket], AbstractSet[str]] = {}

    def among(
        self,
        column: Column,
        wanted: Mapping[Bucket, Mapping[str, Tally]],
        read: Callable[[Sequence[Bucket]], Iterable[tuple[Bucket, str]]],
    ) -> Mapping[Bucket, AbstractSet[str]]:
        """Give what is known of each bucket, and read, all at once, those of which a value is not."""
        known = {place: self._found.get((column, place), _NOTHING) for place in wanted}
        unknown = {place: set[str]() for place, values in wanted.items() if not known[place] >= values.keys()}
        if unknown:
            for place, value in read(list(unknown)):
                unknown[place].add(value)
            self._keep(column, unknown)
        return known | unknown

    def _keep(self, column: Column, found: Mapping[Bucket, AbstractSet[str]]) -> None:
        for place, values in found.items():
            former = self._found.get((column, place))
            self._held += 1 + len(values) - (0 if former is None else 1 + len(former))
            if self._held > self._most:
                self._found.clear()
                self._held = 1 + len(values)
            self._found[column, place] = values
