"""Peppers, and what is made with them: a key's digest and its issuer tag.

A pepper is a secret of at least 32 bytes that the store never sees. HKDF-SHA256 (RFC 5869) derives three
subkeys from it, so that no use can stand in for another: ``digest`` (what the store keeps of a key), ``tag``
(what only an issuer can put into a key) and ``check`` (what tells a wrong pepper from the right one).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from .exceptions import ConfigurationError
from .pepper_file import read_pepper_file

if TYPE_CHECKING:
    from hashlib import _Hash as HASH

PEPPER_VARIABLE: Final = "PAPAOURS_PEPPER"
PEPPER_FILE_VARIABLE: Final = "PAPAOURS_PEPPER_FILE"
MIN_PEPPER_BYTES: Final = 32
_MIN_DISTINCT_BYTES: Final = 16  # 32 random bytes have fewer once in 10**9; 'aaaa…' and its kin always
ALGORITHM: Final = "hmac-sha256/v1"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,32}")
_REMEDY: Final = "make one with 'papaours-auth init'"

PepperStatus = Literal["accept", "primary", "retired"]
"""``primary`` mints and digests (exactly one); ``accept`` verifies; ``retired`` only recognises its own tags."""


class Candidate(NamedTuple):
    """A digest a presented key may be stored under."""

    pepper_id: str
    digest: bytes
    algorithm: str = ALGORITHM

    def __repr__(self) -> str:
        return f"Candidate({self.pepper_id!r}, {self.algorithm!r})"


def hkdf_sha256(secret: bytes, info: bytes, length: int = 32, *, salt: bytes = b"") -> bytes:
    """Derive a key from a secret: HKDF-SHA256 (RFC 5869). ``info`` says what the key is for.

    Written here because `cryptography` can be imported in one interpreter of a process only, and mod_wsgi runs each
    site in an interpreter of its own. Raises `ValueError` for a length outside 1 to 8160 bytes.
    """
    if not 0 < length <= 255 * 32:
        raise ValueError("HKDF-SHA256 derives 1 to 8160 bytes")
    key = hmac.digest(salt, secret, "sha256")  # HMAC pads an empty salt to the zeros that RFC 5869 asks for
    blocks = [b""]
    for number in range(1, -(-length // 32) + 1):
        blocks.append(hmac.digest(key, blocks[-1] + info + bytes((number,)), "sha256"))
    return b"".join(blocks)[:length]


def _check_pepper(id_: str, value: bytes) -> None:
    if not _ID.fullmatch(id_):
        raise ConfigurationError(
            "a pepper's id must be 1 to 32 letters, digits, '-' or '_': write PAPAOURS_PEPPER as id:base64url"
        )
    if len(value) < MIN_PEPPER_BYTES:
        raise ConfigurationError(
            f"the pepper {id_!r} has {len(value)} bytes and needs at least {MIN_PEPPER_BYTES}, "
            f"or digests could be guessed: {_REMEDY}"
        )
    if len(set(value)) < _MIN_DISTINCT_BYTES:
        raise ConfigurationError(
            f"the pepper {id_!r} looks like a placeholder, not like random bytes: {_REMEDY}"
        )


def _subkey(pepper: bytes, use: str) -> bytes:
    return hkdf_sha256(pepper, f"papaours-auth/v1/{use}".encode("ascii"))


class _Begun(NamedTuple):
    """HMAC-SHA256 (RFC 2104) that has taken in its key: both hashes are begun, and continued on copies.

    An uncached lookup makes two. This way one takes 0.45 µs, by `hmac.digest` 1.2, by copies of `hmac.new` 0.75.
    """

    inner: HASH
    outer: HASH

    @classmethod
    def under(cls, key: bytes) -> _Begun:
        """Begin. ``key`` has at most 64 bytes, SHA-256's block."""
        block = key.ljust(64, b"\0")
        return cls(sha256(bytes(byte ^ 0x36 for byte in block)), sha256(bytes(byte ^ 0x5C for byte in block)))

    def hmac(self, message: bytes) -> bytes:
        """Give the 32 bytes of a message."""
        inner, outer = self.inner.copy(), self.outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


@dataclass(frozen=True, slots=True)
class Pepper:
    """One pepper: an id for people and the store, and its three subkeys. The pepper itself is not kept."""

    id: str
    _digest_key: bytes = field(repr=False)
    _tag_key: bytes = field(repr=False)
    _check_key: bytes = field(repr=False)
    _digests: _Begun = field(init=False, repr=False, compare=False)
    _tags: _Begun = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_digests", _Begun.under(self._digest_key))
        object.__setattr__(self, "_tags", _Begun.under(self._tag_key))

    @classmethod
    def from_bytes(cls, id: str, value: bytes) -> Pepper:  # noqa: A002 - the field's own word
        """Derive the subkeys. Raises `ConfigurationError` for a short or placeholder value or a bad id."""
        try:
            _check_pepper(id, value)
            return cls(id, _subkey(value, "digest"), _subkey(value, "tag"), _subkey(value, "check"))
        except ConfigurationError as error:
            raise _alone(error)  # noqa: B904 - it is the same one
        finally:
            del value

    def digest(self, presented: bytes) -> bytes:
        """HMAC-SHA256 of the whole key, 32 bytes: what the store keeps and finds it by."""
        return self._digests.hmac(presented)

    def tag(self, tagged: bytes) -> int:
        """Give the issuer tag: HMAC-SHA256 of everything before it, its first 32 bits, big-endian."""
        return int.from_bytes(self.tag_bytes(tagged), "big")

    def tag_bytes(self, tagged: bytes) -> bytes:
        """Give the same as its 4 bytes."""
        return self._tags.hmac(tagged)[:4]

    def proof(self, installation: str) -> bytes:
        """HMAC-SHA256 of a store's installation id, 32 bytes: kept in the store to recognise this pepper."""
        return hmac.digest(self._check_key, installation.encode("utf-8"), "sha256")


@dataclass(frozen=True, slots=True)
class PepperRing:
    """The peppers an app holds, in the order given, each with its status.

    Without ``statuses`` (no store asked yet) the first is primary and the others are accepted. A store's
    record of the statuses stands above the order: `with_statuses`.
    """

    peppers: tuple[Pepper, ...]
    statuses: Mapping[str, PepperStatus] = field(default_factory=dict)
    _digesting: tuple[Pepper, ...] = field(init=False, repr=False, compare=False)
    _digesting_ids: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.peppers:
            raise ConfigurationError(f"no pepper given, so no key can be verified: {_REMEDY}")
        ids = [pepper.id for pepper in self.peppers]
        if len(set(ids)) != len(ids):
            raise ConfigurationError("two peppers have the same id: give each its own")
        digesting = tuple(pepper for pepper in self.peppers if self.status(pepper) != "retired")
        object.__setattr__(self, "_digesting", digesting)
        object.__setattr__(self, "_digesting_ids", frozenset(pepper.id for pepper in digesting))

    def with_statuses(self, statuses: Mapping[str, PepperStatus]) -> PepperRing:
        """Give the same peppers with the statuses a store has recorded."""
        return PepperRing(self.peppers, dict(statuses))

    def bound_to(self, installation: str, recorded: Mapping[str, tuple[bytes, PepperStatus]]) -> PepperRing:
        """Hold the peppers against a store's record of them: id -> (proof, status).

        Raises `ConfigurationError` for one that is well-formed but not the store's: with it, every key would
        be unknown, and every customer told so.
        """
        for pepper in self.peppers:
            if pepper.id in recorded and not hmac.compare_digest(
                pepper.proof(installation), recorded[pepper.id][0]
            ):
                raise ConfigurationError(
                    f"the pepper {pepper.id!r} is not the one this store was made with, so every key would be "
                    f"unknown: check {PEPPER_VARIABLE}, {PEPPER_FILE_VARIABLE} and the store's URL"
                )
        return self.with_statuses({id_: status for id_, (_, status) in recorded.items()})

    @property
    def primary_missing(self) -> bool:
        """Whether a store digests its keys under a pepper that is not here."""
        held = {pepper.id for pepper in self.peppers}
        return any(status == "primary" and id_ not in held for id_, status in self.statuses.items())

    def status(self, pepper: Pepper) -> PepperStatus:
        """Tell what a pepper may do. One that the store does not know yet is accepted, never primary."""
        if self.statuses:
            return self.statuses.get(pepper.id, "accept")
        return "primary" if pepper is self.peppers[0] else "accept"

    @property
    def primary(self) -> Pepper:
        """The one pepper that mints and digests. Raises `ConfigurationError` where this app lacks it."""
        for pepper in self.peppers:
            if self.status(pepper) == "primary":
                return pepper
        raise ConfigurationError(
            "the store's primary pepper is not among those given, so no key can be minted: "
            f"add it to {PEPPER_VARIABLE} or {PEPPER_FILE_VARIABLE}"
        )

    def candidates(self, presented: bytes) -> tuple[Candidate, ...]:
        """All digests a key may be stored under, one for each pepper that is not retired."""
        return tuple([Candidate(pepper.id, pepper.digest(presented)) for pepper in self._digesting])

    def still(self, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """Return those of the candidates whose pepper is not retired, so that a key need not be read again."""
        return tuple([candidate for candidate in candidates if candidate.pepper_id in self._digesting_ids])

    def issued(self, tagged: bytes, tag: int) -> bool:
        """Tell whether one of these peppers made the tag. All are tried: time does not tell which."""
        found = tag.to_bytes(4, "big")
        matches = 0
        for pepper in self.peppers:
            matches += hmac.compare_digest(pepper.tag_bytes(tagged), found)
        return matches > 0


def parse_peppers(text: str) -> PepperRing:
    """Read ``id:base64url`` entries, parted by commas or line ends; ``#`` begins a comment line.

    Raises `ConfigurationError` with the entry's number, never its text.
    """
    try:
        return _parse_entries(text)
    except ConfigurationError as error:
        raise _alone(error)  # noqa: B904 - it is the same one
    finally:
        del text


def _alone(error: ConfigurationError) -> ConfigurationError:
    """Return an error without the frames that held a pepper: error reporters capture local variables."""
    error.__context__ = None
    return error.with_traceback(None)


def _parse_entries(text: str) -> PepperRing:
    entries = [
        entry.strip()
        for line in text.splitlines()
        if not line.lstrip().startswith("#")
        for entry in line.split(",")
        if entry.strip()
    ]
    return PepperRing(tuple(_parse_entry(number, entry) for number, entry in enumerate(entries, 1)))


def _parse_entry(number: int, entry: str) -> Pepper:
    id_, colon, encoded = entry.partition(":")
    if not colon:
        raise ConfigurationError(f"pepper {number} is not written id:base64url: {_REMEDY}")
    try:
        value = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigurationError(f"pepper {number} is not base64url after its id: {_REMEDY}") from None
    return Pepper.from_bytes(id_, value)


def peppers_from_environment(environ: Mapping[str, str] | None = None) -> PepperRing:
    """Read PAPAOURS_PEPPER, or the file PAPAOURS_PEPPER_FILE names. Raises `ConfigurationError`."""
    try:
        return parse_peppers(_pepper_text(os.environ if environ is None else environ))
    except ConfigurationError as error:
        raise _alone(error)  # noqa: B904 - it is the same one
    finally:
        del environ


def _pepper_text(environ: Mapping[str, str]) -> str:
    text, path = environ.get(PEPPER_VARIABLE, ""), environ.get(PEPPER_FILE_VARIABLE, "")
    if text and path:
        raise ConfigurationError(
            f"{PEPPER_VARIABLE} and {PEPPER_FILE_VARIABLE} are both set, and could differ: keep one"
        )
    if path:
        text = read_pepper_file(path)
    if not text.strip():
        raise ConfigurationError(f"no pepper: set {PEPPER_VARIABLE} or {PEPPER_FILE_VARIABLE}; {_REMEDY}")
    return text


def new_pepper(ids_in_use: Iterable[str] = ()) -> str:
    """Make a pepper's line, ``id:base64url``, of 32 random bytes under the first free id of ``p1``, ``p2``…."""
    used = set(ids_in_use)
    number = next(n for n in range(1, len(used) + 2) if f"p{n}" not in used)
    value = base64.urlsafe_b64encode(secrets.token_bytes(MIN_PEPPER_BYTES)).rstrip(b"=").decode("ascii")
    return f"p{number}:{value}"
