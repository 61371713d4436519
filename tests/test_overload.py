"""Whose fault it is: a flood, a full queue and a stalled loop are ours; only the store's own failure is an outage."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    Identity,
    Keys,
    Machine,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_store,
)
from papaours_auth.format import base62
from papaours_auth.stores import Description, Found, Reading, Store
from papaours_auth.verify import Claim
from support.doors import Door, Gate, Later, Spy, Threaded
from support.redis_servers import NEWEST, WHY_NOT, RedisServer, redis_server
from support.servers import wait_until
from support.sql_servers import SQLServer

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"


def foreign(number: int) -> str:
    return f"pk_prod_{number:018}"


@pytest.fixture
def machine(admin: Keys) -> Machine:
    return admin.create_machine("Service de facturation", organisation="cfa-lyon")


@pytest.fixture
def minted(admin: Keys, machine: Machine) -> str:
    """A key that only an issuer can have made; the store holds a foreign one too, so no shape is refused unseen."""
    admin.import_key(machine.id, SEED, name="Production - Ancienne")
    return admin.create_key(machine.id, name="Production - Facturation", environment="prod").secret.reveal()


# keys that anyone can invent


class Selective:
    """A store for event loops in which lookups of foreign keys wait for ``gate``."""

    def __init__(self, store: Store) -> None:
        self.sync = store
        self.gate = asyncio.Event()
        self.held = self.most = 0

    async def lookup(self, claim: Claim) -> Found:
        if claim.foreign:
            self.held += 1
            self.most = max(self.most, self.held)
            try:
                await self.gate.wait()
            finally:
                self.held -= 1
        return self.sync.lookup(claim)

    async def describe(self) -> Description:
        return self.sync.describe()

    async def aclose(self) -> None:
        self.sync.close()


def test_a_flood_of_foreign_keys_leaves_tasks_with_minted_ones_their_room(
    store: Store, ring: PepperRing, minted: str
) -> None:
    async def scene() -> Identity:
        flood = [asyncio.create_task(authenticator.authenticate(foreign(number))) for number in range(1_500)]
        await asyncio.sleep(0.05)
        identity = await authenticator.authenticate(minted)
        at_once = slow.most
        slow.gate.set()
        answers = await asyncio.gather(*flood, return_exceptions=True)
        assert at_once < 10, "most of a store's connections are left to others"
        reasons = [answer.reason for answer in answers if isinstance(answer, Refused)]
        assert set(reasons) == {Reason.UNKNOWN_KEY, Reason.STORE_UNAVAILABLE}
        assert reasons.count(Reason.UNKNOWN_KEY) == 100
        return identity

    slow = Selective(store)
    authenticator = AsyncAuthenticator(
        slow, environment="prod", peppers=ring, watch=False, max_foreign_flights=100, timeout=30.0
    )
    authenticator.refresh()
    assert asyncio.run(scene()).key.name == "Production - Facturation"
    assert authenticator.health().outages == 0
    assert not authenticator._minted.under_way
    assert not authenticator._invented.under_way


def test_a_flood_of_foreign_keys_leaves_threads_with_minted_ones_their_room(
    spy: Spy, ring: PepperRing, minted: str
) -> None:
    gate = Gate()
    spy.on_lookup = lambda ask: gate.before(ask) if spy.claims[-1].foreign else ask()
    authenticator = Authenticator(
        spy.store, environment="prod", peppers=ring, watch=False, max_foreign_flights=6, timeout=30.0
    )
    authenticator.refresh()

    def knock(key: str) -> Identity | Reason:
        try:
            return authenticator.authenticate(key)
        except Refused as refused:
            return refused.reason

    flood = [Later(lambda number=number: knock(foreign(number))) for number in range(40)]  # type: ignore[misc]  # a default
    wait_until(lambda: len(authenticator._invented.under_way) == 6, 10, what="the flood to fill its share")
    assert isinstance(knock(minted), Identity)
    gate.open()
    answers = [caller.answer() for caller in flood]
    assert set(answers) <= {Reason.UNKNOWN_KEY, Reason.STORE_UNAVAILABLE}
    assert authenticator.health().outages == 0
    assert not authenticator._invented.under_way


def test_foreign_keys_that_wait_too_long_for_each_other_are_no_outage(
    store: Store, ring: PepperRing, minted: str
) -> None:
    async def scene() -> Identity:
        flood = [asyncio.create_task(authenticator.authenticate(foreign(number))) for number in range(50)]
        await asyncio.gather(*flood, return_exceptions=True)
        return await authenticator.authenticate(minted)

    slow = Selective(store)
    authenticator = AsyncAuthenticator(slow, environment="prod", peppers=ring, timeout=0.2)
    assert asyncio.run(scene()).key.name == "Production - Facturation"
    assert authenticator.health().outages == 0
    asyncio.run(authenticator.aclose())


def test_a_forged_tag_counts_as_foreign_while_it_is_not_known_which_peppers_there_are(
    store: Store, ring: PepperRing, minted: str
) -> None:
    """Its shape is a minted key's, but nobody vouches for it: it must not use their room."""
    body = "0" * 24
    tagged = f"pk_prod_{body}"
    checked = tagged + base62(1, 6)
    forged = checked + base62(zlib.crc32(checked.encode()), 6)
    described = asyncio.Event()

    class Silent(Selective):
        async def describe(self) -> Description:
            await described.wait()
            return self.sync.describe()

    async def scene() -> tuple[int, int]:
        flood = [asyncio.create_task(authenticator.authenticate(forged))]
        await asyncio.sleep(0.01)
        counted = len(authenticator._invented.under_way), len(authenticator._minted.under_way)
        described.set()
        await asyncio.gather(*flood, return_exceptions=True)
        return counted

    authenticator = AsyncAuthenticator(Silent(store), environment="prod", peppers=ring, watch=False)
    assert asyncio.run(scene()) == (1, 0)


# queues of our own


def test_a_full_queue_for_the_threads_of_sqlite_is_no_outage(
    tmp_path: Path, ring: PepperRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.stores.sqlite.MOST_WAITING", 8)
    url = f"sqlite:///{tmp_path}/keys.db"
    texts = minted_keys(url, ring, 200)

    async def scene() -> Sequence[object]:
        async with AsyncAuthenticator(url, environment="prod", peppers=ring) as authenticator:
            await authenticator.authenticate(texts[0])
            answers = await asyncio.gather(
                *(authenticator.authenticate(text) for text in texts[1:]), return_exceptions=True
            )
            assert authenticator.health().ok
            assert authenticator.health().outages == 0
            assert isinstance(await authenticator.authenticate(texts[-1]), Identity)
            return answers

    answers = asyncio.run(scene())
    reasons = {answer.reason for answer in answers if isinstance(answer, Refused)}
    assert reasons == {Reason.STORE_UNAVAILABLE}, "the queue was full"
    assert any(isinstance(answer, Identity) for answer in answers)


def minted_keys(url: str, ring: PepperRing, count: int) -> list[str]:
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    made = [keys.create_key(machine.id, name=f"Clef {n}", environment="prod") for n in range(count)]
    store.close()
    return [new.secret.reveal() for new in made]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, tmp_path / "redis") as server:
        yield server


def test_connections_to_redis_that_are_all_in_use_are_no_outage(
    server: RedisServer, ring: PepperRing
) -> None:
    url = f"redis://{server.address}?connections=1&timeout=0.1"
    texts = minted_keys(url, ring, 2)
    with Authenticator(url, environment="prod", peppers=ring) as authenticator:
        authenticator.authenticate(texts[0])
        room = authenticator._store._wire._room.now()  # type: ignore[attr-defined]  # a RedisStore
        room.get()
        with pytest.raises(Refused) as refused:
            authenticator.authenticate(texts[1])
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
        assert authenticator.health().ok
        room.put(None)
        assert authenticator.health().outages == 0
        assert isinstance(authenticator.authenticate(texts[1]), Identity)


def test_connections_of_an_event_loop_to_redis_that_are_all_in_use_are_no_outage(
    server: RedisServer, ring: PepperRing
) -> None:
    url = f"redis://{server.address}?connections=1&timeout=0.1"
    texts = minted_keys(url, ring, 2)

    async def scene() -> None:
        async with AsyncAuthenticator(url, environment="prod", peppers=ring) as authenticator:
            await authenticator.authenticate(texts[0])
            loops = authenticator._async_store._wire._loops  # type: ignore[attr-defined]  # an AsyncRedisStore
            async with next(iter(loops.values())).room:
                with pytest.raises(Refused):
                    await authenticator.authenticate(texts[1])
            assert authenticator.health().outages == 0
            assert isinstance(await authenticator.authenticate(texts[1]), Identity)

    asyncio.run(scene())


def test_a_pool_of_sql_connections_that_is_exhausted_is_no_outage(
    postgresql_server: SQLServer, ring: PepperRing
) -> None:
    url = postgresql_server.url(postgresql_server.database()) + "?timeout=0.2"
    texts = minted_keys(url, ring, 2)
    with Authenticator(url, environment="prod", peppers=ring) as authenticator:
        authenticator.authenticate(texts[0])
        engine = authenticator._store._engine  # type: ignore[attr-defined]  # a SQLStore
        taken = [engine.connect() for _ in range(20)]
        with pytest.raises(Refused):
            authenticator.authenticate(texts[1])
        for connection in taken:
            connection.close()
        assert authenticator.health().outages == 0
        assert isinstance(authenticator.authenticate(texts[1]), Identity)


# a stalled event loop


@pytest.fixture(params=["sqlite", "redis", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a real store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/keys.db"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("server")
        return f"redis://{server.address}"
    sql: SQLServer = request.getfixturevalue("postgresql_server")
    return sql.url(sql.database())


def test_an_app_that_blocks_its_event_loop_is_no_outage_of_the_store(
    place: str, ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    """Replies wait in the sockets meanwhile, and every timer of ours is overdue when the loop goes on."""
    texts = minted_keys(place, ring, 20)

    async def scene() -> Sequence[object]:
        async with AsyncAuthenticator(place, environment="prod", peppers=ring) as authenticator:
            await authenticator.start()
            await asyncio.gather(*(authenticator.authenticate(text) for text in texts[:10]))  # connections
            lookups = [asyncio.create_task(authenticator.authenticate(text)) for text in texts[10:]]
            for _ in range(3):
                await asyncio.sleep(0)  # they are on their way
            time.sleep(1.9)  # noqa: ASYNC251 - the fault
            answers = await asyncio.gather(*lookups, return_exceptions=True)
            assert authenticator.health().outages == 0
            return answers

    with caplog.at_level(logging.WARNING, "papaours_auth"):
        answers = asyncio.run(scene())
    assert [type(answer) for answer in answers] == [Identity] * 10, answers
    assert caplog.messages == []


def test_an_app_that_keeps_blocking_its_event_loop_is_no_outage_of_the_store(
    place: str, ring: PepperRing
) -> None:
    """Whatever takes several passes of the loop, such as connecting, meets a stall in each."""
    texts = minted_keys(place, ring, 30)

    async def scene() -> int:
        async with AsyncAuthenticator(place, environment="prod", peppers=ring) as authenticator:
            await authenticator.start()
            lookups = [asyncio.create_task(authenticator.authenticate(text)) for text in texts]
            while not all(lookup.done() for lookup in lookups):
                time.sleep(0.3)  # noqa: ASYNC251 - the fault
                await asyncio.sleep(0)
            await asyncio.gather(*lookups, return_exceptions=True)
            return authenticator.health().outages

    assert asyncio.run(scene()) == 0


# a store that hangs


def test_a_store_that_hangs_is_found_out_and_then_costs_nobody_a_timeout(
    server: RedisServer, ring: PepperRing
) -> None:
    url = f"redis://{server.address}"
    texts = minted_keys(url, ring, 200)

    async def scene() -> None:
        async with AsyncAuthenticator(url, environment="prod", peppers=ring) as authenticator:
            await authenticator.authenticate(texts[0])
            threads = threading.active_count()
            server.freeze()
            began = time.monotonic()
            first = await asyncio.gather(
                *(authenticator.authenticate(text) for text in texts[1:100]), return_exceptions=True
            )
            assert {getattr(answer, "reason", None) for answer in first} == {Reason.STORE_UNAVAILABLE}
            assert time.monotonic() - began < 3.0, "each waits for one timeout at most, all at once"
            while authenticator.health().ok:
                await asyncio.sleep(0.01)
                assert time.monotonic() - began < 5.0, "the breaker opens"
            began = time.monotonic()
            for text in texts[100:]:
                with pytest.raises(Refused):
                    await authenticator.authenticate(text)
            assert time.monotonic() - began < 1.5, "at most one of them tried"
            assert threading.active_count() <= threads + 1
            assert not authenticator._minted.under_way
            server.thaw()
            began = time.monotonic()
            while not authenticator.health().ok:
                await asyncio.sleep(0.01)
                assert time.monotonic() - began < 5.0, "the breaker closes"
            assert isinstance(await authenticator.authenticate(texts[-1]), Identity)

    asyncio.run(scene())


def test_our_timer_opens_the_breaker_only_where_the_watcher_hears_nothing_either(
    spy: Spy, ring: PepperRing, minted: str
) -> None:
    """A store without timers of its own, in which lookups hang. Its readings tell whether it is the store."""

    async def scene() -> None:
        authenticator = AsyncAuthenticator(
            Threaded(spy.store), environment="prod", peppers=ring, timeout=0.2, max_staleness=60.0
        )
        await authenticator.start()
        gate = Gate()
        spy.on_lookup = gate.before
        with pytest.raises(Refused):
            await authenticator.authenticate(minted)
        await asyncio.sleep(0.1)
        assert authenticator.health().outages == 0  # the watcher was woken, and was answered
        silent = Gate()

        def hangs(ask: Callable[[], Reading]) -> Reading:
            silent.hold()
            raise StoreUnavailable("no answer in time")

        spy.on_read = hangs
        with pytest.raises(Refused):
            await authenticator.authenticate(minted)
        await asyncio.to_thread(silent.reached.acquire)
        assert authenticator.health().outages == 0
        silent.open()
        while authenticator.health().outages == 0:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.01)
        assert not authenticator.health().ok
        gate.open()
        spy.on_read = lambda ask: ask()
        await authenticator.aclose()

    asyncio.run(scene())


def test_a_watcher_that_waits_for_an_answer_for_long_is_witness_enough(
    spy: Spy, ring: PepperRing, minted: str
) -> None:
    """Its own reading may hang for ever, in a store without timeouts."""

    async def scene() -> None:
        authenticator = AsyncAuthenticator(
            Threaded(spy.store), environment="prod", peppers=ring, timeout=0.2, max_staleness=60.0
        )
        await authenticator.start()
        gate, silent = Gate(), Gate()

        def hangs(ask: Callable[[], Reading]) -> Reading:
            silent.hold()
            return ask()

        spy.on_lookup, spy.on_read = gate.before, hangs
        for _ in range(3):
            with pytest.raises(Refused):
                await authenticator.authenticate(minted)
        assert authenticator.health().outages == 1
        silent.open()
        gate.open()
        await authenticator.aclose()

    asyncio.run(scene())


# an entry in use is refreshed before its lifetime ends


def test_an_entry_in_use_is_refreshed_by_one_caller_before_its_lifetime_ends(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, minted: str
) -> None:
    door = opens(lifetime=100.0, max_staleness=1_000.0)
    assert isinstance(door.knock(minted), Identity)
    clock.advance(89.9)
    assert door.authenticator.cached(minted.encode()) is not None
    assert spy.lookups == 1
    clock.advance(0.2)
    assert door.authenticator.cached(minted.encode()) is None  # somebody should ask
    assert isinstance(door.knock(minted), Identity)
    assert spy.lookups == 2
    clock.advance(89.0)
    assert door.authenticator.cached(minted.encode()) is not None
    assert spy.lookups == 2


@pytest.mark.parametrize("fault", ["down", "full"])
def test_an_entry_that_cannot_be_refreshed_serves_until_its_lifetime_ends(
    fault: str, opens: Callable[..., Door], spy: Spy, clock: ManualClock, minted: str
) -> None:
    door = opens(lifetime=100.0, max_staleness=1_000.0)
    assert isinstance(door.knock(minted), Identity)

    def down(ask: object) -> Found:
        raise StoreUnavailable("no route to host")

    if fault == "down":
        spy.on_lookup = down
    else:
        door.authenticator._minted.most = 0
    for _ in range(2):
        clock.advance(45.5)
        assert isinstance(door.knock(minted), Identity)
    clock.advance(9.1)
    assert door.knock(minted) is Reason.STORE_UNAVAILABLE


def test_while_one_caller_refreshes_an_entry_the_others_are_answered_from_it(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, minted: str
) -> None:
    door = opens(lifetime=100.0, max_staleness=1_000.0, timeout=30.0)
    assert isinstance(door.knock(minted), Identity)
    clock.advance(95)
    gate = Gate()
    spy.on_lookup = gate.before
    if isinstance(door.authenticator, Authenticator):
        refresher = Later(lambda: door.knock(minted))
        assert gate.reached.acquire(timeout=30)
        for _ in range(10):
            assert isinstance(door.knock(minted), Identity)
        gate.open()
        assert isinstance(refresher.answer(), Identity)
    else:
        authenticator = door.authenticator

        async def scene() -> None:
            refresher = asyncio.create_task(authenticator.authenticate(minted))
            await asyncio.to_thread(gate.reached.acquire)
            for _ in range(10):
                await authenticator.authenticate(minted)
            gate.open()
            assert isinstance(await refresher, Identity)

        asyncio.run(scene())
    assert spy.lookups == 2


def test_a_key_disabled_while_it_is_refreshed_is_refused(
    opens: Callable[..., Door], spy: Spy, admin: Keys, clock: ManualClock, minted: str
) -> None:
    """By the caller who refreshes as well, though the store then fails: what he found in the cache is gone."""
    door = opens(lifetime=100.0, max_staleness=1_000.0)
    assert isinstance(door.knock(minted), Identity)
    clock.advance(95)
    key = next(key for key in admin.keys() if key.name == "Production - Facturation")

    def changes(ask: object) -> Any:
        admin.disable_key(key.id)
        door.refresh()
        raise StoreUnavailable("no route to host")

    spy.on_lookup = changes
    assert door.knock(minted) is Reason.STORE_UNAVAILABLE


def test_a_key_that_is_gone_when_it_is_refreshed_is_unknown(
    opens: Callable[..., Door], spy: Spy, admin: Keys, machine: Machine, clock: ManualClock, minted: str
) -> None:
    """Even where no change told of it."""
    door = opens(lifetime=100.0, max_staleness=1_000.0)
    assert isinstance(door.knock(minted), Identity)
    clock.advance(95)
    spy.on_lookup = lambda ask: ask()._replace(record=None)
    assert door.knock(minted) is Reason.UNKNOWN_KEY
    assert door.knock(minted) is Reason.UNKNOWN_KEY
    assert not door.authenticator._cache.entries


def test_an_expiry_is_no_later_for_an_entry_that_is_refreshed(
    opens: Callable[..., Door], spy: Spy, admin: Keys, machine: Machine, clock: ManualClock
) -> None:
    door = opens(lifetime=100.0, max_staleness=1_000.0)
    new = admin.create_key(
        machine.id, name="Production - Court", environment="prod", expires=timedelta(seconds=95)
    )
    door.refresh()
    text = new.secret.reveal()
    assert isinstance(door.knock(text), Identity)
    spy.on_lookup = lambda ask: (_ for _ in ()).throw(StoreUnavailable("gone"))
    clock.advance(94.9)
    assert isinstance(door.knock(text), Identity)
    clock.advance(0.2)
    assert door.knock(text) is Reason.STORE_UNAVAILABLE
