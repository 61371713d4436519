"""What is true, by the simulation's own books, and the invariants. Shares no code with cache or decision."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

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
    pepper: str
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


class Snapshot(NamedTuple):
    """What everything is at one moment."""

    keys: dict[str, KeyFacts | None]
    machines: dict[str, bool | None]
    peppers: dict[str, str | None]
    foreign: dict[int, bool | None]


@dataclass
class Truth:
    """Every key (by its text) and machine (by its id), through all its history."""

    partitioned: bool
    keys: dict[str, History[KeyFacts]] = field(default_factory=dict)
    machines: dict[str, History[bool]] = field(default_factory=dict)
    peppers: dict[str, History[str]] = field(default_factory=dict)
    minted: dict[str, str] = field(default_factory=dict)  # a key's text -> the pepper that its tag is of
    foreign: dict[int, History[bool]] = field(
        default_factory=dict
    )  # parts to which a foreign key was ever added

    def set_key(self, now: float, text: str, facts: KeyFacts | None) -> None:
        self.keys.setdefault(text, History()).add(now, facts)

    def add_foreign(self, now: float, part: int) -> None:
        self.foreign.setdefault(part, History()).add(now, True)

    def holds_foreign(self, part: int, since: float, until: float) -> bool:
        """Tell whether, at some moment of a span, a foreign key had been added to a part."""
        history = self.foreign.get(part)
        return history is not None and True in history.within(since, until)

    def set_machine(self, now: float, machine: str, active: bool | None) -> None:
        self.machines.setdefault(machine, History()).add(now, active)
        if active is None:
            for text, history in self.keys.items():
                if history.last is not None and history.last.machine == machine:
                    self.set_key(now, text, None)

    def set_pepper(self, now: float, pepper: str, status: str) -> None:
        for history in self.peppers.values():
            if status == "primary" and history.last == "primary":
                history.add(now, "accept")
        self.peppers.setdefault(pepper, History()).add(now, status)

    @property
    def primary(self) -> str:
        """The pepper that mints and digests now."""
        return next(id_ for id_, history in self.peppers.items() if history.last == "primary")

    def primary_held(self, held: frozenset[str], since: float, until: float) -> bool:
        """Tell whether, at some moment of a span, the primary pepper was one of these."""
        return any("primary" in h.within(since, until) for id_, h in self.peppers.items() if id_ in held)

    def primary_missing(self, held: frozenset[str], since: float, until: float) -> bool:
        """Tell whether, at some moment of a span, the primary pepper was none of these."""
        return self.primary_held(frozenset(self.peppers) - held, since, until)

    def existing(self) -> dict[str, KeyFacts]:
        return {text: h.last for text, h in self.keys.items() if h.last is not None}

    def snapshot(self) -> Snapshot:
        return Snapshot(*({name: h.last for name, h in part.items()} for part in self._parts()))

    def restore(self, now: float, taken: Snapshot) -> None:
        snapshots: tuple[dict[Any, Any], ...] = taken
        for part, then in zip(self._parts(), snapshots, strict=True):
            for name, history in part.items():
                history.add(now, then.get(name))

    def _parts(self) -> tuple[dict[Any, History[Any]], ...]:
        return self.keys, self.machines, self.peppers, self.foreign

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

    def _found(self, pepper: str, since: float, until: float, held: frozenset[str]) -> set[bool]:
        """Tell whether keys of a pepper are found, at any moments of a span: they may be read apart from it."""
        if pepper not in held:
            return {False}
        return {status != "retired" for status in self.peppers[pepper].within(since, until)}

    def answers(
        self, asked: Asked, since: float, until: float, offsets: list[float], held: frozenset[str]
    ) -> dict[str, set[str]]:
        """Give every answer that was right at some moment of a span: reason or "accept" -> names of the key.

        ``held`` are the peppers of the process. One without the primary cannot tell that it does not know a key.
        """
        if asked.malformed:
            return {"malformed_key": set()}
        right: dict[str, set[str]] = {}
        minted_under = self.minted.get(asked.text)
        if minted_under is not None and minted_under not in held:
            right["malformed_key"] = set()
        else:
            for state in self._states(asked.text, since, until):
                found = {False} if state is None else self._found(state[0].pepper, since, until, held)
                if False in found:
                    right.setdefault("unknown_key", set())
                if state is not None and True in found:
                    for answer in _judge(asked, *state, until, offsets):
                        right.setdefault(answer, set()).add(state[0].name)
        cannot_tell = right.keys() & {"unknown_key", "malformed_key"}
        if cannot_tell and not self.primary_held(held, since, until):
            right = {answer: names for answer, names in right.items() if answer not in cannot_tell}
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
