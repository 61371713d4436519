"""The courier: takes batches from where calls are kept to the sink, in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Final, NamedTuple, Protocol

from .._locks import WaitingLock
from .event import Call, Outcome
from .sinks import Batch, Sink

logger = logging.getLogger("papaours_auth.usage")

_SLOWEST_RETRY: Final = 5.0
_LONGEST_HOLD: Final = 10.0
_REMIND_AFTER: Final = 60.0
_LAST_PAUSES: Final = (0.05, 0.1, 0.2, 0.4)


class Delivery(NamedTuple):
    """A batch, and what to call when the sink has it."""

    batch: Batch
    delivered: Callable[[], None]


class Counts(NamedTuple):
    """What a keeper knows of its calls: see `Stats`."""

    delivered: int
    pending: int
    lost: int
    inherited: int = 0
    damaged: int = 0
    set_aside: int = 0


class Keeper(Protocol):
    """Keeps calls until they are delivered: in memory, or in a spool.

    ``sent`` and ``done`` are called in requests, and ``counts`` by anybody; the rest by one thread at a time.
    """

    trouble: Trouble
    idle: bool
    """Nobody delivers yet: the next call says so."""
    lasting: bool
    """Whether what is not delivered at the end is left for another process, and not lost."""

    def sent(self, call: Call) -> None:
        """Keep a call whose answer is about to begin; with a spool, it is safe from then on."""

    def done(self, call: Call, outcome: Outcome) -> None:
        """Note how a call ended. Once."""

    def counts(self) -> Counts:
        """Count."""

    def tend(self) -> bool:
        """Make room for what comes; false where there is none to be had."""

    def batches(self, *, last: bool) -> Generator[Delivery]:
        """Give what is to be delivered, in its order. ``last``: all of it, and nothing comes after."""

    def close(self) -> None:
        """Take no more calls, and let go of files. What is not delivered stays in the spool, or is lost."""

    def abandon(self) -> None:
        """Close while a delivery hangs: take no more calls, and leave files to who comes after this process."""

    def before_fork(self) -> None:
        """Hold still."""

    def after_fork(self) -> None:
        """Go on, in the parent."""

    def begin_in_child(self, producer: str) -> None:
        """Start anew in a child, with new locks; touch nothing of the parent's any more."""


class Trouble:
    """What fails, and how often. It is logged when it changes, not each time."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.failures = 0
        self.text = ""

    def note(self, error: BaseException) -> None:
        """Count a failure. Not its words: they may quote anything."""
        self.failures += 1
        text = f"{self._what} failed: {type(error).__name__}"
        if text != self.text:
            logger.warning("%s; events are kept within bounds, and delivered when it works again", text)
        self.text = text

    def over(self) -> None:
        """Say that it works."""
        self.text = ""


class Courier:
    """Delivers what a keeper keeps. Whatever a sink raises, the batch is brought again."""

    def __init__(self, keeper: Keeper, sink: Sink, interval: float) -> None:
        self._keeper, self._sink, self.interval = keeper, sink, interval
        self._sending = WaitingLock(reentrant=True)  # of all that waits for the sink
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._held = False
        self.closing = self._abandoned = False
        self.trouble = Trouble("the usage sink")
        self.reading = Trouble("the reading of usage")  # of what is kept, and of what dead processes left
        self.caught_up = time.monotonic()  # when all was delivered, or we began
        self._said_lost, self._said_at = 0, float("-inf")

    @property
    def running(self) -> bool:
        """Whether the thread lives."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._wake), name="papaours-usage", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is ending: `close` delivers
            self._thread = None

    def deliver(self, *, last: bool = False) -> bool:
        """Deliver what there is, in this thread; false where the sink did not take all."""
        with self._sending:
            begun = time.monotonic()
            try:
                fine = self._deliver(last=last)
                self.reading.over()
                if not last:
                    self._keeper.tend()  # what is delivered leaves room
            except Exception as error:  # noqa: BLE001 - the thread must live, whatever a file holds
                self.reading.note(error)
                fine = False
            if fine:
                self.caught_up = begun
            self.say_lost()
            return fine

    def _deliver(self, *, last: bool) -> bool:
        with contextlib.closing(self._keeper.batches(last=last)) as batches:
            for batch, delivered in batches:
                if not self._send(batch):
                    return False
                delivered()
        return True

    def _send(self, batch: Batch) -> bool:
        if not batch.events and not batch.refusals:
            return True
        try:
            self._sink.write(batch)
        except BaseException as error:  # a sink is anybody's code, and harms nothing here
            self.trouble.note(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # somebody wants the program to end
            return False
        self.trouble.over()
        return True

    def say_lost(self) -> None:
        """Log that events are being lost: at once, and then once a minute."""
        lost, now = self._keeper.counts().lost, time.monotonic()
        if lost > self._said_lost and now - self._said_at > _REMIND_AFTER:
            logger.error("usage events are being lost, %d so far: see Recorder.stats()", lost)
            self._said_lost, self._said_at = lost, now

    def close(self, timeout: float) -> None:
        """Deliver what there is, for at most so many seconds. The thread does it, so that a sink can hang."""
        self.closing = True
        self._wake.set()
        thread = self._thread
        if thread is threading.current_thread():
            return  # a sink that closes us: the thread ends after it
        if thread is None or not thread.is_alive():
            self.finish()
            return
        thread.join(timeout)
        if thread.is_alive():
            self._abandoned = True
            self._keeper.abandon()
            logger.warning("the usage sink does not come back: %d events wait", self._keeper.counts().pending)
        self.say_lost()

    def finish(self) -> None:
        """Deliver for the last time. A sink that has a bad moment is asked again where all would be lost."""
        fine = self.deliver(last=True)
        for pause in () if self._keeper.lasting else _LAST_PAUSES:
            if fine or self._abandoned:
                break
            self._wake.clear()  # nobody wakes it any more
            self._wake.wait(pause)
            fine = self.deliver(last=True)
        with self._sending:
            self._keeper.close()
            self.say_lost()

    def before_fork(self) -> None:
        """Wait for a write under way, but not for ever."""
        self._held = self._sending.acquire(timeout=_LONGEST_HOLD)

    def after_fork(self) -> None:
        """Go on."""
        if self._held:
            self._sending.release()


def _run(reference: weakref.ref[Courier], wake: threading.Event) -> None:
    """Deliver until the courier is closed, or nobody has it any more."""
    wait = 0.0
    while True:
        wake.wait(wait)
        courier = reference()
        if courier is None:
            return
        if courier.closing:
            courier.finish()
            return
        interval = courier.interval
        fine = courier.deliver()
        wait = interval if fine else min(max(wait * 2, interval), max(_SLOWEST_RETRY, interval))
        del courier
