"""The usage event, version 1: what is kept of a call. Never a key's text, and nothing without a bound."""

from __future__ import annotations

import struct
import time
from enum import IntEnum
from ipaddress import IPv4Address, ip_network
from typing import TYPE_CHECKING, Final, NamedTuple

from ..model import Identity, parse_address

if TYPE_CHECKING:
    from .spool import Segment

VERSION: Final = 1
_CELL: Final = struct.Struct("<HBBI")
_BOUNDS: Final = {"address": 64, "method": 16, "route": 256, "request_id": 64, "id": 64, "service": 64}
_MOST: Final = 0xFFFF_FFFF
_LATEST: Final = 1 << 62  # what SQLite can keep, whatever the clock says
_SEPARATOR: Final = "\x1f"  # unprintable, so `clean` lets it into no field
_FIELDS: Final = 10


class Outcome(IntEnum):
    """How a call ended."""

    STARTED = 0
    COMPLETED = 1
    FAILED = 2
    GONE = 3


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


_monotonic, _time, _STARTED = (
    time.monotonic,
    time.time,
    Outcome.STARTED,
)  # bound once: each call pays for them


class Call:
    """A call under way: filled in by a middleware, and read when it has ended."""

    __slots__ = (
        "address", "began", "identity", "method", "outcome", "place", "reason", "request_id", "route",
        "segment", "started", "status",
    )  # fmt: skip

    def __init__(
        self,
        identity: Identity,
        address: str | None,
        method: str,
        reason: str = "",
        began: float | None = None,
    ) -> None:
        self.identity = identity
        self.address = address
        self.method = method
        self.started = _monotonic()  # seconds; the recorder makes a duration of it
        self.began = _time() if began is None else began
        self.reason = reason
        self.route = self.request_id = ""
        self.status = self.place = 0
        self.outcome = _STARTED
        self.segment: Segment | None = None


def clean(text: object, kind: str) -> str:
    """Give a text that harms nothing: within its bound, and printable."""
    short = str(text)[: _BOUNDS[kind]] if text is not None else ""
    if short.isprintable():
        return short
    return "".join(character if character.isprintable() else "\ufffd" for character in short)


def body_of(call: Call, service: str) -> bytes:
    """Write what is fixed when an answer begins."""
    key, machine = call.identity.key, call.identity.machine
    return _SEPARATOR.join(
        (
            str(min(max(int(call.began * 1e6), 0), _LATEST)),
            clean(key.id, "id"),
            clean(machine.id, "id"),
            clean(call.address, "address"),
            clean(call.method, "method"),
            clean(call.route, "route"),
            clean(call.reason, "id"),
            clean(service, "service"),
            clean(key.environment, "id"),
            clean(call.request_id, "request_id"),
        )
    ).encode("utf-8")


def cell_of(status: object, outcome: Outcome, duration: float) -> bytes:
    """Write the 8 bytes that may be amended: they carry a check of their own."""
    number = status if isinstance(status, int) and 0 <= status <= 0xFFFF else 0  # an app may send anything
    microseconds = min(max(int(duration * 1e6), 0), _MOST)
    return _CELL.pack(number, outcome, _check(number, outcome, microseconds), microseconds)


def _check(status: int, outcome: int, duration: int) -> int:
    return (status * 31 + outcome * 7 + duration * 13 + 0xA5) % 251


def event_of(event_id: str, cell: bytes, body: bytes) -> Event | None:
    """Read a record; None where it is none. A damaged cell leaves the outcome unknown."""
    fields = body.decode("utf-8", "replace").split(_SEPARATOR)
    if len(fields) != _FIELDS or not fields[0].lstrip("-").isdecimal():
        return None
    when, key, machine, address, method, route, reason, service, environment, request = fields
    status, outcome, check, duration = _CELL.unpack(cell)
    if check != _check(status, outcome, duration) or outcome > Outcome.GONE:
        status, outcome, duration = 0, Outcome.STARTED, 0
    name = Outcome(outcome).name.lower()
    return Event(
        VERSION, event_id, int(when), key, machine, address, method, route, status, reason, name, service,
        environment, duration, request,
    )  # fmt: skip


def network_of(address: str | None) -> str:
    """Give the /24 or /48 an address is in, "unknown" where it is none."""
    parsed = parse_address(address) if address else None
    if parsed is None:
        return "unknown"
    width = 24 if isinstance(parsed, IPv4Address) else 48
    return str(ip_network((int(parsed) if width == 24 else parsed.packed, width), strict=False))
