"""ASGI lifespan: answered by the guard where the app does none, and refused on another event loop than asyncio's."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from conftest import PEPPER
from papaours_auth import Keys, PepperRing, open_store, parse_peppers
from papaours_auth.asgi import PapaoursAuthMiddleware
from papaours_auth.digest import new_pepper
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from support.calls import Recorded, http_scope, lifespan, run_asgi
from support.servers import serving, stop
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
KEY = {"X-API-KEY": SEED}
WHOLE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


async def raises_at_once(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError(scope["type"])


async def asserts(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] in ("http", "websocket")


async def raises_after_receiving(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise LookupError


async def returns(scope: Any, receive: Any, send: Any) -> None:
    return


async def returns_after_receiving(scope: Any, receive: Any, send: Any) -> None:
    await receive()


async def takes_it_for_a_request(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def only_starts(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})


async def starts_and_breaks(scope: Any, receive: Any, send: Any) -> None:
    await only_starts(scope, receive, send)
    raise LookupError


async def hears_the_end_and_says_nothing(scope: Any, receive: Any, send: Any) -> None:
    await only_starts(scope, receive, send)
    await receive()


def not_even_a_coroutine(scope: Any, receive: Any, send: Any) -> Any:
    raise TypeError


WITHOUT = [
    raises_at_once,
    asserts,
    raises_after_receiving,
    returns,
    returns_after_receiving,
    takes_it_for_a_request,
    only_starts,
    starts_and_breaks,
    hears_the_end_and_says_nothing,
    not_even_a_coroutine,
]


def guard(app: Any, memory: MemoryStore, ring: PepperRing, kept: Kept) -> PapaoursAuthMiddleware:
    return PapaoursAuthMiddleware(
        app, environment="prod", store=AsyncMemoryStore(memory), peppers=ring, usage=kept.recorder
    )


@pytest.mark.parametrize("app", WITHOUT, ids=lambda app: app.__name__)
def test_pitfall_45_a_lifespan_that_an_app_leaves_unanswered_is_answered(
    app: Any, memory: MemoryStore, ring: PepperRing, kept: Kept
) -> None:
    guarded = guard(app, memory, ring, kept)
    assert lifespan(guarded) == WHOLE
    assert guarded.authenticator._watcher is None
    assert not kept.recorder.health().running


def test_pitfall_45_the_guard_runs_until_the_server_shuts_down(
    memory: MemoryStore, ring: PepperRing, kept: Kept
) -> None:
    guarded = guard(raises_at_once, memory, ring, kept)

    async def run() -> None:
        waiting: asyncio.Queue[Any] = asyncio.Queue()
        started = asyncio.Event()

        async def send(message: Any) -> None:
            started.set()

        life = asyncio.create_task(guarded({"type": "lifespan"}, waiting.get, send))
        waiting.put_nowait({"type": "lifespan.startup"})
        await started.wait()
        assert guarded.authenticator._watcher is not None
        assert kept.recorder.health().running
        assert not life.done()
        waiting.put_nowait({"type": "lifespan.shutdown"})
        await life

    asyncio.run(run())
    assert guarded.authenticator._watcher is None


def test_an_app_that_does_its_own_lifespan_hears_and_says_all_of_it(
    memory: MemoryStore, ring: PepperRing, kept: Kept
) -> None:
    app = Recorded()
    assert lifespan(guard(app, memory, ring, kept)) == WHOLE
    assert [scope["type"] for scope in app.scopes] == ["lifespan"]


@pytest.mark.parametrize("raises", [False, True])
def test_an_app_that_fails_to_start_keeps_its_own_word(
    memory: MemoryStore, ring: PepperRing, kept: Kept, raises: bool
) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "the app's own"})
        if raises:
            raise LookupError

    guarded = guard(fails, memory, ring, kept)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        await guarded({"type": "lifespan"}, receive, send)

    if raises:
        with pytest.raises(LookupError):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert sent == [{"type": "lifespan.startup.failed", "message": "the app's own"}]
    assert guarded.authenticator._watcher is None


def test_an_error_at_the_end_goes_on_to_the_server(memory: MemoryStore, ring: PepperRing, kept: Kept) -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await only_starts(scope, receive, send)
        await receive()
        raise LookupError

    guarded = guard(breaks, memory, ring, kept)
    with pytest.raises(LookupError):
        lifespan(guarded)
    assert guarded.authenticator._watcher is None


def test_guards_in_guards_answer_once(memory: MemoryStore, ring: PepperRing, kept: Kept) -> None:
    inner = guard(raises_at_once, memory, ring, kept)
    outer = guard(inner, memory, ring, kept)
    assert lifespan(outer) == WHOLE
    assert (inner.authenticator._watcher, outer.authenticator._watcher) == (None, None)
    assert not kept.recorder.health().running


# real servers


class Estate:
    def __init__(self, folder: Path) -> None:
        store = f"sqlite:///{folder}/keys.db"
        self.usage = folder / "usage.db"
        self.environ = {
            "PAPAOURS_STORE": store,
            "PAPAOURS_PEPPER": PEPPER,
            "USAGE": f"sqlite:///{self.usage}",
        }
        keys = Keys(open_store(store, create=True), peppers=parse_peppers(PEPPER))
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(machine.id, SEED, name="Production - Service Facturation")
        keys.close()

    def events(self) -> int:
        connection = sqlite3.connect(self.usage)
        try:
            (found,) = connection.execute("select count(*) from usage_events").fetchone()
            return int(found)
        finally:
            connection.close()


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "granian"])
def test_pitfall_45_a_server_that_is_stopped_at_once_loses_no_usage_of_an_app_without_lifespan(
    server: str, tmp_path: Path
) -> None:
    """sentry-python#505. Uvicorn dies of its SIGTERM in the end, so nothing at exit runs."""
    estate = Estate(tmp_path)
    with serving(server, estate.environ, tmp_path, "plain_app:app") as running:
        for _ in range(20):
            assert running.get(KEY) == (200, b"Service de facturation")
        assert stop(running.process) in (0, -signal.SIGTERM), running.log.read_text()
    assert estate.events() == 20


def test_pitfall_45_trio_is_refused_at_start_in_one_line(tmp_path: Path) -> None:
    estate = Estate(tmp_path)
    with (
        pytest.raises(AssertionError, match="papaours-auth needs asyncio"),
        serving("hypercorn-trio", estate.environ, tmp_path, "plain_app:app"),
    ):
        pass


def test_a_start_that_fails_leaves_a_shared_recorder_to_the_other_app(
    memory: MemoryStore, kept: Kept
) -> None:
    """It had not begun to use the recorder, so it does not end its use either."""
    guarded = PapaoursAuthMiddleware(
        Recorded(),
        environment="prod",
        store=AsyncMemoryStore(memory),
        peppers=parse_peppers(new_pepper()),
        usage=kept.recorder,
    )
    kept.recorder.acquire()
    assert lifespan(guarded) == ["lifespan.startup.failed"]
    assert kept.recorder.health().running
    kept.recorder.release()


def test_without_lifespan_trio_meets_503_and_one_line_in_the_log(
    memory: MemoryStore, ring: PepperRing, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    app = Recorded()
    guarded = guard(app, memory, ring, kept)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def calls() -> None:
        for headers in (KEY, KEY, {}):
            await guarded(http_scope(headers=headers.items()), receive, send)

    with caplog.at_level(logging.ERROR, "papaours_auth"):
        trio.run(calls)
    assert [message["status"] for message in sent[::2]] == [503, 503, 401]
    assert b'"store_unavailable"' in sent[1]["body"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "needs asyncio" in caplog.text
    assert app.scopes == []
    run_asgi(guarded, http_scope(headers=KEY.items()))
    assert len(app.scopes) == 1  # on asyncio it goes on
    asyncio.run(guarded.aclose())
