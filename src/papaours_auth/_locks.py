"""A lock whose holder may wait for something else: for I/O, or for a thread to start.

gevent replaces `threading.Lock` and its kin in a running program, and with gunicorn's ``--preload`` after the app was
built. A lock made before that blocks the whole thread, with every greenlet in it: where its holder waits and another
greenlet wants it, nobody ever goes on. So such a lock is made at its first use, and anew where `threading` offers
another kind since. A lock held for a few statements that wait for nothing may be an ordinary one.

`tests/test_gevent.py` builds everything, patches, and watches every ordinary lock while the greenlets switch.
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Protocol


class _Lock(Protocol):
    def acquire(self, blocking: bool = ..., timeout: float = ...) -> bool: ...
    def release(self) -> None: ...


class WaitingLock:
    """A lock, or with ``reentrant`` an `RLock`. A child of a fork makes a new one of these."""

    def __init__(self, *, reentrant: bool = False) -> None:
        self._reentrant = reentrant
        self._kind: object = None
        self._locks: dict[object, _Lock] = {}
        self._holders = 0

    def acquire(self, timeout: float = -1) -> bool:
        """Take it; whether that was possible in time (seconds)."""
        if not self._current().acquire(timeout=timeout):
            return False
        self._holders += 1  # only who holds it writes this
        return True

    def release(self) -> None:
        """Give it back."""
        self._holders -= 1
        self._locks[self._kind].release()

    def _current(self) -> _Lock:
        kind = threading.RLock if self._reentrant else threading.Lock
        if kind is not self._kind and not self._holders:
            self._locks.setdefault(kind, kind())  # atomic: two threads that come first make one lock
            self._kind = kind
        return self._locks[self._kind]

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Room:
    """So many at a time. A queue of tokens is a semaphore without its 0.7 µs; see above for when it is made."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kind: object = None
        self._tokens: dict[object, queue.SimpleQueue[None]] = {}

    def now(self) -> queue.SimpleQueue[None]:
        """Return the tokens: ``get`` one, raising `queue.Empty`, and ``put`` it back into the same queue."""
        kind = queue.SimpleQueue
        if kind is not self._kind:
            tokens: queue.SimpleQueue[None] = kind()
            for _ in range(self._size):
                tokens.put(None)
            self._tokens.setdefault(kind, tokens)
            self._kind = kind
        return self._tokens[kind]
