"""The nouns: machines carry rights, their keys prove who calls, an identity is what an app gets to see.

All are frozen, slotted and typed. Times are aware datetimes in UTC.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal, NamedTuple, TypeAlias

from .exceptions import InvalidInput

Status = Literal["active", "inactive"]
Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address

OPERATIONS: Final = ("lecture", "écriture", "suppression", "archivage")
EVERYWHERE: Final = "*"
"""In a grant's organisations or perimeter: all of them."""


class Unset(Enum):
    """An argument that was left out. ``None`` may be a value that the caller failed to find."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return self.name


UNSET: Final = Unset.UNSET

_RESERVED: Final = re.compile("[:@,*]")  # what rights are written with
_MAPPED_BITS: Final = 96
"""Of an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2): what stands before the IPv4 address."""
_FOLDED: Final = {"ecriture": "écriture"}  # typed without its accent on many keyboards


def right(permission: str, operation: str) -> str:
    """Join the two into a right's one spelling, ``"contrats:lecture"``. Raises `InvalidInput`."""
    permission = unicodedata.normalize("NFC", permission).strip()
    operation = unicodedata.normalize("NFC", operation).strip().lower()
    operation = _FOLDED.get(operation, operation)
    if (
        not permission
        or _RESERVED.search(permission)
        or any(c.isspace() or not c.isprintable() for c in permission)
    ):
        raise InvalidInput(
            "a right's permission is one word without ':', '@', ',' and '*', as in 'contrats:lecture'"
        )
    if operation not in OPERATIONS:
        raise InvalidInput(f"a right's operation is one of {', '.join(OPERATIONS)}")
    return f"{permission}:{operation}"


@lru_cache(maxsize=1024)
def parse_right(text: str) -> str:
    """Read ``"<permission>:<operation>"`` into its one spelling. Raises `InvalidInput`."""
    permission, colon, operation = text.partition(":")
    if not colon:
        raise InvalidInput("a right is written '<permission>:<operation>', as in 'contrats:lecture'")
    return right(permission, operation)


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission and an operation, on some organisations, through a role with a perimeter.

    It counts only while the machine's home organisation is inside the perimeter. ``"*"`` stands for every
    organisation; an empty tuple for none. It is never an organisation's name: a machine at home in ``"*"`` has
    no rights.
    """

    permission: str
    operation: str
    organisations: tuple[str, ...]
    perimeter: tuple[str, ...]

    def __post_init__(self) -> None:
        permission, _, operation = right(self.permission, self.operation).partition(":")
        object.__setattr__(self, "permission", permission)
        object.__setattr__(self, "operation", operation)

    @property
    def right(self) -> str:
        """The right it gives, ``"<permission>:<operation>"``."""
        return f"{self.permission}:{self.operation}"

    def counts_for(self, organisation: str) -> bool:
        """Tell whether it counts for a machine whose home organisation this is."""
        if organisation == EVERYWHERE:
            return False
        return EVERYWHERE in self.perimeter or organisation in self.perimeter

    def covers(self, organisation: str) -> bool:
        """Tell whether it reaches this organisation's data."""
        return EVERYWHERE in self.organisations or organisation in self.organisations


@dataclass(frozen=True, slots=True)
class Machine:
    """A system that calls the API, as the store keeps it."""

    id: str
    name: str
    organisation: str
    status: Status
    created_at: datetime
    created_by: str
    description: str = ""
    system: bool = False
    grants: tuple[Grant, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    seen: Seen = field(init=False, repr=False, compare=False)
    """What apps see of it. Made once, so that the identities of all its keys share it."""

    def __post_init__(self) -> None:
        grants = tuple([grant for grant in self.grants if grant.counts_for(self.organisation)])
        rights = frozenset([grant.right for grant in grants])
        info = MachineInfo(self.id, self.name, self.organisation, self.system)
        object.__setattr__(self, "seen", Seen(info, grants, rights))


class Key(NamedTuple):
    """A key, as the store keeps it: everything but its text.

    A tuple: each lookup makes one, and a frozen dataclass of so many fields takes 0.8 µs more.
    """

    id: str
    machine_id: str
    name: str
    environment: str
    usage: str
    last4: str
    status: Status
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None
    replaces: str | None = None
    networks: tuple[Network, ...] = ()
    attributes: Mapping[str, str] = {}  # shared, and a `Mapping` is not written to


@dataclass(frozen=True, slots=True)
class Record:
    """What one lookup finds: a key, its machine, and the digest they were found by."""

    key: Key
    machine: Machine
    digest: bytes = field(repr=False)  # no tuple: what walks through those would show it


class KeyInfo(NamedTuple):
    """What an app sees of the key that called."""

    id: str
    name: str
    environment: str
    usage: str
    expires_at: datetime | None


class MachineInfo(NamedTuple):
    """What an app sees of the machine that called."""

    id: str
    name: str
    organisation: str
    system: bool


class Seen(NamedTuple):
    """What an identity holds of a machine: its grants that count, and the rights they give."""

    machine: MachineInfo
    grants: tuple[Grant, ...]
    rights: frozenset[str]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, and what they may do. ``rights`` holds only the grants that count for this machine.

    It also answers to the names that Starlette's ``request.user`` and ``request.auth`` are read by, so that
    it can stand as both without an object being made for each request.
    """

    key: KeyInfo
    machine: MachineInfo
    grants: tuple[Grant, ...]
    rights: frozenset[str]
    stale: bool = False
    """Given from the cache during an outage (``on_outage="serve_cached"``), older than ``max_staleness``."""
    vouched_by: str = field(default="", repr=False, compare=False)
    """The ``id`` of the authenticator that verified the key; empty for an identity made by hand.

    A guard uses an identity that another guard found only if both have the same authenticator.
    """

    @classmethod
    def of(cls, key: Key, machine: Machine, *, vouched_by: str = "") -> Identity:
        """Make the identity that a key of this machine proves."""
        info = KeyInfo(key.id, key.name, key.environment, key.usage, key.expires_at)
        return cls(info, *machine.seen, vouched_by=vouched_by)

    def allows(self, right: str, organisation: str | Unset = UNSET) -> bool:
        """Return whether the machine has a right: on this organisation's data, or on any if none is named.

        Raises `InvalidInput` for a right that is not ``"<permission>:<operation>"``, and for an organisation that is
        ``None`` or empty: the app failed to find out which one is meant, and must not be told "on any".
        """
        wanted = parse_right(right)
        if organisation is UNSET:
            return wanted in self.rights
        if not organisation:
            raise InvalidInput(
                "organisation is None or empty: name the one whose data is asked for, or leave the argument out"
            )
        return any(grant.right == wanted and grant.covers(organisation) for grant in self.grants)

    @property
    def is_authenticated(self) -> bool:
        """Always true (Starlette's ``request.user.is_authenticated``)."""
        return True

    @property
    def display_name(self) -> str:
        """The machine's name (Starlette's ``request.user.display_name``)."""
        return self.machine.name

    @property
    def identity(self) -> str:
        """The machine's id (Starlette's ``request.user.identity``)."""
        return self.machine.id

    @property
    def scopes(self) -> frozenset[str]:
        """The rights (Starlette's ``request.auth.scopes``, which ``@requires`` reads)."""
        return self.rights


def parse_network(text: str) -> Network:
    """Read an address or a CIDR block, IPv4-mapped IPv6 as the IPv4 it is. Raises `ValueError` for host bits."""
    network = ip_network(text.strip())
    if isinstance(network, IPv6Network) and network.prefixlen >= _MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:  # no address is ever in such a network: `parse_address` reads them as IPv4
            return IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def parse_address(text: str) -> Address | None:
    """Read an IP address, IPv4-mapped IPv6 as the IPv4 it is; None for anything else."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
