"""The Redis store on real servers: the contract, and what only Redis can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from zlib import crc32

import pytest
from redis.exceptions import BusyLoadingError, MovedError, ResponseError

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    ConfigurationError,
    Identity,
    Keys,
    NotFound,
    PapaoursAuthError,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    open_async_store,
    open_store,
)
from papaours_auth.cli import main
from papaours_auth.exceptions import UnreadableRecord
from papaours_auth.format import KeyFormat
from papaours_auth.model import Machine
from papaours_auth.stores import Author, Epoch, Feed, News, PepperRecord, Store
from papaours_auth.stores.records import moment
from papaours_auth.stores.redis import RedisStore
from papaours_auth.stores.redis import open_store as open_redis
from papaours_auth.stores.redis_layout import META, machine_partition
from papaours_auth.stores.redis_place import Node, place_of
from papaours_auth.stores.redis_router import Ask, Router, Stray, Unreachable
from papaours_auth.stores.redis_wire import _async_exchanged, _exchanged, _Loop, connect, unreachable
from papaours_auth.testing import StoreContract
from papaours_auth.verify import Claim, partition, read
from support.redis_servers import (
    BINARIES,
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
from support.servers import free_port, wait_until

FOR_EVER = 600.0
SEED = "pk_prod_abc123def456ghi789"
SOON = 10.0
DOCS = Path(__file__).resolve().parents[1] / "docs" / "stores" / "redis.md"
KEPT = ("--appendonly", "yes", "--appendfsync", "always")  # everysec loses two seconds of writes to a SIGKILL
_numbers = itertools.count(1)

# A test that calls `asyncio.run` more than once leaves the connections of a loop that has ended: no other loop can
# close them. Their complaint would meet whatever test the collector runs in, so they are collected with their own.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed (transport|<socket):ResourceWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class Estate(NamedTuple):
    """Servers under way, and how a store there is written."""

    scheme: str
    servers: list[RedisServer]

    def url(self, credentials: str = "", **options: object) -> str:
        """Write the URL of a store that nobody has used yet."""
        given = {"prefix": f"test{next(_numbers)}", "timeout": 5, **options}  # machines are busy
        query = "&".join(f"{name}={value}" for name, value in given.items())
        hosts = ",".join(server.address for server in self.servers)
        return f"{self.scheme}://{credentials}{hosts}/?{query}"

    def everywhere(self, *words: object) -> list[Any]:
        return [server.say(*words) for server in self.servers]


def binary_of(name: str) -> str:
    binary = BINARIES[name]
    if binary is None:
        pytest.skip(WHY_NOT[name])
    return binary


def newest() -> str:
    return NEWEST or binary_of("6.2")


@pytest.fixture(scope="session", params=["6.2", "8", "installed", "valkey", "cluster"])
def estate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    """Servers that every test may use, and none may stop."""
    folder = tmp_path_factory.mktemp("redis")
    if request.param == "cluster":
        with redis_cluster(newest(), folder) as servers:
            yield Estate("redis+cluster", servers)
    else:
        with redis_server(binary_of(request.param), folder) as server:
            yield Estate("redis", [server])


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own, which keeps its data."""
    with redis_server(newest(), tmp_path / "own", *KEPT) as server:
        yield server


class TestContract(StoreContract):
    @pytest.fixture(autouse=True)
    def _place(self, estate: Estate) -> None:
        self.estate = estate

    def open(self) -> Store:
        self.url = self.estate.url()
        return open_store(self.url, create=True)

    def open_async(self) -> Any:
        return open_async_store(self.url)


class House(NamedTuple):
    """A store with a machine and a key, its administration and its URL."""

    url: str
    store: RedisStore
    keys: Keys
    claim: Claim
    key_id: str

    def found(self) -> bool:
        return self.store.lookup(self.claim).record is not None

    def status(self) -> str | None:
        record = self.store.lookup(self.claim).record
        return None if record is None else record.key.status

    def change(self) -> bool:
        return bool(self.keys.rename_key(self.key_id, f"Production - v{next(_numbers)}"))


@contextlib.contextmanager
def furnished(url: str, ring: PepperRing) -> Iterator[House]:
    with contextlib.closing(open_redis(url, True)) as store:
        keys = Keys(store, peppers=ring)
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        key = keys.import_key(machine.id, SEED, name="Production - Facturation")
        yield House(url, store, keys, claim_of(SEED, ring, store), key.id)


def claim_of(text: str, ring: PepperRing, store: Store) -> Claim:
    description = store.describe()
    bound = ring.bound_to(description.installation, {p.id: p[1:] for p in description.peppers})
    claim = read(text.encode(), format=KeyFormat(), peppers=bound)
    assert isinstance(claim, Claim)
    return claim


@pytest.fixture
def house(estate: Estate, ring: PepperRing) -> Iterator[House]:
    with furnished(estate.url(), ring) as house:
        yield house


@pytest.fixture
def own_house(own: RedisServer, ring: PepperRing) -> Iterator[House]:
    with furnished(f"redis://{own.address}", ring) as house:
        yield house


@pytest.fixture
def feed(house: House) -> Iterator[Feed]:
    feed = house.store.feed()
    yield feed
    feed.close()


def unavailable(call: Callable[[], object], said: str | None = None) -> None:
    with pytest.raises(StoreUnavailable, match=said):
        call()


def unreadable(call: Callable[[], object]) -> None:
    """One record makes no sense: that is no outage for the others, whose breaker stays closed."""
    with pytest.raises(UnreadableRecord, match="cannot be read"):
        call()


def name_in(house: House, partition: int, structure: str) -> str:
    return f"{{{house.store.place.prefix}:{partition:02}}}:{structure}"


# URLs


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://h", ("single", (Node("h", 6379),), "", 0, None, None)),
        ("redis://h/3", ("single", (Node("h", 6379),), "", 3, None, None)),
        ("rediss://u:p%40%2F@[::1]:7/", ("single", (Node("::1", 7),), "", 0, "u", "p@/")),
        ("redis://:p@h", ("single", (Node("h", 6379),), "", 0, None, "p")),
        ("redis+cluster://a,b:7", ("cluster", (Node("a", 6379), Node("b", 7)), "", 0, None, None)),
        (
            "redis+sentinel://u:p@a,b:7/keys/2",
            ("sentinel", (Node("a", 26379, sentinel=True), Node("b", 7, sentinel=True)), "keys", 2, "u", "p"),
        ),
    ],
)
def test_urls_say_where_a_store_is(url: str, wanted: tuple[object, ...]) -> None:
    place = place_of(url)
    assert (place.kind, place.nodes, place.service, place.db, place.username, place.password) == wanted
    assert place.tls == url.startswith("rediss")


def test_options_of_a_url() -> None:
    place = place_of(
        "redis+sentinel://:p@h/s?prefix=a.b-c_1&timeout=2.5&connections=3&wait_replicas=2&wait_timeout=50&tls=yes"
        "&ca_certs=/ca.pem&sentinel_username=su&sentinel_password=sp"
    )
    assert (place.prefix, place.timeout, place.connections) == ("a.b-c_1", 2.5, 3)
    assert (place.wait_replicas, place.wait_timeout, place.tls) == (2, 50, True)
    to_sentinel, to_server = place.settings(Node("h", 1, sentinel=True)), place.settings(Node("h", 1))
    assert (to_sentinel["username"], to_sentinel["password"], to_server["password"]) == ("su", "sp", "p")
    assert to_server["ssl_ca_certs"] == "/ca.pem"
    assert to_server["ssl_check_hostname"]


@pytest.mark.parametrize(
    "rest",
    [
        "redis://", "redis:///0", "redis://a,b", "redis://h/x", "redis://h:x", "redis://h:99999", "redis+cluster://h/1",
        "redis+sentinel://h", "redis+sentinel://h/", "redis://h?nonsense=1", "redis://h?nonsense",
        "redis://h?prefix=", "redis://h?prefix={a}", "redis://h?prefix=a:b", "redis://h?prefix=a*",
        "redis://h?timeout=0", "redis://h?timeout=soon", "redis://h?connections=0", "redis://h?tls=perhaps",
    ],
)  # fmt: skip
@pytest.mark.parametrize("opener", [open_store, open_async_store])
def test_a_wrong_url_is_told_without_quoting_it(opener: Callable[[str], object], rest: str) -> None:
    url = rest.replace("://", "://alice:hunter2@", 1) + ("&" if "?" in rest else "?") + "timeout=1"
    with pytest.raises(ConfigurationError, match="a Redis store is written redis://") as error:
        opener(url if "timeout=0" not in rest and "soon" not in rest else rest)
    assert "hunter2" not in "".join(traceback.format_exception(error.value))


def test_without_redis_py_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    for name in [name for name in sys.modules if name.startswith("papaours_auth.stores.redis")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigurationError, match=r"papaours-auth\[redis\]"):
        open_store("redis://h")


# scripts


def test_scripts_are_sent_again_where_the_server_forgot_them(
    house: House, estate: Estate, feed: Feed
) -> None:
    twin = open_async_store(house.url)

    async def look() -> bool:
        found = await twin.lookup(house.claim)
        return found.record is not None

    questions: list[Callable[[], object]] = [
        house.found, lambda: asyncio.run(look()), lambda: feed.read({}).news, house.change,
    ]  # fmt: skip
    for question in questions:
        assert question()
        estate.everywhere("SCRIPT", "FLUSH")
        assert question()
    asyncio.run(twin.aclose())


def test_a_lookup_is_one_round_trip_and_on_cluster_two(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    house.found()
    exchange, at_once = house.store._wire._exchange, house.store._wire.exchange

    def counted(ask: Ask) -> list[Any]:
        asked.append(len(ask.commands))
        return exchange(ask)

    def counted_at_once(node: Node, packed: bytes) -> bytes | None:
        asked.append(packed.count(b"EVALSHA"))
        return at_once(node, packed)

    monkeypatch.setattr(house.store._wire, "_exchange", counted)
    monkeypatch.setattr(house.store._wire, "exchange", counted_at_once)
    assert house.found()
    assert asked == ([1] if house.store._router.single else [1, 1])


def test_the_short_way_is_left_where_it_leads_nowhere(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is idle, all are in use, it lay idle while the server was restarted, another thread was faster."""
    wire, node = house.store._wire, house.store._router.known(house.claim.partition)
    assert node is not None
    packed = house.store._ask.packed_lookup(house.claim)
    wire.discard()
    assert wire.exchange(node, packed) is None
    house.found()
    taken = [wire._room.now().get(block=False) for _ in range(house.store.place.connections)]
    assert wire.exchange(node, packed) is None
    for each in taken:
        wire._room.now().put(each)
    monkeypatch.setattr("papaours_auth.stores.redis_wire._exchanged", _hung_up)
    assert wire._idle[node]
    assert wire.exchange(node, packed) is None
    assert not wire._idle.get(node)
    monkeypatch.undo()
    assert house.found()
    wire._idle[node] = Emptied(wire._idle[node])
    assert wire.exchange(node, packed) is None
    assert wire._room.now().qsize() == house.store.place.connections


def _hung_up(*_: object) -> bytes | None:
    raise ConnectionResetError


class Emptied(list[Any]):  # Any: connections
    """What another thread empties between the look and the grip."""

    def pop(self, *_: Any) -> Any:
        raise IndexError


# outages


def test_pitfall_21_a_stopped_server_is_an_outage_within_the_timeout_and_recovers(
    own: RedisServer, own_house: House
) -> None:
    store, feed = open_redis(own_house.url + "?timeout=0.3", False), own_house.store.feed()
    twin = open_async_store(own_house.url + "?timeout=0.3")
    store.lookup(own_house.claim)
    feed.read({})

    async def look() -> None:
        await twin.lookup(own_house.claim)

    own.freeze()
    try:
        for question in (lambda: store.lookup(own_house.claim), store.describe, lambda: asyncio.run(look())):
            began = time.monotonic()
            unavailable(question, "does not answer in time")
            assert time.monotonic() - began < 2
        unavailable(lambda: feed.read({}))
        unavailable(lambda: store.feed().read({}))
    finally:
        own.thaw()
    assert store.lookup(own_house.claim).record
    asyncio.run(look())
    assert feed.read({}).news
    feed.close()
    store.close()
    asyncio.run(twin.aclose())


def test_a_server_killed_and_started_again_is_asked_again(own: RedisServer, own_house: House) -> None:
    feed, twin = own_house.store.feed(), open_async_store(own_house.url)

    async def through_the_outage() -> None:
        assert (await twin.lookup(own_house.claim)).record
        own.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await twin.lookup(own_house.claim)
        unavailable(own_house.found, "cannot be reached")
        unavailable(lambda: feed.read({}))
        unavailable(own_house.change)
        unavailable(
            lambda: own_house.store.add_pepper(PepperRecord("p9", b"9" * 32, "accept"), AUTHOR), "reached"
        )
        own.start()
        assert (await twin.lookup(own_house.claim)).record

    own_house.found()
    feed.read({})
    asyncio.run(through_the_outage())
    assert own_house.found()
    own_house.change()
    assert feed.read({}).news
    feed.close()
    asyncio.run(twin.aclose())


def test_connections_that_lay_idle_through_a_restart_say_nothing_about_the_server(
    own: RedisServer, own_house: House
) -> None:
    twin = open_async_store(own_house.url)

    async def through_the_restart() -> None:
        await asyncio.gather(*[twin.lookup(own_house.claim) for _ in range(5)])
        own_house.found()
        own_house.change()
        own.kill()
        own.start()
        assert (await twin.lookup(own_house.claim)).record
        assert own_house.found()
        own_house.store.add_pepper(PepperRecord("p9", b"9" * 32, "accept"), AUTHOR)  # begins with the write
        await twin.aclose()

    asyncio.run(through_the_restart())


def test_a_server_that_comes_back_empty_is_an_outage_and_not_ten_thousand_unknown_keys(
    tmp_path: Path, ring: PepperRing
) -> None:
    with (
        redis_server(newest(), tmp_path) as server,
        furnished(f"redis://{server.address}", ring) as house,
        Authenticator(house.store, environment="prod", peppers=ring, watch=False) as authenticator,
    ):
        feed = house.store.feed()
        assert isinstance(authenticator.authenticate(SEED), Identity)
        server.kill()
        server.start()
        for question in (house.found, house.store.describe, lambda: feed.read({})):
            unavailable(question, "lost its installation mark")
        with pytest.raises(Refused) as refused:
            authenticator.authenticate(SEED)
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
        unavailable(lambda: house.store.add_pepper(PepperRecord("p9", b"9" * 32, "accept"), AUTHOR), "lost")
        feed.close()


AUTHOR = Author("Alice", moment(1_790_000_000_000_000))


def test_an_app_starts_while_redis_is_down_and_recovers_by_itself(
    tmp_path: Path, ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(newest(), tmp_path, *KEPT) as server:
        url = f"redis://{server.address}"
        server.kill()
        authenticator = Authenticator(url, environment="prod", peppers=ring)
        twin = AsyncAuthenticator(url, environment="prod", peppers=ring)

        def knock() -> Reason | Identity:
            try:
                return authenticator.authenticate(SEED)
            except Refused as refused:
                return refused.reason

        async def knock_async() -> Reason | Identity:
            try:
                return await twin.authenticate(SEED)
            except Refused as refused:
                return refused.reason

        down = [knock(), asyncio.run(knock_async())]
        server.start()
        with pytest.raises(ConfigurationError, match="there is no store in this Redis"):
            authenticator.check()
        missing = knock()
        with furnished(url, ring):
            assert down == [Reason.STORE_UNAVAILABLE] * 2
            assert missing is Reason.STORE_UNAVAILABLE
            wait_until(lambda: isinstance(knock(), Identity), 10, what="the store to be used")
            wait_until(
                lambda: isinstance(asyncio.run(knock_async()), Identity), 10, what="the store to be used"
            )
        authenticator.close()
        asyncio.run(twin.aclose())


WORD = b"8 bytes!"
ASKED = b"ask$8\r\n8 bytes!\r\n"
REPLIES: list[tuple[bytes, bytes | None]] = [
    (b"$11\r\n8 bytes!abc\r\n", b"abc"),
    (b"$15\r\n8 bytes!a\r\n$1\r\n\r\n", b"a\r\n$1\r\n"),
    (b"$8\r\n8 bytes!\r\n", b""),
    (b"-NOSCRIPT No matching script.\r\n", None),
    (b"-MOVED 3999 127.0.0.1:6381\r\n", None),
]
STRAYS = [
    b"$11\r\n8 others!abc\r\n",
    b"$11\r\nabc8 bytes!\r\n",
    b"$3\r\nabc\r\n",
    b"$0\r\n\r\n",
    b"$-1\r\n",
    b":1\r\n",
    b"+OK\r\n",
    b"*1\r\n$1\r\na\r\n",
    b"$8\r\n8 bytes!\r\n$8\r\n8 others!\r\n",
    b"-ERR\r\n:1\r\n",
]


@pytest.fixture
def one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papaours_auth.stores.redis_wire.os.urandom", lambda _: WORD)


class Pieces:
    """A connection, blocking and not, whose peer answers in pieces and then hangs up."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.sent = b""
        self._sock = self._reader = self._writer = self
        self.open = True

    def sendall(self, data: bytes) -> None:
        self.sent += data

    write = sendall

    def recv(self, _: int) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def read(self, size: int) -> bytes:
        return self.recv(size)

    def exception(self) -> None:
        """Tell what is wrong with it, as a `StreamReader` does."""

    def disconnect(self) -> None:
        self.open = False


async def async_exchanged(link: Pieces) -> bytes | None:
    return await _async_exchanged(_Loop(1, 5.0), cast("Any", link), b"ask")


@pytest.mark.usefixtures("one_word")
@pytest.mark.parametrize(("reply", "wanted"), REPLIES)
def test_a_lookups_reply_is_read_to_its_end_in_however_many_pieces(
    reply: bytes, wanted: bytes | None
) -> None:
    for cut in range(1, len(reply)):
        for pieces in ((reply[:cut], reply[cut:]), (*(reply[at : at + 1] for at in range(len(reply))),)):
            link, twin = Pieces(*pieces), Pieces(*pieces)
            assert _exchanged(cast("Any", link), b"ask") == wanted  # Any: as much of a link as is used
            assert asyncio.run(async_exchanged(twin)) == wanted
            assert (link.pieces, link.sent, link.open, twin.pieces, twin.sent) == (
                [],
                ASKED,
                True,
                [],
                ASKED,
            )


@pytest.mark.usefixtures("one_word")
@pytest.mark.parametrize("reply", STRAYS)
def test_pitfall_33_a_reply_that_does_not_bring_the_word_back_is_no_answer(reply: bytes) -> None:
    link = Pieces(reply)
    with pytest.raises(Stray):
        _exchanged(cast("Any", link), b"ask")
    assert not link.open
    with pytest.raises(Stray):
        asyncio.run(async_exchanged(Pieces(reply)))


@pytest.mark.parametrize("pieces", [(), (b"$3\r\n",), (b"$3\r\nab",), (b"-ERR",)])
def test_a_reply_that_breaks_off_is_no_answer_and_its_connection_is_not_used_again(
    pieces: tuple[bytes, ...],
) -> None:
    link = Pieces(*pieces)
    with pytest.raises(ConnectionResetError):
        _exchanged(cast("Any", link), b"ask")
    assert not link.open
    with pytest.raises(ConnectionResetError):
        asyncio.run(async_exchanged(Pieces(*pieces)))


def test_a_redis_py_that_hides_its_socket_is_asked_in_its_own_way(house: House) -> None:
    hidden = Pieces()
    del hidden._sock, hidden._reader, hidden._writer
    assert _exchanged(cast("Any", hidden), b"ask") is None
    assert asyncio.run(async_exchanged(hidden)) is None
    assert hidden.sent == b""


def test_a_server_that_is_loading_or_broken_is_an_outage(house: House, estate: Estate) -> None:
    """Whatever it answers: an error, a record that makes no sense, a part that is gone."""
    partition = house.claim.partition
    digests, keys = (name_in(house, partition, structure) for structure in ("digests", "keys"))
    run = house.store._run
    (packed,) = run(partition, ("HGET", keys, house.key_id))
    for damage in (
        *(b"{", b"[]", b'["a"]', packed + b"[]", packed + b"\n", packed.replace(b"active", b"perhaps")),
        packed.replace(b'"active",', b'"active",99999999'),  # created after the last year there is
    ):
        run(partition, ("HSET", keys, house.key_id, damage))
        unreadable(house.found)
        unreadable(house.keys.keys)
    run(partition, ("HDEL", keys, house.key_id))
    unavailable(house.found, "lost")
    run(partition, ("HSET", keys, house.key_id, packed))
    assert house.found()
    machine_id = house.keys.machines()[0].id
    machines_partition = 16 + crc32(machine_id.encode()) % 16
    machines = name_in(house, machines_partition, "machines")
    run(machines_partition, ("HSET", machines, machine_id, b"[1]"))
    unreadable(house.found)
    run(partition, ("DEL", digests), ("SET", digests, "no hash"))
    unavailable(house.found, "Redis refuses")


# the feed


@pytest.mark.parametrize("tip", ["garbage here now", "12 zz 1 []", "-1 ab 1 []", "12 abc 1 []"])
def test_a_log_whose_tip_makes_no_sense_is_an_outage(tip: str, house: House, ring: PepperRing) -> None:
    """Never an error that nobody knows, nor an epoch."""
    house.store._run(house.claim.partition, ("RPUSH", name_in(house, house.claim.partition, "changes"), tip))
    unavailable(house.found)
    with contextlib.suppress(StoreUnavailable), contextlib.closing(house.store.feed()) as feed:
        assert house.claim.partition not in feed.read({}).news

    async def found() -> object:
        store = open_async_store(house.url)
        with contextlib.suppress(StoreUnavailable):
            await store.lookup(house.claim)  # by steps: it connects
        try:
            return await store.lookup(house.claim)  # the short way
        finally:
            await store.aclose()

    unavailable(lambda: asyncio.run(found()))


@pytest.mark.parametrize("packed", ['["zz","accept"]', '["00"]', "5", '[5,"accept"]', "nonsense"])
def test_a_peppers_record_that_makes_no_sense_is_an_outage(packed: str, house: House) -> None:
    """Each reading brings the peppers: any other error would end the watcher."""
    house.store._run(META, ("HSET", name_in(house, META, "peppers"), "p9", packed))
    unavailable(house.store.describe)
    with contextlib.suppress(StoreUnavailable), contextlib.closing(house.store.feed()) as feed:
        assert META not in feed.read({}).news


def test_who_waits_for_a_reply_as_the_store_is_closed_is_answered_in_time(
    own: RedisServer, own_house: House
) -> None:
    async def scene() -> float:
        store = open_async_store(own_house.url)
        await store.lookup(own_house.claim)
        own.freeze()
        waiting = asyncio.create_task(store.lookup(own_house.claim))
        await asyncio.sleep(0)
        await store.aclose()
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await waiting
        return time.monotonic() - begun

    assert asyncio.run(asyncio.wait_for(scene(), 30)) < 10


def test_a_feed_subscribes_again_and_what_happened_meanwhile_is_found(
    house: House, estate: Estate, feed: Feed
) -> None:
    known = {partition: news.epoch for partition, news in feed.read({}).news.items()}
    for _ in range(3):
        estate.everywhere("CLIENT", "KILL", "TYPE", "pubsub")
        house.change()  # announced to nobody
        feed.wait(FOR_EVER)  # the lost subscription ends it
        news = feed.read(known).news
        assert [change for part in news.values() for change in part.changes or ()] == [
            ("key.renamed", house.key_id)
        ]
        known = {partition: part.epoch for partition, part in news.items()}
        house.change()
        feed.wait(FOR_EVER)  # it is announced again
        known = {partition: part.epoch for partition, part in feed.read(known).news.items()}


def test_pitfall_18_a_change_that_is_not_announced_is_found_by_reading(
    house: House, ring: PepperRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.store._layout, "channel", "nobody-listens")
    verifier = open_redis(house.url, False)
    with Authenticator(verifier, environment="prod", peppers=ring, max_staleness=0.4) as authenticator:
        assert isinstance(authenticator.authenticate(SEED), Identity)
        house.keys.disable_key(house.key_id)
        committed = time.monotonic()

        def refused() -> bool:
            try:
                authenticator.authenticate(SEED)
            except Refused as error:
                return error.reason is Reason.KEY_INACTIVE
            return False

        wait_until(refused, SOON, what="the key to be refused")
        assert time.monotonic() - committed < SOON
    verifier.close()


def test_an_announced_change_is_applied_at_once(house: House, ring: PepperRing) -> None:
    verifier = open_redis(house.url, False)
    with Authenticator(verifier, environment="prod", peppers=ring, max_staleness=FOR_EVER) as authenticator:
        assert isinstance(authenticator.authenticate(SEED), Identity)
        house.keys.disable_key(house.key_id)

        def refused() -> bool:
            try:
                authenticator.authenticate(SEED)
            except Refused:
                return True
            return False

        wait_until(refused, SOON, what="the key to be refused")
    verifier.close()


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 1_000])
def test_amendment_4_a_tip_of_another_history_drops_everything(house: House, feed: Feed, offset: int) -> None:
    for _ in range(3):
        house.change()
    partition = house.claim.partition
    tip = feed.read({}).news[partition].epoch
    news = feed.read({partition: Epoch(tip.seq + offset, b"another history!")}).news[partition]
    assert news == News(tip, None)


def test_a_log_too_long_to_read_drops_everything(
    house: House, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.stores.redis_questions.LOG_READ", 3)
    known = {partition: news.epoch for partition, news in feed.read({}).news.items()}
    for wanted in (1, 2, 3, None):
        house.change()
        changes = feed.read(known).news[house.claim.partition].changes
        assert (None if changes is None else len(changes)) == wanted


def test_the_journal_reads_logs_of_any_length(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papaours_auth.stores.redis._SCAN", 3)
    for _ in range(10):
        house.change()
    assert len(house.keys.journal(house.key_id)) == 11
    assert len(house.keys.journal(house.key_id, limit=5)) == 5
    assert house.keys.journal()[-1].kind == "store.created"
    assert [change.kind for change in house.keys.journal()].count("store.created") == 1
    assert house.keys.journal("key_nobody_has") == []
    assert len(house.keys.keys()) == 1


def test_a_list_of_more_keys_than_one_reply_holds_is_whole(house: House) -> None:
    partition, keys = house.claim.partition, name_in(house, house.claim.partition, "keys")
    (packed,) = house.store._run(partition, ("HGET", keys, house.key_id))
    others = [f"key_{number:016}" for number in range(2_000)]
    words = [
        word for other in others for word in (other, packed.replace(house.key_id.encode(), other.encode()))
    ]
    house.store._run(partition, ("HSET", keys, *words))
    assert {key.id for key in house.store.keys()} == {*others, house.key_id}


# how the server is set up


def test_amendment_10_a_policy_that_may_evict_keys_is_refused(own: RedisServer, own_house: House) -> None:
    twin = open_async_store(own_house.url)
    for policy, fine in (
        ("allkeys-lru", False),
        ("volatile-ttl", True),
        ("allkeys-random", False),
        ("noeviction", True),
    ):
        own.say("CONFIG", "SET", "maxmemory-policy", policy)
        for question in (
            own_house.store.describe,
            lambda: asyncio.run(twin.describe()),
            lambda: open_store(own_house.url, create=True).close(),
        ):
            if fine:
                question()
                continue
            with pytest.raises(ConfigurationError, match="maxmemory-policy"):
                question()
    asyncio.run(twin.aclose())


def test_records_have_no_lifetime(own: RedisServer, own_house: House) -> None:
    own_house.change()
    names = own.say("KEYS", "*")
    assert names
    assert {own.say("TTL", name) for name in names} == {-1}


def recipe(prefix: str) -> list[list[str]]:
    """The lines of the ACL recipe in the docs, for another prefix."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("ACL SETUSER")]
    return [
        line.replace("papaours:", f"{prefix}:").replace("{papaours", f"{{{prefix}").split() for line in lines
    ]


def test_the_acl_recipe_lets_an_app_verify_and_an_administrator_write(
    estate: Estate, ring: PepperRing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = f"acl{next(_numbers)}"
    for line in recipe(prefix):
        assert set(estate.everywhere(*line)) <= {b"OK", "OK", True}
    administrator = estate.url("papaours-admin:ADMIN-PASSWORD@", prefix=prefix)
    with furnished(administrator, ring) as house:
        house.change()
        house.keys.disable_key(house.key_id)
        house.keys.enable_key(house.key_id)
        assert house.keys.keys()
        assert house.keys.journal()
        store_url = estate.url("papaours-app:APP-PASSWORD@", prefix=prefix)
        store = open_redis(store_url, False)
        feed = store.feed()
        assert store.describe() == house.store.describe()
        assert store.warnings == (
            "maxmemory-policy cannot be read here: see that it is noeviction, or volatile-…",
        )
        monkeypatch.setenv("PAPAOURS_STORE", store_url)
        main(["doctor"])
        assert "warning  store      maxmemory-policy cannot be read" in capsys.readouterr().out
        assert store.lookup(house.claim).record is not None
        feed.read({})
        house.change()
        feed.wait(FOR_EVER)  # announced
        before = house.keys.keys(), house.keys.journal()
        machine = house.keys.machines()[0]
        for change in (
            lambda: store.update_key(house.key_id, {"status": "inactive"}, "key.disabled", AUTHOR),
            lambda: store.update_machine(machine.id, {"status": "inactive"}, "machine.disabled", AUTHOR),
            lambda: store.delete_machine(machine.id, AUTHOR),
            lambda: store.add_pepper(PepperRecord("p9", b"9" * 32, "accept"), AUTHOR),
            store.create,
        ):
            with contextlib.suppress(StoreUnavailable):
                change()
        unavailable(lambda: store._run(0, ("SET", name_in(house, 0, "x"), "1")), "lacks a permission")
        unavailable(
            lambda: store._run(0, ("EVAL", "return redis.call('del', KEYS[1])", 1, name_in(house, 0, "keys")))
        )
        assert (house.keys.keys(), house.keys.journal()) == before
        feed.close()
        store.close()
    for user in ("papaours-app", "papaours-admin"):
        estate.everywhere("ACL", "DELUSER", user)


def test_without_the_right_to_subscribe_changes_are_found_by_asking(
    own: RedisServer, own_house: House, caplog: pytest.LogCaptureFixture
) -> None:
    own.say("ACL", "SETUSER", "deaf", "on", ">p", "~*", "resetchannels", "+@all")
    store = open_redis(own_house.url.replace("://", "://deaf:p@"), False)
    feed = store.feed()
    feed.read({})
    assert "announces no changes" in caplog.text
    began = time.monotonic()
    own_house.change()
    feed.wait(0.1)
    assert time.monotonic() - began >= 0.09
    assert feed.read({}).news
    assert caplog.text.count("announces no changes") == 1
    feed.close()
    store.close()


def test_a_password_is_never_seen(estate: Estate, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    url = estate.url("alice:hunter2@")
    seen: list[str] = []
    store, twin = open_redis(url, False), open_async_store(url)
    feed = store.feed()
    questions: list[Callable[[], object]] = [
        lambda: open_store(url, create=True), store.describe, store.keys, lambda: feed.read({}),
        lambda: asyncio.run(twin.describe()),
    ]  # fmt: skip
    for question in questions:
        with pytest.raises(PapaoursAuthError) as error:
            question()
        seen += traceback.format_exception(error.value)
    seen += [repr(store), repr(store.place), repr(twin), repr(feed), repr(store._wire), caplog.text]
    assert "does not take the URL's credentials" in "".join(seen)
    assert "hunter2" not in "".join(seen)
    feed.close()
    asyncio.run(twin.aclose())


def test_prefixes_keep_stores_apart(estate: Estate, ring: PepperRing) -> None:
    with furnished(estate.url(), ring) as one, furnished(estate.url(), ring) as other:
        other.keys.disable_key(other.key_id)
        assert (one.status(), other.status()) == ("active", "inactive")
        assert one.store.describe().installation != other.store.describe().installation


# creation


def test_several_may_create_a_store_at_once(estate: Estate) -> None:
    url, made, failures = estate.url(), list[str](), list[BaseException]()

    def create() -> None:
        try:
            with contextlib.closing(open_store(url, create=True)) as store:
                made.append(store.describe().installation)
        except BaseException as error:  # noqa: BLE001 - told below, in the thread that tests
            failures.append(error)

    threads = [threading.Thread(target=create) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (len(made), len(set(made))) == (5, 1)


def test_without_create_a_store_that_is_not_there_is_told_when_it_is_first_asked(estate: Estate) -> None:
    with (
        contextlib.closing(open_store(estate.url())) as store,
        pytest.raises(ConfigurationError, match="papaours-auth init"),
    ):
        store.describe()


def test_a_creation_that_was_broken_off_is_finished_and_a_lost_part_is_not_made_anew(house: House) -> None:
    mark, log = name_in(house, 32, "mark"), name_in(house, 5, "changes")
    run = house.store._run
    run(32, ("HDEL", mark, "ready"))
    run(5, ("DEL", log))
    house.store.create()
    assert house.store.describe()
    assert house.found()
    run(5, ("DEL", log))
    unavailable(house.store.create, "lost")
    run(32, ("DEL", mark))
    with pytest.raises(ConfigurationError, match="parts of a store"):
        house.store.create()
    unavailable(house.store.describe, "lost")


def test_a_store_of_another_schema_is_refused(house: House) -> None:
    house.store._run(32, ("HSET", name_in(house, 32, "mark"), "schema", 2))
    with pytest.raises(ConfigurationError, match="another schema"):
        house.store.describe()


# administration


def test_pitfall_14_no_change_undoes_another(house: House) -> None:
    """One renames, one disables and enables, at once: each column ends as its own last writer left it."""
    failures: list[BaseException] = []

    def run(call: Callable[[int], object]) -> None:
        try:
            for number in range(20):
                call(number)
        except BaseException as error:  # noqa: BLE001 - told below, in the thread that tests
            failures.append(error)

    calls: list[Callable[[int], object]] = [
        lambda number: house.keys.rename_key(house.key_id, f"Production - {number}"),
        lambda number: (house.keys.disable_key if number % 2 else house.keys.enable_key)(house.key_id),
    ]
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    key = house.keys.key(house.key_id)
    assert (key.name, key.status) == ("Production - 19", "inactive")


def test_pitfall_14_a_change_made_since_the_record_was_read_is_kept(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = house.store._change

    def late(*arguments: Any) -> bool:
        monkeypatch.undo()
        house.keys.disable_key(house.key_id)
        return change(*arguments)

    monkeypatch.setattr(house.store, "_change", late)
    house.keys.rename_key(house.key_id, "Production - Nouveau")
    key = house.keys.key(house.key_id)
    assert (key.name, key.status) == ("Production - Nouveau", "inactive")
    assert house.keys.journal(house.key_id)[0].before == '{"name": "Production - Facturation"}'


def test_a_record_that_others_keep_changing_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "_change", lambda *_: False)
    machine = house.keys.machines()[0]
    for change in (
        lambda: house.keys.disable_key(house.key_id),
        lambda: house.keys.disable_machine(machine.id),
        lambda: house.store.delete_machine(machine.id, AUTHOR),
        lambda: house.store._remove_key(house.keys.key(house.key_id), AUTHOR),
        lambda: house.store.set_pepper_status("p1", "accept", AUTHOR),
    ):
        unavailable(change, "keep changing")


def test_a_deletion_that_was_broken_off_lets_nobody_in_and_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = house.keys.machines()[0]

    def broken(self: RedisStore, key: object, author: object) -> bool:
        raise StoreUnavailable("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(RedisStore, "_remove_key", broken)
        unavailable(lambda: house.store.delete_machine(machine.id, AUTHOR))
    assert house.store.lookup(house.claim).record is None
    assert [key.id for key in house.store.keys()] == [house.key_id]
    left = house.store.keys()[0]
    house.store.delete_machine(machine.id, AUTHOR)
    assert house.store.keys() == []
    assert house.store.count_digests("p1") == 0
    assert not house.store._remove_key(left, AUTHOR)
    with pytest.raises(NotFound):
        house.store.delete_machine(machine.id, AUTHOR)


def test_a_write_whose_answer_never_came_is_told_as_such(
    own: RedisServer, own_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_house.change()
    machine = own_house.keys.machines()[0]
    written = own_house.store._written

    def freeze_first(*arguments: Any) -> bool:
        own.freeze()
        return written(*arguments)

    monkeypatch.setattr(own_house.store, "_written", freeze_first)
    own_house.store._admin._timeout = 0.3
    own_house.store._admin.discard()
    own_house.store.keys()
    try:
        unavailable(
            lambda: own_house.store.add_machine(replace(machine, id="machine_other"), AUTHOR),
            "may have been made all the same",
        )
    finally:
        own.thaw()
    wait_until(lambda: len(own_house.store.machines()) == 2, SOON, what="the change to be made")


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_change_that_no_replica_confirmed_is_made_and_reported(
    tmp_path: Path, ring: PepperRing, caplog: pytest.LogCaptureFixture, replicas: int
) -> None:
    with contextlib.ExitStack() as stack:
        if replicas:
            primary = stack.enter_context(redis_sentinel(newest(), tmp_path))[0]
        else:
            primary = stack.enter_context(redis_server(newest(), tmp_path))
        url = f"redis://{primary.address}?wait_replicas=1&wait_timeout={3000 if replicas else 50}"
        house = stack.enter_context(furnished(url, ring))
        caplog.clear()
        assert house.keys.disable_key(house.key_id).status == "inactive"
        assert house.status() == "inactive"
        assert [record.getMessage()[:57] for record in caplog.records] == (
            [] if replicas else ["the change WAS made, but only 0 of 1 replicas confirmed i"]
        )


# connections


def test_many_callers_share_few_connections(house: House, estate: Estate) -> None:
    store = open_redis(f"{house.url}&connections=2&timeout=20", False)
    twin = open_async_store(f"{house.url}&connections=2&timeout=20")
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.extend(store.lookup(house.claim).record for _ in range(20)))
        for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def look() -> None:
        found.extend(
            answer.record for answer in await asyncio.gather(*[twin.lookup(house.claim) for _ in range(200)])
        )

    asyncio.run(look())
    asyncio.run(look())
    assert len(found) == 600
    assert all(found)
    store.close()
    asyncio.run(twin.aclose())


def test_callers_who_wait_too_long_for_a_connection_meet_an_outage(
    own: RedisServer, own_house: House
) -> None:
    store = open_redis(own_house.url + "?connections=1&timeout=0.3", False)
    store.lookup(own_house.claim)
    own.freeze()
    said: list[str] = []

    def look() -> None:
        try:
            store.lookup(own_house.claim)
        except StoreUnavailable as error:
            said.append(str(error))

    threads = [threading.Thread(target=look) for _ in range(5)]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        own.thaw()
    assert len(said) == 5
    assert any("connections to Redis are in use" in text for text in said)
    assert time.monotonic() - began < 5
    store.close()


def test_connections_to_a_node_that_is_none_of_the_stores_any_more_are_not_kept(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = open_async_store(house.url)

    async def look(kept: int) -> None:
        for _ in range(2):
            assert (await twin.lookup(house.claim)).record is not None
        (mine,) = twin._wire._loops.values()  # type: ignore[attr-defined]  # the store for loops
        assert min(1, sum(map(len, mine.idle.values()))) == kept
        if kept:
            monkeypatch.setattr(twin._ask.router, "knows", lambda node: False)  # type: ignore[attr-defined]  # see above
            await look(0)

    assert house.found()
    assert house.store._wire._idle
    monkeypatch.setattr(house.store._router, "knows", lambda node: False)
    for _ in range(2):
        assert house.found()
    assert not any(house.store._wire._idle.values())
    asyncio.run(look(1))
    asyncio.run(twin.aclose())


def test_a_subscription_that_gets_no_answer_is_done_without(
    own: RedisServer, own_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_redis(own_house.url + "?timeout=0.3", False)
    store.describe()

    def freezes(*arguments: Any) -> Any:
        link = connect(*arguments)
        own.freeze()
        return link

    feed = store.feed()
    with monkeypatch.context() as patch:
        patch.setattr("papaours_auth.stores.redis_feed.connect", freezes)
        unavailable(lambda: feed.read({}), "does not answer in time")
    own.thaw()
    assert feed.read({}).news
    feed.close()
    store.close()


def test_pitfall_23_a_cancelled_lookup_leaves_nothing_half_read(house: House) -> None:
    twin = open_async_store(f"{house.url}&connections=1&timeout=20")

    async def look() -> None:
        await twin.lookup(house.claim)
        for number in range(50):
            task = asyncio.create_task(twin.lookup(house.claim))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found = await twin.lookup(house.claim)
            assert found.record is not None
        await twin.aclose()

    asyncio.run(look())


def test_a_fork_leaves_parent_and_child_with_connections_of_their_own(house: House, feed: Feed) -> None:
    twin = open_async_store(house.url)

    async def look() -> None:
        found = await twin.lookup(house.claim)
        assert found.record is not None
        child = os.fork()
        if child == 0:
            _in_child(house, feed)
        _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - the loop is to stand still
        assert os.waitstatus_to_exitcode(status) == 0
        assert (await twin.lookup(house.claim)).record is not None
        await twin.aclose()

    house.found()
    feed.read({})
    asyncio.run(look())
    for _ in range(20):
        assert open_is_fine(house)
    house.keys.disable_key("Enfant")
    feed.wait(FOR_EVER)
    assert feed.read({}).news


def open_is_fine(house: House) -> bool:
    return open_redis(house.url, False).lookup(house.claim).record is not None


def _in_child(house: House, feed: Feed) -> None:
    code = 1
    try:
        for _ in range(20):
            assert house.found()
        assert feed.read({}).news
        house.keys.rename_key(house.key_id, "Enfant")
        feed.wait(FOR_EVER)
        feed.wake()
        feed.wait(FOR_EVER)
        feed.close()
        code = 0
    finally:
        os._exit(code)


def test_what_a_child_does_not_inherit(house: House, feed: Feed) -> None:
    """The same in this process, where it can be looked at."""
    house.found()
    feed.read({})
    twin = open_async_store(house.url)
    holders: Any = (house.store._wire, feed, twin._wire)  # type: ignore[attr-defined]  # the store for loops
    for holder in holders:
        holder.before_fork()
        holder.after_fork(child=True)
    assert house.store._wire._idle == {}
    assert house.found()
    assert feed.read({}).news
    asyncio.run(twin.aclose())


def test_what_nobody_closed_is_closed_with_it(house: House, ring: PepperRing) -> None:
    """A WSGI app has no place to close what its middleware opened."""
    for _ in range(3):
        store = open_redis(house.url, False)
        feed = store.feed()
        assert feed.read({}).news
        assert store.lookup(house.claim).record
        del store, feed


# which node, without a server


def answer(steps: Any, *replies: object) -> Any:
    """Carry steps out with given replies, each for one round trip; an exception is thrown in."""
    ask = next(steps)
    for reply in replies:
        try:
            ask = steps.throw(reply) if isinstance(reply, BaseException) else steps.send(reply)
        except StopIteration as stop:
            return stop.value
    return ask


ROUTER_OF = {
    "cluster": lambda: Router(place_of("redis+cluster://a,b"), ["x", "y"]),
    "sentinel": lambda: Router(place_of("redis+sentinel://a,b/keys"), ["x", "y"]),
    "single": lambda: Router(place_of("redis://a"), ["x", "y"]),
}
HERE = [[0, 16383, [b"n1", 1]]]
THERE = [[0, 16383, [b"n2", 2]]]


def test_who_is_sent_round_and_round_gives_up() -> None:
    moved = [[MovedError(f"1 n{number}:1")] for number in range(9)]
    with pytest.raises(StoreUnavailable, match="keeps sending us"):
        answer(ROUTER_OF["cluster"]().run(0, ("GET", "k")), [HERE], *moved)


def test_a_part_that_no_node_holds_is_an_outage() -> None:
    router = ROUTER_OF["cluster"]()
    other = router._slots[1]
    with pytest.raises(StoreUnavailable, match="no node of the Redis Cluster holds"):
        answer(router.run(0, ("GET", "k")), [[[other, other, [b"n1", 1]]]])


def test_a_read_is_tried_where_the_node_has_gone_and_a_write_that_was_sent_never() -> None:
    for write in (False, True):
        lost = Unreachable("gone")
        lost.sent = True
        steps = ROUTER_OF["cluster"]().run(0, ("GET", "k"), write=write)
        if write:
            with pytest.raises(Unreachable):
                answer(steps, [HERE], lost)
        else:
            assert answer(steps, [HERE], lost, [THERE], [b"v"]) == [b"v"]


def test_a_sentinel_that_does_not_answer_or_knows_nothing_is_passed_over() -> None:
    router = ROUTER_OF["sentinel"]()
    steps = router.run(0, ("GET", "k"))
    assert answer(steps, Unreachable("gone"), [[b"n1", b"1"]], [b"v"]) == [b"v"]
    assert router._informants[0].host == "b"  # and asked first from now on
    with pytest.raises(StoreUnavailable, match="no Sentinel"):
        answer(ROUTER_OF["sentinel"]().run(0, ("GET", "k")), [None], [ResponseError("NOAUTH")])


def test_an_error_among_a_nodes_replies_is_an_outage() -> None:
    steps = ROUTER_OF["single"]().ask(Node("a", 1), [0, 1], [("GET", "k"), ("GET", "l")])
    with pytest.raises(StoreUnavailable, match="no memory left"):
        answer(steps, [b"v", ResponseError("OOM too much")])


def test_a_server_that_is_loading_is_told_so() -> None:
    node = Node("h", 1)
    assert "is loading its data" in str(unreachable(node, BusyLoadingError("LOADING"), sent=True))


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def encrypted(tmp_path: Path, certificates: Certificates) -> Iterator[str]:
    """The host and port of a server that also speaks TLS."""
    binary = newest()
    if not speaks_tls(binary):
        pytest.skip("no Redis with TLS here: apt-get install redis-server")
    port = free_port()
    options = (
        *(
            "--tls-port",
            str(port),
            "--tls-auth-clients",
            "no",
            "--tls-ca-cert-file",
            str(certificates.authority),
        ),
        *("--tls-cert-file", str(certificates.certificate), "--tls-key-file", str(certificates.key)),
    )
    with redis_server(binary, tmp_path / "tls", *options):
        yield f"127.0.0.1:{port}"


def test_over_tls_everything_works_and_a_stranger_is_not_trusted(
    encrypted: str, certificates: Certificates, ring: PepperRing
) -> None:
    with furnished(f"rediss://{encrypted}?timeout=5&ca_certs={certificates.authority}", ring) as house:
        twin, feed = open_async_store(house.url), house.store.feed()

        async def look() -> None:
            assert (await twin.lookup(house.claim)).record is not None

        asyncio.run(look())
        assert house.found()
        feed.read({})
        house.change()
        feed.wait(FOR_EVER)
        feed.close()
        asyncio.run(twin.aclose())
    strangers_are_refused(encrypted, certificates)


def strangers_are_refused(encrypted: str, certificates: Certificates) -> None:
    for url in (
        f"rediss://{encrypted}?timeout=5",
        f"rediss://{encrypted}?timeout=5&ca_certs={certificates.stranger}",
    ):
        with contextlib.closing(open_redis(url, False)) as store:
            unavailable(store.describe, "cannot be trusted, or does not speak TLS")
        twin = open_async_store(url)
        unavailable(lambda twin=twin: asyncio.run(twin.describe()), "cannot be")  # type: ignore[misc]  # bound now
        asyncio.run(twin.aclose())


# Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    with redis_cluster(newest(), tmp_path, *KEPT) as servers:
        yield servers


def sees_all(server: RedisServer) -> bool:
    return b"cluster_state:ok" in server.say("CLUSTER", "INFO")


def with_keys_in_all_parts(house: House) -> tuple[Machine, list[str]]:
    machine = house.keys.machines()[0]
    texts = [f"pk_prod_{number:012}x" for number in range(40)]
    for text in texts:
        house.keys.import_key(machine.id, text, name="Production - Import")
    return machine, texts


def test_a_cluster_that_lost_a_node_verifies_the_keys_of_the_others(
    cluster: list[RedisServer], ring: PepperRing
) -> None:
    url = Estate("redis+cluster", cluster).url(timeout=2)
    with furnished(url, ring) as house:
        machine, texts = with_keys_in_all_parts(house)
        nodes = house.store._router._nodes
        keep = nodes[16 + crc32(machine.id.encode()) % 16]
        gone = next(server for server in cluster if server.port != keep.port)
        claims = {text: claim_of(text, ring, house.store) for text in texts}
        feed = house.store.feed()
        assert len(feed.read({}).news) == 33
        twin = open_async_store(url)
        gone.kill()

        def answers(claim: Claim) -> bool | str:
            try:
                return house.store.lookup(claim).record is not None
            except StoreUnavailable as error:
                return str(error)

        async def answers_async(claim: Claim) -> bool | str:
            try:
                return (await twin.lookup(claim)).record is not None
            except StoreUnavailable as error:
                return str(error)

        for claim in claims.values():
            live = nodes[claim.partition].port != gone.port
            began = time.monotonic()
            for answer in (answers(claim), asyncio.run(answers_async(claim))):
                assert answer is True if live else "cannot be reached" in str(answer)
            assert time.monotonic() - began < 3
        dead = {partition for partition, node in nodes.items() if node.port == gone.port}
        assert set(feed.read({}).news) == set(range(33)) - dead
        gone.start()
        wait_until(lambda: all(map(sees_all, cluster)), 60, what="the nodes to see each other")
        wait_until(
            lambda: all(answers(claim) is True for claim in claims.values()),
            30,
            what=lambda: f"the node to be back: {set(map(answers, claims.values()))}",
        )
        wait_until(lambda: len(feed.read({}).news) == 33, 30, what="all partitions to be read")
        feed.close()
        asyncio.run(twin.aclose())


@pytest.mark.parametrize("lost", ["a node of keys", "the node of the peppers"])
def test_what_a_verifier_says_while_a_node_of_the_cluster_is_away(
    lost: str, cluster: list[RedisServer], ring: PepperRing
) -> None:
    """Keys of live nodes come in; of the other, 503. Without the part that tells of peppers, 503 for all."""
    url = Estate("redis+cluster", cluster).url(timeout=2)
    options: Any = {"environment": "prod", "peppers": ring, "max_staleness": 0.5}
    with furnished(url, ring) as house, Authenticator(url, **options) as door:
        machine, texts = with_keys_in_all_parts(house)
        ports = {partition: node.port for partition, node in house.store._router._nodes.items()}
        peppers = ports[META]
        if lost == "a node of keys":
            elsewhere = {peppers, ports[machine_partition(machine.id)]}
            gone = next(server for server in cluster if server.port not in elsewhere)
        else:
            gone = next(server for server in cluster if server.port == peppers)

        def said(text: str) -> Reason | None:
            try:
                door.authenticate(text)
            except Refused as refusal:
                return refusal.reason
            return None

        def wanted(text: str) -> Reason | None:
            dead = lost == "the node of the peppers" or ports[partition(text.encode())] == gone.port
            return Reason.STORE_UNAVAILABLE if dead else None

        assert {said(text) for text in texts} == {None}
        assert (None in map(wanted, texts)) == (lost == "a node of keys")
        gone.kill()
        heard: set[Reason | None] = set()

        def all_say(expected: Callable[[str], Reason | None]) -> bool:
            answers = {text: said(text) for text in texts}
            heard.update(answers.values())
            return all(answer is expected(text) for text, answer in answers.items())

        wait_until(lambda: all_say(wanted), 30, what="each key to be answered as its node is")
        gone.start()
        wait_until(lambda: all_say(lambda _: None), 60, what="all keys to be verified again")
        assert heard == {None, Reason.STORE_UNAVAILABLE}


@pytest.mark.parametrize("estate", ["cluster"], indirect=True)
def test_slots_that_have_moved_are_asked_for_where_they_are(house: House, feed: Feed) -> None:
    """MOVED: the map of an app is as old as its last question."""
    router = house.store._router
    someone = router._nodes[0]
    for question in (house.found, lambda: len(feed.read({}).news) == 33, house.change):
        router._nodes = dict.fromkeys(range(33), someone)
        assert question()
    assert len(set(router._nodes.values())) == 3


def test_a_slot_under_way_to_another_node_is_asked_for_there(
    cluster: list[RedisServer], ring: PepperRing
) -> None:
    """ASK: its keys have gone, its owner has not changed yet."""
    url = Estate("redis+cluster", cluster).url()
    with furnished(url, ring) as house:
        partition = house.claim.partition
        slot, here = house.store._router._slots[partition], house.store._router._nodes[partition]
        source = next(server for server in cluster if server.port == here.port)
        target = next(server for server in cluster if server.port != here.port)
        ids = {server.port: text(server.say("CLUSTER", "MYID")) for server in cluster}
        target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        names = source.say("CLUSTER", "GETKEYSINSLOT", slot, 100)
        source.say("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names)
        feed = house.store.feed()
        assert house.found()
        assert len(feed.read({}).news) == 33
        unavailable(house.change, "TRYAGAIN")  # a new name is a key that is there neither here nor there
        for server in (target, source):
            server.say("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        assert house.found()
        assert len(feed.read({}).news) == 33
        assert house.store._router._nodes[partition].port == target.port
        feed.close()


def text(answer: bytes | str) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer


def test_a_cluster_without_a_node_for_a_part_is_an_outage(
    cluster: list[RedisServer], ring: PepperRing
) -> None:
    with furnished(Estate("redis+cluster", cluster).url(timeout=0.3), ring) as house:
        for server in cluster:
            server.kill()
        unavailable(house.found, "no node of the Redis Cluster can be reached")
        unavailable(house.store.describe)
        house.store._router.forget()
        unavailable(house.found, "no node of the Redis Cluster can be reached")


# Sentinel


def test_after_a_failover_the_new_primary_is_asked(tmp_path: Path, ring: PepperRing) -> None:
    with redis_sentinel(newest(), tmp_path) as (primary, replica, sentinel):
        url = f"redis+sentinel://{sentinel.address}/keys?timeout=1&wait_replicas=1&wait_timeout=3000"
        with furnished(url, ring) as house:
            twin, feed = open_async_store(url), house.store.feed()
            known = {partition: news.epoch for partition, news in feed.read({}).news.items()}

            async def through_the_failover() -> None:
                assert (await twin.lookup(house.claim)).record
                primary.kill()
                unavailable(lambda: house.found() and house.found())
                await asyncio.to_thread(wait_for_failover, sentinel, primary)
                wait_until(lambda: replica.say("ROLE")[0] in (b"master", "master"), 30, what="the promotion")
                assert (await twin.lookup(house.claim)).record

            asyncio.run(through_the_failover())
            assert house.found()
            assert {partition: news.epoch for partition, news in feed.read(known).news.items()} == known
            assert house.store._router._nodes[0].port == replica.port
            feed.close()
            asyncio.run(twin.aclose())


def test_amendment_4_a_watcher_asks_a_sentinel_before_it_reads(tmp_path: Path, ring: PepperRing) -> None:
    """A primary that was replaced goes on answering: its connections stay open, only a Sentinel tells."""
    with redis_sentinel(newest(), tmp_path) as (primary, replica, sentinel):
        url = f"redis+sentinel://{sentinel.address}/keys?timeout=1&wait_replicas=1&wait_timeout=3000"
        with furnished(url, ring) as house:
            feed = house.store.feed()
            feed.read({})
            router = house.store._router
            stale = dict.fromkeys(range(33), Node("127.0.0.1", replica.port))
            router._nodes = stale
            feed.read({})
            assert router._nodes[0].port == primary.port
            sentinel.freeze()
            try:
                unavailable(lambda: feed.read({}), "no Sentinel")
            finally:
                sentinel.thaw()
            router._nodes = stale  # a write to a replica
            unavailable(house.change, "replica")
            house.change()
            feed.close()


def test_an_unknown_service_is_an_outage(tmp_path: Path) -> None:
    with redis_sentinel(newest(), tmp_path) as (_, _, sentinel):
        store = open_redis(f"redis+sentinel://{sentinel.address}/others", False)
        unavailable(store.describe, "no Sentinel can be reached that knows")
        store.close()
