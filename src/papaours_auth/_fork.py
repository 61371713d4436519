"""What must be held still while the process forks.

An object that `hold_across_fork` knows is asked to ``before_fork`` in the forking thread, which takes its lock
and lets go of what must not cross; then, in parent and child, to ``after_fork``, which releases the lock. Who waits
for others' work to end, as a recorder does for its sink's, comes first: their locks must be free until then.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forker(Protocol):
    """Something with a lock, or with resources that belong to one process."""

    def before_fork(self) -> None:
        """Take the lock; let go of what must not cross."""

    def after_fork(self, *, child: bool) -> None:
        """Start anew in a child; release the lock."""


_first: weakref.WeakSet[Forker] = weakref.WeakSet()
_known: weakref.WeakSet[Forker] = weakref.WeakSet()
_held: list[Forker] = []


def hold_across_fork(forker: Forker, *, first: bool = False) -> None:
    """Remember an object for as long as somebody else does; ``first``: ask it before those that are not."""
    (_first if first else _known).add(forker)


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


def _after(*, child: bool) -> None:
    while _held:
        _held.pop().after_fork(child=child)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before,
        after_in_parent=lambda: _after(child=False),
        after_in_child=lambda: _after(child=True),
    )
