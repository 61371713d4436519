"""Stores in SQL servers, which the tests start: the contract on each, and what is special about them."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from papaours_auth import (
    Authenticator,
    ConfigurationError,
    Conflict,
    Keys,
    Machine,
    Overloaded,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_async_store,
    open_store,
)
from papaours_auth.digest import Candidate
from papaours_auth.stores import AsyncStore, Author, Store, sql
from papaours_auth.stores.sql import AsyncSQLStore, SQLFeed, SQLStore, Tables
from papaours_auth.stores.sql_drivers import connect_within
from papaours_auth.stores.sql_level import AtLevel
from papaours_auth.testing import StoreContract
from papaours_auth.verify import PARTITIONS, Claim, read
from support.servers import free_port, wait_until
from support.sql_servers import MOST, PASSWORD, SERVERS, SQLServer, mariadb, mysql, postgresql

SEED = "pk_prod_abc123def456ghi789"

# the contract


def patient(server: SQLServer) -> str:
    """Return the URL of a new database, for a test that times nothing: machines are busy."""
    return f"{server.url(server.database())}?timeout=20"


class ByURL(StoreContract):
    """The contract, of the store at ``url``."""

    url: str

    def open(self) -> Store:
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)


class TestPostgreSQL(ByURL):
    @pytest.fixture(autouse=True)
    def _database(self, postgresql_server: SQLServer) -> None:
        self.url = patient(postgresql_server)


class TestMariaDB(ByURL):
    @pytest.fixture(autouse=True)
    def _database(self, mariadb_server: SQLServer) -> None:
        self.url = patient(mariadb_server)


class TestMySQL(ByURL):
    @pytest.fixture(autouse=True)
    def _database(self, mysql_server: SQLServer) -> None:
        self.url = patient(mysql_server)


class TestSQLiteBySQLAlchemy(ByURL):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.url = f"sqlalchemy+sqlite:///{tmp_path}/keys.db"


class OwnEngine(StoreContract):
    """An app's own engine and a prefix. It stays the app's to close."""

    engine: Engine
    async_url: str
    schema: str | None = None

    def open(self) -> Store:
        store = SQLStore(self.engine, prefix="auth_", schema=self.schema)
        store.create()
        return store

    def open_async(self) -> AsyncStore:
        engine = create_async_engine(self.async_url)
        return Closing(
            engine, self.engine, prefix="auth_", schema=self.schema, timeout=10.0
        )  # machines are busy


class Closing(AsyncSQLStore):
    """An app that closes its engine when it closes the store."""

    async def aclose(self) -> None:
        await super().aclose()
        if isinstance(self._engine, AsyncEngine):
            await self._engine.dispose()


class TestOwnEngineOnPostgreSQL(OwnEngine):
    schema = "papaours"

    @pytest.fixture(autouse=True)
    def _database(self, postgresql_server: SQLServer) -> Iterator[None]:
        name = postgresql_server.database()
        postgresql_server.execute("create schema papaours authorization papaours", database=name)
        self.async_url = postgresql_server.url(name).replace("://", "+psycopg://", 1)
        self.engine = create_engine(self.async_url, isolation_level="SERIALIZABLE", poolclass=NullPool)
        yield
        self.engine.dispose()


class TestOwnEngineOnMariaDB(OwnEngine):
    @pytest.fixture(autouse=True)
    def _database(self, mariadb_server: SQLServer) -> Iterator[None]:
        name = mariadb_server.database()
        mariadb_server.execute(
            "create or replace user app identified by 'plain'", f"grant all on {name}.* to app"
        )
        url = mariadb_server.url(name, user="app", password="plain")
        self.async_url = url.replace("://", "+asyncmy://", 1)
        self.engine = create_engine(url.replace("://", "+pymysql://", 1))
        yield
        self.engine.dispose()


def test_an_engine_that_was_given_stays_open(mariadb_server: SQLServer, ring: PepperRing) -> None:
    url = mariadb_server.url(mariadb_server.database(), user="root", password="")
    engine = create_engine(url.replace("://", "+pymysql://", 1))
    store = SQLStore(engine)
    store.create()
    store.close()
    assert engine.pool.status().startswith("Pool size: 5  Connections in pool: 1")
    with pytest.raises(StoreUnavailable, match="closed"):
        store.add_machine(
            Machine("m", "M", "o", "active", datetime.now(UTC), "x"), Author("x", datetime.now(UTC))
        )
    engine.dispose()


# what the tests below share


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> SQLServer:
    """Each server, to be left running."""
    server: SQLServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture(params=MOST)
def victim(request: pytest.FixtureRequest) -> Iterator[SQLServer]:
    """Each server, to be done to whatever a test likes."""
    with {"postgresql": postgresql, "mariadb": mariadb, "mysql": mysql}[request.param]() as server:
        yield server


@pytest.fixture(params=["mariadb", "mysql"])
def either(request: pytest.FixtureRequest) -> SQLServer:
    """MariaDB or MySQL, likewise."""
    server: SQLServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def url(server: SQLServer) -> str:
    return patient(server)


def opened(url: str) -> SQLStore:
    store = open_store(url, create=True)
    assert isinstance(store, SQLStore)
    return store


@pytest.fixture
def store(url: str) -> Iterator[SQLStore]:
    store = opened(url)
    yield store
    store.close()


@pytest.fixture
def postgresql_store(postgresql_server: SQLServer) -> Iterator[SQLStore]:
    store = opened(patient(postgresql_server))
    yield store
    store.close()


def seed(store: Store, ring: PepperRing) -> Claim:
    """Put the seed's key into a store."""
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service", organisation="cfa-lyon")
    keys.import_key(machine.id, SEED, name="Production")
    claim = read(SEED.encode(), format=keys._format, peppers=ring)
    assert isinstance(claim, Claim)
    return claim


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def waited(feed: SQLFeed) -> SQLFeed:
    feed.wait(0.01)
    return feed


def listening(feed: SQLFeed) -> SQLFeed:
    """Give a feed that has heard itself."""
    feed.read({})
    wait_until(lambda: waited(feed).announcements is True, 10, what="the announcements to be proven")
    feed.read({})
    return feed


# changes

ADD_KEYS = """
import sys
from papaours_auth import Keys, parse_peppers
with Keys(sys.argv[1], peppers=parse_peppers(sys.argv[2])) as keys:
    for n in range(15):
        keys.create_key("Service", name=f"Production {sys.argv[3]}.{n}", environment="prod")
"""


def test_processes_that_write_at_once_lose_nothing_and_leave_no_gap(
    store: SQLStore, url: str, ring: PepperRing
) -> None:
    from conftest import PEPPER

    Keys(store, peppers=ring).create_machine("Service", organisation="cfa-lyon")
    command = [sys.executable, "-c", ADD_KEYS, url, PEPPER]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    known = 0
    while any(writer.poll() is None for writer in writers):
        seqs = [change.epoch.seq for change in store.journal(limit=1000)]
        assert seqs == list(range(len(seqs), 0, -1))  # at every moment: in the order of the commits
        assert len(seqs) >= known
        known = len(seqs)
    assert [writer.wait(60) for writer in writers] == [0] * 3
    assert len(store.keys()) == 45
    seqs = [change.epoch.seq for change in store.journal(limit=1000)]
    assert seqs == list(range(len(seqs), 0, -1))


def test_a_change_that_fails_leaves_no_gap(store: SQLStore, ring: PepperRing) -> None:
    seed(store, ring)
    with pytest.raises(Conflict):
        store.add_machine(store.machines()[0], Author("x", datetime.now(UTC)))
    Keys(store, peppers=ring).create_machine("Autre", organisation="cfa-lyon")
    seqs = [change.epoch.seq for change in store.journal()]
    assert seqs == list(range(len(seqs), 0, -1))


def test_a_lookup_is_one_statement_and_one_snapshot(store: SQLStore, ring: PepperRing) -> None:
    """Record and epoch belong together: here every change turns the status, so the number tells it."""
    claim = seed(store, ring)
    begun = store.lookup(claim).epochs[0].seq
    stop = threading.Event()

    def turn() -> None:
        off = False
        while not stop.is_set():
            off = not off
            store.update_key(
                store.keys()[0].id, {"status": "inactive" if off else "active"}, "key.turned",
                Author("x", datetime.now(UTC)),
            )  # fmt: skip

    statements: list[str] = []
    event.listen(store._engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    assert store.lookup(claim).record is not None
    assert len(statements) == 1
    turner = threading.Thread(target=turn)
    turner.start()
    try:
        for _ in range(300):
            found = store.lookup(claim)
            assert found.record is not None
            turned = (found.epochs[0].seq - begun) % 2 == 1
            assert found.record.key.status == ("inactive" if turned else "active")
    finally:
        stop.set()
        turner.join()


@pytest.mark.parametrize("statement", ["delete from {}", "update {} set actor = 'nobody'"])
def test_the_journal_can_only_grow(store: SQLStore, url: str, ring: PepperRing, statement: str) -> None:
    seed(store, ring)
    before = store.journal()
    with pytest.raises(DBAPIError, match="append-only"), store._writes.connect() as connection:
        connection.exec_driver_sql(statement.format("papaours_changes"))
    assert store.journal() == before


def test_the_journal_cannot_be_truncated(postgresql_store: SQLStore) -> None:
    with pytest.raises(DBAPIError, match="append-only"), postgresql_store._writes.connect() as connection:
        connection.exec_driver_sql("truncate papaours_changes")


def test_pitfall_09_a_loose_collation_finds_no_other_key(either: SQLServer, ring: PepperRing) -> None:
    """MySQL's own collations take É for e, and pad with blanks."""
    store = opened(either.url(either.database()))
    seed(store, ring)
    machine = store.machines()[0]
    author = Author("x", datetime.now(UTC))
    key = store.keys()[0]
    for number, name in enumerate(["Émile", "emile", "EMILE", "Emile "]):
        letter = b"aAbB"[number : number + 1]
        claim = Claim("prod", 0, (Candidate(ring.primary.id, letter * 32),))
        store.add_key(key._replace(id=f"key_{letter.decode()}", name=name), claim, "key.created", author)
        store.add_machine(replace(machine, id=f"M{letter.decode()}", name=name), author)
    for name in ["Émile", "emile", "EMILE", "Emile "]:
        assert [found.name for found in store.keys(name)] == [name]
        assert [found.name for found in store.machines(name)] == [name]
    assert store.keys("Emile") == []
    assert store.keys("KEY_a") == []
    for character in "aAbB":
        found = store.lookup(Claim("prod", 0, (Candidate("p1", character.encode() * 32),))).record
        assert found is not None
        assert found.key.id == f"key_{character}"
    assert store.lookup(Claim("prod", 0, (Candidate("p1", b"C" * 32),))).record is None
    store.close()


# announcements


def test_a_change_elsewhere_is_heard_at_once(store: SQLStore, url: str, ring: PepperRing) -> None:
    """No call accepts the key later, although `max_staleness` is 10 minutes."""
    seed(store, ring)
    other = opened(url)
    with Authenticator(other, environment="prod", peppers=ring, max_staleness=600.0) as authenticator:
        authenticator.authenticate(SEED)
        keys = Keys(store, peppers=ring)
        keys.disable_key(keys.keys()[0].id)

        def refused() -> bool:
            try:
                authenticator.authenticate(SEED)
            except Refused as error:
                return error.reason is Reason.KEY_INACTIVE
            return False

        wait_until(refused, 10, what="the key to be refused")
    other.close()


def test_an_announcement_is_rolled_back_with_its_change(postgresql_store: SQLStore) -> None:
    feed = listening(postgresql_store.feed())
    known = {0: feed.read({}).news[0].epoch}
    author = Author("x", datetime.now(UTC))
    with pytest.raises(Conflict), postgresql_store._writing() as change:
        change.append(author, "key.disabled", "key_1", {}, {})
        change.finish()
        raise Conflict("broken off before the commit")
    begin = time.monotonic()
    feed.wait(0.2)
    assert time.monotonic() - begin >= 0.19
    assert feed.read(known).news[0].changes == []
    with postgresql_store._writing() as change:
        change.append(author, "key.disabled", "key_1", {}, {})
    with within(10):
        feed.wait(60)
    assert feed.read(known).news[0].changes == [("key.disabled", "key_1")]
    feed.close()


def test_a_feed_that_hears_asks_nothing_while_it_waits(postgresql_store: SQLStore) -> None:
    feed = listening(postgresql_store.feed())
    statements: list[str] = []
    event.listen(postgresql_store._engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    feed.wait(0.2)
    assert statements == []
    feed.close()


def test_a_pooler_that_swallows_announcements_is_noticed_and_the_tip_polled(
    postgresql_store: SQLStore,
    ring: PepperRing,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PgBouncer in transaction mode gives LISTEN to a server process that then serves somebody else."""
    seed(postgresql_store, ring)
    monkeypatch.setattr(sql, "HEARD_WITHIN", 0.1)
    monkeypatch.setattr(SQLFeed, "_hear", lambda self, announcement: None)
    feed = postgresql_store.feed()
    known = {0: feed.read({}).news[0].epoch}
    with caplog.at_level(logging.WARNING, logger="papaours_auth"):
        wait_until(lambda: waited(feed).announcements is False, 10, what="the silence to be noticed")
        feed.wait(0.05)
    assert [record.getMessage() for record in caplog.records] == [
        (
            "the SQL store's announcements do not arrive (a pooler in transaction mode swallows LISTEN): "
            "its tip is polled every 20 ms instead"
        )
    ]
    keys = Keys(postgresql_store, peppers=ring)
    keys.disable_key(keys.keys()[0].id)
    with within(10):
        feed.wait(60)
    assert feed.read(known).news[0].changes == [("key.disabled", keys.keys()[0].id)]
    feed.close()


def test_until_announcements_are_proven_the_tip_is_polled(
    postgresql_store: SQLStore, ring: PepperRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLFeed, "_hear", lambda self, announcement: None)
    monkeypatch.setattr(sql, "HEARD_WITHIN", 600.0)
    feed = postgresql_store.feed()
    feed.read({})
    seed(postgresql_store, ring)
    with within(10):
        feed.wait(60)
    assert feed.announcements is None
    feed.close()


# a server that is away

TIMEOUT = 0.3
BOUND = 2.5
"""Seconds: a multiple of the timeout, for a machine that is busy."""


def unavailable(call: Callable[[], object]) -> None:
    with within(BOUND), pytest.raises(StoreUnavailable):
        call()


@pytest.mark.alone
def test_pitfall_21_a_server_that_is_paused_killed_and_started_again(
    victim: SQLServer, ring: PepperRing
) -> None:
    url = f"{victim.url(victim.database())}?timeout={TIMEOUT}"
    store = opened(url)
    claim = seed(store, ring)
    feed = store.feed()
    known = {0: feed.read({}).news[0].epoch}
    feed.wait(0.01)
    victim.pause()
    try:
        for _ in range(2):  # on an open connection, then without any
            unavailable(lambda: store.lookup(claim))
            unavailable(lambda: feed.read(known))
        unavailable(store.describe)
        asyncio.run(_async_outage(url, claim))
    finally:
        victim.resume()
    assert store.lookup(claim).record is not None
    assert feed.read(known).news[0].changes == []
    victim.kill()
    unavailable(lambda: store.lookup(claim))
    unavailable(lambda: feed.read(known))
    with within(1):
        feed.wait(0.05)
    victim.start()
    assert store.lookup(claim).record is not None
    assert feed.read(known).news[0].changes == []
    feed.close()
    store.close()


async def _async_outage(url: str, claim: Claim) -> None:
    twin = open_async_store(url)
    with within(BOUND), pytest.raises(StoreUnavailable):
        await twin.lookup(claim)
    await twin.aclose()


@pytest.mark.alone
def test_pitfall_21_a_pause_in_the_middle_of_async_lookups(victim: SQLServer, ring: PepperRing) -> None:
    url = f"{victim.url(victim.database())}?timeout={TIMEOUT}"
    store = opened(url)
    claim = seed(store, ring)

    async def look() -> None:
        twin = open_async_store(url)
        found = await asyncio.gather(*[twin.lookup(claim) for _ in range(5)])
        assert all(one.record is not None for one in found)
        victim.pause()
        try:
            with within(BOUND):
                found = await asyncio.gather(*[twin.lookup(claim) for _ in range(5)], return_exceptions=True)  # type: ignore[assignment]  # errors among them
            assert all(isinstance(one, StoreUnavailable) for one in found)
        finally:
            victim.resume()
        assert (await twin.lookup(claim)).record is not None
        await twin.aclose()

    asyncio.run(look())
    store.close()


def test_pitfall_23_a_cancelled_lookup_leaves_nothing_half_read(
    store: SQLStore, url: str, ring: PepperRing
) -> None:
    claim = seed(store, ring)

    async def look() -> None:
        twin = open_async_store(url)
        await twin.lookup(claim)
        for number in range(24):
            task = asyncio.create_task(twin.lookup(claim))
            for _ in range(number % 12):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found = await twin.lookup(claim)
            assert found.record is not None
        await twin.aclose()

    asyncio.run(look())


def test_pitfall_23_a_cancelled_lookup_of_a_server_that_is_paused_ends_at_once(
    victim: SQLServer, ring: PepperRing
) -> None:
    url = f"{victim.url(victim.database())}?timeout=20"
    store = opened(url)
    claim = seed(store, ring)

    async def look() -> None:
        twin = open_async_store(url)
        await twin.lookup(claim)
        victim.pause()
        try:
            with within(BOUND), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await twin.lookup(claim)
        finally:
            victim.resume()
        assert (await twin.lookup(claim)).record is not None
        await twin.aclose()

    asyncio.run(look())
    store.close()


def let_in(authenticator: Authenticator) -> bool:
    try:
        return authenticator.authenticate(SEED).key.name == "Production"
    except Refused as refused:
        return {Reason.STORE_UNAVAILABLE: False}[refused.reason]  # nothing else may be told


@pytest.mark.alone
def test_an_app_starts_while_its_server_is_down_and_recovers(victim: SQLServer, ring: PepperRing) -> None:
    url = f"{victim.url(victim.database())}?timeout={TIMEOUT}"
    store = opened(url)
    seed(store, ring)
    store.close()
    victim.stop()
    with Authenticator(url, environment="prod", peppers=ring) as authenticator:
        unavailable(authenticator.start)
        with within(BOUND), pytest.raises(Refused) as refused:
            authenticator.authenticate(SEED)
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
        victim.start()
        wait_until(lambda: let_in(authenticator), 10, what="the server to be used again")


def test_a_backend_that_was_ended_costs_no_lookup(
    postgresql_server: SQLServer, postgresql_store: SQLStore, ring: PepperRing
) -> None:
    claim = seed(postgresql_store, ring)
    feed = listening(postgresql_store.feed())
    known = {0: feed.read({}).news[0].epoch}
    postgresql_store.lookup(claim)
    name = postgresql_store._engine.url.database
    end = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    for _ in range(2):
        postgresql_server.execute(end)
        with within(10):
            feed.wait(60)  # told by the socket
        assert postgresql_store.lookup(claim).record is not None
        assert feed.read(known).news[0].changes == []
    feed.close()


@pytest.mark.parametrize("by", ["url", "engine"])
def test_connections_that_mysql_ended_cost_neither_a_lookup_nor_a_change(
    either: SQLServer, by: str, ring: PepperRing
) -> None:
    """SQLAlchemy lets a driver's own error through where the isolation level is set over a dead connection."""
    name = either.database()
    url = either.url(name, user="root", password="")
    engine = create_engine(url.replace("://", "+pymysql://", 1))
    store = opened(url) if by == "url" else SQLStore(engine)
    store.create()
    claim = seed(store, ring)

    def use(number: int) -> None:
        assert store.lookup(claim).record is not None
        store.update_key(
            store.keys()[0].id, {"name": f"{number}"}, "key.renamed", Author("x", datetime.now(UTC))
        )

    for number in range(3):
        with store._reads.connect(), store._reads.connect():  # so many are in the pool
            pass
        either.end_connections(name)
        use(number)
    store.close()
    engine.dispose()


def test_connections_that_mysql_ended_cost_no_lookup_over_an_async_engine_of_ones_own(
    either: SQLServer, ring: PepperRing
) -> None:
    name = either.database()
    url = either.url(name, user="root", password="")
    store = opened(url)
    claim = seed(store, ring)

    async def look() -> None:
        engine = create_async_engine(url.replace("://", "+asyncmy://", 1))
        twin = AsyncSQLStore(engine, store)
        for _ in range(3):
            await asyncio.gather(*[twin.lookup(claim) for _ in range(3)])
            await asyncio.to_thread(either.end_connections, name)
            assert (await twin.lookup(claim)).record is not None
        await engine.dispose()

    asyncio.run(look())
    store.close()


def test_an_isolation_level_that_is_refused_is_an_error_like_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(connection: object, level: str) -> None:
        raise sqlite3.OperationalError("no")

    engine = create_engine("sqlite://")
    engine.connect().close()
    monkeypatch.setattr(engine.dialect, "set_isolation_level", refuse)
    with pytest.raises(DBAPIError) as error:
        AtLevel(engine, "SERIALIZABLE").connect()
    assert not error.value.connection_invalidated
    monkeypatch.undo()
    engine.dispose()


def test_a_late_connection_is_closed() -> None:
    class Connection:
        def __init__(self) -> None:
            self.closed = threading.Event()

        def close(self) -> None:
            self.closed.set()

    late, gate = Connection(), threading.Event()
    with pytest.raises(StoreUnavailable, match="no connection in time"):
        connect_within(0.01, lambda: (gate.wait(30), late)[1])
    gate.set()
    assert late.closed.wait(10)


def test_a_connection_for_which_there_is_no_thread_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(Overloaded, match="can't start new thread"):
        connect_within(1, object)


# a store that is not as it must be


def test_tables_that_are_not_there_are_told_at_first_use(url: str) -> None:
    store = open_store(url)
    with pytest.raises(ConfigurationError, match="papaours-auth init"):
        store.describe()
    with pytest.raises(ConfigurationError, match="papaours-auth init"):
        store.lookup(Claim("prod", 0, (Candidate("p1", b"1" * 32),)))
    twin = open_async_store(url)
    with pytest.raises(ConfigurationError, match="papaours-auth init"):
        asyncio.run(twin.describe())
    store.close()
    twin.sync.close()


def test_another_schema_is_told_at_first_use(store: SQLStore, ring: PepperRing) -> None:
    claim = seed(store, ring)
    for version, said in ((99, "upgrade this one"), (0, "papaours-auth init")):
        with store._writes.connect() as connection:
            connection.exec_driver_sql(f"update papaours_meta set schema_version = {version}")
            connection.commit()
        for call in (store.describe, lambda: store.lookup(claim)):
            with pytest.raises(ConfigurationError, match=said):
                call()


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("by_alembic", [False, True])
def test_a_store_of_schema_1_that_is_migrated_tells_of_foreign_keys_by_its_journal(
    store: SQLStore, url: str, ring: PepperRing, imported: bool, by_alembic: bool
) -> None:
    if imported:
        seed(store, ring)
    with store._writes.connect() as connection:
        connection.exec_driver_sql("update papaours_meta set schema_version = 1, minted_only = 0")
        if not by_alembic:  # which adds a column, and does not know what it should say
            connection.exec_driver_sql("alter table papaours_meta drop column minted_only")
        connection.commit()
    store.close()
    with pytest.raises(ConfigurationError, match="run 'papaours-auth init'"):
        open_store(url).describe()
    for _ in range(2):
        again = opened(url)
        feed = again.feed()
        assert list(feed.read({}).news[0].minted_only) == ([] if imported else list(range(PARTITIONS)))
        feed.close()
        again.close()


MEDDLED = {
    "delete from papaours_meta": "installation mark",
    "update papaours_keys set networks = 'nonsense'": "record of a key cannot be read",
    "update papaours_machines set grants = '[{}]'": "record of a machine cannot be read",
    "drop table papaours_digests": "cannot answer",
}


@pytest.mark.parametrize(("statement", "said"), MEDDLED.items())
def test_a_store_that_makes_no_sense_is_an_outage_not_an_unknown_key(
    store: SQLStore, ring: PepperRing, statement: str, said: str
) -> None:
    claim = seed(store, ring)
    store.lookup(claim)
    with store._writes.connect() as connection:
        connection.exec_driver_sql(statement)
        connection.commit()
    with pytest.raises(StoreUnavailable, match=said):
        store.lookup(claim)
    if "meta" in statement:
        with pytest.raises(ConfigurationError, match="restore it"):
            store.create()


def test_a_feed_of_a_store_that_lost_its_mark_waits_between_readings(store: SQLStore) -> None:
    feed = store.feed()
    feed.read({})
    with store._writes.connect() as connection:
        connection.exec_driver_sql("delete from papaours_meta")
        connection.commit()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="installation mark"):
            feed.read({})
        feed._heard = False  # of the deletion, where the server announces
        assert not feed._changed()
    feed.close()


def test_processes_that_create_at_once_make_one_store(url: str) -> None:
    code = (
        "import sys; from papaours_auth import open_store; "
        "print(open_store(sys.argv[1], create=True).describe().installation)"
    )
    command = [sys.executable, "-c", code, url]
    creators = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = {creator.communicate(timeout=60)[0] for creator in creators}
    assert len(outputs) == 1
    assert {creator.returncode for creator in creators} == {0}


def test_who_waits_for_another_to_make_the_tables_waits_longer_than_for_an_answer(
    either: SQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.stores.sql_drivers.WRITE_TIMEOUT", 1.3)
    url = either.url(either.database())
    other = create_engine(
        url.replace("://", "+pymysql://", 1).replace("papaours:" + quote(PASSWORD), "root:")
    )
    with other.connect() as connection:
        connection.exec_driver_sql("select get_lock('papaours-auth schema', 0)")
        late = threading.Timer(
            1.6, connection.exec_driver_sql, ["select release_lock('papaours-auth schema')"]
        )
        late.start()
        opened(url).close()
        late.join()
    other.dispose()


def test_a_creation_that_died_in_the_middle_is_finished_by_the_next(store: SQLStore, url: str) -> None:
    with store._writes.connect() as connection:
        connection.exec_driver_sql("drop table papaours_digests")
        connection.commit()
    again = opened(url)
    assert again.count_digests("p1") == 0
    assert again.describe() == store.describe()
    again.close()


def test_several_stores_in_one_database_do_not_meet(url: str, store: SQLStore, ring: PepperRing) -> None:
    claim = seed(store, ring)
    other = opened(f"{url}&prefix=other_")
    assert other.lookup(claim).record is None
    assert other.describe().installation != store.describe().installation
    other.close()


# who may do what

VERIFIER = [
    "create role {0} login password '{0}'",
    (
        "grant select on papaours_meta, papaours_peppers, papaours_machines, papaours_keys, "
        "papaours_digests, papaours_changes to {0}"
    ),
]
ADMINISTRATOR = [
    *VERIFIER,
    "grant insert on papaours_peppers, papaours_machines, papaours_keys, papaours_digests, papaours_changes to {0}",
    "grant update on papaours_meta, papaours_peppers, papaours_machines, papaours_keys to {0}",
    "grant delete on papaours_machines, papaours_keys, papaours_digests to {0}",
]


def as_role(server: SQLServer, store: SQLStore, grants: list[str]) -> SQLStore:
    role = f"role_{uuid.uuid4().hex[:8]}"
    name = str(store._engine.url.database)
    server.execute(*(grant.format(role) for grant in grants), database=name)
    other = open_store(server.url(name, user=role, password=role))
    assert isinstance(other, SQLStore)
    return other


def test_a_verifier_needs_no_more_than_select(
    postgresql_server: SQLServer, postgresql_store: SQLStore, ring: PepperRing
) -> None:
    claim = seed(postgresql_store, ring)
    verifier = as_role(postgresql_server, postgresql_store, VERIFIER)
    record = verifier.lookup(claim).record
    assert record is not None
    listening(verifier.feed()).close()
    assert verifier.describe() == postgresql_store.describe()
    author = Author("x", datetime.now(UTC))
    with pytest.raises(StoreUnavailable, match="InsufficientPrivilege 42501"):
        verifier.update_key(record.key.id, {"status": "inactive"}, "key.disabled", author)
    for statement in ("update papaours_keys set status = 'active'", "delete from papaours_changes"):
        with pytest.raises(DBAPIError, match="permission denied"), verifier._writes.connect() as connection:
            connection.exec_driver_sql(statement)
    verifier.close()


def test_an_administrator_needs_no_more_than_the_recipe(
    postgresql_server: SQLServer, postgresql_store: SQLStore, ring: PepperRing
) -> None:
    administrator = as_role(postgresql_server, postgresql_store, ADMINISTRATOR)
    seed(administrator, ring)
    keys = Keys(administrator, peppers=ring)
    keys.disable_key(keys.keys()[0].id)
    author = Author("x", datetime.now(UTC))
    administrator.set_pepper_status(ring.primary.id, "accept", author)
    administrator.delete_machine(administrator.machines()[0].id, author)
    assert administrator.keys() == []
    with pytest.raises(DBAPIError, match="permission denied"), administrator._writes.connect() as connection:
        connection.exec_driver_sql("delete from papaours_changes")
    administrator.close()


def test_alembic_finds_nothing_to_change(store: SQLStore) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._writes.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Tables().metadata) == []


def test_a_mysql_that_trusts_nobody_with_triggers_keeps_keys_all_the_same(
    mysql_server: SQLServer, ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    """As it comes, with a binary log: its error 1419."""
    mysql_server.execute("set global log_bin_trust_function_creators = off")
    try:
        store = opened(mysql_server.url(mysql_server.database()))
    finally:
        mysql_server.execute("set global log_bin_trust_function_creators = on")
    assert "guarded by convention alone" in caplog.text
    assert store.lookup(seed(store, ring)).record is not None
    store.close()


def test_what_sqlalchemy_says_of_a_mysql_that_is_called_mariadb_is_understood() -> None:
    told = sql._misled(InvalidRequestError("MySQL version 9.7.4 is not a MariaDB variant."))
    assert isinstance(told, ConfigurationError)
    assert sql._misled(InvalidRequestError("another")) is None


def test_a_mysql_that_is_called_mariadb_is_a_wrong_url_and_no_outage(mysql_server: SQLServer) -> None:
    url = mysql_server.url(mysql_server.database()).replace("mysql://", "mariadb://")
    with pytest.raises(ConfigurationError, match="write mysql://"):
        open_store(url, create=True)
    with pytest.raises(ConfigurationError, match="write mysql://"):
        open_store(url).describe()
    with pytest.raises(ConfigurationError, match="write mysql://"):
        asyncio.run(open_async_store(url).describe())


def test_a_password_that_mysql_has_not_cached_is_told_it_by_either_driver(
    mysql_server: SQLServer, ring: PepperRing
) -> None:
    """By caching_sha2_password: encrypted with the server's key, where the connection is not."""
    url = mysql_server.url(mysql_server.database())
    store = opened(url)
    claim = seed(store, ring)
    store.close()

    async def look() -> None:
        twin = open_async_store(url)
        assert (await twin.lookup(claim)).record is not None
        await twin.aclose()

    mysql_server.execute("flush privileges")  # and what it has cached
    asyncio.run(look())
    mysql_server.execute("flush privileges")
    store = opened(url)
    assert store.lookup(claim).record is not None
    store.close()


def test_tables_that_alembic_made_are_taken_over(server: SQLServer, ring: PepperRing) -> None:
    url = server.url(server.database())
    bare = open_store(url)
    assert isinstance(bare, SQLStore)
    with bare._writes.connect() as connection:
        Tables().metadata.create_all(connection)
        connection.commit()
    with pytest.raises(StoreUnavailable, match="papaours-auth init"):
        bare.describe()
    bare.create()
    assert bare.lookup(seed(bare, ring)).record is not None
    bare.close()


# processes


def test_pitfall_22_a_fork_leaves_parent_and_child_with_connections_of_their_own(
    store: SQLStore, ring: PepperRing
) -> None:
    claim = seed(store, ring)
    feed = store.feed()
    known = {0: feed.read({}).news[0].epoch}
    keys = Keys(store, peppers=ring)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert feed._connection is None
            for number in range(10):
                keys.create_key("Service", name=f"Enfant {number}", environment="prod")
                assert store.lookup(claim).record is not None
                feed.read(known)
            code = 0
        finally:
            os._exit(code)
    for number in range(10):
        keys.create_key("Service", name=f"Parent {number}", environment="prod")
        assert feed.read(known).news[0].changes is not None
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(store.keys()) == 21
    changes = feed.read(known).news[0].changes
    assert changes is not None
    assert len(changes) == 20
    feed.close()


def test_an_async_store_serves_one_loop_after_another(url: str, store: SQLStore, ring: PepperRing) -> None:
    claim = seed(store, ring)
    twin = open_async_store(url)
    for _ in range(3):
        assert asyncio.run(twin.lookup(claim)).record is not None
    asyncio.run(twin.aclose())
    with pytest.raises(StoreUnavailable, match="closed"):
        asyncio.run(twin.lookup(claim))


# disclosure


def test_pitfall_28_no_error_log_or_repr_shows_the_password(
    server: SQLServer, ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    name = server.database()
    wrong = [
        server.url(name, port=free_port()),
        server.url(name, password="canary-password"),
        server.url("nowhere"),
        server.url(name) + "?schema=a'b",
        server.url(name) + "?timeout=canary",
        server.url(""),
        server.url(name).replace("@127.0.0.1", "@127.0.0.1:canary"),
    ]
    told = ""
    with caplog.at_level(logging.DEBUG):
        for url in wrong:
            for opener in (open_store, open_async_store):
                try:
                    store = opener(url)
                    told += repr(store) + repr(vars(store))
                    described = store.describe()
                    if asyncio.iscoroutine(described):
                        asyncio.run(described)
                except (StoreUnavailable, ConfigurationError) as error:
                    told += "".join(traceback.format_exception(error))
                else:
                    pytest.fail(f"{url} answered")
    told += caplog.text
    for secret in (PASSWORD, quote(PASSWORD), "canary"):
        assert secret not in told


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://h/", "names no database"),
        ("mysql://h", "names no database"),
        ("sqlalchemy+sqlite:///:memory:", "names no database"),
        ("postgresql://h:port/db", "cannot be read"),
        ("postgresql://h/db?prefix=Robert'); drop table", "the prefix of a SQL store"),
        ("postgresql://h/db?schema=1", "the schema of a SQL store"),
        ("mysql://h/db?timeout=0", "number of seconds"),
        ("mysql://h/db?timeout=nan", "number of seconds"),
        ("mysql://h/db?timeout=soon", "number of seconds"),
    ],
)
def test_a_wrong_url_is_one_clear_line(url: str, said: str) -> None:
    for opener in (open_store, open_async_store):
        with pytest.raises(ConfigurationError, match=said) as error:
            opener(url)
        assert "\n" not in str(error.value)


def test_a_driver_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papaours_auth.stores.sql_drivers.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"need pymysql: pip install 'papaours-auth\[mysql\]'"):
        open_store("mysql://h/db")


def test_sqlalchemy_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("papaours_auth.stores.sql")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(ConfigurationError, match=r"need sqlalchemy: pip install 'papaours-auth\[sql\]'"):
        open_store("postgresql://h/db")


def test_another_database_is_refused() -> None:
    class Engine:
        class dialect:  # noqa: N801 - as SQLAlchemy calls it
            name = "oracle"

    with pytest.raises(ConfigurationError, match="no other database"):
        SQLStore(Engine())  # type: ignore[arg-type]  # a stand-in
