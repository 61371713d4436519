"""The store in memory: for tests, and for apps that fill it themselves at start. Gone with the process."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from .._fork import hold_across_fork
from ..digest import Candidate, PepperStatus
from ..exceptions import ConfigurationError, Conflict, NotFound, StoreUnavailable
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
from .records import Cell, difference, journal_text, next_epoch

LOG_LENGTH: Final = 10_000
"""Changes kept: a watcher further behind drops its whole cache."""


def open_store(url: str, create: bool) -> MemoryStore:
    """Open ``memory://``: a new, empty store each time."""
    if url != "memory://":
        raise ConfigurationError("the memory store is written memory:// and nothing else")
    return MemoryStore()


def open_async_store(url: str, create: bool) -> AsyncMemoryStore:
    """Open ``memory://`` for event loops."""
    return AsyncMemoryStore(open_store(url, create))


class MemoryStore:
    """Dictionaries under one lock. After a fork parent and child each have their own copy."""

    def __init__(self) -> None:
        self._renew_lock()
        self._installation = secrets.token_hex(16)
        self._peppers: dict[str, PepperRecord] = {}
        self._machines: dict[str, Machine] = {}
        self._keys: dict[str, Key] = {}
        self._digests: dict[bytes, Candidate] = {}
        self._key_of: dict[bytes, str] = {}
        self._minted_only = True
        self._log: deque[Change] = deque(maxlen=LOG_LENGTH)
        self._tip = next_epoch(None)
        self._log.append(
            Change(
                self._tip, datetime.now(UTC), "papaours-auth", "store.created", self._installation, "{}", "{}"
            )
        )
        self._closed = False
        hold_across_fork(self)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    # verification

    def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        with self._lock:
            self._check_open()
            for candidate in claim.candidates:
                key_id = self._key_of.get(candidate.digest)
                if key_id is not None:
                    key = self._keys[key_id]
                    record = Record(
                        key, self._machines[key.machine_id], self._digests[candidate.digest].digest
                    )
                    return Found(record, {0: self._tip})
            return Found(None, {0: self._tip})

    def describe(self) -> Description:
        """See `Lookup.describe`."""
        with self._lock:
            self._check_open()
            return Description(self._installation, tuple(self._peppers.values()))

    def feed(self) -> Feed:
        """See `Lookup.feed`."""
        return _MemoryFeed(self)

    def close(self) -> None:
        """See `Lookup.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the memory store is closed")

    # administration

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """See `Store.add_pepper`."""
        with self._lock:
            self._check_open()
            if pepper.id in self._peppers:
                raise Conflict(f"the store already has a pepper {pepper.id!r}")
            self._peppers[pepper.id] = pepper
            self._append(author, "pepper.added", pepper.id, {}, {"status": pepper.status})

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """See `Store.set_pepper_status`."""
        with self._lock:
            self._check_open()
            if pepper_id not in self._peppers:
                raise NotFound(f"the store has no pepper {pepper_id!r}")
            for other in list(self._peppers.values()):
                if other.id == pepper_id and other.status != status:
                    self._change_pepper(other, status, author)
                elif status == "primary" and other.status == "primary" and other.id != pepper_id:
                    self._change_pepper(other, "accept", author)

    def _change_pepper(self, pepper: PepperRecord, status: PepperStatus, author: Author) -> None:
        self._peppers[pepper.id] = pepper._replace(status=status)
        self._append(author, f"pepper.{status}", pepper.id, {"status": pepper.status}, {"status": status})

    def count_digests(self, pepper_id: str) -> int:
        """See `Store.count_digests`."""
        with self._lock:
            self._check_open()
            return sum(candidate.pepper_id == pepper_id for candidate in self._digests.values())

    def add_machine(self, machine: Machine, author: Author) -> None:
        """See `Store.add_machine`."""
        with self._lock:
            self._check_open()
            if machine.id in self._machines:
                raise Conflict(f"the store already has a machine {machine.id}")
            self._machines[machine.id] = machine
            self._append(author, "machine.created", machine.id, {}, {"name": machine.name})

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """See `Store.update_machine`."""
        with self._lock:
            self._check_open()
            machine = self._machines.get(machine_id)
            if machine is None:
                raise NotFound(f"the store has no machine {machine_id}")
            was = {name: getattr(machine, name) for name in columns}
            before, after = difference(was, columns)
            if after:
                machine = self._machines[machine_id] = replace(machine, **columns)
                self._append(author, kind, machine_id, before, after)
            return machine

    def delete_machine(self, machine_id: str, author: Author) -> None:
        """See `Store.delete_machine`."""
        with self._lock:
            self._check_open()
            machine = self._machines.pop(machine_id, None)
            if machine is None:
                raise NotFound(f"the store has no machine {machine_id}")
            gone = {key.id for key in self._keys.values() if key.machine_id == machine_id}
            for digest in [digest for digest, key_id in self._key_of.items() if key_id in gone]:
                del self._key_of[digest], self._digests[digest]
            for key_id in gone:
                del self._keys[key_id]
            self._append(author, "machine.deleted", machine_id, {"name": machine.name}, {})

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """See `Store.machines`."""
        with self._lock:
            self._check_open()
            return sorted(
                (m for m in self._machines.values() if id_or_name in (None, m.id, m.name)),
                key=lambda machine: (machine.created_at, machine.id),
            )

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """See `Store.add_key`."""
        with self._lock:
            self._check_open()
            if key.machine_id not in self._machines:
                raise NotFound(f"the store has no machine {key.machine_id}")
            if key.id in self._keys or any(c.digest in self._key_of for c in claim.candidates):
                raise Conflict("the store already has this key")
            self._keys[key.id] = key
            first = claim.candidates[0]
            self._digests[first.digest] = first
            self._key_of[first.digest] = key.id
            self._minted_only &= not claim.foreign
            self._append(author, kind, key.id, {}, {"machine_id": key.machine_id, "name": key.name})

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """See `Store.update_key`."""
        with self._lock:
            self._check_open()
            key = self._keys.get(key_id)
            if key is None:
                raise NotFound(f"the store has no key {key_id}")
            was = {name: getattr(key, name) for name in columns}
            before, after = difference(was, columns)
            if after:
                key = self._keys[key_id] = key._replace(**columns)
                self._append(author, kind, key_id, before, after)
            return key

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """See `Store.keys`."""
        with self._lock:
            self._check_open()
            return sorted(
                (
                    key
                    for key in self._keys.values()
                    if id_or_name in (None, key.id, key.name) and machine_id in (None, key.machine_id)
                ),
                key=lambda key: (key.created_at, key.id),
            )

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """See `Store.journal`. Goes back `LOG_LENGTH` changes."""
        with self._lock:
            self._check_open()
            return [change for change in reversed(self._log) if subject in (None, change.subject)][:limit]

    def _append(
        self, author: Author, kind: str, subject: str, before: Mapping[str, Cell], after: Mapping[str, Cell]
    ) -> None:
        self._tip = next_epoch(self._tip)
        self._log.append(
            Change(
                self._tip, author.at, author.actor, kind, subject, journal_text(before), journal_text(after)
            )
        )
        self._changed.notify_all()

    def before_fork(self) -> None:
        """Keep other threads from being in the middle of a change."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; in a child, without the parent's waiters."""
        if child:
            self._renew_lock()
        else:
            self._lock.release()

    # for the feed

    def read_log(self, known: Epoch | None) -> Reading:
        """Read the tip, and the changes since a known one: None where it is not in the log."""
        with self._lock:
            self._check_open()
            since: list[tuple[str, str]] | None = None
            if known == self._tip:
                since = []
            elif known is not None and any(change.epoch == known for change in self._log):
                since = [
                    (change.kind, change.subject) for change in self._log if change.epoch.seq > known.seq
                ]
            minted_only = range(PARTITIONS) if self._minted_only else ()
            peppers = tuple(self._peppers.values())
            return Reading(self._installation, {0: News(self._tip, since, peppers, minted_only)})

    def wait_past(self, known: Epoch | None, timeout: float, stop: threading.Event) -> None:
        """Wait until the tip is another one than known, or until ``stop`` is set."""
        with self._changed:
            self._changed.wait_for(lambda: self._tip != known or stop.is_set() or self._closed, timeout)

    def interrupt(self) -> None:
        """Make every waiter look again."""
        with self._changed:
            self._changed.notify_all()


class _MemoryFeed:
    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._seen: Epoch | None = None
        self._woken = threading.Event()

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        reading = self._store.read_log(known.get(0))
        self._seen = reading.news[0].epoch
        return reading

    def wait(self, timeout: float) -> None:
        self._store.wait_past(self._seen, timeout, self._woken)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()
        self._store.interrupt()

    def close(self) -> None:
        self.wake()


class AsyncMemoryStore:
    """The same dictionaries for event loops: nothing here waits for more than a lock."""

    def __init__(self, sync: MemoryStore) -> None:
        self._sync = sync

    @property
    def sync(self) -> MemoryStore:
        """The blocking twin."""
        return self._sync

    async def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        return self._sync.lookup(claim)

    async def describe(self) -> Description:
        """See `Lookup.describe`."""
        return self._sync.describe()

    async def aclose(self) -> None:
        """See `AsyncStore.aclose`."""
        self._sync.close()
