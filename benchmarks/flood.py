"""A flood of distinct forged keys: what it costs the store, the memory, and the clients with valid keys.

The effect on valid clients is measured in open loop, at one process that serves in order of arrival: requests
come at times drawn beforehand, and a latency runs from that time on, so a request that waits for a forged one
counts its waiting. A request is the ASGI middleware around an app that works for `WORK` seconds, as one that
answers from a template or a database driver does.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from papaours_auth import AsyncAuthenticator, Authenticator, KeyFormat, PepperRing, Refused, open_async_store
from papaours_auth.asgi import PapaoursAuthMiddleware, Receive, Scope, Send
from papaours_auth.stores import Found, Store
from papaours_auth.verify import Claim

from .harness import Result, percentile, quartiles
from .middleware import fill
from .subjects import TRUST, new_peppers, one_key

FORGED: Final = 1_000_000
BATCH: Final = 10_000
FOREIGN: Final = 50_000
GOAL: Final = 1.2
SHARE: Final = 0.1
"""Forged keys come at this share of what the process can refuse."""
WORK: Final = 200e-6
VALID_EACH: Final = 1e-3  # seconds between two valid requests, on average


class Counting:
    """A store that counts its lookups."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lookups = 0

    def lookup(self, claim: Claim) -> Found:
        self.lookups += 1
        return self._store.lookup(claim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def forged() -> bytes:
    """Make a key of our format with a right checksum, by someone who has no pepper."""
    return KeyFormat().mint("prod", tag=lambda _: secrets.randbits(32)).reveal().encode()


def foreign() -> bytes:
    return f"pk_prod_{secrets.token_hex(10)}".encode()


def run(scale: float = 1.0) -> Result:
    result = Result("flood", "A flood of distinct forged keys")
    peppers, store = new_peppers(), open_async_store("memory://")
    valid = one_key(store.sync, peppers)[0]
    count = max(100, int(FORGED * min(1.0, scale)))
    _flood(result, f"{count:,} forged in our format", forged, count, store.sync, peppers, valid)
    _flood(result, "foreign", foreign, max(100, int(FOREIGN * min(1.0, scale))), store.sync, peppers, valid)
    asyncio.run(_bystanders(result, store, peppers, valid, turns=max(2, int(20 * scale))))
    return result


def _flood(
    result: Result,
    what: str,
    make: Callable[[], bytes],
    count: int,
    store: Store,
    peppers: PepperRing,
    valid: str,
) -> None:
    """Refuse so many keys."""
    counting = Counting(store)
    options: Any = {"environment": "prod", "peppers": peppers, "max_staleness": TRUST}
    with Authenticator(cast("Store", counting), **options) as authenticator:
        authenticator.authenticate(valid)
        spent, memory = 0, 0.0
        asked = counting.lookups
        for done in range(0, count, BATCH):
            keys = [make() for _ in range(min(BATCH, count - done))]
            begin = time.perf_counter_ns()
            _refuse(authenticator, keys)
            spent += time.perf_counter_ns() - begin
            if done == BATCH:
                memory = resident()  # what the bounded negative cache may hold is there by now
        reads = counting.lookups - asked
        still = authenticator.cached(valid.encode()) is not None
    result.add(f"{what}: store reads", reads, "reads", goal=0 if make is forged else None)
    result.add(f"{what}: refused", count / spent * 1e9, "keys/s")
    if memory:
        result.add(f"{what}: memory grown after the first 20,000", resident() - memory, "MiB", goal=4)
    result.add(f"{what}: a valid key is still in the cache", float(still), "", goal=1, at_most=False)


def _refuse(authenticator: Authenticator, keys: list[bytes]) -> None:
    for key in keys:
        try:
            authenticator.authenticate(key)
        except Refused:
            continue
        raise RuntimeError("a forged key came in")


def resident() -> float:
    """Give the resident memory of this process in MiB (Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


async def _bystanders(result: Result, store: Any, peppers: PepperRing, valid: str, *, turns: int) -> None:
    authenticator = AsyncAuthenticator(store, environment="prod", peppers=peppers, max_staleness=TRUST)
    await fill(authenticator, valid)
    app = PapaoursAuthMiddleware(_working, authenticator=authenticator)
    quiet: list[float] = []
    loud: list[float] = []
    refusals = 1 / await _seconds_each(app, [forged() for _ in range(2000)])
    for turn in range(turns):
        pair = [(quiet, 0.0), (loud, refusals * SHARE)]
        for latencies, each_second in pair if turn % 2 else pair[::-1]:
            latencies.append(percentile(await _open_loop(app, valid, each_second), 0.99))
    await authenticator.aclose()
    each = sorted(b / a for a, b in zip(quiet, loud, strict=True))
    result.add("capacity: requests with forged keys refused by the middleware", refusals, "a second")
    result.add("valid clients' p99, quiet", percentile(quiet, 0.5) * 1e6, "µs", spread=_micro(quiet))
    result.add("valid clients' p99, flooded at 10 %", percentile(loud, 0.5) * 1e6, "µs", spread=_micro(loud))
    result.add(
        "valid clients' p99, flooded / quiet", percentile(each, 0.5), spread=quartiles(each), goal=GOAL
    )


def _micro(values: list[float]) -> tuple[float, float]:
    lower, upper = quartiles(values)
    return lower * 1e6, upper * 1e6


async def _working(scope: Scope, receive: Receive, send: Send) -> None:
    until = time.perf_counter() + WORK
    while time.perf_counter() < until:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def _serve(app: Any, key: bytes) -> None:
    async def send(message: Any) -> None:
        pass

    await app({"type": "http", "method": "GET", "path": "/", "headers": [(b"x-api-key", key)]}, None, send)


async def _seconds_each(app: Any, keys: list[bytes]) -> float:
    begin = time.perf_counter()
    for key in keys:
        await _serve(app, key)
    return (time.perf_counter() - begin) / len(keys)


async def _open_loop(app: Any, valid: str, forged_each_second: float, seconds: float = 0.4) -> list[float]:
    """Serve what arrives in order, and give the latencies of the valid requests."""
    arrivals = [(at, valid.encode(), True) for at in _times(1 / VALID_EACH, seconds)]
    arrivals += [(at, forged(), False) for at in _times(forged_each_second, seconds)]
    arrivals.sort()
    latencies = []
    begin = time.perf_counter()
    for at, key, counts in arrivals:
        while time.perf_counter() < begin + at:
            pass
        await _serve(app, key)
        if counts:
            latencies.append(time.perf_counter() - begin - at)
    return latencies


def _times(rate: float, seconds: float) -> list[float]:
    """Draw Poisson arrivals."""
    found, at = [], 0.0
    while rate and (at := at + random.expovariate(rate)) < seconds:
        found.append(at)
    return found
