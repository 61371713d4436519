"""Pitfall 40: what an app refuses by itself is answered by the guard around it, whatever it is written in."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the endpoints below, which are local.
import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Security
from fastapi.testclient import TestClient as FastAPIClient
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from papaours_auth import AsyncAuthenticator, Identity, Reason, Refused
from papaours_auth import starlette as ours
from papaours_auth.asgi import PapaoursAuthMiddleware, require, respond
from papaours_auth.fastapi import PapaoursAuth
from papaours_auth.http import render
from support import frameworks
from support.calls import Recorded, http_scope, run_asgi, websocket_scope
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
KEY = {"X-API-KEY": SEED}
REFUSALS = [
    Reason.UNKNOWN_KEY,
    Reason.INSUFFICIENT_RIGHTS,
    Reason.TOO_MANY_FAILURES,
    Reason.STORE_UNAVAILABLE,
]
LACKING = "contrats:suppression"


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


def in_starlette() -> Any:
    """Ours in a mounted app that knows nothing of our handlers."""
    return Starlette(routes=[Mount("/", frameworks.starlette())])


def in_fastapi() -> Any:
    app = FastAPI()
    app.mount("/", frameworks.fastapi())
    return app


APPS = {
    **{name: frameworks.APPS[name] for name in ("bare", "starlette", "fastapi", "litestar")},
    "mounted starlette": in_starlette,
    "mounted fastapi": in_fastapi,
    "quart": frameworks.quart_with_handler,
    "falcon": frameworks.falcon_with_handler,
    "django": frameworks.django_with_handler,
    "blacksheep": frameworks.blacksheep_with_handler,
}


class Served:
    """An app behind the guard, started as a server starts it, and asked over and over."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def ask(self, paths: list[str]) -> list[tuple[int, dict[str, str], bytes]]:
        waiting: asyncio.Queue[Any] = asyncio.Queue()
        waiting.put_nowait({"type": "lifespan.startup"})
        started = asyncio.Event()

        async def told(message: Any) -> None:
            started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        life = asyncio.create_task(self.app(scope, waiting.get, told))
        await started.wait()
        answers = [await self._one(path) for path in paths]
        waiting.put_nowait({"type": "lifespan.shutdown"})
        await life
        return answers

    async def _one(self, path: str) -> tuple[int, dict[str, str], bytes]:
        sent: list[Any] = []
        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return body.pop() if body else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = http_scope(path, [*KEY.items(), ("Host", "a.example")], raw_path=path.encode(), extensions={})
        with suppress(LookupError):  # what an app raises after its answer is the server's to log
            await self.app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        assert [message["type"] for message in sent[:2]] == ["http.response.start", "http.response.body"]
        return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("options", [{}, {"everywhere": False}, {"exempt": ["/raise/*", "/asks"]}], ids=str)
@pytest.mark.parametrize("name", APPS)
def test_pitfall_40_a_refusal_from_below_is_the_one_answer_in_every_framework(
    name: str, options: dict[str, Any], waiting: AsyncAuthenticator, kept: Kept
) -> None:
    guarded = PapaoursAuthMiddleware(APPS[name](), authenticator=waiting, usage=kept.recorder, **options)
    paths = [f"/raise/{reason.value}" for reason in REFUSALS]
    *answers, asked, fine = asyncio.run(Served(guarded).ask([*paths, "/asks", "/contracts"]))
    for reason, (status, headers, body) in zip(REFUSALS, answers, strict=True):
        expected = render(Refused(reason))
        assert (status, body) == (expected.status, expected.body)
        lower = {name.lower(): value for name, value in headers.items()}
        assert {key.lower(): value for key, value in expected.headers}.items() <= lower.items()
    open_ = "exempt" in options
    assert (asked[0], json.loads(asked[2])["code"]) == (
        (401, "missing_key") if open_ else (403, "insufficient_rights")
    )
    assert fine[0] == 200
    reasons = {(event.status, event.reason) for event in kept.events()}
    if not open_:
        assert (403, "insufficient_rights") in reasons
        assert len(kept.events()) == len(paths) + 2
    if open_:
        counted = {entry.reason for batch in kept.batches for entry in batch.refusals}
        assert {reason.value for reason in REFUSALS} | {"missing_key"} <= counted


@pytest.mark.parametrize("name", ["quart", "falcon", "django", "blacksheep"])
def test_frameworks_that_answer_500_out_of_our_sight_need_a_handler(
    name: str, waiting: AsyncAuthenticator
) -> None:
    """If one of these fails, its paragraph in docs/integrations.md can go."""
    guarded = PapaoursAuthMiddleware(frameworks.APPS[name](), authenticator=waiting)
    ((status, _, _),) = asyncio.run(Served(guarded).ask(["/raise/unknown_key"]))
    assert status == 500


def test_once_the_answer_has_begun_a_refusal_goes_on_to_the_server(
    waiting: AsyncAuthenticator, kept: Kept
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    guarded = PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder)
    with pytest.raises(Refused):
        run_asgi(guarded, http_scope(headers=KEY.items()))
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "failed")]


def test_a_500_that_is_not_the_answer_to_a_refusal_stays(waiting: AsyncAuthenticator, kept: Kept) -> None:
    """An app may look whether a caller has a right, go on without, and fail later for another reason."""

    def page(request: Request) -> Response:
        with suppress(Refused):
            require(request.scope, LACKING)
        raise LookupError

    async def answers_it_itself(scope: Any, receive: Any, send: Any) -> None:
        with suppress(Refused):
            require(scope, LACKING)
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"broken"})

    app = Starlette(routes=[Route("/page", page), Mount("/raw", answers_it_itself)])
    guarded = PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder)
    client = TestClient(guarded, headers=KEY, raise_server_exceptions=False)
    assert [client.get(path).status_code for path in ("/page", "/raw/")] == [500, 500]
    assert [event.reason for event in kept.events()] == ["", ""]


# WebSockets


@pytest.mark.parametrize("options", [{}, {"everywhere": False}, {"exempt": ["/live"]}], ids=str)
def test_a_websocket_that_is_refused_below_is_denied_or_closed(
    waiting: AsyncAuthenticator, kept: Kept, options: dict[str, Any]
) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    async def closed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    def sent(app: Any, **more: Any) -> list[Any]:
        guarded = PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder, **options)
        return run_asgi(guarded, websocket_scope(KEY.items(), **more))

    close = {"type": "websocket.close", "code": 1008, "reason": "insufficient_rights"}
    assert sent(early) == [close]
    start, body = sent(early, extensions={"websocket.http.response": {}})
    assert (start["status"], json.loads(body["body"])["code"]) == (403, "insufficient_rights")
    assert sent(late) == [{"type": "websocket.accept"}, close]
    with pytest.raises(Refused):
        sent(closed)
    if "exempt" not in options:
        assert [(event.status, event.reason, event.outcome) for event in kept.events()] == [
            (403, "insufficient_rights", "completed"),
            (403, "insufficient_rights", "completed"),
            (101, "", "completed"),
            (403, "", "completed"),
        ]


def test_starlettes_websocket_is_refused_by_our_require(waiting: AsyncAuthenticator) -> None:
    async def live(socket: WebSocket) -> None:
        ours.require(socket, LACKING)

    app = Starlette(routes=[WebSocketRoute("/live", live)])
    client = TestClient(PapaoursAuthMiddleware(app, authenticator=waiting), headers=KEY)
    with (
        pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)) as refused,
        client.websocket_connect("/live"),
    ):
        pass
    assert getattr(refused.value, "status_code", 403) == 403


# Starlette and FastAPI answer alone


def lacking(request: Request) -> Response:
    ours.require(request, LACKING)
    return PlainTextResponse("never")


def nobody(request: Request) -> Response:
    return PlainTextResponse(ours.identity(request).machine.name)


def test_starlette_without_our_handlers_gives_the_right_status_and_headers(
    waiting: AsyncAuthenticator,
) -> None:
    inner = Starlette(routes=[Route("/lacking", lacking), Route("/nobody", nobody)])
    app = PapaoursAuthMiddleware(
        Starlette(routes=[Mount("/inner", inner)]), authenticator=waiting, required=False
    )
    client = TestClient(app)
    answer = client.get("/inner/lacking", headers=KEY)
    assert (answer.status_code, answer.text) == (403, "The machine lacks a right that this call needs.")
    assert answer.headers["www-authenticate"] == (
        f'Bearer realm="papaours", error="insufficient_scope", scope="{LACKING}"'
    )
    assert answer.headers["cache-control"] == "no-store"
    answer = client.get("/inner/nobody", headers={"Accept-Language": "fr"})
    assert (answer.status_code, answer.headers["content-language"]) == (401, "fr")
    assert answer.headers["www-authenticate"] == 'Bearer realm="papaours"'
    assert answer.text.startswith("Envoyez une clé API")


def test_starlette_with_our_handlers_gives_the_problem_document(waiting: AsyncAuthenticator) -> None:
    app = Starlette(routes=[Route("/lacking", lacking)], exception_handlers=ours.exception_handlers)
    answer = TestClient(PapaoursAuthMiddleware(app, authenticator=waiting)).get("/lacking", headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_rights")


def test_what_starlettes_require_raises_is_both(waiting: AsyncAuthenticator) -> None:
    app = Recorded()
    run_asgi(PapaoursAuthMiddleware(app, authenticator=waiting), http_scope(headers=KEY.items()))
    with pytest.raises(ours.HTTPRefused) as refused:
        ours.require(Request(app.scopes[0]), LACKING)
    assert refused.value.reason is Reason.INSUFFICIENT_RIGHTS
    assert refused.value.known is not None
    assert refused.value.needs == (LACKING,)
    assert refused.value.status_code == 403
    copy = refused.value.copy()
    assert (copy.reason, copy.needs, copy.known) == (refused.value.reason, (LACKING,), refused.value.known)


def test_a_mounted_fastapi_app_answers_alone(waiting: AsyncAuthenticator) -> None:
    auth = PapaoursAuth(authenticator=waiting)
    inner, outer = FastAPI(), FastAPI()

    @inner.get("/lacking")
    def never(caller: Annotated[Identity, Security(auth, scopes=[LACKING])]) -> str:
        return "never"

    @inner.get("/contracts")
    def contracts(caller: Annotated[Identity, Security(auth)]) -> str:
        return caller.machine.name

    outer.mount("/inner", inner)
    for app in (outer, inner):
        prefix = "/inner" if app is outer else ""
        client = FastAPIClient(app)
        answer = client.get(f"{prefix}/lacking", headers=KEY)
        assert (answer.status_code, answer.json()) == (
            403,
            {"detail": "The machine lacks a right that this call needs."},
        )
        assert "insufficient_scope" in answer.headers["www-authenticate"]
        assert client.get(f"{prefix}/contracts").status_code == 401
        assert client.get(f"{prefix}/contracts", headers={"X-API-KEY": SEED + "0"}).status_code == 401
        assert client.get(f"{prefix}/contracts", headers=KEY).json() == "Service de facturation"


# finding 16: what comes after the last byte


@pytest.mark.parametrize("spool", [False, True])
def test_pitfall_44_an_answer_is_completed_with_its_last_byte_whatever_the_background_does(
    waiting: AsyncAuthenticator, kept: Kept, spool: bool, tmp_path: Any
) -> None:
    if spool:
        from papaours_auth.usage import CallableSink, Recorder

        kept.recorder = Recorder(CallableSink(kept.batches.append), interval=3600.0, spool=tmp_path / "spool")

    async def slow() -> None:
        await asyncio.sleep(0.3)

    async def fails() -> None:
        raise LookupError

    async def lost() -> None:
        raise ConnectionResetError

    async def cancelled() -> None:
        raise asyncio.CancelledError

    def page(background: Any) -> Any:
        return lambda request: PlainTextResponse("ok", background=BackgroundTask(background))

    tasks = (slow, fails, lost, cancelled)
    app = Starlette(routes=[Route(f"/{task.__name__}", page(task)) for task in tasks])
    guarded = PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder)
    client = TestClient(guarded, headers=KEY, raise_server_exceptions=False)
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            client.get(f"/{task.__name__}")
    events = kept.events()
    assert [(event.route, event.status, event.outcome) for event in events] == [
        (f"/{task.__name__}", 200, "completed") for task in tasks
    ]
    assert events[0].duration < 250_000
    kept.recorder.close()


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (1000, "completed"),
        (1001, "completed"),
        (1005, "completed"),
        (None, "completed"),
        (1006, "gone"),
        (1011, "gone"),
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_a_websocket_that_its_client_closes_normally_is_completed(
    waiting: AsyncAuthenticator, kept: Kept, code: int | None, outcome: str, raises: bool
) -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        if raises:
            raise WebSocketDisconnect(message.get("code", 1005))

    disconnect: dict[str, Any] = {"type": "websocket.disconnect", **({"code": code} if code else {})}
    incoming: list[dict[str, Any]] = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "a"},
        disconnect,
    ]
    guarded = PapaoursAuthMiddleware(echo, authenticator=waiting, usage=kept.recorder)
    with suppress(WebSocketDisconnect):
        run_asgi(guarded, websocket_scope(KEY.items()), incoming)
    (event,) = kept.events()
    assert (event.status, event.outcome) == (101, "failed" if raises and outcome == "gone" else outcome)


def test_respond_is_public(waiting: AsyncAuthenticator) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(Refused(Reason.UNKNOWN_KEY), scope, send)

    start, _ = run_asgi(PapaoursAuthMiddleware(app, authenticator=waiting), http_scope(headers=KEY.items()))
    assert start["status"] == 401
