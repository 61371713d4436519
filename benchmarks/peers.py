"""The same work beside its peers: a valid key of 44 to 60 characters is presented, and who owns it comes back.

Each peer is measured by its own call, without HTTP: with the settings its documentation recommends, and with its
fastest. Nothing waits for a network; keyshield's repository is its own in-memory one, the fastest it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import statistics
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from papaours_auth import Authenticator, open_store

from .harness import Loop, Result, compared, installed, interleave, looped
from .subjects import TRUST, new_peppers, one_key, place

COMPARED: Final = (
    "keyshield", "argon2-cffi", "aiocache", "Flask-HTTPAuth", "fastapi", "djangorestframework-api-key",
    "djangorestframework", "Django",
)  # fmt: skip
KEYSHIELD_GOAL: Final = 15.0
DRF_GOAL: Final = 8.0


def run(scale: float = 1.0) -> Result:
    result = Result("peers", "The same work beside its peers")
    _cached(result, scale)
    _stored(result, scale)
    result.versions = {name: installed(name) for name in COMPARED}
    return result


def _absent(result: Result, *modules: str) -> bool:
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        result.left_out.append(f"{', '.join(absent)}: not installed (dependency group bench)")
    return bool(absent)


def _cached(result: Result, scale: float) -> None:
    """Compare what answers from memory."""
    peppers, store = new_peppers(), open_store("memory://")
    key = one_key(store, peppers)[0]
    with Authenticator(store, environment="prod", peppers=peppers, max_staleness=TRUST) as authenticator:
        authenticator.authenticate(key)
        loops = {"ours, cached": looped(authenticator.authenticate, key)}
        if not _absent(result, "keyshield", "aiocache", "argon2"):
            loops["keyshield, cached, delays off"] = keyshield_loop(cached=True, delays=False)
        if not _absent(result, "flask_httpauth"):
            loops["Flask-HTTPAuth, dict by token, not hashed"] = flask_httpauth_loop(hashed=False)
            loops["Flask-HTTPAuth, dict by SHA-256"] = flask_httpauth_loop(hashed=True)
        loops["fastapi APIKeyHeader, dict, not hashed"] = fastapi_loop(hashed=False)
        loops["fastapi APIKeyHeader, dict by SHA-256"] = fastapi_loop(hashed=True)
        found = interleave(loops, rounds=max(4, int(400 * scale)), count=50)
    for name in list(loops)[1:]:
        goal = KEYSHIELD_GOAL if name.startswith("keyshield") else None
        result.add(f"{name} / ours", **compared(found[name], found["ours, cached"]), goal=goal, at_most=False)
    result.times(found)
    if any(name.startswith("keyshield") for name in loops):
        _slow_keyshield(result, statistics.median(found["ours, cached"]), scale)


def _slow_keyshield(result: Result, ours: float, scale: float) -> None:
    """Report what takes milliseconds: too slow for rounds of hundreds."""
    for name, cached, delays in (
        ("not cached, delays off (Argon2)", False, False),
        ("cached, its default delays", True, True),
        ("not cached, its default delays", False, True),
    ):
        loop = keyshield_loop(cached=cached, delays=delays)
        times = [loop(1) for _ in range(max(2, int(10 * scale)))]
        middle = statistics.median(times)
        result.add(f"keyshield, {name}", middle / 1e6, "ms", note=f"{middle / ours:,.0f} times ours, cached")


def _waited(call: Callable[[], Awaitable[object]]) -> Loop:
    """Time an awaited call within a loop that is there already."""

    async def rounds(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            await call()
        return (time.perf_counter_ns() - begin) / count

    return lambda count: asyncio.run(rounds(count))


def keyshield_loop(*, cached: bool, delays: bool) -> Loop:
    """Time `verify_key` with its Argon2 hasher, as its quick start has it; it puts 100 to 300 ms on each answer."""
    from keyshield import ApiKeyService
    from keyshield.hasher.argon2 import Argon2ApiKeyHasher
    from keyshield.repositories.in_memory import InMemoryApiKeyRepository
    from keyshield.services.cached import CachedApiKeyService

    off: Any = {} if delays else {"min_delay": 0, "max_delay": 0}
    service = (CachedApiKeyService if cached else ApiKeyService)(
        repo=InMemoryApiKeyRepository(),
        hasher=Argon2ApiKeyHasher(pepper="a pepper for the benchmark, of no use elsewhere"),
        **off,
    )
    _, key = asyncio.run(service.create(name="Production - Banc d'essai"))
    if cached:
        asyncio.run(service.verify_key(key))
    return _waited(lambda: service.verify_key(key))


def flask_httpauth_loop(*, hashed: bool) -> Loop:
    """Time `HTTPTokenAuth.authenticate` with the dictionary of its documentation, or one by SHA-256."""
    from flask import Flask
    from flask_httpauth import HTTPTokenAuth
    from werkzeug.datastructures import Authorization

    key = "x" * 44
    auth = HTTPTokenAuth(scheme="Bearer")
    tokens = {hashlib.sha256(key.encode()).hexdigest() if hashed else key: "x"}

    def verify_token(token: str) -> str | None:
        return tokens.get(hashlib.sha256(token.encode()).hexdigest() if hashed else token)

    auth.verify_token(verify_token)
    app = Flask("peer")
    authorization = Authorization("bearer", token=key)

    def loop(count: int) -> float:
        with app.test_request_context():
            return looped(auth.authenticate, authorization, None)(count)

    return loop


def fastapi_loop(*, hashed: bool) -> Loop:
    """Time the dependency alone, without FastAPI's own work around it, and then a dictionary."""
    from fastapi.security import APIKeyHeader
    from starlette.requests import Request

    key = "x" * 44
    users = {hashlib.sha256(key.encode()).hexdigest() if hashed else key: "x"}
    header = APIKeyHeader(name="X-API-KEY")
    request = Request({"type": "http", "headers": [(b"x-api-key", key.encode())]})

    async def verify() -> str | None:
        found = await header(request) or ""
        return users.get(hashlib.sha256(found.encode()).hexdigest() if hashed else found)

    return _waited(verify)


OURS: Final = "ours, not cached, SQLite"
DRF: Final = "djangorestframework-api-key, SQLite"
OURS_BARE: Final = "SQLite alone: our statement, a warm connection of sqlite3"
DRF_BARE: Final = "SQLite alone: the peer's statement, a warm connection of sqlite3"


def _stored(result: Result, scale: float) -> None:
    """Compare what asks SQLite each time, and what SQLite alone takes of it."""
    with place("sqlite") as there, TemporaryDirectory() as folder:
        keys = [one_key(there.url, there.peppers)[0].encode() for _ in range(2)]
        with Authenticator(
            there.url, environment="prod", peppers=there.peppers, max_staleness=TRUST, max_known=1
        ) as authenticator:
            loops = {OURS: uncached(authenticator, keys), OURS_BARE: our_statement(authenticator, keys[0])}
            if not _absent(result, "rest_framework_api_key"):
                loops |= drf_loops(Path(folder))
            found = interleave(loops, rounds=max(4, int(400 * scale)), count=5)
    if DRF in found:
        _report_stored(result, found)
    result.times(found)


def _report_stored(result: Result, found: Mapping[str, Sequence[float]]) -> None:
    middle = {name: statistics.median(times) / 1000 for name, times in found.items()}
    reason = (
        f"SQLite's own work is {middle[OURS_BARE]:.0f} of our {middle[OURS]:.0f} µs, in which it gives the key, the "
        f"machine and the epoch from one snapshot, and {middle[DRF_BARE]:.0f} of the peer's {middle[DRF]:.0f}; "
        f"reading, digesting, judging and remembering a key would have to take us "
        f"{middle[DRF] / DRF_GOAL - middle[OURS_BARE]:.0f} µs"
    )
    result.add(
        f"{DRF} / ours, not cached",
        **compared(found[DRF], found[OURS]),
        goal=DRF_GOAL,
        at_most=False,
        reason=reason,
    )


def our_statement(authenticator: Authenticator, key: bytes) -> Loop:
    """Time the statement of a lookup on the store's own connection, and nothing else of ours."""
    store: Any = authenticator._store  # Any: the SQLite store's own parts
    authenticator.authenticate(key)
    digests = [candidate.digest for candidate in authenticator._read(key).candidates]
    statement = store._lookups[len(digests)]
    connection = store._readers.take()
    store._readers.give(connection)
    return looped(lambda: connection.execute(statement, digests).fetchone())


def uncached(authenticator: Authenticator, keys: list[bytes]) -> Loop:
    """Time verification where the cache holds one key, and never the one presented."""

    def pair() -> None:
        for key in keys:
            authenticator.authenticate(key)

    once = looped(pair)
    return lambda count: once(count) / len(keys)


def drf_loops(folder: Path) -> dict[str, Loop]:
    """Time `APIKey.objects.is_valid`, its recommended SHA-512 hasher, an SQLite file and a warm connection.

    And the one statement that it makes, without Django.
    """
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(
            INSTALLED_APPS=["rest_framework_api_key"],
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "peer.db")}},
            DEFAULT_AUTO_FIELD="django.db.models.AutoField",
            USE_TZ=True,
            SECRET_KEY="of no use elsewhere",
        )
        django.setup()
    from django.core.management import call_command
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    connection.close()
    connection.settings_dict["NAME"] = str(folder / "peer.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call_command("migrate", verbosity=0)
    from rest_framework_api_key.models import APIKey

    _, key = APIKey.objects.create_key(name="Production - Banc d'essai")
    APIKey.objects.is_valid(key)

    def verify() -> None:
        if not APIKey.objects.is_valid(key):
            raise RuntimeError("the peer refuses its own key")

    with CaptureQueriesContext(connection) as captured:
        verify()
    (asked,) = captured.captured_queries
    bare = sqlite3.connect(folder / "peer.db", isolation_level=None)
    return {DRF: looped(verify), DRF_BARE: looped(lambda: bare.execute(asked["sql"]).fetchall())}
