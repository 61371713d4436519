"""Readiness: 200, or 503 with the reasons; it recovers by itself, with no traffic and no key presented."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.routing import Route

from conftest import PEPPER
from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    Identity,
    Keys,
    PepperRing,
    StoreUnavailable,
    asgi,
    fastapi,
    flask,
    open_store,
    starlette,
    wsgi,
)
from papaours_auth.stores import Description, Reading, Store
from support.doors import Door, Spy
from support.proxy import Proxy
from support.redis_servers import NEWEST, WHY_NOT, redis_server
from support.servers import serving, wait_until
from support.sql_servers import SQLServer

SEED = "pk_prod_abc123def456ghi789"


class Told(NamedTuple):
    """What a probe was told."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def reasons(self) -> list[str]:
        return [reason["code"] for reason in json.loads(self.body)["reasons"]]


class Probed(NamedTuple):
    """An app without traffic, and its probe."""

    probe: Callable[[str], Told]
    stop: Callable[[], None]


def ask_asgi(app: Any, method: str) -> Told:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": method,
        "path": "/readyz",
        "root_path": "",
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Told(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))


def ask_wsgi(app: Any, method: str) -> Told:
    begun: list[Any] = []
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": "/readyz", "REMOTE_ADDR": "", "SERVER_NAME": "bench",
        "SERVER_PORT": "80", "wsgi.url_scheme": "http",
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, headers, exc_info=None: begun.append((status, headers))))
    status, headers = begun[0]
    return Told(int(status[:3]), {name.lower(): value for name, value in headers}, body)


def begin_lifespan(app: Any) -> None:
    """Start an app as a server does, and leave it so."""

    async def scene() -> None:
        said: list[Any] = []
        begun = asyncio.Event()
        asked: asyncio.Queue[Any] = asyncio.Queue()
        asked.put_nowait({"type": "lifespan.startup"})

        async def send(message: Any) -> None:
            said.append(message["type"])
            begun.set()

        running = asyncio.create_task(app({"type": "lifespan", "state": {}}, asked.get, send))
        await begun.wait()
        assert said == ["lifespan.startup.complete"]
        running.cancel()

    asyncio.run(scene())


async def bare(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await asyncio.Event().wait()


def by_asgi(url: str) -> Probed:
    guard = asgi.PapaoursAuthMiddleware(bare, environment="prod", store=url)
    begin_lifespan(guard)
    ready = asgi.readiness(guard)
    return Probed(lambda method: ask_asgi(ready, method), lambda: asyncio.run(guard.aclose()))


def by_starlette(url: str) -> Probed:
    authenticator = AsyncAuthenticator(url, environment="prod")
    routes = [Route("/readyz", starlette.readiness(authenticator))]
    app = starlette.PapaoursAuthMiddleware(
        Starlette(routes=routes), authenticator=authenticator, exempt=["/readyz"]
    )
    begin_lifespan(app)
    return Probed(lambda method: ask_asgi(app, method), lambda: asyncio.run(authenticator.aclose()))


def by_fastapi(url: str) -> Probed:
    auth, app = fastapi.PapaoursAuth(environment="prod", store=url), FastAPI()
    auth.install(app)
    app.add_route("/readyz", fastapi.readiness(auth))
    begin_lifespan(app)
    return Probed(lambda method: ask_asgi(app, method), lambda: asyncio.run(auth.authenticator.aclose()))


def by_wsgi(url: str) -> Probed:
    guard = wsgi.PapaoursAuthMiddleware(lambda environ, start: [], environment="prod", store=url)
    ready = wsgi.readiness(guard)
    return Probed(lambda method: ask_wsgi(ready, method), guard.authenticator.close)


def by_flask(url: str) -> Probed:
    authenticator, app = Authenticator(url, environment="prod"), Flask("readiness")
    auth = flask.PapaoursAuth(app, authenticator=authenticator, exempt=["/readyz"])
    app.add_url_rule("/readyz", "readyz", flask.readiness(auth))
    return Probed(lambda method: ask_wsgi(app, method), authenticator.close)


FRONTS = {
    "asgi": by_asgi,
    "starlette": by_starlette,
    "fastapi": by_fastapi,
    "wsgi": by_wsgi,
    "flask": by_flask,
}


class Away(NamedTuple):
    """A store that is away at boot."""

    url: str
    come_back: Callable[[], object]


def prepared(url: str, ring: PepperRing) -> None:
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    keys.import_key(machine.id, SEED, name="Production - Ancienne")
    store.close()


@contextmanager
def redis_away(request: pytest.FixtureRequest, folder: Path, ring: PepperRing) -> Iterator[Away]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, folder, "--appendonly", "yes", "--appendfsync", "always") as server:
        url = f"redis://{server.address}"
        prepared(url, ring)
        server.kill()
        yield Away(url, server.start)


@contextmanager
def postgresql_away(request: pytest.FixtureRequest, folder: Path, ring: PepperRing) -> Iterator[Away]:
    server: SQLServer = request.getfixturevalue("postgresql_server")
    database = server.database()
    prepared(server.url(database), ring)
    with Proxy(server.port) as proxy:
        proxy.turn("refuse")
        yield Away(server.url(database, port=proxy.port), lambda: proxy.turn("pass"))


@contextmanager
def sqlite_away(request: pytest.FixtureRequest, folder: Path, ring: PepperRing) -> Iterator[Away]:
    """Opened, and gone before the app starts: a volume that was unmounted."""
    path, away = folder / "keys.db", folder / "away.db"
    prepared(f"sqlite:///{path}", ring)
    yield Away(f"sqlite:///{path}", lambda: away.rename(path))


PLACES = {"redis": redis_away, "postgresql": postgresql_away, "sqlite": sqlite_away}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPAOURS_PEPPER", PEPPER)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("where", ["redis", "postgresql"])
def test_pitfall_39_a_store_down_at_boot_and_then_back_makes_the_app_ready_within_a_second_without_traffic(
    where: str, front: str, request: pytest.FixtureRequest, tmp_path: Path, ring: PepperRing
) -> None:
    with PLACES[where](request, tmp_path, ring) as away, ExitStack() as stack:
        app = FRONTS[front](away.url)
        stack.callback(app.stop)
        told = app.probe("GET")
        assert (told.status, told.headers["cache-control"], told.headers["retry-after"]) == (
            503,
            "no-store",
            "1",
        )
        assert "not_checked" in told.reasons
        for secret in ("127.0.0.1", "papaours:", PEPPER[4:], SEED, "hunter2"):
            assert secret.encode() not in told.body
        time.sleep(0.5)  # the watcher tries on at its slowest pace
        away.come_back()
        back = time.monotonic()
        while (told := app.probe("GET")).status != 200:
            assert time.monotonic() - back < 1.0, told
            time.sleep(0.02)
        assert json.loads(told.body) == {"ready": True, "reasons": []}
        assert app.probe("HEAD").body == b""
        assert "retry-after" not in told.headers


def test_pitfall_39_an_sqlite_file_that_is_gone_at_the_start_and_comes_back(
    request: pytest.FixtureRequest, tmp_path: Path, ring: PepperRing
) -> None:
    with sqlite_away(request, tmp_path, ring) as away:
        authenticator = Authenticator(away.url, environment="prod", peppers=ring)
        (tmp_path / "keys.db").rename(tmp_path / "away.db")
        ready = wsgi.readiness(authenticator)
        assert ask_wsgi(ready, "GET").reasons == ["not_checked", "no_recent_reading"]
        away.come_back()
        wait_until(lambda: ask_wsgi(ready, "GET").status == 200, 1.0, what="the app to be ready")
        assert isinstance(authenticator.authenticate(SEED), Identity)
        authenticator.close()


PROBED = """
import os
from papaours_auth import asgi, wsgi

async def asgi_api(scope, receive, send):
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
    elif scope["path"] == "/readyz":
        await probe(scope, receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

def wsgi_api(environ, start_response):
    if environ["PATH_INFO"] == "/readyz":
        return probe(environ, start_response)
    start_response("200 OK", [("Content-Length", "0")])
    return [b""]

exempt = ["/healthz", "/readyz"]
if os.environ["FRONT"] == "asgi":
    app = asgi.PapaoursAuthMiddleware(asgi_api, environment="prod", exempt=exempt)
    probe = asgi.readiness(app)
else:
    app = wsgi.PapaoursAuthMiddleware(wsgi_api, environment="prod", exempt=exempt)
    probe = wsgi.readiness(app)
"""


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn-preload"])
def test_pitfall_39_a_real_server_whose_redis_was_down_at_boot_becomes_ready_without_traffic(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, ring: PepperRing
) -> None:
    """With --preload the app is there before the fork: each worker's probe starts its own watcher."""
    (tmp_path / "probed.py").write_text(PROBED)
    with redis_away(request, tmp_path / "redis", ring) as away:
        environ = {
            "PAPAOURS_STORE": away.url,
            "PAPAOURS_PEPPER": PEPPER,
            "FRONT": "asgi" if server == "uvicorn" else "wsgi",
        }
        with serving(server, environ, tmp_path, "probed:app") as served:
            for _ in range(8):  # every worker is looked at once
                assert served.get({}, "/readyz")[0] == 503
            away.come_back()
            back = time.monotonic()
            good = 0
            while good < 8:
                good = good + 1 if served.get({}, "/readyz")[0] == 200 else 0
                assert time.monotonic() - back < 2.0, "ready within a second, and eight looks more"


def test_a_process_that_is_only_looked_at_starts_no_thread_before_that(
    memory: Store, ring: PepperRing
) -> None:
    """Servers fork after they have imported the app."""
    guard = wsgi.PapaoursAuthMiddleware(
        lambda environ, start: [], authenticator=Authenticator(memory, environment="prod", peppers=ring)
    )
    ready = wsgi.readiness(guard)
    names = [thread.name for thread in threading.enumerate()]
    assert "papaours-auth-watcher" not in names
    wait_until(lambda: ask_wsgi(ready, "GET").status == 200, 5, what="the app to be ready")
    guard.authenticator.close()


# the reasons


def unavailable(*_: object) -> Any:
    raise StoreUnavailable("no route to redis.internal:6379")


def told_by(door: Door) -> Told:
    return ask_wsgi(wsgi.readiness(door.authenticator), "GET")


@pytest.fixture
def ready(opens: Callable[..., Door], admin: Keys) -> Door:
    machine = admin.create_machine("Service de facturation", organisation="cfa-lyon")
    admin.import_key(machine.id, SEED, name="Production - Ancienne")
    door = opens()
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)
    assert told_by(door).status == 200
    return door


def test_an_open_breaker_is_a_reason(ready: Door, spy: Spy) -> None:
    spy.on_lookup = unavailable
    ready.knock("pk_prod_000000000000000000")
    told = told_by(ready)
    assert (told.status, told.reasons) == (503, ["store_unavailable"])
    assert b"redis.internal" not in told.body


def test_trust_that_has_run_out_is_a_reason(ready: Door, clock: Any) -> None:
    clock.advance(2.0)
    told = told_by(ready)
    assert (told.status, told.reasons) == (503, ["no_recent_reading"])
    assert ready.authenticator.health().ok  # uncached keys can be verified


def test_peppers_that_contradict_the_stores_are_a_reason(ready: Door, spy: Spy) -> None:
    def other(peppers: Any) -> Any:
        return [pepper._replace(proof=b"?" * 32) for pepper in peppers]

    def tells(ask: Callable[[], Reading]) -> Reading:
        reading = ask()
        news = {part: each._replace(peppers=other(each.peppers)) for part, each in reading.news.items()}
        return reading._replace(news=news)

    spy.on_read = tells
    ready.refresh()
    told = told_by(ready)
    assert (told.status, told.reasons) == (503, ["peppers_contradict"])


def test_a_store_that_is_not_ours_is_a_reason_until_it_is(spy: Spy, ring: PepperRing, admin: Keys) -> None:
    """The watcher looks it over after each reading, until it is in order."""

    def wrong(ask: Callable[[], Description]) -> Description:
        description = ask()
        return description._replace(installation="another")

    admin.create_machine("Service de facturation", organisation="cfa-lyon")
    spy.on_describe = wrong
    authenticator = Authenticator(spy.store, environment="prod", peppers=ring, max_staleness=0.2)
    probe = wsgi.readiness(authenticator)
    assert ask_wsgi(probe, "GET").status == 503
    wait_until(
        lambda: "'p1' is not the one" in authenticator.health().error, 5, what="the store to be looked over"
    )
    assert ask_wsgi(probe, "GET").reasons == ["not_checked"]
    spy.on_describe = lambda ask: ask()
    wait_until(lambda: ask_wsgi(probe, "GET").status == 200, 5, what="the app to be ready")
    authenticator.close()


def test_an_app_that_serves_cached_answers_stays_ready_for_as_long_as_it_does(
    opens: Callable[..., Door], admin: Keys, spy: Spy, clock: Any
) -> None:
    machine = admin.create_machine("Service de facturation", organisation="cfa-lyon")
    admin.import_key(machine.id, SEED, name="Production - Ancienne")
    door = opens(on_outage="serve_cached", max_age=600.0)
    assert isinstance(door.knock(SEED), Identity)
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(599)
    assert isinstance(door.knock(SEED), Identity)
    told = told_by(door)
    assert (told.status, told.reasons) == (200, ["store_unavailable", "no_recent_reading"])
    clock.advance(2)
    assert told_by(door).status == 503


def test_an_authenticator_that_was_closed_is_not_watched_again_by_a_probe(
    tmp_path: Path, ring: PepperRing
) -> None:
    """A probe may come after the shutdown."""
    url = f"sqlite:///{tmp_path}/keys.db"
    prepared(url, ring)
    authenticator = Authenticator(url, environment="prod", peppers=ring)
    authenticator.start()
    authenticator.close()
    cast("Any", authenticator).watch()
    assert not authenticator.health().watching
