"""Looking for signs of compromise in the file that an `SQLiteSink` fills, whoever and how many fill it.

A step reads what is new, computes without a lock, and writes states, alerts and the position in one transaction. What
reads the same at once, in another process, loses that race and leaves nothing: no alert is lost or doubled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import quote

from ..exceptions import InvalidInput, NotFound, StoreUnavailable
from . import alert_table
from .alerts import FOREVER, Alert, Book, Sign
from .event import VERSION, Event, Refusals
from .signs import ATTEMPTS, Detector, place_of
from .sinks import Batch, Sink

logger = logging.getLogger("papaours_auth.usage.signs")

_TABLES: Final = (
    """
create table if not exists usage_signs(place text not null unique, kind text not null, seen integer not null,
  weight integer not null, state text not null) strict;
create index if not exists usage_signs_worth on usage_signs(kind, weight, seen);
create table if not exists usage_signs_position(one integer primary key check(one = 1), event integer not null,
  turn integer not null) strict;
create table if not exists usage_signs_refusals(minute integer not null, reason text not null,
  network text not null, count integer not null, primary key(minute, reason, network)) strict, without rowid;
create table if not exists usage_signs_told(reader text primary key, turn integer not null,
  alert integer not null) strict, without rowid;
insert or ignore into usage_signs_position values (1, 0, 0);
"""
    + alert_table.TABLE
)
_COLUMNS: Final = (
    "event_id, time, key_id, machine_id, address, method, route, status, reason, outcome, service, "
    "environment, duration, request_id"
)
_HOUR: Final = 3_600_000_000
_RECENT: Final = 101  # events whose median time says what time it is
_MOST: Final = {"network": 4096, "key": 100_000}
_STEPS_PER_WRITE: Final = 4
_TIDY_EVERY: Final = 1000  # turns
_LOG: Final = "log"
_UNREADABLE: Final = "the usage file cannot be read: has anything been recorded in it?"

Notify = Callable[[Alert], object]
Place: TypeAlias = tuple[int, int]
"""How far somebody has heard of alerts."""


class _Taken(NamedTuple):
    """What a step reads: all of it in one snapshot."""

    turn: int
    position: int
    events: Sequence[Event]
    refusals: Sequence[tuple[Refusals, int]]  # what is new, and the count it came to
    states: dict[str, str]
    alerts: Sequence[Alert]

    def __bool__(self) -> bool:
        return bool(self.events or self.refusals)


class Watch:
    """Finds signs in a usage file, and keeps their alerts in it (``usage_alerts``).

    ``notify`` is called with each alert that is opened or becomes worse, unless it is muted; what it raises is
    logged, and it gets the alert again at the next step: at least once. ``reader`` names it, so that it goes on
    where it stopped; a new one hears of what comes after. With ``log``, each alert also goes to the log
    ``papaours_auth.usage.signs``.

    Opens the file for each call, so it may cross a fork, and several may watch one file. Raises `StoreUnavailable`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        notify: Notify | None = None,
        reader: str = "app",
        log: bool = True,
        batch: int = 5_000,
    ) -> None:
        self._uri = f"file:{quote(str(Path(path).absolute()))}?mode=rw"
        self._told: dict[str, Notify] = {_LOG: _log} if log else {}
        if notify is not None:
            self._told[f"reader {reader}"] = notify
        self._batch = batch
        self._ready = False
        self._failed = False

    def step(self) -> int:
        """Read at most a batch, tell of what was found, and give how much was read: 0 when all is read."""
        with self._open() as connection:
            taken = self._take(connection)
            if taken:
                detector, book = Detector(taken.states), Book(taken.alerts)
                _feed(taken, detector, book)
                with _transaction(connection):
                    _keep(connection, taken, detector, book)
            self._tell(connection)
        return len(taken.events) + len(taken.refusals)

    def catch_up(self) -> int:
        """Read all there is; give how much it was."""
        read = 0
        while step := self.step():
            read += step
        return read

    def alerts(self, *, since: datetime | None = None, sign: Sign | None = None) -> list[Alert]:
        """List alerts that were extended since then, muted ones too, the latest first. At most 1,000."""
        with self._open() as connection:
            return alert_table.since(connection, _micro(since) if since is not None else -FOREVER, sign)

    def alert(self, number: int) -> Alert:
        """Give one alert. Raises `NotFound`."""
        with self._open() as connection:
            return _numbered(connection, number)

    def news(self, after: Place | None = None) -> tuple[list[Alert], Place]:
        """List alerts that were opened or became worse after a place, and give the place to go on from.

        Without one: none, and the place from which on all is news.
        """
        with self._open() as connection:
            if after is None:
                (turn,) = connection.execute("select turn from usage_signs_position").fetchone()
                return [], (turn, FOREVER)
            found = alert_table.untold(connection, *after)
        alerts = [alert for _, alert in found if not alert.muted]
        return alerts, (found[-1][0], found[-1][1].id) if found else after

    def mute(self, number: int, until: datetime | None = None) -> Alert:
        """Silence an alert's sign for its subject, until then or for ever. Raises `NotFound`.

        It is still extended, and listed. The time is that of the calls.
        """
        return self._mute(number, _micro(until) if until is not None else FOREVER)

    def unmute(self, number: int) -> Alert:
        """End a muting. Raises `NotFound`."""
        return self._mute(number, 0)

    def _mute(self, number: int, until: int) -> Alert:
        with self._open() as connection, _transaction(connection):
            alert_table.mute(connection, _numbered(connection, number), until)
            return _numbered(connection, number)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self._uri, uri=True, timeout=5.0, isolation_level=None)
            ) as connection:
                connection.execute("pragma synchronous=normal")  # as the sink has it
                if not self._ready:
                    self._prepare(connection)
                yield connection
        except sqlite3.Error as error:
            self._ready = False  # it may come back as another file
            raise StoreUnavailable(_UNREADABLE) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("select 1 from usage_events limit 1")  # before anything is made in another's file
        with _transaction(connection):
            for statement in filter(str.strip, _TABLES.split(";")):  # `executescript` would commit
                connection.execute(statement)
            for reader in self._told:
                connection.execute(
                    "insert or ignore into usage_signs_told select ?, turn, ? from usage_signs_position",
                    (reader, FOREVER),
                )
        self._ready = True

    def _take(self, connection: sqlite3.Connection) -> _Taken:
        connection.execute("begin")
        try:
            position, turn = connection.execute("select event, turn from usage_signs_position").fetchone()
            (last,) = connection.execute("select max(id) from usage_events").fetchone()
            if (last or 0) < position:  # all was forgotten, and the numbers began anew
                position = 0
            refusals = self._new_refusals(connection, _horizon(connection, position))
            # While refusals are behind, events wait: the horizon goes with them.
            events = [] if len(refusals) >= self._batch else self._new_events(connection, position)
            fed: list[Event | Refusals] = [*(event for _, event in events), *(entry for entry, _ in refusals)]
            return _Taken(
                turn,
                events[-1][0] if events else position,
                [event for _, event in events],
                refusals,
                _states(connection, {place_of(one) for one in fed}),
                alert_table.latest(
                    connection, {one.network if isinstance(one, Refusals) else one.key_id for one in fed}
                ),
            )
        finally:
            connection.execute("rollback")

    def _new_events(self, connection: sqlite3.Connection, position: int) -> list[tuple[int, Event]]:
        rows = connection.execute(
            f"select id, {_COLUMNS} from usage_events where id > ? order by id limit ?",  # noqa: S608 - our words
            (position, self._batch),
        )
        return [(number, Event(VERSION, *row)) for number, *row in rows]

    def _new_refusals(self, connection: sqlite3.Connection, horizon: int) -> list[tuple[Refusals, int]]:
        rows = connection.execute(
            "select r.minute, r.reason, r.network, r.count - coalesce(s.count, 0), r.count from usage_refusals r "
            "left join usage_signs_refusals s using(minute, reason, network) where r.minute >= ? "
            "and r.reason in (select value from json_each(?)) and r.count > coalesce(s.count, 0) "
            "order by r.minute limit ?",
            (horizon, json.dumps(sorted(ATTEMPTS)), self._batch),
        )
        return [(Refusals(*row[:-1]), row[-1]) for row in rows]

    def _tell(self, connection: sqlite3.Connection) -> None:
        for reader, notify in self._told.items():
            row = connection.execute(
                "select turn, alert from usage_signs_told where reader = ?", (reader,)
            ).fetchone()
            for turn, alert in alert_table.untold(connection, *row):
                if not alert.muted and not self._notified(notify, alert):
                    break
                connection.execute(
                    "update usage_signs_told set turn = ?, alert = ? where reader = ?",
                    (turn, alert.id, reader),
                )

    def _notified(self, notify: Notify, alert: Alert) -> bool:
        try:
            notify(alert)
        except Exception as error:  # noqa: BLE001 - anybody's code, which must not end the watch
            if not self._failed:
                logger.warning(
                    "telling of an alert failed: %s; it is told again at the next step", type(error).__name__
                )
            self._failed = True
            return False
        self._failed = False
        return True


class WatchingSink:
    """An `SQLiteSink`'s wrapper for apps that want alerts in process: watches the file after each batch.

    Recording never suffers: what goes wrong is logged. Several processes may each have one; an alert is opened by
    one of them. A busy service better runs ``papaours-auth signs --follow`` beside.
    """

    def __init__(self, sink: Sink, watch: Watch) -> None:
        self._sink, self._watch = sink, watch
        self._said = ""

    def write(self, batch: Batch) -> None:
        """Store a batch, then look at it. See `Sink`."""
        self._sink.write(batch)
        try:
            for _ in range(_STEPS_PER_WRITE):
                if not self._watch.step():
                    break
        except Exception as error:  # noqa: BLE001 - the batch is stored: it must not come again for this
            if type(error).__name__ != self._said:
                logger.warning("looking for signs failed: %s", type(error).__name__)
            self._said = type(error).__name__
        else:
            self._said = ""


def _feed(taken: _Taken, detector: Detector, book: Book) -> None:
    for refusals, _ in taken.refusals:
        for finding in detector.refusals(refusals):
            book.note(finding)
    for event in taken.events:
        for finding in detector.event(event):
            book.note(finding)


def _keep(connection: sqlite3.Connection, taken: _Taken, detector: Detector, book: Book) -> None:
    moved = connection.execute(
        "update usage_signs_position set event = ?, turn = ? where turn = ?",
        (taken.position, taken.turn + 1, taken.turn),
    )
    if moved.rowcount != 1:
        return  # another process was faster: the next step begins where it stopped
    connection.executemany(
        "insert into usage_signs values (?, ?, ?, ?, ?) on conflict(place) do update "
        "set seen = excluded.seen, weight = excluded.weight, state = excluded.state",
        [
            (place, place.partition(" ")[0], habits.seen, habits.weight, habits.dump())
            for place, habits in detector.habits.items()
        ],
    )
    connection.executemany(
        "insert into usage_signs_refusals values (?, ?, ?, ?) on conflict do update set count = excluded.count",
        [(*refusals[:3], count) for refusals, count in taken.refusals],
    )
    alert_table.keep(connection, book.changed(), {alert.id: alert for alert in taken.alerts}, taken.turn + 1)
    _forget(connection)
    if taken.turn % _TIDY_EVERY == 0:
        connection.execute(
            "delete from usage_signs_refusals where (minute, reason, network) not in "
            "(select minute, reason, network from usage_refusals)"
        )


def _forget(connection: sqlite3.Connection) -> None:
    for kind, most in _MOST.items():
        (known,) = connection.execute("select count(*) from usage_signs where kind = ?", (kind,)).fetchone()
        if known > most:
            connection.execute(
                "delete from usage_signs where rowid in "
                "(select rowid from usage_signs where kind = ? order by weight, seen limit ?)",
                (kind, known - most),
            )
    alert_table.forget(connection)


def _horizon(connection: sqlite3.Connection, position: int) -> int:
    """Say from when on refusals may still grow: an hour before the median of the events read last."""
    rows = connection.execute(
        "select time from usage_events where id <= ? order by id desc limit ?", (position, _RECENT)
    )
    times = [time for (time,) in rows]
    return int(median(times)) - _HOUR if times else -FOREVER


def _states(connection: sqlite3.Connection, places: set[str]) -> dict[str, str]:
    return dict(
        connection.execute(
            "select place, state from usage_signs where place in (select value from json_each(?))",
            (json.dumps(list(places)),),
        )
    )


def _numbered(connection: sqlite3.Connection, number: int) -> Alert:
    alert = alert_table.numbered(connection, number)
    if alert is None:
        raise NotFound("there is no alert of this number: 'papaours-auth signs' lists them")
    return alert


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("begin immediate")
    try:
        yield
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")


def _micro(moment: datetime) -> int:
    if moment.tzinfo is None:
        raise InvalidInput("a time without its zone could mean any of them: give one")
    return int(moment.timestamp() * 1e6)


def _log(alert: Alert) -> None:
    logger.warning(
        "sign of compromise %d (%s): %s: %s %s: %s",
        alert.id,
        alert.severity,
        alert.title,
        alert.subject.kind,
        alert.subject.id,
        json.dumps(alert.evidence, ensure_ascii=False),
    )
