"""Pitfall 33: a reply must belong to its question (issue 12, finding 1).

A proxy between a store and its real server swaps, repeats and delays replies; a socket is shared with somebody else.
What comes of a question then is right, or an outage: nobody comes in by another's reply, and nobody is told that his
key is unknown. Afterwards the store is used again.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import pytest

from conftest import PEPPER
from papaours_auth import (
    KeyFormat,
    Keys,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_async_store,
    open_store,
)
from papaours_auth.stores import Author, Found, PepperRecord, Store
from papaours_auth.stores.redis import AsyncRedisStore, RedisStore
from papaours_auth.stores.redis_router import Stray
from papaours_auth.verify import Claim, decide, read
from support.mixing import Mixing, MixingProxy
from support.redis_servers import redis_cluster, redis_server
from support.servers import wait_until
from support.sql_servers import SQLServer
from test_redis import newest

STRANGER = "pk_prod_000000000000000000"
OUTAGE = "outage"
PAIRS = [("reader", "stranger"), ("writer", "stranger"), ("reader", "writer")] * 3

Answer = tuple[str, str]


class House(NamedTuple):
    """A store and three keys: two that exist, and one that never did."""

    url: str
    store: Store
    claims: dict[str, Claim]
    proxy: MixingProxy | None = None

    def judge(self, who: str, found: Found) -> Answer:
        """Return who comes in by a key, or why nobody does."""
        answer = decide(self.claims[who], found.record, now=datetime.now(UTC), environment="prod")
        return who, answer.reason.value if isinstance(answer, Refused) else answer.key.name

    def is_right(self, answer: Answer) -> bool:
        return answer in (("stranger", Reason.UNKNOWN_KEY.value), ("reader", "reader"), ("writer", "writer"))


def furnished(url: str, ring: PepperRing) -> House:
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    texts = {"stranger": STRANGER}
    for name in ("reader", "writer"):
        machine = keys.create_machine(name, organisation="cfa-lyon", rights=["contrats:lecture"])
        texts[name] = keys.create_key(machine.id, name=name, environment="prod").secret.reveal()
    claims = {name: read(text.encode(), format=KeyFormat(), peppers=ring) for name, text in texts.items()}
    return House(url, store, {name: claim for name, claim in claims.items() if isinstance(claim, Claim)})


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(newest(), tmp_path_factory.mktemp("mixed")) as server:
        yield server.port


@pytest.fixture(params=["redis", "postgresql", "mariadb", "mysql"])
def house(request: pytest.FixtureRequest, ring: PepperRing) -> Iterator[House]:
    """A store, and the URL by which it is reached through a proxy."""
    if request.param == "redis":
        port = int(request.getfixturevalue("redis_port"))
        url = f"redis://127.0.0.1:{port}/?timeout=1&prefix=mixed{os.urandom(4).hex()}"
    else:
        server: SQLServer = request.getfixturevalue(f"{request.param}_server")
        port = server.port
        url = server.url(server.database()) + "?timeout=1"
    with MixingProxy(port) as proxy:
        made = furnished(url, ring)
        yield made._replace(proxy=proxy, url=url.replace(f":{port}/", f":{proxy.port}/"))
        made.store.close()


class Asked:
    """A store through the proxy, blocking or for event loops, asked for two keys at a time."""

    def __init__(self, house: House, kind: str) -> None:
        self._house = house
        self._store = open_store(house.url)
        self._threads = ThreadPoolExecutor(2)
        self._runner = asyncio.Runner() if kind == "async" else None
        self._twin = open_async_store(house.url) if kind == "async" else None

    def __call__(self, whom: Sequence[str]) -> list[Answer]:
        if self._runner is None:
            return list(self._threads.map(self._ask, whom))

        async def ask_all() -> list[Answer]:
            return await asyncio.gather(*[self._ask_async(who) for who in whom])

        return self._runner.run(ask_all())

    def _ask(self, who: str) -> Answer:
        try:
            return self._house.judge(who, self._store.lookup(self._house.claims[who]))
        except StoreUnavailable:
            return who, OUTAGE

    async def _ask_async(self, who: str) -> Answer:
        assert self._twin is not None
        try:
            return self._house.judge(who, await self._twin.lookup(self._house.claims[who]))
        except StoreUnavailable:
            return who, OUTAGE

    def recovers(self) -> bool:
        return all(
            map(self._house.is_right, [answer for who in self._house.claims for answer in self([who])])
        )

    def close(self) -> None:
        if self._runner is not None and self._twin is not None:
            self._runner.run(self._twin.aclose())
            self._runner.close()
        self._threads.shutdown()
        self._store.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("how", ["swap", "repeat", "late"])
def test_pitfall_33_mixed_replies_are_an_outage_and_let_nobody_in(
    house: House, kind: str, how: Mixing
) -> None:
    assert house.proxy is not None
    ask = Asked(house, kind)
    wait_until(ask.recovers, 10, what="the store to be reached")
    ask(PAIRS[0])  # each with a connection of its own
    house.proxy.mix(how)
    answers = [answer for pair in PAIRS for answer in ask(pair)]
    assert [answer for answer in answers if answer[1] != OUTAGE and not house.is_right(answer)] == []
    assert house.proxy.mixed
    assert OUTAGE in [said for _, said in answers]
    house.proxy.mix("pass")
    wait_until(ask.recovers, 10, what="the store to be used again")
    ask.close()


@pytest.mark.parametrize("how", ["repeat", "late"])
def test_pitfall_33_a_reading_of_before_is_an_outage_and_no_reason_to_trust(
    house: House, how: Mixing
) -> None:
    """Nor is what `describe` said before."""
    assert house.proxy is not None
    store, author = open_store(house.url), Author("Alice", datetime.now(UTC))
    feed, truth = store.feed(), house.store.feed()
    (key, *_) = house.store.keys("reader")
    feed.read({})
    house.proxy.mix(how)
    outages = 0
    for number in range(6):
        house.store.update_key(key.id, {"name": f"reader {number}"}, "key.renamed", author)
        house.store.add_pepper(_pepper(number), author)
        try:
            told = feed.read({})
            assert told == truth.read({})
        except StoreUnavailable:
            outages += 1
        try:
            assert sorted(store.describe().peppers) == sorted(house.store.describe().peppers)
        except StoreUnavailable:
            outages += 1
    assert house.proxy.mixed
    assert outages
    house.proxy.mix("pass")

    def reads() -> bool:
        with suppress(StoreUnavailable):
            return feed.read({}) == truth.read({})
        return False

    wait_until(reads, 10, what="the feed to be read again")
    for each in (feed, truth, store):
        each.close()


def _pepper(number: int) -> PepperRecord:
    return PepperRecord(f"new{number}", bytes([number]) * 32, "accept")


# a socket that somebody else uses too

SHARING = """
import ctypes, json, os, sys
from datetime import UTC, datetime
from papaours_auth import KeyFormat, Refused, StoreUnavailable, _fork, open_store, parse_peppers
from papaours_auth.verify import decide, read

store, peppers, keys = open_store(sys.argv[1]), parse_peppers(sys.argv[2]), json.loads(sys.argv[3])
claims = {name: read(text.encode(), format=KeyFormat(), peppers=peppers) for name, text in keys.items()}

def judged(name):
    try:
        found = store.lookup(claims[name])
    except StoreUnavailable:
        return "outage"
    answer = decide(claims[name], found.record, now=datetime.now(UTC), environment="prod")
    return answer.reason.value if isinstance(answer, Refused) else answer.key.name

judged("reader")  # a connection lies idle now
for child in range(2):
    if ctypes.PyDLL(None).fork() == 0:
        _fork._claim()  # a fork that nobody notices
        said = {name: sorted({judged(name) for _ in range(100)}) for name in claims}
        os.write(1, (json.dumps([said, {name: judged(name) for name in claims}]) + "\\n").encode())
        os._exit(0)
for child in range(2):
    os.wait()
"""


def test_pitfall_33_processes_that_share_a_connection_let_nobody_in(house: House, ring: PepperRing) -> None:
    """Workers that were forked in C, whose sockets nothing has reset. Each child is right in the end."""
    keys = Keys(house.store, peppers=ring)
    machine = keys.create_machine("shared", organisation="cfa-lyon")
    texts = {"stranger": STRANGER}
    for name in ("reader", "writer"):
        texts[name] = keys.create_key(machine.id, name=name, environment="prod").secret.reveal()
    words = [sys.executable, "-c", SHARING, house.url, PEPPER, json.dumps(texts)]
    done = subprocess.run(words, capture_output=True, timeout=120, check=False, text=True)
    assert done.returncode == 0, done.stderr
    children = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(children) == 2
    for said, after in children:
        for name, answers in said.items():
            assert [each for each in answers if each != OUTAGE and not house.is_right((name, each))] == []
        assert all(house.is_right((name, answer)) for name, answer in after.items())


@pytest.fixture(scope="module", params=["single", "cluster"])
def redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        if request.param == "single":
            hosts = stack.enter_context(redis_server(newest(), folder)).address
        else:
            hosts = ",".join(s.address for s in stack.enter_context(redis_cluster(newest(), folder)))
        yield f"{'redis' if request.param == 'single' else 'redis+cluster'}://{hosts}/?timeout=5"


@pytest.mark.parametrize("way", ["short", "by steps"])
def test_pitfall_33_a_reply_that_lies_in_the_connection_already_lets_nobody_in(
    redis_url: str, ring: PepperRing, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What uWSGI's workers met: one had asked for a key that exists, the other for one that does not."""
    house = furnished(redis_url, ring)
    assert isinstance(house.store, RedisStore)
    wire, router = house.store._wire, house.store._router
    if way == "by steps":
        monkeypatch.setattr(wire, "exchange", lambda *_: None)
    for who in house.claims:
        house.store.lookup(house.claims[who])
    for asked, wanted in (("reader", "stranger"), ("stranger", "reader"), ("writer", "reader")):
        claim = house.claims[wanted]._replace(partition=house.claims[asked].partition)
        node = router.known(claim.partition)
        assert node is not None
        house.store.lookup(house.claims[asked])
        links = wire._idle[node]
        for link in links:
            sock = cast("socket.socket", link._sock)
            packed = house.store._ask.packed_lookup(house.claims[asked])
            sock.sendall(packed + b"$8\r\nanothers\r\n")
        with pytest.raises(Stray):
            house.store.lookup(claim)
        assert not wire._idle.get(node)
        for who in house.claims:
            assert house.is_right(house.judge(who, house.store.lookup(house.claims[who])))
    house.store.close()


@pytest.mark.parametrize("way", ["short", "by steps"])
def test_pitfall_33_nor_on_an_event_loop(
    redis_url: str, ring: PepperRing, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = furnished(redis_url, ring)
    blocking = house.store
    assert isinstance(blocking, RedisStore)
    store = AsyncRedisStore(blocking)
    if way == "by steps":

        async def nowhere(*_: object) -> None:
            return None

        monkeypatch.setattr(store._wire, "exchange", nowhere)

    async def ask() -> None:
        for who in house.claims:
            await store.lookup(house.claims[who])
        for asked, wanted in (("reader", "stranger"), ("stranger", "reader"), ("writer", "reader")):
            claim = house.claims[wanted]._replace(partition=house.claims[asked].partition)
            node = blocking._router.known(claim.partition)
            assert node is not None
            await store.lookup(house.claims[asked])
            idle = store._wire._loops[asyncio.get_running_loop()].idle
            for link in idle[node]:
                writer = cast("Any", link)._writer
                writer.write(blocking._ask.packed_lookup(house.claims[asked]) + b"$8\r\nanothers\r\n")
                await writer.drain()
            with pytest.raises(Stray):
                await store.lookup(claim)
            assert not idle.get(node)
            for who in house.claims:
                assert house.is_right(house.judge(who, await store.lookup(house.claims[who])))
        await store.aclose()

    asyncio.run(ask())
