"""The rhythm of a key's calls: by hour of the day and day of the week, with the bursts that are usual for it."""

from __future__ import annotations

import base64
import math
from array import array
from statistics import median
from typing import Final, NamedTuple, TypeAlias

from .meter import DAYS, Measure, Meter, MeterState, Scale

_TEN: Final = 600_000_000  # ten minutes, in µs
_TENS: Final = 6  # of an hour
_WEEK: Final = 168  # hours
_SPAN: Final = 24 * DAYS
_LEARNED: Final = 2 * _WEEK
_MOST_GROWTH: Final = 2.5
_NEVER: Final = 1 << 62
_RUN: Final = 3  # hours in a row
_LOUDER: Final = 1.25  # told again when the count has grown by so much

HOUR: Final = Scale(damping=8, least_score=math.log(2.0), least_excess=20, margin=1.5, slack=0.15)
RUN: Final = Scale(damping=8, least_score=math.log(1.8), least_excess=8, margin=1.15, slack=0.1)
DAY: Final = Scale(damping=10, least_score=math.log(1.8), least_excess=25, margin=1.35, slack=0.15)


class Rise(NamedTuple):
    """More calls than usual: so many in the last 60 minutes, or the day so far, where so many were expected."""

    unit: str
    calls: int
    expected: float

    @property
    def ratio(self) -> float:
        """How many times the expected it is, at least."""
        return self.calls / max(self.expected, 1.0)


class _Window:
    """The last 60 minutes, in tens: an attack is not cut in two by the clock."""

    __slots__ = ("_tens", "count", "limit", "now", "usual")

    def __init__(self, state: WindowState | None = None) -> None:
        self.now, self.limit, self.usual, self._tens = state or (-1, _NEVER, 0.0, [0] * _TENS)
        self.count = sum(self._tens)

    def state(self) -> WindowState:
        return self.now, self.limit, self.usual, self._tens

    def add(self) -> None:
        self._tens[-1] += 1
        self.count += 1

    def move(self, ten: int) -> None:
        passed = min(ten - self.now, _TENS)
        self._tens = [*self._tens[passed:], *[0] * passed]
        self.count = sum(self._tens)
        self.now = ten


WindowState: TypeAlias = "tuple[int, int, float, list[int]]"
State: TypeAlias = "tuple[str, list[int], list[float], list[Measure], WindowState, list[MeterState]]"


class Rhythm:
    """Counts calls, and tells when there are too many. Hours are numbered from 1970, in UTC."""

    __slots__ = (
        "_before", "_counts", "_day", "_day_limit", "_filled", "_growth", "_hour", "_run", "_run_limit",
        "_today", "_top", "_usual", "_usual_before", "_usual_today", "_window",
    )  # fmt: skip
    _before: list[Measure]  # of the hours just before, where nothing lies between

    def __init__(self, state: State | None = None) -> None:
        if state is None:
            self._begin(-1)
            return
        text, numbers, figures, before, window, meters = state
        self._counts = array("I", base64.b64decode(text))
        self._top, self._filled, self._today, self._run_limit, self._day_limit = numbers
        self._growth, self._usual, self._usual_before, self._usual_today = figures
        self._before = [Measure(*measure) for measure in before]
        self._window = _Window(window)
        self._hour, self._run, self._day = map(Meter, (HOUR, RUN, DAY), meters)

    def _begin(self, hour: int) -> None:
        self._counts = array("I", bytes(4 * _SPAN))
        self._top, self._filled, self._today = hour, 0, 0
        self._run_limit = self._day_limit = _NEVER
        self._growth, self._usual, self._usual_before, self._usual_today = 1.0, 0.0, 0.0, 0.0
        self._before = []
        self._window = _Window()
        self._hour, self._run, self._day = Meter(HOUR), Meter(RUN), Meter(DAY)

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        return (
            base64.b64encode(self._counts.tobytes()).decode("ascii"),
            [self._top, self._filled, self._today, self._run_limit, self._day_limit],
            [self._growth, self._usual, self._usual_before, self._usual_today],
            self._before,
            self._window.state(),
            [meter.state() for meter in (self._hour, self._run, self._day)],
        )

    def count(self, time: int) -> Rise | None:
        """Count a call at a time (µs); give what is too much, and again when it has grown by a quarter."""
        ten = time // _TEN
        if ten > self._window.now or self._top < 0:
            self._move(ten)
        elif not self._joins(ten // _TENS):
            return None
        self._counts[self._top % _SPAN] += 1
        self._today += 1
        self._window.add()
        return self._judged()

    def _judged(self) -> Rise | None:
        window, hour = self._window, self._counts[self._top % _SPAN]
        if window.count >= window.limit:
            window.limit = math.ceil(window.count * _LOUDER)
            return Rise("hour", window.count, window.usual)
        if hour >= self._run_limit:
            self._run_limit = math.ceil(hour * _LOUDER)
            return Rise("hour", hour, self._usual)
        if self._today >= self._day_limit:
            self._day_limit = math.ceil(self._today * _LOUDER)
            return Rise("day", self._today, self._usual_today)
        return None

    def _joins(self, hour: int) -> bool:
        """Tell whether a call is of this hour. A late one is counted where it belongs, and raises nothing."""
        if hour == self._top:
            return True
        if self._top - hour < _SPAN:
            self._counts[hour % _SPAN] += 1
            self._today += hour // 24 == self._top // 24
        else:  # the clock went back by weeks
            self._begin(-1)
        return False

    def _move(self, ten: int) -> None:
        hour = ten // _TENS
        if self._filled >= _WEEK:
            self._hour.note(self._hour.measure(self._window.count, self._window.usual))
        if self._top < 0 or hour - self._top >= _SPAN:
            self._begin(hour)  # nothing it knows is of these weeks
        elif hour > self._top:
            self._advance(hour)
        self._window.move(ten)
        part = (ten % _TENS + 1) / _TENS
        self._window.usual = self._usual * part + self._usual_before * (1 - part)
        if self._filled >= _LEARNED:
            self._window.limit = self._hour.limit(self._window.usual)

    def _advance(self, hour: int) -> None:
        days, steps = hour // 24 - self._top // 24, hour - self._top
        if self._filled >= _WEEK:
            self._close(steps)
            if days:
                self._day.note(self._day.measure(self._today, self._usual_today))
                for meter in (self._hour, self._run, self._day):
                    meter.end_day(days - 1)
        for passed in range(self._top + 1, hour + 1):
            self._counts[passed % _SPAN] = 0
        self._filled = min(self._filled + steps, _SPAN)
        self._top = hour
        if days:
            self._today = 0
        if self._filled >= _WEEK:
            self._usual_before = self._usual if steps == 1 else 0.0
            self._open(new_day=days > 0)

    def _close(self, steps: int) -> None:
        """Measure the hour that has ended, and the run of hours it ends."""
        self._before.append(self._run.measure(self._counts[self._top % _SPAN], self._usual))
        if len(self._before) == _RUN:
            self._run.note(Measure(*map(min, zip(*self._before, strict=True))))
        self._before = self._before[-_RUN + 1 :] if steps == 1 else []

    def _open(self, *, new_day: bool) -> None:
        if new_day:
            self._growth = self._grown()
            self._usual_today = self._usual_day() * self._growth
        self._usual = self._usual_hour() * self._growth
        if self._filled < _LEARNED:
            return
        if new_day:
            self._day_limit = self._day.limit(self._usual_today)
        lasting = len(self._before) == _RUN - 1 and all(map(self._run.passed, self._before))
        self._run_limit = self._run.limit(self._usual) if lasting else _NEVER

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
        same = [self._at(self._top - _WEEK * week) for week in self._weeks()]
        near = [
            self._at(self._top - _WEEK * week + shift) for week in self._weeks() for shift in (-1, 1)
        ]  # daylight saving, and jobs that drift
        return max(median(same), median(same + near))

    def _usual_day(self) -> float:
        begin = self._top // 24 * 24
        return median(self._between(begin - _WEEK * week, 24) for week in self._weeks())

    def _grown(self) -> float:
        """How much more the last week had than the median of those before."""
        if self._filled < 2 * _WEEK:
            return 1.0
        before = [self._between(self._top - _WEEK * (week + 1), _WEEK) for week in self._weeks()[:-1]]
        last = self._between(self._top - _WEEK, _WEEK)
        return min(max(last / max(median(before), 1.0), 1.0), _MOST_GROWTH) if before else 1.0
