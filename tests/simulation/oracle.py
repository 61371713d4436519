"""What is true, by the simulation's own books, and the invariants. Shares no code with cache or decision."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from .world import START

TOLERANCE = 0.101
"""Seconds an expiry may be off: two shifts of the wall clock that the cache lets pass, of 50 ms each."""

_T = TypeVar("_T")


class Violation(AssertionError):
    """An invariant does not hold. ``invariant`` is its letter in docs/design/simulation.md."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"({invariant}) {text}")
        self.invariant = invariant


@dataclass(frozen=True)
class KeyFacts:
    """A key that exists."""

    id: str
    name: str
    machine: str
    environment: str
    active: bool = True
    expires: float | None = None
    bound: bool = False  # to 192.0.2.0/24


@dataclass(frozen=True)
class Asked:
    """A verification: what was presented, from where, needing what."""

    text: str
    inside: bool
    needs: str
    malformed: bool = False


class History(Generic[_T]):
    """What something was, and since when; None where it did not exist."""

    def __init__(self) -> None:
        self._since: list[float] = [float("-inf")]
        self._states: list[_T | None] = [None]

    @property
    def last(self) -> _T | None:
        return self._states[-1]

    def add(self, when: float, state: _T | None) -> None:
        self._since.append(when)
        self._states.append(state)

    def within(self, since: float, until: float) -> list[_T | None]:
        first = bisect_right(self._since, since) - 1
        return self._states[first : bisect_right(self._since, until)]

    def changes(self, since: float, until: float) -> list[float]:
        return [when for when in self._since if since < when <= until]


@dataclass
class Truth:
    """Every key (by its text) and machine (by its id), through all its history."""

    partitioned: bool
    keys: dict[str, History[KeyFacts]] = field(default_factory=dict)
    machines: dict[str, History[bool]] = field(default_factory=dict)

    def set_key(self, now: float, text: str, facts: KeyFacts | None) -> None:
        self.keys.setdefault(text, History()).add(now, facts)

    def set_machine(self, now: float, machine: str, active: bool | None) -> None:
        self.machines.setdefault(machine, History()).add(now, active)
        if active is None:
            for text, history in self.keys.items():
                if history.last is not None and history.last.machine == machine:
                    self.set_key(now, text, None)

    def existing(self) -> dict[str, KeyFacts]:
        return {text: h.last for text, h in self.keys.items() if h.last is not None}

    def snapshot(self) -> tuple[dict[str, KeyFacts | None], dict[str, bool | None]]:
        return {t: h.last for t, h in self.keys.items()}, {m: h.last for m, h in self.machines.items()}

    def restore(self, now: float, taken: tuple[dict[str, KeyFacts | None], dict[str, bool | None]]) -> None:
        keys, machines = taken
        for text, history in self.keys.items():
            history.add(now, keys.get(text))
        for machine, states in self.machines.items():
            states.add(now, machines.get(machine))

    def ever_valid(self, text: str) -> bool:
        """Tell whether a key was ever one to accept."""
        history = self.keys.get(text)
        return history is not None and any(
            facts is not None and facts.active and facts.environment == "prod"
            for facts in history.within(float("-inf"), float("inf"))
        )

    def _states(self, text: str, since: float, until: float) -> list[tuple[KeyFacts, bool | None] | None]:
        """Give what the key and its machine were together at some moment of a span."""
        history = self.keys.get(text)
        if history is None:
            return [None]
        states: list[tuple[KeyFacts, bool | None] | None] = []
        moments = sorted({since, *history.changes(since, until)})
        for start, end in zip(moments, [*moments[1:], until], strict=True):
            facts = history.within(start, start)[0]
            if facts is None:
                states.append(None)
                continue
            # Where key and machine are read from two snapshots, each may be of another moment of the span.
            span = (since, until) if self.partitioned else (start, end)
            states += [(facts, active) for active in self.machines[facts.machine].within(*span)]
        return states

    def answers(self, asked: Asked, since: float, until: float, offsets: list[float]) -> dict[str, set[str]]:
        """Give every answer that was right at some moment of a span: reason or "accept" -> names of the key."""
        right: dict[str, set[str]] = {}
        if asked.malformed:
            return {"malformed_key": set()}
        for state in self._states(asked.text, since, until):
            if state is None:
                right.setdefault("unknown_key", set())
                continue
            for answer in _judge(asked, *state, until, offsets):
                right.setdefault(answer, set()).add(state[0].name)
        return right


def _judge(
    asked: Asked, facts: KeyFacts, machine: bool | None, until: float, offsets: list[float]
) -> list[str]:
    if facts.environment != "prod":
        return ["wrong_environment"]
    if not facts.active:
        return ["key_inactive"]
    answers = []
    if facts.expires is not None:
        if START + until + max(offsets) > facts.expires - TOLERANCE:
            answers.append("key_expired")
        if START + until + min(offsets) >= facts.expires + TOLERANCE:
            return answers + ([] if machine else ["machine_inactive"])  # either reason is true
    if machine is None:
        return [*answers, "unknown_key"]
    if not machine:
        return [*answers, "machine_inactive"]
    if facts.bound and not asked.inside:
        return [*answers, "network_not_allowed"]
    if asked.needs == "contrats:écriture":
        return [*answers, "insufficient_rights"]
    return [*answers, "accept"]


def rename(facts: KeyFacts, name: str) -> KeyFacts:
    return replace(facts, name=name)
