"""The watcher threads that a test has started."""

from __future__ import annotations

import threading

_earlier: set[threading.Thread] = set()


def note_earlier() -> None:
    """Leave out what runs now: another test of this worker may have left a watcher that is not collected yet."""
    _earlier.clear()
    _earlier.update(threading.enumerate())


def watchers() -> list[threading.Thread]:
    """Return those that were started since."""
    running = [thread for thread in threading.enumerate() if thread.name == "papaours-auth-watcher"]
    return [thread for thread in running if thread not in _earlier]
