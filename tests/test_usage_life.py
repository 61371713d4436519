"""One event per call in every server, through an orderly end; `tests/test_usage_faults.py` has the others."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from support.counted import House, Load, Verdict, signal_a_worker
from support.servers import serving, stop, wait_for_workers, workers

FINE = Verdict(lost=0, doubled=0, wrong=0, invented=0)
CALLS = 400


@pytest.mark.parametrize(
    "name",
    [
        *("uvicorn", "uvicorn-workers", "hypercorn", "granian", "granian-workers"),
        *(
            "gunicorn",
            "gunicorn-preload",
            "gunicorn-threads",
            "granian-wsgi",
            "granian-wsgi-workers",
        ),
    ],
)
def test_one_event_per_call_when_a_server_is_asked_to_stop(name: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    load = Load(house.clients)
    environ = {**house.door(name, spool=False), "INTERVAL": "3600"}  # so that all hangs on the end
    with serving(name, environ, tmp_path, "counted_app:app") as server:
        load.port = server.port
        load.drive(CALLS)
        wait_for_workers(server, 2 if name.endswith("workers") else 1)
        assert stop(server.process) in (0, -signal.SIGTERM)
    assert not load.unanswered
    assert load.judge(house.stored()) == FINE
    assert len(house.stored()) == CALLS


def test_waitress_dies_of_a_sigterm_so_that_the_spool_is_needed(tmp_path: Path) -> None:
    house = House(tmp_path)
    load = Load(house.clients)
    environ = {**house.door("waitress"), "INTERVAL": "3600"}
    with serving("waitress", environ, tmp_path, "counted_app:app") as server:
        load.port = server.port
        load.drive(CALLS)
        assert stop(server.process) == -signal.SIGTERM
    house.drain()
    assert load.judge(house.stored()) == FINE
    assert len(house.stored()) == CALLS


def test_reload_is_an_end_and_a_start(tmp_path: Path) -> None:
    house = House(tmp_path)
    load = Load(house.clients)
    watched = tmp_path / "watched"
    watched.mkdir()
    environ = {**house.door("uvicorn-reload", spool=False), "UVICORN_RELOAD_DIRS": str(watched)}
    with serving("uvicorn-reload", environ, watched, "counted_app:app") as server:
        load.port = server.port
        load.drive(CALLS)
        (former,) = workers(server.process.pid)
        deadline = time.monotonic() + 30
        while workers(server.process.pid) == [former]:
            (watched / "changed.py").write_text(f"changed = {time.monotonic()}")
            time.sleep(0.2)  # its watcher looks that often
            assert time.monotonic() < deadline, server.log.read_text()
        load.drive(CALLS)
    assert load.judge(house.stored()) == FINE
    assert len(load.answered) + len(load.unanswered) == 2 * CALLS


@pytest.mark.parametrize("name", ["gunicorn-preload", "uvicorn-workers", "granian-wsgi-workers"])
def test_a_worker_that_ends_in_order_under_load_loses_nothing(name: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    load = Load(house.clients)
    with serving(name, house.door(name), tmp_path, "counted_app:app") as server:
        load.port = server.port
        wait_for_workers(server, 2)
        with load.driving(CALLS * 4):
            load.wait_for(CALLS)
            signal_a_worker(server.process.pid, signal.SIGTERM)
        wait_for_workers(server, 3)
    house.drain()
    assert load.judge(house.stored()) == FINE
