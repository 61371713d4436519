"""Usage: every call recorded, delivered exactly once, and asked about later. docs/usage.md shows how."""

from __future__ import annotations

from .alerts import Alert, Sign
from .event import Call, Event, Outcome, Refusals, begin_call
from .recorder import Health, Recorder, Stats
from .sinks import Batch, CallableSink, Sink, Tee, open_sink

__all__ = [
    "Alert",
    "Batch",
    "Call",
    "CallableSink",
    "Event",
    "Health",
    "Outcome",
    "Recorder",
    "Refusals",
    "Sign",
    "Sink",
    "Stats",
    "Tee",
    "begin_call",
    "open_sink",
]
