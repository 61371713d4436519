"""How many events a second a sink stores, and how many in a second of its own processor time, without the server's.

Batches as a recorder makes them at 50,000 events a second: 25,000 of half a second. What they are of is said in
`usage_questions`. Sinks take turns, and the first batch of each, which fills its caches, is not counted.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Final

from papaours_auth.usage import Batch, open_sink

from .harness import Result, installed
from .subjects import left_out_stores, place, shared_stores
from .usage_questions import batches

EVENTS: Final = 25_000
ROUNDS: Final = 10
RATE: Final = 50_000


def run(scale: float = 1.0) -> Result:
    result = Result("usage_sinks", "How fast do sinks take events?")
    size, rounds = max(100, int(EVENTS * min(scale * 10, 1))), max(2, int(ROUNDS * scale))
    with ExitStack() as stack:
        sinks = {name: open_sink(stack.enter_context(place(name)).url) for name in shared_stores()}
        wall: dict[str, list[float]] = {name: [] for name in sinks}
        own: dict[str, list[float]] = {name: [] for name in sinks}
        end = datetime.now(UTC)
        begin = end - timedelta(seconds=(rounds + 1) * size / RATE)
        for sequence, events in enumerate(batches((rounds + 1) * size, begin, end, size), 1):
            for name, sink in sinks.items():
                since, used = time.perf_counter(), time.process_time()
                sink.write(Batch("bench", sequence, events))
                wall[name].append(size / (time.perf_counter() - since))
                own[name].append(size / (time.process_time() - used))
    for name in sinks:
        for what, rates in (
            ("a second", wall[name][1:]),
            ("a second of its own processor time", own[name][1:]),
        ):
            spread = min(rates), max(rates)
            result.add(f"{name}: {what}", statistics.median(rates), "events", spread=spread)
    result.versions = {name: installed(name) for name in ("redis", "sqlalchemy", "psycopg", "pymysql")}
    result.left_out += left_out_stores()
    return result
