"""Throttling: a network that keeps presenting bad keys is told to wait (429), whoever presents a valid one is let in.

It is consulted once a key has been refused, and only turns that refusal into another: by construction it cannot lock
out a valid key, and costs a call that is let in nothing. `docs/design/throttle.md` says why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

from ._fork import hold_across_fork, notice_fork
from ._threads import Threads
from .cache import Clock
from .exceptions import ConfigurationError, Reason, Refused
from .usage.event import network_of

logger = logging.getLogger("papaours_auth")

COUNTED: Final = frozenset(
    {
        Reason.MALFORMED_KEY,
        Reason.UNKNOWN_KEY,
        Reason.WRONG_ENVIRONMENT,
        Reason.KEY_INACTIVE,
        Reason.KEY_EXPIRED,
        Reason.MACHINE_INACTIVE,
    }
)
"""What counts as a failure: a key was presented, and it is not valid.

Not a missing key, which guesses nothing (a browser, a health check); nor an ambiguous request, which is not judged;
nor a valid key without the right or from a wrong network; nor an outage, which is ours.
"""
REST: Final = "other"
"""All networks beyond ``max_networks``, counted as one."""
_PAUSE: Final = 5.0  # seconds for which a storage that did not answer is not asked
_network_of: Final = lru_cache(1_024)(network_of)  # who fails comes again: 8 µs less of 11
_ASKERS: Final = 8  # calls that may wait for it at once: others do without


@dataclass(slots=True)
class _Network:
    """Until when (monotonic seconds) it is remembered, and until when it is over its limit."""

    ends: float
    blocked_until: float = 0.0


class Throttle:
    """So many failures for each network (/24, /48), then 429 with ``Retry-After`` until the window has passed.

    - ``limit``: as in ``"30/minute"``, ``"100 per 5 minutes"``. The window begins with a network's first failure.
    - ``storage``: ``"memory://"``, where each process counts for itself, or the URL of a Redis, as for the key store
      (Cluster and Sentinel too), where all count together. While that cannot be asked, failures pass uncounted.
    - ``max_networks``: how many are told apart in a window; those beyond share one count.

    May be shared by apps, threads and event loops, and crosses a fork. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        limit: str = "30/minute",
        *,
        storage: str = "memory://",
        max_networks: int = 10_000,
        clock: Clock = time,
    ) -> None:
        from .throttle_storage import open_limiter  # `limits` is loaded by those who throttle

        if max_networks < 1:
            raise ConfigurationError("max_networks of a Throttle must be above 0")
        self._limiter = open_limiter(limit, storage, clock)
        self._remote = storage != "memory://"
        self._max_networks = max_networks
        self._monotonic = clock.monotonic
        self._networks: OrderedDict[str, _Network] = OrderedDict()  # the first to end comes first
        self._rest = _Network(math.inf)
        self._threads = Threads(_ASKERS, name="papaours-throttle")
        self._ask_again = 0.0
        self._failing = False
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()  # never held across I/O
        self._askers = threading.Semaphore(_ASKERS)

    def judge(self, refused: Refused, client: str | None) -> Refused:
        """Count a refusal, and give it back, or `too_many_failures` in its place. Never raises."""
        if refused.reason not in COUNTED:
            return refused
        name, wait = self._look(client)
        return _verdict(refused, wait or self._count(name))

    async def ajudge(self, refused: Refused, client: str | None) -> Refused:
        """See `judge`. A storage elsewhere is waited for in a thread of the throttle's own."""
        if refused.reason not in COUNTED:
            return refused
        name, wait = self._look(client)
        if not wait:
            wait = await self._acount(name) if self._remote else self._count(name)
        return _verdict(refused, wait)

    def _look(self, client: str | None) -> tuple[str, float]:
        """Give the name a client's failures are counted by, and for how long (seconds) it is known to be blocked."""
        notice_fork()
        network, now = _network_of(client), self._monotonic()
        with self._lock:
            self._forget(now)
            if network not in self._networks and len(self._networks) < self._max_networks:
                self._networks[network] = _Network(now + self._limiter.window)
            known = self._networks.get(network)
            name, known = (network, known) if known is not None else (REST, self._rest)
            return name, max(known.blocked_until - now, 0.0)

    def _forget(self, now: float) -> None:
        while self._networks and next(iter(self._networks.values())).ends <= now:
            self._networks.popitem(last=False)

    def _count(self, name: str) -> float:
        """Count one failure; give for how long (seconds) the network is blocked, 0 where it is not."""
        if self._remote:
            wait = self._ask(name)
        else:
            with self._lock:
                wait = self._limiter.hit(name)
        if wait:
            with self._lock:
                known = self._rest if name == REST else self._networks.get(name)
                if known is not None:
                    known.blocked_until = self._monotonic() + wait
        return wait

    async def _acount(self, name: str) -> float:
        asked = (
            self._threads.ask(partial(self._count, name)) if self._monotonic() >= self._ask_again else None
        )
        return 0.0 if asked is None else await asyncio.wrap_future(asked)

    def _ask(self, name: str) -> float:
        """Count in a storage elsewhere: with a bound on the time, and on who waits for it."""
        if self._monotonic() < self._ask_again or not self._askers.acquire(blocking=False):
            return 0.0
        try:
            wait = self._limiter.hit(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, the call has its answer already
            self._failed(error)
            return 0.0
        finally:
            self._askers.release()
        if self._failing:
            self._failing = False
            logger.warning("the throttle's storage answers again")
        return wait

    def _failed(self, error: Exception) -> None:
        self._ask_again = self._monotonic() + _PAUSE
        if not self._failing:
            self._failing = True
            # Not its words: they may hold the URL.
            logger.warning(
                "the throttle's storage cannot be asked (%s): failures pass uncounted until it can",
                type(error).__name__,
            )

    def before_fork(self) -> None:
        """Hold the counts still."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on, each for itself; who waited in the parent does not wait in a child."""
        if child:
            self._reset()
        else:
            self._lock.release()


def _verdict(refused: Refused, wait: float) -> Refused:
    if not wait:
        return refused
    return Refused(Reason.TOO_MANY_FAILURES, known=refused.known, retry_after=math.ceil(wait))
