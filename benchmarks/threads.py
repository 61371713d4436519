"""Contention of 1 to 8 threads over one authenticator, and how long verification holds an event loop.

CPython's lock lets one thread run: the rate is to stay, not to grow.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from hashlib import blake2b
from typing import Final

from papaours_auth import AsyncAuthenticator, Authenticator, open_async_store

from .harness import Result, compared, percentile
from .subjects import TRUST, new_peppers, one_key, place

THREADS: Final = (1, 2, 4, 8)
CALLS: Final = 40_000
STALL: Final = 1.0
"""Milliseconds."""


def run(scale: float = 1.0) -> Result:
    result = Result("threads", "Contention of threads, and stalls of an event loop")
    peppers, store = new_peppers(), open_async_store("memory://")
    key = one_key(store.sync, peppers)[0].encode()
    with Authenticator(store.sync, environment="prod", peppers=peppers, max_staleness=TRUST) as door:
        door.authenticate(key)
        rounds, calls = max(2, int(20 * scale)), max(80, int(CALLS * scale**0.5))
        found: dict[int, list[float]] = {count: [] for count in THREADS}
        for _ in range(rounds):
            for count in THREADS:
                found[count].append(together(door, key, count, calls))
    result.add("1 thread", percentile(found[1], 0.5), "ns a call")
    for count in THREADS[1:]:
        result.add(f"{count} threads: time of a call / 1 thread's", **compared(found[count], found[1]))
    asyncio.run(_stalls(result, scale))
    return result


def together(door: Authenticator, key: bytes, count: int, calls: int) -> float:
    """Give the nanoseconds a call took when so many threads shared the calls."""
    barrier = threading.Barrier(count + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(calls // count):
            door.authenticate(key)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    begin = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    return (time.perf_counter_ns() - begin) / (calls // count * count)


async def _stalls(result: Result, scale: float) -> None:
    """Time the turns of a loop that verifies uncached keys on SQLite, of an idle one, and of a busy one."""
    with place("sqlite") as there:
        keys = [one_key(there.url, there.peppers)[0].encode() for _ in range(2)]
        async with AsyncAuthenticator(
            there.url, environment="prod", peppers=there.peppers, max_staleness=2.0, max_known=1
        ) as door:
            await door.authenticate(keys[0])
            works: dict[str, _Work | None] = {
                "idle": None,
                "busy": _spin,
                "verifying": lambda done: _verify(door, keys, done),
            }
            found: dict[str, list[float]] = {name: [] for name in works}
            count = max(50, int(10_000 * scale))
            for _ in range(2):
                for name, work in works.items():
                    found[name] += await _beside(work, count // 2)
    idle, busy, verifying = (percentile(gaps, 0.999) for gaps in found.values())
    result.add("idle loop: longest turn, p99.9", idle, "ms", note="the machine's own noise")
    result.add("loop that is busy without us (control): p99.9", busy, "ms", note="and what it makes of work")
    result.add(
        "loop that verifies uncached keys on SQLite: p99.9",
        verifying,
        "ms",
        goal=STALL,
        reason=f"a loop as busy without us has {busy:.2g} ms on this machine meanwhile",
    )


_Work = Callable[[asyncio.Event], Coroutine[None, None, None]]


async def _beside(work: _Work | None, count: int) -> list[float]:
    """Time the loop's turns while a task works in it."""
    done = asyncio.Event()
    working = asyncio.create_task(work(done)) if work is not None else None
    gaps = await _gaps(count)
    if working is not None:
        done.set()
        await working
    return gaps


async def _spin(done: asyncio.Event) -> None:
    """Keep the loop as busy as a verification does, in steps of some 20 µs."""
    while not done.is_set():
        for _ in range(30):
            blake2b(b"x" * 44, digest_size=32).digest()
        await asyncio.sleep(0)


async def _verify(door: AsyncAuthenticator, keys: list[bytes], done: asyncio.Event) -> None:
    # Not cancelled: `asyncio.wait_for` before Python 3.12 can swallow a cancellation, and this would go on.
    while not done.is_set():
        for key in keys:
            await door.authenticate(key)


async def _gaps(count: int) -> list[float]:
    """Give the milliseconds of so many turns of the loop."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        await asyncio.sleep(0)
        found.append((time.perf_counter() - begin) * 1000)
    return found
