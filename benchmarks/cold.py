"""Uncached verification by store and by the number of keys in it: whole calls, uniform random keys, warm pages.

The sizes of a store are asked in turn, in one process. On Redis a bare GET of redis-py, the client that the store
uses, takes its turn too.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import redis
import redis.asyncio

from papaours_auth import AsyncAuthenticator, Authenticator, KeyFormat, open_async_store, open_store
from papaours_auth.stores import Store
from papaours_auth.verify import Claim, read

from .harness import Result, compared, installed, interleave, looped, percentile
from .plots import Plot
from .subjects import TRUST, left_out_stores, shared_stores

from . import filled  # isort: skip - `subjects` makes `support` importable
from .filled import Filled
from .roundtrips import Counting

GOAL: Final = 1.5
REDIS_GOAL: Final = 1.3
SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
HUGE: Final = 10_000_000
HUGE_BYTES: Final = 12 << 30  # free on the disk: the file is a third, the rest is what sorting takes
ASKED: Final = 200  # keys a round
FILLERS: Final[dict[str, Callable[[ExitStack, Sequence[int]], dict[int, Filled]]]] = {
    "sqlite": filled.sqlite,
    "redis": filled.redis_prefixes,
    "postgresql": filled.postgresql_databases,
    "mariadb": filled.mariadb_databases,
}
NAMES: Final = {"sqlite": "SQLite", "redis": "Redis", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}


def run(scale: float = 1.0) -> Result:
    result = Result("cold", "Uncached verification by store, and by the number of keys in it")
    curves: dict[str, list[tuple[float, float]]] = {}
    for store in shared_stores():
        with ExitStack() as stack:
            there = FILLERS[store](stack, sizes(store, scale, result))
            curves[NAMES[store]] = _measure(result, stack, store, there, turns=max(2, int(40 * scale)))
            if store == "redis":
                _against_get(
                    result, there[10_000 if 10_000 in there else min(there)], rounds=int(600 * scale)
                )
    result.add("in the cache", _cached_bytes(), "bytes/key")
    result.plots.append(
        Plot("cold", "Uncached verification, p50", "lines", "keys in the store", "µs", curves, log="x")
    )
    result.versions = {name: installed(name) for name in ("redis", "sqlalchemy", "psycopg", "pymysql")}
    result.left_out += left_out_stores()
    return result


def sizes(store: str, scale: float, result: Result) -> list[int]:
    """Give the numbers of keys: all at scale 1, those of a tenth at a tenth; the largest where the disk has room."""
    found = sorted({max(100, min(size, int(SIZES[-1] * scale))) for size in SIZES})
    if store == "sqlite" and scale >= 1:
        if shutil.disk_usage(tempfile.gettempdir()).free > HUGE_BYTES:
            return [*found, HUGE]
        result.left_out.append(f"SQLite with {HUGE:,} keys: the disk has no room for it")
    return found


def _measure(
    result: Result, stack: ExitStack, store: str, there: Mapping[int, Filled], *, turns: int
) -> list[tuple[float, float]]:
    """Report one store; give its curve."""
    found = rounds(stack, there, turns=turns)
    middles = {size: [percentile(times, 0.5) for times in found[size]] for size in there}
    name, curve = NAMES[store], []
    for size, times in found.items():
        every = [nanoseconds / 1000 for round_ in times for nanoseconds in round_]
        result.add(f"{name}, {size:,} keys: p50", percentile(every, 0.5), "µs")
        result.add(f"{name}, {size:,} keys: p99", percentile(every, 0.99), "µs")
        result.add(f"{name}, {size:,} keys: in store", there[size].bytes_each, "bytes/key")
        curve.append((float(size), percentile(every, 0.5)))
    few = min(there)
    for many in [size for size in there if size >= 1_000_000] or [max(there)]:
        goal = GOAL if store in ("sqlite", "postgresql") and many <= SIZES[-1] else None
        result.add(
            f"{name}, {many:,} / {few:,} keys: p50", **compared(middles[many], middles[few]), goal=goal
        )
    result.add(f"{name}: round trips a verification", round_trips(there[few]), "", note=_trips_note(store))
    return curve


def _trips_note(store: str) -> str:
    return "the file is read in the process" if store == "sqlite" else ""


def rounds(stack: ExitStack, there: Mapping[int, Filled], *, turns: int) -> dict[int, list[list[int]]]:
    """Give the nanoseconds of each call of each turn; the sizes take turns."""
    doors = {size: stack.enter_context(uncaching(store, store.url)) for size, store in there.items()}
    found: dict[int, list[list[int]]] = {size: [] for size in there}
    for turn in range(turns + 1):
        for size, door in doors.items():
            keys = there[size].keys
            times = _timed(door, keys if turn == 0 else random.choices(keys, k=ASKED))
            if turn:  # the first one warms the pages
                found[size].append(times)
    return found


def uncaching(store: Filled, url: str) -> Authenticator:
    return Authenticator(url, environment="prod", peppers=store.peppers, max_staleness=TRUST, max_known=1)


def _timed(door: Authenticator, sample: Sequence[bytes]) -> list[int]:
    times = []
    for key in sample:
        begin = time.perf_counter_ns()
        door.authenticate(key)
        times.append(time.perf_counter_ns() - begin)
    return times


def round_trips(store: Filled) -> float:
    """Count how often a verification waits for the server; an SQLite file is none.

    Only the busiest connection counts: a watcher that polls has one of its own.
    """
    if not store.port:
        return 0.0
    with Counting(store.port) as proxy:
        url = store.url.replace(f":{store.port}/", f":{proxy.port}/")
        with uncaching(store, url) as door:
            for key in store.keys[:10]:  # connected, prepared
                door.authenticate(key)
            before = proxy.turns.copy()
            for key in store.keys[10:60]:
                door.authenticate(key)
            return max((proxy.turns - before).values()) / 50


# Redis against a bare GET


def _against_get(result: Result, there: Filled, *, rounds: int) -> None:
    """Compare whole calls with keys that were never asked for, so that nothing is cached nor evicted."""
    rounds = max(2, rounds)
    count = min(10, len(there.keys) // (rounds + 1))
    store = open_store(there.url)
    claims = [_claim(store, there, text) for text in there.keys]
    each, text = itertools.cycle(claims), itertools.cycle(there.keys)
    options: Any = {"environment": "prod", "peppers": there.peppers, "max_staleness": TRUST}
    with redis.Redis(port=there.port) as client, Authenticator(there.url, **options) as door:
        client.set("bare", b"x" * 300)  # as long as a packed key
        door.start()
        loops = {
            "a bare GET": looped(client.get, "bare"),
            "a bare GET again (control)": looped(client.get, "bare"),
            "the lookup alone": looped(lambda: store.lookup(next(each))),
            "uncached verification": looped(lambda: door.authenticate(next(text))),
        }
        _report_get(result, "Redis", interleave(loops, rounds=rounds, count=count))
    store.close()
    asyncio.run(_against_get_async(result, there, claims, options, rounds=rounds, count=count))


def _claim(store: Store, there: Filled, text: bytes) -> Claim:
    description = store.describe()
    ring = there.peppers.bound_to(description.installation, {p.id: p[1:] for p in description.peppers})
    claim = read(text, format=KeyFormat(), peppers=ring)
    if not isinstance(claim, Claim):
        raise RuntimeError("a key of ours is refused by its text")  # noqa: TRY004 - it is no matter of types
    return claim


async def _against_get_async(
    result: Result,
    there: Filled,
    claims: Sequence[Claim],
    options: Any,
    *,
    rounds: int,
    count: int,
) -> None:
    client = redis.asyncio.Redis(port=there.port)
    store = open_async_store(there.url)
    each, text = itertools.cycle(claims), itertools.cycle(there.keys)
    async with AsyncAuthenticator(store, **options) as door:
        await door.start()
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "a bare GET": lambda: client.get("bare"),
            "the lookup alone": lambda: store.lookup(next(each)),
            "uncached verification": lambda: door.authenticate(next(text)),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, call in calls.items():
                taken = await _awaited(call, count)
                if turn:
                    found[name].append(taken)
    _report_get(result, "Redis, asyncio", found)
    await store.aclose()
    await client.aclose()


async def _awaited(call: Callable[[], Awaitable[object]], count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        await call()
    return (time.perf_counter_ns() - begin) / count


def _report_get(result: Result, kind: str, found: Mapping[str, Sequence[float]]) -> None:
    bare, lookup, whole = (
        statistics.median(found[name]) / 1000
        for name in ("a bare GET", "the lookup alone", "uncached verification")
    )
    reason = (
        f"it makes one round trip, and the lookup alone takes {lookup / bare:.2f} of a GET's {bare:.0f} µs; reading, "
        f"digesting, judging and remembering the key take {whole - lookup:.0f} µs of Python, which weigh less the "
        "further away the server is"
    )
    for name in list(found)[1:]:
        judged = name == "uncached verification" and kind == "Redis"
        result.add(
            f"{kind}: {name} / a bare GET",
            **compared(found[name], found["a bare GET"]),
            goal=REDIS_GOAL if judged else None,
            reason=reason if judged else "",
        )
    result.add(f"{kind}: a bare GET", bare, "µs")
    result.add(f"{kind}: what verification adds to the lookup", whole - lookup, "µs")


def _cached_bytes() -> float:
    """Weigh the cache by what its entries allocate, all told."""
    with ExitStack() as stack:
        there = filled.sqlite(stack, [1_000])[1_000]
        door = stack.enter_context(
            Authenticator(there.url, environment="prod", peppers=there.peppers, max_staleness=TRUST)
        )
        door.authenticate(there.keys[0])
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for key in there.keys[1:]:
            door.authenticate(key)
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return (after - before) / (len(there.keys) - 1)
