"""What a question about usage costs over 10,000,000 events in SQLite.

The file is written by the sink itself, a month of events in order of time: 50 keys of 25 machines, the first with
a quarter of all calls, 200 routes, 2,000 addresses. Each question is asked of the busiest key, a middling and the
rarest one: warm (asked before), and cold (the file's pages dropped from the system's cache first). Goal (issue 4):
a second at most.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Final

from papaours_auth.usage import Batch, Event
from papaours_auth.usage.questions import Usage
from papaours_auth.usage.sqlite import Retention, SQLiteSink

from .harness import Result

EVENTS: Final = 10_000_000
BATCH: Final = 50_000
GOAL: Final = 1.0
ROUNDS: Final = 5
SPAN: Final = timedelta(days=29)
KEYS: Final = [f"key_{number:016x}" for number in range(50)]
ROUTES: Final = [f"/api/v1/resource{number}/{{id}}" for number in range(200)]
ADDRESSES: Final = [f"10.{number % 7}.{number // 200}.{number % 200}" for number in range(2_000)]
ASKED: Final = {"busiest": 0, "middling": 10, "rarest": 49}


def run(scale: float = 1.0) -> Result:
    count = max(BATCH // 10, int(EVENTS * scale))
    result = Result("usage_questions", f"What do questions about usage cost over {count:,} events?")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage.db"
        end = datetime.now(UTC)
        rate(result, "an empty file", Path(folder) / "empty.db", end, scale)
        fill(result, path, count, end - SPAN, end)
        rate(result, "the full file", path, end, scale)
        result.add("the file", path.stat().st_size / count, "bytes an event")
        slowest = {"warm": 0.0, "cold": 0.0}
        for name, ask in questions(Usage(path), end).items():
            times = {"warm": asked(ask), "cold": asked(ask, before=lambda: forget(path))}
            for how, found in times.items():
                slowest[how] = max(slowest[how], *found)
                result.add(
                    f"{name}, {how}",
                    statistics.median(found) * 1e3,
                    "ms",
                    spread=(min(found) * 1e3, max(found) * 1e3),
                )
        for how, seconds in slowest.items():
            result.add(f"slowest answer, {how}", seconds, "s", goal=GOAL)
        prune(result, path, end)
    return result


def fill(result: Result, path: Path, count: int, begin: datetime, end: datetime) -> None:
    sink, rates = SQLiteSink(path), []
    gc.disable()
    for sequence, events in enumerate(batches(count, begin, end), 1):
        since = time.perf_counter()
        sink.write(Batch("bench", sequence, events))
        rates.append(len(events) / (time.perf_counter() - since))
    gc.enable()
    tenth = max(1, len(rates) // 10)
    for name, part in (("first", rates[:tenth]), ("last", rates[-tenth:])):
        spread = min(part), max(part)
        result.add(
            f"a month's backlog into the sink, {name} tenth",
            statistics.median(part),
            "events/s",
            spread=spread,
        )


def rate(result: Result, name: str, path: Path, end: datetime, scale: float) -> None:
    """Write as a busy service does: a batch holds what came within a second. A core's: by the process's own time."""
    sink, wall, own = SQLiteSink(path), [], []
    seconds, size = max(2, int(20 * min(scale, 1))), max(500, int(BATCH * min(scale, 1)))
    for sequence, events in enumerate(
        batches(seconds * size, end - timedelta(seconds=seconds), end, size), 1
    ):
        since, used = time.perf_counter(), time.process_time()
        sink.write(Batch(f"rate {name}", sequence, events))
        wall.append(len(events) / (time.perf_counter() - since))
        own.append(len(events) / (time.process_time() - used))
    for what, rates, goal in (("a core's second", own, 50_000), ("a second of the clock", wall, None)):
        middle, spread = statistics.median(rates), (min(rates), max(rates))
        result.add(f"into {name}, {what}", middle, "events", goal=goal, at_most=False, spread=spread)


def batches(count: int, begin: datetime, end: datetime, size: int = BATCH) -> Iterator[list[Event]]:
    drawn = random.Random(1)
    weights = list(accumulate([0.25] + [0.75 * 0.9**place / 10 for place in range(1, len(KEYS))]))
    start, width = int(begin.timestamp() * 1e6), (end - begin) / timedelta(microseconds=1) / count
    size = min(size, count)
    for first in range(0, count, size):
        places = drawn.choices(range(len(KEYS)), cum_weights=weights, k=size)
        routes = drawn.choices(ROUTES, k=size)
        statuses = drawn.choices((200, 404, 500), cum_weights=(0.95, 0.99, 1.0), k=size)
        yield [
            Event(
                1, f"0123456789abcdef-{first}-{number}", start + int((first + number) * width), KEYS[place],
                f"machine_{place // 2:016x}", ADDRESSES[(place * 40 + number % 40) % 2_000], "GET", route, status, "",
                "completed", "contrats", "prod", 1_234, "8f14e45fceea167a5a36dedd4bea2543",
            )
            for number, (place, route, status) in enumerate(zip(places, routes, statuses, strict=True))
        ]  # fmt: skip


def questions(usage: Usage, end: datetime) -> dict[str, Callable[[], object]]:
    month, day = end - SPAN, end - timedelta(days=1)
    asked: dict[str, Callable[[], object]] = {
        "unused_since": lambda: usage.unused_since(day),
        "history, all": lambda: usage.history(),
        "history, status 500": lambda: usage.history(status=500),
        "history, a route": lambda: usage.history(route=ROUTES[7]),
        "history, an address": lambda: usage.history(address=ADDRESSES[3]),
    }
    for name, place in ASKED.items():
        asked |= _of_key(usage, name, KEYS[place], month)
        asked |= _of_machine(usage, f"{name}'s machine", f"machine_{place // 2:016x}", month)
    return asked


def _of_key(usage: Usage, name: str, key: str, month: datetime) -> dict[str, Callable[[], object]]:
    week = month + SPAN - timedelta(days=7)
    deep = usage.history(key_id=key, until=month + SPAN / 2, limit=1).cursor
    return {
        f"last_used, {name}": lambda: usage.last_used(key),
        f"history, {name}": lambda: usage.history(key_id=key),
        f"history, {name}, a page in the middle": lambda: usage.history(key_id=key, cursor=deep),
        f"history, {name}, status 404": lambda: usage.history(key_id=key, status=404),
        f"history, {name}, a status it never had": lambda: usage.history(key_id=key, status=503),
        f"history, {name}, three filters that exclude each other": lambda: usage.history(
            key_id=key, route=ROUTES[7], address=ADDRESSES[1999], status=200
        ),
        f"series by hour, {name}": lambda: usage.series(key, "hour", month),
        f"by_route, {name}": lambda: usage.by_route(key, month),
        f"by_route, {name}, a week": lambda: usage.by_route(key, week),
        f"by_address, {name}": lambda: usage.by_address(key, month),
        f"still_used, {name}": lambda: usage.still_used(key, month),
    }


def _of_machine(usage: Usage, name: str, machine: str, month: datetime) -> dict[str, Callable[[], object]]:
    return {
        f"history, {name}": lambda: usage.history(machine_id=machine),
        f"history, {name}, status 404": lambda: usage.history(machine_id=machine, status=404),
        f"report, {name}": lambda: usage.report(machine, month),
    }


def asked(ask: Callable[[], object], before: Callable[[], None] | None = None) -> list[float]:
    """Give the seconds of each round; where nothing is to be done ``before``, it was asked once already."""
    if before is None:
        ask()
    times = []
    for _ in range(ROUNDS):
        if before is not None:
            before()
        since = time.perf_counter()
        ask()
        times.append(time.perf_counter() - since)
    return times


def forget(path: Path) -> None:
    """Have the system drop the file's pages from its cache."""
    for part in (path, path.with_name(path.name + "-wal")):
        if part.exists():
            descriptor = os.open(part, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def prune(result: Result, path: Path, end: datetime) -> None:
    """Write small batches while ten days of events are too old: how long does a write take?"""
    sink = SQLiteSink(path, retention=Retention(events=20))
    times = []
    for sequence in range(1, 101):
        events = [event._replace(time=int(end.timestamp() * 1e6)) for event in next(batches(500, end, end))]
        since = time.perf_counter()
        sink.write(Batch("prune", sequence, events))
        times.append((time.perf_counter() - since) * 1e3)
    result.add(
        "a write of 500 events while old ones go",
        statistics.median(times),
        "ms",
        spread=(min(times), max(times)),
    )
