"""`asyncio.timeout` for many who wait equally long: one timer for all of them, not one each.

An uncached lookup is bounded twice on an event loop, by the authenticator and by the store. `asyncio.timeout` takes
3 µs each time, and 5 after a wait (of 100); this takes 0.5. Cancellation is counted as there: who was cancelled by
somebody else as well is told so, not of a timeout. Fork: a child that goes on with its parent's loop has the tasks
and timers too.
"""

from __future__ import annotations

import asyncio
from typing import Any, Self, cast


class Patience:
    """How long things may take on one event loop, where it is made."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._alarm: asyncio.TimerHandle | None = None
        self.ends: dict[Bound, float] = {}  # the earliest first: all wait equally long

    def bound(self) -> Bound:
        """Have a ``with`` block end in time: by `TimeoutError`."""
        return Bound(self)

    def begin(self, bound: Bound) -> None:
        """Count the time of a block from now on."""
        self.ends[bound] = end = self._loop.time() + self._seconds
        if self._alarm is None:
            self._alarm = self._loop.call_at(end, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        for bound, end in self.ends.items():
            if end > now:
                self._alarm = self._loop.call_at(end, self._look)
                return
            bound.expire()
        self._alarm = None


class Bound:
    """A block of one task that ends in time. ``expired`` tells that it did not by itself."""

    __slots__ = ("_cancelling", "_patience", "_task", "expired")

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.expired = False

    def __enter__(self) -> Self:
        # Any: what the task gives. There is one, as in every coroutine that a loop runs.
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelling = self._task.cancelling()
        self._patience.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        del self._patience.ends[self]
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        """End the block, once."""
        if not self.expired:
            self.expired = True
            self._task.cancel()
