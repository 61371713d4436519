"""Where a throttle counts: `limits` reads the limit, and keeps the window in memory of ours. Else in Redis."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .cache import Clock
from .exceptions import ConfigurationError

try:
    from limits import RateLimitItem, parse_many
    from limits.storage import Storage
    from limits.strategies import FixedWindowRateLimiter
except ImportError as error:
    raise ConfigurationError(
        "a throttle needs limits, which is not installed: pip install 'papaours-auth[throttle]'"
    ) from error

if TYPE_CHECKING:
    from .throttle_redis import RedisLimiter

_REDIS: Final = ("redis://", "rediss://", "redis+cluster://", "redis+sentinel://")


class Limiter:
    """A limit, and the memory it is counted in."""

    def __init__(self, item: RateLimitItem, storage: Storage, now: Callable[[], float]) -> None:
        self._item, self._storage, self._now = item, storage, now
        self._limiter = FixedWindowRateLimiter(storage)
        self.window = item.get_expiry()

    def hit(self, name: str) -> float:
        """Count one; give for how long (seconds, at most the window) the limit is exceeded, 0 where it is not."""
        if self._limiter.hit(self._item, name):
            return 0.0
        left = self._storage.get_expiry(self._item.key_for(name)) - self._now()
        return min(max(left, 1.0), float(self.window))


def open_limiter(limit: str, storage: str, clock: Clock) -> Limiter | RedisLimiter:
    """Open a limit such as ``"30/minute"`` over a storage. Raises `ConfigurationError`, which quotes no URL."""
    try:
        (item,) = parse_many(limit)  # which `parse` would take the first of
    except ValueError:
        raise ConfigurationError("a throttle's limit is written '30/minute' or '100 per 5 minutes'") from None
    if item.amount < 1:
        raise ConfigurationError("a throttle's limit must be above 0: each network may fail some times")
    if storage == "memory://":
        return Limiter(item, Windows(clock), clock.time)
    if not storage.startswith(_REDIS):
        raise ConfigurationError(
            "a throttle counts in memory:// or in Redis (redis://, rediss://, redis+cluster://, redis+sentinel://)"
        )
    from .throttle_redis import RedisLimiter  # which says what to install where redis-py is missing

    return RedisLimiter(item, storage)


class Windows(Storage):
    """Counts in this process's memory, as a storage of `limits`.

    Its own starts a thread and, under failures, a scan of all networks every 10 ms. Here windows, all equally
    long, are forgotten in the order they began. `Throttle` bounds how many there are, and lets one thread in at
    a time.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()  # end (monotonic seconds), count

    @property
    def base_exceptions(self) -> type[Exception]:
        """What it raises: nothing."""
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count, from 0 where no window is open."""
        now = self._clock.monotonic()
        while self._windows and next(iter(self._windows.values()))[0] <= now:
            self._windows.popitem(last=False)
        ends, count = self._windows.get(key, (now + expiry, 0))
        self._windows[key] = (ends, count + amount)
        return count + amount

    def get(self, key: str) -> int:
        """Give a count."""
        ends, count = self._windows.get(key, (-math.inf, 0))
        return count if self._clock.monotonic() < ends else 0

    def get_expiry(self, key: str) -> float:
        """Give when a window ends (seconds since 1970)."""
        ends, _ = self._windows.get(key, (-math.inf, 0))
        return self._clock.time() + max(ends - self._clock.monotonic(), 0.0)

    def check(self) -> bool:
        """Tell that it is there."""
        return True

    def reset(self) -> int:
        """Forget everything."""
        forgotten = len(self._windows)
        self._windows.clear()
        return forgotten

    def clear(self, key: str) -> None:
        """Forget one."""
        self._windows.pop(key, None)
