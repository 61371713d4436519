"""Calls answered are events in the sink, each once, through faults of real servers, sinks and disks.

`make usage-faults` drives 200,000 calls with a sink that is away for 60 seconds; `make test` a tenth of the calls.
``support.counted`` says what exactly is compared.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.counted import House, Load, Verdict, filled, signal_a_worker, small_disk
from support.servers import serving, stop, wait_for_workers, wait_until

SCALE = float(os.environ.get("PAPAOURS_FAULT_SCALE", "0.1"))
SERVERS = (
    "uvicorn-workers",
    "gunicorn-threads",
    "gunicorn-preload",
    "granian-workers",
    "granian-wsgi-workers",
)
PHASES = 6
CALLS = int(200_000 * SCALE) // len(SERVERS) // PHASES
SINK_DOWN = max(2.0, 60.0 * SCALE)
FINE = Verdict(lost=0, doubled=0, wrong=0, invented=0)


@pytest.mark.parametrize("name", SERVERS)
def test_calls_answered_are_events_each_once(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    house = House(tmp_path)
    load, environ = Load(house.clients), house.door(name)
    with serving(name, environ, tmp_path, "counted_app:app") as server:
        load.port = server.port
        load.drive(CALLS)
        with house.order("lose-replies"):
            load.drive(CALLS)
            wait_until(house.a_reply_was_lost, 10, what="a batch that was stored and not acknowledged")
        with house.sink_down(SINK_DOWN):
            load.drive(CALLS)
        with load.driving(CALLS):
            for _ in range(2):
                load.wait_for(CALLS // 4)
                signal_a_worker(server.process.pid, signal.SIGKILL)
        with ExitStack() as last:
            last.enter_context(load.driving(CALLS * 2))
            load.wait_for(CALLS // 2)
            wait_for_workers(server, 4)
            stop(server.process)
            server = last.enter_context(serving(name, environ, tmp_path, "counted_app:app"))
            load.port = server.port
            wait_for_workers(server, 2)
            load.wait_for(CALLS * 2)
    house.drain()
    stored = house.stored()
    verdict = load.judge(stored)
    told = (
        f"answered {len(load.answered)}, unanswered {len(load.unanswered)}, events {len(stored)}: {verdict}"
    )
    record_property("counted", told)
    assert verdict == FINE, told
    # Those that a kill or the end of a server cut off: a few of each, never a share of the load.
    assert len(load.unanswered) < 0.05 * len(load.answered), told
    by_key = Counter((key, status) for _, key, status in stored)
    assert set(by_key) == set(load.answered.values()), "every key with every status"
    assert house.lost() == 0
    assert not list(house.spool.iterdir())


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-threads"])
def test_disk_full_answered_is_delivered_and_counted_lost(name: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    load = Load(house.clients)
    with small_disk(house.spool):
        environ = {**house.door(name), "SEGMENT": str(64 << 10)}
        with serving(name, environ, tmp_path, "counted_app:app") as server:
            load.port = server.port
            load.drive(CALLS)
            with house.sink_down(0.5), house.order("disk-full"), filled(house.spool):
                load.drive(max(CALLS, 3000))
            load.drive(CALLS)
        house.drain()
    verdict = load.judge(house.stored())
    assert verdict._replace(lost=0) == FINE
    assert 0 < verdict.lost == house.lost(), "what is not there is counted"
    assert not load.unanswered, "no request was harmed"
