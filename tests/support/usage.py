"""A caller, calls it makes, sinks that fail, and what came out of a recorder."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from papaours_auth import Identity, Keys, PepperRing
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.usage import Batch, Call, CallableSink, Event, Outcome, Recorder, begin_call
from papaours_auth.usage.sqlite import SQLiteSink
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

from .calls import Recorded, environ_of, http_scope, run_asgi, run_wsgi, wsgi_ok

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


def call_with_canaries(door: str, ring: PepperRing, recorder: Recorder, key: str) -> None:
    """Call with a known key and with an unknown one, each in the path and the request id too, and close."""
    store = MemoryStore()
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    keys.import_key(machine.id, key, name="Production - Canari")
    options: dict[str, Any] = {"environment": "prod", "peppers": ring, "usage": recorder}
    for presented in (key, key + "x"):
        headers = [("X-API-KEY", presented), ("X-Request-ID", presented)]
        if door == "asgi":
            guard = ASGIMiddleware(Recorded(), store=AsyncMemoryStore(store), **options)
            run_asgi(guard, http_scope(f"/{presented}", headers))
            guard.authenticator._stop_watching()
        else:
            shut = WSGIMiddleware(wsgi_ok, store=store, **options)
            run_wsgi(shut, environ_of(f"/{presented}", headers))
            shut.authenticator.close()
    recorder.close()


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
