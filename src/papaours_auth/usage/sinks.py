"""Where batches go: the protocol, and a sink that is any callable. SQLite has its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from ..exceptions import ConfigurationError
from .event import Event, Refusals


@dataclass(frozen=True, slots=True)
class Batch:
    """What is delivered as one: the same events under the same (producer, sequence), however often."""

    producer: str
    sequence: int
    events: Sequence[Event]
    refusals: Sequence[Refusals] = ()

    @property
    def id(self) -> str:
        """Its name, for sinks that remember names."""
        return f"{self.producer}-{self.sequence}"


class Sink(Protocol):
    """Takes batches, from one thread at a time. Whatever it raises, the batch comes again.

    A sink that keeps each producer's highest sequence with the batch itself, and ignores what is not above
    it, has every event exactly once. None may hold a connection between calls: the process may fork.
    """

    def write(self, batch: Batch) -> None:
        """Store a batch whole, or raise."""


class CallableSink:
    """Hands batches to a function: at least once. ``batch.id`` tells a second delivery."""

    def __init__(self, function: Callable[[Batch], object]) -> None:
        self._function = function

    def write(self, batch: Batch) -> None:
        """See `Sink`."""
        self._function(batch)


def open_sink(url: str) -> Sink:
    """Open ``sqlite:///usage.db``. Raises `ConfigurationError`."""
    path = unquote(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///") or not path or "?" in path or "\0" in path or path == ":memory:":
        raise ConfigurationError("usage goes to an SQLite file (sqlite:///usage.db), or to a Sink of yours")
    from .sqlite import SQLiteSink  # importing us loads no driver

    return SQLiteSink(Path(path))
