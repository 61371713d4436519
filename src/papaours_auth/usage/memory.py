"""Calls kept in memory until they are delivered: the fastest, and gone with the process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Final

from .._fork import in_own_process, notice_fork
from .courier import Counts, Delivery, Trouble
from .event import Call, Outcome, event_from
from .sinks import Batch
from .tally import Tally

_MOST_BATCHES: Final = 10_000  # refusals wait in the tally beyond that, which has a bound of its own
_monotonic: Final = time.monotonic  # bound once: each call pays for it


class Memory:
    """A keeper. At most ``bound`` ended calls wait, and as many events that are on their way."""

    lasting = False

    def __init__(
        self, producer: str, service: str, bound: int, tally: Tally, on_first: Callable[[], None]
    ) -> None:
        self._service, self._bound = service, bound
        self._tally, self._on_first = tally, on_first
        self._begin(producer)

    def _begin(self, producer: str) -> None:
        self._producer = producer
        self.idle = True
        self.trouble = Trouble("the recorder")
        self._lock = threading.Lock()  # of what is counted in requests
        self._calls: deque[Call] = deque()
        self._room = self._bound
        self._closed = False
        self._batches: deque[Batch] = deque()  # frozen: their numbers are given
        self._waiting = 0  # events in them
        self._sequence = self._delivered = self._lost = 0

    def sent(self, call: Call) -> None:
        """See `Keeper`: it is kept when it has ended."""

    def done(self, call: Call, outcome: Outcome) -> None:
        """See `Keeper`."""
        if not in_own_process():
            notice_fork()
        call.outcome = outcome
        call.ended = _monotonic()
        calls = self._calls
        if len(calls) < self._room:
            calls.append(call)
        else:
            self._lose()
        if self.idle:
            self._on_first()

    def _lose(self) -> None:
        with self._lock:
            self._lost += 1

    def counts(self) -> Counts:
        """See `Keeper`."""
        kept = len(self._calls) + self._waiting
        if self._closed:
            return Counts(self._delivered, 0, self._lost + kept)
        return Counts(self._delivered, kept, self._lost)

    def tend(self) -> bool:
        """See `Keeper`."""
        return True

    def batches(self, *, last: bool) -> Generator[Delivery]:
        """See `Keeper`."""
        self._freeze()
        while self._batches:
            batch = self._batches[0]
            yield Delivery(batch, partial(self._deliver, batch))

    def _freeze(self) -> None:
        refusals = self._tally.take() if len(self._batches) < _MOST_BATCHES else []
        shift = time.time() - _monotonic()
        sequence = self._sequence + 1
        name = f"{self._producer}-{sequence}-"
        taken = min(len(self._calls), self._bound - self._waiting)
        events = []
        for place in range(taken):
            call = self._calls.popleft()
            try:
                events.append(event_from(call, f"{name}{place}", shift, self._service))
            except Exception:  # noqa: BLE001 - one absurd call is one event lost, not a batch
                self._lose()
        if events or refusals:
            self._sequence = sequence
            self._waiting += len(events)
            self._batches.append(Batch(self._producer, sequence, events, refusals))

    def _deliver(self, batch: Batch) -> None:
        self._batches.popleft()
        self._waiting -= len(batch.events)
        self._delivered += len(batch.events)

    def close(self) -> None:
        """See `Keeper`."""
        self._room = 0
        self._closed = True

    abandon = close

    def before_fork(self) -> None:
        """See `Keeper`."""
        self._lock.acquire()

    def after_fork(self) -> None:
        """See `Keeper`."""
        self._lock.release()

    def begin_in_child(self, producer: str) -> None:
        """See `Keeper`."""
        self._begin(producer)
