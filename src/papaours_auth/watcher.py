"""The watcher: one thread that reads the change feed and keeps the cache's trust alive.

Thread: a daemon, started with the app, or else by the first uncached call or look at its readiness, whatever the
store says. Fork: the child has none, and starts its own likewise.
Signals and exit: it holds nothing that needs saving. A store that cannot answer: it logs once, tries on, and
trust runs out by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from ._locks import WaitingLock
from .cache import Cache, Clock
from .exceptions import ConfigurationError, Overloaded, StoreUnavailable
from .stores import Feed

logger = logging.getLogger("papaours_auth")

FIRST_RETRY: Final = 0.05
"""Seconds from a reading that failed to the next one, doubled with each further failure."""
LAST_RETRY: Final = 0.25
"""Seconds that grows to at most, so that recovery is noticed within a second, whatever ``max_staleness``."""
SILENT: Final = 0.25
"""Seconds after which a reading that has not come back says that the store is silent."""


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
        self._asked: float | None = None  # when the reading under way was sent
        self._thread: threading.Thread | None = None
        self.alive = False
        """Whether the thread runs. Not `Thread.is_alive`: each uncached call looks, and that takes 0.6 µs."""
        self.first: Future[None] = Future()
        """Ends with the thread's first reading. Raises what that raised."""
        self.on_success: list[Callable[[], None]] = []
        self.on_failure: list[Callable[[], None]] = []

    def start(self) -> None:
        """Start the thread, unless it runs. One caller at a time.

        Raises `Overloaded` where the machine gives no more threads: the next caller tries again.
        """
        if self.alive:
            return
        thread = threading.Thread(target=self._live, name="papaours-auth-watcher", daemon=True)
        self.alive, self.first = True, Future()
        try:
            thread.start()
        except RuntimeError as error:
            self.alive = False
            self.first.set_exception(StoreUnavailable("the store's watcher has not started"))
            raise Overloaded(f"the store's watcher cannot be started: {error}") from None
        self._thread = thread

    def poll(self) -> None:
        """Read the feed once and apply it. Raises `StoreUnavailable`; trust is then left to run out."""
        with self._polling:
            sent = self._clock.monotonic()  # before the clocks are compared: trust speaks of both
            self._cache.check_clock()
            self._asked = sent
            try:
                reading = self._feed.read(self._cache.epochs)
            finally:
                self._asked = None
            self._cache.apply(reading, sent=sent)

    def hears_nothing(self) -> bool:
        """Whether the last reading failed, or the one under way has been for some time."""
        asked = self._asked
        return self._failing or (asked is not None and self._clock.monotonic() - asked >= SILENT)

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
            if not self.first.done():
                self.first.set_exception(StoreUnavailable("the store's watcher has ended"))

    def _run(self) -> None:
        retry = FIRST_RETRY
        while not self._stopping.is_set():
            begun, pause = self._clock.monotonic(), self._interval
            try:
                self.poll()
            except (StoreUnavailable, ConfigurationError) as error:  # of another schema: it may be restored
                if not self._failing:
                    logger.warning("the key store cannot be watched, so uncached answers are due: %s", error)
                self._failing = True
                if not self.first.done():
                    self.first.set_exception(StoreUnavailable(str(error)))
                for listener in self.on_failure:
                    listener()
                pause = min(pause, retry)
                retry = min(retry * 2, LAST_RETRY)
            else:
                if self._failing:
                    logger.warning("the key store can be watched again")
                self._failing = False
                for listener in self.on_success:
                    listener()
                if not self.first.done():
                    self.first.set_result(None)
                retry = FIRST_RETRY
            left = begun + pause - self._clock.monotonic()
            self._feed.wait(max(left, min(pause, FIRST_RETRY)))
