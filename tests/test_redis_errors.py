"""What Redis answers with an error is told alike on every version, in a script and outside one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from papaours_auth import Keys, PepperRing, StoreUnavailable, open_store
from papaours_auth.stores.redis_place import place_of
from papaours_auth.stores.redis_router import Command, Router
from papaours_auth.stores.redis_wire import Wire
from support.redis_servers import BINARIES, WHY_NOT, RedisServer, redis_sentinel, redis_server
from support.servers import wait_until

WRITE: Command = ("HSET", "k", "a", "b")
IN_SCRIPT: Command = ("EVAL", "return redis.call('HSET', KEYS[1], 'a', 'b')", 1, "k")


@pytest.fixture(scope="module", params=list(BINARIES))
def binary(request: pytest.FixtureRequest) -> str:
    """A server of each version that is here."""
    found = BINARIES[request.param]
    if found is None:
        pytest.skip(WHY_NOT[request.param])
    return found


@pytest.fixture(scope="module")
def server(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(binary, tmp_path_factory.mktemp("redis"), "--dbfilename", "taken") as server:
        yield server


def answered(server: RedisServer, command: Command, credentials: str = "") -> str:
    """Return what a user is told who has a command carried out: nothing where it was."""
    place = place_of(f"redis://{credentials}{server.address}?timeout=5")
    wire = Wire(place, router := Router(place, ["0"]))
    try:
        wire.drive(router.run(0, command, write=True))
    except StoreUnavailable as error:
        return str(error)
    finally:
        wire.close()
    return ""


@contextlib.contextmanager
def configured(server: RedisServer, name: str, value: str, usual: str) -> Iterator[None]:
    server.say("CONFIG", "SET", name, value)
    try:
        yield
    finally:
        server.say("CONFIG", "SET", name, usual)


@contextlib.contextmanager
def following_nobody(server: RedisServer) -> Iterator[None]:
    server.say("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        server.say("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def cannot_save(server: RedisServer) -> Iterator[None]:
    """Let a snapshot fail: where its file should be is a folder that is not empty."""
    within = server.folder / "taken" / "within"
    within.mkdir(parents=True)
    with configured(server, "save", "3600 1", ""):
        server.say("BGSAVE")
        wait_until(lambda: last_save(server) == "err", 10, what="a save to fail")
        yield
    within.rmdir()
    within.parent.rmdir()
    server.say("BGSAVE")
    wait_until(lambda: last_save(server) == "ok", 10, what="a save to succeed")


def last_save(server: RedisServer) -> str:
    told: dict[str, str] = server.say("INFO", "persistence")
    return told["rdb_last_bgsave_status"]


FAULTS: Mapping[str, tuple[Callable[[RedisServer], contextlib.AbstractContextManager[None]], str]] = {
    "OOM": (lambda server: configured(server, "maxmemory", "1", "0"), "no memory left"),
    "NOREPLICAS": (lambda server: configured(server, "min-replicas-to-write", "1", "0"), "too few replicas"),
    "READONLY": (following_nobody, "is a replica now"),
    "MISCONF": (cannot_save, "cannot save its data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_takes_no_changes_says_why_in_a_script_too(server: RedisServer, fault: str) -> None:
    broken, said = FAULTS[fault]
    with broken(server):
        told = [answered(server, command) for command in (WRITE, IN_SCRIPT)]
    assert said in told[0]
    assert told[1] == told[0]
    assert answered(server, IN_SCRIPT) == ""


@pytest.mark.parametrize(
    ("what", "within"),
    [
        ("command", "return redis.call('SET', KEYS[1], 'b')"),
        ("key", "return redis.call('HSET', 'foreign', 'a', 'b')"),
        ("channel", "return redis.call('PUBLISH', 'foreign', 'b')"),
    ],
)
def test_a_permission_that_a_script_lacks_is_told_as_one(server: RedisServer, what: str, within: str) -> None:
    """No version says NOPERM there."""
    server.say(
        "ACL", "SETUSER", "u", "on", ">p", "~k", "resetchannels", "+eval", "+hset", "+publish", "+ping"
    )
    assert answered(server, IN_SCRIPT, "u:p@") == ""
    assert "lacks a permission" in answered(server, ("SET", "k", "b"), "u:p@")
    assert "lacks a permission" in answered(server, ("EVAL", within, 1, "k"), "u:p@")


def test_what_is_wrong_with_a_script_itself_is_quoted_by_no_word_of_it(server: RedisServer) -> None:
    server.say("SET", "text", "secret")
    for source, kind in (
        ("return redis.call('HGET', KEYS[1], 'a')", "WRONGTYPE"),
        ("error('-OOM secret')", "ERR"),
        ("return redis.error_reply('secret')", "ERR"),
    ):
        assert answered(server, ("EVAL", source, 1, "text")) == f"Redis refuses with {kind}"


def test_a_change_refused_by_a_primary_that_was_replaced_is_made_at_the_next_try(
    binary: str, tmp_path: Path, ring: PepperRing
) -> None:
    """Changes are scripts, where Redis 6.2 says READONLY in its own way: the same node was asked for ever."""
    with redis_sentinel(binary, tmp_path) as (primary, replica, sentinel):
        url = f"redis+sentinel://{sentinel.address}/keys?timeout=5&wait_replicas=1&wait_timeout=3000"
        with contextlib.closing(open_store(url, create=True)) as store:
            keys = Keys(store, peppers=ring)
            primary.say("REPLICAOF", "127.0.0.1", str(replica.port))
            replica.say("REPLICAOF", "NO", "ONE")
            sentinel.say("SENTINEL", "REMOVE", "keys")
            sentinel.say("SENTINEL", "MONITOR", "keys", "127.0.0.1", str(replica.port), "1")
            with pytest.raises(StoreUnavailable, match="is a replica now"):
                keys.create_machine("Service de facturation", organisation="cfa-lyon")
            keys.create_machine("Service de facturation", organisation="cfa-lyon")
            assert [machine.name for machine in keys.machines()] == ["Service de facturation"]
