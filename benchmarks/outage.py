"""A store taken away for 30 seconds under the load of four processes: what calls cost meanwhile, and after.

Half of the calls ask for keys that are not remembered. p99 is of all calls of a process during the outage, the
worst of the four processes; the longest is the timeout that found the outage, or a try.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from papaours_auth import Keys, open_store, parse_peppers
from papaours_auth.digest import new_pepper

from .harness import Result
from .plots import Plot, Point

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.broken import Kind, postgresql_killed, redis_frozen, redis_killed, sqlite_file
from support.fleet import Fleet

SECONDS: Final = 30.0
KEYS: Final = 400
KINDS: Final[dict[str, Kind]] = {
    "SQLite, file moved away": sqlite_file,
    "Redis killed": redis_killed,
    "Redis frozen (SIGSTOP)": redis_frozen,
    "PostgreSQL killed": postgresql_killed,
}


def run(scale: float = 1.0) -> Result:
    result = Result("outage", f"A store away for {SECONDS * scale:.0f} s under load, on_outage=refuse")
    lines = {name: _measure(result, name, kind, SECONDS * scale) for name, kind in KINDS.items()}
    title = f"p99 of calls by the second; the store is away from 0 to {SECONDS * scale:.0f}"
    result.plots.append(Plot("outage", title, "lines", "seconds", "ms", lines, log="y"))
    return result


def _measure(result: Result, name: str, kind: Kind, seconds: float) -> list[Point]:
    """Report one way to lose a store; give its timeline."""
    with TemporaryDirectory() as folder, kind(Path(folder)) as broken, ExitStack() as stack:
        open_store(broken.url, create=True).close()
        secret = new_pepper()
        with Keys(broken.url, peppers=parse_peppers(secret)) as keys:
            machine = keys.create_machine("Service de facturation", organisation="cfa-lyon").id
            made = [
                keys.create_key(machine, name=f"Banc {number}", environment="prod") for number in range(KEYS)
            ]
        texts = [new.secret.reveal() for new in made]
        fleet = Fleet(stack, broken.verifying_url, secret, texts[0], texts[1:])
        fleet.begin("quiet", 2.0)
        fleet.begin("outage", 0)
        broken.take_away()
        time.sleep(seconds)
        fleet.begin("recovery", 0)
        begun = time.monotonic()
        broken.give_back()  # ends when the server takes connections, which PostgreSQL's recovery keeps it from
        back = time.monotonic()
        time.sleep(5.0)
        reports = fleet.stop()
    worst = {phase: max(report[phase]["p99"] for report in reports) * 1e3 for phase in ("quiet", "outage")}
    result.add(f"{name}: p99 quiet", worst["quiet"], "ms")
    result.add(f"{name}: p99 in the outage", worst["outage"], "ms", goal=5.0)
    result.add(f"{name}: longest in the outage", max(r["outage"]["longest"] for r in reports) * 1e3, "ms")
    recovered = max(0.0, max(report["recovery"]["first_accepted"] for report in reports) - back)
    note = f"the server itself took {(back - begun) * 1e3:.0f} ms to take connections again"
    result.add(f"{name}: uncached keys verified again after", recovered * 1e3, "ms", goal=1000.0, note=note)
    result.add(f"{name}: wrong answers", _wrong(reports), "", goal=0.0)
    threads = max(r["outage"]["threads"] for r in reports) - max(r["quiet"]["threads"] for r in reports)
    result.add(f"{name}: threads more than before", threads, "", goal=1.0)
    return timeline(reports)


def timeline(reports: list[dict[str, Any]]) -> list[Point]:
    """Give the worst process's p99 (ms) by the second, counted from when the store was taken away."""
    worst: dict[int, float] = {}
    for report in reports:
        for phase in ("quiet", "outage", "recovery"):
            for second, p99 in report[phase]["p99_each_second"].items():
                at = round(report[phase]["began"] - report["outage"]["began"]) + int(second)
                worst[at] = max(worst.get(at, 0.0), p99 * 1e3)
    return [(float(at), worst[at]) for at in sorted(worst)]


def _wrong(reports: list[dict[str, Any]]) -> int:
    """Count what nobody should have been told: a 401 for a valid key, entry for an unknown one."""
    right = {"accepted", "store_unavailable"}
    allowed = {"target": right, "other": right, "unknown": {"unknown_key", "store_unavailable"}}
    return sum(
        count
        for report in reports
        for phase in report.values()
        for what, outcomes in phase["outcomes"].items()
        for outcome, count in outcomes.items()
        if outcome not in allowed[what]
    )
