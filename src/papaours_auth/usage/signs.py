"""The signs of compromise, found in a stream of events. No I/O and no clock: time is that of the events.

docs/design/signs.md says what each sign is, and why it is found in this way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_network
from typing import Any, Final, TypeAlias

from ..exceptions import Reason
from .alerts import Evidence, Finding, Severity, Sign, Subject
from .event import Event, Refusals, network_of
from .novelty import Familiar
from .repetition import Repeated, Repetition
from .rhythm import Rhythm, Rise

_HOUR: Final = 3_600_000_000
_DAY: Final = 24 * _HOUR
_STATE: Final = 2  # the version of the states: one of another is not read, and its subject is learned anew
_FAR: Final = _DAY
_LONGEST_STEP: Final = 7 * _DAY
_LONGEST_GAP: Final = 45 * _DAY
_LEARNING: Final = 21 * _DAY
_LEARNING_OF_FEW: Final = 45 * _DAY
_FEW: Final = 20  # calls
_SEGMENTS: Final = 3
_SEGMENT: Final = 32
_MOST: Final = 10_000  # subjects in memory
_NOT_A_FAILURE: Final = frozenset({"", "insufficient_rights", "store_unavailable"})
ATTEMPTS: Final = frozenset({"malformed_key", "unknown_key", "ambiguous_credentials", "too_many_failures"})
"""The reasons of refusals that are failed authentication: not a missing key, and no outage of ours."""
_REASONS: Final = frozenset(Reason)
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_LOUD: Final = 10  # from this ratio on, a rise is high
_MANY: Final = 100  # failures that are high at once
_ID: Final = re.compile(r"[{<:*]|\d|_[a-z]{12}")  # the last: what may be a key's text must not be kept
_VERSION: Final = re.compile(r"v\d{1,3}")


@lru_cache(maxsize=4096)
def route_group(method: str, route: str) -> tuple[str, str]:
    """Give a route's group and the coarser one above it: ``("read /contrats/*", "contrats")``."""
    parts = [part for part in route.split("?", 1)[0].lower().split("/") if part][: _SEGMENTS + 1]
    named = [_segment(part) for part in parts]
    resource = next((part for part in named if not _VERSION.fullmatch(part)), "")
    kept = named[: _SEGMENTS + (bool(named) and named[0] != resource)]
    return f"{'read' if method in _READING else 'write'} /{'/'.join(kept)}", resource


def _segment(part: str) -> str:
    if _VERSION.fullmatch(part):
        return part
    return "*" if len(part) > _SEGMENT or _ID.search(part) or not part.isprintable() else part


@lru_cache(maxsize=4096)
def networks_of(address: str) -> tuple[str, str]:
    """Give an address's /24 or /48, and the /16 or /32 around it."""
    fine = network_of(address)
    if fine == "unknown":
        return fine, fine
    network = ip_network(fine)
    return fine, str(network.supernet(new_prefix=16 if network.version == 4 else 32))


ClockState: TypeAlias = "tuple[int | None, int, int | None]"


class Clock:
    """A key's time: the latest of its events, without those that are far from all others (docs/design/signs.md)."""

    __slots__ = ("_aside", "_latest", "age")

    def __init__(self, state: ClockState | None = None) -> None:
        self._latest, self.age, self._aside = state or (None, 0, None)

    def state(self) -> ClockState:
        """Give what `__init__` takes."""
        return self._latest, self.age, self._aside

    @property
    def now(self) -> int:
        """The latest time that is believed."""
        return self._latest or 0

    def take(self, time: int) -> bool:
        """Tell whether a time is believed, so that rates may count it."""
        if self._latest is None:
            self._latest = time
            return True
        if abs(time - self._latest) <= _FAR:
            self._aside = None
            self._move(time)
            return True
        return self._far(time, self._latest)

    def _far(self, time: int, latest: int) -> bool:
        other, self._aside = self._aside, time
        if other is None or (other > latest) != (time > latest):
            return False
        # Two in a row: time did move, at least to the nearer one.
        nearer = min(other, time, key=lambda at: abs(at - latest))
        self._move(nearer)
        self._latest = nearer
        if abs(time - nearer) > _FAR:
            return False
        self._aside = None
        self._move(time)
        return True

    def _move(self, time: int) -> None:
        step = time - (self._latest or 0)
        if step > 0:
            self._latest = time
            self.age += min(step, _LONGEST_STEP) if step <= _LONGEST_GAP else 0


def _written(state: Sequence[object]) -> str:
    return json.dumps([_STATE, *state], separators=(",", ":"))


def _read(text: str | None) -> list[Any] | None:  # Any: what `_written` wrote, and nobody else
    version, *state = json.loads(text) if text else (0,)
    return state if version == _STATE else None


class KeyHabits:
    """What is usual for one key. Bounded, whatever its events say."""

    def __init__(self, text: str | None = None) -> None:
        state = _read(text) or [None] * 7
        self._clock = Clock(state[0])
        self._calls = state[1] or 0
        self._networks, self._routes = Familiar(state[2]), Familiar(state[3])
        self._rhythm = Rhythm(state[4])
        self._failures, self._denials = Repetition(state[5]), Repetition(state[6])

    def dump(self) -> str:
        """Write it down, for `__init__` to read."""
        parts = (
            self._clock, self._networks, self._routes, self._rhythm, self._failures, self._denials,
        )  # fmt: skip
        clock, *rest = [part.state() for part in parts]
        return _written([clock, self._calls, *rest])

    @property
    def seen(self) -> int:
        """When it was last seen (µs), as far as that is believed."""
        return self._clock.now

    @property
    def weight(self) -> int:
        """How much would be forgotten with it: keys go by `seen` alone."""
        return 0

    @property
    def learning(self) -> bool:
        """Whether too little was seen of it to call anything new."""
        few = self._calls < _FEW and self._clock.age < _LEARNING_OF_FEW
        return self._clock.age < _LEARNING or few

    def event(self, event: Event) -> Iterator[Finding]:
        """Learn from an event, and give what is unusual in it."""
        subject = Subject("key", event.key_id, event.machine_id)
        believed = self._clock.take(event.time)
        self._calls += 1
        learning = self.learning
        days = self._clock.age // _DAY
        fine, coarse = networks_of(event.address)
        if fine != "unknown" and self._networks.meet(fine, coarse, event.time, learning=learning):
            evidence: Evidence = {
                "networks": [fine],
                "calls": 1,
                "known_networks": len(self._networks) - 1,
                "days": days,
            }
            yield Finding(Sign.ADDRESSES, subject, event.time, "medium", evidence)
        yield from self._resource(event, subject, learning=learning, days=days)
        if event.reason not in _NOT_A_FAILURE or event.status == 401:
            yield from self._failed(event, subject)
            return
        group = route_group(event.method, event.route)[0] if event.status != 404 else ""
        rise = self._rhythm.count(event.time // _HOUR, group) if believed else None
        if rise is not None:
            yield _rise(subject, event.time, rise)
        if self._denied(event):
            yield from self._denial(event, subject)

    def _resource(self, event: Event, subject: Subject, *, learning: bool, days: int) -> Iterator[Finding]:
        if event.status in (401, 404) or event.reason not in ("", "insufficient_rights"):
            return  # never got to a resource
        group, resource = route_group(event.method, event.route)
        if self._routes.meet(group, resource, event.time, learning=learning):
            severity: Severity = "low" if group.startswith("read") else "medium"
            evidence: Evidence = {
                "routes": [group],
                "calls": 1,
                "known_routes": len(self._routes) - 1,
                "days": days,
            }
            yield Finding(Sign.RESOURCES, subject, event.time, severity, evidence)

    def _failed(self, event: Event, subject: Subject) -> Iterator[Finding]:
        repeated = self._failures.count(event.time)
        if repeated is not None:
            yield _errors(subject, event.time, repeated, event.reason, networks_of(event.address)[0])

    def _denial(self, event: Event, subject: Subject) -> Iterator[Finding]:
        repeated = self._denials.count(event.time)
        if repeated is not None:
            evidence: Evidence = {
                "refused": repeated.times,
                "minutes": repeated.minutes,
                "refused_routes": [route_group(event.method, event.route)[0]],
            }
            severity: Severity = "high" if repeated.times >= _MANY else "medium"
            yield Finding(Sign.RESOURCES, subject, event.time, severity, evidence)

    def _denied(self, event: Event) -> bool:
        if event.status == 404:
            return route_group(event.method, event.route)[0] not in self._routes
        return event.status == 403


class NetworkHabits:
    """How often a network presented what is no known key."""

    def __init__(self, text: str | None = None) -> None:
        state = _read(text) or (0, None)
        self.seen: int = state[0]
        """When it last failed (µs)."""
        self._failures = Repetition(state[1])

    def dump(self) -> str:
        """Write it down, for `__init__` to read."""
        return _written([self.seen, self._failures.state()])

    @property
    def weight(self) -> int:
        """How much would be forgotten with it: a flood of networks must not hide a slow one."""
        return self._failures.total

    def refusals(self, refusals: Refusals) -> Iterator[Finding]:
        """Learn from refusals, and give what is unusual in them."""
        if refusals.reason not in ATTEMPTS:
            return
        self.seen = refusals.minute
        repeated = self._failures.count(refusals.minute, refusals.calls)
        if repeated is not None:
            subject = Subject("network", refusals.network)
            yield _errors(subject, refusals.minute, repeated, refusals.reason, refusals.network)


def _errors(subject: Subject, time: int, repeated: Repeated, reason: str, network: str) -> Finding:
    evidence: Evidence = {
        "failures": repeated.times,
        "minutes": repeated.minutes,
        "reasons": [reason if reason in _REASONS else "other"],
        "networks": [network],
    }
    return Finding(Sign.ERRORS, subject, time, "high" if repeated.times >= _MANY else "medium", evidence)


def _rise(subject: Subject, time: int, rise: Rise) -> Finding:
    evidence: Evidence = {
        "calls": rise.calls,
        "expected": round(rise.expected, 1),
        "ratio": round(rise.ratio, 1),
        "in": rise.unit,
    }
    if rise.strange:
        evidence["out_of_mix"] = rise.strange
    return Finding(Sign.RISE, subject, time, "high" if rise.ratio >= _LOUD else "medium", evidence)


Habits: TypeAlias = "KeyHabits | NetworkHabits"


class Detector:
    """Finds signs in events and refusals, in about the order of their times. Not for several threads at once.

    It knows at most ``most`` subjects; the least telling half goes where there are more.
    """

    def __init__(self, states: Mapping[str, str] | None = None, *, most: int = _MOST) -> None:
        self._most = most
        self.habits: dict[str, Habits] = {}
        for place, text in (states or {}).items():
            self.habits[place] = (NetworkHabits if place.startswith("network ") else KeyHabits)(text)

    def event(self, event: Event) -> Iterator[Finding]:
        """Feed a call by a known key."""
        place = place_of(event)
        habits = self.habits.get(place)
        if not isinstance(habits, KeyHabits):
            habits = KeyHabits()
            self._add(place, habits)
        return habits.event(event)

    def refusals(self, refusals: Refusals) -> Iterator[Finding]:
        """Feed refusals without a known key."""
        place = place_of(refusals)
        habits = self.habits.get(place)
        if not isinstance(habits, NetworkHabits):
            habits = NetworkHabits()
            self._add(place, habits)
        return habits.refusals(refusals)

    def states(self) -> dict[str, str]:
        """Write everything down, for `__init__` to read."""
        return {place: habits.dump() for place, habits in self.habits.items()}

    def _add(self, place: str, habits: Habits) -> None:
        if len(self.habits) >= self._most:
            by_worth = sorted(self.habits.items(), key=lambda item: (item[1].weight, item[1].seen))
            self.habits = dict(by_worth[len(by_worth) // 2 :])
        self.habits[place] = habits


def place_of(fed: Event | Refusals) -> str:
    """Name the state that an event or refusals touch."""
    return f"network {fed.network}" if isinstance(fed, Refusals) else f"key {fed.key_id}"
