"""Throttling of repeated failures: bad keys are told to wait, and a valid key is never refused by it."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import parse
from limits.strategies import FixedWindowRateLimiter

from conftest import ManualClock
from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    ConfigurationError,
    Keys,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_store,
    parse_peppers,
    throttle_redis,
)
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.digest import new_pepper
from papaours_auth.keys import NewKey
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.throttle import COUNTED, REST, Throttle
from papaours_auth.throttle_storage import Limiter, Windows
from papaours_auth.usage import Batch, CallableSink, Recorder
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware
from support.alone import run_alone
from support.calls import Recorded, environ_of, http_scope, run_asgi, run_wsgi, wsgi_ok
from support.doors import Spy, Threaded
from support.redis_servers import (
    NEWEST,
    WHY_NOT,
    Certificates,
    RedisServer,
    make_certificates,
    redis_cluster,
    redis_sentinel,
    redis_server,
    speaks_tls,
    wait_for_failover,
)
from support.servers import free_port, serving, wait_until

SEED = "pk_prod_abc123def456ghi789"
UNKNOWN = "pk_prod_0123456789abcdef"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "throttle.md"
HERE, ELSEWHERE = "203.0.113.9", "198.51.100.7"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]


class Door:
    """Either middleware over a store that counts its lookups, called with a key from an address."""

    def __init__(self, kind: str, ring: PepperRing, clock: ManualClock, **options: Any) -> None:
        self.store = MemoryStore()
        self.keys = Keys(self.store, peppers=ring, clock=clock)
        machine = self.keys.create_machine("Service de facturation", organisation="cfa-lyon").id
        self.keys.import_key(machine, SEED, name="Production - Service Facturation")
        made = [self._made(machine, f"Production v{number}") for number in range(3)]
        self.good = [new.secret.reveal() for new in made[:2]]
        self.inactive = made[2].secret.reveal()
        self.keys.disable_key(made[2].key.id)
        self.bound = self._made(machine, "Réseau", networks=["192.0.2.0/24"]).secret.reveal()
        self.spy = Spy(self.store)
        given: dict[str, Any] = {"environment": "prod", "peppers": ring, "clock": clock, "watch": False}
        self.authenticator: Any
        self.app: Any
        self._call: Callable[[str, list[tuple[str, str]]], Answer]
        if kind == "asgi":
            self.authenticator = AsyncAuthenticator(Threaded(self.spy.store), **given)
            self.app = ASGIMiddleware(Recorded(), authenticator=self.authenticator, **options)
            self._call = self._asgi
        else:
            self.authenticator = Authenticator(self.spy.store, **given)
            self.app = WSGIMiddleware(wsgi_ok, authenticator=self.authenticator, **options)
            self._call = self._wsgi
        self.authenticator.refresh()

    def _made(self, machine: str, name: str, **options: Any) -> NewKey:
        return self.keys.create_key(machine, name=name, environment="prod", **options)

    def _asgi(self, address: str, headers: list[tuple[str, str]]) -> Answer:
        start, _ = run_asgi(self.app, http_scope(headers=headers, client=(address, 1) if address else None))
        return Answer(start["status"], {name.decode(): value.decode() for name, value in start["headers"]})

    def _wsgi(self, address: str, headers: list[tuple[str, str]]) -> Answer:
        status, sent, _ = run_wsgi(self.app, environ_of(headers=headers, REMOTE_ADDR=address))
        return Answer(int(status[:3]), sent)

    def knock(self, key: str | None, address: str = HERE, *more: tuple[str, str]) -> Answer:
        return self._call(address, [*([("X-API-KEY", key)] if key is not None else []), *more])

    def statuses(self, key: str | None, times: int, address: str = HERE) -> list[int]:
        return [self.knock(key, address).status for _ in range(times)]


@pytest.fixture(params=["asgi", "wsgi"])
def opens(request: pytest.FixtureRequest, ring: PepperRing, clock: ManualClock) -> Callable[..., Door]:
    def opened(limit: str = "3/minute", **options: Any) -> Door:
        throttle = options.pop("throttle", None) or Throttle(limit, clock=clock)
        return Door(request.param, ring, clock, throttle=throttle, **options)

    return opened


def forged(good: str) -> str:
    """A key in our format that no issuer made."""
    return good[:-1] + ("a" if good[-1] != "a" else "b")


# what is throttled, and for how long


def test_after_so_many_failures_a_network_is_told_to_wait_and_then_let_try_again(
    opens: Callable[..., Door], clock: ManualClock
) -> None:
    door = opens()
    assert door.statuses(UNKNOWN, 4) == [401, 401, 401, 429]
    clock.advance(12.5)
    door.authenticator.refresh()
    answer = door.knock(UNKNOWN)
    assert (answer.status, answer.headers["retry-after"]) == (429, "48")
    assert answer.headers["cache-control"] == "no-store"
    assert "www-authenticate" not in answer.headers
    assert door.statuses(UNKNOWN, 1, "203.0.113.200") == [429]  # the same /24
    assert door.statuses(UNKNOWN, 1, ELSEWHERE) == [401]
    clock.advance(47.5)
    door.authenticator.refresh()
    assert door.statuses(UNKNOWN, 4) == [401, 401, 401, 429]


def test_off_by_default(ring: PepperRing, clock: ManualClock) -> None:
    for kind in ("asgi", "wsgi"):
        door = Door(kind, ring, clock)
        assert door.app.throttle is None
        assert set(door.statuses(UNKNOWN, 50)) == {401}


def test_a_limit_alone_makes_a_throttle(ring: PepperRing, clock: ManualClock) -> None:
    door = Door("wsgi", ring, clock, throttle="2/hour")
    assert door.statuses("nonsense", 3) == [401, 401, 429]


def test_every_kind_of_bad_key_counts_together(opens: Callable[..., Door]) -> None:
    door = opens("4/minute")
    bad = [UNKNOWN, "nonsense", forged(door.good[0]), door.inactive, "pk_test_abc123def456ghi789"]
    assert [door.knock(key).status for key in bad] == [401, 401, 401, 401, 429]


def test_what_is_no_failure_neither_counts_nor_is_throttled(opens: Callable[..., Door]) -> None:
    door = opens("1/minute")

    def others() -> list[int]:
        twice = door.knock(SEED, HERE, ("Authorization", f"Bearer {door.good[0]}")).status
        return [*door.statuses(None, 3), *door.statuses(door.bound, 3), twice]

    expected = [401] * 3 + [403] * 3 + [400]
    assert others() == expected
    assert door.statuses(UNKNOWN, 2) == [401, 429]
    assert others() == expected


def test_an_outage_of_the_store_is_no_failure_of_the_client(opens: Callable[..., Door]) -> None:
    door = opens("1/minute")

    def broken(_: Any) -> Any:
        raise StoreUnavailable("broken on purpose")

    door.spy.on_lookup = broken
    assert door.statuses(SEED, 5) == [503] * 5
    assert door.statuses("nonsense", 2) == [401, 429]
    answer = door.knock(SEED)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")


def test_every_reason_is_decided_on() -> None:
    passed = {
        Reason.MISSING_KEY,
        Reason.AMBIGUOUS_CREDENTIALS,
        Reason.NETWORK_NOT_ALLOWED,
        Reason.INSUFFICIENT_RIGHTS,
        Reason.TOO_MANY_FAILURES,
        Reason.STORE_UNAVAILABLE,
    }
    assert set(Reason) == COUNTED | passed
    assert not COUNTED & passed


# a valid key


def test_a_valid_key_comes_in_from_a_throttled_network_cached_or_not(opens: Callable[..., Door]) -> None:
    door = opens("1/minute")
    assert door.statuses(door.good[0], 1) == [200]
    assert door.statuses(UNKNOWN, 2) == [401, 429]
    assert door.statuses(door.good[0], 1) == [200]  # cached
    before = door.spy.lookups
    assert door.statuses(door.good[1], 1) == [200]  # seen for the first time
    assert door.statuses(SEED, 1) == [200]  # not minted by us
    assert door.spy.lookups == before + 2


def test_a_call_that_is_let_in_never_meets_the_throttle(opens: Callable[..., Door]) -> None:
    class Untouchable(Throttle):
        def judge(self, refused: Refused, client: str | None) -> Refused:
            raise AssertionError("asked")

        async def ajudge(self, refused: Refused, client: str | None) -> Refused:
            raise AssertionError("asked")

    door = opens(throttle=Untouchable())
    assert door.statuses(door.good[0], 3) == [200] * 3


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["good", "other", "seed", "unknown", "random", "forged", "nonsense", "inactive", "none"]
        ),
        st.sampled_from([HERE, "203.0.113.77", ELSEWHERE, "2001:db8::1", ""]),
        st.sampled_from([0.0, 0.0, 0.5, 20.0, 70.0]),
    ),
    max_size=60,
)


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
@given(actions=ACTIONS, limit=st.integers(1, 3), networks=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_valid_key_is_never_refused_by_the_throttle(
    kind: str, ring: PepperRing, actions: list[tuple[str, str, float]], limit: int, networks: int
) -> None:
    clock = ManualClock()
    throttle = Throttle(f"{limit}/minute", max_networks=networks, clock=clock)
    door = Door(kind, ring, clock, throttle=throttle)
    texts = {
        "good": door.good[0], "other": door.good[1], "seed": SEED, "unknown": UNKNOWN, "forged": forged(door.good[0]),
        "nonsense": "nonsense", "inactive": door.inactive, "none": None,
    }  # fmt: skip
    for place, (what, address, pause) in enumerate(actions):
        clock.advance(pause)
        door.authenticator.refresh()
        text = f"pk_prod_random{place:08}" if what == "random" else texts[what]
        status = door.knock(text, address).status
        if what in ("good", "other", "seed"):
            assert status == 200
        else:
            assert status in ((401,) if what == "none" else (401, 429))


# what a throttled network costs


def test_what_can_be_refused_without_the_store_is_not_asked_of_it(opens: Callable[..., Door]) -> None:
    door = opens("1/minute")
    assert door.statuses(UNKNOWN, 2) == [401, 429]
    before = door.spy.lookups
    bad = [UNKNOWN, "nonsense", forged(door.good[0]), "pk_prod_" + "a" * 60_000]
    assert {door.knock(key).status for key in bad * 50} == {429}
    assert door.spy.lookups == before
    assert (
        door.knock("pk_prod_neverseen00001").status == 429
    )  # it could be valid: that is known by asking alone
    assert door.spy.lookups == before + 1


# networks


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("192.0.2.1", "192.0.2.255", "192.0.3.1"),
        ("192.0.2.1", "::ffff:192.0.2.9", "::ffff:192.0.3.9"),
        ("2001:db8:1::1", "2001:db8:1:ffff::2", "2001:db8:2::1"),
        ("", "not an address", "192.0.2.1"),
    ],
)
def test_a_network_is_a_24_or_a_48(opens: Callable[..., Door], one: str, same: str, other: str) -> None:
    door = opens("1/minute")
    assert door.statuses(UNKNOWN, 1, one) == [401]
    assert door.statuses(UNKNOWN, 1, same) == [429]
    assert door.statuses(UNKNOWN, 1, other) == [401]


def test_pitfall_27_a_stranger_cannot_have_another_network_throttled(opens: Callable[..., Door]) -> None:
    door = opens("1/minute", trusted_proxies=["10.0.0.0/8"])
    spoofed = ("X-Forwarded-For", "192.0.2.7")
    assert [door.knock(UNKNOWN, HERE, spoofed).status for _ in range(2)] == [401, 429]
    assert door.knock(UNKNOWN, "10.0.0.1", spoofed).status == 401
    assert door.knock(UNKNOWN, "10.0.0.2", spoofed).status == 429


def bad_key() -> Refused:
    return Refused(Reason.UNKNOWN_KEY)


def judged(throttle: Throttle, address: str) -> Reason:
    return throttle.judge(bad_key(), address).reason


def held(throttle: Throttle) -> int:
    limiter = throttle._limiter
    assert isinstance(limiter, Limiter)
    assert isinstance(limiter._storage, Windows)
    return max(len(throttle._networks), len(limiter._storage._windows))


def test_pitfall_17_a_flood_of_addresses_does_not_grow_the_memory(clock: ManualClock) -> None:
    throttle = Throttle("2/minute", max_networks=100, clock=clock)
    answers: Counter[Reason] = Counter()
    for number in range(20_000):
        answers[judged(throttle, f"2001:db8:{number % 65536:x}:{number >> 16:x}::1")] += 1
    assert held(throttle) <= 101
    assert answers[Reason.UNKNOWN_KEY] == 102  # those beyond count as one network
    assert (
        judged(throttle, "2001:db8:1::2") is Reason.UNKNOWN_KEY
    )  # one of the first hundred still counts for itself
    clock.advance(60)
    assert judged(throttle, HERE) is Reason.UNKNOWN_KEY
    assert held(throttle) == 1
    assert REST not in throttle._networks


def test_a_network_that_is_forgotten_while_its_storage_is_asked_is_blocked_by_that_answer_alone(
    clock: ManualClock,
) -> None:
    throttle = Throttle("1/minute", clock=clock)
    assert [throttle._count("192.0.2.0/24") for _ in range(2)] == [0.0, 60.0]
    assert not throttle._networks


def test_threads_count_together(clock: ManualClock) -> None:
    throttle = Throttle("50/minute", clock=clock)
    answers: list[Reason] = []
    threads = [
        threading.Thread(target=lambda: answers.extend(judged(throttle, HERE) for _ in range(40)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answers) == {Reason.UNKNOWN_KEY: 50, Reason.TOO_MANY_FAILURES: 150}


FORKED = """
import os, threading
from papaours_auth import Reason, Refused
from papaours_auth.throttle import Throttle

throttle = Throttle("2/minute")

def judged(address):
    return throttle.judge(Refused(Reason.UNKNOWN_KEY), address).reason

def busy():
    while not stop.is_set():
        judged("198.51.100.7")

judged("203.0.113.9")
stop = threading.Event()
thread = threading.Thread(target=busy)
thread.start()
children = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        answers = [judged("203.0.113.9") for _ in range(2)]
        os._exit(0 if answers == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES] else 1)
    children.append(child)
stop.set()
thread.join()
assert {os.waitpid(child, 0)[1] for child in children} == {0}
assert judged("203.0.113.9") is Reason.UNKNOWN_KEY
"""


def test_a_fork_leaves_both_counting() -> None:
    run_alone(FORKED)


FORKED_WHILE_LOCKED = """
import os, signal, threading
from papaours_auth import Reason, Refused
from papaours_auth.throttle import Throttle

throttle = Throttle("1/minute")
held, go = threading.Event(), threading.Event()

def hold():
    with throttle._lock:
        held.set()
        go.wait()

threading.Thread(target=hold).start()
held.wait()
threading.Timer(0.2, go.set).start()  # a fork may wait for the lock, or give the child a new one
child = os.fork()
signal.alarm(20)
answers = [throttle.judge(Refused(Reason.UNKNOWN_KEY), "203.0.113.9").reason for _ in range(2)]
assert answers == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES], answers
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_pitfall_22_a_fork_while_another_thread_counts_leaves_no_lock_that_nobody_opens() -> None:
    run_alone(FORKED_WHILE_LOCKED, seconds=30)


FORKED_WHILE_ALL_ASK = """
import os, socket, threading
from papaours_auth import Reason, Refused, throttle_redis
from papaours_auth.throttle import Throttle

throttle_redis._PATIENCE = 60.0  # however loaded this machine is
silent = socket.create_server(("127.0.0.1", 0))  # a Redis that takes connections, and answers nothing
silent.settimeout(20)
port = silent.getsockname()[1]
throttle = Throttle("1/minute", storage=f"redis://127.0.0.1:{port}/0?timeout=60")

def ask():
    throttle.judge(Refused(Reason.UNKNOWN_KEY), "203.0.113.9")

asking = [threading.Thread(target=ask) for _ in range(8)]
for thread in asking:
    thread.start()
taken = [silent.accept()[0] for _ in asking]  # as many as may wait for it
child = os.fork()
if child == 0:
    ask()
    os._exit(0)
taken.append(silent.accept()[0])  # the child's: nobody waits there
for connection in taken:
    connection.close()
silent.close()
for thread in asking:
    thread.join()
assert os.waitpid(child, 0)[1] == 0
"""


def test_pitfall_22_a_child_asks_the_storage_though_all_who_may_were_waiting_in_its_parent() -> None:
    run_alone(FORKED_WHILE_ALL_ASK, seconds=60)


def test_our_memory_is_a_storage_of_limits(clock: ManualClock) -> None:
    windows, item = Windows(clock), parse("2/minute")
    limiter = FixedWindowRateLimiter(windows)
    assert [limiter.hit(item, "a") for _ in range(3)] == [True, True, False]
    assert limiter.test(item, "b")
    assert not limiter.test(item, "a")
    stats = limiter.get_window_stats(item, "a")
    assert (stats.remaining, stats.reset_time) == (0, clock.time() + 60)
    limiter.clear(item, "a")
    assert limiter.test(item, "a")
    assert limiter.hit(item, "a", cost=2)
    clock.advance(60)
    assert limiter.test(item, "a")
    assert windows.check()
    assert windows.base_exceptions is ValueError
    assert (windows.reset(), windows.reset()) == (1, 0)


# Redis


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, tmp_path_factory.mktemp("throttle")) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, tmp_path / "own") as server:
        yield server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a Redis that answers: machines are busy."""
    monkeypatch.setattr(throttle_redis, "_PATIENCE", 5.0)


def at(server: RedisServer, prefix: str = "papaours", user: str = "") -> str:
    return f"redis://{user}{server.address}/?prefix={prefix}&timeout=5"


def either(throttle: Throttle, kind: str) -> Callable[[str], Refused]:
    if kind == "sync":
        return lambda address: throttle.judge(bad_key(), address)
    return lambda address: asyncio.run(throttle.ajudge(bad_key(), address))


SHELLS = pytest.mark.parametrize("kind", ["sync", "async"])


@pytest.mark.usefixtures("patient")
@SHELLS
def test_processes_count_together_in_redis(shared: RedisServer, kind: str) -> None:
    url = at(shared, f"together-{kind}")
    one, two = (either(Throttle("3/hour", storage=url), kind) for _ in range(2))
    assert [ask(HERE).reason for ask in (one, two, one)] == [Reason.UNKNOWN_KEY] * 3
    refused = two(HERE)
    assert refused.reason is Reason.TOO_MANY_FAILURES
    assert 3590 <= (refused.retry_after or 0) <= 3600
    assert one(ELSEWHERE).reason is Reason.UNKNOWN_KEY
    (name,) = [key for key in shared.say("KEYS", f"together-{kind}:*") if b"203.0.113.0" in key]
    assert 3590 <= shared.say("TTL", name) <= 3600
    asked = shared.say("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert two(HERE).reason is Reason.TOO_MANY_FAILURES  # known to be throttled: Redis is not asked
    assert shared.say("INFO", "commandstats")["cmdstat_evalsha"]["calls"] == asked
    shared.say("DEL", name)
    assert one(HERE).reason is Reason.UNKNOWN_KEY  # a new window, as far as this process knows


@pytest.mark.usefixtures("patient")
def test_pitfall_17_a_flood_of_addresses_does_not_fill_redis(shared: RedisServer) -> None:
    throttle = Throttle("2/minute", storage=at(shared, "flood"), max_networks=50)
    for number in range(500):
        judged(throttle, f"2001:db8:{number:x}::1")
    assert len(shared.say("KEYS", "flood:*")) == 51


@SHELLS
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_an_outage_of_its_redis_lets_failures_pass_uncounted_at_once_and_says_so_once(
    own: RedisServer, kind: str, fault: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    throttle = Throttle("2/hour", storage=at(own), clock=clock)
    ask = either(throttle, kind)
    assert [ask(HERE).reason for _ in range(3)][-1] is Reason.TOO_MANY_FAILURES
    (own.kill if fault == "killed" else own.freeze)()
    caplog.set_level(logging.WARNING)
    began = time.monotonic()
    assert {ask(ELSEWHERE).reason for _ in range(50)} == {Reason.UNKNOWN_KEY}
    assert time.monotonic() - began < 5  # 50 timeouts would be 10 s, and each call's was 0.2 s
    assert ask(HERE).reason is Reason.TOO_MANY_FAILURES  # which it knew
    clock.advance(6)
    assert ask(ELSEWHERE).reason is Reason.UNKNOWN_KEY  # asked again, in vain
    said = [record.getMessage() for record in caplog.records if "throttle" in record.getMessage()]
    assert len(said) == 1
    (own.start if fault == "killed" else own.thaw)()
    clock.advance(6)
    assert [ask(ELSEWHERE).reason for _ in range(3)][-1] is Reason.TOO_MANY_FAILURES
    assert "the throttle's storage answers again" in caplog.text


def test_a_frozen_redis_does_not_block_the_loop(own: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle("2/hour", storage=at(own))
    judged(throttle, HERE)  # connected
    own.freeze()

    async def run() -> tuple[int, Refused]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        refused = await throttle.ajudge(bad_key(), HERE)
        ticking.cancel()
        return ticks, refused

    ticks, refused = asyncio.run(run())
    own.thaw()
    assert refused.reason is Reason.UNKNOWN_KEY
    assert ticks >= 3  # of 20


@pytest.mark.usefixtures("patient")
def test_connections_that_lay_idle_through_a_restart_say_nothing_about_the_server(
    own: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    throttle = Throttle("1/hour", storage=at(own))
    judged(throttle, HERE)
    own.kill()
    own.start()
    assert [judged(throttle, ELSEWHERE) for _ in range(2)][-1] is Reason.TOO_MANY_FAILURES
    assert not caplog.records


class Held:
    """A Redis that takes its time: until it is let go."""

    def __init__(self, throttle: Throttle) -> None:
        self.waiting = threading.Semaphore(0)
        self.go = threading.Event()
        throttle._limiter.hit = self  # type: ignore[method-assign]  # in its place

    def __call__(self, name: str) -> float:
        self.waiting.release()
        assert self.go.wait(30)
        return 0.0


def test_pitfall_23_a_call_that_is_cancelled_leaves_nothing_held(own: RedisServer) -> None:
    throttle = Throttle("2/hour", storage=at(own))
    held_up = Held(throttle)

    async def run() -> None:
        for _ in range(2):
            task = asyncio.create_task(throttle.ajudge(bad_key(), HERE))
            assert await asyncio.to_thread(held_up.waiting.acquire, timeout=10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        held_up.go.set()

    asyncio.run(run())
    assert throttle._askers._value == 8
    assert judged(throttle, HERE) is Reason.UNKNOWN_KEY


def test_a_loop_that_ends_gives_no_thread_and_the_call_its_answer(own: RedisServer) -> None:
    throttle = Throttle("2/hour", storage=at(own))

    async def run() -> Refused:
        await asyncio.get_running_loop().shutdown_default_executor()
        return await throttle.ajudge(bad_key(), HERE)

    assert asyncio.run(run()).reason is Reason.UNKNOWN_KEY


def test_few_threads_wait_for_a_slow_redis_and_the_others_do_without(own: RedisServer) -> None:
    throttle = Throttle("2/hour", storage=at(own))
    slow = Held(throttle)
    threads = [threading.Thread(target=judged, args=(throttle, HERE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert slow.waiting.acquire(timeout=10)
    assert judged(throttle, ELSEWHERE) is Reason.UNKNOWN_KEY  # at once: it did not wait
    slow.go.set()
    for thread in threads:
        thread.join()
    assert judged(throttle, ELSEWHERE) is Reason.UNKNOWN_KEY


@pytest.mark.usefixtures("patient")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_leaves_parent_and_child_with_connections_of_their_own(own: RedisServer) -> None:
    throttle = Throttle("3/hour", storage=at(own))
    judged(throttle, HERE)
    child = os.fork()
    if child == 0:
        os._exit(0 if judged(throttle, HERE) is Reason.UNKNOWN_KEY else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [judged(throttle, HERE) for _ in range(2)] == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES]


@pytest.mark.usefixtures("patient")
def test_pitfall_14_a_user_for_the_throttle_reaches_nothing_of_the_keys(own: RedisServer) -> None:
    """By the recipe of docs/throttle.md, with the server to hold us to it."""
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith("ACL SETUSER")]
    assert own.say(*line.split()) in (b"OK", "OK", True)
    user = "papaours-throttle:THROTTLE-PASSWORD@"
    throttle = Throttle("1/hour", storage=at(own, user=user))
    assert [judged(throttle, HERE) for _ in range(2)] == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES]
    assert all(name.startswith(b"papaours:throttle:") for name in own.say("KEYS", "*"))
    elsewhere = Throttle("1/hour", storage=at(own, "other", user))
    assert [judged(elsewhere, HERE) for _ in range(2)] == [
        Reason.UNKNOWN_KEY
    ] * 2  # not allowed, so uncounted


@pytest.mark.usefixtures("patient")
def test_over_tls_a_stranger_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if NEWEST is None or not speaks_tls(NEWEST):
        pytest.skip("no Redis with TLS here: apt-get install redis-server")
    port = free_port()
    options, files = tls_options(tmp_path, port)
    with redis_server(NEWEST, tmp_path / "tls", *options):
        url = f"rediss://127.0.0.1:{port}/?timeout=5&ca_certs="
        trusted, stranger = (
            Throttle("1/hour", storage=f"{url}{file}") for file in (files.authority, files.stranger)
        )
        assert [judged(trusted, HERE) for _ in range(2)][-1] is Reason.TOO_MANY_FAILURES
        assert [judged(stranger, HERE) for _ in range(2)][-1] is Reason.UNKNOWN_KEY
    assert caplog.text.count("cannot be asked") == 1


# Cluster and Sentinel

NETWORKS = [f"198.51.{number}.7" for number in range(24)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_cluster(NEWEST, tmp_path) as servers:
        yield servers


def at_cluster(servers: list[RedisServer], options: str = "timeout=5") -> str:
    return f"redis+cluster://{','.join(server.address for server in servers)}/?{options}"


@pytest.mark.usefixtures("patient")
def test_processes_count_together_on_all_nodes_of_a_cluster(cluster: list[RedisServer]) -> None:
    one, two = (either(Throttle("2/hour", storage=at_cluster(cluster)), kind) for kind in ("sync", "async"))
    for address in NETWORKS:
        assert [ask(address).reason for ask in (one, two)] == [Reason.UNKNOWN_KEY] * 2
        refused = one(address)
        assert refused.reason is Reason.TOO_MANY_FAILURES
        assert 3590 <= (refused.retry_after or 0) <= 3600
        assert two(address).reason is Reason.TOO_MANY_FAILURES
    counted = [server.say("KEYS", "papaours:throttle:*") for server in cluster]
    assert all(counted)
    assert sum(map(len, counted)) == len(NETWORKS)


def test_failures_pass_uncounted_while_a_node_of_the_cluster_is_away(
    cluster: list[RedisServer], clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    throttle = Throttle("1/hour", storage=at_cluster(cluster[:1]), clock=clock)
    caplog.set_level(logging.WARNING)
    cluster[2].kill()
    began = time.monotonic()
    answers: set[Reason] = set()
    for address in NETWORKS:
        answers.update(judged(throttle, address) for _ in range(3))
        clock.advance(6)  # it is asked again for each
    assert answers == {Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES}  # the others' nodes count
    assert time.monotonic() - began < len(NETWORKS) * 0.8
    assert "the throttle's storage cannot be asked (Unreachable)" in caplog.text
    for server in cluster[:2]:
        server.kill()
    clock.advance(3600)
    assert {judged(throttle, address) for address in NETWORKS} == {Reason.UNKNOWN_KEY}


def test_a_cluster_that_is_away_at_the_start_keeps_no_app_from_starting(clock: ManualClock) -> None:
    for url in ("redis+cluster://127.0.0.1:{port}", "redis+sentinel://127.0.0.1:{port}/keys"):
        throttle = Throttle("1/hour", storage=url.format(port=free_port()), clock=clock)
        assert [judged(throttle, HERE) for _ in range(2)] == [Reason.UNKNOWN_KEY] * 2


@pytest.mark.usefixtures("patient")
@SHELLS
def test_after_a_failover_failures_are_counted_at_the_new_primary(
    tmp_path: Path, kind: str, clock: ManualClock
) -> None:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_sentinel(NEWEST, tmp_path) as (primary, replica, sentinel):
        url = f"redis+sentinel://{sentinel.address}/keys?timeout=5"
        one, two = (either(Throttle("1/hour", storage=url, clock=clock), kind) for _ in range(2))
        assert [ask(HERE).reason for ask in (one, two)] == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES]
        primary.kill()
        assert one(ELSEWHERE).reason is Reason.UNKNOWN_KEY
        wait_for_failover(sentinel, primary)
        wait_until(lambda: replica.say("ROLE")[0] in (b"master", "master"), 30, what="the promotion")
        clock.advance(6)
        assert [ask(ELSEWHERE).reason for ask in (one, two)] == [Reason.UNKNOWN_KEY, Reason.TOO_MANY_FAILURES]
        assert replica.say("KEYS", "papaours:throttle:*198.51.100.0*")


def tls_options(folder: Path, port: int) -> tuple[tuple[str, ...], Certificates]:
    files = make_certificates(folder)
    options = (
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(files.authority)),
        *("--tls-cert-file", str(files.certificate), "--tls-key-file", str(files.key)),
    )
    return options, files


@pytest.mark.usefixtures("patient")
def test_over_tls_a_cluster_counts_too_and_a_stranger_is_not_trusted(tmp_path: Path) -> None:
    if NEWEST is None or not speaks_tls(NEWEST):
        pytest.skip("no Redis with TLS here: apt-get install redis-server")
    port = free_port()
    options, files = tls_options(tmp_path, port)
    options += ("--cluster-enabled", "yes", "--tls-cluster", "yes")
    with redis_server(NEWEST, tmp_path / "tls", *options) as server:
        server.say("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: b"cluster_state:ok" in server.say("CLUSTER", "INFO"), 30, what="the cluster")
        url = f"redis+cluster://127.0.0.1:{port}/?timeout=5&tls=yes&ca_certs="
        trusted, stranger = (
            Throttle("1/hour", storage=f"{url}{file}") for file in (files.authority, files.stranger)
        )
        assert [judged(trusted, HERE) for _ in range(2)][-1] is Reason.TOO_MANY_FAILURES
        assert [judged(stranger, HERE) for _ in range(2)][-1] is Reason.UNKNOWN_KEY


def test_a_password_is_never_seen(caplog: pytest.LogCaptureFixture) -> None:
    throttle = Throttle(storage=f"redis://user:hunter2@127.0.0.1:{free_port()}/")
    assert judged(throttle, HERE) is Reason.UNKNOWN_KEY
    assert "cannot be asked" in caplog.text
    assert "hunter2" not in caplog.text + repr(vars(throttle))


@pytest.mark.parametrize(
    "options",
    [
        {"limit": "often"},
        {"limit": "0/minute"},
        {"limit": "1/second; 30/minute"},
        {"max_networks": 0},
        {"storage": "memcached://hunter2@host"},
        {"storage": "redis+cluster://hunter2@host/1"},
        {"storage": "redis+sentinel://hunter2@host"},
        {"storage": "redis://user:hunter2@host:port"},
    ],
)
def test_what_is_set_up_wrongly_is_told_at_once_without_quoting(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Throttle(**options)
    assert "hunter2" not in repr(caught.value) + repr(caught.value.__cause__)


def test_without_limits_one_is_told_what_to_install() -> None:
    code = (
        "import sys; sys.modules['limits'] = None\n"
        "from papaours_auth.asgi import PapaoursAuthMiddleware\n"
        "from papaours_auth.throttle import Throttle\n"
        "try: Throttle()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigurationError")
    assert "papaours-auth[throttle]" in said


# real servers

APP = """
import os
from papaours_auth.{door} import PapaoursAuthMiddleware
from papaours_auth.throttle import Throttle
{app}
throttle = Throttle("20/hour", storage=os.environ["THROTTLE"])
app = PapaoursAuthMiddleware(plain, environment="prod", exempt=["/healthz"], throttle=throttle)
"""
ASGI = """
async def plain(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
WSGI = """
def plain(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-preload"])
def test_workers_count_together_and_let_a_valid_key_in(own: RedisServer, tmp_path: Path, name: str) -> None:
    pepper, url = new_pepper(), f"sqlite:///{tmp_path / 'keys.db'}"
    with Keys(open_store(url, create=True), peppers=parse_peppers(pepper)) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        new = keys.create_key(machine.id, name="Production - Facturation", environment="prod")
    door, app = ("asgi", ASGI) if name == "uvicorn" else ("wsgi", WSGI)
    (tmp_path / "throttled_app.py").write_text(APP.format(door=door, app=app))
    environ = {
        "PAPAOURS_STORE": url,
        "PAPAOURS_PEPPER": pepper,
        "THROTTLE": f"redis://{own.address}/",
        "WEB_CONCURRENCY": "2",
    }
    answers: Counter[int] = Counter()
    good: Counter[int] = Counter()
    with serving(name, environ, tmp_path, "throttled_app:app") as server:

        def drive(seen: Counter[int], key: str) -> None:
            for _ in range(40):
                seen[server.get({"X-API-KEY": key}, "/contracts")[0]] += 1

        threads = [threading.Thread(target=drive, args=(answers, UNKNOWN)) for _ in range(3)]
        threads.append(threading.Thread(target=drive, args=(good, new.secret.reveal())))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = server.log.read_text()
    assert good == {200: 40}
    if "cannot be asked" not in log:  # a machine too busy for 0.2 s: they pass then, as they should
        assert answers == {401: 20, 429: 100}


# usage


def test_throttled_calls_are_recorded_as_other_refusals_are(opens: Callable[..., Door]) -> None:
    batches: list[Batch] = []
    recorder = Recorder(CallableSink(batches.append), interval=3600.0)
    door = opens("1/minute", usage=recorder)
    assert door.statuses(door.inactive, 2) == [401, 429]
    assert door.statuses(UNKNOWN, 2) == [429, 429]
    recorder.close()
    events = [event for batch in batches for event in batch.events]
    assert [(event.status, event.reason) for event in events] == [
        (401, "key_inactive"),
        (429, "too_many_failures"),
    ]
    assert events[0].key_id == events[1].key_id
    counted = Counter({entry.reason: entry.calls for batch in batches for entry in batch.refusals})
    assert counted == {"too_many_failures": 2}
    wait_until(lambda: recorder.stats().pending == 0, 5, what="delivery")
