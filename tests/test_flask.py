"""Flask beyond the conformance table: decorators, the app's own error handlers, and several guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Blueprint, Flask, jsonify, redirect, request
from flask.views import MethodView
from werkzeug.exceptions import Forbidden, HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from papaours_auth import Authenticator, ConfigurationError, InvalidInput, Keys, PepperRing, Reason, Refused
from papaours_auth.flask import HTTPRefused, PapaoursAuth, identity, require
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.wsgi import PapaoursAuthMiddleware
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
KEY = {"X-API-KEY": SEED}
BAD = {"X-API-KEY": "nonsense"}


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


def app_of(blocking: Authenticator, **options: Any) -> tuple[Flask, PapaoursAuth]:
    app = Flask("contracts")
    return app, PapaoursAuth(app, authenticator=blocking, **options)


# pitfall 41: decorators


def add_views(app: Flask, auth: PapaoursAuth) -> None:
    @app.get("/key")
    @auth.required
    def key_alone() -> str:
        return identity().machine.name

    @app.get("/right")
    @auth.required("contrats:lecture")
    def right() -> str:
        return identity().machine.name

    @app.get("/lacking")
    @auth.required("contrats:suppression")
    def lacking() -> str:
        raise AssertionError("reached")

    @app.get("/async/key")
    @auth.required
    async def async_key_alone() -> str:
        return identity().machine.name

    @app.get("/async/right")
    @auth.required("contrats:lecture")
    async def async_right() -> str:
        return identity().machine.name

    @app.get("/async/lacking")
    @auth.required("contrats:suppression")
    async def async_lacking() -> str:
        raise AssertionError("reached")

    class Contracts(MethodView):
        decorators = [auth.required("contrats:lecture")]  # noqa: RUF012 - as Flask has it

        async def get(self) -> str:
            return identity().machine.name

        def post(self) -> str:
            return require("contrats:lecture").machine.name

    app.add_url_rule("/class", view_func=Contracts.as_view("contracts"))


@pytest.mark.parametrize("options", [{}, {"everywhere": False}, {"exempt": ["/key", "/async/*"]}], ids=str)
def test_pitfall_41_a_view_is_guarded_whatever_it_is(
    blocking: Authenticator, options: dict[str, Any]
) -> None:
    """flask-login#589: an async view under a decorator that is not."""
    app, auth = app_of(blocking, **options)
    add_views(app, auth)
    client = app.test_client()
    for path in ("/key", "/right", "/async/key", "/async/right", "/class"):
        answer = client.get(path, headers=KEY)
        assert (answer.status_code, answer.text) == (200, "Service de facturation"), path
        assert answer.headers["Cache-Control"] == "private"
        assert client.get(path).get_json()["code"] == "missing_key"
        assert client.get(path, headers=BAD).get_json()["code"] == "malformed_key"
    assert client.post("/class", headers=KEY).text == "Service de facturation"
    for path in ("/lacking", "/async/lacking"):
        answer = client.get(path, headers=KEY)
        assert (answer.status_code, answer.get_json()["code"]) == (403, "insufficient_rights")
        assert 'scope="contrats:suppression"' in answer.headers["WWW-Authenticate"]


def test_parentheses_without_a_right_are_an_error(blocking: Authenticator) -> None:
    _, auth = app_of(blocking)
    computed: list[str] = []
    wrong: list[Callable[[], Any]] = [
        lambda: auth.required(),  # type: ignore[call-overload]
        lambda: auth.required(*computed),
        lambda: auth.required(""),
        lambda: auth.required("contrats"),
        lambda: auth.required(organisation="cfa-lyon"),  # type: ignore[call-overload]
        lambda: auth.required("contrats:lecture", organisation=None),  # type: ignore[call-overload]
        lambda: auth.required("contrats:lecture", organisation=""),
        lambda: auth.required("contrats:lecture", organisation="a", organisation_from="b"),
        lambda: auth.required(lambda: "", organisation="a"),  # type: ignore[call-overload]
    ]
    for attempt in wrong:
        with pytest.raises(InvalidInput):
            attempt()


# whose data


def organisation_app(blocking: Authenticator) -> Flask:
    app, auth = app_of(blocking)

    @app.get("/named")
    @auth.required("contrats:lecture", organisation="cfa-lyon")
    def named() -> str:
        return "in"

    @app.get("/argument/<org>")
    @auth.required("contrats:lecture", organisation_from="org")
    def argument(org: str) -> str:
        return org

    @app.get("/misspelt/<org>")
    @auth.required("contrats:lecture", organisation_from="organisation")
    def misspelt(org: str) -> str:
        raise AssertionError("reached")

    @app.get("/query")
    @auth.required("contrats:lecture", organisation=lambda: request.args["org"])
    async def query() -> str:
        return request.args["org"]

    @app.get("/lost")
    @auth.required("contrats:lecture", organisation=lambda: request.args.get("org"))  # type: ignore[arg-type,return-value]
    def lost() -> str:
        return "in"

    return app


def test_the_organisation_comes_from_the_request(ring: PepperRing) -> None:
    store = MemoryStore()
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service", organisation="cfa-lyon", rights=["contrats:lecture"])
    key = {"X-API-KEY": keys.create_key(machine.id, name="Service", environment="prod").secret.reveal()}
    with Authenticator(store, environment="prod", peppers=ring) as authenticator:
        client = organisation_app(authenticator).test_client()
        for path in ("/named", "/argument/cfa-lyon", "/query?org=cfa-lyon", "/lost?org=cfa-lyon"):
            assert client.get(path, headers=key).status_code == 200, path
        for path in ("/argument/cfa-paris", "/query?org=cfa-paris", "/lost?org=cfa-paris"):
            assert client.get(path, headers=key).get_json()["code"] == "insufficient_rights", path
        for path in ("/lost", "/lost?org=", "/misspelt/cfa-lyon"):  # a mistake of the app's lets nobody in
            assert client.get(path, headers=key).status_code == 500, path
        assert client.get("/query", headers=key).status_code == 400  # Flask's own for a missing argument


# the app's own handlers


def test_the_apps_own_handlers_answer_and_http_has_its_headers(blocking: Authenticator, kept: Kept) -> None:
    app, auth = app_of(blocking, everywhere=False, usage=kept.recorder)
    add_views(app, auth)

    @app.get("/raises")
    def raises() -> str:
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    @app.errorhandler(401)
    def unauthorized(error: HTTPException) -> Any:
        return jsonify(ours=error.description), 401

    @app.errorhandler(Forbidden)
    def forbidden(error: Forbidden) -> Any:
        assert isinstance(error, HTTPRefused)
        return jsonify(ours=error.reason), 403, {"Cache-Control": "private, no-cache"}

    client = app.test_client()
    answer = client.get("/right", headers={"Accept-Language": "fr"})
    assert (answer.status_code, answer.get_json()["ours"][:12]) == (401, "Envoyez une ")
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="papaours"'
    assert answer.headers["Cache-Control"] == "no-store"
    for path in ("/lacking", "/async/lacking", "/raises"):
        answer = client.get(path, headers=KEY)
        assert (answer.status_code, answer.json) == (403, {"ours": "insufficient_rights"})
        assert answer.headers["Cache-Control"] == "private, no-cache"
        assert answer.headers["WWW-Authenticate"].startswith(
            'Bearer realm="papaours", error="insufficient_scope"'
        )
    assert [(event.status, event.reason) for event in kept.events()] == [(403, "insufficient_rights")] * 3
    counted = [entry[1:] for batch in kept.batches for entry in batch.refusals]
    assert counted == [("missing_key", "127.0.0.0/24", 1)]


def test_a_handler_of_all_http_errors_may_use_what_werkzeug_gives_it(blocking: Authenticator) -> None:
    app, auth = app_of(blocking)
    add_views(app, auth)

    @app.errorhandler(HTTPException)
    def any_of_them(error: HTTPException) -> Any:
        response: Any = error.get_response()
        assert dict(error.get_headers())["Content-Type"] == "application/problem+json"
        assert error.get_body() == response.get_data(as_text=True)
        return response

    answer = app.test_client().get("/lacking", headers=KEY)
    assert (answer.status_code, answer.get_json()["code"]) == (403, "insufficient_rights")


def test_an_app_that_traps_http_errors_is_answered_too(blocking: Authenticator) -> None:
    app, auth = app_of(blocking)
    app.config["TRAP_HTTP_EXCEPTIONS"] = True
    add_views(app, auth)
    assert app.test_client().get("/lacking", headers=KEY).get_json()["code"] == "insufficient_rights"


# what is recorded


@pytest.mark.parametrize(
    "options", [{"everywhere": False}, {"exempt": ["/key", "/lacking", "/async/*"]}], ids=str
)
def test_a_guard_that_stands_aside_records_what_its_views_asked_for(
    blocking: Authenticator, kept: Kept, options: dict[str, Any]
) -> None:
    app, auth = app_of(blocking, usage=kept.recorder, **options)
    add_views(app, auth)

    @app.get("/fails")
    @auth.required
    def fails() -> str:
        raise LookupError

    client = app.test_client()
    for path in ("/key", "/async/right", "/lacking", "/fails"):
        assert client.get(path, headers=KEY).data
    for headers in (BAD, {}):
        assert client.get("/key", headers=headers).data
    events = [(event.route, event.status, event.reason, event.outcome) for event in kept.events()]
    assert events == [
        ("/key", 200, "", "completed"),
        ("/async/right", 200, "", "completed"),
        ("/lacking", 403, "insufficient_rights", "completed"),
        ("/fails", 500, "", "completed"),
    ]
    counted = sorted(entry[1:] for batch in kept.batches for entry in batch.refusals)
    assert counted == [("malformed_key", "127.0.0.0/24", 1), ("missing_key", "127.0.0.0/24", 1)]


def test_an_error_of_a_view_that_reaches_the_server_is_recorded(blocking: Authenticator, kept: Kept) -> None:
    app, auth = app_of(blocking, usage=kept.recorder, everywhere=False)
    app.testing = True

    @app.get("/fails")
    @auth.required
    def fails() -> str:
        raise LookupError

    with pytest.raises(LookupError):
        app.test_client().get("/fails", headers=KEY)
    assert [(event.status, event.outcome) for event in kept.events()] == [(0, "failed")]


def test_requests_whose_environ_is_copied_are_each_recorded(blocking: Authenticator, kept: Kept) -> None:
    """As Werkzeug's test client has it when it follows a redirection."""
    app, auth = app_of(blocking, usage=kept.recorder, exempt=["/asked/*"])
    app.add_url_rule("/old", view_func=lambda: redirect("/new"))
    app.add_url_rule("/new", "new", lambda: redirect("/asked/1"))
    app.add_url_rule(
        "/asked/<name>", "asked", auth.required(lambda name: redirect("/asked/2") if name == "1" else "")
    )
    client = app.test_client()
    for headers in (KEY, BAD):
        client.get("/old", headers=headers, follow_redirects=True)
        client.get("/asked/1", headers=headers)
    routes = [event.route for event in kept.events()]
    assert routes == ["/old", "/new", "/asked/<name>", "/asked/<name>", "/asked/<name>"]
    counted = [entry[1:] for batch in kept.batches for entry in batch.refusals]
    assert counted == [("malformed_key", "127.0.0.0/24", 2)]


# several guards on one app


class TwoHouses:
    """Keys for two environments of one store, and an authenticator for each."""

    def __init__(self, ring: PepperRing) -> None:
        store = MemoryStore()
        keys = Keys(store, peppers=ring)
        machine = keys.create_machine("Service", organisation="cfa-lyon", rights=["contrats:lecture"])
        self.authenticators = {
            name: Authenticator(store, environment=name, peppers=ring) for name in ("test", "prod")
        }
        self.keys = {
            name: {
                "X-API-KEY": keys.create_key(
                    machine.id, name=f"Service {name}", environment=name
                ).secret.reveal()
            }
            for name in ("test", "prod")
        }


@pytest.fixture
def houses(ring: PepperRing) -> Iterator[TwoHouses]:
    houses = TwoHouses(ring)
    yield houses
    for authenticator in houses.authenticators.values():
        authenticator.close()


@pytest.mark.parametrize("options", [{"everywhere": False}, {"exempt": ["/prod", "/test"]}], ids=str)
def test_pitfall_34_a_decorator_judges_by_its_own_authenticator(
    houses: TwoHouses, options: dict[str, Any]
) -> None:
    """A test key on an app whose last guard accepts test keys reached the view that wants a production key."""
    app = Flask("two")
    auths = {
        name: PapaoursAuth(app, authenticator=houses.authenticators[name], **options)
        for name in ("prod", "test")
    }
    views = Blueprint("views", __name__)

    @views.get("/prod")
    @auths["prod"].required
    def prod() -> str:
        return identity().key.environment

    @views.get("/test")
    @auths["test"].required("contrats:lecture")
    def test() -> str:
        return identity().key.environment

    app.register_blueprint(views)
    client = app.test_client()
    for wanted in ("prod", "test"):
        for sent, key in houses.keys.items():
            answer = client.get(f"/{wanted}", headers=key)
            expected = (200, wanted) if sent == wanted else (401, "wrong_environment")
            assert (
                answer.status_code,
                answer.get_json()["code"] if answer.is_json else answer.text,
            ) == expected


def test_a_view_under_a_guard_that_is_not_its_apps_is_reached_by_nobody(houses: TwoHouses) -> None:
    elsewhere = PapaoursAuth(authenticator=houses.authenticators["prod"])
    app = Flask("mine")
    PapaoursAuth(app, authenticator=houses.authenticators["test"])

    @app.get("/prod")
    @elsewhere.required
    def prod() -> str:
        raise AssertionError("reached")

    assert app.test_client().get("/prod", headers=houses.keys["test"]).status_code == 500
    app.testing = True
    with pytest.raises(ConfigurationError, match="call its init_app"):
        app.test_client().get("/prod", headers=houses.keys["test"])


def test_a_refusal_that_another_guard_noted_is_not_ours(houses: TwoHouses) -> None:
    """Standing aside outside, for test keys: the mounted app's production guard judges anew."""
    app = Flask("inner")
    auth = PapaoursAuth(app, authenticator=houses.authenticators["prod"], exempt=["/"])

    @app.get("/")
    @auth.required
    def index() -> str:
        return identity().key.environment

    outer = PapaoursAuthMiddleware(
        DispatcherMiddleware(Flask("outer"), {"/inner": app}),
        authenticator=houses.authenticators["test"],
        everywhere=False,
    )
    shell = Flask("shell")
    shell.wsgi_app = outer  # type: ignore[method-assign]
    client = shell.test_client()
    assert client.get("/inner/", headers=houses.keys["prod"]).text == "prod"
    assert client.get("/inner/", headers=houses.keys["test"]).get_json()["code"] == "wrong_environment"


def test_a_mounted_app_without_guard_takes_whom_the_guard_around_it_found(blocking: Authenticator) -> None:
    inner = Flask("inner")

    @inner.get("/")
    def index() -> str:
        return require("contrats:lecture").machine.name

    app, _ = app_of(blocking, everywhere=False)
    app.wsgi_app = PapaoursAuthMiddleware(  # type: ignore[method-assign]
        DispatcherMiddleware(Flask("outer"), {"/inner": inner}), authenticator=blocking, everywhere=False
    )
    client = app.test_client()
    assert client.get("/inner/", headers=KEY).text == "Service de facturation"
    assert client.get("/inner/", headers=BAD).get_json()["code"] == "malformed_key"


def test_pitfall_35_a_router_that_ignores_a_trailing_slash_opens_nothing(blocking: Authenticator) -> None:
    """An exempt folder let ``/public/`` through, and such a router takes it for ``/public``, which is guarded."""
    app, _ = app_of(blocking, exempt=["/public/*"])
    app.url_map.strict_slashes = False
    app.add_url_rule("/public", view_func=lambda: "guarded")
    app.add_url_rule("/public/<name>", "file", view_func=lambda name: "open")
    client = app.test_client()
    assert [client.get(path).status_code for path in ("/public", "/public/", "/public/a")] == [401, 401, 200]
