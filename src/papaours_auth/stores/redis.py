"""The store in Redis: one server, Sentinel or Cluster, all in the same layout and by the same scripts.

Every partition is a hash tag, ``{papaours:07}``, so that what changes together lies in one slot: keys in
partitions 0-15 by the CRC-32 of their text (`verify.partition`), machines in 16-31 by that of their id, the
store's mark and its peppers in 32. Each has a log whose last entry is its epoch. `docs/design/redis.md` has the
rest.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import select
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from socket import socket
from typing import Any, Final, NamedTuple, TypeAlias, cast

from .._fork import hold_across_fork
from ..digest import PepperStatus
from ..exceptions import ConfigurationError, Conflict, NotFound, StoreUnavailable, UnreadableRecord
from ..model import Key, Machine, Record
from ..verify import PARTITIONS, Claim
from . import (
    Author,
    Change,
    Description,
    Epoch,
    Feed,
    Found,
    KeyColumns,
    MachineColumns,
    News,
    PepperRecord,
    Reading,
)
from .records import (
    Cell,
    difference,
    journal_text,
    key_row,
    machine_row,
    microseconds,
    moment,
    read_key,
    read_machine,
)
from .redis_wire import (
    AsyncWire,
    Command,
    Link,
    Node,
    Place,
    Refusal,
    Router,
    Steps,
    Unreachable,
    Wire,
    Word,
    connect,
    hear,
    place_of,
    refused,
    script,
)

logger = logging.getLogger("papaours_auth")

SCHEMA_VERSION: Final = 1
LOG_READ: Final = 10_000
"""Changes a watcher reads at once: further behind, it drops its whole cache."""
WRITE_TIMEOUT: Final = 5.0
"""Seconds an administrator waits for an answer, where ``timeout=`` is not longer."""

_KEYS: Final = range(PARTITIONS)
_MACHINES: Final = range(PARTITIONS, 2 * PARTITIONS)
_META: Final = 2 * PARTITIONS
_ALL: Final = range(_META + 1)
_SCAN: Final = 500  # records a reply: some 150 kB
_TRIES: Final = 50  # each failure is somebody else's success
_RECONNECT: Final = 0.05  # seconds a watcher pauses after a lost subscription

_LOOKUP, _MACHINE, _NEWS, _WRITE, _CREATE = map(script, ("lookup", "machine", "news", "write", "create"))

_Check: TypeAlias = tuple[str, Word, Word | None]  # structure, field, and its value or None for not there
_Write: TypeAlias = tuple[Word, ...]  # command, structure, further words


class _Entry(NamedTuple):
    """What a write appends to its partition's log."""

    author: Author
    kind: str
    subject: str
    before: Mapping[str, Cell]
    after: Mapping[str, Cell]

    @property
    def text(self) -> str:
        cells = (microseconds(self.author.at), self.author.actor, self.kind, self.subject)
        return _pack((*cells, journal_text(self.before), journal_text(self.after)))


def open_store(url: str, create: bool) -> RedisStore:
    """Open ``redis://``, ``rediss://``, ``redis+cluster://`` or ``redis+sentinel://``.

    With ``create`` the layout is made. Without, nothing is asked of the server yet: an app must be able to
    start while it is down. What is wrong with it (no store there, a policy that evicts keys) is then a
    `ConfigurationError` of the first `describe`.
    """
    store = RedisStore(place_of(url))
    if create:
        try:
            store.create()
        except BaseException:
            store.close()
            raise
    return store


def open_async_store(url: str, create: bool) -> AsyncRedisStore:
    """Open the same for event loops. With ``create`` it waits for the server, as `open_store` does."""
    return AsyncRedisStore(open_store(url, create))


# the layout and the codec


class _Layout:
    """What each structure of each partition is called."""

    def __init__(self, prefix: str) -> None:
        self.start = f"{{{prefix}:"  # of every name; a partition's number follows
        self.tags = [f"{prefix}:{partition:02}" for partition in _ALL]
        self.channel = f"{prefix}:changes"
        self._in = [f"{{{tag}}}:" for tag in self.tags]

    def name(self, partition: int, structure: str) -> str:
        return self._in[partition] + structure


def _machine_partition(machine_id: str) -> int:
    return PARTITIONS + zlib.crc32(machine_id.encode()) % PARTITIONS


def _pack(cells: Sequence[object]) -> str:
    return json.dumps(cells, ensure_ascii=False, separators=(",", ":"))


def _unpack(packed: bytes) -> list[Any]:  # Any: cells, checked where they are read
    try:
        cells: list[Any] = json.loads(packed.decode())
    except ValueError as error:
        raise UnreadableRecord("a record of the Redis store cannot be read") from error
    return cells


def _key(packed: bytes) -> Key:
    try:
        return read_key(_unpack(packed))
    except (IndexError, ValueError, TypeError) as error:
        raise UnreadableRecord("a key's record in the Redis store cannot be read") from error


@lru_cache(maxsize=1024)  # many keys of few machines: by the packed text, so never an old one
def _machine(packed: bytes) -> Machine:
    try:
        return read_machine(_unpack(packed))
    except (ValueError, TypeError) as error:
        raise UnreadableRecord("a machine's record in the Redis store cannot be read") from error


@lru_cache(maxsize=1024)
def _epoch(tip: bytes) -> Epoch:
    seq, _, nonce = tip.partition(b" ")
    return Epoch(int(seq), bytes.fromhex(nonce.decode()))


def _tip(epoch: Epoch) -> str:
    return f"{epoch.seq} {epoch.nonce.hex()}"


class _Logged(NamedTuple):
    """An entry of a log, read back. ``committed`` is the server's time, in microseconds."""

    epoch: Epoch
    committed: int
    cells: list[Any]  # Any: at, actor, kind, subject, before, after


def _logged(entry: bytes) -> _Logged:
    seq, nonce, committed, cells = entry.split(b" ", 3)
    return _Logged(_epoch(seq + b" " + nonce), int(committed), _unpack(cells))


def _lost() -> StoreUnavailable:
    return StoreUnavailable(
        "the Redis store has lost its installation mark or a part of itself: restore it from a backup"
    )


# what is asked, for both shells


class _Questions:
    """The verifying half as steps: what `Wire` and `AsyncWire` carry out."""

    def __init__(self, place: Place) -> None:
        self.layout = _Layout(place.prefix)
        self.router = Router(place, self.layout.tags)
        self._lookups: dict[tuple[int, int], tuple[Command, bytes]] = {}
        self.warnings: list[str] = []
        self.installation: str | None = None

    def lookup(self, claim: Claim) -> Steps[Found]:
        """Find a claim's record: in one round trip, or in two on Cluster."""
        digests = [candidate.digest for candidate in claim.candidates]
        command, start = self._lookup_command(claim.partition, len(digests))
        packed = start + b"".join([b"$%d\r\n%b\r\n" % (len(digest), digest) for digest in digests])
        (reply,) = yield from self.router.run(claim.partition, (*command, *digests), packed=packed)
        if reply is None:
            raise _lost()
        tip, *found = reply.split(b"\n")
        epochs = {claim.partition: _epoch(tip)}
        if not found:
            return Found(None, epochs)
        place, key, at, machine_id, *rest = found
        partition = int(at)
        tip, machine = rest or (yield from self._machine(partition, machine_id))
        if not tip or not key:
            raise _lost()
        epochs[partition] = _epoch(tip)
        if not machine:  # deleted; its keys are on their way
            return Found(None, epochs)
        return Found(Record(_key(key), _machine(machine), digests[int(place)]), epochs)

    def _lookup_command(self, partition: int, digests: int) -> tuple[Command, bytes]:
        """Give a lookup but for its digests, and the same as it is sent: redis-py packs a word in half a µs."""
        made = self._lookups.get((partition, digests))
        if made is not None:
            return made
        names = [self.layout.name(partition, structure) for structure in ("digests", "keys", "changes")]
        command: Command = ("EVALSHA", _LOOKUP, 3, *names, self.layout.start if self.router.single else "")
        words = [str(word).encode() for word in command]
        start = [
            b"*%d\r\n" % (len(words) + digests),
            *[b"$%d\r\n%b\r\n" % (len(word), word) for word in words],
        ]
        self._lookups[partition, digests] = command, b"".join(start)
        return self._lookups[partition, digests]

    def _machine(self, partition: int, machine_id: bytes) -> Steps[Sequence[bytes | None]]:
        names = [self.layout.name(partition, structure) for structure in ("machines", "changes")]
        (reply,) = yield from self.router.run(partition, ("EVALSHA", _MACHINE, 2, *names, machine_id))
        return cast("Sequence[bytes | None]", reply)

    def describe(self) -> Steps[Description]:
        """Tell whose store this is, and check how the server is set up."""
        yield from self.check_policy()
        names = [self.layout.name(_META, structure) for structure in ("mark", "peppers")]
        marks, peppers = yield from self.router.run(_META, *[("HGETALL", name) for name in names])
        mark = _pairs(marks)
        if b"ready" not in mark:
            raise self._missing()
        if mark[b"schema"] != b"%d" % SCHEMA_VERSION:
            raise ConfigurationError("the Redis store has another schema: upgrade papaours-auth everywhere")
        self.installation = mark[b"installation"].decode()
        records = sorted(_pepper(id_, packed) for id_, packed in _pairs(peppers).items())
        return Description(self.installation, tuple(records))

    def _missing(self) -> Exception:
        """An outage where a store was seen before, otherwise a wrong URL."""
        if self.installation is not None:
            return _lost()
        return ConfigurationError(
            "there is no store in this Redis under this prefix: check PAPAOURS_STORE, or make one with "
            "'papaours-auth init'"
        )

    def check_policy(self) -> Steps[None]:
        """Refuse servers that may throw away keys: an evicted record would be an unknown key."""
        nodes = yield from self.router.nodes()
        for node in dict.fromkeys(nodes.values()):
            partition = next(partition for partition, at in nodes.items() if at == node)
            with suppress(Unreachable):  # on Cluster the others still serve; else the next question says so
                yield from self._check_policy(partition)

    def _check_policy(self, partition: int) -> Steps[None]:
        try:
            ((_, policy),) = yield from self.router.run(partition, ("CONFIG", "GET", "maxmemory-policy"))
        except (Refusal, ValueError):
            self._warn("maxmemory-policy cannot be read here: see that it is noeviction, or volatile-…")
            return
        if policy != b"noeviction" and not policy.startswith(b"volatile-"):
            raise ConfigurationError(
                "this Redis may evict any key when its memory is full, and customers would be told that "
                "theirs is unknown: set maxmemory-policy to noeviction"
            )

    def _warn(self, what: str) -> None:
        if what not in self.warnings:
            self.warnings.append(what)
            logger.warning("the Redis store: %s", what)

    def read(self, known: Mapping[int, Epoch]) -> Steps[Reading]:
        """Read every log's tip and what came after those known, from the primaries."""
        if self.router.sentinel:
            yield from self.router.refresh()
        nodes = yield from self.router.nodes()
        news: dict[int, News] = {}
        problem: StoreUnavailable = _lost()
        for node in dict.fromkeys(nodes.values()):
            theirs = [partition for partition, at in nodes.items() if at == node]
            try:
                news |= yield from self._read_node(node, theirs, known)
            except StoreUnavailable as error:
                problem = error
                self.router.forget()
        if not news or self.installation is None:
            raise problem
        return Reading(self.installation, news)

    def _read_node(
        self, node: Node, partitions: Sequence[int], known: Mapping[int, Epoch]
    ) -> Steps[dict[int, News]]:
        """Read the logs of one node: all in one script, or on Cluster in a script each, sent together."""
        groups = [list(partitions)] if self.router.single else [[partition] for partition in partitions]
        commands = [self._news_command(group, known) for group in groups]
        asked = [group[0] for group in groups]
        if _META in partitions:
            commands.append(("HGET", self.layout.name(_META, "mark"), "installation"))
            asked.append(_META)
        replies = yield from self.router.ask(node, asked, commands)
        if _META in partitions:
            mark = replies.pop()
            if mark is None:
                raise _lost()
            self.installation = mark.decode()
        found = zip(partitions, (item for reply in replies for item in reply), strict=True)
        return {partition: _news(*item) for partition, item in found if item is not None}

    def _news_command(self, partitions: Sequence[int], known: Mapping[int, Epoch]) -> Command:
        tips = [_tip(known[partition]) if partition in known else "" for partition in partitions]
        names = [self.layout.name(partition, "changes") for partition in partitions]
        return ("EVALSHA", _NEWS, len(names), *names, LOG_READ, *tips)


def _news(tip: bytes, entries: list[bytes] | None = None) -> News:
    if entries is None:
        return News(_epoch(tip), None)
    changes = [_logged(entry).cells for entry in entries]
    return News(_epoch(tip), [(cells[2], cells[3]) for cells in changes])


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _pepper(id_: bytes, packed: bytes) -> PepperRecord:
    proof, status = _unpack(packed)
    return PepperRecord(id_.decode(), bytes.fromhex(proof), status)


def _packed_pepper(pepper: PepperRecord) -> str:
    return _pack((pepper.proof.hex(), pepper.status))


# the stores


class RedisStore:
    """Lookup, feed and administration. Safe to share between threads and across a fork.

    ``warnings`` holds what could not be checked, once `describe` was asked.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._ask = _Questions(place)
        self._layout = self._ask.layout
        self._router = self._ask.router
        self._wire = Wire(place, self._router)
        # Administration has time, and a full pool of lookups does not keep a key from being disabled.
        patience = max(
            place.timeout, WRITE_TIMEOUT + (place.wait_timeout / 1000 if place.wait_replicas else 0)
        )
        self._admin = Wire(place, self._router, timeout=patience)

    @property
    def questions(self) -> _Questions:
        """What the asynchronous twin asks too."""
        return self._ask

    @property
    def warnings(self) -> Sequence[str]:
        """What an administrator should look at."""
        return tuple(self._ask.warnings)

    # verification

    def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        return self._wire.drive(self._ask.lookup(claim))

    def describe(self) -> Description:
        """See `Lookup.describe`. `ConfigurationError` where there never was a store, or its policy evicts."""
        return self._wire.drive(self._ask.describe())

    def feed(self) -> Feed:
        """See `Lookup.feed`."""
        return _RedisFeed(self.place, self._ask)

    def close(self) -> None:
        """See `Lookup.close`."""
        self._wire.close()
        self._admin.close()

    # A WSGI middleware is never told that its app is gone: what it opened is closed with it.
    __del__ = close

    # creation

    def create(self) -> None:
        """Make the layout, or finish what was begun. Safe with others doing the same.

        The mark is made first and declared ready last: a part that is missing from a store that is ready was
        lost, and is not made anew.
        """
        self._admin.drive(self._ask.check_policy())
        begun = any(
            self._has_log(partition) for partition in _ALL
        )  # before the mark, which comes before them
        mark = self._mark()
        if begun and b"installation" not in mark:
            raise ConfigurationError(
                "parts of a store are in this Redis, but not its installation mark: restore it from a backup, "
                "or choose another prefix"
            )
        if b"ready" in mark:
            if not all(self._has_log(partition) for partition in _ALL):  # after it, which comes after them
                raise _lost()
            return
        installation = self._create_log(_META, secrets.token_hex(16))
        for partition in (*_KEYS, *_MACHINES):
            self._create_log(partition, installation)
        self._run(_META, ("HSET", self._name(_META, "mark"), "ready", 1), write=True)

    def _has_log(self, partition: int) -> bool:
        return bool(self._run(partition, ("EXISTS", self._name(partition, "changes")))[0])

    def _mark(self) -> dict[bytes, bytes]:
        return _pairs(self._run(_META, ("HGETALL", self._name(_META, "mark")))[0])

    def _create_log(self, partition: int, installation: str) -> str:
        entry = _Entry(Author("papaours-auth", datetime.now(UTC)), "store.created", installation, {}, {})
        names = [self._name(partition, "changes")]
        if partition == _META:
            names.append(self._name(_META, "mark"))
        given = (secrets.token_hex(16), entry.text, installation, SCHEMA_VERSION)
        self._run(partition, ("EVALSHA", _CREATE, len(names), *names, *given), write=True)
        return self._mark()[b"installation"].decode() if partition == _META else installation

    # administration

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """See `Store.add_pepper`."""
        entry = _Entry(author, "pepper.added", pepper.id, {}, {"status": pepper.status})
        write: _Write = ("HSET", "peppers", pepper.id, _packed_pepper(pepper))
        if not self._change(_META, [("peppers", pepper.id, None)], [write], [entry]):
            raise Conflict(f"the store already has a pepper {pepper.id!r}")

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """See `Store.set_pepper_status`."""
        for _ in range(_TRIES):
            packed = _pairs(self._run(_META, ("HGETALL", self._name(_META, "peppers")))[0])
            peppers = {record.id: record for record in (_pepper(*item) for item in packed.items())}
            if pepper_id not in peppers:
                raise NotFound(f"the store has no pepper {pepper_id!r}")
            wanted: dict[str, PepperStatus] = {pepper_id: status}
            if status == "primary":
                for id_ in [id_ for id_, was in peppers.items() if was.status == "primary"]:
                    wanted.setdefault(id_, "accept")
            changes = [(peppers[id_], after) for id_, after in wanted.items()]
            changes = [(was, after) for was, after in changes if was.status != after]
            checks: list[_Check] = [("peppers", id_, value) for id_, value in packed.items()]
            writes: list[_Write] = [
                ("HSET", "peppers", was.id, _packed_pepper(was._replace(status=after)))
                for was, after in changes
            ]
            entries = [
                _Entry(author, f"pepper.{after}", was.id, {"status": was.status}, {"status": after})
                for was, after in changes
            ]
            if not changes or self._change(_META, checks, writes, entries):
                return
        raise _contended()

    def count_digests(self, pepper_id: str) -> int:
        """See `Store.count_digests`."""
        counts = (self._run(p, ("HGET", self._name(p, "digested"), pepper_id))[0] for p in _KEYS)
        return sum(int(count or 0) for count in counts)

    def add_machine(self, machine: Machine, author: Author) -> None:
        """See `Store.add_machine`."""
        writes: list[_Write] = [
            ("HSET", "machines", machine.id, _pack(machine_row(machine))),
            ("SADD", f"named:{machine.name}", machine.id),
        ]
        entry = _Entry(author, "machine.created", machine.id, {}, {"name": machine.name})
        partition = _machine_partition(machine.id)
        if not self._change(partition, [("machines", machine.id, None)], writes, [entry]):
            raise Conflict(f"the store already has a machine {machine.id}")

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """See `Store.update_machine`."""
        partition = _machine_partition(machine_id)
        for _ in range(_TRIES):
            packed, machine = self._found_machine(machine_id)
            before, after = difference({name: getattr(machine, name) for name in columns}, columns)
            changed = replace(machine, **columns)
            entry = _Entry(author, kind, machine_id, before, after)
            writes = _renewal("machines", machine, changed, _pack(machine_row(changed)))
            if not after or self._change(partition, [("machines", machine_id, packed)], writes, [entry]):
                return changed
        raise _contended()

    def delete_machine(self, machine_id: str, author: Author) -> None:
        """See `Store.delete_machine`.

        The machine goes first, in one step: none of its keys is accepted from then on. Then they go, one by
        one; where that is broken off, calling it again with the same id goes on.
        """
        there = self._delete_machine(machine_id, author)
        keys = [key for key in self.keys(machine_id=machine_id) if self._remove_key(key, author)]
        if not there and not keys:
            raise NotFound(f"the store has no machine {machine_id}")

    def _delete_machine(self, machine_id: str, author: Author) -> bool:
        partition = _machine_partition(machine_id)
        for _ in range(_TRIES):
            try:
                packed, machine = self._found_machine(machine_id)
            except NotFound:
                return False
            writes: list[_Write] = [
                ("HDEL", "machines", machine_id),
                ("SREM", f"named:{machine.name}", machine_id),
            ]
            entry = _Entry(author, "machine.deleted", machine_id, {"name": machine.name}, {})
            if self._change(partition, [("machines", machine_id, packed)], writes, [entry]):
                return True
        raise _contended()

    def _remove_key(self, key: Key, author: Author) -> bool:
        """Remove a key of a machine that is gone. Logged, since it is in a partition with an epoch of its own."""
        entry = _Entry(author, "key.deleted", key.id, {"machine_id": key.machine_id, "name": key.name}, {})
        for _ in range(_TRIES):
            try:
                partition, packed = self._located_key(key.id)
            except NotFound:
                return False
            name = self._name(partition, "digest-of")
            digest = self._run(partition, ("HGET", name, key.id))[0]
            owner = self._run(partition, ("HGET", self._name(partition, "digests"), digest))[0].split(b"\n")
            writes: list[_Write] = [
                ("HDEL", "digests", digest),
                ("HDEL", "digest-of", key.id),
                ("HDEL", "keys", key.id),
                ("SREM", f"named:{_key(packed).name}", key.id),
                ("SREM", f"of:{key.machine_id}", key.id),
                ("HINCRBY", "digested", owner[3], -1),
            ]
            if self._change(partition, [("keys", key.id, packed)], writes, [entry]):
                return True
        raise _contended()

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """See `Store.machines`."""
        if id_or_name is None:
            packed = (item for partition in _MACHINES for item in self._all(partition, "machines"))
        else:
            packed = (item for p in _MACHINES for item in self._named(p, "machines", id_or_name))
        return sorted(map(_machine, packed), key=lambda machine: (machine.created_at, machine.id))

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """See `Store.add_key`. Ids are random: two callers cannot add one id in two partitions at once."""
        self._found_machine(key.machine_id)
        if any(partition != claim.partition for partition, _ in self._locate(key.id)):
            raise Conflict("the store already has this key")
        first = claim.candidates[0]
        owner = [
            f"{_machine_partition(key.machine_id):02}",
            key.machine_id,
            key.id,
            first.pepper_id,
            first.algorithm,
        ]
        checks: list[_Check] = [("keys", key.id, None)]
        checks += [("digests", candidate.digest, None) for candidate in claim.candidates]
        writes: list[_Write] = [
            ("HSET", "digests", first.digest, "\n".join(owner)),
            ("HSET", "digest-of", key.id, first.digest),
            ("HSET", "keys", key.id, _pack(key_row(key))),
            ("SADD", f"named:{key.name}", key.id),
            ("SADD", f"of:{key.machine_id}", key.id),
            ("HINCRBY", "digested", first.pepper_id, 1),
        ]
        entry = _Entry(author, kind, key.id, {}, {"machine_id": key.machine_id, "name": key.name})
        if not self._change(claim.partition, checks, writes, [entry]):
            raise Conflict("the store already has this key")

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """See `Store.update_key`."""
        for _ in range(_TRIES):
            partition, packed = self._located_key(key_id)
            key = _key(packed)
            before, after = difference({name: getattr(key, name) for name in columns}, columns)
            changed = replace(key, **columns)
            entry = _Entry(author, kind, key_id, before, after)
            writes = _renewal("keys", key, changed, _pack(key_row(changed)))
            if not after or self._change(partition, [("keys", key_id, packed)], writes, [entry]):
                return changed
        raise _contended()

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """See `Store.keys`."""
        packed: Iterator[bytes]
        if id_or_name is not None:
            packed = (item for p in _KEYS for item in self._named(p, "keys", id_or_name))
        elif machine_id is not None:
            packed = (item for p in _KEYS for item in self._members(p, "keys", f"of:{machine_id}"))
        else:
            packed = (item for partition in _KEYS for item in self._all(partition, "keys"))
        keys = (key for key in map(_key, packed) if machine_id in (None, key.machine_id))
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """See `Store.journal`. Newest first by the time each server committed at."""
        found = [
            (logged.committed, logged.epoch.seq, logged)
            for partition in self._partitions_of(subject)
            for logged in self._log(partition, subject, limit)
        ]
        found.sort(key=lambda item: item[:2], reverse=True)
        return [
            Change(logged.epoch, moment(logged.cells[0]), *logged.cells[1:]) for _, _, logged in found[:limit]
        ]

    def _partitions_of(self, subject: str | None) -> Iterable[int]:
        if subject is None:
            return _ALL
        holding = [partition for partition, _ in self._locate(subject)]
        return (*(holding or _KEYS), _machine_partition(subject), _META)

    def _log(self, partition: int, subject: str | None, limit: int) -> Iterator[_Logged]:
        """Read a log from its end, until ``limit`` entries are found."""
        name = self._name(partition, "changes")
        end = int(self._run(partition, ("LLEN", name))[0])
        while end > 0 and limit > 0:
            start = max(0, end - _SCAN)
            entries = self._run(partition, ("LRANGE", name, start, end - 1))[0]
            for logged in map(_logged, reversed(entries)):
                # Each partition's log begins with the store's creation: once is enough.
                if logged.epoch.seq == 1 and partition != _META:
                    continue
                if limit > 0 and subject in (None, logged.cells[3]):
                    limit -= 1
                    yield logged
            end = start

    # what these share

    def _name(self, partition: int, structure: str) -> str:
        return self._layout.name(partition, structure)

    def _run(self, partition: int, *commands: Command, write: bool = False) -> list[Any]:
        return self._admin.drive(self._router.run(partition, *commands, write=write))

    def _change(
        self, partition: int, checks: list[_Check], writes: list[_Write], entries: list[_Entry]
    ) -> bool:
        """Make one change of a partition in one step. False where a check failed, and nothing was done."""
        names = dict.fromkeys(
            ["changes", *(check[0] for check in checks), *(str(write[1]) for write in writes)]
        )
        place = {name: number for number, name in enumerate(names, 1)}
        words: list[Word] = [self._layout.channel, len(checks)]
        for structure, field, value in checks:
            words += [place[structure], field, int(value is not None), "" if value is None else value]
        words.append(len(writes))
        for command, name, *rest in writes:
            words += [2 + len(rest), command, place[str(name)], *rest]
        words.append(len(entries))
        for entry in entries:
            words += [secrets.token_hex(16), entry.text]
        keys = [self._name(partition, name) for name in names]
        return self._written(partition, ("EVALSHA", _WRITE, len(keys), *keys, *words))

    def _written(self, partition: int, command: Command) -> bool:
        wanted = self.place.wait_replicas
        waiting: list[Command] = [("WAIT", wanted, self.place.wait_timeout)] if wanted else []
        try:
            done, *confirmed = self._run(partition, command, *waiting, write=True)
        except Unreachable as error:
            if not error.sent:
                raise
            raise StoreUnavailable(
                f"{error}: the change may have been made all the same, so look before you try again"
            ) from error
        if done < 0:
            raise _lost()
        if done == 0 and confirmed and confirmed[0] < wanted:
            logger.warning(
                "the change WAS made, but only %d of %d replicas confirmed it in %d ms: a failover now may "
                "forget it, so look again when the replicas are back",
                confirmed[0], wanted, self.place.wait_timeout,
            )  # fmt: skip
        return cast("int", done) == 0

    def _found_machine(self, machine_id: str) -> tuple[bytes, Machine]:
        partition = _machine_partition(machine_id)
        (packed,) = self._run(partition, ("HGET", self._name(partition, "machines"), machine_id))
        if packed is None:
            raise NotFound(f"the store has no machine {machine_id}")
        return packed, _machine(packed)

    def _locate(self, key_id: str) -> list[tuple[int, bytes]]:
        found = [(p, self._run(p, ("HGET", self._name(p, "keys"), key_id))[0]) for p in _KEYS]
        return [(partition, packed) for partition, packed in found if packed is not None]

    def _located_key(self, key_id: str) -> tuple[int, bytes]:
        found = self._locate(key_id)
        if not found:
            raise NotFound(f"the store has no key {key_id}")
        return found[0]

    def _all(self, partition: int, structure: str) -> list[bytes]:
        found: dict[bytes, bytes] = {}  # a scan may give one twice
        cursor: Word = 0
        while True:
            command: Command = ("HSCAN", self._name(partition, structure), cursor, "COUNT", _SCAN)
            ((cursor, flat),) = self._run(partition, command)
            found |= _pairs(flat)
            if int(cursor) == 0:
                return list(found.values())

    def _named(self, partition: int, structure: str, id_or_name: str) -> list[bytes]:
        exact = self._run(partition, ("HGET", self._name(partition, structure), id_or_name))
        return [
            *dict.fromkeys(
                [*filter(None, exact), *self._members(partition, structure, f"named:{id_or_name}")]
            )
        ]

    def _members(self, partition: int, structure: str, index: str) -> list[bytes]:
        (ids,) = self._run(partition, ("SMEMBERS", self._name(partition, index)))
        if not ids:
            return []
        (packed,) = self._run(partition, ("HMGET", self._name(partition, structure), *ids))
        return [item for item in packed if item is not None]


def _renewal(structure: str, was: Key | Machine, changed: Key | Machine, packed: str) -> list[_Write]:
    writes: list[_Write] = [("HSET", structure, was.id, packed)]
    if was.name != changed.name:
        writes += [("SREM", f"named:{was.name}", was.id), ("SADD", f"named:{changed.name}", was.id)]
    return writes


def _contended() -> StoreUnavailable:
    return StoreUnavailable("others keep changing the same record in the Redis store: try again")


class AsyncRedisStore:
    """The same servers for event loops, any number of them."""

    def __init__(self, sync: RedisStore) -> None:
        self._sync = sync
        self._ask = sync.questions
        self._wire = AsyncWire(sync.place, self._ask.router)

    @property
    def sync(self) -> RedisStore:
        """The blocking twin."""
        return self._sync

    async def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        return await self._wire.drive(self._ask.lookup(claim))

    async def describe(self) -> Description:
        """See `RedisStore.describe`."""
        return await self._wire.drive(self._ask.describe())

    async def aclose(self) -> None:
        """See `AsyncStore.aclose`."""
        await self._wire.aclose()
        self._sync.close()


# the feed


class _RedisFeed:
    """Reads the tips; subscribes only so that `wait` may end early. A lost subscription costs speed, not truth.

    It subscribes before it reads: what changes after the reading is then announced.
    """

    def __init__(self, place: Place, questions: _Questions) -> None:
        self._place = place
        self._ask = questions
        self._wire = Wire(place, questions.router)
        self._refused = False
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._listener: tuple[Node, Link] | None = None
        self._wakes, self._waker = os.pipe()
        for end in (self._wakes, self._waker):
            os.set_blocking(end, False)

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        try:
            self._subscribe()
            reading = self._wire.drive(self._ask.read(known))
        except StoreUnavailable:
            self._ask.router.forget()
            raise
        self._follow()
        return reading

    def _subscribe(self) -> None:
        with self._lock:
            if self._listener is not None or self._refused:
                return
            nodes = self._wire.drive(self._ask.router.nodes())
            for node in dict.fromkeys(nodes.values()):  # on Cluster any node announces for all
                with suppress(StoreUnavailable):
                    self._listener = self._listening(node)
                    return

    def _listening(self, node: Node) -> tuple[Node, Link] | None:
        link = connect(self._place, node, self._place.timeout)
        try:
            (reply,) = self._wire.once(link, node, ("SUBSCRIBE", self._ask.layout.channel))
        except StoreUnavailable:
            link.disconnect()
            raise
        if isinstance(reply, list):
            return node, link
        link.disconnect()
        self._refused = True  # by the ACL: it will not change its mind
        logger.warning(
            "the Redis store announces no changes to this app, so it finds them by asking: %s", refused(reply)
        )
        return None

    def _follow(self) -> None:
        """Hang up on a node that is no longer one of the store's: it will announce nothing."""
        with self._lock:
            if self._listener is not None and not self._ask.router.knows(self._listener[0]):
                self._hang_up()

    def wait(self, timeout: float) -> None:
        listener = self._listener
        if listener is None:
            self._rest(timeout)
            return
        heard = listener[1]._sock  # noqa: SLF001 - redis-py cannot wait for two things at once
        if heard is not None and not self._hears(listener) and not self._rest(timeout, heard):
            self._hears(listener)

    def _rest(self, timeout: float, *sockets: socket) -> bool:
        """Wait for a wake-up, or for something to come in. Tells whether it was a wake-up."""
        poll = select.poll()
        for source in (self._wakes, *[each.fileno() for each in sockets]):
            poll.register(source, select.POLLIN)
        woken = self._wakes in [source for source, _ in poll.poll(math.ceil(timeout * 1000))]
        if woken:
            with suppress(BlockingIOError):  # another thread has taken it
                os.read(self._wakes, 4096)
        return woken

    def _hears(self, listener: tuple[Node, Link]) -> bool:
        """Take in announcements. A lost subscription is news too, after a short pause."""
        heard = hear(listener[1])
        if heard is not None:
            return heard
        with self._lock:
            self._hang_up()
        self._rest(_RECONNECT)
        return True

    def _hang_up(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener[1].disconnect()

    def wake(self) -> None:
        with suppress(BlockingIOError):  # so full that it will be noticed
            os.write(self._waker, b"!")

    def close(self) -> None:
        self.wake()
        with self._lock:
            self._hang_up()
        self._wire.discard()

    def __del__(self) -> None:
        self._hang_up()
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._wakes)
        os.close(self._waker)

    def before_fork(self) -> None:
        """Keep other threads from being in the middle of a subscription."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child without its parent's subscription."""
        if not child:
            self._lock.release()
            return
        self._hang_up()
        self._close_pipe()
        self._reset()
