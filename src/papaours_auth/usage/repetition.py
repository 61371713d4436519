"""Something that should not repeat, and does: in a burst, or low and slow."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

_MINUTE: Final = 60_000_000
_TEN: Final = 10 * _MINUTE
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR
_KEPT: Final = 168  # hours
_MEMORY: Final = 28  # days of worst counts
_LIMIT_FACTOR: Final = 1.25
_REMEMBERED: Final = 1.2  # of a limit: an attack must not hide the next


class Window(NamedTuple):
    """A length of time, how many are too many in it, and over how many hours and days they must be spread."""

    minutes: int
    least: int
    hours: int
    days: int


BURST: Final = Window(20, 10, 1, 1)
DAY: Final = Window(24 * 60, 16, 6, 1)
WEEK: Final = Window(7 * 24 * 60, 25, 12, 4)

State: TypeAlias = "tuple[list[list[int]], int, int, int, list[list[int]]]"


class Repeated(NamedTuple):
    """So many in the last minutes."""

    times: int
    minutes: int


class Repetition:
    """Counts by ten minutes and by hour, within a bound, and tells when there are too many."""

    __slots__ = ("_before", "_hours", "_now", "_ten", "_worst")

    def __init__(self, state: State | None = None) -> None:
        hours, self._ten, self._now, self._before, self._worst = state or ([], 0, 0, 0, [])
        self._hours = {hour: times for hour, times in hours}  # noqa: C416 - pairs from JSON are lists

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        hours = [[hour, times] for hour, times in self._hours.items()]
        return hours, self._ten, self._now, self._before, self._worst

    @property
    def total(self) -> int:
        """How many there were in the hours that are kept."""
        return sum(self._hours.values())

    def count(self, time: int, times: int = 1) -> Repeated | None:
        """Count so many at a time; give what is too many, the shortest time that shows it."""
        self._add_ten(time // _TEN, times)
        hour = time // _HOUR
        self._hours[hour] = self._hours.get(hour, 0) + times
        if len(self._hours) > _KEPT:  # the farthest goes, so that one absurd time costs one hour
            del self._hours[max(self._hours, key=lambda kept: abs(hour - kept))]
        found = [
            (BURST, self._now + self._before if time // _TEN == self._ten else 0, 0),
            (DAY, self._spread(hour, 24, DAY), 1),
            (WEEK, self._spread(hour, 168, WEEK), 2),
        ]
        told = None
        for window, count, place in found:
            limit = max(window.least, _LIMIT_FACTOR * self._before_today(time // _DAY, place))
            if count >= limit and told is None:
                told = Repeated(count, window.minutes)
            self._note(time // _DAY, place, int(min(count, limit * _REMEMBERED)))
        return told

    def _add_ten(self, ten: int, times: int) -> None:
        if ten == self._ten:
            self._now += times
        elif ten > self._ten or self._ten - ten > _KEPT * 6:  # a late one joins no burst
            self._before = self._now if ten == self._ten + 1 else 0
            self._ten, self._now = ten, times

    def _spread(self, hour: int, length: int, window: Window) -> int:
        """Count a window that ends with this hour; 0 where it is no steady run but a burst or two."""
        inside = [kept for kept in self._hours if 0 <= hour - kept < length]
        if len(inside) < window.hours or len({kept // 24 for kept in inside}) < window.days:
            return 0
        return sum(self._hours[kept] for kept in inside)

    def _before_today(self, day: int, place: int) -> int:
        # The day before belongs to what goes on now: a slow run must not raise its own limit.
        ages = {0: 1, 1: 2, 2: 7}
        return max(
            (worst[place + 1] for worst in self._worst if ages[place] <= day - worst[0] <= _MEMORY), default=0
        )

    def _note(self, day: int, place: int, count: int) -> None:
        worst = next((entry for entry in self._worst if entry[0] == day), None)
        if worst is None:
            worst = [day, 0, 0, 0]
            self._worst.append(worst)
            del self._worst[:-_MEMORY]
        worst[place + 1] = max(worst[place + 1], count)
