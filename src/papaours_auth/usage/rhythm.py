"""The rhythm of a key's calls: by hour of the day and day of the week, with the bursts that are usual for it."""

from __future__ import annotations

import base64
import math
from array import array
from statistics import median, median_high
from typing import Final, NamedTuple, TypeAlias

from .meter import DAYS, Measure, Meter, MeterState, Scale
from .mix import Mix
from .mix import State as MixState

_WEEK: Final = 168  # hours
_SPAN: Final = 24 * DAYS
_LEARNED: Final = 4 * _WEEK  # each hour of the week four times
_MOST_GROWTH: Final = 2.5
_NEVER: Final = 1 << 62
_RUN: Final = 3  # hours in a row
_LOUDER: Final = 1.25  # told again when the count has grown by so much
_NEXT: Final = 1.05  # the proportions are looked at again when it has grown by so much


HOUR: Final = Scale(damping=8, least_score=math.log(2.0), least_excess=20, margin=2.0, slack=0.15)
RUN: Final = Scale(damping=8, least_score=math.log(1.8), least_excess=8, margin=1.3, slack=0.1)
DAY: Final = Scale(damping=10, least_score=math.log(2.0), least_excess=25, margin=1.7, slack=0.15)


class Rise(NamedTuple):
    """More calls than usual: so many in the hour or day so far, where so many were expected."""

    unit: str
    calls: int
    expected: float
    strange: int = 0
    """Calls out of the usual proportions, where they gave it away."""

    @property
    def ratio(self) -> float:
        """How many times the expected it is, at least."""
        return self.calls / max(self.expected, 1.0)


State: TypeAlias = (
    "tuple[str, list[int], list[float], list[float], list[Measure], list[MeterState], MixState]"
)


class Rhythm:
    """Counts calls by hour, and tells when there are too many. Hours are numbered from 1970, in UTC."""

    __slots__ = (
        "_before", "_counts", "_day", "_day_gate", "_day_limit", "_filled", "_grown", "_growth", "_hour",
        "_hour_gate", "_hour_limit", "_mix", "_run", "_today", "_top", "_usual", "_usual_today",
    )  # fmt: skip
    _before: list[Measure]  # of the hours just before, where nothing lies between
    _grown: list[float]  # of the last days: how many times the usual they had

    def __init__(self, state: State | None = None) -> None:
        if state is None:
            self._begin(-1)
            return
        text, numbers, figures, grown, before, meters, mix = state
        self._counts = array("I", base64.b64decode(text))
        self._top, self._filled, self._today = numbers[:3]
        self._hour_limit, self._day_limit, self._hour_gate, self._day_gate = numbers[3:]
        self._mix = Mix(mix)
        self._growth, self._usual, self._usual_today = figures
        self._grown = grown
        self._before = [Measure(*measure) for measure in before]
        self._hour, self._run, self._day = map(Meter, (HOUR, RUN, DAY), meters)

    def _begin(self, hour: int) -> None:
        self._counts = array("I", bytes(4 * _SPAN))
        self._top, self._filled, self._today = hour, 0, 0
        self._hour_limit = self._day_limit = self._hour_gate = self._day_gate = _NEVER
        self._mix = Mix()
        self._growth, self._usual, self._usual_today = 1.0, 0.0, 0.0
        self._before, self._grown = [], []
        self._hour, self._run, self._day = Meter(HOUR), Meter(RUN), Meter(DAY)

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        return (
            base64.b64encode(self._counts.tobytes()).decode("ascii"),
            [
                self._top,
                self._filled,
                self._today,
                self._hour_limit,
                self._day_limit,
                self._hour_gate,
                self._day_gate,
            ],
            [self._growth, self._usual, self._usual_today],
            self._grown,
            self._before,
            [meter.state() for meter in (self._hour, self._run, self._day)],
            self._mix.state(),
        )

    def count(self, hour: int, name: str = "") -> Rise | None:
        """Count a call of a group of routes (none: of no usual one) in an hour.

        Give what is too much, and again when it has grown by a quarter.
        """
        if hour != self._top and not self._arrive(hour):
            return None
        place = hour % _SPAN
        self._counts[place] += 1
        self._today += 1
        if name:
            self._mix.count(name)
        return self._in_hour(self._counts[place]) or self._in_day(self._today)

    def _in_hour(self, calls: int) -> Rise | None:
        strange = 0.0
        if calls < self._hour_limit:
            if calls < self._hour_gate:
                return None
            strange = self._mix.of_hour()
            if strange < self._hour.ceiling.strange:
                self._hour_gate = math.ceil(calls * _NEXT)
                return None
        self._hour_limit = self._hour_gate = math.ceil(calls * _LOUDER)
        return Rise("hour", calls, self._usual, round(strange))

    def _in_day(self, calls: int) -> Rise | None:
        strange = 0.0
        if calls < self._day_limit:
            if calls < self._day_gate:
                return None
            strange = self._mix.of_day()
            if strange < self._day.ceiling.strange:
                self._day_gate = math.ceil(calls * _NEXT)
                return None
        self._day_limit = self._day_gate = math.ceil(calls * _LOUDER)
        return Rise("day", calls, self._usual_today, round(strange))

    def _arrive(self, hour: int) -> bool:
        """Go to a later hour; count a late call where it belongs, which raises nothing."""
        if 0 < self._top - hour < _SPAN:
            self._counts[hour % _SPAN] += 1
            self._today += hour // 24 == self._top // 24
            return False
        if self._top < 0 or not 0 < hour - self._top < _SPAN:
            self._begin(hour)  # nothing it knows is of these weeks
        else:
            self._advance(hour)
        return True

    def _advance(self, hour: int) -> None:
        days = hour // 24 - self._top // 24
        if self._filled >= _WEEK:
            self._close(hour - self._top)
            if days:
                self._end_day()
                for meter in (self._hour, self._run, self._day):
                    meter.end_day(days - 1)
        self._mix.end_hour()
        if days:
            self._mix.end_day()
        for passed in range(self._top + 1, hour + 1):
            self._counts[passed % _SPAN] = 0
        self._filled = min(self._filled + hour - self._top, _SPAN)
        self._top = hour
        if days:
            self._today = 0
        if self._filled >= _WEEK:
            self._open(new_day=days > 0)

    def _end_day(self) -> None:
        """Measure the day that has ended, and what the last seven had more than usual.

        The median of them: a burst, or the end of a month, is no growth.
        """
        self._day.note(self._day.measure(self._today, self._usual_today, self._mix.of_day()))
        plain = self._usual_today / self._growth
        self._grown = [*self._grown, (self._today + DAY.damping) / (plain + DAY.damping)][-7:]
        self._growth = min(max(median(self._grown), 1.0), _MOST_GROWTH)

    def _close(self, steps: int) -> None:
        """Score the hour that has ended, and the run of hours it ends."""
        measure = self._hour.measure(self._counts[self._top % _SPAN], self._usual, self._mix.of_hour())
        self._hour.note(measure)
        self._before.append(measure)
        if len(self._before) == _RUN:
            self._run.note(Measure(*map(min, zip(*self._before, strict=True))))
        self._before = self._before[-_RUN + 1 :] if steps == 1 else []

    def _open(self, *, new_day: bool) -> None:
        if new_day:
            self._usual_today = self._usual_day() * self._growth
        self._usual = self._usual_hour() * self._growth
        if self._filled < _LEARNED:
            return
        if new_day:
            self._day_limit = self._day.limit(self._usual_today)
            self._day_gate = self._day.gate(self._usual_today)
        self._hour_limit = self._hour.limit(self._usual)
        self._hour_gate = self._hour.gate(self._usual)
        if len(self._before) == _RUN - 1 and all(map(self._run.passed, self._before)):
            self._hour_limit = min(self._hour_limit, self._run.limit(self._usual))

    def _weeks(self) -> range:
        """Number the past weeks that are known."""
        return range(1, min(self._filled // _WEEK, _SPAN // _WEEK - 1) + 1)

    def _at(self, hour: int) -> int:
        return self._counts[hour % _SPAN]

    def _between(self, first: int, hours: int) -> int:
        begin, end = first % _SPAN, (first + hours) % _SPAN
        if begin < end:
            return sum(self._counts[begin:end])
        return sum(self._counts[begin:]) + sum(self._counts[:end])

    def _usual_hour(self) -> float:
        """Give what this hour of the week had, or one next to it: clocks change, and jobs drift."""
        hours = (self._top, self._top - 1, self._top + 1)
        same, *near = ([self._at(hour - _WEEK * week) for week in self._weeks()] for hour in hours)
        return max(median_high(same), *(median(hour) for hour in near))

    def _usual_day(self) -> float:
        begin = self._top // 24 * 24
        return median_high(self._between(begin - _WEEK * week, 24) for week in self._weeks())
