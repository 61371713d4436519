"""Cached verification against the floor: one keyed BLAKE2b, one `dict.get`, one `compare_digest`, in one function."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from hashlib import blake2b
from hmac import compare_digest
from timeit import Timer
from typing import Final

from papaours_auth import AsyncAuthenticator, Authenticator, open_async_store

from .harness import Loop, Result, compared, interleave, looped
from .plots import Plot
from .subjects import TRUST, new_peppers, one_key

GOAL: Final = 1.25


def run(scale: float = 1.0, *, count_instructions: bool = True) -> Result:
    result = Result("floor", "Cached verification against the floor (keyed hash + dict.get + compare_digest)")
    peppers, store = new_peppers(), open_async_store("memory://")
    key = one_key(store.sync, peppers)[0].encode()
    awaiting = AsyncAuthenticator(store, environment="prod", peppers=peppers, max_staleness=TRUST)
    with Authenticator(store.sync, environment="prod", peppers=peppers, max_staleness=TRUST) as authenticator:
        authenticator.authenticate(key)
        subjects = {
            "the floor": looped(floor(key), key),
            "the floor again (control)": looped(floor(key), key),
            "the floor, hash state copied": looped(copied_floor(key), key),
            "Authenticator.authenticate": looped(authenticator.authenticate, key),
            "Authenticator.cached": looped(authenticator.cached, key),
            "await AsyncAuthenticator.authenticate": awaited(awaiting, key),
        }
        found = interleave(subjects, rounds=max(4, int(600 * scale)), count=1000)
    asyncio.run(awaiting.aclose())
    for name in list(subjects)[1:]:
        goal = GOAL if name == "Authenticator.authenticate" else None
        result.add(f"{name} / the floor", **compared(found[name], found["the floor"]), goal=goal)
    result.times(found)
    _breakdown(result, found, scale)
    if count_instructions:
        _add_instructions(result)
    return result


def _add_instructions(result: Result) -> None:
    from . import instructions  # it counts this module's floor

    found = instructions.counted("authenticate", "floor")
    ours, bottom = found["authenticate"], found["floor"]
    if ours is None or bottom is None:
        result.left_out.append(instructions.ABSENT)
        return
    result.add("instructions: authenticate / the floor (callgrind)", ours / bottom, goal=GOAL)
    result.add("instructions: authenticate (callgrind)", ours, "instructions")
    result.add("instructions: the floor (callgrind)", bottom, "instructions")


PIECES: Final = {
    "keyed BLAKE2b, made anew": "blake2b(key, digest_size=32, key=hash_key).digest()",
    "keyed BLAKE2b, state copied": "hashed = keyed_hash(); hashed.update(key); hashed.digest()",
    "dict.get": "get(digest)",
    "compare_digest": "compare_digest(digest, digest)",
    "reading the clock": "monotonic()",
    "a call and its return": "call(key)",
}


def pieces(*, rounds: int, count: int) -> dict[str, float]:
    """Give the nanoseconds of each thing that a hit cannot do without, less those of the loop."""
    hash_key, key = secrets.token_bytes(32), b"pk_prod_" + b"x" * 36
    keyed_hash = blake2b(digest_size=32, key=hash_key).copy
    names = {
        "blake2b": blake2b, "keyed_hash": keyed_hash, "hash_key": hash_key, "key": key, "digest": hash_key,
        "get": {hash_key: 1}.get, "compare_digest": compare_digest, "monotonic": time.monotonic,
        "call": lambda presented: presented,
    }  # fmt: skip
    timers = {name: Timer(code, globals=names) for name, code in {"": "pass", **PIECES}.items()}
    best = {name: min(timer.repeat(rounds, count)) / count * 1e9 for name, timer in timers.items()}
    return {name: max(0.0, nanoseconds - best[""]) for name, nanoseconds in best.items() if name}


def _breakdown(result: Result, found: dict[str, list[float]], scale: float) -> None:
    made = pieces(rounds=max(3, int(20 * scale)), count=max(100, int(20_000 * scale)))
    for name, nanoseconds in made.items():
        result.add(f"piece: {name}", nanoseconds, "ns", note="the best round")
    wholes = ("the floor", "Authenticator.cached", "Authenticator.authenticate")
    bars = {**made, **{name: min(found[name]) for name in wholes}}
    series = {name: [(0.0, nanoseconds)] for name, nanoseconds in bars.items()}
    result.plots.append(
        Plot("floor", "Where the time of a cached verification goes", "bars", "ns", series=series)
    )


def floor(key: bytes) -> Callable[[bytes], object]:
    hash_key = secrets.token_bytes(32)
    digest = blake2b(key, digest_size=32, key=hash_key).digest()
    entries = {digest: (digest, object())}

    def verify(presented: bytes) -> object:
        digest = blake2b(presented, digest_size=32, key=hash_key).digest()
        entry = entries.get(digest)
        if entry is not None and compare_digest(entry[0], digest):
            return entry[1]
        return None

    return verify


def copied_floor(key: bytes) -> Callable[[bytes], object]:
    """The same with our own trick, for whoever asks what is left above it."""
    keyed_hash = blake2b(digest_size=32, key=secrets.token_bytes(32)).copy
    hashed = keyed_hash()
    hashed.update(key)
    entries = {hashed.digest(): (hashed.digest(), object())}

    def verify(presented: bytes) -> object:
        hashed = keyed_hash()
        hashed.update(presented)
        digest = hashed.digest()
        entry = entries.get(digest)
        if entry is not None and compare_digest(entry[0], digest):
            return entry[1]
        return None

    return verify


def awaited(authenticator: AsyncAuthenticator, key: bytes) -> Loop:
    """Time an awaited hit, within a loop that is there already."""

    async def rounds(count: int) -> float:
        await authenticator.authenticate(key)
        begin = time.perf_counter_ns()
        for _ in range(count):
            await authenticator.authenticate(key)
        return (time.perf_counter_ns() - begin) / count

    return lambda count: asyncio.run(rounds(count))
