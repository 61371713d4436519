"""Keys and AsyncKeys: the administration of machines and keys. Never on the request path.

Every change is journalled with its author. Nothing here is reachable with an API key: no HTTP is served.
Update and deletion come in beside `Keys.disable_key`, each a rule here and a column in the store.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import unicodedata
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import update_wrapper
from typing import Concatenate, Final, ParamSpec, Self, TypeVar

from .cache import Clock
from .digest import PepperRing, peppers_from_environment
from .exceptions import Conflict, InvalidInput, NotFound, SystemMachineProtected
from .format import KeyFormat, Secret
from .model import EVERYWHERE, Grant, Key, Machine, Network, Status, parse_network, parse_right
from .stores import Author, Change, PepperRecord, Store, open_store
from .verify import Claim, partition

MAX_LABEL: Final = 200
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made, with its text: the only time it is seen."""

    key: Key
    secret: Secret


class Keys:
    """Creates, lists, disables and enables machines and keys.

    ``store`` is a URL or an opened store; ``actor`` is who the journal names. ``peppers`` are held against the
    store at once; where none are given, those of the environment variables are, when a key is first made:
    whoever must disable a key at night needs no pepper. A store without any takes the first as its primary.

    Methods take a machine or a key by id or exact name and raise `NotFound`, or `Conflict` where a name fits
    several; `SystemMachineProtected` for Papaours' own; `InvalidInput` for what cannot be; and
    `StoreUnavailable`. After an error nothing has changed.
    """

    def __init__(
        self,
        store: str | Store,
        *,
        peppers: PepperRing | None = None,
        format: KeyFormat | None = None,  # noqa: A002 - the field's own word
        actor: str = "app",
        clock: Clock = time,
    ) -> None:
        self._owned = isinstance(store, str)
        self._store: Store = open_store(store) if isinstance(store, str) else store
        self._format = format if format is not None else KeyFormat()
        self._actor = _label("actor", actor, self._format)
        self._clock = clock
        self._bound: PepperRing | None = None
        if peppers is not None:
            try:
                self._bound = self._bind(peppers)
            except BaseException:
                self.close()
                raise

    @property
    def _ring(self) -> PepperRing:
        if self._bound is None:
            self._bound = self._bind(peppers_from_environment())
        return self._bound

    def _bind(self, given: PepperRing) -> PepperRing:
        description = self._store.describe()
        if not description.peppers:
            first = given.primary
            _no_key("a pepper's id", first.id, self._format)
            record = PepperRecord(first.id, first.proof(description.installation), "primary")
            self._store.add_pepper(record, self._author())
            description = self._store.describe()
        return given.bound_to(
            description.installation, {record.id: record[1:] for record in description.peppers}
        )

    # machines

    def create_machine(
        self,
        name: str,
        *,
        organisation: str,
        description: str = "",
        rights: Iterable[str] = (),
        grants: Iterable[Grant] = (),
        system: bool = False,
    ) -> Machine:
        """Create a machine, active and without keys.

        ``rights`` are shorthand: ``"contrats:lecture"`` on its home organisation, or
        ``"contrats:lecture@org-a,org-b"`` on those named (``@*``: on all), in force while it stays at home
        here. ``grants`` say everything. A ``system`` machine can never be changed again.
        """
        organisation = _organisation(organisation, self._format)
        machine = Machine(
            id=f"machine_{secrets.token_hex(8)}",
            name=_name(name, self._format),
            organisation=organisation,
            status="active",
            created_at=self._now(),
            created_by=self._actor,
            description=_label("description", description, self._format, empty=True),
            system=system,
            grants=tuple(
                _checked(grant, self._format)
                for grant in (*(_granted(text, organisation, self._format) for text in rights), *grants)
            ),
        )
        self._store.add_machine(machine, self._author())
        return machine

    def machines(self) -> list[Machine]:
        """List all machines, oldest first."""
        return self._store.machines()

    def machine(self, id_or_name: str) -> Machine:
        """Give one machine."""
        return _one("machine", id_or_name, self._store.machines(id_or_name))

    def disable_machine(self, id_or_name: str) -> Machine:
        """Refuse every key of a machine from now on."""
        return self._set_machine_status(id_or_name, "inactive", "machine.disabled")

    def enable_machine(self, id_or_name: str) -> Machine:
        """Let a machine's active keys in again."""
        return self._set_machine_status(id_or_name, "active", "machine.enabled")

    def _set_machine_status(self, id_or_name: str, status: Status, kind: str) -> Machine:
        machine = _not_system(self.machine(id_or_name))
        return self._store.update_machine(machine.id, {"status": status}, kind, self._author())

    # keys

    def create_key(
        self,
        machine: str,
        *,
        name: str,
        environment: str,
        usage: str = "",
        expires: datetime | timedelta | None = None,
        networks: Iterable[str] = (),
    ) -> NewKey:
        """Mint a key for a machine. Its text is in the answer, and nowhere else ever again.

        ``expires`` is an aware time or a span from now; ``networks`` are addresses or CIDR blocks, outside
        which the key is refused.
        """
        owner = _not_system(self.machine(machine))
        secret = self._format.mint(environment, usage=usage, tag=self._ring.primary.tag)
        key = self._key(owner, secret, name, environment, usage, expires, networks)
        self._add(key, secret, "key.created")
        return NewKey(key, secret)

    def rotate_key(
        self, id_or_name: str, *, name: str | None = None, expires: datetime | timedelta | None = None
    ) -> NewKey:
        """Mint the key that is to replace another one: same machine, environment, usage and networks.

        The old key stays as it is, its own expiry included, until it is disabled once nothing uses it
        (document 05, "Renouvellement"). The new one is named ``name``, else as the old one with the next version
        (``v2``…), and expires at ``expires``, else after as long as the old one was made for.
        """
        old = self._changeable(id_or_name)
        owner = self.machine(old.machine_id)
        if expires is None and old.expires_at is not None:
            expires = old.expires_at - old.created_at
        secret = self._format.mint(old.environment, usage=old.usage, tag=self._ring.primary.tag)
        key = self._key(
            owner, secret, name or _next_version(old.name), old.environment, old.usage, expires, ()
        )
        key = key._replace(replaces=old.id, networks=old.networks)
        self._add(key, secret, "key.created")
        return NewKey(key, secret)

    def import_key(
        self,
        machine: str,
        secret: Secret | str,
        *,
        name: str,
        environment: str | None = None,
        expires: datetime | timedelta | None = None,
        networks: Iterable[str] = (),
    ) -> Key:
        """Take in a key minted elsewhere. Its digest is kept, its text is not.

        ``environment`` is the one its text names where none is given. A 36-character body is refused: those
        are minted here alone.
        """
        # First: no frame holds a key's text while the store is asked.
        secret = secret if isinstance(secret, Secret) else Secret(secret)
        owner = _not_system(self.machine(machine))
        text = self._format.read(secret.reveal().encode("utf-8", "surrogatepass"))
        if text is None:
            raise InvalidInput(
                f"this is no key: it must read {self._format.token}_<environment>_<body>, the body being "
                "12 to 128 letters and digits"
            )
        if not text.foreign:
            raise InvalidInput(
                "this key has a 36-character body: only Papaours mints those, create one instead"
            )
        key = self._key(owner, secret, name, environment or text.environment, text.usage, expires, networks)
        self._add(key, secret, "key.imported")
        return key

    def _key(
        self,
        machine: Machine,
        secret: Secret,
        name: str,
        environment: str,
        usage: str,
        expires: datetime | timedelta | None,
        networks: Iterable[str],
    ) -> Key:
        if environment not in self._format.environments:
            raise InvalidInput(
                f"environment {environment!r} does not exist: use one of {', '.join(self._format.environments)}"
            )
        _no_key("usage", usage, self._format)
        return Key(
            id=f"key_{secrets.token_hex(8)}",
            machine_id=machine.id,
            name=_name(name, self._format),
            environment=environment,
            usage=usage,
            last4=secret.reveal()[-4:],
            status="active",
            created_at=self._now(),
            created_by=self._actor,
            expires_at=self._expiry(expires),
            networks=tuple(_network(text) for text in networks),
        )

    def _add(self, key: Key, secret: Secret, kind: str) -> None:
        claim = self._claim(secret, key.environment, foreign=kind == "key.imported")
        self._store.add_key(key, claim, kind, self._author())

    def _claim(self, secret: Secret, environment: str, *, foreign: bool) -> Claim:
        """Return what a key is stored under: its digest under the primary pepper comes first."""
        presented = secret.reveal().encode("ascii")
        primary = self._ring.primary
        candidates = self._ring.candidates(presented)
        first = [candidate for candidate in candidates if candidate.pepper_id == primary.id]
        others = [candidate for candidate in candidates if candidate.pepper_id != primary.id]
        return Claim(environment, partition(presented), (*first, *others), foreign)

    def keys(self, machine: str | None = None) -> list[Key]:
        """List keys, oldest first: all, or a machine's. Inactive ones stay in the list."""
        return self._store.keys(machine_id=self.machine(machine).id if machine is not None else None)

    def key(self, id_or_name: str) -> Key:
        """Give one key."""
        return _one("key", id_or_name, self._store.keys(id_or_name))

    def rename_key(self, id_or_name: str, name: str) -> Key:
        """Change a key's label, and nothing else."""
        key = self._changeable(id_or_name)
        label = _name(name, self._format)
        return self._store.update_key(key.id, {"name": label}, "key.renamed", self._author())

    def disable_key(self, id_or_name: str) -> Key:
        """Refuse every call with a key from now on. It stays in the list, and can be enabled again."""
        key = self._changeable(id_or_name)
        return self._store.update_key(key.id, {"status": "inactive"}, "key.disabled", self._author())

    def enable_key(self, id_or_name: str) -> Key:
        """Let a key in again, with its original value."""
        key = self._changeable(id_or_name)
        return self._store.update_key(key.id, {"status": "active"}, "key.enabled", self._author())

    def _changeable(self, id_or_name: str) -> Key:
        key = self.key(id_or_name)
        _not_system(self.machine(key.machine_id))
        return key

    def printable(self, key: Key) -> str:
        """Name a key without giving it away: ``pk_prod_…x7Qz``."""
        return self._format.printable(key.environment, key.usage, key.last4)

    # the journal

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """List changes, newest first: all, or those about one id."""
        return self._store.journal(subject, limit=limit)

    def close(self) -> None:
        """Close the store if it was opened from a URL."""
        if self._owned:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    def _author(self) -> Author:
        return Author(self._actor, self._now())

    def _expiry(self, expires: datetime | timedelta | None) -> datetime | None:
        if expires is None:
            return None
        try:
            at = expires if isinstance(expires, datetime) else self._now() + expires
            if at.tzinfo is None:
                raise InvalidInput("expires has no time zone, so it names no moment: give an aware datetime")
            at = at.astimezone(UTC)
        except OverflowError:
            raise InvalidInput("expires is further away than the calendar goes") from None
        if at <= self._now():
            raise InvalidInput("expires lies in the past: the key would never be accepted")
        return at


def _label(argument: str, text: str, format: KeyFormat, *, empty: bool = False) -> str:  # noqa: A002
    text = text.strip()
    if not text and not empty:
        raise InvalidInput(f"{argument} is empty: people must be able to tell what it is")
    if len(text) > MAX_LABEL:
        raise InvalidInput(f"{argument} is longer than {MAX_LABEL} characters")
    if not text.isprintable():
        raise InvalidInput(f"{argument} has characters that cannot be shown")
    _no_key(argument, text, format)
    return text


def _no_key(argument: str, text: str, format: KeyFormat) -> None:  # noqa: A002
    if format.found_in(text):
        raise InvalidInput(f"{argument} contains a key, which would be shown in every list: leave it out")


_ID: Final = re.compile(r"(?:machine|key)_[0-9a-f]{16}", re.IGNORECASE)


def _name(text: str, format: KeyFormat) -> str:  # noqa: A002
    """Check the name of a machine or a key: people type one where they could type an id."""
    name = _label("name", text, format)
    if _ID.fullmatch(name):
        raise InvalidInput("name reads like an id, and could be taken for it: choose another")
    return name


def _organisation(text: str, format: KeyFormat) -> str:  # noqa: A002
    """Check the name of a machine's organisation: no right may read it as anything else."""
    name = _label("organisation", text, format)
    if re.search("[*@,]", unicodedata.normalize("NFKC", name)):
        raise InvalidInput("organisation has a '*', '@' or ',' in its name: rights are written with them")
    return name


def _checked(grant: Grant, format: KeyFormat) -> Grant:  # noqa: A002
    _no_key("a right", grant.permission, format)
    for name in (*grant.organisations, *grant.perimeter):
        _label("a right's organisation", name, format)
    return grant


_VERSION: Final = re.compile(r"(?P<rest>.* )v(?P<number>\d{1,6})")


def _next_version(name: str) -> str:
    match = _VERSION.fullmatch(name)
    return f"{match['rest']}v{int(match['number']) + 1}" if match else f"{name} v2"


def _granted(text: str, home: str, format: KeyFormat) -> Grant:  # noqa: A002
    wanted, at, named = text.partition("@")
    permission, _, operation = parse_right(wanted).partition(":")
    if not at:
        return Grant(permission, operation, (home,), (home,))
    if named.strip() == EVERYWHERE:
        return Grant(permission, operation, (EVERYWHERE,), (EVERYWHERE,))
    if not named.strip():
        raise InvalidInput("a right names no organisation after '@': write 'contrats:lecture@org-a,org-b'")
    organisations = tuple(_organisation(name, format) for name in named.split(","))
    return Grant(permission, operation, organisations, tuple({home: None} | dict.fromkeys(organisations)))


def _network(text: str) -> Network:
    try:
        return parse_network(text)
    except ValueError:
        raise InvalidInput(
            "a network is an address or a CIDR block without host bits, as in 192.0.2.0/24 or 2001:db8::/32"
        ) from None


_Item = TypeVar("_Item", Machine, Key)


def _one(noun: str, id_or_name: str, found: list[_Item]) -> _Item:
    exact = [item for item in found if item.id == id_or_name] or found
    if not exact:
        raise NotFound(f"there is no {noun} with this id or exact name")
    if len(exact) > 1:
        ids = ", ".join(item.id for item in exact)
        raise Conflict(f"{len(exact)} {noun}s have this name: say which by its id ({ids})")
    return exact[0]


def _not_system(machine: Machine) -> Machine:
    if machine.system:
        raise SystemMachineProtected(
            f"{machine.id} is a system machine: neither it nor its rights nor its keys can be changed"
        )
    return machine


def _in_thread(
    method: Callable[Concatenate[Keys, _P], _R],
) -> Callable[Concatenate[AsyncKeys, _P], Awaitable[_R]]:
    def call(self: AsyncKeys, /, *args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_R]:
        return asyncio.to_thread(method, self.sync, *args, **kwargs)

    update_wrapper(call, method)
    return call


class AsyncKeys:
    """`Keys` for event loops: each method is the one of the same name, awaited, run in a thread.

    Administration is rare and never on the request path, so a thread costs nothing that matters, and there
    is one set of rules.
    """

    def __init__(self, keys: Keys) -> None:
        self.sync = keys

    create_machine = _in_thread(Keys.create_machine)
    machines = _in_thread(Keys.machines)
    machine = _in_thread(Keys.machine)
    disable_machine = _in_thread(Keys.disable_machine)
    enable_machine = _in_thread(Keys.enable_machine)
    create_key = _in_thread(Keys.create_key)
    rotate_key = _in_thread(Keys.rotate_key)
    import_key = _in_thread(Keys.import_key)
    keys = _in_thread(Keys.keys)
    key = _in_thread(Keys.key)
    rename_key = _in_thread(Keys.rename_key)
    disable_key = _in_thread(Keys.disable_key)
    enable_key = _in_thread(Keys.enable_key)
    journal = _in_thread(Keys.journal)
    aclose = _in_thread(Keys.close)
