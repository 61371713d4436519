"""Where batches go: the protocol, sinks made of a function or of other sinks, and URLs. The others have files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote_to_bytes

from ..exceptions import ConfigurationError
from .event import Event, Refusals

_SQL: Final = ("postgresql", "mysql", "mariadb", "sqlalchemy+sqlite")


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
    it, has every event exactly once. No connection may be held across a fork.
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


class Tee:
    """Hands each batch to several sinks in turn: the one that keeps events first, those that count them last.

    Where one raises, those after it do not see the batch, and it comes again to all: the sinks before it must
    know it again, as those that are exactly once do.
    """

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, batch: Batch) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.write(batch)


def open_sink(url: str) -> Sink:
    """Open ``sqlite:///usage.db``, a SQL server's or Redis' URL. Raises `ConfigurationError`.

    Importing us loads no driver; this does.
    """
    scheme, found, _ = url.partition("://")
    opener = _OPENERS.get(scheme) if found else None
    if opener is None:
        raise ConfigurationError(
            f"usage goes to a URL that begins with {', '.join(sorted(_OPENERS))}, or to a Sink of yours"
        )
    return opener(url)


def is_sql(url: str) -> bool:
    """Tell whether a URL is one for SQLAlchemy."""
    return url.partition("://")[0] in _SQL


def file_of(url: str) -> Path:
    """Give the file an ``sqlite:///`` URL names. Raises `ConfigurationError`."""
    path = os.fsdecode(unquote_to_bytes(os.fsencode(url.removeprefix("sqlite:///"))))
    if not url.startswith("sqlite:///") or not path or "?" in path or "\0" in path or path == ":memory:":
        raise ConfigurationError(
            "usage goes to an SQLite file (sqlite:///usage.db), PostgreSQL, MySQL or MariaDB, or a Sink of yours"
        )
    return Path(path)


def _open_sqlite(url: str) -> Sink:
    from .sqlite import SQLiteSink

    return SQLiteSink(file_of(url))


def _open_sql(url: str) -> Sink:
    from .sql import open_sink as open_sql_sink

    return open_sql_sink(url)


def _open_redis(url: str) -> Sink:
    from .redis import RedisSink

    return RedisSink(url)


_OPENERS: Final[Mapping[str, Callable[[str], Sink]]] = {
    "sqlite": _open_sqlite,
    **dict.fromkeys(_SQL, _open_sql),
    "redis": _open_redis,
    "rediss": _open_redis,
    "redis+cluster": _open_redis,
    "redis+sentinel": _open_redis,
}
