"""Pitfall 34: guards behind one another. Each believes its own authenticator, and each recorder has a call once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from papaours_auth import Authenticator, Keys, PepperRing
from papaours_auth import flask as ours
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.usage import Event
from papaours_auth.wsgi import PapaoursAuthMiddleware, identity_of, require
from support.calls import environ_of, run_wsgi
from support.usage import Kept

RIGHT = "contrats:lecture"


class House(NamedTuple):
    """Authenticators, and keys that each of them may accept."""

    authenticators: dict[str, Authenticator]
    keys: dict[str, str]
    accepted_by: dict[str, set[str]]  # which authenticators accept a key


@pytest.fixture(scope="module")
def house(ring: PepperRing) -> Iterator[House]:
    stores = {"here": MemoryStore(), "elsewhere": MemoryStore()}
    keys = {}
    for name, store in stores.items():
        admin = Keys(store, peppers=ring)
        machine = admin.create_machine(f"Service {name}", organisation="cfa-lyon", rights=[RIGHT])
        for environment in ("prod", "test"):
            made = admin.create_key(machine.id, name=f"{environment} {name}", environment=environment)
            keys[f"{environment} {name}"] = made.secret.reveal()
    where = {"prod": ("here", "prod"), "test": ("here", "test"), "other store": ("elsewhere", "prod")}
    authenticators = {
        name: Authenticator(stores[store], environment=environment, peppers=ring)
        for name, (store, environment) in where.items()
    }
    accepted_by = {
        key: {name for name, (store, environment) in where.items() if key == f"{environment} {store}"}
        for key in keys
    }
    keys |= {"nonsense": "nonsense", "none": ""}
    yield House(authenticators, keys, accepted_by | {"nonsense": set(), "none": set()})
    for authenticator in authenticators.values():
        authenticator.close()


def guarded_wsgi(authenticator: Authenticator, recorder: Any) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        caller = identity_of(environ)
        start_response("200 OK", [])
        return [caller.key.name.encode() if caller else b"nobody"]

    return PapaoursAuthMiddleware(app, authenticator=authenticator, usage=recorder)


def asking_wsgi(authenticator: Authenticator, recorder: Any) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        name = require(environ, RIGHT).key.name
        start_response("200 OK", [])
        return [name.encode()]

    return PapaoursAuthMiddleware(app, authenticator=authenticator, usage=recorder, everywhere=False)


def guarded_flask(authenticator: Authenticator, recorder: Any) -> Any:
    return flask_app(authenticator, recorder)


def asking_flask(authenticator: Authenticator, recorder: Any) -> Any:
    return flask_app(authenticator, recorder, everywhere=False)


def exempt_flask(authenticator: Authenticator, recorder: Any) -> Any:
    return flask_app(authenticator, recorder, exempt=["/", "/contracts"])


def flask_app(authenticator: Authenticator, recorder: Any, **options: Any) -> Any:
    app = Flask("inner")
    auth = ours.PapaoursAuth(app, authenticator=authenticator, usage=recorder, **options)

    @app.get("/contracts")
    @auth.required(RIGHT)
    def contracts() -> str:
        return ours.identity().key.name

    return app


INNER: list[Callable[[Authenticator, Any], Any]] = [
    guarded_wsgi, asking_wsgi, guarded_flask, asking_flask, exempt_flask
]  # fmt: skip
OUTER: list[dict[str, Any]] = [
    {}, {"required": False}, {"everywhere": False}, {"exempt": ["/mounted/*", "/contracts"]},
]  # fmt: skip


def recorded(kept: Kept) -> tuple[list[Event], int]:
    return kept.events(), sum(entry[-1] for batch in kept.batches for entry in batch.refusals)


def expected(outer: str, options: dict[str, Any], inner: str, key: str, house: House) -> tuple[bool, bool]:
    """Return whether the outer guard lets the request on, and whether the inner one then lets it in."""
    known = outer in house.accepted_by[key]
    on = known or "exempt" in options or "everywhere" in options or ("required" in options and key == "none")
    return on, on and inner in house.accepted_by[key]


@pytest.mark.parametrize("mounted", [False, True], ids=["inside", "mounted"])
@pytest.mark.parametrize("shared", [False, True], ids=["two recorders", "one recorder"])
@pytest.mark.parametrize("options", OUTER, ids=str)
@pytest.mark.parametrize("inside", INNER, ids=lambda made: made.__name__)
def test_pitfall_34_nested_guards_believe_themselves_and_record_a_call_once(
    house: House, inside: Any, options: dict[str, Any], shared: bool, mounted: bool
) -> None:
    for outer, inner, key in product(house.authenticators, house.authenticators, house.keys):
        outside = Kept()
        within = outside if shared else Kept()
        app = inside(house.authenticators[inner], within.recorder)
        if mounted:
            app = DispatcherMiddleware(Flask("outer"), {"/mounted": app})
        guarded = PapaoursAuthMiddleware(
            app, authenticator=house.authenticators[outer], usage=outside.recorder, **options
        )
        headers = [("X-API-KEY", house.keys[key])] if key != "none" else []
        path = "/mounted/contracts" if mounted else "/contracts"
        status, _, body = run_wsgi(guarded, environ_of(path, headers, HTTP_HOST="a.example"))
        on, in_ = expected(outer, options, inner, key, house)
        what = f"{key} at {outer}, then at {inner}: {status} {body!r}"
        assert (status[:3] == "200") == in_, what
        assert body.decode() == key if in_ else b'"code"' in body, what
        for kept, knows in ((outside, outer in house.accepted_by[key]), (within, on)):
            events, counted = recorded(kept)
            assert all(event.status == int(status[:3]) for event in events), what
            assert all(bool(event.reason) != in_ for event in events), what
            anyone = on or not in_ if shared else (knows if in_ else True) if kept is outside else on
            # The outer guard of an exempt path knows nobody who was let in further down.
            if kept is outside and not shared and in_ and "exempt" in options:
                anyone = False
            assert len(events) + counted == anyone, what
            kept.recorder.close()
