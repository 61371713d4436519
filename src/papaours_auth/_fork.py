"""What a process does with objects of its parent's after a fork, whoever made the fork.

`os.fork` runs the hooks below: `Forker.before_fork` holds an object still in the forking process, `Forker.after_fork`
lets it go on in the parent and resets it in the child. A fork made in C may run the *after* hooks alone (uWSGI) or no
hook at all. So a reset in a child relies on nothing that ``before_fork`` did, and makes new locks: a thread of the
parent may have held the old ones. Where no hook runs, the child notices by itself: whoever first uses a connection, a
spool or a batch asks `in_own_process`, and calls `notice_fork` where the answer is no.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

logger = logging.getLogger("papaours_auth")

_MADV_WIPEONFORK: Final = 18  # Linux 4.14; not among mmap's constants


class Forker(Protocol):
    """Something with a lock, or with resources that belong to one process."""

    def before_fork(self) -> None:
        """Take the lock; let go of what must not cross."""

    def after_fork(self, *, child: bool) -> None:
        """Release the lock; in a child, start anew with a new lock, whether or not ``before_fork`` ran."""


_first: weakref.WeakSet[Forker] = weakref.WeakSet()
_known: weakref.WeakSet[Forker] = weakref.WeakSet()
_held: list[Forker] = []


def hold_across_fork(forker: Forker, *, first: bool = False) -> None:
    """Remember an object for as long as somebody else does; ``first``: ask it before those that are not.

    Those that wait for others' work to end, as a recorder does for its sink's, come first: the others' locks must be
    free until then.
    """
    (_first if first else _known).add(forker)


def _wiped_page() -> mmap.mmap | None:
    """Return a page of memory that the kernel zeroes in every child; None where it cannot. BoringSSL's way.

    Reading a byte of it takes 40 ns, `os.getpid` 200, and each recorded call looks.
    """
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError):
        return None
    return page


_page: Final = _wiped_page()
_pid = 0


def _claim() -> None:
    """Note that everything here is this process's own."""
    global _pid
    _pid = os.getpid()
    if _page is not None:
        _page[0] = 1


def _is_pid_ours() -> bool:
    return os.getpid() == _pid


in_own_process: Final[Callable[[], object]] = (
    partial(_page.__getitem__, 0) if _page is not None else _is_pid_ours
)
"""Whether no fork has happened since the last reset (true or false). Cheap enough for a request."""

# One lock for each process: a thread of the parent's may hold the parent's.
_noticing: dict[int, threading.Lock] = {}


def notice_fork() -> None:
    """Reset everything in a child whose fork ran no hook. Does nothing elsewhere."""
    if in_own_process():
        return
    with _noticing.setdefault(os.getpid(), threading.Lock()):
        if not in_own_process():
            _after_in_child()


def _all() -> list[Forker]:
    while True:
        try:
            return [*_first, *_known]
        except RuntimeError:  # another thread added one meanwhile
            continue


def _before() -> None:
    for forker in _all():
        forker.before_fork()
        _held.append(forker)


def _after_in_parent() -> None:
    while _held:
        _held.pop().after_fork(child=False)


def _after_in_child() -> None:
    _held.clear()
    for forker in reversed(_all()):
        try:
            forker.after_fork(child=True)
        except Exception:  # the others must be reset all the same
            logger.exception("%s could not be reset after a fork", type(forker).__name__)
    _claim()  # after the rest: another thread that looks meanwhile waits in `notice_fork`
    _noticing.clear()


_claim()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
