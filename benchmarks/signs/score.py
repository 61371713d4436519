"""What a detector found of what was planted: recall, precision, false alarms and delay, per sign."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from papaours_auth.usage.alerts import Alert, Book
from papaours_auth.usage.event import Refusals
from papaours_auth.usage.signs import Detector

from .generator import Attack, World

SIGNS: Final = ("addresses", "rise", "errors", "resources")
AFTER: Final = 3600.0  # an alert may come so many seconds after the attack's last call
MICRO: Final = 1e6


class Raised(NamedTuple):
    """An alert at the end, and when the call came that raised it (seconds)."""

    alert: Alert
    at: float


@dataclass
class Score:
    """One sign's figures, over any number of worlds."""

    attacks: int = 0
    caught: int = 0
    alerts: int = 0
    true: int = 0
    false: int = 0
    key_months: float = 0.0
    delays: list[float] = field(default_factory=list)
    in_open: int = 0
    by_strength: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        return self.caught / self.attacks if self.attacks else 1.0

    @property
    def precision(self) -> float:
        return self.true / (self.true + self.false) if self.true + self.false else 1.0

    @property
    def false_alarms(self) -> float:
        """False alarms per key and month."""
        return self.false / self.key_months


def watched(world: World) -> tuple[list[Raised], int]:
    """Run a world through the detector; give its alerts, and how many events there were."""
    detector, book = Detector(), Book()
    raised: dict[int, float] = {}
    count = 0
    for fed in world.stream():
        count += 1
        if isinstance(fed, Refusals):
            findings = detector.refusals(fed)
            now = fed.minute / MICRO + 60
        else:
            findings = detector.event(fed)
            now = fed.time / MICRO
        for finding in findings:
            before = len(book.changed())
            book.note(finding)
            if len(book.changed()) > before:
                raised[before] = now
    return [Raised(alert, raised[place]) for place, alert in enumerate(book.changed())], count


def judge(world: World, found: Sequence[Raised], scores: dict[str, Score]) -> None:
    """Add a world to the scores.

    An alert is true where its sign was planted on its subject at that time; false where nothing was; and neither
    where another sign was: an attack may well show in two ways.
    """
    for sign in SIGNS:
        score = scores.setdefault(sign, Score())
        score.key_months += sum(world.days - caller.birth for caller in world.callers) / 30
        mine = [raised for raised in found if raised.alert.sign == sign]
        score.alerts += len(mine)
        score.true += sum(any(_hits(raised, attack) for attack in _of(world, sign)) for raised in mine)
        score.false += sum(not any(_hits(raised, attack) for attack in world.attacks) for raised in mine)
        for attack in _of(world, sign):
            hits = [raised for raised in mine if _hits(raised, attack)]
            score.attacks += 1
            score.caught += bool(hits)
            kind = "key" if attack.subject.startswith("key") else "network"
            name = f"{kind}: {attack.strength}" if sign == "errors" else attack.strength
            score.by_strength.setdefault(name, []).append(bool(hits))
            if hits:
                delay = min(raised.at for raised in hits) - attack.begin
                score.in_open += delay < -1
                score.delays.append(max(0.0, delay))


def _of(world: World, sign: str) -> Iterable[Attack]:
    return (attack for attack in world.attacks if attack.sign == sign)


def _hits(raised: Raised, attack: Attack) -> bool:
    alert = raised.alert
    first, last = alert.first / MICRO, alert.last / MICRO
    return alert.subject.id == attack.subject and first <= attack.end + AFTER and last >= attack.begin - 60


def over(seeds: Iterable[int], **options: float) -> tuple[dict[str, Score], int]:
    """Judge several worlds; give the scores and how many events they had."""
    scores: dict[str, Score] = {}
    events = 0
    for seed in seeds:
        world = World(seed, **options)  # type: ignore[arg-type]
        found, count = watched(world)
        judge(world, found, scores)
        events += count
    return scores, events


def chained(scores: dict[str, Score]) -> list[float]:
    """Give all delays."""
    return list(itertools.chain.from_iterable(score.delays for score in scores.values()))
