"""How a new SQLite file comes into WAL mode while others make the same file."""

from __future__ import annotations

import sqlite3
import time
from typing import Final

_PATIENCE: Final = 5.0


def turn_to_wal(connection: sqlite3.Connection) -> None:
    """Put a file into WAL mode. Raises `sqlite3.OperationalError` where others hold it for 5 s.

    Where two processes do this at once SQLite gives up without its timeout: 6 % of four that began together.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            connection.execute("begin immediate")  # which waits for the other
            connection.execute("rollback")
        else:
            return
