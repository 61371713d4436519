"""Alerts in the tables of usage: the statements on them. Whoever calls holds the transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from .alerts import Alert, Sign, Subject, worse
from .ledger import Desk, ask_of_each
from .reader import Ask, Cell, Row

MOST: Final = 100_000
"""Alerts kept of keys, and as many of networks."""

_ALERTS: Final = (
    "select id, sign, kind, subject, machine_id, severity, first, last, findings, evidence, muted_until, turn "
    "from usage_alerts where "
)
_Row: TypeAlias = (
    "tuple[int, str, Any, str, str, Any, int, int, int, str, int, int]"  # Any: words of a Literal
)


def latest(ask: Ask, subjects: Iterable[str]) -> list[Alert]:
    """Give the latest alert of each sign on these subjects."""
    rows = ask_of_each(
        ask,
        _ALERTS + "id in (select max(id) from usage_alerts where subject in (:names) "  # noqa: S608 - our words
        "group by subject, kind, sign)",
        set(subjects),
    )
    return _alerts(rows)


def keep(desk: Desk, alerts: Iterable[Alert], before: Mapping[int, Alert], turn: int) -> None:
    """Write alerts that were opened or extended; those to be told get this turn's number."""
    for alert in alerts:
        former = before.get(alert.id)
        if former is None:
            desk.do(
                "insert into usage_alerts(sign, kind, subject, machine_id, severity, first, last, findings, "
                "evidence, muted_until, turn) values (:sign, :kind, :subject, :machine_id, :severity, :first, "
                ":last, :findings, :evidence, :muted_until, :turn)",
                [{**_named(alert), **_values(alert), "muted_until": alert.muted_until, "turn": turn}],
            )
            continue
        # Not `muted_until`: somebody may have muted it while we computed.
        desk.do(
            "update usage_alerts set severity = :severity, first = :first, last = :last, findings = :findings, "
            "evidence = :evidence where id = :id",
            [{**_values(alert), "id": alert.id}],
        )
        if worse(former.severity, alert.severity) != former.severity or (former.muted and not alert.muted):
            desk.do("update usage_alerts set turn = :turn where id = :id", [{"turn": turn, "id": alert.id}])


def forget(desk: Desk) -> None:
    """Keep the bound: the oldest go. A flood of networks costs no key its history."""
    for kind in ("key", "network"):
        beyond = desk.ask(
            "select id from usage_alerts where kind = :kind order by id desc limit 1 offset :most",
            {"kind": kind, "most": MOST},
        )
        desk.do(
            "delete from usage_alerts where kind = :kind and id <= :id",
            [{"kind": kind, "id": number} for (number,) in beyond],
        )


def since(ask: Ask, moment: int, sign: Sign | None = None, limit: int = 1000) -> list[Alert]:
    """List alerts whose last finding is not before a moment (µs), the latest first."""
    of = "" if sign is None else "sign = :sign and "
    values: dict[str, Cell] = {"moment": moment, "most": limit} | (
        {} if sign is None else {"sign": sign.value}
    )
    return _alerts(ask(f"{_ALERTS}{of}last >= :moment order by last desc, id desc limit :most", values))


def numbered(ask: Ask, number: int) -> Alert | None:
    """Give one alert."""
    return next(iter(_alerts(ask(_ALERTS + "id = :id", {"id": number}))), None)


def untold(ask: Ask, turn: int, number: int) -> list[tuple[int, Alert]]:
    """List what was opened, or became worse, after this turn and number, in order, with its turn."""
    rows = ask(
        _ALERTS + "turn >= :turn and (turn > :turn or id > :id) order by turn, id limit 100",
        {"turn": turn, "id": number},
    )
    return [(row[-1], alert) for row, alert in zip(rows, _alerts(rows), strict=True)]


def mute(desk: Desk, alert: Alert, until: int) -> None:
    """Silence an alert's sign and subject until a time (µs): this alert, and those that came after it."""
    desk.do(
        "update usage_alerts set muted_until = :until "
        "where subject = :subject and kind = :kind and sign = :sign and id >= :id",
        [{**_named(alert), "until": until, "id": alert.id}],
    )


def _named(alert: Alert) -> dict[str, Cell]:
    kind, subject, machine = alert.subject
    return {"sign": alert.sign.value, "kind": kind, "subject": subject, "machine_id": machine}


def _values(alert: Alert) -> dict[str, Cell]:
    return {
        "severity": alert.severity,
        "first": alert.first,
        "last": alert.last,
        "findings": alert.findings,
        "evidence": json.dumps(alert.evidence, ensure_ascii=False),
    }


def _alerts(rows: Sequence[Row]) -> list[Alert]:
    return [_alert(tuple(row)) for row in rows]


def _alert(row: _Row) -> Alert:
    number, sign, kind, subject, machine, severity, first, last, findings, evidence, muted, _ = row
    return Alert(
        number, Sign(sign), Subject(kind, subject, machine), severity, first, last, findings,
        json.loads(evidence), muted,
    )  # fmt: skip
