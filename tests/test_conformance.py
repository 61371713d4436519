"""One table of requests, sent to five integrations: all must answer alike, to the letter.

Headers are given as a client sends them; each driver hands them over as its servers do: ASGI one by one in small
letters, WSGI joined by commas under HTTP_….
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote
from wsgiref.validate import validator

import pytest
from fastapi import Depends, FastAPI, Security
from fastapi import Request as FastAPIRequest
from fastapi.responses import JSONResponse as FastAPIJSONResponse
from flask import Flask, jsonify, request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from conftest import ManualClock
from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    Keys,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
)
from papaours_auth import flask as papaours_flask
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.asgi import identity_of as asgi_identity
from papaours_auth.asgi import require
from papaours_auth.fastapi import PapaoursAuth
from papaours_auth.flask import require as flask_require
from papaours_auth.starlette import PapaoursAuthMiddleware as StarletteMiddleware
from papaours_auth.starlette import exception_handlers
from papaours_auth.starlette import require as starlette_require
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.throttle import Throttle
from papaours_auth.verify import Claim
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware
from papaours_auth.wsgi import identity_of as wsgi_identity
from papaours_auth.wsgi import require as wsgi_require

SEED = "pk_prod_abc123def456ghi789"
RIGHT = "contrats:lecture"
METHODS = ["GET", "HEAD", "POST", "OPTIONS"]
Headers = list[tuple[str, str | bytes]]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


@dataclass(frozen=True)
class Row:
    """A request, and what is expected of every integration."""

    what: str
    headers: Headers
    status: int
    code: str = ""  # of a refusal; empty: the app answered
    caller: str | None = "Service de facturation"  # whom the app saw
    path: str = "/contracts"
    method: str = "GET"
    client: str = "203.0.113.9"
    root: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    sent: Mapping[str, str] = field(default_factory=dict)  # headers of the answer
    broken: bool = False  # the store cannot answer


def bearer(key: str) -> Headers:
    return [("Authorization", f"Bearer {key}")]


def x_api_key(key: str) -> Headers:
    return [("X-API-KEY", key)]


# Names for keys that are made anew in each run: see `estate`.
GOOD, OTHER, TEST, INACTIVE, EXPIRED, OFF, NETWORK = (
    "{good} {other} {test} {inactive} {expired} {off} {network}".split()
)
UNKNOWN = "pk_prod_0123456789abcdef"

EXEMPT = {"exempt": ["/healthz", "/public/*"]}
ASIDE = {"everywhere": False}
OPTIONAL = {"required": False}
PREFLIGHT: Headers = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "GET")]
PROXY = {"trusted_proxies": ["10.0.0.0/8", "2001:db8:ffff::/48"]}
CHALLENGE = {"www-authenticate": 'Bearer realm="papaours"'}
INVALID = {"www-authenticate": 'Bearer realm="papaours", error="invalid_token"'}
AMBIGUOUS = {"www-authenticate": 'Bearer realm="papaours", error="invalid_request"'}
DATE = "Sun, 29 Nov 2026 12:00:00 GMT"
PRIVATE = {"cache-control": "private"}
NO_STORE = {"cache-control": "no-store", "content-type": "application/problem+json"}


def refused(what: str, headers: Headers, status: int, code: str, **more: Any) -> Row:
    sent = {**NO_STORE, **more.pop("sent", {})}
    return Row(what, headers, status, code, None, sent=sent, **more)


def anonymous(what: str, headers: Headers, **more: Any) -> Row:
    return Row(what, headers, 200, "", None, **more)


ROWS = [
    # a key, however it is sent
    Row("Bearer", bearer(GOOD), 200, sent=PRIVATE),
    Row("X-API-KEY", x_api_key(GOOD), 200, sent=PRIVATE),
    Row("the seed's key by Bearer", bearer(SEED), 200),
    Row("the seed's key by X-API-KEY", x_api_key(SEED), 200),
    Row("header name in small letters", [("x-api-key", GOOD)], 200),
    Row("header name in capitals", [("AUTHORIZATION", f"Bearer {GOOD}")], 200),
    Row("pitfall 4: scheme in small letters", [("Authorization", f"bearer {GOOD}")], 200),
    Row("pitfall 4: scheme in capitals", [("Authorization", f"BEARER {GOOD}")], 200),
    Row("pitfall 4: two spaces after the scheme", [("Authorization", f"Bearer  {GOOD}")], 200),
    Row("blanks around the header's value", [("Authorization", f"Bearer {GOOD} ")], 200),
    Row("blanks around X-API-KEY", [("X-API-KEY", f" \t{GOOD} ")], 200),
    Row("pitfall 3: the same key in both headers", [*bearer(GOOD), *x_api_key(GOOD)], 200),
    Row("a JWT beside an X-API-KEY", [*bearer("eyJhbGciOi.eyJzdWIi.c2ln"), *x_api_key(GOOD)], 200),
    Row("Basic beside an X-API-KEY", [("Authorization", "Basic dXNlcjpwYXNz"), *x_api_key(GOOD)], 200),
    Row("Digest, with commas, beside an X-API-KEY", [("Authorization", 'Digest username="a", uri="/"'), *x_api_key(GOOD)], 200),
    Row("an empty X-API-KEY beside a Bearer", [*bearer(GOOD), ("X-API-KEY", "")], 200),
    Row("HEAD", bearer(GOOD), 200, method="HEAD"),
    Row("POST", bearer(GOOD), 200, method="POST"),
    Row("pitfall 30: the app's own Cache-Control stands", bearer(GOOD), 200, path="/cached", sent={"cache-control": "max-age=60"}),
    Row("pitfall 30: Last-Modified, as long a name, is no Cache-Control", bearer(GOOD), 200, path="/dated", sent={**PRIVATE, "last-modified": DATE}),
    # no key
    refused("nothing", [], 401, "missing_key", sent=CHALLENGE),
    refused("pitfall 4: Bearer alone", [("Authorization", "Bearer")], 401, "missing_key", sent=CHALLENGE),
    refused("pitfall 4: Bearer and a blank", [("Authorization", "Bearer ")], 401, "missing_key"),
    refused("pitfall 4: Basic is not ours", [("Authorization", "Basic dXNlcjpwYXNz")], 401, "missing_key", sent=CHALLENGE),
    refused("amendment 16: a JWT is not ours", bearer("eyJhbGciOi.eyJzdWIi.c2ln"), 401, "missing_key", sent=CHALLENGE),
    refused("the key without a scheme", [("Authorization", GOOD)], 401, "missing_key"),
    refused("an empty X-API-KEY", x_api_key(""), 401, "missing_key"),
    refused("the key in the query", [], 401, "missing_key", path="/contracts?api_key=" + GOOD),
    refused("HEAD without a key has no body", [], 401, "missing_key", method="HEAD"),
    # a key that is not one
    refused("nonsense", x_api_key("nonsense"), 401, "malformed_key", sent=INVALID),
    refused("pitfall 1: latin-1", [("X-API-KEY", "pk_prod_abc123déf456ghi".encode("latin-1"))], 401, "malformed_key", sent=INVALID),
    refused("pitfall 1: smart quotes", [("X-API-KEY", "“pk_prod_abc123def456”".encode())], 401, "malformed_key"),
    refused("pitfall 1: a byte order mark", [("X-API-KEY", "\ufeffpk_prod_abc123def456".encode())], 401, "malformed_key"),
    refused("pitfall 1: bytes that are no text", [("Authorization", b"Bearer pk_\xff\xfe\xfa")], 401, "malformed_key"),
    refused("pitfall 1: control characters", [("X-API-KEY", "pk_prod_abc\x01123def456")], 401, "malformed_key"),
    refused("pitfall 2: oversized", x_api_key("pk_prod_" + "a" * 60_000), 401, "malformed_key"),
    refused("pitfall 2: oversized Bearer", bearer("pk_prod_" + "a" * 60_000), 401, "malformed_key"),
    refused("pitfall 6: SQL", x_api_key("pk_prod_' or '1'='1"), 401, "malformed_key"),
    refused("one character more", bearer(SEED + "0"), 401, "unknown_key", sent=INVALID),
    refused("two keys in one Bearer", bearer(f"{GOOD} {OTHER}"), 401, "malformed_key"),
    refused("a tab in place of the blank", [("Authorization", f"Bearer\t{GOOD}")], 401, "missing_key"),
    # two credentials
    refused("pitfall 3: two keys in two headers", [*bearer(GOOD), *x_api_key(OTHER)], 400, "ambiguous_credentials", sent=AMBIGUOUS),
    refused("pitfall 3: Authorization twice", [*bearer(GOOD), *bearer(OTHER)], 400, "ambiguous_credentials"),
    refused("amendment 16: Authorization twice, the same", [*bearer(GOOD), *bearer(GOOD)], 400, "ambiguous_credentials"),
    refused("pitfall 3: X-API-KEY twice", [*x_api_key(GOOD), *x_api_key(OTHER)], 400, "ambiguous_credentials"),
    refused("amendment 16: X-API-KEY twice, the same", [*x_api_key(GOOD), *x_api_key(GOOD)], 400, "ambiguous_credentials"),
    refused("pitfall 3: joined by a comma upstream", x_api_key(f"{GOOD}, {OTHER}"), 400, "ambiguous_credentials"),
    refused("pitfall 3: Bearer joined upstream", bearer(f"{GOOD}, Bearer {OTHER}"), 400, "ambiguous_credentials"),
    refused("pitfall 4: no blank after the scheme", [("Authorization", f"Bearer{GOOD}")], 401, "missing_key", sent=CHALLENGE),
    refused("no blank after the scheme, beside another's key", [("Authorization", f"Bearer{OTHER}"), *x_api_key("")], 401, "missing_key"),
    refused("pitfall 3: a blank member after a comma", [("Authorization", "Basic dTpw, "), *x_api_key(GOOD)], 400, "ambiguous_credentials", sent=AMBIGUOUS),
    refused("pitfall 3: a blank member between commas", [("Authorization", 'Digest a="b",,c="d"'), *x_api_key(GOOD)], 400, "ambiguous_credentials"),
    refused("pitfall 3: a bare scheme after a comma", [("Authorization", "Basic dTpw, Negotiate"), *x_api_key(GOOD)], 400, "ambiguous_credentials"),
    refused("pitfall 3: Bearer and a blank member", [("Authorization", f"Bearer {GOOD},")], 400, "ambiguous_credentials"),
    refused("Basic and Bearer in two headers", [("Authorization", "Basic dTpw"), *bearer(GOOD)], 400, "ambiguous_credentials"),
    refused("an empty X-API-KEY and another", [("X-API-KEY", ""), *x_api_key(GOOD)], 400, "ambiguous_credentials"),
    # every reason the store gives
    refused("unknown", bearer(UNKNOWN), 401, "unknown_key", sent=INVALID),
    refused("pitfall 26: of another environment", bearer(TEST), 401, "wrong_environment", sent=INVALID),
    refused("inactive", bearer(INACTIVE), 401, "key_inactive", sent=INVALID),
    refused("expired", bearer(EXPIRED), 401, "key_expired", sent=INVALID),
    refused("of an inactive machine", bearer(OFF), 401, "machine_inactive", sent=INVALID),
    refused("from a network it may not be used from", bearer(NETWORK), 403, "network_not_allowed"),
    Row("from a network it may be used from", bearer(NETWORK), 200, client="192.0.2.7"),
    refused("store down", bearer(SEED), 503, "store_unavailable", broken=True, sent={"retry-after": "5"}),
    *(
        refused(f"the app itself says {reason}", bearer(GOOD), status, reason.value, path=f"/raise/{reason}")
        for reason, status in ((Reason.INSUFFICIENT_RIGHTS, 403), (Reason.TOO_MANY_FAILURES, 429), (Reason.UNKNOWN_KEY, 401))
    ),
    # paths
    anonymous("exempt", [], path="/healthz", options=EXEMPT),
    anonymous("exempt, with a bad key", x_api_key("nonsense"), path="/healthz", options=EXEMPT),
    anonymous("exempt folder", [], path="/public/a/b", options=EXEMPT),
    refused("pitfall 10: /healthz/ is not /healthz", [], 401, "missing_key", path="/healthz/", options=EXEMPT),
    refused("pitfall 10: /public is not in /public/*", [], 401, "missing_key", path="/public", options=EXEMPT),
    refused("pitfall 35: /public/ may be /public to a router", [], 401, "missing_key", path="/public/", options=EXEMPT),
    refused("pitfall 10: /publicity", [], 401, "missing_key", path="/publicity", options=EXEMPT),
    refused("pitfall 10: a capital", [], 401, "missing_key", path="/Healthz", options=EXEMPT),
    refused("pitfall 10: /public/../x", [], 401, "missing_key", path="/public/../contracts", options=EXEMPT),
    refused("pitfall 10: /public/./x", [], 401, "missing_key", path="/public/./x", options=EXEMPT),
    refused("pitfall 10: %2f..%2f", [], 401, "missing_key", path="/public%2f..%2fcontracts", options=EXEMPT),
    refused("pitfall 10: //", [], 401, "missing_key", path="//healthz", options=EXEMPT),
    refused("pitfall 10: // inside", [], 401, "missing_key", path="/public//x", options=EXEMPT),
    refused("pitfall 10: a backslash", [], 401, "missing_key", path="/public/%5c..%5ccontracts", options=EXEMPT),
    refused("pitfall 10: Host cannot exempt", [("Host", "a.example/healthz?")], 401, "missing_key", options=EXEMPT),
    anonymous("pitfall 10: mounted under a prefix", [], path="/app/healthz", root="/app", options={"exempt": ["/healthz", "/app/healthz"]}),
    refused("pitfall 10: the prefix is no part of the path", [], 401, "missing_key", path="/healthz/contracts", root="/healthz", options=EXEMPT),
    Row("a guarded path beside exempt ones", bearer(GOOD), 200, options=EXEMPT),
    Row("standing aside: a caller is found", bearer(GOOD), 200, options=ASIDE, sent=PRIVATE),
    anonymous("standing aside: nothing", [], options=ASIDE),
    anonymous("standing aside: a bad key", x_api_key("nonsense"), options=ASIDE),
    anonymous("standing aside: an inactive key", bearer(INACTIVE), options=ASIDE),
    anonymous("standing aside: store down", bearer(SEED), options=ASIDE, broken=True),
    refused("standing aside, and the route asks: nothing", [], 401, "missing_key", path="/asks", options=ASIDE, sent=CHALLENGE),
    refused("standing aside, and the route asks: a bad key", x_api_key("nonsense"), 401, "malformed_key", path="/asks", options=ASIDE, sent=INVALID),
    refused("standing aside, and the route asks: inactive", bearer(INACTIVE), 401, "key_inactive", path="/asks", options=ASIDE),
    refused("standing aside, and the route asks: two keys", [*bearer(GOOD), *x_api_key(OTHER)], 400, "ambiguous_credentials", path="/asks", options=ASIDE),
    refused("standing aside, and the route asks: store down", bearer(SEED), 503, "store_unavailable", path="/asks", options=ASIDE, broken=True),
    Row("standing aside, and the route asks: a caller", bearer(GOOD), 200, path="/asks", options=ASIDE, sent=PRIVATE),
    # anonymous access
    anonymous("required=False, no key", [], options=OPTIONAL),
    anonymous("required=False, a JWT", bearer("eyJhbGciOi.eyJzdWIi.c2ln"), options=OPTIONAL),
    Row("required=False, a good key", bearer(GOOD), 200, options=OPTIONAL),
    refused("pitfall 13: required=False, a bad key", x_api_key("nonsense"), 401, "malformed_key", options=OPTIONAL),
    refused("pitfall 13: required=False, an inactive key", bearer(INACTIVE), 401, "key_inactive", options=OPTIONAL),
    refused("pitfall 13: required=False, two keys", [*bearer(GOOD), *x_api_key(OTHER)], 400, "ambiguous_credentials", options=OPTIONAL),
    refused("pitfall 13: required=False, store down", bearer(SEED), 503, "store_unavailable", options=OPTIONAL, broken=True),
    # preflight
    refused("pitfall 12: preflight is refused by default", PREFLIGHT, 401, "missing_key", method="OPTIONS"),
    anonymous("pitfall 12: preflight passes where told to", PREFLIGHT, method="OPTIONS", options={"preflight": "pass"}),
    refused("pitfall 12: OPTIONS alone is no preflight", [], 401, "missing_key", method="OPTIONS", options={"preflight": "pass"}),
    refused("pitfall 12: GET is no preflight", PREFLIGHT, 401, "missing_key", options={"preflight": "pass"}),
    refused("pitfall 12: preflight with a bad key", [*PREFLIGHT, *x_api_key("x")], 401, "malformed_key", method="OPTIONS", options={"preflight": "pass"}),
    # languages
    refused("French", [("Accept-Language", "fr-FR,fr;q=0.9,en;q=0.8")], 401, "missing_key", sent={"content-language": "fr"}),
    refused("English", [("Accept-Language", "en-GB,fr;q=0.5")], 401, "missing_key", sent={"content-language": "en"}),
    refused("another language", [("Accept-Language", "de")], 401, "missing_key", sent={"content-language": "en"}),
    refused("nonsense for a language", [("Accept-Language", b"\xff;q=x,,;")], 401, "missing_key", sent={"content-language": "en"}),
    refused("French, inactive", [*bearer(INACTIVE), ("Accept-Language", "fr")], 401, "key_inactive", sent={"content-language": "fr"}),
    # proxies
    Row("pitfall 27: a trusted proxy's word", [*bearer(NETWORK), ("X-Forwarded-For", "192.0.2.7")], 200, client="10.0.0.1", options=PROXY),
    refused("pitfall 27: a stranger's word", [*bearer(NETWORK), ("X-Forwarded-For", "192.0.2.7")], 403, "network_not_allowed", options=PROXY),
    refused("pitfall 27: nobody's word by default", [*bearer(NETWORK), ("X-Forwarded-For", "192.0.2.7")], 403, "network_not_allowed", client="10.0.0.1"),
    refused("pitfall 27: read from the right", [*bearer(NETWORK), ("X-Forwarded-For", "192.0.2.7, 203.0.113.9, 10.0.0.2")], 403, "network_not_allowed", client="10.0.0.1", options=PROXY),
    Row("pitfall 27: through two proxies", [*bearer(NETWORK), ("X-Forwarded-For", "1.1.1.1, 192.0.2.7"), ("X-Forwarded-For", "10.0.0.2")], 200, client="10.0.0.1", options=PROXY),
    refused("pitfall 27: nonsense is nobody", [*bearer(NETWORK), ("X-Forwarded-For", "192.0.2.7, what")], 403, "network_not_allowed", client="10.0.0.1", options=PROXY),
    Row("pitfall 27: an IPv6 proxy, a mapped client", [*bearer(NETWORK), ("X-Forwarded-For", "::ffff:192.0.2.7")], 200, client="2001:db8:ffff::1", options=PROXY),
]  # fmt: skip


class Estate:
    """A store with a key of each kind, and authenticators on it, shared by all rows."""

    def __init__(self, ring: PepperRing) -> None:
        self.store = MemoryStore()
        past = SimpleNamespace(time=lambda: datetime.now(UTC).timestamp() - 7200, monotonic=lambda: 0.0)
        keys, before = Keys(self.store, peppers=ring), Keys(self.store, peppers=ring, clock=past)
        home = keys.create_machine(
            "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
        ).id
        off = keys.create_machine("Ancien service", organisation="cfa-lyon").id
        keys.import_key(home, SEED, name="Production - Document 05")
        made = {
            "good": keys.create_key(home, name="Production", environment="prod"),
            "other": keys.create_key(home, name="Production v2", environment="prod"),
            "test": keys.create_key(home, name="Test", environment="test"),
            "inactive": keys.create_key(home, name="Production v0", environment="prod"),
            "expired": before.create_key(home, name="Courte", environment="prod", expires=timedelta(hours=1)),
            "off": keys.create_key(off, name="Production", environment="prod"),
            "network": keys.create_key(home, name="Réseau", environment="prod", networks=["192.0.2.0/24"]),
        }
        keys.disable_key(made["inactive"].key.id)
        keys.disable_machine(off)
        self.texts = {f"{{{name}}}": new.secret.reveal() for name, new in made.items()}
        self.blocking = Authenticator(self.store, environment="prod", peppers=ring)
        self.waiting = AsyncAuthenticator(AsyncMemoryStore(self.store), environment="prod", peppers=ring)
        broken = BrokenStore()
        self.blocking_broken = Authenticator(broken, environment="prod", peppers=ring)
        self.waiting_broken = AsyncAuthenticator(AsyncMemoryStore(broken), environment="prod", peppers=ring)

    def fill_in(self, text: str | bytes) -> bytes:
        data = text.encode("latin-1") if isinstance(text, str) else text
        for name, key in self.texts.items():
            data = data.replace(name.encode(), key.encode())
        return data

    def headers(self, row: Row) -> list[tuple[str, bytes]]:
        return [(name, self.fill_in(value)) for name, value in row.headers]

    def options(self, row: Row, *, waiting: bool) -> dict[str, Any]:
        name = ("waiting" if waiting else "blocking") + ("_broken" if row.broken else "")
        return {"authenticator": getattr(self, name), **row.options}


class BrokenStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self._minted_only = False  # or nobody would ask it for the seed's key

    def lookup(self, claim: Claim) -> Any:
        raise StoreUnavailable("broken on purpose")


@pytest.fixture(scope="module")
def estate(ring: PepperRing) -> Iterator[Estate]:
    estate = Estate(ring)
    yield estate
    estate.blocking.close()
    estate.blocking_broken.close()
    asyncio.run(estate.waiting.aclose())
    asyncio.run(estate.waiting_broken.aclose())


# five apps that say who called, and refuse where the path says so


def raised(path: str) -> Refused | None:
    _, found, reason = path.partition("/raise/")
    return Refused(Reason(reason)) if found else None


def asks(path: str) -> bool:
    """Whether the route says what it needs."""
    return path == "/asks"


def cache_headers(path: str) -> dict[str, str]:
    if path.endswith("/dated"):
        return {"Last-Modified": DATE}
    return {"Cache-Control": "max-age=60"} if path.endswith("/cached") else {}


def asgi_app(estate: Estate, row: Row) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        refusal = raised(path)
        if refusal is not None:
            raise refusal
        caller = require(scope, RIGHT) if asks(path) else asgi_identity(scope)
        content = {"caller": caller.machine.name if caller else None}
        await JSONResponse(content, headers=cache_headers(path))(scope, receive, send)

    return ASGIMiddleware(app, **estate.options(row, waiting=True))


def starlette_app(estate: Estate, row: Row) -> Any:
    def endpoint(request: Request) -> Response:
        refusal = raised(request.scope["path"])
        if refusal is not None:
            raise refusal
        caller = starlette_require(request, RIGHT) if asks(request.scope["path"]) else request.user
        content = {"caller": caller.display_name if caller.is_authenticated else None}
        return JSONResponse(content, headers=cache_headers(request.scope["path"]))

    return Starlette(
        routes=[Route("/{path:path}", endpoint, methods=METHODS)],
        middleware=[Middleware(StarletteMiddleware, **estate.options(row, waiting=True))],
        exception_handlers=exception_handlers,
    )


def fastapi_app(estate: Estate, row: Row) -> Any:
    """With the dependency alone; where options speak of paths, behind the middleware."""
    app = FastAPI()
    options = estate.options(row, waiting=True)
    behind = bool({"exempt", "everywhere", "preflight"} & row.options.keys())
    auth = PapaoursAuth(authenticator=options["authenticator"]) if behind else PapaoursAuth(**options)

    async def found(request: FastAPIRequest) -> Any:
        return asgi_identity(request.scope)

    async def endpoint(
        request: FastAPIRequest, caller: Any = Depends(found) if behind else Security(auth)
    ) -> FastAPIJSONResponse:
        refusal = raised(request.scope["path"])
        if refusal is not None:
            raise refusal
        content = {"caller": caller.machine.name if caller else None}
        return FastAPIJSONResponse(content, headers=cache_headers(request.scope["path"]))

    async def asking(caller: Any = Security(auth, scopes=[RIGHT])) -> FastAPIJSONResponse:
        return FastAPIJSONResponse({"caller": caller.machine.name})

    app.add_api_route("/asks", asking, methods=METHODS)
    app.add_api_route("/{path:path}", endpoint, methods=METHODS)
    auth.install(app)
    if behind:
        app.add_middleware(StarletteMiddleware, **options)
    return app


def wsgi_app(estate: Estate, row: Row) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        path = environ["SCRIPT_NAME"] + environ["PATH_INFO"]
        refusal = raised(path)
        if refusal is not None:
            raise refusal
        caller = wsgi_require(environ, RIGHT) if asks(path) else wsgi_identity(environ)
        body = json.dumps({"caller": caller.machine.name if caller else None}).encode()
        start_response("200 OK", [("Content-Type", "application/json"), *cache_headers(path).items()])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return validator(WSGIMiddleware(app, **estate.options(row, waiting=False)))


def flask_app(estate: Estate, row: Row) -> Any:
    app = Flask(__name__)
    app.url_map.merge_slashes = False
    papaours_flask.PapaoursAuth(app, **estate.options(row, waiting=False))

    @app.route("/", defaults={"path": ""}, methods=METHODS)
    @app.route("/<path:path>", methods=METHODS)
    def endpoint(path: str) -> Any:
        refusal = raised("/" + path)
        if refusal is not None:
            raise refusal
        caller = flask_require(RIGHT) if asks("/" + path) else wsgi_identity(request.environ)
        return jsonify(caller=caller.machine.name if caller else None), cache_headers("/" + path)

    return validator(app)


# two drivers


def parts(path: str) -> tuple[str, str]:
    path, _, query = path.partition("?")
    return unquote(path), query


def call_asgi(app: Any, estate: Estate, row: Row) -> Answer:
    path, query = parts(row.path)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": row.method,
        "scheme": "http",
        "path": path,
        "raw_path": row.path.partition("?")[0].encode(),
        "query_string": estate.fill_in(query),
        "root_path": row.root,
        "headers": [(name.lower().encode(), value.strip(b" \t")) for name, value in estate.headers(row)],
        "client": (row.client, 4711),
        "server": ("127.0.0.1", 80),
    }
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    async def run() -> None:
        call: Callable[..., Awaitable[None]] = app
        await call(scope, receive, send)

    asyncio.run(run())
    headers = {name.decode().lower(): value.decode() for name, value in messages[0]["headers"]}
    assert len(headers) == len(messages[0]["headers"]), "a header was sent twice"
    return Answer(messages[0]["status"], headers, b"".join(m.get("body", b"") for m in messages[1:]))


def call_wsgi(app: Any, estate: Estate, row: Row) -> Answer:
    path, query = parts(row.path)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": row.method,
        "SCRIPT_NAME": row.root,
        "PATH_INFO": path.removeprefix(row.root).encode().decode("latin-1"),
        "QUERY_STRING": estate.fill_in(query).decode("latin-1"),
        "REMOTE_ADDR": row.client,
        "SERVER_SOFTWARE": "gunicorn/23.0.0",  # one that drops headers with underscores
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in estate.headers(row):
        variable = "HTTP_" + name.upper().replace("-", "_")
        text = value.decode("latin-1").strip(" \t")
        environ[variable] = f"{environ[variable]},{text}" if variable in environ else text
    answers: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        answers.append((status, headers))
        return bytes

    result = app(environ, start_response)
    body = b"".join(result)
    result.close()
    status, sent = answers[-1]
    headers = {name.lower(): value for name, value in sent}
    assert len(headers) == len(sent), "a header was sent twice"
    return Answer(int(status.split()[0]), headers, body)


INTEGRATIONS: dict[str, Callable[[Estate, Row], Answer]] = {
    "asgi": lambda estate, row: call_asgi(asgi_app(estate, row), estate, row),
    "wsgi": lambda estate, row: call_wsgi(wsgi_app(estate, row), estate, row),
    "starlette": lambda estate, row: call_asgi(starlette_app(estate, row), estate, row),
    "fastapi": lambda estate, row: call_asgi(fastapi_app(estate, row), estate, row),
    "flask": lambda estate, row: call_wsgi(flask_app(estate, row), estate, row),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
@pytest.mark.parametrize("name", INTEGRATIONS)
def test_an_integration_answers_as_the_table_says(name: str, row: Row, estate: Estate) -> None:
    answer = INTEGRATIONS[name](estate, row)
    assert answer.status == row.status, answer.body
    assert row.sent.items() <= answer.headers.items()
    if row.method == "HEAD":  # the app's own body is the server's to drop
        assert not row.code or answer.body == b""
    elif row.code:
        assert answer.problem["code"] == row.code
        assert answer.problem["status"] == row.status
    else:
        assert json.loads(answer.body) == {"caller": row.caller}


@pytest.mark.parametrize("row", [row for row in ROWS if row.code], ids=lambda row: row.what)
def test_a_refusal_is_the_same_to_the_letter_everywhere(row: Row, estate: Estate) -> None:
    answers = {name: call(estate, row) for name, call in INTEGRATIONS.items()}
    assert all(answer == answers["asgi"] for answer in answers.values()), answers


def test_a_throttled_network_is_answered_alike_everywhere_and_a_valid_key_comes_in(
    estate: Estate, clock: ManualClock
) -> None:
    answers = {}
    for name, call in INTEGRATIONS.items():
        options = {"throttle": Throttle("2/minute", clock=clock)}
        bad = Row("a bad key", x_api_key("nonsense"), 401, options=options)
        answers[name] = [call(estate, bad) for _ in range(3)]
        assert call(estate, Row("a good key", bearer(GOOD), 200, options=options)).status == 200
        assert call(estate, Row("no key", [], 401, options=options)).problem["code"] == "missing_key"
        elsewhere = Row("another network", x_api_key("x"), 401, client="198.51.100.7", options=options)
        assert call(estate, elsewhere).status == 401
    assert [answer.status for answer in answers["asgi"]] == [401, 401, 429]
    throttled = answers["asgi"][-1]
    assert throttled.problem["code"] == "too_many_failures"
    assert throttled.headers["retry-after"] == "60"
    assert all(answer == answers["asgi"] for answer in answers.values()), answers


def test_no_answer_quotes_what_was_sent(estate: Estate) -> None:
    marker = "pk_prod_canary0canary1canary2"
    requests: list[Headers] = [
        bearer(marker),
        x_api_key(marker + "!"),
        [*bearer(marker), *x_api_key(marker + "x")],
        [("Accept-Language", marker)],
    ]
    for headers in requests:
        for name, call in INTEGRATIONS.items():
            answer = call(estate, Row("canary", headers, 401))
            assert answer.status in (400, 401), name
            assert "canary" not in repr(answer), name


def test_the_table_is_large_enough_and_has_every_reason() -> None:
    assert len(ROWS) >= 60
    assert {row.code for row in ROWS if row.code} == {reason.value for reason in Reason}
