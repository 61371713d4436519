"""Stores: what each must do, and how one is opened by its URL.

A store is three things: a lookup for verifiers, a change feed for their caches, and administration. Only the
last can write, and it writes columns by name: nothing on the request path can touch a status.

Every change is one transaction that also appends to the change log. The log is journal, change list and epoch
in one; its tip, a sequence number with a random nonce, **is** the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final, NamedTuple, Protocol, TypedDict

from ..digest import PepperStatus
from ..exceptions import ConfigurationError
from ..model import Grant, Key, Machine, Network, Record, Status
from ..verify import Claim

ENTRY_POINT: Final = "papaours_auth.stores"
_BUILT_IN: Final = {
    "memory": "memory", "sqlite": "sqlite",
    "redis": "redis", "rediss": "redis", "redis+cluster": "redis", "redis+sentinel": "redis",
    "postgresql": "sql", "mysql": "sql", "mariadb": "sql", "sqlalchemy+sqlite": "sql",
}  # fmt: skip
_EXTRAS: Final = {"sqlalchemy": "sql", "redis": "redis"}


class Epoch(NamedTuple):
    """The tip of a change log. Equal epochs mean equal histories: the nonce is random, 16 bytes."""

    seq: int
    nonce: bytes


class Change(NamedTuple):
    """One entry of the journal. ``kind`` is ``"key.disabled"`` and the like, ``subject`` the id it is about.

    ``before`` and ``after`` hold the columns that changed, as JSON text; never a key or a digest.
    """

    epoch: Epoch
    at: datetime
    actor: str
    kind: str
    subject: str
    before: str
    after: str


class Found(NamedTuple):
    """What a lookup finds, and the epoch of each partition it looked at, all from one snapshot."""

    record: Record | None
    epochs: Mapping[int, Epoch]


class PepperRecord(NamedTuple):
    """What the store knows of a pepper: enough to recognise it (`Pepper.proof`), and what it may do."""

    id: str
    proof: bytes
    status: PepperStatus


class News(NamedTuple):
    """A partition's epoch, and the changes since the one last known: None where that one is not in the log.

    ``peppers``: of the one partition whose log tells of changes of peppers, all there are at that epoch (one
    snapshot); None in the others' news. Verifiers keep nothing that was judged by peppers told in another way.

    ``minted_only``: those values of `Claim.partition` whose keys this log tells of, and under which no foreign key
    was ever added. Verifiers answer "unknown" to foreign keys there without a lookup. A store forgets such a value
    in the same step as the change that adds the first foreign key, and for good. What is not told is looked up.
    """

    epoch: Epoch
    changes: Sequence[tuple[str, str]] | None  # (kind, subject)
    peppers: Sequence[PepperRecord] | None = None
    minted_only: Collection[int] = ()


class Reading(NamedTuple):
    """One reading of a feed: whose store it is, and news of each partition that could be read."""

    installation: str
    news: Mapping[int, News]


class Description(NamedTuple):
    """Whose store this is, and its peppers."""

    installation: str
    peppers: tuple[PepperRecord, ...]


class Author(NamedTuple):
    """Who makes a change, and when (aware, UTC): for the journal."""

    actor: str
    at: datetime


class KeyColumns(TypedDict, total=False):
    """The columns of a key that administration may change."""

    name: str
    status: Status
    expires_at: datetime | None
    networks: tuple[Network, ...]


class MachineColumns(TypedDict, total=False):
    """The columns of a machine that administration may change."""

    name: str
    description: str
    organisation: str
    status: Status
    grants: tuple[Grant, ...]


class Feed(Protocol):
    """The change feed of a store, for one watcher thread. Blocking, also for an async store."""

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        """Read the epochs from the primary, what changed since those known, and the peppers.

        Raises `StoreUnavailable`.
        """

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or earlier when something may have changed or `wake` is called."""

    def wake(self) -> None:
        """End a `wait` in another thread, or the next one."""

    def close(self) -> None:
        """Let go of what it holds. It may be read again afterwards."""


class Lookup(Protocol):
    """What a verifier needs of a store. All raise `StoreUnavailable` when it cannot answer.

    Where it was not asked, because a queue on this side is full, they raise `Overloaded`: that is no outage. An async
    store whose own timer ended a call sets ``own_timer`` on the error, since the event loop may have been stalled.
    """

    def lookup(self, claim: Claim) -> Found:
        """Find the record stored under one of the claim's digests, from one snapshot."""

    def describe(self) -> Description:
        """Tell whose store this is. Without its installation mark a store is unavailable, not empty."""

    def feed(self) -> Feed:
        """Make a change feed for one watcher."""

    def close(self) -> None:
        """Close it. A closed store raises `StoreUnavailable`."""


class Store(Lookup, Protocol):
    """A store: lookup, feed, and administration.

    Administration raises `StoreUnavailable`, `NotFound` or `Conflict`; after any of them nothing changed.
    An update that changes nothing appends nothing to the journal.
    """

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """Record a pepper. `Conflict` where its id is taken."""

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """Change what a pepper may do. Making one primary makes the former primary ``accept``."""

    def count_digests(self, pepper_id: str) -> int:
        """Count the keys digested under a pepper."""

    def add_machine(self, machine: Machine, author: Author) -> None:
        """Add a machine. `Conflict` where its id is taken."""

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """Change columns of a machine and give it as it is then."""

    def delete_machine(self, machine_id: str, author: Author) -> None:
        """Delete a machine and its keys, irrevocably."""

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """List machines, oldest first: all, or those with this id or exact name."""

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """Add a key under its claim's first digest. `Conflict` where any of them or the id is there already.

        A foreign claim ends `News.minted_only` for its partition, in the same step.
        """

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """Change columns of a key and give it as it is then."""

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """List keys, oldest first: all, or those with this id or exact name, or of this machine."""

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """List changes, newest first."""


class AsyncStore(Protocol):
    """The verifying half of a store for event loops. ``sync`` is its blocking twin over the same data.

    The twin serves administration and the watcher's thread, neither of which is on the request path.
    """

    @property
    def sync(self) -> Store:
        """The blocking twin."""

    async def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""

    async def describe(self) -> Description:
        """See `Lookup.describe`."""

    async def aclose(self) -> None:
        """Close it, and its twin."""


class Driver(Protocol):
    """What a URL's scheme stands for: a module, or what an entry point names."""

    @property
    def open_store(self) -> Callable[[str, bool], Store]:
        """Called with the URL and whether to create or migrate the store."""

    @property
    def open_async_store(self) -> Callable[[str, bool], AsyncStore]:
        """Called likewise; must not block on a network."""


def open_store(url: str, *, create: bool = False) -> Store:
    """Open a store by URL: ``memory://``, ``sqlite:///relative.db``, ``sqlite:////absolute.db``, or a SQL server's.

    ``create`` makes or migrates it; without, one that is not there is a `ConfigurationError`, as are an
    unknown scheme and a store of another schema. Schemes of other packages come by the entry point group
    ``papaours_auth.stores``. Raises `StoreUnavailable` where the store is right but cannot answer now.
    """
    return _driver(url).open_store(url, create)


def open_async_store(url: str, *, create: bool = False) -> AsyncStore:
    """Open a store for event loops: as `open_store`, without waiting for a network."""
    return _driver(url).open_async_store(url, create)


def _driver(url: str) -> Driver:
    # Only the scheme is ever quoted: what follows may hold a password.
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigurationError(
            "the store is not written as a URL: use for example sqlite:///papaours.db (PAPAOURS_STORE)"
        )
    if scheme in _BUILT_IN:
        return _import(scheme)
    points = {point.name: point for point in entry_points(group=ENTRY_POINT)}
    if scheme in points:
        loaded: Driver = points[scheme].load()
        return loaded
    known = ", ".join(sorted({*_BUILT_IN, *points}))
    raise ConfigurationError(f"no store is known for {scheme!r} URLs: use one of {known} (PAPAOURS_STORE)")


def _import(scheme: str) -> Driver:
    try:
        driver: Driver = import_module(f"{__name__}.{_BUILT_IN[scheme]}")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise ConfigurationError(
            f"{scheme}:// stores need {error.name}: pip install 'papaours-auth[{_EXTRAS[error.name]}]'"
        ) from None
    return driver
