"""The ASGI middleware beyond the conformance table: WebSockets, lifespan, other scopes, and the hot path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import asgiref.sync
import pytest
from django.test.utils import override_settings
from fastapi import FastAPI
from starlette._utils import is_async_callable
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from papaours_auth import AsyncAuthenticator, ConfigurationError, PepperRing, StoreUnavailable
from papaours_auth.asgi import PapaoursAuthMiddleware, identity_of
from papaours_auth.digest import new_pepper
from papaours_auth.starlette import PapaoursAuthMiddleware as StarletteMiddleware
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.usage import CallableSink, Recorder
from support import frameworks
from support.calls import Recorded, http_scope, lifespan, run_asgi, websocket_scope

SEED = "pk_prod_abc123def456ghi789"
BEARER = [("Authorization", f"Bearer {SEED}")]


@pytest.fixture
def authenticator(memory: MemoryStore, ring: PepperRing) -> Iterator[AsyncAuthenticator]:
    authenticator = AsyncAuthenticator(AsyncMemoryStore(memory), environment="prod", peppers=ring)
    yield authenticator
    asyncio.run(authenticator.aclose())


# WebSockets


def test_pitfall_11_a_websocket_with_a_key_reaches_the_app(authenticator: AsyncAuthenticator) -> None:
    app = Recorded()
    sent = run_asgi(PapaoursAuthMiddleware(app, authenticator=authenticator), websocket_scope(BEARER))
    assert [message["type"] for message in sent] == ["websocket.accept"]
    assert app.scopes[0]["papaours"].machine.name == "Service de facturation"


def test_pitfall_11_a_websocket_without_a_key_is_closed_where_the_server_can_do_no_better(
    authenticator: AsyncAuthenticator,
) -> None:
    app = Recorded()
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator)
    assert run_asgi(guarded, websocket_scope()) == [
        {"type": "websocket.close", "code": 1008, "reason": "missing_key"}
    ]
    assert app.scopes == []


def test_pitfall_11_a_websocket_is_denied_by_a_whole_answer_where_the_server_can(
    authenticator: AsyncAuthenticator,
) -> None:
    guarded = PapaoursAuthMiddleware(Recorded(), authenticator=authenticator)
    start, body = run_asgi(guarded, websocket_scope(extensions={"websocket.http.response": {}}))
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert (b"www-authenticate", b'Bearer realm="papaours"') in start["headers"]
    assert body["type"] == "websocket.http.response.body"
    assert b'"missing_key"' in body["body"]


def test_pitfall_11_starlettes_own_client_sees_the_denial(authenticator: AsyncAuthenticator) -> None:
    async def live(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(websocket.user.display_name)
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/live", live)])
    client = TestClient(StarletteMiddleware(app, authenticator=authenticator))
    with client.websocket_connect("/live", headers=dict(BEARER)) as session:
        assert session.receive_text() == "Service de facturation"
    with pytest.raises(WebSocketDenialResponse) as denial, client.websocket_connect("/live"):
        pass
    assert denial.value.status_code == 401
    assert denial.value.json()["code"] == "missing_key"


# lifespan and other scopes


def test_pitfall_11_lifespan_passes_through_and_closes_at_the_end(
    memory: MemoryStore, ring: PepperRing
) -> None:
    app = Recorded()
    guarded = PapaoursAuthMiddleware(app, environment="prod", store=AsyncMemoryStore(memory), peppers=ring)
    assert lifespan(guarded) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert app.scopes[0]["type"] == "lifespan"
    assert guarded.authenticator._watcher is None


def test_an_authenticator_that_was_given_ready_stays_open(authenticator: AsyncAuthenticator) -> None:
    lifespan(PapaoursAuthMiddleware(Recorded(), authenticator=authenticator))
    assert authenticator._watcher is not None
    assert authenticator._watcher.alive


def test_an_app_whose_own_start_fails_leaves_no_watcher(memory: MemoryStore, ring: PepperRing) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    guarded = PapaoursAuthMiddleware(fails, environment="prod", store=AsyncMemoryStore(memory), peppers=ring)
    assert lifespan(guarded) == ["lifespan.startup.failed"]
    assert guarded.authenticator._watcher is None


def test_amendment_14_a_wrong_pepper_fails_the_start_in_one_line(memory: MemoryStore) -> None:
    from papaours_auth import parse_peppers

    guarded = PapaoursAuthMiddleware(
        Recorded(), environment="prod", store=AsyncMemoryStore(memory), peppers=parse_peppers(new_pepper())
    )
    (message,) = run_asgi(guarded, {"type": "lifespan", "asgi": {}}, [{"type": "lifespan.startup"}])
    assert message["type"] == "lifespan.startup.failed"
    assert "not the one this store was made with" in message["message"]
    assert "\n" not in message["message"]
    assert not guarded.authenticator.health().watching  # a start that failed leaves no thread


class Down(MemoryStore):
    def describe(self) -> Any:
        raise StoreUnavailable("down on purpose")


def test_pitfall_21_an_app_starts_although_its_store_is_down_and_says_so(
    ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = PapaoursAuthMiddleware(
        Recorded(), environment="prod", store=AsyncMemoryStore(Down()), peppers=ring
    )
    with caplog.at_level(logging.WARNING, "papaours_auth"):
        assert lifespan(guarded) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        start, _ = run_asgi(guarded, http_scope(headers=BEARER))
    assert start["status"] == 503
    assert "calls meet 503: down on purpose" in caplog.text
    asyncio.run(guarded.aclose())


@pytest.mark.parametrize("options", [{}, {"required": False}, {"everywhere": False}, {"exempt": ["/live"]}])
@pytest.mark.parametrize("kind", ["webtransport", "something.new", "", None])
def test_a_scope_of_a_type_nobody_knows_is_refused(
    authenticator: AsyncAuthenticator, kind: Any, options: dict[str, Any]
) -> None:
    app = Recorded()
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, **options)
    with pytest.raises(ValueError, match="guards http and websocket"):
        run_asgi(guarded, {**websocket_scope(BEARER), "type": kind})
    assert app.scopes == []


# what the scope is told


def test_pitfall_42_the_plain_middleware_writes_its_own_keys_alone(authenticator: AsyncAuthenticator) -> None:
    app = Recorded()
    for options, headers in (({}, BEARER), ({"required": False}, []), ({"exempt": ["/contracts"]}, BEARER)):
        scope = http_scope(headers=headers)
        before = set(scope)
        run_asgi(PapaoursAuthMiddleware(app, authenticator=authenticator, **options), scope)
        assert {key.partition(".")[0] for key in scope.keys() - before} == {"papaours"}


def test_pitfall_42_nothing_that_requests_share_can_be_written_to(authenticator: AsyncAuthenticator) -> None:
    app = Recorded()
    guarded = StarletteMiddleware(app, authenticator=authenticator, required=False)
    run_asgi(guarded, http_scope())
    run_asgi(guarded, http_scope(headers=BEARER))
    for scope in app.scopes:
        for shared in (scope["user"], scope["auth"]):
            for name in ("_wrapped", "is_authenticated", "pk", "scopes"):
                with pytest.raises((AttributeError, TypeError)):
                    setattr(shared, name, "somebody")


def test_starlettes_front_does_not_take_an_outer_guards_caller_for_its_own(
    authenticator: AsyncAuthenticator,
) -> None:
    app = Recorded()
    inner = StarletteMiddleware(app, authenticator=authenticator, exempt=["/healthz"])
    run_asgi(StarletteMiddleware(inner, authenticator=authenticator), http_scope("/healthz", BEARER))
    scope = app.scopes[0]
    assert identity_of(scope) is None
    assert not scope["user"].is_authenticated
    assert scope["auth"].scopes == frozenset()


def test_a_user_that_another_middleware_found_stays(authenticator: AsyncAuthenticator) -> None:
    app, somebody = Recorded(), object()
    guarded = StarletteMiddleware(app, authenticator=authenticator, required=False)
    run_asgi(guarded, http_scope(user=somebody))
    assert app.scopes[0]["user"] is somebody


# paths


@pytest.mark.parametrize(
    ("root", "path", "stripped", "both"),
    [
        ("", "/healthz", True, True),
        ("", "/api/healthz", False, True),
        ("/api", "/api/healthz", True, True),
        ("/api", "/api/public/x", True, False),
        ("/api", "/api/public/", False, False),
        ("/api", "/api", False, False),
        ("/api", "/api/contracts", False, False),
        ("/api", "/healthz", False, False),  # some read it as it is, some find the root path missing
        ("/api", "/public/api/contracts", False, False),  # Litestar: /contracts
        ("/api", "/apix/healthz", False, False),  # begins like it, and is another path
        ("/api", "/apihealthz", False, False),
        ("/api", "/xyz/healthz", False, False),  # as long, and not it
        ("/api/healthz", "/api", False, False),
        ("/api/", "/api//healthz", False, False),
        ("/api/", "/api/healthz", False, False),
        ("/", "/healthz", False, False),
        ("/", "//healthz", False, False),
        ("api", "api/healthz", False, False),
        ("/a/..", "/a/../healthz", False, False),
        ("//api", "//api/healthz", False, False),
        ("/a%70i", "/a%70i/healthz", False, False),
    ],
)
def test_pitfall_35_a_path_that_an_app_could_read_in_two_ways_is_guarded(
    authenticator: AsyncAuthenticator, root: str, path: str, stripped: bool, both: bool
) -> None:
    """``stripped``: exempt for Starlette, which is known to take a root path off. ``both``: where both are named."""
    open_, whole = ["/healthz", "/public/*"], ["/healthz", "/api/healthz", "/public/*"]

    def passes(front: Any, exempt: list[str]) -> bool:
        guarded = front(Recorded(), authenticator=authenticator, exempt=exempt)
        start, *_ = run_asgi(guarded, http_scope(path, root_path=root))
        return bool(start["status"] == 200)

    assert passes(StarletteMiddleware, open_) == stripped
    assert passes(PapaoursAuthMiddleware, whole) == both
    assert passes(PapaoursAuthMiddleware, open_) == (stripped and not root)


@pytest.mark.parametrize("front", [PapaoursAuthMiddleware, StarletteMiddleware])
@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_pitfall_35_a_root_path_that_a_framework_sets_itself_is_known(
    authenticator: AsyncAuthenticator, front: Any
) -> None:
    app = FastAPI(root_path="/public", openapi_url=None)
    app.add_api_route("/{rest:path}", lambda: "guarded", response_model=None)
    assert _statuses(front(app, authenticator=authenticator, exempt=["/public/*", "/healthz"])) == {
        "/public/admin": 401,
        "/public/public/x": 200,
        "/healthz": 200,
    }


def test_pitfall_35_a_script_name_that_django_is_forced_to_is_known(
    authenticator: AsyncAuthenticator,
) -> None:
    app = frameworks.django()
    with override_settings(FORCE_SCRIPT_NAME="/public"):
        guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, exempt=["/public/*", "/healthz"])
        statuses = _statuses(guarded)
    assert statuses["/public/admin"] == 401
    assert statuses["/public/public/x"] == 200


def _statuses(app: Any) -> dict[str, int]:
    """Return the status of each path; the client stays, as Django looks for whether it does."""
    answers: dict[str, int] = {}

    async def ask(path: str) -> None:
        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return body.pop() if body else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            answers.setdefault(path, message.get("status", 0))

        await app(http_scope(path, [("Host", "a.example")], raw_path=path.encode()), receive, send)

    for path in ("/public/admin", "/public/public/x", "/healthz"):
        asyncio.run(ask(path))
    return answers


@pytest.mark.parametrize(
    ("raw", "path", "passes"),
    [
        ("/public/x", "/public/x", True),
        ("/public/x?y=%2f", "/public/x", True),  # some put the query there
        ("/public/a%20b", "/public/a b", True),
        ("/public/%c3%a9", "/public/é", True),
        ("/public/%C3%A9", "/public/é", True),
        (None, "/public/x", True),
        ("/public%2fx", "/public/x", False),
        ("/%70ublic/x", "/public/x", False),
        ("/public/%2e/x", "/public/./x", False),
        ("/public/%78", "/public/x", False),
        ("/public/x", "/public/y", False),
        ("/contracts", "/public/x", False),
        ("/public/%3f", "/public/?", False),
        ("/public/%23", "/public/#", False),
    ],
)
def test_pitfall_35_a_path_that_was_encoded_without_need_is_guarded(
    authenticator: AsyncAuthenticator, raw: str | None, path: str, passes: bool
) -> None:
    """BlackSheep and Sanic route by ``raw_path``: /public%2fx is one segment there."""
    guarded = StarletteMiddleware(Recorded(), authenticator=authenticator, exempt=["/public/*"])
    more: dict[str, Any] = {} if raw is None else {"raw_path": raw.encode()}
    start, *_ = run_asgi(guarded, http_scope(path, **more))
    assert start["status"] == (200 if passes else 401)


# the answer passes through whole


class Forwarded(dict[str, Any]):
    """A message, to be recognised."""


def pairs(*given: tuple[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    yield from given


HEADERS = [(b"content-type", b"text/html"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
STORED = (b"Cache-Control", b"no-store")


@pytest.mark.parametrize(
    "iterable", [list, tuple, pairs, lambda *given: iter(given), lambda *given: map(list, given)]
)
@pytest.mark.parametrize("headers", [[], HEADERS, [*HEADERS, STORED], [STORED, *HEADERS]])
def test_pitfall_43_headers_of_any_iterable_arrive_whole(
    authenticator: AsyncAuthenticator, iterable: Any, headers: list[tuple[bytes, bytes]]
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        given = iterable(*headers) if iterable not in (list, tuple) else iterable(headers)
        await send({"type": "http.response.start", "status": 200, "headers": given})

    start, *_ = run_asgi(PapaoursAuthMiddleware(app, authenticator=authenticator), http_scope(headers=BEARER))
    added = [] if STORED in headers else [(b"cache-control", b"private")]
    assert [tuple(pair) for pair in start["headers"]] == [*headers, *added]


@pytest.mark.parametrize("usage", [False, True], ids=["unrecorded", "recorded"])
def test_messages_of_the_extensions_pass_unchanged_in_any_order(
    authenticator: AsyncAuthenticator, usage: bool
) -> None:
    """ASGI's own extensions, one that nobody knows, and an order that only the server may judge."""
    kinds = [
        *(
            "http.response.early_hint",
            "http.response.push",
            "http.response.body",
            "http.response.zerocopysend",
        ),
        *("http.response.pathsend", "http.response.trailers", "http.response.debug", "http.response.start"),
        *("http.response.something_new", "tls.something"),
    ]
    messages = [Forwarded(type=kind, headers=[STORED], status=200, extra=object()) for kind in kinds]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    with Recorder(CallableSink(lambda _: None)) as recorder:
        guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, usage=recorder if usage else None)
        sent = run_asgi(guarded, http_scope(headers=BEARER))
    assert len(sent) == len(messages)
    assert all(one is another for one, another in zip(sent, messages, strict=True))


@pytest.mark.parametrize("options", [{}, {"usage": True}, {"exempt": ["/contracts"]}, {"everywhere": False}])
def test_send_is_a_coroutine_function_as_frameworks_test_it(
    authenticator: AsyncAuthenticator, options: dict[str, Any]
) -> None:
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(asgiref.sync.iscoroutinefunction(send) and is_async_callable(send))

    with Recorder(CallableSink(lambda _: None)) as recorder:
        options = {**options, **({"usage": recorder} if "usage" in options else {})}
        guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, **options)
        run_asgi(guarded, http_scope(headers=BEARER))
    assert seen == [True]


# the hot path


def test_amendment_18_a_hit_awaits_nothing_of_ours(
    authenticator: AsyncAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Recorded()
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator)
    run_asgi(guarded, http_scope(headers=BEARER))

    def no_coroutine(*args: object, **kwargs: object) -> None:
        raise AssertionError("a hit made a coroutine")

    monkeypatch.setattr(authenticator, "authenticate", no_coroutine)
    run_asgi(guarded, http_scope(headers=BEARER))
    first, second = (scope["papaours"] for scope in app.scopes)
    assert first is second


def test_pitfall_30_an_answer_that_said_nothing_becomes_private_and_the_apps_message_is_left_alone(
    authenticator: AsyncAuthenticator,
) -> None:
    app = Recorded()
    start, _ = run_asgi(PapaoursAuthMiddleware(app, authenticator=authenticator), http_scope(headers=BEARER))
    assert start["headers"] == [(b"cache-control", b"private")]
    assert app.start["headers"] == []


def test_pitfall_30_an_open_path_stays_cacheable(authenticator: AsyncAuthenticator) -> None:
    guarded = PapaoursAuthMiddleware(Recorded(), authenticator=authenticator, exempt=["/logo"])
    start, _ = run_asgi(guarded, http_scope("/logo", BEARER))
    assert start["headers"] == []


def test_pitfall_05_a_header_with_underscores_is_another_header(authenticator: AsyncAuthenticator) -> None:
    """CVE-2015-0219. ASGI keeps the two apart; docs/servers.md says which WSGI servers do."""
    guarded = PapaoursAuthMiddleware(Recorded(), authenticator=authenticator)
    start, body = run_asgi(guarded, http_scope(headers=[("X_API_Key", SEED)]))
    assert start["status"] == 401
    assert b"missing_key" in body["body"]


def test_a_unix_socket_has_no_client_address(authenticator: AsyncAuthenticator) -> None:
    guarded = PapaoursAuthMiddleware(Recorded(), authenticator=authenticator)
    start, _ = run_asgi(guarded, http_scope(headers=BEARER, client=None))
    assert start["status"] == 200


# configuration


def test_what_is_set_up_wrongly_stops_at_start(
    authenticator: AsyncAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PAPAOURS_STORE", "PAPAOURS_PEPPER", "PAPAOURS_PEPPER_FILE"):
        monkeypatch.delenv(variable, raising=False)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"authenticator": authenticator, "environment": "prod"}, "authenticator is ready"),
        ({"authenticator": authenticator, "max_staleness": 1.0}, "authenticator is ready"),
        ({"environment": "prod"}, "no store: set PAPAOURS_STORE"),
        ({"store": "memory://"}, "no environment"),
        ({"store": "memory://", "environment": "prod"}, "no pepper"),
        ({"store": "mongodb://localhost", "environment": "prod"}, "no store is known for 'mongodb'"),
        ({"store": "sqlite:///nowhere/at-all.db", "environment": "prod"}, "there is no SQLite store"),
    ]
    for options, said in wrong:
        with pytest.raises(ConfigurationError, match=said) as error:
            PapaoursAuthMiddleware(Recorded(), **options)
        assert "\n" not in str(error.value)
