"""What is done while the store cannot answer: the breaker, and what an operator gets to see.

The breaker opens at the first call that the store leaves unanswered, so that the others cost microseconds instead of
a timeout each. Then single calls try the store again, at growing intervals; the watcher, which reads the
store anyway, closes it too. Threads: a race lets one call more through, which is harmless. Fork: a child has its own.

Only what the store or its connection failed to do opens it. A full queue of ours does not. A timer of ours does where
the watcher hears nothing from the store either: that runs in a thread of its own, which no event loop stalls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, TypeAlias

from .exceptions import ConfigurationError, Overloaded, StoreUnavailable, UnreadableRecord

logger = logging.getLogger("papaours_auth")

FIRST_RETRY: Final = 0.05
"""Seconds after a failure before a call tries the store again; doubled with each further failure."""
LAST_RETRY: Final = 0.5
"""Seconds the interval grows to at most, so that recovery is noticed within a second."""
FIRST_RETRY_WATCHED: Final = 0.5
LAST_RETRY_WATCHED: Final = 5.0
"""The same two beside a watcher, which notices the recovery first: each try costs some call a timeout."""


Unready: TypeAlias = Literal["not_checked", "store_unavailable", "peppers_contradict", "no_recent_reading"]


@dataclass(frozen=True, slots=True)
class Health:
    """How an authenticator is, for a health check or a person at night.

    ``ok`` where uncached keys can be verified now. ``trusted_for``: seconds for which cached answers may still be
    given without news from the store; 0 where none may. ``stale_answers``: given by ``on_outage="serve_cached"``.
    ``error`` is the last one, for people; it holds no secret.

    ``reasons`` say what is not as it should be: the store was never found in order (``not_checked``), the breaker is
    open (``store_unavailable``), our peppers are not the store's (``peppers_contradict``), or the store was not read
    for longer than ``max_staleness`` (``no_recent_reading``). ``ready``: whether traffic should come here. That is so
    where there are no reasons, and under ``on_outage="serve_cached"`` for as long as known keys are let in.
    """

    ok: bool
    watching: bool
    trusted_for: float
    known: int
    unknown: int
    outages: int
    stale_answers: int
    error: str
    ready: bool
    reasons: tuple[Unready, ...]


class Breaker:
    """Lets calls through to a store that answers, and few to one that does not.

    Stands around each call to the store as a context manager, after `check` let it through.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        *,
        watched: Callable[[], bool],
        silent: Callable[[], bool] = lambda: True,
        listen: Callable[[], None] = lambda: None,
    ) -> None:
        """``silent`` tells whether nothing is heard from the store; ``listen`` asks it to be heard soon."""
        self._monotonic = monotonic
        self._watched = watched
        self._silent = silent
        self._listen = listen
        self._retry = FIRST_RETRY
        self._retry_at = 0.0
        self._trying = False
        self._doubt: Exception | None = None
        self.is_open = False
        self.outages = 0
        self.error = ""

    def check(self) -> None:
        """Raise `StoreUnavailable` at once where the store did not answer lately, and no try is due."""
        if not self.is_open:
            return
        now = self._monotonic()
        if now < self._retry_at:
            raise StoreUnavailable(self.error)
        self._retry_at = now + self._retry  # this call is the try: nothing to undo where it never ends
        self._trying = True

    def succeeded(self) -> None:
        """Close: the store has answered."""
        self._doubt = None
        if self.is_open:
            self.is_open = False
            logger.warning("the key store answers again")
        self._retry = FIRST_RETRY

    def failed(self, error: Exception) -> None:
        """Open, or stay open for longer."""
        self.error = str(error)
        self._doubt = None
        if self.is_open and not self._trying:
            return  # a call from before it opened: the many that one outage ends count once
        self._trying = False
        first, last = FIRST_RETRY, LAST_RETRY
        if self._watched():
            first, last = FIRST_RETRY_WATCHED, LAST_RETRY_WATCHED
        pause = max(self._retry, first)
        self._retry_at = self._monotonic() + pause
        self._retry = min(pause * 2, last)
        if not self.is_open:
            self._listen()
            self.is_open = True
            self.outages += 1
            logger.warning("the key store cannot be asked, so uncached calls meet 503: %s", self.error)

    def note(self, error: Exception) -> None:
        """Log an error that says why nobody can be let in, once."""
        if str(error) != self.error:
            self.error = str(error)
            logger.warning("the key store is not in order: %s", self.error)

    def doubt(self, error: Exception) -> None:
        """Open where the store is silent; else find out whether it is. For calls that a timer of ours has ended."""
        if self._silent():
            self.failed(error)
        else:
            self._doubt = error
            self._listen()

    def unheard(self) -> None:
        """Open where there was a doubt: the store could not be read."""
        if self._doubt is not None:
            self.failed(self._doubt)

    def __enter__(self) -> None:
        """Nothing to do: `check` was."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UnreadableRecord):  # one bad record is no outage for the others
            self.succeeded()
        elif isinstance(error, StoreUnavailable) and error.own_timer:
            self.doubt(error)
        elif isinstance(error, (StoreUnavailable, ConfigurationError)) and not isinstance(error, Overloaded):
            self.failed(error)
