"""Refusals of nobody we know: counted by minute, reason and network, never by what was presented."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Final

from ..exceptions import Reason
from .event import Refusals, network_of

_MINUTE: Final = 60_000_000
_MOST: Final = 10_000  # entries: an attacker names as many networks as IPv6 has
_REST: Final = "other"


class Tally:
    """Counts them until they are taken. Threads may share it."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, str, str]] = Counter()

    def add(self, reason: Reason, address: str | None) -> None:
        """Count one."""
        minute = time.time_ns() // 1000 // _MINUTE * _MINUTE
        entry = (minute, reason.value, network_of(address))
        with self._lock:
            if entry not in self._counts and len(self._counts) >= _MOST:
                entry = (minute, reason.value, _REST)
            self._counts[entry] += 1

    def take(self) -> list[Refusals]:
        """Give the counts, and begin anew."""
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return [Refusals(*entry, count) for entry, count in taken.items()]

    def before_fork(self) -> None:
        """Hold still."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child from nothing."""
        if child:
            self._reset()
        else:
            self._lock.release()
