"""THE DECISION: may this key come in? Pure: no I/O, no clock. Everything else fetches, caches or renders.

`read` looks at the presented text alone; a store finds a record for the claim; `decide` judges it. The part
that depends on the key alone (`stand`) is what the cache keeps; the part that depends on the request
(`admit`: its address, the rights it needs) is asked anew on every hit.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime
from hmac import compare_digest
from typing import Final, NamedTuple, Protocol

from .digest import Candidate, PepperRing
from .exceptions import InvalidInput, Reason, Refused
from .format import KeyFormat
from .model import UNSET, Address, Identity, Network, Record, Unset, parse_address, parse_right

PARTITIONS: Final = 16
"""Stores that cannot change everything in one step keep keys in this many parts."""


class Claim(NamedTuple):
    """A well-formed key: what it may be stored under, and nothing that would give its text away.

    ``foreign``: its text was minted elsewhere (`KeyText.foreign`), so that anybody can have invented it. A store that
    adds such a key stops telling of its partition that it holds none (`News.minted_only`).
    """

    environment: str
    partition: int
    candidates: tuple[Candidate, ...]
    foreign: bool = True

    def __repr__(self) -> str:
        return f"Claim({self.environment!r}, partition {self.partition})"


class Standing(NamedTuple):
    """What is to be said of a key whatever the request: an identity, or a reason to refuse (or both).

    ``identity`` without ``reason`` may come in; with one, it is a known caller that may not; ``reason``
    alone is an unknown key.
    """

    identity: Identity | None
    reason: Reason | None
    networks: tuple[Network, ...] = ()
    expires_at: datetime | None = None


class Judged(Protocol):
    """What `admit` asks of a standing: the cache keeps it of each key."""

    @property
    def identity(self) -> Identity | None:
        """Whose key it is; None for an unknown one."""

    @property
    def reason(self) -> Reason | None:
        """Why it is refused whatever the request; None where it is not."""

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks it is bound to; none where it may come from anywhere."""


def read(presented: bytes, *, format: KeyFormat, peppers: PepperRing) -> Claim | Refused:  # noqa: A002
    """Read a presented key: any bytes at all. A forged key of our own format ends here, without a store."""
    text = format.read(presented)
    if text is None:
        return Refused(Reason.MALFORMED_KEY)
    if text.tagged is not None and text.tag is not None and not peppers.issued(text.tagged, text.tag):
        return Refused(Reason.MALFORMED_KEY)
    return Claim(text.environment, partition(presented), peppers.candidates(presented), text.foreign)


def partition(presented: bytes) -> int:
    """Tell which part of a store a key belongs in: CRC-32 of its text modulo `PARTITIONS`, whatever the pepper."""
    return zlib.crc32(presented) % PARTITIONS


def stand(
    claim: Claim, record: Record | None, *, now: datetime, environment: str, vouched_by: str = ""
) -> Standing:
    """Judge a record for a claim, whatever the request. ``now`` is aware; at ``expires_at`` a key is expired.

    ``vouched_by`` is the id of the authenticator that asks, for `Identity.vouched_by`.
    """
    # Compared again although the store found it by digest: a store may compare loosely (a collation that
    # ignores case), and this comparison takes the same time wherever the bytes differ.
    same = False
    if record is not None:
        for candidate in claim.candidates:
            same |= compare_digest(candidate.digest, record.digest)
    if record is None or not same:
        return Standing(None, Reason.UNKNOWN_KEY)
    key, machine = record.key, record.machine
    reason = None
    if key.environment != environment:
        reason = Reason.WRONG_ENVIRONMENT
    elif key.status != "active":
        reason = Reason.KEY_INACTIVE
    elif key.expires_at is not None and now >= key.expires_at:
        reason = Reason.KEY_EXPIRED
    elif machine.status != "active":
        reason = Reason.MACHINE_INACTIVE
    identity = Identity.of(key, machine, vouched_by=vouched_by)
    return Standing(identity, reason, key.networks, key.expires_at)


def admit(
    standing: Judged, *, client: str | Address | None, needs: str | Sequence[str] | None
) -> Identity | Refused:
    """Judge a request by a key of this standing. An address that is needed and not known is refused.

    ``needs`` are the rights that the request takes, None if it takes none. Raises `InvalidInput` as `authorize` does.
    """
    identity, reason = standing.identity, standing.reason
    if identity is None or reason is not None:
        return Refused(reason or Reason.UNKNOWN_KEY, known=identity)
    if standing.networks:
        address = parse_address(client) if isinstance(client, str) else client
        if address is None or not any(address in network for network in standing.networks):
            return Refused(Reason.NETWORK_NOT_ALLOWED, known=identity)
    return identity if needs is None else authorize(identity, needs)


def authorize(
    identity: Identity, rights: str | Sequence[str], organisation: str | Unset = UNSET
) -> Identity | Refused:
    """Judge whether a caller has all these rights: on this organisation's data, or on any if none is named.

    Raises `InvalidInput` if no right is named, for a right that is not ``"<permission>:<operation>"``, and for an
    organisation that is ``None`` or empty. None of them may mean "anything goes".
    """
    wanted = tuple(parse_right(right) for right in ((rights,) if isinstance(rights, str) else rights))
    if not wanted:
        raise InvalidInput("no right is named: name at least one, as in 'contrats:lecture'")
    lacking = [right for right in wanted if not identity.allows(right, organisation)]
    return Refused(Reason.INSUFFICIENT_RIGHTS, known=identity, needs=wanted) if lacking else identity


def decide(
    claim: Claim,
    record: Record | None,
    *,
    now: datetime,
    environment: str,
    client: str | Address | None = None,
    needs: str | Sequence[str] | None = None,
) -> Identity | Refused:
    """Judge a claim and the record found for it: the whole decision in one call."""
    return admit(stand(claim, record, now=now, environment=environment), client=client, needs=needs)
