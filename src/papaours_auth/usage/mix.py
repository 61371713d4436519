"""How a key's calls are divided among groups of routes, and how many are out of proportion."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Final, TypeAlias

_NAMES: Final = 48
_FORGOTTEN: Final = 0.1  # of what is known, each day
_LEAST: Final = 0.1  # calls: less is forgotten
_CHANCE: Final = 0.4  # roots of its mean that a count is above it by chance: the mean of the half that is

State: TypeAlias = "tuple[dict[str, float], dict[str, int], dict[str, int]]"


class Mix:
    """The usual shares, and the calls of this hour and of this day before it. Bounded, whatever the names."""

    __slots__ = ("_day", "_hour", "_shares", "_total")

    def __init__(self, state: State | None = None) -> None:
        self._shares, self._day, self._hour = state or ({}, {}, {})
        self._total = sum(self._shares.values())

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        return self._shares, self._day, self._hour

    def count(self, name: str) -> None:
        """Count a call in this hour."""
        if name in self._hour:
            self._hour[name] += 1
        else:
            _add(self._hour, name, 1)

    def of_hour(self) -> float:
        """Say how many of the hour's calls are out of proportion."""
        return self._strange(self._hour)

    def of_day(self) -> float:
        """Say how many of the day's are."""
        return self._strange(_sum(self._day, self._hour))

    def end_hour(self) -> None:
        """Begin another hour."""
        self._day = _sum(self._day, self._hour)
        self._hour = {}

    def end_day(self) -> None:
        """Learn from the day that has ended."""
        known = {name: share * (1 - _FORGOTTEN) for name, share in self._shares.items()}
        for name, calls in self._day.items():
            known[name] = known.get(name, 0.0) + calls
        most = sorted(known, key=known.__getitem__, reverse=True)[:_NAMES]
        self._shares = {name: round(known[name], 2) for name in most if known[name] >= _LEAST}
        self._total = sum(self._shares.values())
        self._day = {}

    def _strange(self, counts: Mapping[str, int]) -> float:
        """Sum what each name has above its part, without what chance explains.

        Names without a share are left to the sign `resources`: one incident, one alert.
        """
        known = [(calls, self._shares[name]) for name, calls in counts.items() if name in self._shares]
        scale = sum(calls for calls, _ in known) / self._total if known else 0.0
        above = sum(max(0.0, calls - scale * share) for calls, share in known)
        chance = sum(sqrt(scale * share) for share in self._shares.values())
        return max(0.0, above - _CHANCE * chance)


def _add(counts: dict[str, int], name: str, calls: int) -> None:
    if name not in counts and len(counts) >= _NAMES:
        name = ""  # the rest
    counts[name] = counts.get(name, 0) + calls


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    both = dict(one)
    for name, calls in other.items():
        _add(both, name, calls)
    return both
