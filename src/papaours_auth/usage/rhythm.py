"""The rhythm of a key's calls: by hour of the day and day of the week, with the bursts that are usual for it."""

from __future__ import annotations

import base64
import math
from array import array
from statistics import median
from typing import Final, NamedTuple, TypeAlias

_WEEK: Final = 168  # hours
_WEEKS: Final = 5
_SPAN: Final = _WEEK * _WEEKS
_DAYS: Final = 7 * _WEEKS
_LEARNED: Final = 2 * _WEEK
_MOST_GROWTH: Final = 2.5
_NEVER: Final = 1 << 62
_LOUDER: Final = 1.25  # told again when the count has grown by so much


class Scale(NamedTuple):
    """How hours, or days, are judged. ``damping``: calls below which a ratio means little."""

    damping: float
    least_score: float  # log of a ratio
    margin: float
    slack: float
    least_excess: float  # calls


HOUR: Final = Scale(damping=15, least_score=math.log(2.0), margin=1.15, slack=0.15, least_excess=30)
DAY: Final = Scale(damping=60, least_score=math.log(1.8), margin=1.25, slack=0.15, least_excess=60)


class Rise(NamedTuple):
    """More calls than usual: so many in the hour or day so far, where so many were expected."""

    unit: str
    calls: int
    expected: float

    @property
    def ratio(self) -> float:
        """How many times the expected it is, at least."""
        return self.calls / max(self.expected, 1.0)


class Meter:
    """Judges counts of one scale against what is expected, by the worst scores of the last five weeks."""

    __slots__ = ("_best", "_ceiling", "_peaks", "_scale", "expected", "limit")

    def __init__(self, scale: Scale, state: list[float] | None = None) -> None:
        self._scale = scale
        self.expected, self._ceiling, self._best, limit, *self._peaks = state or (0.0, math.inf, 0.0, _NEVER)
        self.limit = int(limit)

    def state(self) -> list[float]:
        """Give what `__init__` takes."""
        ceiling = min(self._ceiling, 99.0)  # JSON has no infinity
        return [self.expected, ceiling, self._best, self.limit, *self._peaks]

    def open(self, expected: float, *, learned: bool) -> None:
        """Begin to count, with what is to be expected."""
        scale = self._scale
        self.expected = expected
        worst = max(self._peaks, default=0.0)
        unsure = 1.0 + 0.5 * (1.0 - len(self._peaks) / _DAYS)  # a short memory knows few bursts
        self._ceiling = max(scale.least_score, worst * scale.margin * unsure + scale.slack)
        at = (expected + scale.damping) * math.exp(min(self._ceiling, 30.0)) - scale.damping
        self.limit = math.ceil(max(at, expected + scale.least_excess)) if learned else _NEVER

    def close(self, count: int) -> None:
        """End the counting. An unusual count is remembered as just unusual: see docs/design/signs.md."""
        score = math.log((count + self._scale.damping) / (self.expected + self._scale.damping))
        self._best = max(self._best, min(score, self._ceiling * 1.1))

    def day(self, skipped: int) -> None:
        """End a day, and so many without a call."""
        self._peaks = [*self._peaks, self._best, *[0.0] * min(skipped, _DAYS)][-_DAYS:]
        self._best = 0.0

    def told(self, count: int) -> None:
        """Do not tell again before it is much more."""
        self.limit = max(math.ceil(count * _LOUDER), count + 1)


State: TypeAlias = "tuple[str, int, int, int, float, list[float], list[float]]"


class Rhythm:
    """Counts calls by hour, and tells when there are too many. Hours are numbered from 1970, in UTC."""

    __slots__ = ("_counts", "_day", "_filled", "_growth", "_hour", "_today", "_top")

    def __init__(self, state: State | None = None) -> None:
        text, self._top, self._filled, self._today, self._growth, hour, day = state or (
            "", -1, 0, 0, 1.0, None, None,
        )  # fmt: skip
        self._counts = array("I", base64.b64decode(text) or bytes(4 * _SPAN))
        self._hour, self._day = Meter(HOUR, hour), Meter(DAY, day)

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        text = base64.b64encode(self._counts.tobytes()).decode("ascii")
        return (
            text, self._top, self._filled, self._today, self._growth, self._hour.state(), self._day.state(),
        )  # fmt: skip

    def count(self, hour: int) -> Rise | None:
        """Count a call in an hour; give what is too much, once for each quarter it grows by."""
        if hour != self._top and not self._arrive(hour):
            return None
        place = hour % _SPAN
        self._counts[place] += 1
        self._today += 1
        if self._counts[place] >= self._hour.limit:
            self._hour.told(self._counts[place])
            return Rise("hour", self._counts[place], self._hour.expected)
        if self._today >= self._day.limit:
            self._day.told(self._today)
            return Rise("day", self._today, self._day.expected)
        return None

    def _arrive(self, hour: int) -> bool:
        """Go to a later hour; count a late call where it belongs, which raises nothing."""
        if 0 < self._top - hour < _SPAN:
            self._counts[hour % _SPAN] += 1
            self._today += hour // 24 == self._top // 24
            return False
        if self._top < 0 or not 0 < hour - self._top < _SPAN:
            self._begin(hour)
        else:
            self._advance(hour)
        return True

    def _begin(self, hour: int) -> None:
        self._counts = array("I", bytes(4 * _SPAN))
        self._top, self._filled, self._today, self._growth = hour, 0, 0, 1.0
        self._hour, self._day = Meter(HOUR), Meter(DAY)

    def _advance(self, hour: int) -> None:
        days = hour // 24 - self._top // 24
        if self._filled >= _WEEK:
            self._hour.close(self._counts[self._top % _SPAN])
            if days:
                self._day.close(self._today)
                self._hour.day(days - 1)
                self._day.day(days - 1)
        for passed in range(self._top + 1, hour + 1):
            self._counts[passed % _SPAN] = 0
        self._filled = min(self._filled + hour - self._top, _SPAN)
        self._top = hour
        self._open(new_day=days > 0)

    def _open(self, *, new_day: bool) -> None:
        if self._filled < _WEEK:
            return
        learned = self._filled >= _LEARNED
        if new_day:
            self._today = 0
            self._growth = self._grown()
            self._day.open(self._usual_day() * self._growth, learned=learned)
        self._hour.open(self._usual_hour() * self._growth, learned=learned)

    def _weeks(self) -> range:
        """Number the past weeks that are known."""
        return range(1, min(self._filled // _WEEK, _WEEKS - 1) + 1)

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
