"""Uncached verification by the number of keys in the store: whole calls, uniform random keys, warm pages.

Stores of both ends are asked in turn. Most keys are filled in by SQL: random digests, as real ones look.
"""

from __future__ import annotations

import random
import secrets
import sqlite3
import time
import tracemalloc
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from papaours_auth import Authenticator, Keys

from .harness import Result, compared, percentile
from .subjects import TRUST, Place, left_out_stores, one_key, place

GOAL: Final = 1.5
FEW, MANY = 1_000, 1_000_000
PRESENTED: Final = 1_000
"""Keys that are presented: uniform among the digests, as all digests are uniform."""
COMMON: Final = 100  # keys a machine


def run(scale: float = 1.0) -> Result:
    many = max(2 * PRESENTED, int(MANY * min(1.0, scale)))
    result = Result("cold", "Uncached verification by the number of keys in the store")
    with ExitStack() as stack:
        sizes = (FEW, many)
        places = {size: stack.enter_context(place("sqlite")) for size in sizes}
        keys = {size: fill(places[size], size) for size in sizes}
        found = measure(stack, places, keys, turns=max(2, int(40 * scale)))
        for size in sizes:
            times = [nanoseconds for round_ in found[size] for nanoseconds in round_]
            for share in (0.5, 0.99):
                result.add(
                    f"SQLite, {size:,} keys: p{share * 100:.0f}", percentile(times, share) / 1000, "µs"
                )
            file = Path(places[size].url.removeprefix("sqlite:///"))
            result.add(f"SQLite, {size:,} keys: in store", file.stat().st_size / size, "bytes/key")
    middles = {size: [percentile(round_, 0.5) for round_ in found[size]] for size in sizes}
    result.add(
        f"SQLite, {many:,} / {FEW:,} keys: p50",
        **compared(middles[many], middles[FEW]),
        goal=GOAL,
        note="" if many == MANY else "fewer keys than the goal speaks of",
    )
    result.add("in the cache", _cached_bytes(), "bytes/key")
    result.left_out += left_out_stores()
    return result


def fill(there: Place, size: int) -> list[bytes]:
    """Put ``size`` keys into an SQLite store; give those that can be presented."""
    one_key(there.url, there.peppers)
    connection = sqlite3.connect(there.url.removeprefix("sqlite:///"))
    connection.row_factory = sqlite3.Row
    keys = [dict(row) for row in connection.execute("select * from keys")]
    digest = dict(connection.execute("select * from digests").fetchone())
    with Keys(there.url, peppers=there.peppers) as admin:
        presented = [
            admin._format.mint("prod", tag=there.peppers.primary.tag).reveal().encode()
            for _ in range(min(size, PRESENTED))
        ]
    digests = [there.peppers.primary.digest(key) for key in presented]
    digests += [secrets.token_bytes(32) for _ in range(size - len(digests))]
    ids = sorted(secrets.token_hex(16) for _ in digests)
    owners = [secrets.token_hex(16) for _ in range(0, size, COMMON)]
    # Sorted, and with the indexes made at the end: minutes become seconds.
    connection.executescript("drop index keys_of_machine; drop index digests_of_key")
    machine = dict(connection.execute("select * from machines").fetchone())
    _insert(connection, "machines", machine, ({"id": owner} for owner in sorted(owners)))
    _insert(connection, "keys", keys[0], ({"id": id_, "machine_id": random.choice(owners)} for id_ in ids))
    random.shuffle(ids)
    pairs = sorted(zip(digests, ids, strict=True))
    _insert(connection, "digests", digest, ({"digest": made, "key_id": id_} for made, id_ in pairs))
    connection.executescript(
        "create index keys_of_machine on keys (machine_id); create index digests_of_key on digests (key_id);"
    )
    connection.commit()
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    return presented


def _insert(
    connection: sqlite3.Connection,
    table: str,
    template: Mapping[str, object],
    changes: Iterable[dict[str, object]],
) -> None:
    names = list(template)
    marks = ", ".join("?" * len(names))
    rows = ([({**template, **change})[name] for name in names] for change in changes)
    connection.executemany(f"insert into {table} ({', '.join(names)}) values ({marks})", rows)


def measure(
    stack: ExitStack, places: dict[int, Place], keys: dict[int, list[bytes]], *, turns: int
) -> dict[int, list[list[int]]]:
    """Give the nanoseconds of each call of each turn."""
    doors = {
        size: stack.enter_context(
            Authenticator(
                there.url, environment="prod", peppers=there.peppers, max_staleness=TRUST, max_known=1
            )
        )
        for size, there in places.items()
    }
    found: dict[int, list[list[int]]] = {size: [] for size in places}
    for turn in range(turns + 1):
        for size, door in doors.items():
            sample = keys[size] if turn == 0 else random.choices(keys[size], k=200)
            times = _timed(door, sample)
            if turn:  # the first one warms the pages
                found[size].append(times)
    return found


def _timed(door: Authenticator, sample: list[bytes]) -> list[int]:
    times = []
    for key in sample:
        begin = time.perf_counter_ns()
        door.authenticate(key)
        times.append(time.perf_counter_ns() - begin)
    return times


def _cached_bytes() -> float:
    """Weigh the cache by what its entries allocate, all told."""
    with place("sqlite") as there:
        keys = fill(there, FEW)
        with Authenticator(there.url, environment="prod", peppers=there.peppers, max_staleness=TRUST) as door:
            door.start()
            door.authenticate(keys[0])
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for key in keys[1:]:
                door.authenticate(key)
            after = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
    return (after - before) / (len(keys) - 1)
