"""The authenticators, over real stores and a clock that tests move: what they answer, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    ConfigurationError,
    Identity,
    InvalidInput,
    KeyFormat,
    Keys,
    Machine,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_store,
    parse_peppers,
)
from papaours_auth.authenticator import _Flight
from papaours_auth.http import render
from papaours_auth.outage import FIRST_RETRY
from papaours_auth.stores import (
    Author,
    Description,
    Found,
    PepperRecord,
    Reading,
    Store,
    open_async_store,
)
from papaours_auth.verify import Claim
from support.doors import Door, Gate, Later, Spy, Threaded, open_door
from support.servers import wait_until
from support.watchers import watchers

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"
STRANGER = "pk_prod_000000000000000000"
OURS = AsyncAuthenticator | Authenticator


@pytest.fixture
def machine(admin: Keys) -> Machine:
    return admin.create_machine(
        "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
    )


@pytest.fixture
def seed(admin: Keys, machine: Machine) -> str:
    """The id of the seed document's key, imported. A door that is open already must `refresh` to cache it."""
    return admin.import_key(machine.id, SEED, name="Production - Service Facturation").id


# one table, both authenticators, miss and hit


class Case(NamedTuple):
    """A key as ``make`` leaves it, how it is presented, and what comes of it."""

    name: str
    expected: Reason | None
    reads: int
    make: Callable[[Keys, Machine], str | bytes]
    asked: dict[str, Any]


def minted(environment: str = "prod", **options: Any) -> Callable[[Keys, Machine], str]:
    def make(keys: Keys, machine: Machine) -> str:
        return keys.create_key(machine.id, name="A - Key", environment=environment, **options).secret.reveal()

    return make


def imported(then: Callable[[Keys, Machine], object]) -> Callable[[Keys, Machine], str]:
    def make(keys: Keys, machine: Machine) -> str:
        keys.import_key(machine.id, SEED, name="Production - Import")
        then(keys, machine)
        return SEED

    return make


def forged(keys: Keys, machine: Machine) -> str:
    """A key of our format, with a right checksum, by somebody without our pepper."""
    return KeyFormat().mint("prod", tag=lambda _: 0x1234).reveal()


def as_is(key: str | bytes) -> Callable[[Keys, Machine], str | bytes]:
    return lambda keys, machine: key


BOUND = minted(networks=["192.0.2.0/24", "2001:db8::/32"])
CASES = [
    Case("a minted key", None, 1, minted(), {}),
    Case("the seed's key", None, 1, imported(lambda keys, machine: None), {}),
    Case("as bytes", None, 1, lambda keys, machine: minted()(keys, machine).encode(), {}),
    Case("a stranger's key", Reason.UNKNOWN_KEY, 1, as_is(STRANGER), {}),
    Case("a forged key", Reason.MALFORMED_KEY, 0, forged, {}),
    Case("nothing", Reason.MALFORMED_KEY, 0, as_is(b""), {}),
    Case("a megabyte", Reason.MALFORMED_KEY, 0, as_is(b"pk_prod_" + b"a" * 1_000_000), {}),
    Case("smart quotes", Reason.MALFORMED_KEY, 0, as_is(f"“{SEED}”"), {}),
    Case("a lone surrogate", Reason.MALFORMED_KEY, 0, as_is("pk_prod_abc123def456\udcff"), {}),
    Case("another environment's", Reason.WRONG_ENVIRONMENT, 1, minted("test"), {}),
    Case("inactive", Reason.KEY_INACTIVE, 1, imported(lambda keys, _: keys.disable_key("Production - Import")), {}),
    Case(
        "of an inactive machine",
        Reason.MACHINE_INACTIVE,
        1,
        imported(lambda keys, machine: keys.disable_machine(machine.id)),
        {},
    ),
    Case("from its network", None, 1, BOUND, {"client": "192.0.2.7"}),
    Case("from its network, mapped", None, 1, BOUND, {"client": "::ffff:192.0.2.7"}),
    Case("from elsewhere", Reason.NETWORK_NOT_ALLOWED, 1, BOUND, {"client": "198.51.100.1"}),
    Case("from nowhere", Reason.NETWORK_NOT_ALLOWED, 1, BOUND, {}),
    Case("with the right it needs", None, 1, minted(), {"needs": "contrats:lecture"}),
    Case("without it", Reason.INSUFFICIENT_RIGHTS, 1, minted(), {"needs": ["contrats:lecture", "contrats:écriture"]}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_authenticators_answer_alike_from_the_store_and_from_the_cache(
    case: Case, door: Door, spy: Spy, admin: Keys, machine: Machine
) -> None:
    key = case.make(admin, machine)
    door.refresh()
    first, second = (door.knock(key, **case.asked) for _ in range(2))
    assert (first if isinstance(first, Reason) else None) == case.expected
    assert first == second
    assert spy.lookups == case.reads


def test_amendment_05_what_one_request_needs_is_asked_anew_of_the_next(
    door: Door, admin: Keys, machine: Machine
) -> None:
    key = minted(networks=["192.0.2.0/24"])(admin, machine)
    door.refresh()
    assert isinstance(door.knock(key, client="192.0.2.1"), Identity)
    assert door.knock(key, client="198.51.100.1") is Reason.NETWORK_NOT_ALLOWED
    assert door.knock(key, client="192.0.2.1", needs="contrats:suppression") is Reason.INSUFFICIENT_RIGHTS
    assert isinstance(door.knock(key, client="192.0.2.1", needs="contrats:lecture"), Identity)
    for _ in range(2):
        with pytest.raises(InvalidInput):
            door.knock(key, client="192.0.2.1", needs="contrats")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    presented=st.one_of(
        st.binary(max_size=300), st.text(max_size=300), st.from_regex(r"pk_prod_[0-9A-Za-z]{12,40}")
    )
)
def test_pitfall_13_authenticate_gives_an_identity_or_raises_refused(
    ring: PepperRing, presented: str | bytes
) -> None:
    """Anonymous is never the answer: not to hostile bytes, and not to an outage."""
    store = open_store("memory://")
    Keys(store, peppers=ring)
    for closed in (False, True):
        authenticator = Authenticator(store, environment="prod", peppers=ring, watch=False)
        with pytest.raises(Refused) as refusal:
            authenticator.authenticate(presented)
        assert refusal.value.known is None
        assert refusal.value.reason is not Reason.STORE_UNAVAILABLE or closed
        store.close()


def test_pitfall_2_an_oversized_key_is_refused_before_it_is_hashed(door: Door) -> None:
    def boom() -> Any:
        raise AssertionError("hashed")

    door.authenticator._keyed_hash = boom
    assert door.knock(b"k" * 257) is Reason.MALFORMED_KEY
    with pytest.raises(AssertionError, match="hashed"):
        door.knock(b"k" * 256)


def test_pitfall_29_a_wrong_key_that_looks_like_an_existing_one_is_exactly_an_unknown_key(
    door: Door, admin: Keys, machine: Machine, clock: ManualClock
) -> None:
    texts = {state: f"pk_prod_{state}0000000000" for state in ("inactive", "expired", "testing", "orphaned")}
    other = admin.create_machine("Service de paie", organisation="cfa-lyon")
    for state, text in texts.items():
        owner = other if state == "orphaned" else machine
        admin.import_key(
            owner.id, text, name=f"Clé {state}", expires=timedelta(hours=1) if state == "expired" else None,
            environment="test" if state == "testing" else None,
        )  # fmt: skip
    admin.disable_key("Clé inactive")
    admin.disable_machine(other.id)
    clock.advance(3_600)
    door.refresh()

    def refusal(key: str) -> Refused:
        with pytest.raises(Refused) as caught:
            door.authenticate(key)
        return caught.value

    told_apart = {refusal(text).reason for text in texts.values()}
    assert told_apart == {
        Reason.KEY_INACTIVE,
        Reason.KEY_EXPIRED,
        Reason.WRONG_ENVIRONMENT,
        Reason.MACHINE_INACTIVE,
    }
    assert all(refusal(text).known is not None for text in texts.values())
    nobody = refusal(STRANGER)
    for text in texts.values():
        for _ in range(2):
            lookalike = refusal(text[:-1] + "1")
            assert (lookalike.reason, lookalike.known, lookalike.needs) == (Reason.UNKNOWN_KEY, None, ())
            assert render(lookalike) == render(nobody)


# what it costs the store


def test_a_flood_of_forged_keys_causes_no_store_read(door: Door, spy: Spy) -> None:
    forgeries = [KeyFormat().mint("prod", tag=lambda _: 7).reveal() for _ in range(100)]
    assert {door.knock(forgery) for forgery in forgeries} == {Reason.MALFORMED_KEY}
    assert spy.lookups == 0


def test_pitfall_17_an_unknown_key_costs_one_read_until_it_is_created(
    door: Door, spy: Spy, admin: Keys, machine: Machine
) -> None:
    door.refresh()
    assert [door.knock(SEED) for _ in range(10)] == [Reason.UNKNOWN_KEY] * 10
    assert spy.lookups == 1
    admin.import_key(machine.id, SEED, name="Production - Service Facturation")
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)


def test_pitfall_17_a_random_key_flood_evicts_no_hot_key_and_is_bounded(
    opens: Callable[..., Door], spy: Spy, seed: str
) -> None:
    door = opens(max_unknown=10)
    assert isinstance(door.knock(SEED), Identity)
    for number in range(50):
        assert door.knock(f"pk_prod_{number:018}") is Reason.UNKNOWN_KEY
    assert isinstance(door.knock(SEED), Identity)
    assert spy.lookups == 51
    cache = door.authenticator._cache
    assert (len(cache.entries), len(cache.unknown)) == (1, 10)


def test_pitfall_16_a_key_is_refused_from_its_expiry_on_although_the_cache_is_trusted(
    door: Door, admin: Keys, machine: Machine, clock: ManualClock
) -> None:
    """On the hot path, which asks nobody: the watcher has read the store an instant ago and nothing has changed."""
    key = minted(expires=timedelta(seconds=60))(admin, machine)
    door.refresh()
    assert isinstance(door.knock(key), Identity)
    clock.advance(59.999)
    door.refresh()
    assert door.authenticator.cached(key.encode()) is not None
    clock.advance(0.001)
    assert door.authenticator.cached(key.encode()) is None
    assert door.knock(key) is Reason.KEY_EXPIRED


def test_an_entry_is_asked_for_anew_when_its_lifetime_is_over(
    opens: Callable[..., Door], seed: str, clock: ManualClock
) -> None:
    door = opens(lifetime=10.0)
    assert isinstance(door.knock(SEED), Identity)
    clock.advance(10.0)
    door.refresh()
    assert door.authenticator.cached(SEED.encode()) is None


def test_no_text_of_a_key_stays_in_the_cache(door: Door, seed: str) -> None:
    door.refresh()
    door.knock(SEED)
    door.knock(STRANGER)
    cache = door.authenticator._cache
    assert len(cache.entries) == len(cache.unknown) == 1
    for digest, entry in [*cache.entries.items(), *cache.unknown.items()]:
        kept = repr([digest, *(getattr(entry, name) for name in entry.__slots__)])
        assert SEED not in kept
        assert STRANGER not in kept


class HeldUp(dict[bytes, Any]):  # Any: entries
    """Entries, of which a thread finds one and is then held up, while something else happens."""

    def __init__(self, entries: dict[bytes, Any], meanwhile: Callable[[], object]) -> None:
        super().__init__(entries)
        self._meanwhile: list[Callable[[], object]] = [meanwhile]

    def get(self, digest: bytes, default: Any = None) -> Any:
        found = super().get(digest, default)
        if found is not None and self._meanwhile:
            self._meanwhile.pop()()
        return found


@pytest.mark.parametrize("how", ["cached", "recall", "recall_stale"])
def test_an_entry_from_before_a_reading_is_not_believed_by_trust_from_after_it(
    how: str, door: Door, clock: ManualClock, admin: Keys, seed: str
) -> None:
    """Held up between its look at the entry and its look at the trust, while an outage ends."""
    authenticator, cache = door.authenticator, door.authenticator._cache
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)
    digest, _ = authenticator._recall(SEED.encode())
    clock.advance(authenticator.max_staleness + 1)  # the outage
    admin.disable_key(seed)
    cache.entries = HeldUp(cache.entries, door.refresh)
    authenticator._entry = cache.entries.get
    now = clock.monotonic()
    found: object
    if how == "cached":
        found = authenticator.cached(SEED.encode())
    elif how == "recall":
        found = cache.recall(digest, now)
    else:
        found = cache.recall_stale(digest, now, 60.0)
    assert found is None
    assert cache.trusted_until > now  # the reading did come in between
    assert digest not in cache.entries


class Request:
    """What a caller holds while it is refused."""


@pytest.mark.parametrize(
    "key", ["forged", "unknown", "inactive", "known, without the right", "while the store is away"]
)
def test_a_refusal_keeps_nothing_of_its_request(
    key: str, door: Door, spy: Spy, admin: Keys, seed: str, ring: PepperRing
) -> None:
    """Not even until the collector comes by: a flood would hold its requests, and their keys, in memory."""
    forged = KeyFormat().mint("prod", tag=lambda _: 7).reveal()
    text = {"forged": forged, "unknown": STRANGER}.get(key, SEED)
    if key == "inactive":
        admin.disable_key(seed)
    door.refresh()
    if key == "while the store is away":
        spy.on_lookup = away

    authenticator, needs = door.authenticator, "contrats:suppression" if "right" in key else ()

    def refused() -> weakref.ref[Request]:
        request = Request()
        assert isinstance(authenticator, Authenticator)
        try:
            authenticator.authenticate(text, needs=needs)
        except Refused:
            return weakref.ref(request)
        pytest.fail("let in")

    async def refused_async() -> weakref.ref[Request]:
        request = Request()
        assert isinstance(authenticator, AsyncAuthenticator)
        try:
            await authenticator.authenticate(text, needs=needs)
        except Refused:
            return weakref.ref(request)
        pytest.fail("let in")

    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # uncached, then cached where it can be
            asked = (
                asyncio.run(refused_async()) if isinstance(authenticator, AsyncAuthenticator) else refused()
            )
            assert asked() is None
    finally:
        gc.enable()


def away(ask: Callable[[], Found]) -> Found:
    raise StoreUnavailable("gone")


# flights


class Slow:
    """A store for event loops whose lookups wait for ``gate``, and count themselves."""

    def __init__(self, store: Store) -> None:
        self.sync = store
        self.gate = asyncio.Event()
        self.lookups = 0

    async def lookup(self, claim: Claim) -> Found:
        self.lookups += 1
        await self.gate.wait()
        return self.sync.lookup(claim)

    async def describe(self) -> Description:
        return self.sync.describe()

    async def aclose(self) -> None:
        self.sync.close()


@pytest.fixture
def slow(store: Store) -> Slow:
    return Slow(store)


@pytest.fixture
def on_slow(slow: Slow, seed: str, ring: PepperRing, clock: ManualClock) -> AsyncAuthenticator:
    authenticator = AsyncAuthenticator(
        slow, environment="prod", peppers=ring, clock=clock, watch=False, max_foreign_flights=2
    )
    authenticator.refresh()
    return authenticator


def left_behind(authenticator: OURS) -> tuple[int, int]:
    return len(authenticator._flights), len(authenticator._minted.under_way) + len(
        authenticator._invented.under_way
    )


async def moments(count: int = 5) -> None:
    """Let the other tasks go on."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_herd_of_threads_after_one_key_makes_one_read(
    spy: Spy, ring: PepperRing, clock: ManualClock, seed: str
) -> None:
    gate = Gate()
    spy.on_lookup = gate.before
    door = open_door("sync", spy.store, peppers=ring, clock=clock, watch=False, timeout=30.0)
    door.refresh()
    together = threading.Barrier(50)

    def member() -> Identity | Reason:
        together.wait(30)
        return door.knock(SEED)

    herd = [Later(member) for _ in range(50)]
    assert gate.reached.acquire(timeout=30)
    assert not gate.reached.acquire(timeout=0.05)  # no second lookup, all the while
    gate.open()
    assert {type(member.answer()) for member in herd} == {Identity}
    assert spy.lookups == 1
    assert left_behind(door.authenticator) == (0, 0)


def test_a_herd_of_tasks_after_one_key_makes_one_read(
    slow: Slow, on_slow: AsyncAuthenticator, seed: str
) -> None:
    async def herd() -> list[Identity]:
        callers = [asyncio.create_task(on_slow.authenticate(SEED)) for _ in range(50)]
        await moments()
        slow.gate.set()
        return await asyncio.gather(*callers)

    assert {identity.key.id for identity in asyncio.run(herd())} == {seed}
    assert slow.lookups == 1
    assert left_behind(on_slow) == (0, 0)


@pytest.mark.parametrize("gone", [0, 1, 2], ids=["who began it", "who joined it", "both"])
def test_pitfall_23_a_cancelled_caller_leaves_the_lookup_to_the_others(
    gone: int, slow: Slow, on_slow: AsyncAuthenticator, seed: str
) -> None:
    async def scene() -> list[Identity | BaseException]:
        callers = [asyncio.create_task(on_slow.authenticate(SEED)) for _ in range(3)]
        await moments()
        for caller in callers[:2] if gone == 2 else [callers[gone]]:
            caller.cancel()
        await moments()
        slow.gate.set()
        return await asyncio.gather(*callers, return_exceptions=True)

    answers = [type(answer) for answer in asyncio.run(scene())]
    assert answers.count(asyncio.CancelledError) == (2 if gone == 2 else 1)
    assert answers.count(Identity) == (1 if gone == 2 else 2)
    assert slow.lookups == (1 if gone == 1 else 2)  # one of those who wait has begun another
    assert left_behind(on_slow) == (0, 0)


def test_pitfall_23_a_lookup_whose_callers_all_left_ends_quietly(
    slow: Slow, on_slow: AsyncAuthenticator, seed: str
) -> None:
    complaints: list[dict[str, Any]] = []

    async def scene() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        caller = asyncio.create_task(on_slow.authenticate(SEED))
        await moments()
        caller.cancel()
        await moments()
        assert left_behind(on_slow) == (0, 0)
        slow.gate.set()
        await moments()

    asyncio.run(scene())
    assert complaints == []
    assert len(on_slow._cache.entries) == 0


@pytest.mark.parametrize("slow_at", ["the first", "the second"])
def test_pitfall_21_a_store_too_slow_for_one_is_not_asked_again_by_each_who_waits(
    slow_at: str, slow: Slow, on_slow: AsyncAuthenticator, seed: str
) -> None:
    on_slow._timeout = 0.05

    async def scene() -> list[object]:
        callers = [asyncio.create_task(on_slow.authenticate(SEED)) for _ in range(20)]
        if slow_at == "the second":
            await moments()
            callers[0].cancel()
        return await asyncio.gather(*callers, return_exceptions=True)

    answers = [getattr(answer, "reason", None) for answer in asyncio.run(scene())]
    assert answers.count(Reason.STORE_UNAVAILABLE) == (20 if slow_at == "the first" else 19)
    assert slow.lookups == (1 if slow_at == "the first" else 2)
    assert left_behind(on_slow) == (0, 0)


def test_pitfall_21_a_slow_store_piles_up_no_tasks(slow: Slow, on_slow: AsyncAuthenticator) -> None:
    """Two lookups may be under way here, also after a change has detached them from those who come later."""

    async def scene() -> list[Reason]:
        callers = [asyncio.create_task(on_slow.authenticate(f"pk_prod_{n:018}")) for n in range(2)]
        await moments()
        refused = []
        for n in range(2, 20):
            if n == 10:
                on_slow._cache._tell(on_slow._cache.on_change)
            with pytest.raises(Refused) as caught:
                await on_slow.authenticate(f"pk_prod_{n:018}")
            refused.append(caught.value.reason)
        slow.gate.set()
        await asyncio.gather(*callers, return_exceptions=True)
        return refused

    assert set(asyncio.run(scene())) == {Reason.STORE_UNAVAILABLE}
    assert slow.lookups == 2
    assert left_behind(on_slow) == (0, 0)


def test_pitfall_21_a_slow_store_piles_up_no_threads(opens: Callable[..., Door], spy: Spy, seed: str) -> None:
    door = opens(max_foreign_flights=1, timeout=30.0)
    gate = Gate()
    spy.on_lookup = gate.before
    first = Later(lambda: door.knock(SEED))
    assert gate.reached.acquire(timeout=30)
    for _ in range(2):
        assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
        door.authenticator._cache._tell(door.authenticator._cache.on_change)
    assert spy.lookups == 1
    gate.open()
    assert isinstance(first.answer(), Identity)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY


class Silent(Threaded):
    """A store for event loops that never answers a lookup.

    Lookups are counted in the loop: where each takes a thread, one that begins later than the timeout never happens.
    """

    lookups = 0

    async def lookup(self, claim: Claim) -> Found:
        self.lookups += 1
        await asyncio.Event().wait()
        raise AssertionError


def test_pitfall_21_who_waits_for_anothers_lookup_waits_no_longer_than_the_timeout(
    spy: Spy, ring: PepperRing, seed: str
) -> None:
    door = open_door("sync", spy.store, peppers=ring, watch=False, timeout=0.05)
    gate = Gate()
    spy.on_lookup = gate.before
    first = Later(lambda: door.knock(SEED))
    assert gate.reached.acquire(timeout=30)
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    gate.open()
    assert isinstance(first.answer(), Identity)
    assert spy.lookups == 1


def test_pitfall_21_tasks_that_share_a_lookup_wait_no_longer_than_the_timeout(
    spy: Spy, ring: PepperRing, seed: str
) -> None:
    store = Silent(spy.store)
    authenticator = AsyncAuthenticator(store, environment="prod", peppers=ring, watch=False, timeout=0.05)
    authenticator.refresh()  # peppers are known: nothing but the key is asked for

    async def two_tasks() -> list[Identity | BaseException]:
        callers = (authenticator.authenticate(SEED) for _ in range(2))
        return await asyncio.gather(*callers, return_exceptions=True)

    answers = [getattr(answer, "reason", None) for answer in asyncio.run(two_tasks())]
    assert answers == [Reason.STORE_UNAVAILABLE] * 2
    assert store.lookups == 1


def test_a_thread_that_is_interrupted_does_not_interrupt_those_who_wait_for_it(
    spy: Spy, ring: PepperRing, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = open_door("sync", spy.store, peppers=ring, watch=False, timeout=30.0)
    gate = Gate()
    joined = threading.Event()
    waits = _Flight.result

    def joins(flight: _Flight, timeout: float) -> Any:  # Any: whatever it gives
        joined.set()
        return waits(flight, timeout)

    monkeypatch.setattr(_Flight, "result", joins)

    def interrupted(ask: Callable[[], Found]) -> Found:
        gate.hold()
        raise KeyboardInterrupt

    spy.on_lookup = interrupted
    first = Later(lambda: door.knock(SEED))
    assert gate.reached.acquire(timeout=30)
    second = Later(lambda: door.knock(SEED))
    assert joined.wait(30)
    gate.open()
    with pytest.raises(KeyboardInterrupt):
        first.answer()
    assert second.answer() is Reason.STORE_UNAVAILABLE
    assert left_behind(door.authenticator) == (0, 0)


def test_one_async_authenticator_serves_event_loops_in_several_threads(
    spy: Spy, ring: PepperRing, seed: str
) -> None:
    authenticator = AsyncAuthenticator(Threaded(spy.store), environment="prod", peppers=ring, watch=False)

    async def calls() -> Identity:
        for _ in range(20):
            authenticator.refresh()
            authenticator._cache.entries.clear()  # so that flights of both loops go on at once
            await asyncio.gather(*(authenticator.authenticate(SEED) for _ in range(20)))
        return await authenticator.authenticate(SEED)

    threads = [Later(lambda: asyncio.run(calls())) for _ in range(2)]
    assert [thread.answer() for thread in threads] == [authenticator.cached(SEED.encode())] * 2
    assert left_behind(authenticator) == (0, 0)


def test_a_loop_that_is_closed_is_let_go_of(opens: Callable[..., Door], spy: Spy) -> None:
    """An app that runs a loop for each call would otherwise keep them all, each with its timer and its tasks."""
    authenticator = AsyncAuthenticator(Threaded(spy.store), environment="prod", peppers=BOTH, watch=False)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def call() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        with pytest.raises(Refused):
            await authenticator.authenticate(STRANGER)

    for _ in range(5):
        asyncio.run(call())
    gc.collect()
    assert [loop() for loop in loops[:-1]] == [None] * 4


# fetched answers


def test_amendment_02_who_comes_after_a_change_does_not_join_a_lookup_from_before_it(
    spy: Spy, ring: PepperRing, admin: Keys, seed: str
) -> None:
    door = open_door("sync", spy.store, peppers=ring, watch=False)
    door.refresh()
    gate = Gate()

    def asked_before(ask: Callable[[], Found]) -> Found:
        found = ask()
        gate.hold()
        return found

    spy.on_lookup = asked_before
    first = Later(lambda: door.knock(SEED))
    assert gate.reached.acquire(timeout=30)
    admin.disable_key(seed)
    door.refresh()
    spy.on_lookup = lambda ask: ask()
    assert door.knock(SEED) is Reason.KEY_INACTIVE  # at once, and by a lookup of its own
    gate.open()
    assert first.answer() is Reason.KEY_INACTIVE  # looked up again: the first answer was overtaken
    assert spy.lookups == 3


@pytest.mark.parametrize(
    ("delays", "comes_in", "reads"),
    [
        pytest.param([1.999], True, 1, id="just in time"),
        pytest.param([2.0, 0.0], True, 2, id="too old once: fetched again"),
        pytest.param([2.0, 2.0], False, 2, id="too old twice: an outage"),
    ],
)
def test_amendment_02_a_fetched_answer_is_used_only_while_it_is_younger_than_max_staleness(
    door: Door, spy: Spy, clock: ManualClock, seed: str, delays: list[float], comes_in: bool, reads: int
) -> None:
    def slowly(ask: Callable[[], Found]) -> Found:
        found = ask()
        clock.advance(delays[spy.lookups - 1])
        return found

    spy.on_lookup = slowly
    answer = door.knock(SEED)
    assert isinstance(answer, Identity) if comes_in else answer is Reason.STORE_UNAVAILABLE
    assert spy.lookups == reads


# outages


def unavailable(*_: object) -> Any:
    raise StoreUnavailable("no route to host")


def test_pitfall_21_a_store_that_cannot_answer_is_an_outage_and_never_an_unknown_key(
    door: Door, spy: Spy, clock: ManualClock, seed: str
) -> None:
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    spy.on_lookup = spy.on_read = unavailable
    assert isinstance(door.knock(SEED), Identity)  # as fresh as it was
    clock.advance(2.0)
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    spy.on_lookup = lambda ask: ask()
    clock.advance(FIRST_RETRY * 2)  # twice it failed
    assert isinstance(door.knock(SEED), Identity)


def test_pitfall_21_a_store_that_is_down_at_the_start_is_an_outage_until_it_answers(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, seed: str
) -> None:
    spy.on_describe = unavailable
    door = opens()
    with pytest.raises(StoreUnavailable):
        door.start()
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    spy.on_describe = lambda ask: ask()
    clock.advance(FIRST_RETRY)
    assert isinstance(door.knock(SEED), Identity)


# peppers


def pepper(id_: str, first: int) -> str:
    return f"{id_}:" + base64.urlsafe_b64encode(bytes(range(first, first + 32))).decode()


BOTH = parse_peppers(f"{pepper('p1', 0)},{pepper('p2', 100)}")
SECOND = parse_peppers(pepper("p2", 100))


AUTHOR = Author("test", datetime.now(UTC))


def add_second(store: Store, status: Any) -> None:
    proof = SECOND.peppers[0].proof(store.describe().installation)
    store.add_pepper(PepperRecord("p2", proof, status), Author("test", datetime.now(UTC)))


def test_a_wrong_pepper_stops_at_the_start_and_is_an_outage_at_run_time(
    opens: Callable[..., Door], seed: str
) -> None:
    door = opens(peppers=parse_peppers(pepper("p1", 100)))
    with pytest.raises(ConfigurationError, match="'p1' is not the one this store was made with"):
        door.start()
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE


def test_without_the_primary_pepper_a_key_that_is_not_found_is_an_outage(
    opens: Callable[..., Door], store: Store, seed: str
) -> None:
    add_second(store, "accept")
    door = opens(peppers=SECOND)
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    store.set_pepper_status("p2", "primary", Author("test", datetime.now(UTC)))
    door.refresh()
    assert door.knock(SEED) is Reason.UNKNOWN_KEY


@pytest.mark.parametrize(
    "when", ["before the call", "while peppers are checked", "while the key is looked up"]
)
def test_a_pepper_that_returns_is_tried_at_once(
    when: str, opens: Callable[..., Door], spy: Spy, admin: Keys, machine: Machine, clock: ManualClock
) -> None:
    add_second(spy.real, "retired")
    door = opens(peppers=BOTH)

    def returns() -> None:
        spy.on_describe = lambda ask: ask()
        spy.on_lookup = lambda ask: ask()
        spy.real.set_pepper_status("p2", "primary", Author("test", datetime.now(UTC)))
        Keys(spy.real, peppers=BOTH, clock=clock).import_key(machine.id, SEED, name="Production - Import")
        door.refresh()

    def overtakes_the_check(ask: Callable[[], Description]) -> Description:
        description = ask()
        returns()
        return description

    def overtakes_the_lookup(ask: Callable[[], Found]) -> Found:
        returns()
        return ask()

    if when == "while peppers are checked":
        spy.on_describe = overtakes_the_check
    else:
        assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    if when == "while the key is looked up":
        spy.on_lookup = overtakes_the_lookup
    elif when == "before the call":
        returns()
    assert isinstance(door.knock(SEED), Identity)


def test_an_answer_is_not_used_where_peppers_were_checked_anew_after_its_key_was_read(
    opens: Callable[..., Door], spy: Spy, admin: Keys, machine: Machine, clock: ManualClock
) -> None:
    add_second(spy.real, "retired")
    door = opens(peppers=BOTH)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY

    def overtaken(ask: Callable[[], Found]) -> Found:
        spy.on_lookup = lambda ask: ask()
        spy.real.set_pepper_status("p2", "primary", AUTHOR)
        Keys(spy.real, peppers=BOTH, clock=clock).import_key(machine.id, SEED, name="Production - Import")
        door.refresh()
        assert door.knock(STRANGER) is Reason.UNKNOWN_KEY  # another call checks them
        return ask()

    spy.on_lookup = overtaken
    assert isinstance(door.knock(SEED), Identity)


def peppers_as(description: Description, **columns: Any) -> Description:
    """Say other things of all peppers."""
    return description._replace(peppers=tuple(each._replace(**columns) for each in description.peppers))


def retire_first(store: Store) -> None:
    store.set_pepper_status("p2", "primary", AUTHOR)
    store.set_pepper_status("p1", "retired", AUTHOR)


@pytest.mark.parametrize("feed", ["tells", "is silent"])
def test_keys_of_a_retired_pepper_are_refused_within_max_staleness(
    feed: str, opens: Callable[..., Door], store: Store, seed: str, clock: ManualClock
) -> None:
    add_second(store, "accept")
    door = opens(peppers=BOTH)
    assert isinstance(door.knock(SEED), Identity)
    retire_first(store)
    if feed == "tells":
        door.refresh()
    else:
        clock.advance(door.authenticator.max_staleness)
    assert door.knock(SEED) is Reason.UNKNOWN_KEY


def test_an_answer_is_as_old_as_what_the_peppers_were_known_to_be(
    opens: Callable[..., Door], spy: Spy, seed: str, clock: ManualClock
) -> None:
    add_second(spy.real, "accept")
    door = opens(peppers=BOTH)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    retire_first(spy.real)
    clock.advance(door.authenticator.max_staleness - 0.1)

    def slowly(ask: Callable[[], Found]) -> Found:
        clock.advance(0.2)
        return ask()

    spy.on_lookup = slowly
    assert door.knock(SEED) is Reason.UNKNOWN_KEY


def test_a_primary_pepper_that_is_missing_is_noticed_although_the_feed_is_silent(
    opens: Callable[..., Door], store: Store, seed: str, clock: ManualClock
) -> None:
    door = opens()
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    add_second(store, "accept")
    store.set_pepper_status("p2", "primary", AUTHOR)
    clock.advance(door.authenticator.max_staleness)
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize("known", [True, False], ids=["known to be missing", "not known to be"])
def test_a_key_minted_under_a_primary_pepper_that_is_missing_is_not_taken_for_a_forged_one(
    known: bool,
    opens: Callable[..., Door],
    spy: Spy,
    seed: str,
    admin: Keys,
    machine: Machine,
    clock: ManualClock,
) -> None:
    door = opens()
    assert door.knock(forged(admin, machine)) is Reason.MALFORMED_KEY
    add_second(spy.real, "accept")
    spy.real.set_pepper_status("p2", "primary", AUTHOR)
    theirs = Keys(spy.real, peppers=BOTH, clock=clock)
    key = theirs.create_key(machine.id, name="Production - New", environment="prod").secret.reveal()
    door.refresh()
    if known:
        assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    before = spy.lookups
    assert door.knock(key) is Reason.STORE_UNAVAILABLE
    assert spy.lookups == before
    assert isinstance(door.knock(SEED), Identity)  # the breaker is for a store that does not answer


def test_what_was_judged_by_peppers_that_no_reading_told_is_not_kept(
    opens: Callable[..., Door], spy: Spy, seed: str, clock: ManualClock
) -> None:
    """We asked for them between two backups: what we heard then is in no log, so nothing would ever take it back."""
    add_second(spy.real, "accept")
    door = opens(peppers=BOTH)
    assert isinstance(door.knock(SEED), Identity)
    clock.advance(door.authenticator.max_staleness)

    def retired(ask: Callable[[], Description]) -> Description:
        return peppers_as(ask(), status="retired")

    spy.on_describe = retired
    assert door.knock(SEED) is Reason.UNKNOWN_KEY
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)


def test_peppers_are_asked_for_once_while_readings_tell_them(
    opens: Callable[..., Door], spy: Spy, seed: str, clock: ManualClock
) -> None:
    """A store that goes on after an outage is not asked for more than the key."""
    add_second(spy.real, "accept")
    door = opens(peppers=BOTH)
    door.start()
    spy.on_describe = unavailable
    for retired in (False, True):
        if retired:
            retire_first(spy.real)
        clock.advance(door.authenticator.max_staleness)
        door.refresh()
        assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    assert door.knock(SEED) is Reason.UNKNOWN_KEY  # it was digested under the one that is retired


def test_a_pepper_that_a_reading_tells_to_be_another_one_is_an_outage(
    opens: Callable[..., Door], spy: Spy, seed: str
) -> None:
    door = opens()
    assert isinstance(door.knock(SEED), Identity)

    def tells(ask: Callable[[], Reading]) -> Reading:
        reading = ask()
        peppers = peppers_as(spy.real.describe(), proof=b"?" * 32).peppers
        return reading._replace(news={0: reading.news[0]._replace(peppers=peppers)})

    assert door.authenticator.health().ok
    spy.on_read = tells
    spy.on_describe = lambda ask: peppers_as(ask(), proof=b"?" * 32)
    door.refresh()
    assert not door.authenticator.health().ok
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    door.refresh()  # that the store answers is not all there is to it
    assert not door.authenticator.health().ok
    assert "'p1' is not the one this store was made with" in door.authenticator.health().error


@pytest.mark.parametrize("overtaken", ["retired", "not yet retired"])
def test_threads_that_bind_at_once_do_not_mix_what_each_was_told(
    overtaken: str,
    opens: Callable[..., Door],
    spy: Spy,
    seed: str,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is held while it binds by a reading; another binds by what it had asked for before or after."""
    add_second(spy.real, "accept")
    door = opens(peppers=BOTH)
    authenticator, compare = door.authenticator, PepperRing.__eq__
    sent, first = clock.monotonic(), spy.real.describe()
    retire_first(spy.real)
    late, now = first, spy.real.describe()
    if overtaken == "retired":
        late, now = now, first
        spy.real.set_pepper_status("p1", "primary", AUTHOR)
        spy.real.set_pepper_status("p2", "accept", AUTHOR)
    authenticator._take(now, sent)
    authenticator.refresh()

    def held(ring: PepperRing, other: object) -> bool:
        same = compare(ring, other)
        monkeypatch.setattr(PepperRing, "__eq__", compare)
        authenticator._take(late, sent)
        return same

    monkeypatch.setattr(PepperRing, "__eq__", held)
    assert authenticator._binds(clock.monotonic()) is not None
    assert PepperRing.__eq__ is compare
    authenticator.refresh()
    answer = door.knock(SEED)
    assert answer is Reason.UNKNOWN_KEY if overtaken == "not yet retired" else isinstance(answer, Identity)


# options, start and close


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "option",
    [
        "max_staleness",
        "max_known",
        "max_unknown",
        "max_flights",
        "max_foreign_flights",
        "lifetime",
        "timeout",
    ],
)
def test_an_option_that_bounds_nothing_stops_at_the_start(
    option: str, value: float, store: Store, ring: PepperRing
) -> None:
    with pytest.raises(ConfigurationError, match=option):
        open_door("sync", store, peppers=ring, **{option: value})


def test_an_environment_that_does_not_exist_stops_at_the_start(store: Store, ring: PepperRing) -> None:
    for kind in (Authenticator, lambda store, **options: AsyncAuthenticator(Threaded(store), **options)):
        with pytest.raises(ConfigurationError, match="'production' does not exist"):
            kind(store, environment="production", peppers=ring)


def test_pitfall_32_without_a_pepper_nothing_starts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PAPAOURS_PEPPER", "PAPAOURS_PEPPER_FILE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigurationError, match="no pepper: set PAPAOURS_PEPPER"):
        Authenticator(store, environment="prod")


@pytest.fixture
def url(tmp_path: Path, ring: PepperRing) -> str:
    """A store on disk with the seed's key."""
    url = f"sqlite:///{tmp_path}/of-url.db"
    open_store(url, create=True).close()
    with Keys(url, peppers=ring) as keys:
        owner = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(owner.id, SEED, name="Production - Service Facturation")
    return url


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_it_starts_at_the_first_call_stops_when_closed_and_may_be_started_again(
    kind: str, url: str, ring: PepperRing
) -> None:
    door = open_door(kind, url, peppers=ring)
    assert watchers() == []
    for _ in range(2):
        assert isinstance(door.knock(SEED), Identity)
        assert len(watchers()) == 1
        door.close()
        assert watchers() == []
        door.close()  # twice is once
        door.start()
    door.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_store_is_opened_once_and_once_more_after_each_close(
    kind: str, url: str, ring: PepperRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for name, opener in (("open_store", open_store), ("open_async_store", open_async_store)):

        def counted(url: str, *, opener: Any = opener) -> Any:
            opened.append(url)
            return opener(url)

        monkeypatch.setattr(f"papaours_auth.authenticator.{name}", counted)
    door = open_door(kind, url, peppers=ring)
    for times in (1, 2, 3):
        door.start()
        door.start()
        assert isinstance(door.knock(SEED), Identity)
        assert opened == [url] * times
        door.close()


def test_it_closes_with_its_block(url: str, ring: PepperRing) -> None:
    with Authenticator(url, environment="prod", peppers=ring) as authenticator:
        authenticator.authenticate(SEED)

    async def block() -> AsyncAuthenticator:
        async with AsyncAuthenticator(url, environment="prod", peppers=ring) as twin:
            await twin.authenticate(SEED)
        return twin

    for closed in (authenticator, asyncio.run(block())):
        with pytest.raises(StoreUnavailable, match="closed"):
            closed._store.describe()
    assert watchers() == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_store_that_was_given_opened_stays_open(kind: str, store: Store, ring: PepperRing) -> None:
    open_door(kind, store, peppers=ring).close()
    assert store.describe().installation


# fork


def in_child(body: Callable[[], object]) -> Callable[[], object]:
    """Run ``body`` in a forked child. Gives what waits for its answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = body()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            answer = repr(error)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)

    def report() -> object:
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    return report


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pitfall_22_a_child_starts_anew_and_its_parent_goes_on(
    kind: str, url: str, ring: PepperRing, tmp_path: Path
) -> None:
    """gunicorn --preload: the app, its cache and its watcher were there before the fork."""
    door = open_door(kind, url, peppers=ring)
    assert isinstance(door.knock(SEED), Identity)
    mine = watchers()
    let_in = tmp_path / "the child has let the key in"

    def child() -> object:
        inherited = [len(watchers()), len(door.authenticator._cache.entries)]
        came_in = isinstance(door.knock(SEED), Identity)
        let_in.touch()
        wait_until(lambda: door.knock(SEED) is Reason.KEY_INACTIVE, 10, what="the child to refuse")
        return [inherited, came_in, len(watchers())]

    report = in_child(child)
    wait_until(let_in.exists, 10, what=let_in.name)
    with Keys(url) as keys:
        keys.disable_key("Production - Service Facturation")
    wait_until(lambda: door.knock(SEED) is Reason.KEY_INACTIVE, 10, what="the parent to refuse")
    assert report() == [[0, 0], True, 1]
    assert watchers() == mine
    door.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_pitfall_22_a_fork_in_the_midst_of_a_lookup_leaves_the_child_none_of_it(
    spy: Spy, ring: PepperRing, seed: str
) -> None:
    door = open_door("sync", spy.store, peppers=ring, watch=False)
    gate = Gate()
    spy.on_lookup = gate.before
    first = Later(lambda: door.knock(SEED))
    assert gate.reached.acquire(timeout=30)

    def child() -> object:
        spy.on_lookup = lambda ask: ask()
        return [left_behind(door.authenticator), isinstance(door.knock(SEED), Identity)]

    assert in_child(child)() == [[0, 0], True]
    gate.open()
    assert isinstance(first.answer(), Identity)


def test_a_hit_reads_attributes_the_fast_way(ring: PepperRing, store: Store) -> None:
    """CPython shares the names of at most 30 attributes between instances: with more, a hit takes 40 ns longer."""
    sync = Authenticator(store, environment="prod", peppers=ring)
    twin = AsyncAuthenticator(Threaded(store), environment="prod", peppers=ring)
    assert max(len(vars(each)) for each in (sync, twin, sync._cache)) < 30
