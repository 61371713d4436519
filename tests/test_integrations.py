"""Starlette, FastAPI and Flask beyond the conformance table: what each adds of its own."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the endpoints below, which are local.
import asyncio
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Security
from fastapi.testclient import TestClient as FastAPIClient
from flask import Flask
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from papaours_auth import AsyncAuthenticator, Authenticator, Identity, InvalidInput, Keys, PepperRing
from papaours_auth.fastapi import PapaoursAuth as FastAPIAuth
from papaours_auth.flask import PapaoursAuth as FlaskAuth
from papaours_auth.flask import identity as flask_identity
from papaours_auth.starlette import PapaoursAuthMiddleware, exception_handlers, identity, refuse, require
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from support.calls import http_scope

SEED = "pk_prod_abc123def456ghi789"
BEARER = {"Authorization": f"Bearer {SEED}"}
LACKING = 'Bearer realm="papaours", error="insufficient_scope", scope="contrats:suppression"'


# Starlette


@requires("contrats:lecture")
def may_read(request: Request) -> Response:
    return JSONResponse({"user": request.user.display_name, "scopes": sorted(request.auth.scopes)})


@requires("contrats:suppression")
def may_delete(request: Request) -> Response:
    return Response(status_code=204)


def ours(request: Request) -> Response:
    org = request.query_params.get("org")
    caller = (
        require(request, "contrats:lecture", organisation=org)
        if org
        else require(request, "contrats:lecture")
    )
    return JSONResponse({"caller": caller.machine.name})


def ours_lacking(request: Request) -> Response:
    require(request, "contrats:lecture", "contrats:suppression")
    return Response(status_code=204)


def whoever(request: Request) -> Response:
    return JSONResponse({"caller": identity(request).key.name})


def breaks(request: Request) -> Response:
    raise ZeroDivisionError


def starlette(waiting: AsyncAuthenticator, **options: Any) -> TestClient:
    endpoints = (may_read, may_delete, ours, ours_lacking, whoever, breaks)
    app = Starlette(
        routes=[Route(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints],
        middleware=[Middleware(PapaoursAuthMiddleware, authenticator=waiting, **options)],
        exception_handlers=exception_handlers,
    )
    return TestClient(app, headers=BEARER, raise_server_exceptions=False)


def test_starlettes_own_requires_reads_the_rights(waiting: AsyncAuthenticator) -> None:
    client = starlette(waiting)
    assert client.get("/may_read").json() == {
        "user": "Service de facturation",
        "scopes": ["contrats:lecture"],
    }
    assert client.get("/may_delete").status_code == 403


def test_require_answers_a_lacking_right_by_the_one_table(waiting: AsyncAuthenticator) -> None:
    client = starlette(waiting)
    assert client.get("/ours").json() == {"caller": "Service de facturation"}
    assert client.get("/ours?org=cfa-lyon").status_code == 200
    assert client.get("/ours?org=cfa-paris").status_code == 403
    answer = client.get("/ours_lacking")
    assert answer.status_code == 403
    assert answer.json()["code"] == "insufficient_rights"
    assert (
        answer.headers["www-authenticate"]
        == 'Bearer realm="papaours", error="insufficient_scope", scope="contrats:lecture contrats:suppression"'
    )


def test_an_endpoint_that_wants_a_caller_refuses_an_anonymous_one(waiting: AsyncAuthenticator) -> None:
    client = starlette(waiting, required=False)
    assert client.get("/whoever").json() == {"caller": "Production - Service Facturation"}
    del client.headers["authorization"]
    answer = client.get("/whoever")
    assert (answer.status_code, answer.json()["code"]) == (401, "missing_key")
    assert client.get("/may_read").status_code == 403  # Starlette's own word for it


def test_the_handler_answers_no_other_error(waiting: AsyncAuthenticator) -> None:
    request = Request(http_scope())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(refuse(request, ZeroDivisionError()))


def test_another_error_is_not_answered_for_it(waiting: AsyncAuthenticator) -> None:
    assert starlette(waiting).get("/breaks").status_code == 500


# FastAPI


def test_pitfall_34_a_guard_takes_no_other_authenticators_word(ring: PepperRing) -> None:
    """A test key let in by a dependency of the whole app must not reach a production route (fastapi#469)."""
    store = MemoryStore()
    admin = Keys(store, peppers=ring)
    admin.create_machine("Service", organisation="cfa-lyon")
    texts = {
        environment: admin.create_key(
            "Service", name=f"Service {environment}", environment=environment
        ).secret.reveal()
        for environment in ("test", "prod")
    }
    auths = {
        environment: FastAPIAuth(
            authenticator=AsyncAuthenticator(AsyncMemoryStore(store), environment=environment, peppers=ring)
        )
        for environment in ("test", "prod")
    }
    app = FastAPI(dependencies=[Security(auths["test"])])

    @app.get("/production")
    def production(caller: Annotated[Identity, Security(auths["prod"])]) -> str:
        return caller.key.environment

    for auth in auths.values():
        auth.install(app)
    with FastAPIClient(app) as client:
        for text in texts.values():
            answer = client.get("/production", headers={"X-API-KEY": text})
            assert (answer.status_code, answer.json()["code"]) == (401, "wrong_environment")
    for auth in auths.values():
        asyncio.run(auth.authenticator.aclose())


def fastapi_app(auth: FastAPIAuth) -> FastAPI:
    app = FastAPI()
    auth.install(app)

    @app.get("/open")
    def open_() -> dict[str, str]:
        return {"hello": "world"}

    @app.get("/contracts")
    def contracts(caller: Annotated[Identity, Security(auth, scopes=["contrats:lecture"])]) -> dict[str, str]:
        return {"caller": caller.machine.name}

    @app.delete("/contracts")
    def delete(caller: Annotated[Identity, Security(auth, scopes=["contrats:suppression"])]) -> None:
        raise AssertionError(caller)

    @app.get("/maybe")
    def maybe(caller: Annotated[Identity | None, Security(auth)]) -> dict[str, bool]:
        return {"known": caller is not None}

    return app


def test_a_fastapi_dependency_gives_the_identity_and_asks_for_rights(waiting: AsyncAuthenticator) -> None:
    with FastAPIClient(fastapi_app(FastAPIAuth(authenticator=waiting))) as client:
        assert client.get("/open").json() == {"hello": "world"}
        assert "cache-control" not in client.get("/open", headers=BEARER).headers
        answer = client.get("/contracts", headers=BEARER)
        assert answer.json() == {"caller": "Service de facturation"}
        assert answer.headers["cache-control"] == "private"
        assert client.get("/contracts").json()["code"] == "missing_key"
        assert client.get("/maybe").status_code == 401
        refused = client.delete("/contracts", headers=BEARER)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (403, LACKING)


def test_a_fastapi_dependency_may_let_anonymous_callers_in(waiting: AsyncAuthenticator) -> None:
    with FastAPIClient(fastapi_app(FastAPIAuth(authenticator=waiting, required=False))) as client:
        assert client.get("/maybe").json() == {"known": False}
        assert client.get("/maybe", headers=BEARER).json() == {"known": True}
        assert client.get("/maybe", headers={"X-API-KEY": "x"}).status_code == 401
        assert client.get("/contracts").status_code == 401  # it asks for a right


def test_the_openapi_document_names_both_ways_to_send_a_key(waiting: AsyncAuthenticator) -> None:
    document = fastapi_app(FastAPIAuth(authenticator=waiting)).openapi()
    schemes = document["components"]["securitySchemes"]
    assert schemes["PapaoursBearer"]["scheme"] == "bearer"
    assert (schemes["PapaoursApiKey"]["in"], schemes["PapaoursApiKey"]["name"]) == ("header", "X-API-KEY")
    assert "secret" in schemes["PapaoursBearer"]["description"]
    named = {name for need in document["paths"]["/contracts"]["get"]["security"] for name in need}
    assert named == {"PapaoursBearer", "PapaoursApiKey"}
    assert "security" not in document["paths"]["/open"]["get"]


def test_fastapi_starts_and_stops_its_own_authenticator(memory: MemoryStore, ring: PepperRing) -> None:
    auth = FastAPIAuth(environment="prod", store=AsyncMemoryStore(memory), peppers=ring)
    with FastAPIClient(fastapi_app(auth)):
        assert auth.authenticator._watcher is not None
    assert auth.authenticator._watcher is None


# Flask


def flask_app(auth: FlaskAuth) -> Flask:
    app = Flask(__name__)
    auth.init_app(app)

    @app.get("/open")
    def open_() -> str:
        return "hello"

    @app.get("/contracts")
    @auth.required("contrats:lecture")
    def contracts() -> str:
        return flask_identity().machine.name

    @app.get("/elsewhere")
    @auth.required("contrats:lecture", organisation="cfa-paris")
    def elsewhere() -> str:
        raise AssertionError

    @app.get("/delete")
    @auth.required("contrats:suppression")
    def delete() -> str:
        raise AssertionError

    return app


@pytest.mark.parametrize("options", [{}, {"everywhere": False}], ids=["guarded", "by the decorator alone"])
def test_a_flask_view_asks_for_rights(blocking: Authenticator, options: dict[str, Any]) -> None:
    client = flask_app(FlaskAuth(authenticator=blocking, **options)).test_client()
    answer = client.get("/contracts", headers=BEARER)
    assert answer.text == "Service de facturation"
    assert answer.headers["Cache-Control"] == "private"
    refused = client.get("/delete", headers=BEARER)
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (403, LACKING)
    assert client.get("/elsewhere", headers=BEARER).status_code == 403
    without = client.get("/contracts")
    assert (without.status_code, without.get_json(force=True)["code"]) == (401, "missing_key")


def test_without_any_guarded_path_flasks_other_views_are_open(blocking: Authenticator) -> None:
    client = flask_app(FlaskAuth(authenticator=blocking, everywhere=False)).test_client()
    answer = client.get("/open")
    assert answer.text == "hello"
    assert "Cache-Control" not in answer.headers


def test_an_anonymous_caller_is_refused_where_a_view_asks_who_it_is(blocking: Authenticator) -> None:
    client = flask_app(FlaskAuth(authenticator=blocking, required=False)).test_client()
    assert client.get("/open").text == "hello"
    assert client.get("/contracts").status_code == 401


def test_one_extension_serves_several_flask_apps(blocking: Authenticator) -> None:
    auth = FlaskAuth(authenticator=blocking)
    for app in (flask_app(auth), flask_app(auth)):
        assert app.test_client().get("/contracts", headers=BEARER).status_code == 200
    alone = Flask("alone")
    FlaskAuth(alone, authenticator=blocking)
    assert alone.test_client().get("/").status_code == 401


def test_a_right_that_could_never_match_stops_a_flask_view_at_once(blocking: Authenticator) -> None:
    with pytest.raises(InvalidInput):
        FlaskAuth(authenticator=blocking).required("contrats:voler")
