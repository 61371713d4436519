"""What a key was seen with before: networks, or groups of routes. Tells what is new, and forgets within a bound."""

from __future__ import annotations

from typing import Final, TypeAlias

_DAY: Final = 86_400_000_000
_FINE: Final = 256
_COARSE: Final = 128
_MEMORY: Final = 28  # days of news that are remembered
_OFTEN: Final = 3  # days with news in them after which news is no news
_MANY: Final = 5

Seen: TypeAlias = "list[int]"  # first and last time, calls, and 1 where it raised an alert
News: TypeAlias = "list[list[int]]"  # day, new fine names, new coarse names
State: TypeAlias = "tuple[dict[str, Seen], dict[str, int], News]"


class Familiar:
    """Names met so far. Each has a coarse name, by which a key that keeps meeting new ones is judged."""

    __slots__ = ("_coarse", "_fine", "_news")

    def __init__(self, state: State | None = None) -> None:
        self._fine, self._coarse, self._news = state or ({}, {}, [])

    def state(self) -> State:
        """Give what `__init__` takes, made of what JSON knows."""
        return self._fine, self._coarse, self._news

    def __len__(self) -> int:
        return len(self._fine)

    def __contains__(self, name: str) -> bool:
        return name in self._fine

    def meet(self, name: str, coarse: str, time: int, *, learning: bool) -> bool:
        """Remember a name; tell whether it is unusual. It stays so for a day, so that its calls are counted."""
        seen = self._fine.get(name)
        if seen is not None:
            seen[1] = max(seen[1], time)
            seen[2] += 1
            return bool(seen[3]) and 0 <= time - seen[0] < _DAY
        unusual = self._unusual(coarse, time) and not learning
        if not learning:
            self._note(time // _DAY, new_coarse=coarse not in self._coarse)
        self._remember(name, coarse, [time, time, 1, int(unusual)])
        return unusual

    def _unusual(self, coarse: str, time: int) -> bool:
        day = time // _DAY
        recent = [news for news in self._news if 0 <= day - news[0] <= _MEMORY]
        before = [news for news in recent if news[0] != day]
        if len(before) < _OFTEN:
            return True
        if sum(1 for news in before if news[2]) < _OFTEN:
            return coarse not in self._coarse
        today = sum(news[1] for news in recent if news[0] == day) + 1
        return today >= max(_MANY, 2 * max(news[1] for news in before))

    def _note(self, day: int, *, new_coarse: bool) -> None:
        entry = next((news for news in self._news if news[0] == day), None)
        if entry is None:
            entry = [day, 0, 0]
            self._news.append(entry)
            del self._news[:-_MEMORY]
        entry[1] += 1
        entry[2] += new_coarse

    def _remember(self, name: str, coarse: str, seen: Seen) -> None:
        if len(self._fine) >= _FINE:
            del self._fine[min(self._fine, key=lambda known: self._fine[known][1])]
        if coarse not in self._coarse and len(self._coarse) >= _COARSE:
            del self._coarse[min(self._coarse, key=self._coarse.__getitem__)]
        self._fine[name] = seen
        self._coarse[coarse] = seen[1]
