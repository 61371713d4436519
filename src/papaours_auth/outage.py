"""What is done while the store cannot answer: the breaker, and what an operator gets to see.

The breaker opens at the first call that the store leaves unanswered, so that the others cost microseconds instead of
a timeout each. Then single calls try the store again, at growing intervals; the watcher, which reads the
store anyway, closes it too. Threads: a race lets one call more through, which is harmless. Fork: a child has its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from .exceptions import ConfigurationError, StoreUnavailable, UnreadableRecord

logger = logging.getLogger("papaours_auth")

FIRST_RETRY: Final = 0.05
"""Seconds after a failure before a call tries the store again; doubled with each further failure."""
LAST_RETRY: Final = 0.5
"""Seconds the interval grows to at most, so that recovery is noticed within a second."""
LAST_RETRY_WATCHED: Final = 5.0
"""The same beside a watcher, which notices the recovery: each try costs some call a timeout."""


@dataclass(frozen=True, slots=True)
class Health:
    """How an authenticator is, for a health check or a person at night.

    ``ok`` where uncached keys can be verified now. ``trusted_for``: seconds for which cached answers may still be
    given without news from the store; 0 where none may. ``stale_answers``: given by ``on_outage="serve_cached"``.
    ``error`` is the last one, for people; it holds no secret.
    """

    ok: bool
    watching: bool
    trusted_for: float
    known: int
    unknown: int
    outages: int
    stale_answers: int
    error: str


class Breaker:
    """Lets calls through to a store that answers, and few to one that does not.

    Stands around each call to the store as a context manager, after `check` let it through.
    """

    def __init__(self, monotonic: Callable[[], float], *, watched: Callable[[], bool]) -> None:
        self._monotonic = monotonic
        self._watched = watched
        self._retry = FIRST_RETRY
        self._retry_at = 0.0
        self.is_open = False
        self.failures = 0
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

    def succeeded(self) -> None:
        """Close: the store has answered."""
        if self.is_open:
            self.is_open = False
            logger.warning("the key store answers again")
        self._retry = FIRST_RETRY

    def failed(self, error: Exception) -> None:
        """Open, or stay open for longer."""
        self.error = str(error)
        self.failures += 1
        self._retry_at = self._monotonic() + self._retry
        self._retry = min(self._retry * 2, LAST_RETRY_WATCHED if self._watched() else LAST_RETRY)
        if not self.is_open:
            self.is_open = True
            self.outages += 1
            logger.warning("the key store cannot be asked, so uncached calls meet 503: %s", self.error)

    def __enter__(self) -> None:
        """Nothing to do: `check` was."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UnreadableRecord):  # one bad record is no outage for the others
            self.succeeded()
        elif isinstance(error, (StoreUnavailable, ConfigurationError)):
            self.failed(error)
