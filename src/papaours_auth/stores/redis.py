"""The store in Redis: one server, Sentinel or Cluster, all in the same layout and by the same scripts.

`redis_layout` says where things are, `redis_questions` what verifiers ask, `redis_router` and `redis_wire` how it
gets there, `redis_feed` how changes are heard. Here are the two stores, and administration.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeAlias, cast

from ..digest import PepperStatus
from ..exceptions import ConfigurationError, Conflict, NotFound, StoreUnavailable
from ..model import Key, Machine
from ..verify import Claim
from . import (
    Author,
    Change,
    Description,
    Feed,
    Found,
    KeyColumns,
    MachineColumns,
    PepperRecord,
)
from .records import (
    Cell,
    difference,
    journal_text,
    key_row,
    machine_row,
    microseconds,
    moment,
)
from .redis_feed import RedisFeed
from .redis_layout import (
    ALL,
    KEYS,
    MACHINES,
    META,
    Logged,
    lost,
    machine_partition,
    pack,
    packed_pepper,
    pairs,
    read_entry,
    read_packed_key,
    read_packed_machine,
    read_pepper,
)
from .redis_place import Place, place_of
from .redis_questions import SCHEMA_VERSION, Questions
from .redis_router import WORD, Command, Stray, Unreachable, Word, script
from .redis_wire import AsyncWire, Wire

logger = logging.getLogger("papaours_auth")

WRITE_TIMEOUT: Final = 5.0
"""Seconds an administrator waits for an answer, where ``timeout=`` is not longer."""

_SCAN: Final = 500  # records a reply: some 150 kB

_TRIES: Final = 50  # each failure is somebody else's success

_WRITE, _CREATE = map(script, ("write", "create"))

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
        return pack((*cells, journal_text(self.before), journal_text(self.after)))


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


class RedisStore:
    """Lookup, feed and administration. Safe to share between threads and across a fork.

    ``warnings`` holds what could not be checked, once `describe` was asked.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._ask = Questions(place)
        self._layout = self._ask.layout
        self._router = self._ask.router
        self._wire = Wire(place, self._router)
        # Administration has time, and a full pool of lookups does not keep a key from being disabled.
        patience = max(
            place.timeout, WRITE_TIMEOUT + (place.wait_timeout / 1000 if place.wait_replicas else 0)
        )
        self._admin = Wire(place, self._router, timeout=patience)

    @property
    def questions(self) -> Questions:
        """What the asynchronous twin asks too."""
        return self._ask

    @property
    def warnings(self) -> Sequence[str]:
        """What an administrator should look at."""
        return tuple(self._ask.warnings)

    # verification

    def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        node = self._router.known(claim.partition)
        if node is not None and self._router.single:
            reply = self._wire.exchange(node, self._ask.packed_lookup(claim))
            if reply is not None:
                return self._ask.read_found(claim, reply)
        return self._wire.drive(self._ask.lookup(claim))

    def describe(self) -> Description:
        """See `Lookup.describe`. `ConfigurationError` where there never was a store, or its policy evicts."""
        return self._wire.drive(self._ask.describe())

    def feed(self) -> Feed:
        """See `Lookup.feed`."""
        return RedisFeed(self.place, self._ask)

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
        begun = any(self._has_log(partition) for partition in ALL)  # before the mark, which comes before them
        mark = self._mark()
        if begun and b"installation" not in mark:
            raise ConfigurationError(
                "parts of a store are in this Redis, but not its installation mark: restore it from a backup, "
                "or choose another prefix"
            )
        if b"ready" in mark:
            if not all(self._has_log(partition) for partition in ALL):  # after it, which comes after them
                raise lost()
            return
        installation = self._create_log(META, secrets.token_hex(16))
        for partition in (*KEYS, *MACHINES):
            self._create_log(partition, installation)
        self._run(META, ("HSET", self._name(META, "mark"), "ready", 1), write=True)

    def _has_log(self, partition: int) -> bool:
        return bool(self._run(partition, ("EXISTS", self._name(partition, "changes")))[0])

    def _mark(self) -> dict[bytes, bytes]:
        return pairs(self._run(META, ("HGETALL", self._name(META, "mark")))[0])

    def _create_log(self, partition: int, installation: str) -> str:
        entry = _Entry(Author("papaours-auth", datetime.now(UTC)), "store.created", installation, {}, {})
        names = [self._name(partition, "changes")]
        if partition == META:
            names.append(self._name(META, "mark"))
        minted_only = "m" if partition in KEYS else ""
        given = (secrets.token_hex(16), entry.text, installation, SCHEMA_VERSION, minted_only)
        self._run(partition, ("EVALSHA", _CREATE, len(names), *names, *given), write=True)
        return self._mark()[b"installation"].decode() if partition == META else installation

    # administration

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """See `Store.add_pepper`."""
        entry = _Entry(author, "pepper.added", pepper.id, {}, {"status": pepper.status})
        write: _Write = ("HSET", "peppers", pepper.id, packed_pepper(pepper))
        if not self._change(META, [("peppers", pepper.id, None)], [write], [entry]):
            raise Conflict(f"the store already has a pepper {pepper.id!r}")

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """See `Store.set_pepper_status`."""
        for _ in range(_TRIES):
            packed = pairs(self._run(META, ("HGETALL", self._name(META, "peppers")))[0])
            peppers = {record.id: record for record in (read_pepper(*item) for item in packed.items())}
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
                ("HSET", "peppers", was.id, packed_pepper(was._replace(status=after)))
                for was, after in changes
            ]
            entries = [
                _Entry(author, f"pepper.{after}", was.id, {"status": was.status}, {"status": after})
                for was, after in changes
            ]
            if not changes or self._change(META, checks, writes, entries):
                return
        raise _contended()

    def count_digests(self, pepper_id: str) -> int:
        """See `Store.count_digests`."""
        counts = (self._run(p, ("HGET", self._name(p, "digested"), pepper_id))[0] for p in KEYS)
        return sum(int(count or 0) for count in counts)

    def add_machine(self, machine: Machine, author: Author) -> None:
        """See `Store.add_machine`."""
        writes: list[_Write] = [
            ("HSET", "machines", machine.id, pack(machine_row(machine))),
            ("SADD", f"named:{machine.name}", machine.id),
        ]
        entry = _Entry(author, "machine.created", machine.id, {}, {"name": machine.name})
        partition = machine_partition(machine.id)
        if not self._change(partition, [("machines", machine.id, None)], writes, [entry]):
            raise Conflict(f"the store already has a machine {machine.id}")

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """See `Store.update_machine`."""
        partition = machine_partition(machine_id)
        for _ in range(_TRIES):
            packed, machine = self._found_machine(machine_id)
            before, after = difference({name: getattr(machine, name) for name in columns}, columns)
            changed = replace(machine, **columns)
            entry = _Entry(author, kind, machine_id, before, after)
            writes = _renewal("machines", machine, changed, pack(machine_row(changed)))
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
        partition = machine_partition(machine_id)
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
                ("SREM", f"named:{read_packed_key(packed).name}", key.id),
                ("SREM", f"of:{key.machine_id}", key.id),
                ("HINCRBY", "digested", owner[3], -1),
            ]
            if self._change(partition, [("keys", key.id, packed)], writes, [entry]):
                return True
        raise _contended()

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """See `Store.machines`."""
        if id_or_name is None:
            packed = (item for partition in MACHINES for item in self._all(partition, "machines"))
        else:
            packed = (item for p in MACHINES for item in self._named(p, "machines", id_or_name))
        return sorted(map(read_packed_machine, packed), key=lambda machine: (machine.created_at, machine.id))

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """See `Store.add_key`. Ids are random: two callers cannot add one id in two partitions at once."""
        self._found_machine(key.machine_id)
        if any(partition != claim.partition for partition, _ in self._locate(key.id)):
            raise Conflict("the store already has this key")
        first = claim.candidates[0]
        owner = [
            f"{machine_partition(key.machine_id):02}",
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
            ("HSET", "keys", key.id, pack(key_row(key))),
            ("SADD", f"named:{key.name}", key.id),
            ("SADD", f"of:{key.machine_id}", key.id),
            ("HINCRBY", "digested", first.pepper_id, 1),
        ]
        entry = _Entry(author, kind, key.id, {}, {"machine_id": key.machine_id, "name": key.name})
        if not self._change(claim.partition, checks, writes, [entry], foreign=claim.foreign):
            raise Conflict("the store already has this key")

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """See `Store.update_key`."""
        for _ in range(_TRIES):
            partition, packed = self._located_key(key_id)
            key = read_packed_key(packed)
            before, after = difference({name: getattr(key, name) for name in columns}, columns)
            changed = key._replace(**columns)
            entry = _Entry(author, kind, key_id, before, after)
            writes = _renewal("keys", key, changed, pack(key_row(changed)))
            if not after or self._change(partition, [("keys", key_id, packed)], writes, [entry]):
                return changed
        raise _contended()

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """See `Store.keys`."""
        packed: Iterator[bytes]
        if id_or_name is not None:
            packed = (item for p in KEYS for item in self._named(p, "keys", id_or_name))
        elif machine_id is not None:
            packed = (item for p in KEYS for item in self._members(p, "keys", f"of:{machine_id}"))
        else:
            packed = (item for partition in KEYS for item in self._all(partition, "keys"))
        keys = (key for key in map(read_packed_key, packed) if machine_id in (None, key.machine_id))
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
            return ALL
        holding = [partition for partition, _ in self._locate(subject)]
        return (*(holding or KEYS), machine_partition(subject), META)

    def _log(self, partition: int, subject: str | None, limit: int) -> Iterator[Logged]:
        """Read a log from its end, until ``limit`` entries are found."""
        name = self._name(partition, "changes")
        end = int(self._run(partition, ("LLEN", name))[0])
        while end > 0 and limit > 0:
            start = max(0, end - _SCAN)
            entries = self._run(partition, ("LRANGE", name, start, end - 1))[0]
            for logged in map(read_entry, reversed(entries)):
                # Each partition's log begins with the store's creation: once is enough.
                if logged.epoch.seq == 1 and partition != META:
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
        self,
        partition: int,
        checks: list[_Check],
        writes: list[_Write],
        entries: list[_Entry],
        *,
        foreign: bool = False,
    ) -> bool:
        """Make one change of a partition in one step. False where a check failed, and nothing was done."""
        names = dict.fromkeys(
            ["changes", *(check[0] for check in checks), *(str(write[1]) for write in writes)]
        )
        place = {name: number for number, name in enumerate(names, 1)}
        words: list[Word] = [self._layout.channel, int(foreign), len(checks)]
        for structure, field, value in checks:
            words += [place[structure], field, int(value is not None), "" if value is None else value]
        words.append(len(writes))
        for command, name, *rest in writes:
            words += [2 + len(rest), command, place[str(name)], *rest]
        words.append(len(entries))
        for entry in entries:
            words += [secrets.token_hex(16), entry.text]
        keys = [self._name(partition, name) for name in names]
        return self._written(partition, ("EVALSHA", _WRITE, len(keys), *keys, *words, WORD))

    def _written(self, partition: int, command: Command) -> bool:
        wanted = self.place.wait_replicas
        waiting: list[Command] = [("WAIT", wanted, self.place.wait_timeout)] if wanted else []
        try:
            (done,), *confirmed = self._run(partition, command, *waiting, write=True)
        except (Unreachable, Stray) as error:
            if not error.sent:
                raise
            raise StoreUnavailable(
                f"{error}: the change may have been made all the same, so look before you try again"
            ) from error
        if done < 0:
            raise lost()
        if done == 0 and confirmed and confirmed[0] < wanted:
            logger.warning(
                "the change WAS made, but only %d of %d replicas confirmed it in %d ms: a failover now may "
                "forget it, so look again when the replicas are back",
                confirmed[0], wanted, self.place.wait_timeout,
            )  # fmt: skip
        return cast("int", done) == 0

    def _found_machine(self, machine_id: str) -> tuple[bytes, Machine]:
        partition = machine_partition(machine_id)
        (packed,) = self._run(partition, ("HGET", self._name(partition, "machines"), machine_id))
        if packed is None:
            raise NotFound(f"the store has no machine {machine_id}")
        return packed, read_packed_machine(packed)

    def _locate(self, key_id: str) -> list[tuple[int, bytes]]:
        found = [(p, self._run(p, ("HGET", self._name(p, "keys"), key_id))[0]) for p in KEYS]
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
            found |= pairs(flat)
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
        router = self._ask.router
        node = router.known(claim.partition)
        if node is not None and router.single:
            reply = await self._wire.exchange(node, self._ask.packed_lookup(claim))
            if reply is not None:
                return self._ask.read_found(claim, reply)
        return await self._wire.drive(self._ask.lookup(claim))

    async def describe(self) -> Description:
        """See `RedisStore.describe`."""
        return await self._wire.drive(self._ask.describe())

    async def aclose(self) -> None:
        """See `AsyncStore.aclose`."""
        await self._wire.aclose()
        self._sync.close()
