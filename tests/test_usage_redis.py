"""Usage in Redis, on real servers: each event once whatever happens, and nothing without a bound."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from papaours_auth import Identity, PepperRing, Reason
from papaours_auth.exceptions import ConfigurationError, InvalidInput, StoreUnavailable
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.stores import redis_wire
from papaours_auth.stores.redis_wire import Link, connect
from papaours_auth.usage import Batch, CallableSink, Event, Recorder, Refusals, Tee, open_sink
from papaours_auth.usage import redis as usage_redis
from papaours_auth.usage.event import Outcome, begin_call
from papaours_auth.usage.redis import AsyncRedisUsage, RedisSink, RedisUsage
from papaours_auth.usage.sqlite import Retention
from support.proxy import Proxy
from support.redis_servers import (
    BINARIES,
    NEWEST,
    WHY_NOT,
    RedisServer,
    make_certificates,
    redis_cluster,
    redis_server,
    speaks_tls,
)
from support.servers import free_port, wait_until
from support.usage import call_with_canaries

_numbers = itertools.count(1)
NOW = int(time.time() * 1e6)
MINUTE = 60_000_000
DOCS = Path(__file__).resolve().parents[1] / "docs" / "usage.md"

# `asyncio.run` leaves the connections of a loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed (transport|<socket):ResourceWarning")


class House(NamedTuple):
    """A prefix that nobody has used yet, on servers that every test may use and none may stop."""

    scheme: str
    servers: list[RedisServer]
    prefix: str

    @property
    def url(self) -> str:
        hosts = ",".join(server.address for server in self.servers)
        return f"{self.scheme}://{hosts}/?prefix={self.prefix}&timeout=5"

    def name(self, structure: str) -> str:
        return f"{{{self.prefix}:usage}}:{structure}"

    def say(self, *words: object) -> Any:
        """Ask the server that has our slot; the others would send us there."""
        for server in self.servers:
            try:
                return server.say(*words)
            except Exception as error:
                if "MOVED" not in type(error).__name__.upper() and "MOVED" not in str(error):
                    raise
        raise AssertionError("no server has the slot")

    def events(self) -> list[Event]:
        entries = self.say("XRANGE", self.name("events"), "-", "+")
        found = []
        for _, cells in entries:
            fields = cells if isinstance(cells, dict) else dict(zip(cells[::2], cells[1::2], strict=True))
            texts = {key.decode(): value.decode() for key, value in fields.items()}
            numbers = {name: int(texts[name]) for name in ("v", "time", "status", "duration")}
            found.append(Event(**{**texts, **numbers}))
        return found

    def hash(self, structure: str) -> dict[str, str]:
        found = self.say("HGETALL", self.name(structure))
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return {key.decode(): value.decode() for key, value in pairs}

    def names(self) -> list[str]:
        pattern = f"{{{self.prefix}:usage}}:*"
        return sorted(name.decode() for server in self.servers for name in server.say("KEYS", pattern))


@pytest.fixture(scope="session", params=["6.2", "installed", "cluster"])
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[RedisServer]]]:
    folder = tmp_path_factory.mktemp("redis")
    binary = NEWEST if request.param == "cluster" else BINARIES[request.param]
    if binary is None:
        pytest.skip(WHY_NOT.get(request.param, "no Redis server here"))
    if request.param == "cluster":
        with redis_cluster(binary, folder) as nodes:
            yield "redis+cluster", nodes
    else:
        with redis_server(binary, folder) as server:
            yield "redis", [server]


@pytest.fixture
def house(servers: tuple[str, list[RedisServer]]) -> House:
    return House(*servers, f"usage{next(_numbers)}")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[House]:
    """A server of this test's own, which keeps its data."""
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    with redis_server(NEWEST, tmp_path / "own", "--appendonly", "yes") as server:
        yield House("redis", [server], "own")


def event(number: int, key: str = "key_1", at: int = NOW, status: int = 200, **more: Any) -> Event:
    made = Event(
        1, f"p-1-{number}", at, key, "machine 1", "192.0.2.7", "GET", "/contrats/{id}", status, "", "completed",
        "contrats", "prod", 1500, "r-1",
    )  # fmt: skip
    return made._replace(**more)


def batch(count: int, sequence: int = 1, producer: str = "p", **more: Any) -> Batch:
    return Batch(producer, sequence, [event(number, **more) for number in range(count)])


def counted(house: House, step: str) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name in house.names():
        if name.startswith(house.name(f"{step}:")):
            sums.update({field: int(n) for field, n in house.hash(name.split("}:")[1]).items()})
    return sums


def test_a_batch_is_kept_whole_and_counted(house: House) -> None:
    refusals = [Refusals(NOW // MINUTE * MINUTE, "unknown_key", "192.0.2.0/24", 3)]
    events = [
        event(0, at=NOW - 5),
        event(1, status=404),
        event(2, key="key_2", reason="key_inactive", status=401),
    ]
    RedisSink(house.url).write(Batch("p", 1, events, refusals))
    assert house.events() == events
    for step in ("minute", "hour", "day"):
        assert counted(house, step) == {"200 key_1": 1, "404 key_1": 1, "401 key_2": 1}
    assert counted(house, "refusals") == {"unknown_key 192.0.2.0/24": 3}
    assert house.hash("keys") == {
        "key_1": f"{NOW - 5} {NOW} 2 machine 1",
        "key_2": f"{NOW} {NOW} 1 machine 1",
    }


def test_a_batch_that_comes_again_changes_nothing(house: House) -> None:
    first, second = batch(3), batch(2, sequence=2)
    for given in (first, first, second, first, second):
        RedisSink(house.url).write(given)
    assert len(house.events()) == 5
    assert counted(house, "day") == {"200 key_1": 5}
    assert house.hash("keys")["key_1"].split()[2] == "5"
    RedisSink(house.url).write(batch(1, producer="another"))
    assert len(house.events()) == 6


def test_refusals_alone_are_stored_once(house: House) -> None:
    alone = Batch("p", 1, [], [Refusals(NOW, "malformed_key", "unknown", 2)])
    RedisSink(house.url).write(alone)
    RedisSink(house.url).write(alone)
    assert counted(house, "refusals") == {"malformed_key unknown": 2}


def test_an_empty_batch_asks_nobody() -> None:
    RedisSink("redis://127.0.0.1:1").write(Batch("p", 1, []))


def test_a_reply_lost_after_the_commit_stores_nothing_twice(
    own: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_redis, "_PATIENCE", 0.3)
    with Proxy(own.servers[0].port) as proxy:
        sink = RedisSink(f"redis://127.0.0.1:{proxy.port}?prefix=own&timeout=0.3")
        sink.write(batch(1))  # the server knows the script from here on

        def connect_then_mute(*arguments: Any) -> Link:
            link = connect(*arguments)
            proxy.turn("mute")
            return link

        with monkeypatch.context() as patch:
            patch.setattr(redis_wire, "connect", connect_then_mute)
            with pytest.raises(StoreUnavailable, match="in time"):
                sink.write(batch(4, sequence=2))
        wait_until(lambda: len(own.events()) == 5, 10, what="the server to have stored it all the same")
        proxy.turn("refuse")
        with pytest.raises(StoreUnavailable):
            sink.write(batch(4, sequence=2))
        proxy.turn("pass")
        sink.write(batch(4, sequence=2))
    assert len(own.events()) == 5
    assert counted(own, "day") == {"200 key_1": 5}


def test_a_big_batch_goes_on_from_where_it_was_broken_off(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process too, and one that cuts batches otherwise."""
    big = Batch("p", 1, batch(2_050).events, [Refusals(NOW, "unknown_key", "unknown", 7)])
    broken = RedisSink(house.url)
    drive, calls = broken._wire.drive, itertools.count(1)

    def breaks(steps: Any) -> Any:
        reply = drive(steps)
        if next(calls) == 2:
            raise StoreUnavailable("the answer to the second part is lost")
        return reply

    monkeypatch.setattr(broken._wire, "drive", breaks)
    with pytest.raises(StoreUnavailable):
        broken.write(big)
    assert len(house.events()) == 2_000
    monkeypatch.setattr(usage_redis, "PART", 30)
    RedisSink(house.url).write(big)
    RedisSink(house.url).write(big)
    assert [found.event_id for found in house.events()] == [given.event_id for given in big.events]
    assert counted(house, "hour") == {"200 key_1": 2_050}
    assert counted(house, "refusals") == {"unknown_key unknown": 7}


def test_a_part_that_a_failover_forgot_is_sent_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_redis, "PART", 10)
    sink = RedisSink(house.url)
    drive, calls = sink._wire.drive, itertools.count(1)

    def forgets(steps: Any) -> Any:
        reply = drive(steps)
        if next(calls) == 2:
            for name in house.names():
                house.say("DEL", name)
        return reply

    monkeypatch.setattr(sink._wire, "drive", forgets)
    sink.write(batch(30))
    assert len(house.events()) == 30


def test_the_stream_is_bounded_by_number_and_by_time(house: House) -> None:
    sink = RedisSink(house.url, max_events=500)
    for sequence in range(1, 6):
        sink.write(batch(1_000, sequence=sequence))
    assert 500 <= house.say("XLEN", house.name("events")) <= 700  # whole nodes of the stream go
    RedisSink(house.url, retention=Retention(events=-1)).write(
        batch(1_000, sequence=9)
    )  # as if a day had passed
    assert house.say("XLEN", house.name("events")) < 200


def test_counters_are_bounded_in_number_and_have_a_lifetime(house: House) -> None:
    events = [event(number, key=f"key_{number}") for number in range(20)]
    refusals = [Refusals(NOW, "unknown_key", f"192.0.{number}.0/24", 1) for number in range(20)]
    RedisSink(house.url, max_fields=5).write(Batch("p", 1, events, refusals))
    assert len(counted(house, "hour")) == 6
    assert counted(house, "hour")["other"] == 15
    assert counted(house, "refusals")["other"] == 15
    kept = {"minute": 2 * 86_400, "hour": 90 * 86_400, "day": 3 * 365 * 86_400, "refusals": 30 * 86_400}
    for name in house.names():
        structure = name.split("}:")[1].split(":")[0]
        left = house.say("TTL", name)
        assert 0 < left <= kept[structure] if structure in kept else left == -1


def test_a_clock_that_is_wrong_makes_nothing_that_lasts(house: House) -> None:
    for number, at in enumerate((0, 1 << 62, NOW - 10 * 365 * 86_400 * 1_000_000), 1):
        RedisSink(house.url).write(batch(1, sequence=number, at=at, key=f"key_{number}"))
    assert len(house.events()) == 3
    assert sum(counted(house, "day").values()) == 1  # the one of the future
    assert all(
        0 < house.say("TTL", name) <= 3 * 365 * 86_400
        for name in house.names()
        if name.split("}:")[1][:3] == "day"
    )
    used = RedisUsage(house.url)
    last = used.last_used("key_2")
    used.close()
    assert last is not None
    assert last.last.year == 9999


def test_marks_and_keys_are_forgotten_in_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ago = NOW - 4 * 365 * 86_400 * 1_000_000
    RedisSink(house.url).write(batch(1, at=long_ago, key="forgotten", producer="dead"))
    house.say("ZADD", house.name("producers:at"), 1, "dead")
    RedisSink(house.url).write(batch(1))
    assert set(house.hash("keys")) == {"key_1"}
    assert set(house.hash("producers")) == {"p"}


def test_last_used_is_answered_by_both_shells(house: House) -> None:
    events = [event(0, at=NOW - MINUTE), event(1), event(2, key="old", at=NOW - 60 * MINUTE)]
    RedisSink(house.url).write(Batch("p", 1, events))
    used, twin = RedisUsage(house.url), AsyncRedisUsage(house.url)

    async def ask(moment: datetime) -> Any:
        answers = [
            await twin.last_used("key_1"),
            await twin.last_used("never"),
            await twin.unused_since(moment),
        ]
        await twin.aclose()
        return answers

    moment = datetime.now(UTC) - timedelta(minutes=30)
    answers = [used.last_used("key_1"), used.last_used("never"), used.unused_since(moment)]
    assert answers == asyncio.run(ask(moment))
    last, never, unused = answers
    assert isinstance(last, tuple)
    assert (last.key_id, last.machine_id, last.calls) == ("key_1", "machine 1", 2)
    assert (int(last.first.timestamp() * 1e6), int(last.last.timestamp() * 1e6)) == (NOW - MINUTE, NOW)
    assert never is None
    assert isinstance(unused, list)
    assert [entry.key_id for entry in unused] == ["old"]
    assert used.unused_since(datetime.now(UTC) - timedelta(days=1)) == []
    with pytest.raises(InvalidInput):
        used.unused_since(datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point
    used.close()


def test_events_that_come_late_or_early_move_first_and_last_alone(house: House) -> None:
    sink, used = RedisSink(house.url), RedisUsage(house.url)
    for sequence, at in enumerate((NOW, NOW - MINUTE, NOW + 5, NOW - 3), 1):
        sink.write(batch(1, sequence=sequence, at=at))
    last = used.last_used("key_1")
    used.close()
    assert last is not None
    assert (int(last.first.timestamp() * 1e6), int(last.last.timestamp() * 1e6)) == (NOW - MINUTE, NOW + 5)
    assert last.calls == 4
    assert house.say("ZSCORE", house.name("keys:last"), "key_1") in (float(NOW + 5), str(NOW + 5).encode())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_no_connection_is_held_between_batches_nor_over_a_fork(own: House) -> None:
    sink = RedisSink(own.url)
    for sequence in (1, 2):
        sink.write(batch(1, sequence=sequence))
        listed = own.say("CLIENT", "LIST")
        assert len(listed if isinstance(listed, list) else listed.splitlines()) == 1  # the one that asks
    child = os.fork()
    if child == 0:
        try:
            sink.write(batch(1, producer="child"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    sink.write(batch(1, sequence=3))
    assert len(own.events()) == 4


CALLER = Identity(
    KeyInfo("key_1", "Production", "prod", "", None),
    MachineInfo("machine 1", "Facturation", "cfa-lyon", False),
    (),
    frozenset(),
)


def test_a_recorder_delivers_each_call_once_through_a_killed_server(own: House) -> None:
    recorder = Recorder(own.url, interval=3600.0)
    for round_ in range(3):
        if round_ == 1:
            own.servers[0].kill()
        for _ in range(50):
            call = begin_call(CALLER, "192.0.2.7", "GET")
            call.status = 200
            recorder.sent(call)
            recorder.done(call, Outcome.COMPLETED)
        assert recorder.flush() is (round_ != 1)
        if round_ == 1:
            own.servers[0].start()
    recorder.close()
    assert len(own.events()) == 150
    assert recorder.stats()[:4] == (150, 150, 0, 0)


class KilledAfterwards:
    """A sink whose process dies when the batch is stored, and before anybody is told."""

    def __init__(self, url: str) -> None:
        self._sink = RedisSink(url)

    def write(self, given: Batch) -> None:
        self._sink.write(given)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_killed_after_the_commit_leaves_its_heir_nothing_to_double(
    own: House, tmp_path: Path
) -> None:
    for round_ in range(2):
        child = os.fork()
        if child == 0:
            recorder = Recorder(KilledAfterwards(own.url), spool=tmp_path / "spool", interval=3600.0)
            recorder._keeper.tend()
            recorder._keeper.idle = False  # no thread: it would deliver what there is so far
            for _ in range(100):
                call = begin_call(CALLER, "192.0.2.7", "GET")
                call.status = 200
                recorder.sent(call)
                recorder.done(call, Outcome.COMPLETED)
            recorder.flush()
            recorder.flush()
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(own.events()) == 100 * (round_ + 1)
    with Recorder(own.url, spool=tmp_path / "spool", interval=3600.0) as heir:
        heir.start()
        heir.flush()
    assert list((tmp_path / "spool").glob("*")) == []
    assert len(own.events()) == 200
    assert counted(own, "day") == {"200 key_1": 200}


def test_a_full_server_takes_a_part_whole_or_not_at_all(own: House) -> None:
    sink = RedisSink(own.url)
    sink.write(batch(1))
    own.say("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="no memory left"):
        sink.write(batch(2, sequence=2))
    own.say("CONFIG", "SET", "maxmemory", "0")
    sink.write(batch(2, sequence=2))
    assert len(own.events()) == 3


def test_pitfall_14_a_user_for_usage_reaches_nothing_of_the_keys(own: House) -> None:
    """By the recipe of docs/usage.md, with the server to hold us to it."""
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith("ACL SETUSER")]
    assert own.say(*line.replace("papaours:usage", "own:usage").split()) in (b"OK", "OK", True)
    port = own.servers[0].port
    url = f"redis://papaours-usage:USAGE-PASSWORD@127.0.0.1:{port}?prefix=own"
    sink = RedisSink(url)
    sink.write(batch(2))
    used = RedisUsage(url)
    assert used.last_used("key_1") is not None
    assert used.unused_since(datetime.now(UTC) - timedelta(days=1)) == []
    used.close()
    with pytest.raises(StoreUnavailable, match="lacks a permission"):
        RedisSink(url.replace("=own", "=papaours")).write(batch(1))
    own.say("HSET", "{own:07}:keys", "key_1", "active")
    with pytest.raises(StoreUnavailable, match="lacks a permission"):
        sink._wire.drive(sink._layout.router.run(0, ("HSET", "{own:07}:keys", "key_1", "active")))
    sink._wire.discard()


def test_over_tls_a_stranger_is_not_trusted(tmp_path: Path) -> None:
    if NEWEST is None or not speaks_tls(NEWEST):
        pytest.skip("no Redis with TLS here: apt-get install redis-server")
    files, port = make_certificates(tmp_path), free_port()
    options = (
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(files.authority)),
        *("--tls-cert-file", str(files.certificate), "--tls-key-file", str(files.key)),
    )
    with redis_server(NEWEST, tmp_path / "tls", *options) as server:
        url = f"rediss://127.0.0.1:{port}?prefix=tls&timeout=5&ca_certs="
        open_sink(f"{url}{files.authority}").write(batch(1))
        with pytest.raises(StoreUnavailable, match="cannot be trusted"):
            open_sink(f"{url}{files.stranger}").write(batch(1, sequence=2))
        assert len(House("rediss", [server], "tls").events()) == 1


def test_a_password_is_never_seen(caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://user:hunter2@127.0.0.1:{free_port()}?prefix=own"
    sink = RedisSink(url)
    with pytest.raises(StoreUnavailable) as caught:
        sink.write(batch(1))
    recorder = Recorder(sink, interval=3600.0)
    recorder.refused(Reason.UNKNOWN_KEY, "192.0.2.7")
    recorder.close()
    assert "usage sink failed" in caplog.text
    assert "hunter2" not in f"{caught.value!r} {vars(sink)!r} {caplog.text}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://host/?prefix={}",
        "redis://hunter2@host:port",
        "mysql://hunter2@host",
        "redis",
        "://",
        "",
    ],
)
def test_a_wrong_url_is_told_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_sink(url)
    assert "hunter2" not in str(caught.value)


def test_bounds_are_above_nothing() -> None:
    with pytest.raises(ConfigurationError):
        RedisSink("redis://host", max_events=0)
    with pytest.raises(ConfigurationError):
        RedisSink("redis://host", max_fields=0)


def test_a_tee_gives_each_sink_each_batch_and_the_later_ones_only_what_the_first_took(house: House) -> None:
    seen: list[Batch] = []
    failing = iter([True, False])

    def sometimes(given: Batch) -> None:
        if next(failing):
            raise OSError
        seen.append(given)

    tee = Tee(RedisSink(house.url), CallableSink(sometimes))
    with pytest.raises(OSError):
        tee.write(batch(2))
    assert seen == []
    tee.write(batch(2))
    assert seen == [batch(2)]
    assert len(house.events()) == 2


@pytest.mark.parametrize("door", ["asgi", "wsgi"])
def test_pitfall_28_no_key_is_in_a_dump_of_redis(own: House, ring: PepperRing, door: str) -> None:
    seed = "pk_prod_abc123def456ghi789"
    recorder = Recorder(own.url, interval=3600.0)
    call_with_canaries(door, ring, recorder, seed)
    assert len(own.events()) == 1
    kept = b"".join(path.read_bytes() for path in own.servers[0].folder.rglob("*") if path.is_file())
    assert b"(hidden: it looks like a key)" in kept
    assert b"abc123def456ghi789" not in kept
