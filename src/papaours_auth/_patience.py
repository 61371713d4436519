"""`asyncio.timeout` for many who wait equally long: one timer for all of them, not one each.

An uncached lookup is bounded twice on an event loop, by the authenticator and by the store. `asyncio.timeout` takes
3 µs each time, and 5 after a wait (of 100); this takes 0.5. Cancellation is counted as there: who was cancelled by
somebody else as well is told so, not of a timeout. Fork: a child that goes on with its parent's loop has the tasks
and timers too.

A block is not ended for what the event loop did. A timer runs in the same pass of the loop as whatever has just
arrived, so an overdue block gets a few passes more, in which its answer may reach it. Where the timer itself comes
late, the loop was stalled, and the block gets as long as that again: at most twice the time in all.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Self, cast

_STALLED: Final = 0.05
"""Seconds after its time at which a timer says that the loop was stalled."""
_PASSES: Final = 5
"""Passes of the loop that an answer takes at most, from a socket or a thread to the task that waits for it."""


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
        while self.ends:
            bound, end = next(iter(self.ends.items()))
            if end > now:
                self._alarm = self._loop.call_at(end, self._look)
                return
            del self.ends[bound]
            late = now - end
            if late < _STALLED:
                self._pass(bound, _PASSES)
            else:
                self._loop.call_later(min(late, self._seconds), self._pass, bound, _PASSES)
        self._alarm = None

    def _pass(self, bound: Bound, left: int) -> None:
        """End a block after so many passes of the loop."""
        if left:
            self._loop.call_soon(self._pass, bound, left - 1)
        else:
            bound.expire()


class Bound:
    """A block of one task that ends in time. ``expired`` tells that it did not by itself."""

    __slots__ = ("_cancelling", "_ended", "_patience", "_task", "expired")

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._ended = False
        self.expired = False

    def __enter__(self) -> Self:
        # Any: what the task gives. There is one, as in every coroutine that a loop runs.
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelling = self._task.cancelling()
        self._patience.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended = True
        self._patience.ends.pop(self, None)
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def is_why(self) -> bool:
        """Whether this bound, and nobody else, has cancelled the task."""
        return self.expired and self._task.cancelling() - 1 <= self._cancelling

    def expire(self) -> None:
        """End the block, once, unless it has ended."""
        if not self.expired and not self._ended:
            self.expired = True
            self._task.cancel()


class Patiences:
    """One `Patience` for each event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._of: dict[asyncio.AbstractEventLoop, Patience] = {}

    def bound(self) -> Bound:
        """See `Patience.bound`: on the running loop."""
        loop = asyncio.get_running_loop()
        found = self._of.get(loop)
        if found is None:
            self._of = {other: kept for other, kept in [*self._of.items()] if not other.is_closed()}
            found = self._of[loop] = Patience(self._seconds)
        return found.bound()
