"""Both middlewares record one event per call, whatever happens, and never a key's text."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from papaours_auth import Keys, PepperRing, open_store, parse_peppers
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.stores import open_async_store
from papaours_auth.usage import CallableSink, Recorder
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware
from support.calls import http_scope
from support.usage import SLOW, Kept, call


class House(NamedTuple):
    url: str
    peppers: PepperRing
    pepper_text: str
    good: str
    disabled: str
    good_id: str


@pytest.fixture
def house(tmp_path: Path) -> House:
    text = "p1:" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    peppers, url = parse_peppers(text), f"sqlite:///{tmp_path / 'keys.db'}"
    store = open_store(url, create=True)
    with Keys(store, peppers=peppers) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        good = keys.create_key(machine.id, name="Production - Facturation", environment="prod")
        cut = keys.create_key(machine.id, name="Production - Ancienne", environment="prod")
        keys.disable_key(cut.key.id)
    store.close()
    return House(url, peppers, text, good.secret.reveal(), cut.secret.reveal(), good.key.id)


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    path = scope["path"]
    if path == "/fails":
        raise LookupError
    if path == "/cancelled-early":
        raise asyncio.CancelledError
    if path == "/no-file":
        raise FileNotFoundError
    await send({"type": "http.response.start", "status": 404 if path == "/absent" else 200, "headers": []})
    if path == "/breaks":
        raise LookupError
    if path == "/half":
        return
    if path == "/cancelled":
        raise asyncio.CancelledError
    if path == "/reset":
        raise ConnectionResetError
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def asgi_calls(house: House, kept: Kept, calls: list[tuple[str, str]]) -> None:
    async def run() -> None:
        store = open_async_store(house.url)
        app = ASGIMiddleware(
            asgi_app, environment="prod", store=store, peppers=house.peppers, usage=kept.recorder
        )

        async def nothing(_: Any = None) -> Any:
            return {}

        for path, key in calls:
            headers = [(b"x-api-key", key.encode()), (b"x-request-id", b"r-1")]
            scope = {
                "type": "http",
                "method": "GET",
                "path": path,
                "headers": headers,
                "client": ("192.0.2.7", 1),
            }
            with contextlib.suppress(LookupError, OSError, asyncio.CancelledError):
                await app(scope, nothing, nothing)
        kept.events()
        await app.aclose()
        await store.aclose()

    asyncio.run(run())


def wsgi_app(environ: Any, start_response: Any) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/fails":
        raise LookupError
    start_response("404 Not Found" if path == "/absent" else "200 OK", [])
    if path == "/again":
        try:
            raise LookupError
        except LookupError:
            start_response("500 Too Late For A 200", [], sys.exc_info())
    return wsgi_body(path)


def wsgi_body(path: str) -> Iterator[bytes]:
    yield b"one"
    if path == "/breaks":
        raise LookupError
    yield b"two"


def wsgi_calls(house: House, kept: Kept, calls: list[tuple[str, str]]) -> None:
    store = open_store(house.url)
    app = WSGIMiddleware(
        wsgi_app, environment="prod", store=store, peppers=house.peppers, usage=kept.recorder
    )
    for path, key in calls:
        environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path.encode().decode("latin-1"), "HTTP_X_API_KEY": key,
            "REMOTE_ADDR": "192.0.2.7", "HTTP_X_REQUEST_ID": "r-1",
        }  # fmt: skip
        body: Any = None
        try:
            body = app(environ, lambda *_: lambda _: None)
            for _ in body:
                if path == "/half":
                    break
        except LookupError:
            pass
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
    app.authenticator.close()
    store.close()


DOORS = pytest.mark.parametrize("calls", [asgi_calls, wsgi_calls], ids=["asgi", "wsgi"])


@DOORS
def test_one_event_per_call_whatever_happens(house: House, kept: Kept, calls: Any) -> None:
    paths = ["/contracts", "/absent", "/fails", "/breaks", "/half"]
    calls(house, kept, [(path, house.good) for path in paths])
    assert [(event.route, event.status, event.outcome) for event in kept.events()] == [
        ("/contracts", 200, "completed"),
        ("/absent", 404, "completed"),
        ("/fails", 0, "failed"),
        ("/breaks", 200, "failed"),
        ("/half", 200, "gone"),
    ]
    event = kept.events()[0]
    assert (event.v, event.key_id, event.address, event.method) == (1, house.good_id, "192.0.2.7", "GET")
    assert (event.service, event.environment, event.request_id) == ("contrats", "prod", "r-1")


def test_a_cancelled_call_is_one_whose_client_went(house: House, kept: Kept) -> None:
    asgi_calls(
        house, kept, [(path, house.good) for path in ("/cancelled", "/cancelled-early", "/reset", "/no-file")]
    )
    assert [(event.status, event.outcome) for event in kept.events()] == [
        (200, "gone"),
        (0, "gone"),
        (200, "gone"),
        (0, "failed"),
    ]


@pytest.mark.parametrize("spool", [False, True])
def test_a_wsgi_app_that_changes_its_mind_has_one_event_with_what_it_said_last(
    house: House, tmp_path: Path, spool: bool
) -> None:
    seen = Kept()
    seen.recorder = Recorder(
        CallableSink(seen.batches.append), interval=SLOW, spool=tmp_path / "spool" if spool else None
    )
    wsgi_calls(house, seen, [("/again", house.good)])
    seen.recorder.close()
    events = [event for batch in seen.batches for event in batch.events]
    assert [(event.status, event.outcome) for event in events] == [(500, "completed")]


def test_apps_that_share_a_recorder_close_it_with_the_last_of_them(house: House, kept: Kept) -> None:
    async def run() -> None:
        first, second = (
            ASGIMiddleware(
                asgi_app, environment="prod", store=house.url, peppers=house.peppers, usage=kept.recorder
            )
            for _ in range(2)
        )
        await first.start()
        await second.start()
        await first.aclose()
        assert kept.recorder.health().running
        call(kept.recorder)
        await second.aclose()
        assert not kept.recorder.health().running

    asyncio.run(run())
    assert len(kept.events()) == 1
    assert not kept.recorder.stats().lost


@DOORS
def test_refusals_of_a_known_key_are_events_and_others_are_counted(
    house: House, kept: Kept, calls: Any
) -> None:
    calls(house, kept, [("/contracts", house.disabled)] * 2 + [("/contracts", "pk_prod_abcdefabcdef")] * 3)
    assert [(event.status, event.reason) for event in kept.events()] == [(401, "key_inactive")] * 2
    counted = [entry[1:] for batch in kept.batches for entry in batch.refusals]
    assert sum(entry[2] for entry in counted) == 3
    assert {entry[:2] for entry in counted} == {("unknown_key", "192.0.2.0/24")}


@DOORS
def test_a_refusal_that_was_sent_is_completed(house: House, kept: Kept, calls: Any) -> None:
    calls(house, kept, [("/contracts", house.disabled)])
    assert [(event.status, event.outcome) for event in kept.events()] == [(401, "completed")]


def test_a_refusal_whose_client_went_is_gone(house: House, kept: Kept) -> None:
    async def run() -> None:
        app = ASGIMiddleware(
            asgi_app, environment="prod", store=house.url, peppers=house.peppers, usage=kept.recorder
        )

        async def gone(message: Any = None) -> Any:
            raise ConnectionResetError

        with contextlib.suppress(ConnectionResetError):
            await app(http_scope(headers=[("X-API-KEY", house.disabled)]), gone, gone)
        kept.events()
        await app.aclose()

    asyncio.run(run())
    assert [(event.outcome, event.reason) for event in kept.events()] == [("gone", "key_inactive")]


def test_of_two_request_ids_the_first_is_recorded(house: House, kept: Kept) -> None:
    """The proxy next to us puts its own in front, if it keeps its client's at all."""

    async def run() -> None:
        app = ASGIMiddleware(
            asgi_app, environment="prod", store=house.url, peppers=house.peppers, usage=kept.recorder
        )

        async def nothing(_: Any = None) -> Any:
            return {}

        headers = [("X-Request-ID", "first"), ("X-API-KEY", house.good), ("X-Request-ID", "second")]
        await app(http_scope(headers=headers), nothing, nothing)
        kept.events()
        await app.aclose()

    asyncio.run(run())
    assert [event.request_id for event in kept.events()] == ["first"]


@DOORS
def test_pitfall_28_no_key_is_recorded(
    house: House, tmp_path: Path, calls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = Kept()
    sink, spool = f"sqlite:///{tmp_path / 'usage.db'}", tmp_path / "spool"
    seen.recorder = Recorder(sink, interval=SLOW, spool=spool)
    calls(
        house,
        seen,
        [(f"/{house.good}", house.good), (f"/a?{house.good}", house.disabled), ("/x", "pk_prod_no")],
    )
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    seen.recorder.close()
    everything += b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for key in (house.good, house.disabled):
        assert key.encode() not in everything
        assert key not in caplog.text


@DOORS
def test_pitfall_56_a_key_in_a_route_is_hidden_however_it_is_glued_in(
    house: House, kept: Kept, calls: Any
) -> None:
    key = house.good
    paths = [
        f"/x{key}x", f"/{key.upper()}", f"/{key.replace('_', chr(92) + '_')}", f"/{'a' * 240}/{key}",
        f"/{chr(0x200B).join(key)}",
        "/" + "".join(chr(ord(c) + 0xFEE0) for c in key), f"/{key.replace('pk_prod', 'pk_recette')}",
        "/" + "".join(f"%{ord(c):02x}" for c in key),
    ]  # fmt: skip
    calls(house, kept, [(path, key) for path in paths])
    assert [event.route for event in kept.events()] == ["(hidden: it looks like a key)"] * len(paths)


@DOORS
def test_a_route_that_holds_no_key_is_recorded_as_it_is(house: House, kept: Kept, calls: Any) -> None:
    paths = ["/contrats/{pk_id}", "/lignes_de_facture", "/backup_list", f"/pk_prod_…{house.good[-4:]}"]
    calls(house, kept, [(path, house.good) for path in paths])
    assert [event.route for event in kept.events()] == paths
