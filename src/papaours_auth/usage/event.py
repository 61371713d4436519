"""The usage event, version 1: what is kept of a call. Never a key's text, and nothing without a bound."""

from __future__ import annotations

import struct
import time
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, ip_network
from typing import TYPE_CHECKING, Final, NamedTuple

from ..model import Identity, parse_address

if TYPE_CHECKING:
    from .spool import Segment

VERSION: Final = 1
_CELL: Final = struct.Struct("<HBBI")
LONGEST_ROUTE: Final = 256  # characters, as the next
_ID, _ADDRESS, _METHOD, _REQUEST = 64, 64, 16, 64
_MOST: Final = 0xFFFF_FFFF
_LATEST: Final = 1 << 62  # what SQLite can keep, whatever the clock says
_SEPARATOR: Final = "\x1f"  # unprintable, so `clean` lets it into no field
_monotonic: Final = time.monotonic  # bound once: each call pays for it


class Outcome(IntEnum):
    """How a call ended."""

    STARTED = 0
    COMPLETED = 1
    FAILED = 2
    GONE = 3


_STARTED: Final = Outcome.STARTED  # an enum's member costs 100 ns to name
_NAMES: Final = {outcome.value: outcome.name.lower() for outcome in Outcome}


class Event(NamedTuple):
    """One call. ``time`` is in µs since 1970 (UTC), ``duration`` in µs; ``status`` 0: none was sent."""

    v: int
    event_id: str
    time: int
    key_id: str
    machine_id: str
    address: str
    method: str
    route: str
    status: int
    reason: str
    outcome: str
    service: str
    environment: str
    duration: int
    request_id: str


class Refusals(NamedTuple):
    """Refusals without a known key: how many in a minute (µs since 1970), for a reason, from a network."""

    minute: int
    reason: str
    network: str
    calls: int


class Call:
    """A call under way: begun by `begin_call`, filled in by a middleware, and read when it has ended.

    Its times are monotonic seconds. Slots: half of what recording costs a request is the making of this.
    """

    __slots__ = (
        "address", "ended", "identity", "method", "outcome", "place", "reason", "request_id", "route", "segment",
        "started", "status",
    )  # fmt: skip

    identity: Identity
    address: str | None
    method: str
    reason: str
    route: str
    request_id: str
    status: int
    outcome: Outcome
    started: float
    ended: float
    segment: Segment
    place: int  # in its segment, set with it


def begin_call(identity: Identity, address: str | None, method: str, reason: str = "") -> Call:
    """Begin a call, now. A function: an ``__init__`` costs 50 ns of 340 more, as CPython 3.11 calls it from C."""
    call = Call()
    call.identity = identity
    call.address = address
    call.method = method
    call.reason = reason
    call.route = call.request_id = ""
    call.status = call.place = 0
    call.outcome = _STARTED
    call.started = _monotonic()
    return call


def clean(text: object, bound: int = _ID) -> str:
    """Give a text that harms nothing: within its bound, and printable."""
    short = str(text)[:bound] if text is not None else ""
    if short.isprintable():
        return short
    return "".join(character if character.isprintable() else "\ufffd" for character in short)


Texts = tuple[str, str, str, str, str, str, str, str, str]
"""Of an event: key, machine, address, method, route, reason, service, environment, request id."""


def texts_of(call: Call, service: str) -> Texts:
    """Give what a call says in words, each within its bound and printable."""
    key, machine = call.identity.key, call.identity.machine
    try:
        texts = (
            key.id, machine.id, (call.address or "")[:_ADDRESS], call.method[:_METHOD], call.route[:LONGEST_ROUTE],
            call.reason[:_ID], service, key.environment, call.request_id[:_REQUEST],
        )  # fmt: skip
        if "".join(texts).isprintable():  # one look at all: 1 µs less than nine
            return texts
    except TypeError:  # a server or an app may put anything there
        pass
    return (
        clean(key.id), clean(machine.id), clean(call.address, _ADDRESS), clean(call.method, _METHOD),
        clean(call.route, LONGEST_ROUTE), clean(call.reason), service, clean(key.environment),
        clean(call.request_id, _REQUEST),
    )  # fmt: skip


def event_from(call: Call, event_id: str, shift: float, service: str) -> Event:
    """Make the event of an ended call. ``shift``: seconds from the monotonic clock to the wall's."""
    key, machine, address, method, route, reason, service, environment, request = texts_of(call, service)
    return Event(
        VERSION, event_id, _time(int((call.started + shift) * 1e6)), key, machine, address, method, route,
        status_of(call.status), reason, _NAMES[call.outcome], service, environment,
        _duration(call.ended - call.started), request,
    )  # fmt: skip


def body_of(call: Call, shift: float, service: str) -> bytes:
    """Write what is fixed when an answer begins."""
    when = str(int((call.started + shift) * 1e6))  # bounded when it is read
    return _SEPARATOR.join((when, *texts_of(call, service))).encode("utf-8")


def _time(microseconds: int) -> int:
    return min(max(microseconds, 0), _LATEST)


def _duration(seconds: float) -> int:
    microseconds = int(seconds * 1e6)
    if 0 <= microseconds <= _MOST:  # not min and max: 100 ns less
        return microseconds
    return 0 if microseconds < 0 else _MOST


def status_of(status: object) -> int:
    """Give a status as it is kept, 0 for what is none: an app may send anything."""
    return int(status) if isinstance(status, int) and 0 <= status <= 0xFFFF else 0


@lru_cache(maxsize=1024)
def started_cell(status: int) -> bytes:
    """Write the cell of an answer that begins: it hangs on the status alone."""
    return cell_of(status, _STARTED, 0.0)


def cell_of(status: object, outcome: Outcome, duration: float) -> bytes:
    """Write the 8 bytes that may be amended: they carry a check of their own."""
    number, microseconds = status_of(status), _duration(duration)
    return _CELL.pack(number, outcome, _check(number, outcome, microseconds), microseconds)


def _check(status: int, outcome: int, duration: int) -> int:
    return (status * 31 + outcome * 7 + duration * 13 + 0xA5) % 251


def event_of(event_id: str, cell: bytes, body: bytes) -> Event | None:
    """Read a record; None where it is none. A damaged cell leaves the outcome unknown."""
    try:
        when, key, machine, address, method, route, reason, service, environment, request = body.decode(
            "utf-8"
        ).split(_SEPARATOR)
        at = _time(int(when))
    except ValueError:  # what has a good checksum may still be another's
        return None
    status, outcome, check, duration = _CELL.unpack(cell)
    if check != _check(status, outcome, duration) or outcome not in _NAMES:
        status, outcome, duration = 0, _STARTED, 0
    return Event(
        VERSION, event_id, at, key, machine, address, method, route, status, reason, _NAMES[outcome], service,
        environment, duration, request,
    )  # fmt: skip


def network_of(address: str | None) -> str:
    """Give the /24 or /48 an address is in, "unknown" where it is none."""
    parsed = parse_address(address) if address else None
    if parsed is None:
        return "unknown"
    width = 24 if isinstance(parsed, IPv4Address) else 48
    return str(ip_network((int(parsed) if width == 24 else parsed.packed, width), strict=False))
