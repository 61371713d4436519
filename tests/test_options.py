"""Pitfall 36: an option that a front takes, it honours; one that it cannot honour does not exist there.

What a front takes is read from its signature: an option that is added somewhere without a test here fails this file.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI, Security
from flask import Flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import papaours_auth._middleware as middleware
from conftest import ManualClock
from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    ConfigurationError,
    KeyFormat,
    Keys,
    PepperRing,
    parse_peppers,
)
from papaours_auth import flask as papaours_flask
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.digest import new_pepper
from papaours_auth.fastapi import PapaoursAuth as FastAPIAuth
from papaours_auth.fastapi import PapaoursAuthMiddleware as FastAPIMiddleware
from papaours_auth.starlette import PapaoursAuthMiddleware as StarletteMiddleware
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware
from support.calls import environ_of, http_scope, run_asgi, run_wsgi
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
KEY = [("X-API-KEY", SEED)]
PREFLIGHT = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "GET")]


class House(NamedTuple):
    store: MemoryStore
    ring: PepperRing
    kept: Kept
    opened: list[Any]  # authenticators


class Front:
    """A front with its options, around an app that answers 200 to everybody."""

    def __init__(self, takes: Any) -> None:
        self.takes = takes

    def options(self) -> set[str]:
        """Name the options that the front's signature has."""
        names = set()
        for name, parameter in inspect.signature(self.takes.__init__).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                kind = re.findall(r"\w+Options", str(parameter.annotation))[-1]
                names |= getattr(middleware, kind).__annotations__.keys()
            elif parameter.kind is parameter.KEYWORD_ONLY:
                names.add(name)
        return names

    def build(self, house: House, **options: Any) -> Any:
        raise NotImplementedError

    def ask(self, app: Any, path: str = "/contracts", headers: Any = KEY, **more: Any) -> int:
        """Return the status of a call."""
        raise NotImplementedError

    def authenticator(self, house: House, environment: str = "prod") -> Any:
        raise NotImplementedError

    def store(self, house: House) -> Any:
        return house.store


class WSGI(Front):
    def build(self, house: House, **options: Any) -> Any:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [])
            return [b""]

        return self.takes(app, **options)

    def ask(self, app: Any, path: str = "/contracts", headers: Any = KEY, **more: Any) -> int:
        client = more.pop("client", "203.0.113.9")
        method = more.pop("method", "GET")
        software = more.pop("software", "gunicorn/23.0")
        given = {"REMOTE_ADDR": client, "REQUEST_METHOD": method, "SERVER_SOFTWARE": software}
        return int(run_wsgi(app, environ_of(path, headers, **given))[0][:3])

    def authenticator(self, house: House, environment: str = "prod") -> Any:
        return Authenticator(house.store, environment=environment, peppers=house.ring)


class InFlask(WSGI):
    def build(self, house: House, **options: Any) -> Any:
        app = Flask("options")
        self.takes(app, **options)
        app.add_url_rule("/<path:path>", view_func=lambda path: "", methods=["GET", "OPTIONS"])
        return app


class ASGI(Front):
    def build(self, house: House, **options: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return self.takes(app, **options)

    def ask(self, app: Any, path: str = "/contracts", headers: Any = KEY, **more: Any) -> int:
        more.pop("software", None)
        scope = http_scope(path, headers, client=(more.pop("client", "203.0.113.9"), 4711), **more)
        status: int = run_asgi(app, scope)[0]["status"]
        return status

    def authenticator(self, house: House, environment: str = "prod") -> Any:
        return AsyncAuthenticator(AsyncMemoryStore(house.store), environment=environment, peppers=house.ring)

    def store(self, house: House) -> Any:
        return AsyncMemoryStore(house.store)


class InStarlette(ASGI):
    def build(self, house: House, **options: Any) -> Any:
        async def page(request: Request) -> Response:
            return Response()

        app = Starlette(routes=[Route("/{path:path}", page, methods=["GET", "OPTIONS"])])
        return self.takes(app, **options)


class InFastAPI(ASGI):
    """The dependency, on every path."""

    def build(self, house: House, **options: Any) -> Any:
        app, auth = FastAPI(), self.takes(**options)
        app.add_api_route(
            "/{path:path}", lambda: None, methods=["GET", "OPTIONS"], dependencies=[Security(auth)]
        )
        auth.install(app)
        app.state.guard = auth
        return app

    def ask(self, app: Any, path: str = "/contracts", headers: Any = KEY, **more: Any) -> int:
        more.pop("software", None)
        scope = http_scope(path, headers, client=(more.pop("client", "203.0.113.9"), 4711), **more)
        status: int = run_asgi(app, scope, [{"type": "http.request"}] * 5)[0]["status"]
        return status


FRONTS: dict[str, Front] = {
    "wsgi": WSGI(WSGIMiddleware),
    "flask": InFlask(papaours_flask.PapaoursAuth),
    "asgi": ASGI(ASGIMiddleware),
    "starlette": InStarlette(StarletteMiddleware),
    "fastapi": InFastAPI(FastAPIAuth),
    "fastapi's middleware": InStarlette(FastAPIMiddleware),
}


@pytest.fixture
def house(memory: MemoryStore, ring: PepperRing) -> Iterator[House]:
    kept = Kept()
    house = House(memory, ring, kept, [])
    yield house
    for authenticator in house.opened:
        authenticator._stop_watching()
    kept.recorder.close()


def made(front: Front, house: House, **options: Any) -> Any:
    given = {"environment": "prod", "store": front.store(house), "peppers": house.ring}
    if "authenticator" in options:
        given = {}
    app = front.build(house, **(given | options))
    guard = app
    if isinstance(app, Flask):
        guard = next(iter(app.extensions["papaours-auth"].values()))
    elif isinstance(app, FastAPI):
        guard = app.state.guard
    house.opened.append(guard.authenticator)
    return app


# What each option does: a function of a front that fails where it does nothing.


def environment(front: Front, house: House) -> None:
    assert front.ask(made(front, house, environment="test")) == 401
    assert front.ask(made(front, house)) == 200


def store(front: Front, house: House) -> None:
    other = House(MemoryStore(), house.ring, house.kept, house.opened)
    assert front.ask(made(front, house, store=front.store(other))) == 401


def authenticator(front: Front, house: House) -> None:
    assert front.ask(made(front, house, authenticator=front.authenticator(house))) == 200
    assert front.ask(made(front, house, authenticator=front.authenticator(house, "test"))) == 401


def usage(front: Front, house: House) -> None:
    front.ask(made(front, house, usage=house.kept.recorder))
    assert len(house.kept.events()) == 1


def exempt(front: Front, house: House) -> None:
    app = made(front, house, exempt=["/open", "/public/*"])
    assert [front.ask(app, path, ()) for path in ("/open", "/public/a", "/other")] == [200, 200, 401]


def required(front: Front, house: House) -> None:
    app = made(front, house, required=False)
    assert [front.ask(app, headers=()), front.ask(app, headers=[("X-API-KEY", "x")])] == [200, 401]


def everywhere(front: Front, house: House) -> None:
    app = made(front, house, everywhere=False)
    assert [front.ask(app, headers=()), front.ask(app, headers=[("X-API-KEY", "x")])] == [200, 200]


def preflight(front: Front, house: House) -> None:
    app = made(front, house, preflight="pass")
    assert front.ask(app, headers=PREFLIGHT, method="OPTIONS") == 200
    assert front.ask(made(front, house), headers=PREFLIGHT, method="OPTIONS") == 401


def bound(house: House) -> list[tuple[str, str]]:
    """Return the headers of a key that is bound to a network."""
    keys = Keys(house.store, peppers=house.ring)
    new = keys.create_key(
        "Service de facturation", name="Bound", environment="prod", networks=["198.51.100.0/24"]
    )
    return [("X-API-KEY", new.secret.reveal())]


FORWARDED = ("X-Forwarded-For", "198.51.100.7")


def trusted_proxies(front: Front, house: House) -> None:
    headers = [*bound(house), FORWARDED]
    assert front.ask(made(front, house, trusted_proxies=["203.0.113.0/24"]), headers=headers) == 200
    assert front.ask(made(front, house), headers=headers) == 403


def proxy_drops_underscores(front: Front, house: House) -> None:
    headers, proxies = [*bound(house), FORWARDED], ["203.0.113.0/24"]
    app = made(front, house, trusted_proxies=proxies, proxy_drops_underscores=True)
    assert front.ask(app, headers=headers, software="unheard of") == 200
    assert (
        front.ask(made(front, house, trusted_proxies=proxies), headers=headers, software="unheard of") == 403
    )


def throttle(front: Front, house: House) -> None:
    app = made(front, house, throttle="2/minute")
    assert [front.ask(app, headers=[("X-API-KEY", "x")]) for _ in range(3)] == [401, 401, 429]


def peppers(front: Front, house: House) -> None:
    other = parse_peppers(new_pepper())
    with contextlib.suppress(ConfigurationError):  # WSGI looks when it is set up
        assert front.ask(made(front, house, peppers=other)) == 503


def format(front: Front, house: House) -> None:
    with pytest.raises(ConfigurationError):
        made(front, house, format=KeyFormat(environments=("dev",)))


def clock(front: Front, house: House) -> None:
    ahead = ManualClock()
    headers = bound_until(house, ahead)
    assert front.ask(made(front, house, clock=ahead), headers=headers) == 200
    ahead.advance(10 * 86_400)
    assert front.ask(made(front, house, clock=ahead), headers=headers) == 401


def bound_until(house: House, clock: ManualClock) -> list[tuple[str, str]]:
    """Return the headers of a key that has expired a day after the clock's time."""
    keys = Keys(house.store, peppers=house.ring, clock=clock)
    end = datetime.fromtimestamp(clock.time(), UTC) + timedelta(days=1)
    new = keys.create_key("Service de facturation", name="Day", environment="prod", expires=end)
    return [("X-API-KEY", new.secret.reveal())]


def watch(front: Front, house: House) -> None:
    before = watchers()
    assert front.ask(made(front, house, watch=False)) == 200
    assert watchers() <= before


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "papaours-auth-watcher"}


def on_outage(front: Front, house: House) -> None:
    with pytest.raises(ConfigurationError, match="max_age"):
        made(front, house, on_outage="serve_cached")


def number(name: str) -> Callable[[Front, House], None]:
    """Look whether a number reaches the authenticator, which refuses nought."""

    def reaches(front: Front, house: House) -> None:
        with pytest.raises(ConfigurationError, match=f"^{name} must be"):
            made(front, house, **{name: 0})

    return reaches


NUMBERS = (
    "max_staleness",
    "max_known",
    "max_unknown",
    "max_flights",
    "max_foreign_flights",
    "lifetime",
    "timeout",
    "max_age",
)
OPTIONS: dict[str, Callable[[Front, House], None]] = {
    **{
        does.__name__: does
        for does in (
            environment, store, authenticator, usage, exempt, required, everywhere, preflight, trusted_proxies,
            proxy_drops_underscores, throttle, peppers, format, clock, watch, on_outage,
        )
    },
    **{name: number(name) for name in NUMBERS},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", FRONTS)
def test_pitfall_36_an_option_acts_or_does_not_exist(name: str, option: str, house: House) -> None:
    front = FRONTS[name]
    if option in front.options():
        OPTIONS[option](front, house)
    else:
        with pytest.raises(TypeError):
            made(front, house, **{option: True})


@pytest.mark.parametrize("name", FRONTS)
def test_pitfall_36_every_option_of_every_front_is_in_the_table(name: str) -> None:
    assert FRONTS[name].options() <= OPTIONS.keys()


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("unknown", ["protect", "excempt", "cors"])
@pytest.mark.parametrize("name", FRONTS)
def test_an_option_that_there_is_not_is_a_type_error(
    name: str, unknown: str, ready: bool, house: House
) -> None:
    front = FRONTS[name]
    more = {"authenticator": front.authenticator(house)} if ready else {}
    with pytest.raises(TypeError, match=unknown):
        made(front, house, **more, **{unknown: ["/admin/*"]})
