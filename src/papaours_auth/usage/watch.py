"""Looking for signs of compromise where usage is kept, whoever and how many record it.

A step reads what is new, computes without a lock, and writes states, alerts and the position in one transaction. What
reads the same at once, in another process, loses that race and leaves nothing: no alert is lost or doubled.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple, TypeAlias

from ..exceptions import NotFound, StoreUnavailable
from . import alert_table
from .alerts import FOREVER, Alert, Book, Sign
from .event import VERSION, Event, Refusals
from .ledger import Desk, Ledger, ask_of_each, open_ledger
from .reader import Ask, Cell, Row, micro
from .signs import ATTEMPTS, Detector, place_of
from .sinks import Batch, Sink

logger = logging.getLogger("papaours_auth.usage.signs")

_EVENTS: Final = (
    "select id, event_id, time, key_id, machine_id, address, method, route, status, reason, outcome, service, "
    "environment, duration, request_id from usage_events where id > :position order by id limit :most"
)
_ATTEMPTS: Final = {f"a{place}": reason for place, reason in enumerate(sorted(ATTEMPTS))}
_GROWN: Final = (
    "select r.minute, r.reason, r.network, r.count, s.count from usage_refusals r "  # noqa: S608 - our words
    "left join usage_signs_refusals s on s.minute = r.minute and s.reason = r.reason and s.network = r.network "
    f"where r.minute >= :horizon and r.reason in ({', '.join(f':{name}' for name in _ATTEMPTS)}) "
    "and r.count > coalesce(s.count, 0) order by r.minute limit :most"
)
_TIDY: Final = (
    "delete from usage_signs_refusals where not exists (select 1 from usage_refusals r "
    "where r.minute = usage_signs_refusals.minute and r.reason = usage_signs_refusals.reason "
    "and r.network = usage_signs_refusals.network)"
)
_HOUR: Final = 3_600_000_000
_RECENT: Final = 101  # events whose median time says what time it is
_MOST: Final = {"network": 4096, "key": 100_000}
_STEPS_PER_WRITE: Final = 4
_TIDY_EVERY: Final = 1000  # turns
_LOG: Final = "log"

Notify = Callable[[Alert], object]
Place: TypeAlias = tuple[int, int]
"""How far somebody has heard of alerts."""


class _Taken(NamedTuple):
    """What a step reads: all of it in one snapshot."""

    turn: int
    position: int
    events: Sequence[Event]
    refusals: Sequence[_Grown]
    states: dict[str, str]
    alerts: Sequence[Alert]
    unsettled: int  # 0, or the last number there is, where a lower one may still appear

    def __bool__(self) -> bool:
        return bool(self.events or self.refusals)


class _Grown(NamedTuple):
    """What is new of a row of refusals, what it came to, and what was read of it before."""

    new: Refusals
    total: int
    before: int | None


class Watch:
    """Finds signs in recorded events, and keeps their alerts beside them (``usage_alerts``).

    Takes a file, a URL as sinks take them, or a ledger (`SQLLedger` over an engine of yours).

    ``notify`` is called with each alert that is opened or becomes worse, unless it is muted; what it raises is
    logged, and it gets the alert again at the next step: at least once. ``reader`` names it, so that it goes on
    where it stopped; a new one hears of what comes after. With ``log``, each alert also goes to the log
    ``papaours_auth.usage.signs``.

    It may cross a fork, and several may watch the same. Raises `StoreUnavailable`.
    """

    def __init__(
        self,
        source: Path | str | Ledger,
        *,
        notify: Notify | None = None,
        reader: str = "app",
        log: bool = True,
        batch: int = 5_000,
    ) -> None:
        self._ledger = open_ledger(source)
        self._told: dict[str, Notify] = {_LOG: _log} if log else {}
        if notify is not None:
            self._told[f"reader {reader}"] = notify
        self._batch = batch
        self._settled = 0
        self._ready = False
        self._failed = False

    def step(self) -> int:
        """Read at most a batch, tell of what was found, and give how much was read: 0 when all is read."""
        with self._prepared() as ledger:
            taken = self._take(ledger)
            if taken:
                detector, book = Detector(taken.states), Book(taken.alerts)
                _feed(taken, detector, book)
                with ledger.writing() as desk:
                    _keep(desk, taken, detector, book)
            self._tell(ledger)
        return len(taken.events) + len(taken.refusals)

    def catch_up(self) -> int:
        """Read all there is; give how much it was."""
        read = 0
        while step := self.step():
            read += step
        return read

    def alerts(self, *, since: datetime | None = None, sign: Sign | None = None) -> list[Alert]:
        """List alerts that were extended since then, muted ones too, the latest first. At most 1,000."""
        with self._prepared() as ledger, ledger.reading() as ask:
            return alert_table.since(ask, micro(since) if since is not None else -FOREVER, sign)

    def alert(self, number: int) -> Alert:
        """Give one alert. Raises `NotFound`."""
        with self._prepared() as ledger, ledger.reading() as ask:
            return _numbered(ask, number)

    def news(self, after: Place | None = None) -> tuple[list[Alert], Place]:
        """List alerts that were opened or became worse after a place, and give the place to go on from.

        Without one: none, and the place from which on all is news.
        """
        with self._prepared() as ledger, ledger.reading() as ask:
            if after is None:
                return [], (_place(ask)[1], FOREVER)
            found = alert_table.untold(ask, *after)
        alerts = [alert for _, alert in found if not alert.muted]
        return alerts, (found[-1][0], found[-1][1].id) if found else after

    def mute(self, number: int, until: datetime | None = None) -> Alert:
        """Silence an alert's sign for its subject, until then or for ever. Raises `NotFound`.

        It is still extended, and listed. The time is that of the calls.
        """
        return self._mute(number, micro(until) if until is not None else FOREVER)

    def unmute(self, number: int) -> Alert:
        """End a muting. Raises `NotFound`."""
        return self._mute(number, 0)

    def _mute(self, number: int, until: int) -> Alert:
        with self._prepared() as ledger, ledger.writing() as desk:
            alert_table.mute(desk, _numbered(desk.ask, number), until)
            # A step that is computing begins anew: what it would open was not born muted.
            desk.do("update usage_signs_position set turn = turn + 1", [{}])
            return _numbered(desk.ask, number)

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[Ledger]:
        """Give the ledger with its tables made: after a failure once more, as it may come back as another."""
        try:
            if not self._ready:
                self._ledger.prepare()
                with self._ledger.writing() as desk:
                    _register(desk, self._told)
                self._ready = True
            yield self._ledger
        except StoreUnavailable:
            self._ready = False
            raise

    def _take(self, ledger: Ledger) -> _Taken:
        with ledger.reading() as ask:
            taken = self._read(ask)
        if taken.unsettled:
            settled = ledger.settled(taken.unsettled)
            if settled > self._settled:
                self._settled = settled
                with ledger.reading() as ask:  # with what has appeared meanwhile
                    return self._read(ask)
        return taken

    def _read(self, ask: Ask) -> _Taken:
        position, turn = _place(ask)
        ((last,),) = ask("select max(id) from usage_events", {})
        if (last or 0) < position:  # all was deleted, and the numbers may begin anew
            position = 0
        grown = self._grown(ask, _horizon(ask, position))
        # While refusals are behind, events wait: the horizon goes with them.
        found = [] if len(grown) >= self._batch else self._events(ask, position)
        events = found[: _whole(found, position, self._settled)]
        fed: list[Event | Refusals] = [*(event for _, event in events), *(one.new for one in grown)]
        return _Taken(
            turn,
            events[-1][0] if events else position,
            [event for _, event in events],
            grown,
            _states(ask, {place_of(one) for one in fed}),
            alert_table.latest(
                ask, [one.network if isinstance(one, Refusals) else one.key_id for one in fed]
            ),
            last if len(events) < len(found) else 0,
        )

    def _events(self, ask: Ask, position: int) -> list[tuple[int, Event]]:
        rows = ask(_EVENTS, {"position": position, "most": self._batch})
        return [(number, Event(VERSION, *row)) for number, *row in rows]

    def _grown(self, ask: Ask, horizon: int) -> list[_Grown]:
        rows = ask(_GROWN, {**_ATTEMPTS, "horizon": horizon, "most": self._batch})
        return [
            _Grown(Refusals(minute, reason, network, count - (before or 0)), count, before)
            for minute, reason, network, count, before in rows
        ]

    def _tell(self, ledger: Ledger) -> None:
        for reader, notify in self._told.items():
            for turn, alert in self._untold(ledger, reader):
                if not alert.muted and not self._notified(notify, alert):
                    break
                with ledger.writing() as desk:
                    desk.do(
                        "update usage_signs_told set turn = :turn, alert = :alert where reader = :reader",
                        [{"turn": turn, "alert": alert.id, "reader": reader}],
                    )

    def _untold(self, ledger: Ledger, reader: str) -> list[tuple[int, Alert]]:
        with ledger.reading() as ask:
            rows = ask("select turn, alert from usage_signs_told where reader = :reader", {"reader": reader})
            if not rows:
                self._ready = False  # it came back as another
            return [told for turn, alert in rows for told in alert_table.untold(ask, turn, alert)]

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
    """A sink's wrapper for apps that want alerts in process: watches what it stores after each batch.

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


def _place(ask: Ask) -> tuple[int, int]:
    """Give the number of the last event that was read, and the turn."""
    ((position, turn),) = ask("select event, turn from usage_signs_position", {})
    return position, turn


def _register(desk: Desk, readers: Iterable[str]) -> None:
    for reader in readers:
        if not desk.ask("select 1 from usage_signs_told where reader = :reader", {"reader": reader}):
            desk.do(
                "insert into usage_signs_told(reader, turn, alert) values (:reader, :turn, :alert)",
                [{"reader": reader, "turn": _place(desk.ask)[1], "alert": FOREVER}],
            )


def _whole(found: Sequence[tuple[int, Event]], position: int, settled: int) -> int:
    """Count the events before the first gap that may still be filled."""
    for place, (number, _) in enumerate(found):
        if number > max(position, settled) + 1:
            return place
        position = number
    return len(found)


def _feed(taken: _Taken, detector: Detector, book: Book) -> None:
    for refusals, *_ in taken.refusals:
        for finding in detector.refusals(refusals):
            book.note(finding)
    for event in taken.events:
        for finding in detector.event(event):
            book.note(finding)


def _keep(desk: Desk, taken: _Taken, detector: Detector, book: Book) -> None:
    if _place(desk.ask)[1] != taken.turn:
        return  # another process was faster: the next step begins where it stopped
    turn = taken.turn + 1
    desk.do(
        "update usage_signs_position set event = :event, turn = :turn",
        [{"event": taken.position, "turn": turn}],
    )
    _keep_states(desk, detector)
    _keep_refusals(desk, taken.refusals)
    alert_table.keep(desk, book.changed(), {alert.id: alert for alert in taken.alerts}, turn)
    _forget(desk)
    if taken.turn % _TIDY_EVERY == 0:
        desk.do(_TIDY, [{}])


def _keep_states(desk: Desk, detector: Detector) -> None:
    desk.do("delete from usage_signs where place = :place", [{"place": place} for place in detector.habits])
    desk.do(
        "insert into usage_signs(place, kind, seen, weight, state) values (:place, :kind, :seen, :weight, :state)",
        [
            {
                "place": place,
                "kind": place.partition(" ")[0],
                "seen": habits.seen,
                "weight": habits.weight,
                "state": habits.dump(),
            }
            for place, habits in detector.habits.items()
        ],
    )


def _keep_refusals(desk: Desk, refusals: Iterable[_Grown]) -> None:
    known: list[dict[str, Cell]] = []
    unknown: list[dict[str, Cell]] = []
    for (minute, reason, network, _), total, before in refusals:
        row: dict[str, Cell] = {"minute": minute, "reason": reason, "network": network, "count": total}
        (unknown if before is None else known).append(row)
    desk.do(
        "update usage_signs_refusals set count = :count "
        "where minute = :minute and reason = :reason and network = :network",
        known,
    )
    desk.do(
        "insert into usage_signs_refusals(minute, reason, network, count) "
        "values (:minute, :reason, :network, :count)",
        unknown,
    )


def _forget(desk: Desk) -> None:
    for kind, most in _MOST.items():
        ((known,),) = desk.ask("select count(*) from usage_signs where kind = :kind", {"kind": kind})
        if known > most:
            worth_least: Sequence[Row] = desk.ask(
                "select place from usage_signs where kind = :kind order by weight, seen limit :most",
                {"kind": kind, "most": known - most},
            )
            desk.do(
                "delete from usage_signs where place = :place", [{"place": place} for (place,) in worth_least]
            )
    alert_table.forget(desk)


def _horizon(ask: Ask, position: int) -> int:
    """Say from when on refusals may still grow: an hour before the median of the events read last."""
    rows = ask(
        "select time from usage_events where id <= :position order by id desc limit :most",
        {"position": position, "most": _RECENT},
    )
    times = [time for (time,) in rows]
    return int(median(times)) - _HOUR if times else -FOREVER


def _states(ask: Ask, places: set[str]) -> dict[str, str]:
    rows = ask_of_each(ask, "select place, state from usage_signs where place in (:names)", places)
    return {row[0]: row[1] for row in rows}


def _numbered(ask: Ask, number: int) -> Alert:
    alert = alert_table.numbered(ask, number)
    if alert is None:
        raise NotFound("there is no alert of this number: 'papaours-auth signs' lists them")
    return alert


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
