"""Where a throttle counts for all processes: in Redis, one server, a Cluster, or what Sentinels name.

Over the key store's connections, not `limits`' own: redis-py's clients try for seconds, and its Cluster's connects
when it is made.
"""

from __future__ import annotations

from binascii import crc32
from pathlib import Path
from typing import Final

from limits import RateLimitItem

from .stores.redis_place import place_of
from .stores.redis_router import Command, Router, Steps, known
from .stores.redis_wire import Wire

_PATIENCE: Final = 0.2
"""Seconds to connect, and again for an answer, where the URL's timeout is not shorter."""
_PARTS: Final = 16  # hash tags: networks are counted on all nodes of a Cluster
_SCRIPT: Final = known(Path(__file__).with_name("throttle_count.lua"))


class RedisLimiter:
    """A limit, counted in Redis. Threads may share it, and it crosses a fork. Raises `ConfigurationError`."""

    def __init__(self, item: RateLimitItem, url: str) -> None:
        place = place_of(url)
        self._item = item
        self._prefix = place.prefix
        self._router = Router(place, [str(part) for part in range(_PARTS)])
        self._wire = Wire(place, self._router, timeout=min(place.timeout, _PATIENCE))
        self.window = item.get_expiry()

    def hit(self, name: str) -> float:
        """See `Limiter.hit`. Raises `StoreUnavailable`."""
        return self._wire.drive(self._count(name))

    def _count(self, name: str) -> Steps[float]:
        part = crc32(name.encode()) % _PARTS
        key = f"{self._prefix}:throttle:{{{part}}}:{self._item.key_for(name)}"
        command: Command = ("EVALSHA", _SCRIPT, 1, key, self.window)
        ((count, left),) = yield from self._router.run(part, command, write=True)
        return 0.0 if count <= self._item.amount else float(min(max(left, 1), self.window))
