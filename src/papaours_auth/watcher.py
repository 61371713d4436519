"""The watcher: one thread that reads the change feed and keeps the cache's trust alive.

Thread: a daemon, started at the first uncached call. Fork: the child has none, and starts its own likewise.
Signals and exit: it holds nothing that needs saving. A store that cannot answer: it logs once, tries on, and
trust runs out by itself.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from ._locks import WaitingLock
from .cache import Cache, Clock
from .exceptions import StoreUnavailable
from .stores import Feed

logger = logging.getLogger("papaours_auth")

FIRST_RETRY: Final = 0.05
"""Seconds from a reading that failed to the next one, doubled with each further failure."""
LAST_RETRY: Final = 0.25
"""Seconds that grows to at most, so that recovery is noticed within a second, whatever ``max_staleness``."""


class Watcher:
    """Polls a feed every ``max_staleness / 4``, and at once when the feed announces a change.

    Counted from when a reading was sent: where readings end by their timeouts, the next one is soon under way, so
    that a store that goes on is noticed at once.
    """

    def __init__(self, cache: Cache, feed: Feed, clock: Clock, *, max_staleness: float) -> None:
        self._cache = cache
        self._feed = feed
        self._clock = clock
        self._interval = max_staleness / 4
        self._polling = WaitingLock()  # a reading is applied before the next one is sent
        self._stopping = threading.Event()
        self._failing = False
        self._thread: threading.Thread | None = None
        self.alive = False
        """Whether the thread runs. Not `Thread.is_alive`: each uncached call looks, and that takes 0.6 µs."""

    def start(self) -> None:
        """Start the thread, unless it runs. One caller at a time."""
        if not self.alive:
            self._thread = threading.Thread(target=self._live, name="papaours-auth-watcher", daemon=True)
            self.alive = True
            self._thread.start()

    def poll(self) -> None:
        """Read the feed once and apply it. Raises `StoreUnavailable`; trust is then left to run out."""
        with self._polling:
            sent = self._clock.monotonic()  # before the clocks are compared: trust speaks of both
            self._cache.check_clock()
            self._cache.apply(self._feed.read(self._cache.epochs), sent=sent)

    def wake(self) -> None:
        """Poll soon: somebody saw an epoch that was not applied yet."""
        self._feed.wake()

    def close(self) -> None:
        """Stop the thread and let go of the feed."""
        self._stopping.set()
        self._feed.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self._feed.close()

    def _live(self) -> None:
        try:
            self._run()
        finally:
            self.alive = False

    def _run(self) -> None:
        retry = FIRST_RETRY
        while not self._stopping.is_set():
            begun, pause = self._clock.monotonic(), self._interval
            try:
                self.poll()
            except StoreUnavailable as error:
                if not self._failing:
                    logger.warning("the key store cannot be watched, so uncached answers are due: %s", error)
                self._failing = True
                pause = min(pause, retry)
                retry = min(retry * 2, LAST_RETRY)
            else:
                if self._failing:
                    logger.warning("the key store can be watched again")
                self._failing = False
                retry = FIRST_RETRY
            left = begun + pause - self._clock.monotonic()
            self._feed.wait(max(left, min(pause, FIRST_RETRY)))
