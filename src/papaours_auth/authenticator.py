"""Authenticator and AsyncAuthenticator: a cache hit, or else read -> store -> decide.

Both are shells over the same steps, which live in `_Engine`; they differ by waiting. Any number of threads or
event loops may share one. Fork: the child starts with an empty cache, no flights and no watcher.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from queue import Empty
from typing import Final, Generic, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack, cast

from ._fork import hold_across_fork, notice_fork
from ._locks import Room, WaitingLock
from ._patience import Bound, Patience
from .cache import NEVER, Cache, Clock, Entry, Told
from .digest import PepperRing, peppers_from_environment
from .exceptions import ConfigurationError, Overloaded, Reason, Refused, StoreUnavailable
from .format import MAX_LENGTH, KeyFormat
from .model import Address, Identity
from .outage import Breaker, Health, Unready
from .stores import AsyncStore, Description, Found, PepperRecord, Store, open_async_store, open_store
from .verify import Claim, Judged, admit, partition, read, stand
from .watcher import Watcher

DEFAULT_MAX_STALENESS: Final = 2.0
DEFAULT_FORMAT: Final = KeyFormat()
_LOOKUPS: Final = 8
"""Tries to get an answer that no change has overtaken: three in a row may be, while many keys are disabled."""
_FOREIGN_AT_ONCE: Final = 4
"""Foreign keys that are looked up at the same time. Fewer than any store has connections or threads."""

_F = TypeVar("_F")


class Options(TypedDict, total=False):
    """What may be set on both authenticators. `Authenticator` says what each means."""

    peppers: PepperRing | None
    format: KeyFormat
    max_staleness: float
    max_known: int
    max_unknown: int
    max_flights: int
    max_foreign_flights: int
    lifetime: float
    timeout: float
    on_outage: Literal["refuse", "serve_cached"]
    max_age: float
    clock: Clock
    watch: bool


class _Bound(NamedTuple):
    """Our peppers, each with the status that the store's record of them gives it."""

    ring: PepperRing
    primary_missing: bool = False
    told: Told | None = None
    """The record as readings tell it, for as long as the cache trusts them. None where it was asked for."""
    until: float = NEVER
    """Until when that may be believed, where it was asked for (monotonic seconds)."""


class _Asked(NamedTuple):
    """A claim, and the peppers it is looked up under: None where it is not known yet what ours are worth."""

    claim: Claim
    ring: PepperRing | None
    full: Claim
    """The claim under all our peppers, retired ones too: it is read once, and no text of a key is kept for later."""


class _Fetched(NamedTuple):
    """An answer from the store, and when all that it rests on was asked for (monotonic seconds)."""

    entry: Entry
    sent: float


class _Flight:
    """A thread's lookup, for which others wait who want the same key. A `Future` takes 2 µs more of each lookup."""

    __slots__ = ("_ended", "_error", "_fetched")

    def __init__(self) -> None:
        self._ended = threading.Lock()  # held until it has
        self._ended.acquire()
        self._fetched: _Fetched | None = None
        self._error: Exception | None = None

    def land(self, fetched: _Fetched) -> None:
        self._fetched = fetched
        self._ended.release()

    def crash(self, error: Exception) -> None:
        self._error = error
        self._ended.release()

    def result(self, timeout: float) -> _Fetched:
        """Wait for its end. Raises what it raised, or `TimeoutError`."""
        if not self._ended.acquire(timeout=timeout):
            raise TimeoutError
        self._ended.release()  # for the next who waits
        if self._fetched is None:
            raise cast("Exception", self._error)
        return self._fetched


class _Budget(Generic[_F]):
    """How many lookups may be under way, and which are: those that one may join, and those a change has detached.

    ``lane`` is for threads: so many of them ask the store at a time.
    """

    __slots__ = ("lane", "most", "under_way")

    def __init__(self, most: int) -> None:
        self.most = most
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a child of a fork."""
        self.under_way: set[_F] = set()
        self.lane = Room(_FOREIGN_AT_ONCE)


class _Engine(Generic[_F]):
    """What both shells do, without waiting for anything. ``_F`` is the flight of an uncached lookup."""

    def __init__(
        self,
        store: Store,
        *,
        environment: str,
        peppers: PepperRing | None = None,
        format: KeyFormat = DEFAULT_FORMAT,  # noqa: A002 - the field's own word
        max_staleness: float = DEFAULT_MAX_STALENESS,
        max_known: int = 100_000,
        max_unknown: int = 10_000,
        max_flights: int = 1_000,
        max_foreign_flights: int = 100,
        lifetime: float = 300.0,
        timeout: float = 1.0,
        on_outage: Literal["refuse", "serve_cached"] = "refuse",
        max_age: float | None = None,
        clock: Clock = time,
        watch: bool = True,
    ) -> None:
        """See `Authenticator`."""
        format.check_environment(environment)
        for name, value in (
            ("max_staleness", max_staleness),
            ("max_known", max_known),
            ("max_unknown", max_unknown),
            ("max_flights", max_flights),
            ("max_foreign_flights", max_foreign_flights),
            ("lifetime", lifetime),
            ("timeout", timeout),
            ("max_age", max_age if max_age is not None else max_staleness),
        ):
            if not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} must be a number above 0: it bounds what this app may do")
        _check_outage_policy(on_outage, max_age, max_staleness)
        self.id = secrets.token_hex(8)
        """Tells this authenticator's identities from those of another: see `Identity.vouched_by`."""
        self.environment = environment
        self.format = format
        self.max_staleness = max_staleness
        self._store = store
        # Without statuses: a claim has the digests under all of them, so that its key need not be read again.
        self._given = PepperRing((peppers if peppers is not None else peppers_from_environment()).peppers)
        # Of keys that only an issuer can have made, and of those that anyone can invent. Kept together: beyond 30
        # attributes an instance takes 40 ns more of each hit (CPython 3.11).
        self._minted: _Budget[_F] = _Budget(max_flights)
        self._invented: _Budget[_F] = _Budget(max_foreign_flights)
        self._timeout = timeout
        self._max_age = max_age
        self._clock = clock
        self._watch = watch
        self._closed = False
        self._cache = Cache(
            clock=clock,
            max_staleness=max_staleness,
            max_known=max_known,
            max_unknown=max_unknown,
            lifetime=lifetime,
        )
        self._cache.on_change.append(self._detach_flights)
        self._cache.on_reading.append(self._heard)
        self._keyed_hash = blake2b(digest_size=32, key=secrets.token_bytes(32)).copy
        self._entry = self._cache.entries.get  # bound once: 20 ns less on a hit
        self._monotonic = clock.monotonic
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._starting = threading.Lock()
        self._watching = WaitingLock()  # held while a thread starts
        self._checked = False  # whether the store, as it is set up, was ever held good
        self._bound = _Bound(self._given)
        self._watcher: Watcher | None = None
        self._flights: dict[object, _F] = {}  # those that one may join
        self._minted.reset()
        self._invented.reset()
        self._breaker = Breaker(
            self._monotonic, watched=self._is_watching, silent=self._hears_nothing, listen=self._listen
        )
        self._stale_answers = 0

    # the hot path

    def cached(
        self, presented: bytes, client: str | Address | None = None, needs: str | Sequence[str] | None = None
    ) -> Identity | None:
        """Answer from the cache alone: no I/O, no waiting. None where `authenticate` must ask the store.

        Raises `Refused` for a known key that may not come in. Integrations call this first, so that a hit
        makes no coroutine.
        """
        if len(presented) > MAX_LENGTH:  # before hashing: a megabyte of header costs nothing
            del presented
            raise Refused(Reason.MALFORMED_KEY)
        # BLAKE2b under a key of this process: no text of a key in memory, no collisions to be aimed at. The copy
        # has taken in its key already: 180 ns less than making one anew (of 890).
        hashed = self._keyed_hash()
        hashed.update(presented)
        del presented  # error reporters capture local variables, of a refusal's traceback too
        digest = hashed.digest()
        # Before the entry: a reading evicts first and renews trust last, so an entry that is found afterwards
        # was there when this trust was given. The other way round a revoked key would come in at an outage's end.
        trusted_until = self._cache.trusted_until
        entry = self._entry(digest)
        # The dict has compared already, but stops at the first difference.
        if entry is None or not hmac.compare_digest(entry.digest, digest):
            return None
        now = self._monotonic()
        if now >= entry.deadline or (now >= trusted_until and not self._cache.trusts(entry, now)):
            return None
        if entry.open and needs is None:
            return entry.identity
        return _let_in(entry, client, needs)

    # the steps of an uncached call

    def _recall(self, presented: bytes) -> tuple[bytes, Entry | None]:
        """Give a key's hash, and what the cache believes of it: unknown keys too."""
        hashed = self._keyed_hash()
        hashed.update(presented)
        digest = hashed.digest()
        return digest, self._cache.recall(digest, self._monotonic())

    def _look_up(self, presented: bytes, loop: object = None) -> tuple[bytes, Entry | Claim]:
        """Return a key's hash, and an entry to answer by or else the claim to ask the store with.

        ``loop`` is the event loop on which a flight for the same key would be. Raises `Refused`.
        """
        try:
            digest, entry = self._recall(presented)
            if entry is not None and not self._is_due(digest if loop is None else (loop, digest), entry):
                return digest, entry
            return digest, self._read(presented)
        finally:
            del presented

    def _read(self, presented: bytes) -> Claim:
        """Read a key: nothing after this needs its text. Raises `Refused`.

        The claim has no candidates where the issuer tag is of none of our peppers: it is forged, unless the store has
        a pepper that we lack.
        """
        claim = read(presented, format=self.format, peppers=self._given)
        try:
            if not isinstance(claim, Refused):
                return claim
            bound = self._binds(self._monotonic())
            # Before it is parsed again: a flood ends here.
            if bound is not None and not bound.primary_missing:
                raise claim
            text = self.format.read(presented)
            if text is None:
                raise claim
            return Claim(text.environment, partition(presented), ())
        finally:
            del presented  # this frame is in the traceback of what it raises
            del claim  # no cycle of an error and its frame

    def _ask_under(self, claim: Claim) -> _Asked:
        """Return what to ask the store under our peppers as they are now. Raises `Refused` for a forged key."""
        if not claim.candidates:
            bound = self._binds(self._monotonic())
            if bound is None:
                return _Asked(claim, None, claim)
            _check_primary(bound)
            raise Refused(Reason.MALFORMED_KEY)
        if claim.foreign and self.format.foreign is None:
            self._check_foreign(claim)
        ring = self._bound.ring
        candidates = ring.still(claim.candidates)
        asked = claim if len(candidates) == len(claim.candidates) else claim._replace(candidates=candidates)
        return _Asked(asked, ring, claim)

    def _check_foreign(self, claim: Claim) -> None:
        """Refuse a key minted elsewhere while the store, by its last reading, holds none: no lookup is made."""
        now = self._monotonic()
        if not self._checked or not self._cache.minted_only(claim.partition, now):
            return
        bound = self._binds(now)
        if bound is None:
            return
        _check_primary(bound)
        at = datetime.fromtimestamp(self._clock.time(), UTC)
        _let_in(stand(claim, None, now=at, environment=self.environment), None, ())

    def _settle(self, digest: bytes, asked: _Asked, found: Found, sent: float) -> _Fetched | None:
        """Judge what a lookup found. None where a change overtook it: look again."""
        monotonic = self._monotonic()
        wall = self._clock.time()
        bound = self._bound
        if asked.ring is not bound.ring:
            return None  # the peppers changed meanwhile: it may be known by another digest, or by none
        # Before the filling, which tells whether it is still they who say so.
        until = bound.until if bound.told is None else self._cache.trust(bound.told.partition)
        standing = stand(
            asked.claim,
            found.record,
            now=datetime.fromtimestamp(wall, UTC),
            environment=self.environment,
            vouched_by=self.id,
        )
        if standing.identity is None:
            _check_primary(bound)
        entry, kept = self._cache.fill(
            digest,
            standing,
            found.epochs,
            monotonic=monotonic,
            wall=wall,
            told=bound.told,
        )
        if not kept and bound.told is not None and self._watcher is not None:
            self._watcher.wake()
        # As old as the older of the two: what the store said of the key, and of the peppers it was found with.
        sent = min(sent, until - self.max_staleness)
        return None if entry is None else _Fetched(entry, sent)

    def _usable(self, fetched: _Fetched) -> bool:
        """Tell whether a fetched answer is still fresh, by a clock read after every wait."""
        now = self._monotonic()
        return now < fetched.sent + self.max_staleness and now < self._cache.ends(fetched.entry)

    def _is_due(self, name: object, entry: Entry) -> bool:
        """Whether the caller should fetch an entry that is believed: it is late in its life, and nobody else does."""
        return self._monotonic() >= entry.deadline and name not in self._flights

    def _heard(self) -> None:
        """Take in that the store was read."""
        self._breaker.succeeded()

    def _hears_nothing(self) -> bool:
        """Whether the watcher hears nothing from the store either. Where there is none, nobody says otherwise."""
        watcher = self._watcher
        return watcher is None or not watcher.alive or watcher.hears_nothing()

    def _listen(self) -> None:
        watcher = self._watcher
        if watcher is not None:
            watcher.wake()

    def _look_over(self) -> None:
        """Check the store, in the watcher's thread: it may be in order again, and nobody calls."""
        if self._checked:
            return
        try:
            sent = self._monotonic()
            self._take(self._store.describe(), sent)
        except (StoreUnavailable, ConfigurationError) as error:
            self._breaker.note(error)

    def _binds(self, now: float) -> _Bound | None:
        """Give our peppers with their statuses of some moment within `max_staleness`; None where those are not known.

        Threads may each bind: whoever goes on from what this gives speaks of one record.
        """
        bound, told = self._bound, self._cache.told(now)
        if told is None:
            return bound if now < bound.until else None
        if told is bound.told:
            return bound
        try:
            return self._bind(told.installation, told.peppers, told=told)
        except ConfigurationError:  # which `check` raises too, where the store says the same when asked
            return None

    def _bind(
        self,
        installation: str,
        peppers: Sequence[PepperRecord],
        *,
        told: Told | None = None,
        until: float = NEVER,
    ) -> _Bound:
        """Hold our peppers against the store's record of them. Raises `ConfigurationError`."""
        ring = self._given.bound_to(installation, {record.id: record[1:] for record in peppers})
        held = self._bound.ring  # read once: another thread may put its own there
        bound = self._bound = _Bound(
            held if ring == held else ring,  # that of the claims under way
            ring.primary_missing,
            told,
            until,
        )
        return bound

    def _take(self, description: Description, sent: float) -> None:
        """Bind our peppers by what the store said when we asked. Raises `ConfigurationError`."""
        self._bind(description.installation, description.peppers, until=sent + self.max_staleness)
        self._checked = True

    def _ready(self, now: float) -> bool:
        """Tell whether the store was checked, our peppers were held against its, and the watcher runs."""
        return self._checked and self._binds(now) is not None and (not self._watch or self._is_watching())

    def _is_contradicted(self, now: float) -> bool:
        """Tell whether the peppers that readings tell are not ours."""
        return self._cache.told(now) is not None and self._binds(now) is None

    def _is_watching(self) -> bool:
        watcher = self._watcher
        return watcher is not None and watcher.alive

    def refresh(self) -> None:
        """Read the store's epoch now, in this thread. For apps that run without a watcher (``watch=False``).

        Raises `StoreUnavailable`.
        """
        notice_fork()
        with self._starting:
            watcher = self._made_watcher()
        watcher.poll()

    def watch(self) -> None:
        """Start the watcher's thread, whatever the store says, unless it runs. Asks nobody in this thread.

        Raises `Overloaded` where the machine gives no thread for it.

        Do not call it before the server forks: a child has no watcher, and starts its own at its first uncached call
        or look at its readiness.
        """
        if not self._watch or self._closed or self._is_watching():
            return
        with self._watching:
            with self._starting:
                watcher = self._made_watcher()
            watcher.start()

    def _made_watcher(self) -> Watcher:
        watcher = self._watcher
        if watcher is None:
            watcher = self._watcher = Watcher(
                self._cache, self._store.feed(), self._clock, max_staleness=self.max_staleness
            )
            watcher.on_success.append(self._look_over)
            watcher.on_failure.append(self._breaker.unheard)
        return watcher

    def _first_reading(self) -> Future[None] | None:
        """Return what ends with the watcher's first reading, after which fills are kept; None where it is over."""
        watcher = self._watcher
        return None if not self._watch or watcher is None or watcher.first.done() else watcher.first

    def _stop_watching(self) -> None:
        notice_fork()
        with self._starting:
            watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()

    def _detach_flights(self) -> None:
        # Those who wait go on waiting; who comes after a change asks anew.
        self._flights.clear()

    def _without_store(
        self, digest: bytes, client: str | Address | None, needs: str | Sequence[str] | None, error: Exception
    ) -> Identity:
        """Answer by an entry that is still good, by a stale one where that is wanted, or refuse."""
        if isinstance(error, StoreUnavailable):
            entry = self._cache.recall(digest, self._monotonic())
            if entry is not None:
                return _let_in(entry, client, needs)
        if self._max_age is not None and isinstance(error, StoreUnavailable):
            entry = self._cache.recall_stale(digest, self._monotonic(), self._max_age)
            if entry is not None:
                identity = replace(_let_in(entry, client, needs), stale=True)
                self._stale_answers += 1
                return identity
        raise Refused(Reason.STORE_UNAVAILABLE) from error

    def health(self) -> Health:
        """Tell how it is. Asks nobody: cheap enough for any health check."""
        notice_fork()
        breaker, now = self._breaker, self._monotonic()
        reasons = self._unready(now)
        return Health(
            ok=reasons in ((), ("no_recent_reading",)),
            watching=self._is_watching(),
            trusted_for=max(0.0, self._cache.trusted_until - now),
            known=len(self._cache.entries),
            unknown=len(self._cache.unknown),
            outages=breaker.outages,
            stale_answers=self._stale_answers,
            error=breaker.error,
            ready=not reasons or self._serves_stale(now),
            reasons=reasons,
        )

    def _unready(self, now: float) -> tuple[Unready, ...]:
        found: dict[Unready, bool] = {
            "not_checked": not self._checked,
            "store_unavailable": self._breaker.is_open,
            "peppers_contradict": self._is_contradicted(now),
            "no_recent_reading": now >= self._cache.trusted_until,
        }
        return tuple(reason for reason, so in found.items() if so)

    def _serves_stale(self, now: float) -> bool:
        """Whether known keys are let in although the store cannot be asked."""
        if self._max_age is None or not self._cache.entries or self._is_contradicted(now):
            return False
        return now < self._cache.trusted_until - self.max_staleness + self._max_age

    def _too_slow(self) -> StoreUnavailable:
        error = StoreUnavailable("the store takes longer than the timeout")
        error.own_timer = True
        self._breaker.doubt(error)
        return error

    def _check_room(self, claim: Claim) -> None:
        """Raise `StoreUnavailable` where no lookup may begin now."""
        budget = self._invented if claim.foreign else self._minted
        if len(budget.under_way) >= budget.most:
            raise _overloaded()
        self._breaker.check()

    def _take_off(self, name: object, flight: _F, claim: Claim) -> None:
        (self._invented if claim.foreign else self._minted).under_way.add(flight)
        self._flights[name] = flight

    def _land(self, name: object, flight: _F) -> None:
        self._minted.under_way.discard(flight)
        self._invented.under_way.discard(flight)
        if self._flights.get(name) is flight:
            self._flights.pop(name, None)  # no del: a change may detach it in between

    def before_fork(self) -> None:
        """Hold the cache still."""
        self._starting.acquire()
        self._cache.before_fork()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child without cache, flights and watcher."""
        self._cache.after_fork(child=child)
        if child:
            self._reset()
        else:
            self._starting.release()


def _let_in(entry: Judged, client: str | Address | None, needs: str | Sequence[str] | None) -> Identity:
    answer = admit(entry, client=client, needs=needs)
    if isinstance(answer, Refused):
        try:
            raise answer
        finally:
            # An error whose frame holds it is a cycle: it would keep the whole request until the collector comes by.
            del answer
    return answer


def _overloaded() -> Overloaded:
    return Overloaded("too many lookups are under way: the store is slower than the calls come in")


def _check_primary(bound: _Bound) -> None:
    if bound.primary_missing:
        raise StoreUnavailable(
            "keys are digested under a pepper this app does not have, so it cannot tell unknown keys: "
            "add the store's primary pepper"
        )


def _check_outage_policy(on_outage: str, max_age: float | None, max_staleness: float) -> None:
    if on_outage not in ("refuse", "serve_cached"):
        raise ConfigurationError("on_outage is 'refuse' or 'serve_cached'")
    if (on_outage == "serve_cached") != (max_age is not None):
        raise ConfigurationError(
            "on_outage='serve_cached' and max_age go together: max_age is how long a revoked key may live on"
        )
    if max_age is not None and max_age < max_staleness:
        raise ConfigurationError("max_age must be at least max_staleness, whose place it takes in an outage")


class Authenticator(_Engine[_Flight]):
    """Validates keys for threads.

    ``store`` is a URL or an opened `Store` (which stays the caller's to close); ``environment`` the one this
    app accepts. Options:

    - ``peppers``: a `PepperRing`; from the environment variables where none is given.
    - ``format``: a `KeyFormat`.
    - ``max_staleness`` (seconds): the promise. No key is accepted later than that after it was disabled.
    - ``max_known``, ``max_unknown`` (entries): bounds of the cache.
    - ``lifetime`` (seconds): how long an entry may be kept without asking again, whatever the epoch says. In its last
      tenth one caller fetches it anew, while the others, and he too where the store fails, are answered from it.
    - ``timeout`` (seconds): how long a call waits for a lookup that another call has begun.
    - ``on_outage``: ``"refuse"`` answers 503 while the store cannot be asked; ``"serve_cached"`` goes on letting in
      keys it knows, by what the store said at most ``max_age`` seconds ago, which then takes the place of
      ``max_staleness`` in the promise. Such identities say ``stale``.
    - ``max_flights``: how many lookups of keys with a valid issuer tag may be under way. Calls beyond that meet 503.
    - ``max_foreign_flights``: the same for all other keys, which anybody can invent, so that these never use the
      former's room. At most four of them ask the store at a time.
    - ``clock``: where time comes from. ``watch=False``: no thread; the app calls `refresh`, more often than every
      ``max_staleness`` seconds, or nothing is remembered.

    Raises `ConfigurationError` at once for what is set up wrongly.
    """

    def __init__(self, store: str | Store, *, environment: str, **options: Unpack[Options]) -> None:
        self._url = store if isinstance(store, str) else None
        super().__init__(
            open_store(store) if isinstance(store, str) else store, environment=environment, **options
        )

    def start(self) -> None:
        """Check the peppers against the store and start watching it; otherwise the first call does.

        Raises `ConfigurationError` for peppers that are not this store's, `StoreUnavailable` when it cannot
        answer (a later call tries again).
        """
        if self._closed and self._url is not None:
            self._store, self._closed = open_store(self._url), False
        self.watch()
        self.check()
        first = self._first_reading()
        if first is not None:
            try:
                error = first.exception(self._timeout)
            except TimeoutError:
                raise self._too_slow() from None
            if error is not None:
                raise StoreUnavailable(str(error)) from error
        self.check()  # the first reading may have brought a change of peppers

    def check(self) -> None:
        """Check the peppers against the store, without starting a thread: may be called before a fork.

        Raises as `start` does.
        """
        sent = self._monotonic()
        if not self._checked or self._binds(sent) is None:
            self._take(self._store.describe(), sent)

    def authenticate(
        self,
        presented: str | bytes,
        *,
        client: str | Address | None = None,
        needs: str | Sequence[str] | None = None,
    ) -> Identity:
        """Give the identity a key proves, or raise `Refused`. Any text or bytes may be presented.

        ``client`` is the caller's address, for keys bound to networks; ``needs`` the rights the call takes,
        each ``"<permission>:<operation>"``, None for none. Raises `InvalidInput` for a need that is not written so,
        and for needs that are empty.
        """
        if isinstance(presented, str):
            presented = presented.encode("utf-8", "surrogatepass")
        try:
            identity = self.cached(presented, client, needs)
            if identity is not None:
                return identity
            digest, found = self._look_up(presented)
        finally:
            del presented  # no frame holds a key while the store is asked, nor in the traceback of a refusal
        if isinstance(found, Entry):
            return _let_in(found, client, needs)
        return self._verify(digest, found, client, needs)

    # Apart, so that a hit has a small frame.
    def _verify(
        self,
        digest: bytes,
        claim: Claim,
        client: str | Address | None,
        needs: str | Sequence[str] | None,
    ) -> Identity:
        try:
            asked = self._ask_under(claim)
            for _ in range(2):  # an answer that grew old while we waited for it is fetched once more
                fetched = self._fly(digest, asked)
                if self._usable(fetched):
                    return _let_in(fetched.entry, client, needs)
            raise StoreUnavailable("the store answers more slowly than max_staleness allows")
        except (StoreUnavailable, ConfigurationError) as error:
            return self._without_store(digest, client, needs, error)

    def _fly(self, digest: bytes, asked: _Asked) -> _Fetched:
        """Fetch, or wait for who is fetching the same key."""
        mine = _Flight()
        with self._starting:
            flight = self._flights.get(digest)
            if flight is None:
                self._check_room(asked.claim)
                self._take_off(digest, mine, asked.claim)
        if flight is not None:
            try:
                return flight.result(self._timeout)
            except TimeoutError:
                raise self._too_slow() from None
        try:
            fetched = (
                self._fetch_in_line(digest, asked) if asked.claim.foreign else self._fetch(digest, asked)
            )
        except BaseException as error:
            # Those who wait are not to be ended by this thread's KeyboardInterrupt.
            mine.crash(
                error if isinstance(error, Exception) else StoreUnavailable("the lookup was broken off")
            )
            raise
        else:
            mine.land(fetched)
            return fetched
        finally:
            with self._starting:
                self._land(digest, mine)
            del mine  # which holds the error, see `_let_in`

    def _fetch_in_line(self, digest: bytes, asked: _Asked) -> _Fetched:
        """Fetch among the few at a time that are of keys anybody can invent."""
        lane = self._invented.lane.now()
        try:
            lane.get(timeout=self._timeout)
        except Empty:
            raise _overloaded() from None
        try:
            return self._fetch(digest, asked)
        finally:
            lane.put(None)

    def _fetch(self, digest: bytes, asked: _Asked) -> _Fetched:
        for _ in range(_LOOKUPS):
            sent = self._monotonic()
            if not self._ready(sent):
                with self._breaker:
                    self.start()
                sent = self._monotonic()
            if asked.ring is not self._bound.ring:  # our peppers may be of another status now
                asked = self._ask_under(asked.full)
            with self._breaker:
                found = self._store.lookup(asked.claim)
            fetched = self._settle(digest, asked, found, sent)
            if fetched is not None:
                return fetched
        raise StoreUnavailable("the store keeps answering from before its own last change")

    def close(self) -> None:
        """Stop watching; close the store if it was opened from a URL. `start` opens it again."""
        self._stop_watching()
        if self._url is not None:
            self._closed = True
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Loop(NamedTuple):
    """What belongs to one event loop."""

    patience: Patience
    lane: asyncio.Semaphore


class AsyncAuthenticator(_Engine["asyncio.Future[_Fetched | None]"]):
    """Validates keys for event loops. See `Authenticator`; ``store`` may be an opened `AsyncStore`.

    Cancellation of a caller ends the lookup it began; of those who wait for the same key, one begins another.
    """

    def __init__(self, store: str | AsyncStore, *, environment: str, **options: Unpack[Options]) -> None:
        self._url = store if isinstance(store, str) else None
        self._async_store: AsyncStore = open_async_store(store) if isinstance(store, str) else store
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        super().__init__(self._async_store.sync, environment=environment, **options)

    async def start(self) -> None:
        """See `Authenticator.start`."""
        if self._closed and self._url is not None:
            self._async_store, self._closed = open_async_store(self._url), False
            self._store = self._async_store.sync
        self.watch()
        await self._check()
        first = self._first_reading()
        if first is not None:
            try:
                await asyncio.shield(asyncio.wrap_future(first))  # who leaves must not end it for others
            except StoreUnavailable as error:
                raise StoreUnavailable(str(error)) from error
        await self._check()

    async def _check(self) -> None:
        sent = self._monotonic()
        if not self._checked or self._binds(sent) is None:
            self._take(await self._async_store.describe(), sent)

    async def authenticate(
        self,
        presented: str | bytes,
        *,
        client: str | Address | None = None,
        needs: str | Sequence[str] | None = None,
    ) -> Identity:
        """See `Authenticator.authenticate`."""
        if isinstance(presented, str):
            presented = presented.encode("utf-8", "surrogatepass")
        try:
            identity = self.cached(presented, client, needs)
            if identity is not None:
                return identity
            digest, found = self._look_up(presented, asyncio.get_running_loop())
        finally:
            del presented  # no frame holds a key while the store is asked, nor in the traceback of a refusal
        if isinstance(found, Entry):
            return _let_in(found, client, needs)
        return await self._verify(digest, found, client, needs)

    # Apart, so that a hit has a small frame: 40 ns of a coroutine's 900.
    async def _verify(
        self,
        digest: bytes,
        claim: Claim,
        client: str | Address | None,
        needs: str | Sequence[str] | None,
    ) -> Identity:
        try:
            asked = self._ask_under(claim)
            for _ in range(2):  # an answer that grew old while we waited for it is fetched once more
                fetched = await self._fly(digest, asked)
                if self._usable(fetched):
                    return _let_in(fetched.entry, client, needs)
            raise StoreUnavailable("the store answers more slowly than max_staleness allows")
        except (StoreUnavailable, ConfigurationError) as error:
            return self._without_store(digest, client, needs, error)

    async def _fly(self, digest: bytes, asked: _Asked) -> _Fetched:
        """Fetch, or wait for who is fetching the same key."""
        loop = asyncio.get_running_loop()
        name = loop, digest
        mine = self._loops.get(loop) or self._meet(loop)
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets the answer.
            with mine.patience.bound() as bound:
                while True:
                    flight = self._flights.get(name)
                    if flight is None:
                        return await self._lead(name, asked, mine.lane, bound)
                    fetched = await asyncio.shield(flight)
                    if fetched is not None:  # else its caller was cancelled
                        return fetched
        except TimeoutError:
            raise self._too_slow() from None

    def _meet(self, loop: asyncio.AbstractEventLoop) -> _Loop:
        for other in [other for other in [*self._loops] if other.is_closed()]:  # other threads add theirs
            self._loops.pop(other, None)
        made = self._loops[loop] = _Loop(Patience(self._timeout), asyncio.Semaphore(_FOREIGN_AT_ONCE))
        return made

    async def _lead(
        self,
        name: tuple[asyncio.AbstractEventLoop, bytes],
        asked: _Asked,
        lane: asyncio.Semaphore,
        bound: Bound,
    ) -> _Fetched:
        """Fetch in the caller's own task: another one would cost 12 µs (of 60)."""
        self._check_room(asked.claim)
        flight: asyncio.Future[_Fetched | None] = name[0].create_future()
        self._take_off(name, flight, asked.claim)
        fetched = None
        try:
            if asked.claim.foreign:
                fetched = await self._fetch_in_line(name[1], asked, lane, bound)
            else:
                fetched = await self._fetch(name[1], asked)
        except BaseException as error:
            if isinstance(error, Exception) or bound.expired:  # the store is as slow for those who wait
                flight.set_exception(error if isinstance(error, Exception) else TimeoutError())
                flight.exception()  # looked at: it is not lost where nobody waits
            raise
        finally:
            if not flight.done():
                flight.set_result(fetched)
            self._land(name, flight)
            del flight  # which holds the error, see `_let_in`
        return fetched

    async def _fetch_in_line(
        self, digest: bytes, asked: _Asked, lane: asyncio.Semaphore, bound: Bound
    ) -> _Fetched:
        """See `Authenticator._fetch_in_line`."""
        try:
            await lane.acquire()
        except asyncio.CancelledError:
            if bound.is_why():
                raise _overloaded() from None
            raise
        try:
            return await self._fetch(digest, asked)
        finally:
            lane.release()

    async def _fetch(self, digest: bytes, asked: _Asked) -> _Fetched:
        for _ in range(_LOOKUPS):
            sent = self._monotonic()
            if not self._ready(sent):
                with self._breaker:
                    await self.start()
                sent = self._monotonic()
            if asked.ring is not self._bound.ring:  # our peppers may be of another status now
                asked = self._ask_under(asked.full)
            with self._breaker:
                found = await self._async_store.lookup(asked.claim)
            fetched = self._settle(digest, asked, found, sent)
            if fetched is not None:
                return fetched
        raise StoreUnavailable("the store keeps answering from before its own last change")

    async def aclose(self) -> None:
        """See `Authenticator.close`."""
        await asyncio.to_thread(self._stop_watching)
        if self._url is not None:
            self._closed = True
            await self._async_store.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
