"""Calls kept in a spool: safe from the moment their answer begins, whatever kills the process."""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from .._fork import in_own_process, notice_fork
from .._locks import WaitingLock
from .courier import Counts, Delivery, Trouble
from .event import Call, Event, Outcome, Refusals, body_of, cell_of, event_of, started_cell, status_of
from .sinks import Batch
from .spool import EVENT, REFUSALS, Raw, Segment, Spool, Unreadable, read_segment, records, set_aside
from .tally import Tally

logger = logging.getLogger("papaours_auth.usage")

_REFUSALS_PER_RECORD: Final = 500
_NO_CELL: Final = bytes(8)
_NOWHERE: Final = -1  # the place of a call that is counted lost already
_LOOK_UP: Final = 5.0  # seconds after which the thread looks whether anybody still needs it
_monotonic: Final = time.monotonic


class SpoolOptions(NamedTuple):
    """Where the spool is, and its bounds."""

    folder: Path
    segment_bytes: int
    max_bytes: int
    interval: float


class Spooled:
    """A keeper. Requests write to the active segment; a spare is ready for when that is full.

    A thread of its own makes spares: the courier may be waiting for a sink that hangs.
    """

    lasting = True

    def __init__(
        self, producer: str, service: str, options: SpoolOptions, tally: Tally, on_first: Callable[[], None]
    ) -> None:
        self._service, self._options = service, options
        self._tally, self._on_first = tally, on_first
        self._begin(producer)

    def _begin(self, producer: str) -> None:
        self._producer = producer
        self.idle = True
        self.trouble = Trouble("the usage spool")
        self._lock = threading.Lock()  # of the place to write; never held across I/O
        self._tending = WaitingLock()  # of the making of segments
        self._short = threading.Event()  # of a spare
        self._spool: Spool | None = None
        self._active: Segment | None = None
        self._spare: Segment | None = None
        self._sealed: deque[tuple[Segment, float]] = deque()
        self._closed = threading.Event()
        self._shift = time.time() - _monotonic()
        self._sequence = self._kept = self._delivered = self._lost = 0
        self._inherited = self._damaged = self._set_aside = 0
        self._given_up: set[Path] = set()

    # the request's side

    def sent(self, call: Call) -> None:
        """See `Keeper`."""
        if not in_own_process():
            notice_fork()
        if not call.place:
            self._keep(call, started_cell(status_of(call.status)))

    def done(self, call: Call, outcome: Outcome) -> None:
        """See `Keeper`."""
        if not in_own_process():
            notice_fork()
        call.outcome = outcome
        cell = cell_of(call.status, outcome, _monotonic() - call.started)
        if not call.place:
            self._keep(call, cell)
        elif call.place != _NOWHERE:
            self._amend(call, cell)

    def _keep(self, call: Call, cell: bytes) -> None:
        if self.idle:
            self._on_first()
        body = self._body(call)
        with self._lock:
            place = self._place(EVENT, cell, body) if body else 0
            if place and self._active is not None:
                call.segment, call.place = self._active, place
                self._active.unfinished += not call.outcome
                self._active.events += 1
                self._kept += 1
            else:
                call.place = _NOWHERE
                self._lost += 1
        if self._spare is None and not self._short.is_set():
            self._short.set()

    def _body(self, call: Call) -> bytes:
        try:
            return body_of(call, self._shift, self._service)
        except Exception:  # noqa: BLE001 - an absurd call is one event lost, and no request harmed
            return b""

    def _place(self, kind: int, cell: bytes, body: bytes) -> int:
        if self._active is not None and (place := self._active.append(kind, cell, body)):
            return place
        if self._spare is None:
            return 0
        self._rotate()
        return self._active.append(kind, cell, body) if self._active is not None else 0

    def _rotate(self) -> None:
        if self._active is not None:
            self._sealed.append((self._active, _monotonic()))
        self._active, self._spare = self._spare, None

    def _amend(self, call: Call, cell: bytes) -> None:
        with self._lock:
            call.segment.unfinished -= 1
            if not call.segment.frozen:
                call.segment.amend(call.place, cell)

    def counts(self) -> Counts:
        """See `Keeper`. What waits in the spool of a closed recorder is pending: who comes next delivers it."""
        return Counts(
            self._delivered,
            self._kept - self._delivered,
            self._lost,
            self._inherited,
            self._damaged,
            self._set_aside,
        )

    # room

    def tend(self) -> bool:
        """See `Keeper`: have a segment to write and a spare, as far as the disk allows."""
        with self._tending:
            self._shift = time.time() - _monotonic()
            try:
                while not self._closed.is_set() and (self._active is None or self._spare is None):
                    self._add(self._next())
            except OSError as error:
                self.trouble.note(error)
                return False
        self.trouble.over()
        return True

    def _next(self) -> Segment:
        folder, segment_bytes, max_bytes, _ = self._options
        if self._spool is None:
            self._spool = Spool(
                folder, producer=self._producer, segment_bytes=segment_bytes, max_bytes=max_bytes
            )
            self._watch_room()
        self._sequence += 1
        return self._spool.segment(self._sequence)

    def _add(self, segment: Segment) -> None:
        with self._lock:
            if self._active is None:
                self._active = segment
            else:
                self._spare = segment

    def _watch_room(self) -> None:
        thread = threading.Thread(
            target=_make_room, args=(weakref.ref(self), self._short), name="papaours-usage-spool", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            return

    def room(self) -> bool:
        """Make room, and tell whether more will be asked for."""
        self._short.clear()
        if not self.tend():
            self._closed.wait(self._options.interval)
        return not self._closed.is_set()

    # the courier's side

    def batches(self, *, last: bool) -> Generator[Delivery]:
        """See `Keeper`: our sealed segments, then what dead producers left."""
        if last or not self._sealed:  # while the sink is away, segments are filled first
            if not last:
                self.tend()  # the thread that makes spares may be late: a segment is never sealed for want of one
            self._seal(last=last)
        yield from self._own(last=last)
        if self._spool is not None and not self._closed.is_set():
            yield from self._left(self._spool)

    def _own(self, *, last: bool) -> Iterator[Delivery]:
        while self._sealed:
            segment, since = self._sealed[0]
            if segment.unfinished and not last and _monotonic() - since < self._options.interval:
                return  # calls in it may still end
            with self._lock:
                segment.frozen = True
            batch, damaged = _batch(self._producer, segment.sequence, segment.read())
            yield Delivery(batch, partial(self._deliver, segment, damaged))

    def _deliver(self, segment: Segment, damaged: int) -> None:
        self._sealed.popleft()
        self._delivered += segment.events
        self._damaged += damaged
        segment.remove()

    def _seal(self, *, last: bool) -> None:
        if not self._may_seal(last=last):
            return
        refusals = self._tally.take()
        parts = [(json.dumps(part).encode(), sum(entry.calls for entry in part)) for part in _parts(refusals)]
        with self._lock:
            for body, calls in parts:
                if not self._place(REFUSALS, _NO_CELL, body):
                    self._lost += calls
            # Asked again: calls may have filled that segment and taken the spare meanwhile.
            if self._may_seal(last=last) and self._active is not None and not self._active.empty:
                self._rotate()
        if not last:
            self._short.set()

    def _may_seal(self, *, last: bool) -> bool:
        """Tell no where the disk is full: what there is of a segment is worth more than a prompt delivery."""
        active = self._active
        return active is not None and (last or self._spare is not None or active.half_full)

    def _left(self, spool: Spool) -> Iterator[Delivery]:
        for left in spool.left():
            try:
                for sequence, path in left.segments:
                    if path not in self._given_up:
                        yield from self._inherit(left.producer, sequence, path)
            finally:
                left.release()

    def _inherit(self, producer: str, sequence: int, path: Path) -> Iterator[Delivery]:
        try:
            data = read_segment(path)
        except Unreadable:
            self._put_aside(path)
            return
        batch, damaged = _batch(producer, sequence, data)
        yield Delivery(batch, partial(self._take_over, path, len(batch.events), damaged))

    def _take_over(self, path: Path, events: int, damaged: int) -> None:
        self._inherited += events
        self._damaged += damaged
        path.unlink(missing_ok=True)

    def _put_aside(self, path: Path) -> None:
        """Let what cannot be read hold up nothing behind it. Where it cannot be renamed, it is passed by."""
        self._set_aside += 1
        try:
            set_aside(path)
        except OSError:
            self._given_up.add(path)
        logger.error("a file of the usage spool cannot be read and is set aside, %d so far", self._set_aside)

    # the end

    def close(self) -> None:
        """See `Keeper`."""
        rest = self._end()
        for segment in rest:
            if segment.empty:
                segment.remove()
            else:
                segment.close()
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close(keep=any(not segment.empty for segment in rest))

    def abandon(self) -> None:
        """See `Keeper`."""
        self._end()

    def _end(self) -> list[Segment]:
        with self._tending:
            self._closed.set()
            segments = self._give_up()
        self._short.set()
        return segments

    def _give_up(self) -> list[Segment]:
        """Give up all segments, so that no call writes to them any more."""
        with self._lock:
            segments = [segment for segment, _ in self._sealed]
            segments += [segment for segment in (self._active, self._spare) if segment is not None]
            for segment in segments:
                segment.frozen = True
            self._active = self._spare = None
            self._sealed = deque()
        return segments

    def before_fork(self) -> None:
        """See `Keeper`."""
        self._tending.acquire()
        self._lock.acquire()

    def after_fork(self) -> None:
        """See `Keeper`."""
        self._lock.release()
        self._tending.release()

    def begin_in_child(self, producer: str) -> None:
        """See `Keeper`. The maps are the parent's too: a call of its that goes on in a child writes nothing."""
        self._lock = threading.Lock()  # a thread of the parent's may hold the old one
        self._give_up()
        if self._spool is not None:
            self._spool.forget()
        self._begin(producer)


def _make_room(reference: weakref.ref[Spooled], short: threading.Event) -> None:
    while True:
        short.wait(_LOOK_UP)
        keeper = reference()
        if keeper is None or not keeper.room():
            return
        del keeper


def _parts(refusals: list[Refusals]) -> Iterator[list[Refusals]]:
    for first in range(0, len(refusals), _REFUSALS_PER_RECORD):
        yield refusals[first : first + _REFUSALS_PER_RECORD]


def _batch(producer: str, sequence: int, data: bytes) -> tuple[Batch, int]:
    """Read a segment, and count what of it is damaged."""
    events: list[Event] = []
    refusals: list[Refusals] = []
    damaged = 0
    for raw in records(data):
        if not _take(raw, f"{producer}-{sequence}-", events, refusals):
            damaged += 1
    return Batch(producer, sequence, events, refusals), damaged


def _take(raw: Raw | None, name: str, events: list[Event], refusals: list[Refusals]) -> bool:
    if raw is not None and raw.kind == EVENT:
        event = event_of(f"{name}{raw.place}", raw.cell, raw.body)
        if event is not None:
            events.append(event)
        return event is not None
    if raw is not None and raw.kind == REFUSALS:
        found = _refusals(raw.body)
        refusals += found or ()
        return found is not None
    return False


def _refusals(body: bytes) -> list[Refusals] | None:
    """Read them; None for what only looks like them."""
    try:
        found: Iterable[object] = json.loads(body)
        entries = [_entry(entry) for entry in found]
    except (TypeError, ValueError, RecursionError):
        return None
    return entries


def _entry(entry: object) -> Refusals:
    if not isinstance(entry, list) or [type(field) for field in entry] != [int, str, str, int]:
        raise ValueError
    return Refusals(*entry)
