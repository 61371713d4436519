"""The recorder: takes calls from middlewares without waiting. A courier delivers them, from a thread of its own."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self

from .._fork import hold_across_fork, notice_fork
from .._locks import WaitingLock
from ..exceptions import ConfigurationError, Reason
from ..format import KeyFormat
from .courier import Courier, Keeper
from .event import Call, Outcome, clean
from .memory import Memory
from .sinks import Sink, open_sink
from .spool import check_folder
from .spooled import Spooled, SpoolOptions
from .tally import Tally

SERVICE_VARIABLE: Final = "PAPAOURS_SERVICE"


class Stats(NamedTuple):
    """What became of this process's calls: ``recorded`` = ``delivered`` + ``pending`` + ``lost``.

    ``inherited``: events delivered for processes that died. Of their files, ``damaged`` stretches could not be
    read, and ``set_aside`` files are none (renamed to ``*.unreadable``).
    """

    recorded: int
    delivered: int
    pending: int
    lost: int
    inherited: int
    damaged: int
    set_aside: int
    sink_failures: int
    last_failure: str


class Health(NamedTuple):
    """How a recorder is. ``behind``: seconds since all was delivered; ``error``: what fails now, "" for nothing."""

    ok: bool
    running: bool
    behind: float
    pending: int
    lost: int
    error: str


class Recorder:
    """Records calls into a sink. One per app; threads and event loops may share it, and it survives a fork.

    - ``sink``: a `Sink`, or a URL (``sqlite:///usage.db``).
    - ``service``: the name events carry; else PAPAOURS_SERVICE.
    - ``spool``: a folder. With it, a killed process loses nothing that was recorded.
    - ``interval`` (seconds): how long an event waits for its batch.
    - ``max_pending`` (events): bound of the memory; ``max_spool`` (bytes): bound of the folder.

    Raises `ConfigurationError`. What cannot be kept is counted (`stats`) and logged, and harms no request.
    """

    spooled: bool
    """Whether a call must be given to `sent` just before its answer begins, when its status is set."""
    # Methods of the keeper, bound once: 50 ns less a call than passing it on.
    sent: Callable[[Call], None]
    done: Callable[[Call, Outcome], None]

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
        self._owned = isinstance(sink, str)
        self._sink = open_sink(sink) if isinstance(sink, str) else sink
        self.service = _service(service if service is not None else os.environ.get(SERVICE_VARIABLE))
        self._interval, self._max_pending = interval, max_pending
        self._spool = (
            SpoolOptions(Path(spool).absolute(), segment_bytes, max_spool, interval)
            if spool is not None
            else None
        )
        self.spooled = self._spool is not None
        if self._spool is not None:
            check_folder(self._spool.folder)
        self._users = 0
        self._begin()
        hold_across_fork(self, first=True)  # a sink under way needs its own locks to end

    def _begin(self) -> None:
        """Begin with nothing: when made, and after `close`."""
        self._identify()
        self._tally = Tally()
        self._keeper = self._new_keeper()
        self._courier = Courier(self._keeper, self._sink, self._interval)
        self.sent, self.done = self._keeper.sent, self._keeper.done

    def _identify(self) -> None:
        """Be a producer of our own."""
        self.producer = secrets.token_hex(8)
        self._starting = WaitingLock()
        self._ends_at_exit = False  # a child of multiprocessing forgets the finalizers of its parent

    def _new_keeper(self) -> Keeper:
        on_first = _starter(weakref.ref(self))
        if self._spool is None:
            return Memory(self.producer, self.service, self._max_pending, self._tally, on_first)
        return Spooled(self.producer, self.service, self._spool, self._tally, on_first)

    def refused(self, reason: Reason, address: str | None) -> None:
        """Count a refusal of nobody we know."""
        notice_fork()
        self._tally.add(reason, address)
        if self._keeper.idle:
            self._start()

    def start(self) -> None:
        """Start delivering now; otherwise the first call does, and waits for the spool's first two files.

        After `close`, start anew.
        """
        notice_fork()
        if self._courier.closing:
            self._begin()
        self._start()

    def _start(self) -> None:
        with self._starting:
            if not self._keeper.idle or self._courier.closing:
                return
            if not self._ends_at_exit:
                self._ends_at_exit = True
                _close_at_exit(weakref.ref(self))
            self._keeper.tend()
            self._courier.start()
            self._keeper.idle = (
                not self._courier.running
            )  # no thread was to be had: the next call tries again

    def acquire(self) -> None:
        """Start for one of several apps that share this recorder."""
        notice_fork()
        with self._starting:
            self._users += 1
        self.start()

    def release(self, timeout: float = 5.0) -> None:
        """End for one of them: the last one closes it."""
        notice_fork()
        with self._starting:
            self._users = max(0, self._users - 1)
            last = not self._users
        if last:
            self.close(timeout)

    def flush(self) -> bool:
        """Deliver what there is, in this thread; false where the sink did not take all. Waits for the sink."""
        notice_fork()
        return self._courier.deliver()

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what there is, for at most ``timeout`` seconds.

        What the sink does not take stays in the spool, or is counted lost. A sink of yours stays open.
        """
        notice_fork()
        with self._starting:
            if self._courier.closing:
                return
            self._courier.closing = True
        self._courier.close(timeout)
        if self._owned:
            getattr(self._sink, "close", _nothing)()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stats(self) -> Stats:
        """Tell what became of this process's calls."""
        notice_fork()
        counts, sink = self._keeper.counts(), self._courier.trouble
        recorded = counts.delivered + counts.pending + counts.lost
        error = sink.text or self._keeper.trouble.text or self._courier.reading.text
        return Stats(recorded, *counts, sink.failures, error)

    def health(self) -> Health:
        """Tell how it is. Asks nobody: cheap enough for any health check."""
        stats, running = self.stats(), self._courier.running
        return Health(
            ok=not stats.last_failure and (running or self._keeper.idle),
            running=running,
            behind=max(0.0, time.monotonic() - self._courier.caught_up) if stats.pending else 0.0,
            pending=stats.pending,
            lost=stats.lost,
            error=stats.last_failure,
        )

    def before_fork(self) -> None:
        """Wait for a write under way, and hold still."""
        self._courier.before_fork()
        self._keeper.before_fork()
        self._tally.before_fork()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child as a producer of its own, with nothing of its parent's.

        The keeper stays the same object: it may be the one that noticed, in the midst of taking a call.
        """
        self._tally.after_fork(child=child)
        if not child:
            self._keeper.after_fork()
            self._courier.after_fork()
            return
        self._users = 0
        self._identify()
        self._keeper.begin_in_child(self.producer)
        self._courier = Courier(self._keeper, self._sink, self._interval)


def _service(given: str | None) -> str:
    name = clean(given)
    if KeyFormat().found_in(given or ""):
        raise ConfigurationError(f"the service's name contains a key: check service= and {SERVICE_VARIABLE}")
    return name


def _nothing() -> None:
    """Close what has nothing to close."""


def _starter(reference: weakref.ref[Recorder]) -> Callable[[], None]:
    def start() -> None:
        recorder = reference()
        if recorder is not None:
            recorder._start()  # noqa: SLF001 - of this file

    return start


def _close_at_exit(reference: weakref.ref[Recorder]) -> None:
    atexit.register(_close, reference)
    # Processes of multiprocessing (granian's workers) end without atexit, and with finalizers of their own.
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _close, (reference,), exitpriority=0)


def _close(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        recorder.close()
