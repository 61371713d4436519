"""Is a count a clear record, by what a key has had in five weeks? See docs/design/signs.md."""

from __future__ import annotations

import math
from typing import Final, NamedTuple, TypeAlias

DAYS: Final = 35
"""How many days' worst are remembered."""
_HIGHEST: Final = 30.0  # a score no count reaches
_UNLIMITED: Final = 1e12
_UNSURE: Final = 1.0  # of the margin, where nothing is remembered yet
_GATE_SCORE: Final = 0.4  # half as many again, and
_GATE_EXCESS: Final = 8.0  # so many calls: less is no rise, whatever the proportions
_LEAST_STRANGE: Final = 8.0  # calls
_REMEMBERED: Final = 1.1  # of a limit: an attack must not hide the next


class Scale(NamedTuple):
    """How a length of time is judged. ``damping``: calls below which a ratio means little.

    ``margin`` and ``slack`` are for counts, ``strange`` for calls out of proportion: how clear a record must be.
    """

    damping: float
    least_score: float  # log of a ratio
    least_excess: float  # calls
    margin: float
    slack: float
    strange: float = 1.5


class Measure(NamedTuple):
    """How far a count is above what was expected: as the log of a ratio, in calls, and in calls out of proportion."""

    score: float
    excess: float
    strange: float = 0.0


MeterState: TypeAlias = "tuple[Measure, Measure, list[Measure]]"


class Meter:
    """Judges counts of one scale by the worst of the last five weeks: a ratio or an excess that is a clear record.

    Both, because bursts add calls, whatever the hour, and habits multiply them.
    """

    __slots__ = ("_best", "_peaks", "_scale", "ceiling")

    def __init__(self, scale: Scale, state: MeterState | None = None) -> None:
        self._scale = scale
        ceiling, best, peaks = state or ((_HIGHEST, _UNLIMITED, _UNLIMITED), (0.0, 0.0, 0.0), [])
        self.ceiling, self._best = Measure(*ceiling), Measure(*best)
        self._peaks = [Measure(*peak) for peak in peaks]

    def state(self) -> MeterState:
        """Give what `__init__` takes."""
        return self.ceiling, self._best, self._peaks

    def measure(self, count: int, expected: float, strange: float = 0.0) -> Measure:
        """Say how much more a count is than what was expected."""
        damping = self._scale.damping
        return Measure(math.log((count + damping) / (expected + damping)), count - expected, strange)

    def limit(self, expected: float) -> int:
        """Give the count from which on it is too much."""
        scale = self._scale
        by_score = _count_at(self.ceiling.score, expected, scale.damping)
        least = max(_count_at(scale.least_score, expected, scale.damping), expected + scale.least_excess)
        return math.ceil(max(min(by_score, expected + self.ceiling.excess), least))

    def gate(self, expected: float) -> int:
        """Give the count from which on it is too much where its calls are out of proportion."""
        least = _count_at(_GATE_SCORE, expected, self._scale.damping)
        return math.ceil(max(least, expected + _GATE_EXCESS))

    def passed(self, measure: Measure) -> bool:
        """Tell whether it is beyond the record."""
        return measure.score >= self.ceiling.score or measure.excess >= self.ceiling.excess

    def note(self, measure: Measure) -> None:
        """Remember it; an unusual one as just unusual: see docs/design/signs.md."""
        self._best = Measure(
            max(self._best.score, min(measure.score, self.ceiling.score * _REMEMBERED)),
            max(self._best.excess, min(measure.excess, self.ceiling.excess * _REMEMBERED)),
            max(self._best.strange, min(measure.strange, self.ceiling.strange * _REMEMBERED)),
        )

    def end_day(self, skipped: int) -> None:
        """End a day, and so many after it without a call; settle the limits of the next."""
        rest = [Measure(0.0, 0.0)] * min(skipped, DAYS)
        self._peaks = [*self._peaks, self._best, *rest][-DAYS:]
        self._best = Measure(0.0, 0.0)
        scale = self._scale
        unsure = 1.0 + _UNSURE * (1.0 - len(self._peaks) / DAYS)  # a short memory knows few bursts
        score, excess, strange = (max(values) * unsure for values in zip(*self._peaks, strict=True))
        self.ceiling = Measure(
            max(scale.least_score, score * scale.margin + scale.slack),
            max(scale.least_excess, excess * scale.margin),
            max(_LEAST_STRANGE, strange * scale.strange),
        )


def _count_at(score: float, expected: float, damping: float) -> float:
    return (expected + damping) * math.exp(min(score, _HIGHEST)) - damping
