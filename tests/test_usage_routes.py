"""Which route is recorded: the template where the framework tells it, else the path; and why an endpoint refused."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the endpoints below, which are local.
import inspect
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import starlette.routing
from fastapi import APIRouter, FastAPI, Security, WebSocket
from fastapi.testclient import TestClient as FastAPIClient
from flask import Blueprint, Flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

from papaours_auth import AsyncAuthenticator, Authenticator, Identity
from papaours_auth.asgi import PapaoursAuthMiddleware
from papaours_auth.fastapi import PapaoursAuth as FastAPIAuth
from papaours_auth.flask import PapaoursAuth as FlaskAuth
from papaours_auth.starlette import exception_handlers, require
from support.calls import http_scope, run_asgi, websocket_scope
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
KEY = {"X-API-KEY": SEED}
TELLS_ROUTES = 'scope["route"]' in inspect.getsource(starlette.routing)


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


def recorded(kept: Kept) -> list[tuple[str, int]]:
    return [(event.route, event.status) for event in kept.events()]


def page(request: Request) -> Response:
    return PlainTextResponse("ok")


def lacking(request: Request) -> Response:
    require(request, "contrats:suppression")
    return PlainTextResponse("never")


async def live(socket: Any) -> None:
    await socket.accept()
    await socket.close()


@pytest.mark.skipif(not TELLS_ROUTES, reason="this Starlette does not say which route it took")
def test_starlette_tells_the_template_of_a_route_and_of_one_in_a_mounted_app(
    waiting: AsyncAuthenticator, kept: Kept
) -> None:
    inner = Starlette(routes=[Route("/rows/{row}", page)])
    app = Starlette(
        routes=[
            Route("/contracts/{number:int}", page),
            Mount("/reports", inner),
            WebSocketRoute("/live/{id}", live),
        ]
    )
    client = TestClient(PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder), headers=KEY)
    for path in ("/contracts/7", "/reports/rows/9", "/reports/none", "/none/5"):
        client.get(path)
    with client.websocket_connect("/live/3"):
        pass
    assert recorded(kept) == [
        ("/contracts/{number:int}", 200),
        ("/reports/rows/{row}", 200),
        ("/reports", 404),
        ("/none/5", 404),
        ("/live/{id}", 101),
    ]


def test_a_framework_that_tells_nothing_leaves_the_path(waiting: AsyncAuthenticator, kept: Kept) -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = "of another kind"
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    guarded = PapaoursAuthMiddleware(plain, authenticator=waiting, usage=kept.recorder)
    run_asgi(guarded, http_scope("/a/" + "x" * 5000, KEY.items()))
    assert [(event.route, event.status) for event in kept.events()] == [("/a/" + "x" * 253, 200)]


def test_fastapi_tells_the_template_with_the_prefix_of_its_router(
    waiting: AsyncAuthenticator, kept: Kept
) -> None:
    router = APIRouter(prefix="/v1")

    @router.get("/contracts/{number}")
    def contract(number: int) -> int:
        return number

    app = FastAPI()
    app.include_router(router)
    client = FastAPIClient(
        PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder), headers=KEY
    )
    client.get("/v1/contracts/7")
    client.get("/v1/contracts/x")
    assert recorded(kept) == [("/v1/contracts/{number}", 200), ("/v1/contracts/{number}", 422)]


def test_flask_tells_the_rule_with_the_prefix_of_its_blueprint(blocking: Authenticator, kept: Kept) -> None:
    app, part = Flask("papaours-tests"), Blueprint("part", __name__, url_prefix="/v1")
    auth = FlaskAuth(app, authenticator=blocking, usage=kept.recorder)

    @part.get("/contracts/<int:number>")
    def contract(number: int) -> str:
        return str(number)

    @app.get("/lacking")
    @auth.required("contrats:suppression")
    def never() -> str:
        return "never"

    app.register_blueprint(part)
    client = app.test_client()
    for path in ("/v1/contracts/7", "/v1/contracts/x", "/lacking"):
        client.get(path, headers=KEY).close()
    assert [(event.route, event.status, event.reason) for event in kept.events()] == [
        ("/v1/contracts/<int:number>", 200, ""),
        ("/v1/contracts/x", 404, ""),
        ("/lacking", 403, "insufficient_rights"),
    ]


def test_why_an_endpoint_refused_is_recorded(waiting: AsyncAuthenticator, kept: Kept) -> None:
    app = Starlette(routes=[Route("/lacking", lacking)], exception_handlers=exception_handlers)
    client = TestClient(PapaoursAuthMiddleware(app, authenticator=waiting, usage=kept.recorder), headers=KEY)
    assert client.get("/lacking").status_code == 403
    assert [(event.status, event.reason) for event in kept.events()] == [(403, "insufficient_rights")]


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("http.response.pathsend", "completed"),
        ("http.response.trailers", "gone"),
        ("http.response.body", "completed"),
    ],
)
def test_an_answer_that_the_server_sends_from_a_file_is_whole(
    waiting: AsyncAuthenticator, kept: Kept, kind: str, outcome: str
) -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": kind})

    guarded = PapaoursAuthMiddleware(plain, authenticator=waiting, usage=kept.recorder)
    run_asgi(guarded, http_scope("/file", KEY.items()))
    assert [event.outcome for event in kept.events()] == [outcome]


@pytest.mark.parametrize(
    ("sent", "status", "outcome"),
    [
        ([{"type": "websocket.accept"}], 101, "gone"),
        ([{"type": "websocket.accept"}, {"type": "websocket.close"}], 101, "completed"),
        ([{"type": "websocket.close"}], 403, "completed"),
        (
            [
                {"type": "websocket.http.response.start", "status": 418},
                {"type": "websocket.http.response.body"},
            ],
            418,
            "completed",
        ),
    ],
)
def test_a_websocket_is_one_call(
    waiting: AsyncAuthenticator, kept: Kept, sent: list[Any], status: int, outcome: str
) -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        for message in sent:
            await send(message)

    guarded = PapaoursAuthMiddleware(plain, authenticator=waiting, usage=kept.recorder)
    run_asgi(guarded, websocket_scope(KEY.items()))
    assert [(event.method, event.status, event.outcome) for event in kept.events()] == [
        ("WEBSOCKET", status, outcome)
    ]


# FastAPI's dependency, without the middleware


def fastapi(auth: FastAPIAuth) -> FastAPI:
    app = FastAPI()
    auth.install(app)

    @app.get("/open")
    def anybody() -> str:
        return "ok"

    @app.get("/contracts/{number}")
    def contract(number: int, caller: Annotated[Identity, Security(auth)]) -> int:
        return number

    @app.get("/lacking")
    def never(caller: Annotated[Identity, Security(auth, scopes=["contrats:suppression"])]) -> str:
        return "never"

    @app.get("/fails")
    def fails(caller: Annotated[Identity, Security(auth)]) -> str:
        raise LookupError

    @app.websocket("/live")
    async def socket(websocket: WebSocket, caller: Annotated[Identity, Security(auth)]) -> None:
        await live(websocket)

    return app


def ask(app: Any) -> None:
    client = FastAPIClient(app, raise_server_exceptions=False)
    for path in ("/contracts/7", "/lacking", "/fails", "/open"):
        client.get(path, headers=KEY)
    client.get("/contracts/7", headers={"X-API-KEY": SEED + "0"})
    client.get("/contracts/7")
    with client.websocket_connect("/live", headers=KEY):
        pass


DEPENDED = [
    ("/contracts/{number}", 200, "", "completed"),
    ("/lacking", 403, "insufficient_rights", "completed"),
    ("/fails", 0, "", "failed"),
    ("/live", 101, "", "completed"),
]


def test_the_dependency_alone_records_whom_it_found(waiting: AsyncAuthenticator, kept: Kept) -> None:
    ask(fastapi(FastAPIAuth(authenticator=waiting, usage=kept.recorder)))
    assert [(e.route, e.status, e.reason, e.outcome) for e in kept.events()] == DEPENDED
    assert all(event.address == "testclient" and event.duration >= 0 for event in kept.events())
    counted = {entry.reason: entry.calls for batch in kept.batches for entry in batch.refusals}
    assert counted == {"unknown_key": 1, "missing_key": 1}


def test_the_dependency_without_usage_records_nothing(waiting: AsyncAuthenticator, kept: Kept) -> None:
    ask(fastapi(FastAPIAuth(authenticator=waiting)))
    assert kept.events() == []


def test_the_dependency_under_the_middleware_records_nothing_twice(
    waiting: AsyncAuthenticator, kept: Kept
) -> None:
    app = fastapi(FastAPIAuth(authenticator=waiting, usage=kept.recorder))
    guarded = PapaoursAuthMiddleware(
        app, authenticator=waiting, usage=kept.recorder, exempt=["/contracts/*"], preflight="pass"
    )
    ask(guarded)
    # The middleware also sees the 500 that Starlette sends for what an endpoint raises.
    assert sorted(recorded(kept)) == [
        ("/contracts/{number}", 200),
        ("/fails", 500),
        ("/lacking", 403),
        ("/live", 101),
        ("/open", 200),
    ]


def test_the_dependency_records_under_a_middleware_that_does_not(
    waiting: AsyncAuthenticator, kept: Kept
) -> None:
    app = fastapi(FastAPIAuth(authenticator=waiting, usage=kept.recorder))
    client = FastAPIClient(PapaoursAuthMiddleware(app, authenticator=waiting), headers=KEY)
    client.get("/contracts/7")
    assert recorded(kept) == [("/contracts/{number}", 200)]


def test_install_starts_the_recorder_and_closes_it(waiting: AsyncAuthenticator, kept: Kept) -> None:
    app = fastapi(FastAPIAuth(authenticator=waiting, usage=kept.recorder))
    with FastAPIClient(app, headers=KEY) as client:
        client.get("/contracts/7")
        assert kept.recorder.health().running
    assert kept.recorder.stats().delivered == 1
    assert not kept.recorder.health().running
