"""The verified-key cache and its freshness: why a cached answer may be believed, and until when.

- **Trust comes from reading the epoch, never from silence.** `Cache.apply` takes a reading of the store's
  change log, evicts what changed, and only then moves that partition's trust to the time the reading was
  *sent* plus ``max_staleness``. No news, late news and lost news all let trust run out.
- **A fill cannot undo a change.** An answer is kept only if its epoch is the one last applied, and the peppers it
  was found with are those of the reading last applied; one from an older epoch is not even used.
- Entries are found by a keyed hash under a key of this process, so no text of a key stays in memory.
- Trust and lifetimes run on the monotonic clock; a key's expiry is turned into it at the fill.

The guarantee speaks of the last clock reading in `authenticate`. A pause after it is outside, as is the sleep
of a suspended machine, during which the monotonic clock stands still.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple, Protocol

from .model import Identity
from .stores import Epoch, PepperRecord, Reading
from .verify import Standing

NEVER: Final = float("-inf")
CLOCK_SHIFT: Final = 0.05
"""Seconds the wall clock may move against the monotonic one before every expiry is computed anew."""
REFRESH: Final = 0.1
"""The last part of an entry's lifetime, in which a caller asks the store for it anew."""


class Clock(Protocol):
    """Where time comes from: the ``time`` module, or a simulator."""

    def monotonic(self) -> float:
        """Seconds that never go back."""

    def time(self) -> float:
        """Seconds since 1970 UTC."""


class Told(NamedTuple):
    """What readings say of the store's peppers: one object until a reading says otherwise."""

    installation: str
    partition: int
    peppers: tuple[PepperRecord, ...]

    @property
    def usable(self) -> set[tuple[str, bytes]]:
        """The peppers by which keys are known."""
        return {(record.id, record.proof) for record in self.peppers if record.status != "retired"}


class Entry:
    """What is remembered of one key. Not changed once made.

    ``open`` tells that an identity may come in without a look at the request: nothing but `needs` is left to
    ask. ``deadline`` and ``expiry`` (the key's own) are in monotonic seconds. From its deadline on an entry should be
    fetched anew; while it cannot be, it serves until `Cache.ends`.
    """

    __slots__ = ("deadline", "digest", "expiry", "identity", "networks", "open", "partitions", "reason")

    def __init__(
        self, digest: bytes, standing: Standing, deadline: float, expiry: float, partitions: tuple[int, ...]
    ) -> None:
        self.digest = digest
        # What the standing says, and not it: 88 bytes less a key (of 780).
        self.identity: Identity | None = standing.identity
        self.reason = standing.reason
        self.networks = standing.networks
        self.open = standing.identity is not None and standing.reason is None and not standing.networks
        self.deadline = min(deadline, expiry)
        self.expiry = expiry
        self.partitions = partitions


class Cache:
    """Entries of known and of unknown keys, bounded separately, and the trust they stand on.

    ``entries`` and ``trusted_until`` are read without the lock on the hot path; all writes hold it.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        max_staleness: float,
        max_known: int,
        max_unknown: int,
        lifetime: float,
    ) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.unknown: dict[bytes, Entry] = {}
        self.trusted_until = NEVER  # the earliest of all partitions: one comparison on the hot path
        self.on_change: list[Callable[[], None]] = []
        self.on_reading: list[Callable[[], None]] = []
        self._clock = clock
        self._max_staleness = max_staleness
        self._max_known = max_known
        self._max_unknown = max_unknown
        self._lifetime = lifetime
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self._epochs: dict[int, Epoch] = {}
        self._trust: dict[int, float] = {}
        self._told: Told | None = None
        self._minted_only: dict[int, int] = {}  # `Claim.partition` -> the partition that tells of it
        self._installation: str | None = None
        self._by_key: dict[str, bytes] = {}
        self._by_machine: dict[str, set[bytes]] = {}
        self._offset = self._clock.time() - self._clock.monotonic()
        self.entries.clear()
        self.unknown.clear()
        self.trusted_until = NEVER

    @property
    def epochs(self) -> Mapping[int, Epoch]:
        """The epoch last applied of each partition."""
        with self.lock:
            return dict(self._epochs)

    def trust(self, partition: int) -> float:
        """Give when trust in a partition runs out."""
        return self._trust.get(partition, NEVER)

    def told(self, now: float) -> Told | None:
        """Give what the store's peppers are, as of a moment within ``max_staleness``; None where no reading tells."""
        told = self._told
        while told is not None:
            until = self.trust(told.partition)
            if told is self._told:  # else that trust may be in what has taken its place
                return told if now < until else None
            told = self._told
        return None

    def minted_only(self, partition: int, now: float) -> bool:
        """Whether a reading within ``max_staleness`` tells of no foreign key under this `Claim.partition`."""
        teller = self._minted_only.get(partition)
        if teller is None or now >= self.trust(teller):
            return False
        return self._minted_only.get(partition) == teller  # asked last, as in `_holds`

    def ends(self, entry: Entry) -> float:
        """Return when an entry's lifetime ends. Not a field of the entry: each would be 32 bytes larger."""
        return min(entry.deadline + self._lifetime * REFRESH, entry.expiry)

    def trusts(self, entry: Entry, now: float) -> bool:
        """Tell whether an entry may be believed now: its key's, machine's and peppers' partitions are fresh."""
        trust = self._trust
        return (
            now < self.ends(entry)
            and all(now < trust.get(partition, NEVER) for partition in entry.partitions)
            and self._holds(entry)
        )

    def _holds(self, entry: Entry) -> bool:
        """Tell whether an entry is still kept. Asked last: a reading evicts first, and renews trust last."""
        return (self.entries.get(entry.digest) or self.unknown.get(entry.digest)) is entry

    def recall(self, digest: bytes, now: float) -> Entry | None:
        """Give what is believed of a key now, known or unknown."""
        entry = self.entries.get(digest) or self.unknown.get(digest)
        return entry if entry is not None and self.trusts(entry, now) else None

    def recall_stale(self, digest: bytes, now: float, max_age: float) -> Entry | None:
        """Give who was let in by what the store said at most ``max_age`` seconds ago, whatever its lifetime."""
        entry = self.entries.get(digest)
        if entry is None or entry.reason is not None or now >= entry.expiry:
            return None
        known_at = [self._trust.get(partition, NEVER) - self._max_staleness for partition in entry.partitions]
        return entry if all(now < at + max_age for at in known_at) and self._holds(entry) else None

    def fill(
        self, digest: bytes, standing: Standing, epochs: Mapping[int, Epoch],
        *, monotonic: float, wall: float, told: Told | None,
    ) -> tuple[Entry | None, bool]:  # fmt: skip
        """Make an entry of an answer, and keep it if it is of the epoch last applied.

        ``monotonic`` was read before ``wall``, which decided the standing; ``told`` is what said which peppers it
        could be found with, None where no reading did: it is not kept then, since none would tell of their change
        either. Gives the entry and whether it was kept; None for an answer from before a change that was applied
        already: ask again.
        """
        expiry = float("inf")
        if standing.expires_at is not None and standing.reason is None:
            expiry = monotonic + standing.expires_at.timestamp() - wall
        partitions = tuple(epochs) if told is None else tuple({*epochs, told.partition})
        entry = Entry(digest, standing, monotonic + self._lifetime * (1 - REFRESH), expiry, partitions)
        with self.lock:
            if told is not None and told is not self._told:
                return None, False
            # Of no partition: nothing would ever evict it.
            kept = told is not None and bool(epochs) and abs(wall - monotonic - self._offset) <= CLOCK_SHIFT
            for partition, epoch in epochs.items():
                known = self._epochs.get(partition)
                if epoch != known:
                    if known is not None and epoch.seq < known.seq:
                        return None, False
                    kept = False
            if kept:
                self._keep(entry)
        return entry, kept

    def _keep(self, entry: Entry) -> None:
        identity = entry.identity
        former = self.entries.get(entry.digest)
        if (
            former is not None and former.identity != identity
        ):  # it may be another key, or none: index it anew
            self._evict(entry.digest)
        if identity is None:
            self.unknown[entry.digest] = entry
            if len(self.unknown) > self._max_unknown:
                del self.unknown[next(iter(self.unknown))]  # the oldest: a flood pushes out its own
            return
        self.entries[entry.digest] = entry
        self._by_key[identity.key.id] = entry.digest
        self._by_machine.setdefault(identity.machine.id, set()).add(entry.digest)
        if len(self.entries) > self._max_known:
            self._evict(next(iter(self.entries)))

    def _evict(self, digest: bytes) -> None:
        entry = self.entries.pop(digest, None)
        if entry is None or entry.identity is None:
            return
        key, machine = entry.identity.key, entry.identity.machine
        self._by_key.pop(key.id, None)
        siblings = self._by_machine.get(machine.id)
        if siblings is not None:
            siblings.discard(digest)
            if not siblings:
                del self._by_machine[machine.id]

    def apply(self, reading: Reading, *, sent: float) -> None:
        """Take in a reading of the change feed that was sent at ``sent`` (monotonic seconds)."""
        changed = False
        with self.lock:
            if reading.installation != self._installation:
                changed = True
                self._forget()
                self._installation = reading.installation
            for partition, news in reading.news.items():
                if news.changes is None:
                    if self._epochs.get(partition) != news.epoch:
                        changed = True
                        self._drop()
                else:
                    for kind, subject in news.changes:
                        changed = True
                        self._change(kind, subject)
                self._epochs[partition] = news.epoch
                self._tell_minted_only(partition, news.minted_only)
                if news.peppers is not None:
                    changed |= self._tell_peppers(
                        Told(reading.installation, partition, tuple(sorted(news.peppers)))
                    )
            if changed:
                self._tell(self.on_change)
            # Last: whatever failed before this line leaves trust to run out.
            for partition in reading.news:
                self._trust[partition] = sent + self._max_staleness
            self.trusted_until = min(self._trust.values(), default=NEVER)
        self._tell(self.on_reading)

    def _tell_peppers(self, told: Told) -> bool:
        """Take in what the peppers are. Tells whether that is new."""
        before = self._told
        if told == before:
            return False
        if before is None or not before.usable <= told.usable:
            self._drop()  # the keys of one that is retired are known no more
        self.unknown.clear()
        self._told = told
        return True

    def _tell_minted_only(self, partition: int, told: Collection[int]) -> None:
        """Take in where a partition's log tells that no foreign key was ever added."""
        for of in [of for of, teller in self._minted_only.items() if teller == partition and of not in told]:
            del self._minted_only[of]
        self._minted_only.update(dict.fromkeys(told, partition))

    def _change(self, kind: str, subject: str) -> None:
        if kind in ("key.created", "key.imported"):
            self.unknown.clear()
        for digest in [self._by_key.get(subject), *self._by_machine.get(subject, ())]:
            if digest is not None:
                self._evict(digest)

    def check_clock(self) -> None:
        """Drop everything where the wall clock has jumped: expiries were turned into monotonic times."""
        offset = self._clock.time() - self._clock.monotonic()
        if abs(offset - self._offset) <= CLOCK_SHIFT:
            return
        with self.lock:
            self._drop()
            self._offset = offset
        self._tell(self.on_change)

    def _forget(self) -> None:
        """Believe nothing of before: another store answers."""
        self._drop()
        self._told = None
        self._minted_only.clear()
        self._epochs.clear()
        self._trust.clear()
        self.trusted_until = NEVER

    def _drop(self) -> None:
        self.entries.clear()
        self.unknown.clear()
        self._by_key.clear()
        self._by_machine.clear()

    def _tell(self, listeners: list[Callable[[], None]]) -> None:
        for listener in listeners:
            listener()

    def before_fork(self) -> None:
        """Keep other threads from being in the middle of a change."""
        self.lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """A child believes nothing of its parent's."""
        if child:
            self._reset()
        else:
            self.lock.release()
