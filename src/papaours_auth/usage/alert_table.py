"""Alerts in the usage file: one table, and the statements on it. Whoever calls holds the transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from .alerts import Alert, Sign, Subject, worse

TABLE: Final = """
create table if not exists usage_alerts(id integer primary key autoincrement, sign text not null,
  kind text not null, subject text not null, machine_id text not null, severity text not null,
  first integer not null, last integer not null, findings integer not null, evidence text not null,
  muted_until integer not null, turn integer not null) strict;
create index if not exists usage_alerts_subject on usage_alerts(subject, kind, sign, id);
create index if not exists usage_alerts_last on usage_alerts(last);
create index if not exists usage_alerts_turn on usage_alerts(turn, id);
"""
MOST: Final = 100_000
"""Alerts kept of keys, and as many of networks."""

_COLUMNS: Final = (
    "id, sign, kind, subject, machine_id, severity, first, last, findings, evidence, muted_until"
)
_Row: TypeAlias = "tuple[int, str, Any, str, str, Any, int, int, int, str, int]"  # Any: words of a Literal
_Value: TypeAlias = "str | int"


def latest(connection: sqlite3.Connection, subjects: Iterable[str]) -> list[Alert]:
    """Give the latest alert of each sign on these subjects."""
    return _read(
        connection,
        "id in (select max(id) from usage_alerts where subject in (select value from json_each(?)) "
        "group by subject, kind, sign)",
        (json.dumps(list(subjects)),),
    )


def keep(
    connection: sqlite3.Connection, alerts: Iterable[Alert], before: Mapping[int, Alert], turn: int
) -> None:
    """Write alerts that were opened or extended; those to be told get this turn's number."""
    for alert in alerts:
        former = before.get(alert.id)
        if former is None:
            connection.execute(
                "insert into usage_alerts(sign, kind, subject, machine_id, severity, first, last, findings, "
                "evidence, muted_until, turn) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (alert.sign, *alert.subject, *_values(alert), alert.muted_until, turn),
            )
            continue
        # Not `muted_until`: somebody may have muted it while we computed.
        connection.execute(
            "update usage_alerts set severity = ?, first = ?, last = ?, findings = ?, evidence = ? where id = ?",
            (*_values(alert), alert.id),
        )
        if worse(former.severity, alert.severity) != former.severity or (former.muted and not alert.muted):
            connection.execute("update usage_alerts set turn = ? where id = ?", (turn, alert.id))


def forget(connection: sqlite3.Connection) -> None:
    """Keep the bound: the oldest go. A flood of networks costs no key its history."""
    for kind in ("key", "network"):
        connection.execute(
            "delete from usage_alerts where kind = ? and id <= "
            "(select id from usage_alerts where kind = ? order by id desc limit 1 offset ?)",
            (kind, kind, MOST),
        )


def since(
    connection: sqlite3.Connection, moment: int, sign: Sign | None = None, limit: int = 1000
) -> list[Alert]:
    """List alerts whose last finding is not before a moment (µs), the latest first."""
    return _read(
        connection,
        "last >= ? and (? = '' or sign = ?) order by last desc, id desc limit ?",
        (moment, sign or "", sign or "", limit),
    )


def numbered(connection: sqlite3.Connection, number: int) -> Alert | None:
    """Give one alert."""
    return next(iter(_read(connection, "id = ?", (number,))), None)


def untold(connection: sqlite3.Connection, turn: int, number: int) -> list[tuple[int, Alert]]:
    """List what was opened, or became worse, after this turn and number, in order, with its turn."""
    rows = connection.execute(
        f"select {_COLUMNS}, turn from usage_alerts where (turn, id) > (?, ?) order by turn, id limit 100",  # noqa: S608 - our words
        (turn, number),
    )
    return [(row[-1], _alert(row[:-1])) for row in rows]


def mute(connection: sqlite3.Connection, alert: Alert, until: int) -> None:
    """Silence an alert's sign and subject until a time (µs): this alert, and those that came after it."""
    connection.execute(
        "update usage_alerts set muted_until = ? where subject = ? and kind = ? and sign = ? and id >= ?",
        (until, alert.subject.id, alert.subject.kind, alert.sign, alert.id),
    )


def _values(alert: Alert) -> tuple[_Value, ...]:
    evidence = json.dumps(alert.evidence, ensure_ascii=False)
    return alert.severity, alert.first, alert.last, alert.findings, evidence


def _read(connection: sqlite3.Connection, where: str, values: tuple[_Value, ...]) -> list[Alert]:
    return [
        _alert(row)
        for row in connection.execute(f"select {_COLUMNS} from usage_alerts where {where}", values)  # noqa: S608 - our words
    ]


def _alert(row: _Row) -> Alert:
    number, sign, kind, subject, machine, severity, first, last, findings, evidence, muted = row
    return Alert(
        number, Sign(sign), Subject(kind, subject, machine), severity, first, last, findings,
        json.loads(evidence), muted,
    )  # fmt: skip
