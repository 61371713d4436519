"""A few daemon threads of our own, for calls that block an event loop.

`asyncio.to_thread` would borrow the app's: the loop's default executor has ``cpu_count + 4`` threads, and a few calls
of ours to a slow server would hold up whatever the app gives it.

Thread: started when a call finds none free. Fork: a child starts its own. Exit: the idle ones are ended, because an
interpreter that is not the process's first (mod_wsgi) must not end before its threads; nobody waits for the others.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ._fork import hold_across_fork, notice_fork

_T = TypeVar("_T")
_known: weakref.WeakSet[Threads] = weakref.WeakSet()
_JOIN: Final = 0.5  # seconds, for threads that have nothing to do

if TYPE_CHECKING:
    _Jobs = queue.SimpleQueue[Callable[[], None] | None]


class Threads:
    """Runs at most ``most`` calls at once, while at most ``waiting`` more wait."""

    def __init__(self, most: int, *, name: str, waiting: int = 0) -> None:
        self._most, self._room, self._name = most, most + waiting, name
        self._reset()
        hold_across_fork(self)
        _known.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._jobs: _Jobs | None = None
        self._threads: list[threading.Thread] = []
        self._asked = 0

    def ask(self, call: Callable[[], _T]) -> Future[_T] | None:
        """Run a call in a thread. Returns None, and queues nothing, where there is no room."""
        notice_fork()
        with self._lock:
            if self._asked >= self._room:
                return None
            self._asked += 1
            jobs = self._jobs = self._jobs or queue.SimpleQueue()
            if len(self._threads) < min(self._asked, self._most) and not self._grow(jobs):
                self._asked -= 1
                return None
        future: Future[_T] = Future()
        jobs.put(lambda: self._run(call, future))
        return future

    def _grow(self, jobs: _Jobs) -> bool:
        """Start a thread. Whether there is one now, this or another."""
        thread = threading.Thread(target=_serve, args=(jobs,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, or the machine gives no more
            return bool(self._threads)
        self._threads.append(thread)
        return True

    def _run(self, call: Callable[[], _T], future: Future[_T]) -> None:
        result: _T | None = None
        error: BaseException | None = None
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as raised:  # noqa: BLE001 - raised where it is waited for
                error = raised
        with self._lock:  # before anybody hears of it, so that who asks again finds room
            self._asked -= 1
        if error is not None:
            future.set_exception(error)
        elif not future.cancelled():
            future.set_result(cast("_T", result))

    def stop(self) -> list[threading.Thread]:
        """End the threads once they have done what was asked. Return those that have nothing to do.

        A call that is asked for afterwards starts another.
        """
        with self._lock:
            jobs, threads, asked = self._jobs, self._threads, self._asked
            self._jobs, self._threads = None, []
        for _ in threads:
            if jobs is not None:
                jobs.put(None)
        return [] if asked else threads

    def __del__(self) -> None:
        self.stop()

    def before_fork(self) -> None:
        """Hold the counts still."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child without its parent's threads."""
        if child:
            self._reset()
        else:
            self._lock.release()


def _stop_all() -> None:
    for thread in [thread for threads in [*_known] for thread in threads.stop()]:
        thread.join(_JOIN)


atexit.register(_stop_all)


def _serve(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds what was asked, and its answer
