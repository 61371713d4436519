"""Usage in Redis: a stream of events, counters, and each key's last use. Exactly once, bounded, forgotten in time.

All of it carries the hash tag ``{papaours:usage}``, so that it lies in one slot of a Cluster, and apart from the
keys' own partitions: a Redis user for usage can be kept from those (docs/usage.md). Writers are blocking, from the
recorder's thread; a connection is opened for each batch, so nothing crosses a fork.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

from ..exceptions import ConfigurationError, InvalidInput
from ..stores.redis_place import Place, place_of
from ..stores.redis_router import Command, Router, Steps, Word, known
from ..stores.redis_wire import AsyncWire, Wire
from .event import Event, Refusals
from .questions import LastUse
from .sinks import Batch
from .sqlite import Retention

PART: Final = 1_000
"""Events and refusals stored in one script. Redis does nothing else meanwhile: some 10 ms."""
_PATIENCE: Final = (
    5.0  # seconds for an answer, where the URL's timeout is not longer: nobody waits for this thread
)
_SCRIPT: Final = known(Path(__file__).with_name("redis_batch.lua"))
_SECOND: Final = 1_000_000
_DAY: Final = 86_400
_STEPS: Final[Mapping[str, int]] = {"minute": 60, "hour": 3_600, "day": _DAY}
_MARKS_KEPT: Final = 90 * _DAY
_KEYS_KEPT: Final = 3 * 365 * _DAY
_LATEST: Final = 253_402_300_799 * _SECOND  # what a datetime can say, whatever a clock said
_STRUCTURES: Final = ("producers", "producers:at", "events", "keys", "keys:last")
_HERE: Final = 0  # the one partition there is

_Count: TypeAlias = tuple[str, int, int, str]  # hash, start and seconds kept, field


class _Layout:
    """What each structure is called, and which node has it."""

    def __init__(self, place: Place) -> None:
        tag = f"{place.prefix}:usage"
        self.router = Router(place, [tag])
        self._start = f"{{{tag}}}:"

    def name(self, structure: str) -> str:
        return self._start + structure


class RedisSink:
    """Keeps events in Redis. ``url`` as for the key store (``redis://``, ``rediss://``, ``redis+cluster://``, …).

    ``max_events`` bounds the stream beside ``retention.events``; ``max_fields`` each hash of counts: what is
    beyond is counted as ``other``. Raises `ConfigurationError`; `write` raises `StoreUnavailable`.
    """

    def __init__(
        self,
        url: str,
        *,
        retention: Retention = Retention(),  # noqa: B008 - immutable
        max_events: int = 1_000_000,
        max_fields: int = 10_000,
    ) -> None:
        if max_events < 1 or max_fields < 1:
            raise ConfigurationError("max_events and max_fields of a RedisSink must be above 0")
        place = place_of(url)
        self._layout = _Layout(place)
        self._wire = Wire(place, self._layout.router, timeout=max(place.timeout, _PATIENCE))
        self._retention = retention
        events_kept = int(retention.events * _DAY)
        self._bounds = (_MARKS_KEPT, _KEYS_KEPT, events_kept, max_events, max_fields)

    def write(self, batch: Batch) -> None:
        """Store a batch, from where an earlier delivery of it was broken off."""
        items: list[Event | Refusals] = [*batch.events, *batch.refusals]
        place = 0
        try:
            while 0 <= place < len(items):
                place = self._wire.drive(self._store(batch, items[place : place + PART], place))
        finally:
            self._wire.discard()

    def _store(self, batch: Batch, items: Sequence[Event | Refusals], place: int) -> Steps[int]:
        """Store a part of a batch. Gives how much of it is stored by now, -1 where a later one is."""
        events = [item for item in items if isinstance(item, Event)]
        counts = self._counts(events, [item for item in items if isinstance(item, Refusals)])
        names = [*map(self._layout.name, _STRUCTURES), *dict.fromkeys(name for name, *_ in counts)]
        places = {name: number for number, name in enumerate(names, 1)}
        words: list[Word] = [batch.producer, batch.sequence, place, len(items), *self._bounds]
        words += [len(Event._fields), *Event._fields]
        words += _rows(events)
        words += _rows(
            [(places[name], start, kept, field, n) for (name, start, kept, field), n in counts.items()]
        )
        words += _rows([(key, *use) for key, use in _keys(events).items()])
        command: Command = ("EVALSHA", _SCRIPT, len(names), *names, *words)
        (reply,) = yield from self._layout.router.run(_HERE, command, write=True)
        return int(reply)

    def _counts(self, events: Sequence[Event], refusals: Sequence[Refusals]) -> Counter[_Count]:
        counts: Counter[_Count] = Counter()
        seen = Counter((event.time // (60 * _SECOND) * 60, event.status, event.key_id) for event in events)
        for (minute, status, key), calls in seen.items():
            for step, width in _STEPS.items():
                start, kept = minute // width * width, int(getattr(self._retention, step) * _DAY)
                counts[self._layout.name(f"{step}:{start}"), start, kept, f"{status} {key}"] += calls
        for refused in refusals:
            start, kept = refused.minute // (3_600 * _SECOND) * 3_600, int(self._retention.events * _DAY)
            name = self._layout.name(f"refusals:{start}")
            counts[name, start, kept, f"{refused.reason} {refused.network}"] += refused.calls
        return counts


def _rows(rows: Sequence[Sequence[Word]]) -> list[Word]:
    return [len(rows), *chain.from_iterable(rows)]


def _keys(events: Sequence[Event]) -> dict[str, tuple[str, int, int, int]]:
    seen: dict[str, tuple[str, int, int, int]] = {}
    for event in events:
        machine, first, last, calls = seen.get(event.key_id, (event.machine_id, event.time, event.time, 0))
        seen[event.key_id] = (machine, min(first, event.time), max(last, event.time), calls + 1)
    return seen


class _Questions:
    """What is asked, as steps for both shells."""

    def __init__(self, place: Place) -> None:
        self.layout = _Layout(place)

    def last_used(self, key_id: str) -> Steps[LastUse | None]:
        (found,) = yield from self.layout.router.run(_HERE, ("HGET", self.layout.name("keys"), key_id))
        return None if found is None else _last_use(key_id, found)

    def unused_since(self, moment: datetime, limit: int) -> Steps[list[LastUse]]:
        if moment.tzinfo is None:
            raise InvalidInput("a time without its zone could mean any of them: give one")
        before = f"({int(moment.timestamp() * _SECOND)}"
        command: Command = (
            *("ZRANGEBYSCORE", self.layout.name("keys:last"), "-inf", before),
            *("LIMIT", 0, limit),
        )
        (ids,) = yield from self.layout.router.run(_HERE, command)
        if not ids:
            return []
        (found,) = yield from self.layout.router.run(_HERE, ("HMGET", self.layout.name("keys"), *ids))
        pairs = zip(ids, found, strict=True)
        return [_last_use(key_id.decode(), packed) for key_id, packed in pairs if packed is not None]


def _last_use(key_id: str, packed: bytes) -> LastUse:
    first, last, calls, machine = packed.decode().split(" ", 3)
    return LastUse(key_id, machine, _moment(first), _moment(last), int(calls))


def _moment(microseconds: str) -> datetime:
    return datetime.fromtimestamp(min(int(microseconds), _LATEST) / _SECOND, UTC)


class RedisUsage:
    """Answers from what a `RedisSink` keeps. Raises `StoreUnavailable`; `ConfigurationError` for a wrong URL.

    Only what Redis answers at once: no history, which takes a scan of the stream (XRANGE), and no sums.
    """

    def __init__(self, url: str) -> None:
        place = place_of(url)
        self._ask = _Questions(place)
        self._wire = Wire(place, self._ask.layout.router)

    def last_used(self, key_id: str) -> LastUse | None:
        """Give a key's last use; None where it was not used in the three years that are kept."""
        return self._wire.drive(self._ask.last_used(key_id))

    def unused_since(self, moment: datetime, *, limit: int = 1_000) -> list[LastUse]:
        """List keys that were used once, but not since then, the longest unused first."""
        return self._wire.drive(self._ask.unused_since(moment, limit))

    def close(self) -> None:
        """Close its connections."""
        self._wire.close()


class AsyncRedisUsage:
    """The same for event loops. See `RedisUsage`."""

    def __init__(self, url: str) -> None:
        place = place_of(url)
        self._ask = _Questions(place)
        self._wire = AsyncWire(place, self._ask.layout.router)

    async def last_used(self, key_id: str) -> LastUse | None:
        """See `RedisUsage.last_used`."""
        return await self._wire.drive(self._ask.last_used(key_id))

    async def unused_since(self, moment: datetime, *, limit: int = 1_000) -> list[LastUse]:
        """See `RedisUsage.unused_since`."""
        return await self._wire.drive(self._ask.unused_since(moment, limit))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._wire.aclose()
