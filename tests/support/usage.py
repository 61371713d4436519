"""A caller, calls it makes, sinks that fail, and what came out of a recorder."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from papaours_auth import Identity
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.usage import Batch, Call, CallableSink, Event, Outcome, Recorder, begin_call
from papaours_auth.usage.sqlite import SQLiteSink

CALLER = Identity(
    KeyInfo("key-1", "Production - Banc", "prod", "", None),
    MachineInfo("machine-1", "Banc", "cfa-lyon", False),
    (),
    frozenset(),
)
SLOW = 3600.0  # the thread delivers at its start, and then not before the test has ended


def rows(
    path: Path, statement: str = "select status, count(*) from usage_events group by 1"
) -> dict[Any, Any]:
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute(statement).fetchall())
    except sqlite3.OperationalError:  # no batch has come yet
        return {}
    finally:
        connection.close()


def call(recorder: Recorder, status: int = 200, *, route: str = "/contracts", end: bool = True) -> Call:
    made = begin_call(CALLER, "192.0.2.7", "GET")
    made.route = route
    made.status = status
    recorder.sent(made)
    if end:
        recorder.done(made, Outcome.COMPLETED)
    return made


class Faulty:
    """A sink that obeys a plan: each write takes the next step, and the last one stays."""

    def __init__(self, path: Path, *plan: str) -> None:
        self.inner, self.plan = SQLiteSink(path), list(plan)

    def write(self, batch: Batch) -> None:
        step = self.plan.pop(0) if self.plan else "work"
        if step == "exit":
            raise SystemExit
        if step == "down":
            raise RuntimeError("pk_prod_canary")
        self.inner.write(batch)
        if step == "reply lost":
            raise TimeoutError


class Kept:
    """A recorder, and the events that came out of it."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.recorder = Recorder(CallableSink(self.batches.append), interval=SLOW, service="contrats")

    def events(self) -> list[Event]:
        self.recorder.flush()
        return [event for batch in self.batches for event in batch.events]
