"""The rows of the design's table of figures, and which figures of which benchmark answer each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from .harness import Figure, Result


class Row(NamedTuple):
    """What is to be reached. ``figures``: beginnings of the names of the figures that say whether it is.

    Without a benchmark it is held by a test, which ``command`` runs.
    """

    what: str
    reach: str
    benchmark: str
    figures: tuple[str, ...]
    test: str = ""

    @property
    def command(self) -> str:
        return self.test or f"make bench-{self.benchmark}"


ROWS: Final = (
    Row(
        "cached verification / the floor (a keyed BLAKE2b, a `dict.get`, a `compare_digest` in one function)",
        "<= 1.25",
        "floor",
        ("Authenticator.authenticate / the floor", "instructions: authenticate / the floor"),
    ),
    Row(
        "time the ASGI middleware adds, recording usage / time Starlette's AuthenticationMiddleware adds with a "
        "one-line SHA-256 backend",
        "<= 1.0",
        "middleware",
        ("ASGI, 8 other headers, recording usage: added",),
    ),
    Row(
        "requests/s under uvicorn with / without the middleware, FastAPI JSON route with one dependency",
        ">= 0.97",
        "server",
        ("uvicorn, FastAPI JSON route",),
    ),
    Row("the same for a bare app", ">= 0.85", "server", ("uvicorn, bare app",)),
    Row(
        "uncached verification, SQLite with 1,000,000 keys / with 1,000 keys",
        "<= 1.5",
        "cold",
        ("SQLite, 1,000,000 / 1,000 keys: p50",),
    ),
    Row(
        "uncached verification on Redis / one bare GET round trip with the same client",
        "<= 1.3",
        "cold",
        ("Redis: uncached verification / a bare GET",),
    ),
    Row(
        "peers: keyshield cached with its delays off / ours cached",
        ">= 15",
        "peers",
        ("keyshield, cached, delays off / ours",),
    ),
    Row(
        "peers: djangorestframework-api-key on SQLite / ours uncached on SQLite",
        ">= 8",
        "peers",
        ("djangorestframework-api-key, SQLite / ours",),
    ),
    Row("store reads caused by forged keys in our format", "0", "flood", ("forged in our format: store reads",)),
    Row(
        "valid clients' p99 over HTTP, forged keys at 10 % of capacity / quiet",
        "<= 1.2",
        "flood",
        ("HTTP: valid clients' p99, flooded / quiet",),
    ),
    Row(
        "disable to last acceptance, 4 processes under load, p99",
        "<= 50 ms",
        "revocation",
        ("redis: p99", "postgresql: p99", "sqlite: p99"),
    ),
    Row(
        "store away for 30 s under load: p99 of calls meanwhile",
        "<= 5 ms",
        "outage",
        ("SQLite, file moved away: p99 in", "Redis killed: p99 in", "Redis frozen (SIGSTOP): p99 in",
         "PostgreSQL killed: p99 in"),
    ),
    Row(
        "usage events lost or doubled through sink outage, SIGTERM, `kill -9` (spool on)",
        "0",
        "",
        (),
        "make usage-faults",
    ),
    Row(
        "timing: effect of which byte is wrong, or of the key being known, over an A/A control's",
        "<= control + 10 ns",
        "timing",
        ("cached: last byte", "cached: unknown", "not cached: last byte", "not cached: unknown"),
    ),
    Row(
        "event loop: longest turn at p99.9 while uncached keys are verified",
        "<= 1 ms",
        "threads",
        ("loop that verifies uncached keys on SQLite: p99.9",),
    ),
)  # fmt: skip


def answers(row: Row, results: Mapping[str, Result]) -> list[Figure]:
    """Give the figures that say whether a row is reached; none where its benchmark has not run."""
    result = results.get(row.benchmark)
    figures = result.figures if result is not None else []
    return [figure for figure in figures if figure.name.startswith(row.figures)]


def verdict(row: Row, figures: list[Figure]) -> str:
    """Judge a row by its worst figure."""
    if row.test:
        return "held by a test"
    if not figures:
        return "not measured"
    return "MISSED" if any(figure.verdict == "MISSED" for figure in figures) else "met"
