"""Alerts: what was found unusual, in figures, and what to do next in the words of the document on security."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Literal, NamedTuple, TypeAlias

_HOUR: Final = 3_600_000_000
OPEN_FOR: Final = 24 * _HOUR
"""An alert that was not extended for so long (µs) is closed: the next finding opens another."""
FOREVER: Final = 1 << 62
"""The end of a muting without one."""
_LISTED: Final = 10  # names in one figure

Figure: TypeAlias = "int | float | str | list[str]"
Evidence: TypeAlias = "dict[str, Figure]"
Severity = Literal["low", "medium", "high"]
_ORDER: Final = {"low": 0, "medium": 1, "high": 2}


class Sign(StrEnum):
    """The four signs of compromise."""

    ADDRESSES = "addresses"
    RISE = "rise"
    ERRORS = "errors"
    RESOURCES = "resources"


_LEADING: Final = {Sign.RISE: "ratio", Sign.ERRORS: "failures", Sign.RESOURCES: "refused"}

TITLES: Final[Mapping[Sign, Mapping[str, str]]] = {
    Sign.ADDRESSES: {
        "en": "API calls from unusual IP addresses",
        "fr": "Des appels API depuis des adresses IP inhabituelles",
    },
    Sign.RISE: {
        "en": "A sudden increase in the number of API calls",
        "fr": "Une augmentation soudaine du nombre d'appels API",
    },
    Sign.ERRORS: {
        "en": "Repeated authentication errors",
        "fr": "Des erreurs d'authentification répétées",
    },
    Sign.RESOURCES: {
        "en": "Access to unusual resources",
        "fr": "Des accès à des ressources inhabituelles",
    },
}
_KEY_STEPS: Final = {
    "en": (
        "Disable the key immediately.",
        "Create a new key to replace it.",
        "Update your systems with the new key.",
        "Inform your administrator if you think that sensitive data may have been read.",
    ),
    "fr": (
        "Désactivez immédiatement la clé.",
        "Créez une nouvelle clé pour la remplacer.",
        "Mettez à jour vos systèmes avec la nouvelle clé.",
        "Informez votre administrateur si vous pensez que des données sensibles ont pu être consultées.",
    ),
}
_NETWORK_STEPS: Final = {
    "en": (
        "No known key was presented, so there is none to disable.",
        "Somebody tries keys, or a system still uses one that was deleted.",
        "If the network is one of your systems', update it with the new key.",
        "If it is not, inform your administrator, who can refuse the network.",
    ),
    "fr": (
        "Aucune clé connue n'a été présentée : il n'y en a pas à désactiver.",
        "Quelqu'un essaie des clés, ou un système utilise encore une clé supprimée.",
        "Si ce réseau est celui d'un de vos systèmes, mettez-le à jour avec la nouvelle clé.",
        "Sinon, informez votre administrateur, qui peut refuser ce réseau.",
    ),
}


class Subject(NamedTuple):
    """Whom it is about: a key (by its id), or a network without a known key."""

    kind: Literal["key", "network"]
    id: str
    machine_id: str = ""


class Finding(NamedTuple):
    """One observation, which opens an alert or extends one. Times are in µs since 1970 (UTC)."""

    sign: Sign
    subject: Subject
    time: int
    severity: Severity
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Alert:
    """A sign of compromise on one subject, from its first finding to its last (µs since 1970, UTC).

    ``id`` is 0 until it is stored; ``muted_until`` 0 where it is not muted.
    """

    id: int
    sign: Sign
    subject: Subject
    severity: Severity
    first: int
    last: int
    findings: int
    evidence: Evidence = field(default_factory=dict)
    muted_until: int = 0

    @property
    def title(self) -> str:
        """The sign in words."""
        return TITLES[self.sign]["en"]

    @property
    def muted(self) -> bool:
        """Whether it is not told: its last finding came before the end of the muting."""
        return self.last < self.muted_until

    def next_steps(self, language: Literal["en", "fr"] = "en") -> tuple[str, ...]:
        """Say what to do, in the words of the document "Sécurité et bonnes pratiques"."""
        return (_KEY_STEPS if self.subject.kind == "key" else _NETWORK_STEPS)[language]

    def takes(self, finding: Finding) -> bool:
        """Whether a finding of its sign and subject extends it. A late one does, an absurd one does not."""
        return self.first - OPEN_FOR < finding.time < self.last + OPEN_FOR

    def extended(self, finding: Finding) -> Alert:
        """Give it with one more finding."""
        return replace(
            self,
            severity=worse(self.severity, finding.severity),
            first=min(self.first, finding.time),
            last=max(self.last, finding.time),
            findings=self.findings + 1,
            evidence=_merged(self.sign, self.evidence, finding.evidence),
        )


def opened(finding: Finding, muted_until: int = 0) -> Alert:
    """Open an alert with its first finding."""
    sign, subject, time, severity, evidence = finding
    return Alert(0, sign, subject, severity, time, time, 1, evidence, muted_until)


def worse(one: Severity, other: Severity) -> Severity:
    """Give the greater severity."""
    return one if _ORDER[one] >= _ORDER[other] else other


def _merged(sign: Sign, old: Evidence, new: Evidence) -> Evidence:
    """Join figures: those that belong together from where it was worst, calls summed, names listed."""
    leading = _LEADING.get(sign, "")
    merged = {**old, **new} if _number(new.get(leading)) >= _number(old.get(leading)) else {**new, **old}
    for name in old.keys() & new.keys():
        before, after = old[name], new[name]
        if isinstance(before, list) and isinstance(after, list):
            merged[name] = _listed([*before, *after])
        elif name == "calls" and sign in (Sign.ADDRESSES, Sign.RESOURCES):
            merged[name] = int(_number(before) + _number(after))
    return merged


def _number(figure: Figure | None) -> float:
    return figure if isinstance(figure, int | float) else 0.0


def _listed(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))[:_LISTED]


class Book:
    """The latest alert of each sign and subject, and what changed in them."""

    def __init__(self, latest: Iterable[Alert] = ()) -> None:
        self._latest = {(*alert.subject[:2], alert.sign): alert for alert in latest}
        self._changed: list[Alert] = []
        self._numbers: dict[tuple[str, str, Sign], int] = {}

    def note(self, finding: Finding) -> Alert:
        """Extend the open alert, or open one; one that is muted stays so."""
        place = (*finding.subject[:2], finding.sign)
        before = self._latest.get(place)
        extends = before is not None and before.takes(finding)
        if before is not None and extends:
            alert = before.extended(finding)
        else:
            alert = opened(finding, before.muted_until if before is not None else 0)
        self._latest[place] = alert = self._together(alert)
        if extends and place in self._numbers:
            self._changed[self._numbers[place]] = alert
        else:
            self._numbers[place] = len(self._changed)
            self._changed.append(alert)
        return alert

    def _together(self, alert: Alert) -> Alert:
        """Two signs on one key within a day are worse than each."""
        if alert.subject.kind != "key" or alert.severity == "high":
            return alert
        for sign in Sign:
            other = self._latest.get((*alert.subject[:2], sign))
            if other is not None and sign is not alert.sign and abs(alert.last - other.last) < OPEN_FOR:
                return replace(alert, severity="high")
        return alert

    def changed(self) -> list[Alert]:
        """Give the alerts opened or extended since the book was made, in the order of their opening."""
        return list(self._changed)
