"""Pitfall 34: a guard behind a guard. Each answers for itself, and a call is recorded once."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the endpoints below, which are local.
import asyncio
from collections.abc import Callable, Iterator
from itertools import product
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Security, WebSocket
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from papaours_auth import AsyncAuthenticator, Identity, Keys, PepperRing
from papaours_auth.asgi import PapaoursAuthMiddleware, identity_of
from papaours_auth.fastapi import PapaoursAuth
from papaours_auth.starlette import PapaoursAuthMiddleware as StarletteMiddleware
from papaours_auth.starlette import require
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from support.calls import http_scope, run_asgi, websocket_scope
from support.usage import Kept

RIGHT = "contrats:lecture"
Guarded = Callable[[Any, "House", dict[str, Any]], Any]


class House:
    """Two stores, keys of each, and authenticators: whom the outer guard lets in, and whom the inner one does."""

    def __init__(self, ring: PepperRing) -> None:
        self.stores = {"A": MemoryStore(), "B": MemoryStore()}
        self.texts = {"none": ""}
        self.ring = ring
        for name, store in self.stores.items():
            keys = Keys(store, peppers=ring)
            machine = keys.create_machine(f"Service {name}", organisation="cfa-lyon", rights=[RIGHT])
            for environment in ("prod", "test"):
                made = keys.create_key(machine.id, name=f"Clé {environment}", environment=environment)
                self.texts[f"{environment} {name}"] = made.secret.reveal()
        self.authenticators = {who: self._opened(who) for who in ("prod A", "test A", "prod B")}

    def _opened(self, who: str) -> AsyncAuthenticator:
        environment, _, name = who.partition(" ")
        store = AsyncMemoryStore(self.stores[name])
        return AsyncAuthenticator(store, environment=environment, peppers=self.ring)

    def close(self) -> None:
        async def closed() -> None:
            for authenticator in self.authenticators.values():
                await authenticator.aclose()

        asyncio.run(closed())


@pytest.fixture(scope="module")
def house(ring: PepperRing) -> Iterator[House]:
    made = House(ring)
    yield made
    made.close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


async def leaf(scope: Any, receive: Any, send: Any) -> None:
    caller = identity_of(scope)
    text = caller.machine.name + caller.key.environment if caller else "nobody"
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": [(b"caller", text.encode())]})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"caller", text.encode())]})
        await send({"type": "http.response.body", "body": b""})


# what stands inside, and accepts keys of "prod A" alone


def guard(house: House, options: dict[str, Any]) -> Any:
    return PapaoursAuthMiddleware(leaf, authenticator=house.authenticators["prod A"], **options)


def starlettes_guard(house: House, options: dict[str, Any]) -> Any:
    return StarletteMiddleware(leaf, authenticator=house.authenticators["prod A"], **options)


def standing_aside(house: House, options: dict[str, Any]) -> Any:
    """A Starlette app whose guard refuses nobody, and whose routes ask."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        require(HTTPConnection(scope), RIGHT)
        await leaf(scope, receive, send)

    middleware = Middleware(
        StarletteMiddleware, authenticator=house.authenticators["prod A"], everywhere=False, **options
    )
    return Starlette(routes=[Mount("/", page)], middleware=[middleware])


def dependency(house: House, options: dict[str, Any]) -> Any:
    app, auth = FastAPI(), PapaoursAuth(authenticator=house.authenticators["prod A"], **options)

    @app.get("/live")
    def page(caller: Annotated[Identity, Security(auth, scopes=[RIGHT])]) -> Any:
        return PlainTextResponse("", headers={"caller": caller.machine.name + caller.key.environment})

    @app.websocket("/live")
    async def live(socket: WebSocket, caller: Annotated[Identity, Security(auth)]) -> None:
        text = caller.machine.name + caller.key.environment
        await socket.accept(headers=[(b"caller", text.encode())])

    auth.install(app)
    return app


# how it stands there


def directly(inner: Any) -> Any:
    return inner


def mounted_in_starlette(inner: Any) -> Any:
    return Starlette(routes=[Mount("/", inner)])


def mounted_in_fastapi(inner: Any) -> Any:
    app = FastAPI()
    app.mount("/", inner)
    return app


def behind_a_copy_of_the_scope(inner: Any) -> Any:
    """As Channels' routers do."""

    async def copies(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "url_route": {}}, receive, send)

    return copies


INNER = [guard, starlettes_guard, standing_aside, dependency]
PLACES = [directly, mounted_in_starlette, mounted_in_fastapi, behind_a_copy_of_the_scope]
OUTER: dict[str, dict[str, Any]] = {
    "guard": {},
    "required=False": {"required": False},
    "everywhere=False": {"everywhere": False},
    "exempt": {"exempt": ["/live"]},
}
WHO = ["prod A", "test A", "prod B"]


def passes_outer(mode: str, who: str, key: str) -> bool:
    return (
        mode in ("everywhere=False", "exempt") or key == who or (mode == "required=False" and key == "none")
    )


def call(app: Any, text: str, kind: str) -> str:
    """Return whom the innermost app saw; empty where the caller was refused."""
    headers = [("X-API-KEY", text)] if text else []
    scope = http_scope("/live", headers) if kind == "http" else websocket_scope(headers)
    body = [{"type": "http.request", "body": b"", "more_body": False}] * 5
    sent = run_asgi(app, scope, body if kind == "http" else [{"type": "websocket.connect"}] * 5)
    first = sent[0]
    if first.get("status", 200) != 200 or first["type"] == "websocket.close":
        assert first.get("status") in (None, 401)
        return ""
    return str(dict(first["headers"])[b"caller"], "ascii")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__)
def test_pitfall_34_each_guard_answers_for_itself(house: House, inner: Any, place: Any, kind: str) -> None:
    """fastapi#469. Whatever an outer guard found, of the same authenticator or of another one."""
    for (mode, options), who, (key, text) in product(OUTER.items(), WHO, house.texts.items()):
        app = PapaoursAuthMiddleware(
            place(inner(house, {})), authenticator=house.authenticators[who], **options
        )
        let_in = passes_outer(mode, who, key) and key == "prod A"
        assert call(app, text, kind) == ("Service Aprod" if let_in else ""), (mode, who, key)


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("inner", [guard, starlettes_guard], ids=lambda inner: inner.__name__)
@pytest.mark.parametrize(
    "options", [{"required": False}, {"everywhere": False}, {"exempt": ["/live"]}], ids=str
)
def test_pitfall_34_an_inner_guard_that_lets_anybody_pass_hands_on_no_outer_guards_caller(
    house: House, inner: Any, options: dict[str, Any], kind: str
) -> None:
    for who in WHO:
        app = PapaoursAuthMiddleware(inner(house, options), authenticator=house.authenticators[who])
        seen = call(app, house.texts[who], kind)
        mine = who == "prod A" and "exempt" not in options
        refuses = who != "prod A" and "required" in options
        assert seen == ("Service Aprod" if mine else "" if refuses else "nobody")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__)
def test_pitfall_34_a_call_is_one_event_for_each_recorder(
    house: House, inner: Any, place: Any, kept: Kept
) -> None:
    other = Kept()
    for (mode, options), kind in product(OUTER.items(), ("http", "websocket")):
        for recorders in ((kept, kept), (kept, other)):
            before = [len(one.events()) for one in (kept, other)]
            outer_usage, inner_usage = (one.recorder for one in recorders)
            app = PapaoursAuthMiddleware(
                place(inner(house, {"usage": inner_usage})),
                authenticator=house.authenticators["prod A"],
                usage=outer_usage,
                **options,
            )
            assert call(app, house.texts["prod A"], kind) == "Service Aprod"
            added = [len(one.events()) - number for one, number in zip((kept, other), before, strict=True)]
            expected = [1, 0] if recorders == (kept, kept) else [int(mode != "exempt"), 1]
            assert added == expected, (mode, kind)
    other.recorder.close()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__)
def test_pitfall_34_what_an_inner_guard_refuses_is_recorded_once_with_its_reason(
    house: House, inner: Any, place: Any, kept: Kept
) -> None:
    for mode, options in OUTER.items():
        before = len(kept.events())
        app = PapaoursAuthMiddleware(
            place(inner(house, {"usage": kept.recorder})),
            authenticator=house.authenticators["test A"],
            usage=kept.recorder,
            **options,
        )
        assert call(app, house.texts["test A"], "http") == ""
        events = kept.events()[before:]
        assert [(event.status, event.reason) for event in events] == [(401, "wrong_environment")], mode
