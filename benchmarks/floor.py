"""Cached verification against the floor: one keyed BLAKE2b, one `dict.get`, one `compare_digest`, in one function."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from hashlib import blake2b
from hmac import compare_digest
from typing import Final

from papaours_auth import AsyncAuthenticator, Authenticator, open_async_store

from .harness import Loop, Result, compared, interleave, looped
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
        found = interleave(subjects, rounds=max(4, int(300 * scale)), count=max(20, int(2000 * scale**0.5)))
    asyncio.run(awaiting.aclose())
    for name in list(subjects)[1:]:
        goal = GOAL if name == "Authenticator.authenticate" else None
        result.add(f"{name} / the floor", **compared(found[name], found["the floor"]), goal=goal)
    result.times(found)
    if count_instructions:
        _add_instructions(result)
    return result


def _add_instructions(result: Result) -> None:
    from . import instructions  # it counts this module's floor

    ours, bottom = instructions.counted("authenticate", "floor")
    if ours is None or bottom is None:
        result.left_out.append("instruction counts: valgrind is not installed, or cannot run this Python")
        return
    result.add("instructions: authenticate / the floor (callgrind)", ours / bottom, goal=GOAL)
    result.add("instructions: authenticate (callgrind)", ours, "instructions")
    result.add("instructions: the floor (callgrind)", bottom, "instructions")


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
