"""Pitfall 37: no frame of ours holds a key while the app, a driver or a handler runs, nor in an error's traceback.

Error reporters capture local variables: Sentry by default, `traceback.TracebackException(capture_locals=True)`,
`cgitb`. The scope of ASGI and the environ of WSGI are the server's own, and hold the headers: SECURITY.md says what
to do there.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from fastapi import Depends, FastAPI, Request
from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
from sentry_sdk.integrations.wsgi import SentryWsgiMiddleware
from sentry_sdk.transport import Transport

from conftest import PEPPER
from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    ConfigurationError,
    Identity,
    Keys,
    PepperRing,
    Refused,
    StoreUnavailable,
    asgi,
    fastapi,
    open_store,
    parse_peppers,
    wsgi,
)
from papaours_auth.digest import peppers_from_environment
from papaours_auth.stores import AsyncStore, Found, Store
from papaours_auth.stores.memory import MemoryStore
from support.doors import Spy, Threaded
from support.frames import OURS, Quiet, held_by_error, held_on_the_stack
from support.proxy import Proxy
from support.redis_servers import NEWEST, WHY_NOT, redis_server
from support.sql_servers import SQLServer

FOREIGN = "pk_prod_canary0Canary1canary2"


class Reported(Transport):
    """Where Sentry's events go: a list."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [event for event in [envelope.get_event()] if event is not None]


@pytest.fixture
def reported() -> Iterator[Reported]:
    """A real Sentry, as it is by default but for where its events go and for what it hooks into."""
    transport = Reported()
    with sentry_sdk.new_scope():
        client = sentry_sdk.Client(
            dsn="http://public@localhost/1",
            transport=transport,
            default_integrations=False,
            max_value_length=100_000,
        )
        sentry_sdk.get_current_scope().set_client(client)
        yield transport
        client.close()


def texts_of(key: str) -> list[str]:
    """What gives a key away: all of it but a few characters."""
    return [key[8:-4], key[:-6], key[4:-8]]


class Canaries:
    """A store with two keys, minted and foreign, and what must not be seen of them."""

    def __init__(self, ring: PepperRing) -> None:
        self.store = MemoryStore()
        keys = Keys(self.store, peppers=ring)
        machine = keys.create_machine("Service", organisation="cfa-lyon", rights=["contrats:lecture"])
        self.minted = keys.create_key(machine.id, name="Canari", environment="prod").secret.reveal()
        keys.import_key(machine.id, FOREIGN, name="Canari étranger")
        self.unknown = "pk_prod_unknown0Canary1canary2"
        self.damaged = self.minted[:-1] + ("0" if self.minted[-1] != "0" else "1")
        self.all = [self.minted, FOREIGN, self.unknown, self.damaged]
        self.secrets = [text for key in self.all for text in texts_of(key)]

    def check_stack(self) -> None:
        assert held_on_the_stack(self.secrets) == []

    def check_error(self, error: BaseException, reported: Reported | None = None) -> None:
        assert held_by_error(error, self.secrets) == []
        if reported is not None:
            sentry_sdk.capture_exception(error)
            self.check_events(reported)

    def check_events(self, reported: Reported) -> None:
        """Of each frame of ours that Sentry has reported: its variables."""
        assert reported.events, "Sentry reported nothing"
        seen = 0
        for event in reported.events:
            for error in event["exception"]["values"]:
                for frame in error.get("stacktrace", {}).get("frames", ()):
                    if frame["abs_path"].startswith(OURS):
                        seen += 1
                        shown = json.dumps(frame.get("vars", {}))
                        assert not [secret for secret in self.secrets if secret in shown], frame
        assert seen, "no frame of ours was reported"


@pytest.fixture
def canaries(ring: PepperRing) -> Canaries:
    return Canaries(ring)


class Fault(Exception):
    """What a driver raises, and no contract names."""


# an authenticator by itself


def spied(canaries: Canaries, fault: Callable[[], object]) -> Store:
    """A store in whose lookups, which look at the stack, something goes wrong."""
    spy = Spy(canaries.store)

    def look(ask: Callable[[], Found]) -> Found:
        canaries.check_stack()
        fault()
        return ask()

    spy.on_lookup = look
    return spy.store


def outage() -> None:
    raise StoreUnavailable("no route to host")


def driver() -> None:
    raise Fault("a driver's own")


FAULTS: dict[str, Callable[[], object]] = {"none": lambda: None, "outage": outage, "driver": driver}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pitfall_37_no_frame_holds_a_key_while_the_store_is_asked_or_in_an_error(
    kind: str, fault: Callable[[], object], canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    store = spied(canaries, fault)
    sync = Authenticator(store, environment="prod", peppers=ring)
    twin = AsyncAuthenticator(Threaded(store), environment="prod", peppers=ring)
    other = Authenticator(canaries.store, environment="test", peppers=ring)
    errors = []
    for key in [*canaries.all, canaries.minted * 9]:
        for options in ({}, {"needs": "contrats:suppression"}):
            for who in (sync, other) if kind == "sync" else (twin,):
                try:
                    if isinstance(who, Authenticator):
                        who.authenticate(key, **options)
                    else:
                        asyncio.run(who.authenticate(key, **options))
                except (Refused, Fault) as error:
                    errors.append(error)
                try:
                    who.cached(key.encode(), None, **options)
                except Refused as error:
                    errors.append(error)
    assert len(errors) > 5
    for each in errors:
        canaries.check_error(each, reported)
    sync.close()
    other.close()
    asyncio.run(twin.aclose())


def test_pitfall_37_no_frame_holds_a_key_where_a_lookup_is_cancelled_or_takes_too_long(
    canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    class Hanging(Threaded):
        async def lookup(self, claim: Any) -> Found:
            canaries.check_stack()
            await asyncio.Event().wait()
            raise AssertionError

    async def scene() -> list[BaseException]:
        twin = AsyncAuthenticator(Hanging(canaries.store), environment="prod", peppers=ring, timeout=0.1)
        tasks = [
            asyncio.create_task(twin.authenticate(key)) for key in (canaries.minted, canaries.minted, FOREIGN)
        ]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        await twin.aclose()
        return [error for error in errors if isinstance(error, BaseException)]

    errors = asyncio.run(scene())
    assert len(errors) == 3
    for each in errors:
        canaries.check_error(each, reported if isinstance(each, Refused) else None)


@contextmanager
def sqlite_lost(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    path = folder / "keys.db"
    yield f"sqlite:///{path}", lambda: path.rename(folder / "away.db")


@contextmanager
def sqlite_broken(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    path = folder / "keys.db"

    def drop() -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("drop table digests")

    yield f"sqlite:///{path}", drop


@contextmanager
def redis_lost(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, folder / "redis") as server:
        yield f"redis://{server.address}", server.kill


@contextmanager
def redis_hangs(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, folder / "redis") as server:
        yield f"redis://{server.address}?timeout=0.1", server.freeze


@contextmanager
def postgresql_lost(
    request: pytest.FixtureRequest, folder: Path
) -> Iterator[tuple[str, Callable[[], object]]]:
    server: SQLServer = request.getfixturevalue("postgresql_server")
    with Proxy(server.port) as proxy:
        yield server.url(server.database(), port=proxy.port), lambda: proxy.turn("refuse")


LOST = [sqlite_lost, sqlite_broken, redis_lost, redis_hangs, postgresql_lost]


@pytest.mark.parametrize("place", LOST, ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pitfall_37_no_frame_holds_a_key_in_the_error_of_a_real_driver(
    kind: str,
    place: Any,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    ring: PepperRing,
    reported: Reported,
    canaries: Canaries,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("papaours_auth.stores.redis.WRITE_TIMEOUT", 0.2)
    with place(request, tmp_path) as (url, take_away), ExitStack() as stack:
        store = stack.enter_context(Keys(open_store(url, create=True), peppers=ring))
        machine = store.create_machine("Service", organisation="cfa-lyon")
        keys = [store.create_key(machine.id, name=f"Canari {n}", environment="prod") for n in range(3)]
        texts = [new.secret.reveal() for new in keys]
        store.import_key(machine.id, FOREIGN, name="Canari étranger")
        canaries.secrets += [text for key in texts for text in texts_of(key)]
        errors: list[BaseException] = []

        def fails(call: Callable[..., object], *given: object, **options: object) -> None:
            try:
                call(*given, **options)
            except Exception as error:  # noqa: BLE001 - whatever it is
                errors.append(error)

        if kind == "sync":
            with Authenticator(url, environment="prod", peppers=ring) as authenticator:
                authenticator.authenticate(texts[0])
                take_away()
                for text in (*texts[1:], FOREIGN):
                    fails(authenticator.authenticate, text)
            fails(store.import_key, machine.id, canaries.unknown, name="Canari perdu")
            fails(store.create_key, machine.id, name="Canari perdu", environment="prod")
            assert len(errors) == 5
        else:

            async def scene() -> None:
                async with AsyncAuthenticator(url, environment="prod", peppers=ring) as twin:
                    await twin.authenticate(texts[0])
                    take_away()
                    errors.extend(
                        await asyncio.gather(  # type: ignore[arg-type]  # each is an error
                            *(twin.authenticate(text) for text in (*texts[1:], FOREIGN)),
                            return_exceptions=True,
                        )
                    )

            asyncio.run(scene())
            assert len(errors) == 3
        for error in errors:
            assert isinstance(error, Exception), error
            canaries.check_error(error, reported)


# below the guards


def scope_with(key: str, **more: Any) -> dict[str, Any]:
    headers = [(b"host", b"bench"), (b"x-api-key", key.encode())]
    return {
        "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "root_path": "", "query_string": b"",
        "scheme": "http", "headers": headers, "client": ("192.0.2.1", 1), "server": ("bench", 80), **more,
    }  # fmt: skip


def environ_with(key: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "REMOTE_ADDR": "192.0.2.1",
        "SERVER_NAME": "bench", "SERVER_PORT": "80", "HTTP_X_API_KEY": key, "wsgi.url_scheme": "http",
        "wsgi.input": None,
    }  # fmt: skip


async def receive() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def nowhere(message: Any) -> None:
    pass


async def call(app: Any, key: str, send: Any = nowhere) -> BaseException | None:
    """Call an ASGI app as a server does; give what it raised."""
    try:
        await app(Quiet(scope_with(key)), receive, send)
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    return None


@pytest.fixture(params=["recording", "not recording"])
def usage(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"usage": f"sqlite:///{tmp_path}/usage.db"} if request.param == "recording" else {}


def async_store(store: Store) -> AsyncStore:
    return Threaded(store)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("where", ["app", "send"])
def test_pitfall_37_no_frame_of_the_asgi_guard_holds_a_key_while_the_app_or_the_server_runs(
    where: str,
    everywhere: bool,
    usage: dict[str, Any],
    canaries: Canaries,
    ring: PepperRing,
    reported: Reported,
) -> None:
    ran: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        canaries.check_stack()
        ran.append("app")
        if where == "app":
            raise Fault("the app's own")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        canaries.check_stack()
        ran.append("send")
        raise Fault("the client is gone")

    async def scene() -> list[BaseException | None]:
        guard = asgi.PapaoursAuthMiddleware(
            app,
            environment="prod",
            store=async_store(canaries.store),
            peppers=ring,
            everywhere=everywhere,
            **usage,
        )
        try:
            # Each twice: a miss, and a hit.
            return [await call(guard, key, send) for key in (*canaries.all, "a,b") for _ in range(2)]
        finally:
            await guard.aclose()

    errors = asyncio.run(scene())
    assert "app" in ran
    assert "send" in ran or where == "app"
    for error in errors:
        assert isinstance(error, Fault)
        canaries.check_error(error, reported)


def test_pitfall_37_no_frame_of_the_asgi_guard_holds_a_key_while_its_store_or_throttle_fails(
    canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("let in")

    async def scene() -> list[BaseException | None]:
        guard = asgi.PapaoursAuthMiddleware(
            app,
            environment="prod",
            store=async_store(spied(canaries, driver)),
            peppers=ring,
            throttle="30/minute",
        )
        try:
            return [await call(guard, key) for key in canaries.all]
        finally:
            await guard.aclose()

    errors = [error for error in asyncio.run(scene()) if error is not None]
    assert len(errors) == 3  # the damaged one never reaches the store
    for each in errors:
        canaries.check_error(each, reported)


@pytest.mark.parametrize("handler", ["answers", "raises"])
def test_pitfall_37_no_frame_of_fastapis_dependency_holds_a_key_while_endpoint_or_handler_runs(
    handler: str, canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    auth = fastapi.PapaoursAuth(environment="prod", store=async_store(canaries.store), peppers=ring)
    app = FastAPI()
    auth.install(app)
    seen: list[BaseException] = []

    @app.get("/")
    async def endpoint(caller: Any = Depends(auth)) -> None:  # noqa: B008 - `auth` is a local here
        canaries.check_stack()
        raise Fault("the app's own")

    @app.exception_handler(Refused)
    async def handle(request: Request, error: Refused) -> Any:
        canaries.check_stack()
        seen.append(error)
        if handler == "raises":
            raise Fault("the handler's own") from error
        return None

    async def scene() -> list[BaseException | None]:
        try:
            return [await call(app, key) for key in canaries.all for _ in range(2)]
        finally:
            await auth.aclose()

    errors = asyncio.run(scene())
    assert seen
    for error in [*seen, *errors]:
        if error is not None:
            assert held_by_error(error, canaries.secrets) == []


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("where", ["app", "body", "start_response"])
def test_pitfall_37_no_frame_of_the_wsgi_guard_holds_a_key_while_the_app_or_the_server_runs(
    where: str,
    everywhere: bool,
    usage: dict[str, Any],
    canaries: Canaries,
    ring: PepperRing,
    reported: Reported,
) -> None:
    def body() -> Iterator[bytes]:
        canaries.check_stack()
        raise Fault("in the body")
        yield b""

    def app(environ: Any, start_response: Any) -> Any:
        canaries.check_stack()
        if where == "app":
            raise Fault("the app's own")
        start_response("200 OK", [])
        return body()

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        canaries.check_stack()
        if where == "start_response":
            raise Fault("the server's own")

    guard = wsgi.PapaoursAuthMiddleware(
        app, environment="prod", store=canaries.store, peppers=ring, everywhere=everywhere, **usage
    )
    errors = []
    for key in (*canaries.all, "a,b"):
        for _ in range(2):
            try:
                b"".join(guard(Quiet(environ_with(key)), start))  # type: ignore[arg-type]  # as good as one
            except Fault as error:
                errors.append(error)
    assert len(errors) >= 4
    for each in errors:
        canaries.check_error(each, reported)
    guard.authenticator.close()


def test_pitfall_37_no_frame_of_the_wsgi_guard_holds_a_key_while_its_store_fails(
    canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    guard = wsgi.PapaoursAuthMiddleware(
        lambda environ, start: [],
        environment="prod",
        store=spied(canaries, driver),
        peppers=ring,
        throttle="30/minute",
    )
    errors = []
    for key in canaries.all:
        try:
            guard(Quiet(environ_with(key)), lambda *_: None)  # type: ignore[arg-type]  # as good as one
        except Fault as error:
            errors.append(error)
    assert len(errors) == 3
    for each in errors:
        canaries.check_error(each, reported)
    guard.authenticator.close()


# peppers


@pytest.mark.parametrize("last", ["p2:not*base64", "p2:c2hvcnQ", "no colon", f"p1:{PEPPER[3:]}"])
def test_pitfall_37_no_frame_holds_a_pepper_when_peppers_are_wrong(last: str, tmp_path: Path) -> None:
    text = f"{PEPPER},{last}"
    path = tmp_path / "peppers"
    path.write_text(text)
    path.chmod(0o644)
    secrets = [PEPPER[3:], "c2hvcnQ", "not*base64", repr(bytes(range(32)))[2:-1], bytes(range(32)).hex()]
    for attempt in (
        partial(parse_peppers, text),
        partial(peppers_from_environment, {"PAPAOURS_PEPPER": text}),
        partial(peppers_from_environment, {"PAPAOURS_PEPPER_FILE": str(path)}),
        partial(peppers_from_environment, {"PAPAOURS_PEPPER": text, "PAPAOURS_PEPPER_FILE": str(path)}),
    ):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert held_by_error(caught.value, secrets) == []


# what is not ours: the headers


def test_sentry_scrubs_the_two_headers_of_a_request_by_default(
    canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Fault("the app's own")

    def blocking(environ: Any, start_response: Any) -> Any:
        raise Fault("the app's own")

    async def scene() -> None:
        guard = asgi.PapaoursAuthMiddleware(
            app, environment="prod", store=async_store(canaries.store), peppers=ring
        )
        for name, value in ((b"x-api-key", FOREIGN), (b"authorization", f"Bearer {FOREIGN}")):
            scope = scope_with(FOREIGN, headers=[(b"host", b"bench"), (name, value.encode())])
            with pytest.raises(Fault):
                await SentryAsgiMiddleware(guard)(scope, receive, nowhere)
        await guard.aclose()

    asyncio.run(scene())
    guard = wsgi.PapaoursAuthMiddleware(blocking, environment="prod", store=canaries.store, peppers=ring)
    with pytest.raises(Fault):
        list(SentryWsgiMiddleware(guard)(environ_with(FOREIGN), lambda *_: None))
    guard.authenticator.close()
    assert len(reported.events) == 3
    for event in reported.events:
        headers = json.dumps(event["request"])
        assert "api-key" in headers.lower() or "authorization" in headers.lower()
        assert "canary0" not in headers


def test_what_the_docs_say_to_set_takes_the_headers_out_of_every_frame(
    canaries: Canaries, ring: PepperRing, reported: Reported
) -> None:
    """The app's and Sentry's own frames hold the scope. Without it the key is there, so the test can fail."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Fault("the app's own")

    async def scene() -> None:
        guard = asgi.PapaoursAuthMiddleware(
            app, environment="prod", store=async_store(canaries.store), peppers=ring
        )
        with pytest.raises(Fault):
            await SentryAsgiMiddleware(guard)(scope_with(FOREIGN), receive, nowhere)
        await guard.aclose()

    page = (Path(__file__).parents[1] / "docs" / "error-reports.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], namespace)
    options = sentry_sdk.get_client().options
    for setting, shown in (({}, True), ({"before_send": namespace["without_keys"]}, False)):
        options.update(setting)
        reported.events.clear()
        asyncio.run(scene())
        assert ("canary0" in json.dumps(reported.events)) is shown
    options.update({"before_send": None, "include_local_variables": False})
    reported.events.clear()
    asyncio.run(scene())
    assert reported.events
    assert "canary0" not in json.dumps(reported.events)


def test_an_error_of_a_cached_key_shows_nothing_in_a_printed_traceback(
    canaries: Canaries, ring: PepperRing
) -> None:
    """As `cgitb` and the standard library print it, every frame of the library."""
    with Authenticator(canaries.store, environment="prod", peppers=ring) as authenticator:
        assert isinstance(authenticator.authenticate(FOREIGN), Identity)
        with pytest.raises(Refused) as caught:
            authenticator.cached(FOREIGN.encode(), None, "contrats:suppression")
    stack = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack
    printed = "".join(stack.format()[1:])  # but this test's own
    assert "cached" in printed
    assert FOREIGN[8:] not in printed
