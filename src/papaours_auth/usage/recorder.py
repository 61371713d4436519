"""The recorder: takes calls from middlewares without waiting, and delivers them from a thread of its own."""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from .._fork import hold_across_fork
from ..exceptions import ConfigurationError, Reason
from .event import Call, Event, Outcome, Refusals, body_of, cell_of, clean, event_of, network_of
from .sinks import Batch, Sink, open_sink
from .spool import EVENT, REFUSALS, Raw, Segment, Spool, records

logger = logging.getLogger("papaours_auth.usage")

SERVICE_VARIABLE: Final = "PAPAOURS_SERVICE"
_MINUTE: Final = 60_000_000
_NETWORKS: Final = 10_000
_REST: Final = "other"
_SLOWEST_RETRY: Final = 5.0
_LONGEST_HOLD: Final = 10.0
_REFUSALS_PER_RECORD: Final = 500
_NO_CELL: Final = bytes(8)
_NOWHERE: Final = -1  # the place of a call that is counted lost already


class Stats(NamedTuple):
    """What became of this process's calls. ``damaged`` counts stretches of old spool files that could not be read."""

    recorded: int
    delivered: int
    pending: int
    lost: int
    damaged: int
    sink_failures: int
    last_failure: str


class Recorder:
    """Records calls into a sink. One per app; threads and event loops may share it, and it survives a fork.

    - ``sink``: a `Sink`, or a URL (``sqlite:///usage.db``).
    - ``service``: the name events carry; else PAPAOURS_SERVICE.
    - ``spool``: a folder. With it, a killed process loses nothing that was recorded.
    - ``interval`` (seconds): how long an event waits for its batch.
    - ``max_pending`` (events): bound of the memory; ``max_spool`` (bytes): bound of the folder.

    Raises `ConfigurationError`. What cannot be kept is counted (`stats`) and logged, and harms no request.
    """

    def __init__(
        self,
        sink: Sink | str,
        *,
        service: str | None = None,
        spool: str | Path | None = None,
        interval: float = 0.5,
        max_pending: int = 100_000,
        max_spool: int = 256 << 20,
        segment_bytes: int = 4 << 20,
    ) -> None:
        if (
            not 0 < interval < float("inf")
            or max_pending < 1
            or max_spool < segment_bytes
            or segment_bytes < 8192
        ):
            raise ConfigurationError("interval, max_pending and max_spool of a Recorder must be above 0")
        self._sink = open_sink(sink) if isinstance(sink, str) else sink
        self.service = clean(service if service is not None else os.environ.get(SERVICE_VARIABLE), "service")
        self._folder = Path(spool).absolute() if spool is not None else None
        self._interval = interval
        self._max_pending, self._max_spool, self._segment_bytes = max_pending, max_spool, segment_bytes
        self._reset()
        hold_across_fork(self, first=True)  # a sink under way needs its own locks to end
        atexit.register(_close, weakref.ref(self))

    def _reset(self) -> None:
        self.producer = secrets.token_hex(8)
        self._lock = threading.Lock()  # of the place to write; never held across I/O
        self._sending = threading.RLock()  # of all that waits
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._room = self._max_pending
        self._sequence = 0
        self._calls: deque[Call] = deque()
        self._refusals: Counter[tuple[int, str, str]] = Counter()
        self._batches: deque[Batch] = deque()  # frozen, without a spool
        self._waiting = 0  # events in them
        self._spool: Spool | None = None
        self._active: Segment | None = None
        self._spare: Segment | None = None
        self._sealed: deque[tuple[Segment, float]] = deque()
        self._recorded = self._delivered = self._lost = self._damaged = self._failures = 0
        self._last_failure = ""
        self._said_lost = 0

    # the request's side

    def sent(self, call: Call, status: int) -> None:
        """Note the status, just before the answer begins; with a spool, the call is safe from then on."""
        call.status = status
        if self._folder is not None and not call.place:
            self._keep(call)

    def done(self, call: Call, outcome: Outcome) -> None:
        """Note how a call ended. Once."""
        call.outcome = outcome
        if self._folder is None:
            if len(self._calls) >= self._room:
                with self._lock:
                    self._lost += 1
                return
            call.started = time.monotonic() - call.started  # a duration from here on
            self._calls.append(call)
            if self._thread is None:
                self._start()
        elif not call.place:
            self._keep(call)
        elif call.segment is not None:
            self._amend(call, call.segment)

    def refused(self, reason: Reason, address: str | None) -> None:
        """Count a refusal of nobody we know."""
        entry = (int(time.time() * 1e6) // _MINUTE * _MINUTE, reason.value, network_of(address))
        with self._lock:
            if entry not in self._refusals and len(self._refusals) >= _NETWORKS:
                entry = (*entry[:2], _REST)
            self._refusals[entry] += 1
        if self._thread is None:
            self._start()

    def _keep(self, call: Call) -> None:
        if self._thread is None:
            self._start()
        body = body_of(call, self.service)
        cell = cell_of(call.status, call.outcome, time.monotonic() - call.started)
        with self._lock:
            place = self._place(cell, body)
            if place and self._active is not None:
                call.segment, call.place = self._active, place
                self._active.unfinished += call.outcome is Outcome.STARTED
                self._recorded += 1
            else:
                call.place = _NOWHERE
                self._lost += 1
        if self._spare is None and not self._wake.is_set():
            self._wake.set()

    def _place(self, cell: bytes, body: bytes) -> int:
        if self._active is not None and (place := self._active.append(EVENT, cell, body)):
            return place
        if self._spare is None:
            return 0
        if self._active is not None:
            self._sealed.append((self._active, time.monotonic()))
        self._active, self._spare = self._spare, None
        return self._active.append(EVENT, cell, body)

    def _amend(self, call: Call, segment: Segment) -> None:
        cell = cell_of(call.status, call.outcome, time.monotonic() - call.started)
        with self._lock:
            segment.unfinished -= 1
            if not segment.frozen:
                segment.amend(call.place, cell)

    # life

    def start(self) -> None:
        """Start delivering now; otherwise the first call does. After `close`, start anew."""
        if self._closed:
            self._reset()
        self._start()

    def _start(self) -> None:
        with self._sending:
            if self._thread is not None or self._closed:
                return
            if self._folder is not None:
                self._prepare()
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._wake), name="papaours-usage", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is ending: `close` delivers
                self._thread = None

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what there is. What the sink does not take stays in the spool, or is counted lost."""
        with self._sending:
            if self._closed:
                return
            self._closed = True
            self._room = 0
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        if not self._sending.acquire(timeout=timeout):
            logger.warning("the usage sink does not come back; what it has not taken stays where it is")
            return
        try:
            self._deliver(last=True)
            self._let_go()
        finally:
            self._sending.release()

    def _let_go(self) -> None:
        self._lost += self._waiting
        self._waiting = 0
        self._batches.clear()
        spool, self._spool = self._spool, None
        if spool is not None:
            rest = self._abandon()
            for segment in rest:
                if segment.empty:
                    segment.remove()
                else:
                    segment.close()
            spool.close(keep=any(not segment.empty for segment in rest))
        self._say_lost()

    def _abandon(self) -> list[Segment]:
        """Give up all segments, so that no call writes to them any more."""
        with self._lock:
            segments = [segment for segment, _ in self._sealed]
            segments += [segment for segment in (self._active, self._spare) if segment is not None]
            for segment in segments:
                segment.frozen = True
            self._sealed.clear()
            self._active = self._spare = None
        return segments

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stats(self) -> Stats:
        """Tell what became of this process's calls."""
        pending = len(self._calls) + self._waiting
        if self._folder is not None:
            pending = self._recorded - self._delivered
        recorded = self._recorded if self._folder is not None else self._delivered + pending + self._lost
        return Stats(
            recorded, self._delivered, pending, self._lost, self._damaged, self._failures, self._last_failure
        )

    def before_fork(self) -> None:
        """Wait for a write under way, and hold still."""
        self._held = self._sending.acquire(timeout=_LONGEST_HOLD)
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child as a producer of its own, with nothing of its parent's."""
        if child:
            self._lock.release()
            self._abandon()  # the maps are the parent's too: a call of its that goes on here writes nothing
            if self._spool is not None:
                self._spool.forget()
            self._reset()
            return
        self._lock.release()
        if self._held:
            self._sending.release()

    # the thread's side

    def flush(self) -> bool:
        """Deliver what there is, in this thread; false where the sink did not take all."""
        with self._sending:
            return self._deliver(last=False)

    def _deliver(self, *, last: bool) -> bool:
        try:
            if self._folder is None:
                self._freeze_calls()
                return self._send_frozen()
            return self._deliver_spool(last=last)
        except Exception as error:  # noqa: BLE001 - the thread must live, whatever a file holds
            self._failed("the usage spool", error)
            return False
        finally:
            self._say_lost()

    def _freeze_calls(self) -> None:
        events, refusals = [], self._take_refusals()
        sequence = self._sequence + 1
        for place in range(min(len(self._calls), self._max_pending - self._waiting)):
            call = self._calls.popleft()
            cell = cell_of(call.status, call.outcome, call.started)
            event = event_of(f"{self.producer}-{sequence}-{place}", cell, body_of(call, self.service))
            if event is not None:
                events.append(event)
        if events or refusals:
            self._sequence = sequence
            self._waiting += len(events)
            self._batches.append(Batch(self.producer, sequence, events, refusals))

    def _take_refusals(self) -> list[Refusals]:
        if len(self._batches) >= _NETWORKS or not self._refusals:
            return []
        with self._lock:
            taken, self._refusals = self._refusals, Counter()
        return [Refusals(*entry, count) for entry, count in taken.items()]

    def _send_frozen(self) -> bool:
        while self._batches:
            batch = self._batches[0]
            if not self._send(batch):
                return False
            self._batches.popleft()
            self._waiting -= len(batch.events)
            self._delivered += len(batch.events)
        return True

    def _deliver_spool(self, *, last: bool) -> bool:
        if last or not self._sealed:  # while the sink is away, segments are filled first
            self._seal(last=last)
        fine = self._send_sealed(last=last)
        if not last:
            self._prepare()
        return fine and self._deliver_left()

    def _send_sealed(self, *, last: bool) -> bool:
        while self._sealed:
            segment, since = self._sealed[0]
            if segment.unfinished and not last and time.monotonic() - since < self._interval:
                break
            with self._lock:
                segment.frozen = True
            batch, _ = _batch(self.producer, segment.sequence, segment.read())
            if not self._send(batch):
                return False
            self._sealed.popleft()
            segment.remove()
            self._delivered += len(batch.events)
        return True

    def _seal(self, *, last: bool) -> None:
        active = self._active
        if active is None or (self._spare is None and not last and not active.half_full):
            return  # the disk is full: what there is of a segment is worth more than a prompt delivery
        refusals = self._take_refusals()
        bodies = _packed(refusals)
        with self._lock:
            segment = self._active
            if segment is None:
                return
            written = all(segment.append(REFUSALS, _NO_CELL, body) for body in bodies)
            if not segment.empty:
                self._sealed.append((segment, time.monotonic()))
                self._active, self._spare = self._spare, None
            if not written:
                self._lost += sum(entry.calls for entry in refusals)

    def _prepare(self) -> None:
        """Have a segment to write and a spare, as far as the disk allows."""
        try:
            if self._spool is None and self._folder is not None:
                self._spool = Spool(
                    self._folder,
                    producer=self.producer,
                    segment_bytes=self._segment_bytes,
                    max_bytes=self._max_spool,
                )
            if self._active is None:
                made = self._next_segment()
                with self._lock:
                    self._active = made
            if self._spare is None:
                self._spare = self._next_segment()
        except OSError as error:
            self._failed("the usage spool", error)

    def _next_segment(self) -> Segment:
        if self._spool is None:
            raise OSError("there is no spool")
        self._sequence += 1
        return self._spool.segment(self._sequence)

    def _deliver_left(self) -> bool:
        if self._spool is None:
            return True
        for left in self._spool.left():
            try:
                for sequence, path in left.segments:
                    batch, damaged = _batch(left.producer, sequence, path.read_bytes())
                    if not self._send(batch):
                        return False
                    self._damaged += damaged
                    path.unlink(missing_ok=True)
            finally:
                left.release()
        return True

    def _send(self, batch: Batch) -> bool:
        if not batch.events and not batch.refusals:
            return True
        try:
            self._sink.write(batch)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a sink is anybody's code, and harms nothing here
            self._failed("the usage sink", error)
            return False
        self._last_failure = ""
        return True

    def _failed(self, what: str, error: BaseException) -> None:
        self._failures += 1
        text = f"{what} failed: {type(error).__name__}"  # not its words: they may quote anything
        if text != self._last_failure:
            logger.warning("%s; events are kept within bounds, and delivered when it works again", text)
        self._last_failure = text

    def _say_lost(self) -> None:
        if self._lost > self._said_lost:
            if not self._said_lost:
                logger.error("usage events are being lost, %d so far: see Recorder.stats()", self._lost)
            self._said_lost = self._lost


def _run(reference: weakref.ref[Recorder], wake: threading.Event) -> None:
    """Deliver until the recorder is closed, or nobody has it any more."""
    wait = 0.0
    while True:
        wake.wait(wait)
        wake.clear()
        recorder = reference()
        if recorder is None or recorder._closed:  # noqa: SLF001 - its own thread
            return
        fine = recorder.flush()
        interval = recorder._interval  # noqa: SLF001 - likewise
        wait = interval if fine else min(max(wait * 2, interval), max(_SLOWEST_RETRY, interval))
        del recorder


def _close(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        recorder.close()


def _packed(refusals: list[Refusals]) -> list[bytes]:
    parts = range(0, len(refusals), _REFUSALS_PER_RECORD)
    return [json.dumps(refusals[part : part + _REFUSALS_PER_RECORD]).encode() for part in parts]


def _batch(producer: str, sequence: int, data: bytes) -> tuple[Batch, int]:
    """Read a segment, and count what of it is damaged."""
    found = list(records(data))
    events = [event for event in _events(f"{producer}-{sequence}", found) if event is not None]
    refusals = [
        Refusals(*entry) for raw in found if raw and raw.kind == REFUSALS for entry in json.loads(raw.body)
    ]
    unread = sum(1 for raw in found if raw is None or raw.kind not in (EVENT, REFUSALS))
    return Batch(producer, sequence, events, refusals), unread


def _events(name: str, found: Iterable[Raw | None]) -> Iterator[Event | None]:
    return (event_of(f"{name}-{raw.place}", raw.cell, raw.body) for raw in found if raw and raw.kind == EVENT)
