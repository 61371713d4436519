"""Real faults under real load: four processes verify while their store is changed, taken away and given back.

Each store comes with what is done to it. The figures (how fast, not whether) are the
benchmarks' business; here only what must never happen is asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support import load
from support.proxy import Proxy
from support.redis_servers import NEWEST, WHY_NOT, RedisServer, redis_server
from support.sql_servers import postgresql

PROCESSES = 4
OTHERS = 400
MAX_STALENESS = 1.0
SLACK = 1.5
"""Seconds that two loaded cores may add to a bound: four processes and a server share them."""
SETTLE = 0.5
"""Seconds a phase lasts, so that each process makes some thousands of calls in it."""


class Broken(NamedTuple):
    """A store, and what is done to it."""

    url: str
    verifying_url: str  # as the load sees it: perhaps through a proxy
    take_away: Callable[[], object]
    give_back: Callable[[], object]


@contextmanager
def sqlite_file(folder: Path) -> Iterator[Broken]:
    path, away = folder / "keys.db", folder / "away.db"
    url = f"sqlite:///{path}"
    yield Broken(url, url, lambda: path.rename(away), lambda: away.rename(path))


@contextmanager
def redis_killed(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server:
        url = f"redis://{server.address}"
        yield Broken(url, url, server.kill, server.start)


@contextmanager
def redis_frozen(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server:
        url = f"redis://{server.address}"
        yield Broken(url, url, server.freeze, server.thaw)


@contextmanager
def redis_cut_off(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server, Proxy(server.port) as proxy:
        yield cut_off(f"redis://{server.address}", f"redis://127.0.0.1:{proxy.port}", proxy)


def redis(folder: Path) -> AbstractContextManager[RedisServer]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    return redis_server(NEWEST, folder, "--appendonly", "yes", "--appendfsync", "always")


@contextmanager
def postgresql_killed(folder: Path) -> Iterator[Broken]:
    with postgresql() as server:
        url = server.url(server.database())
        yield Broken(url, url, server.kill, server.start)


@contextmanager
def postgresql_cut_off(folder: Path) -> Iterator[Broken]:
    with postgresql() as server, Proxy(server.port) as proxy:
        database = server.database()
        yield cut_off(server.url(database), server.url(database, port=proxy.port), proxy)


def cut_off(url: str, verifying_url: str, proxy: Proxy) -> Broken:
    """Packets are swallowed, connections stay: the worst that a network does."""
    return Broken(url, verifying_url, lambda: proxy.turn("blackhole"), lambda: proxy.turn("pass"))


Kind = Callable[[Path], AbstractContextManager[Broken]]


class Load:
    """Processes that verify as fast as they can."""

    def __init__(self, stack: ExitStack, url: str, target: str, others: list[str]) -> None:
        self._processes = []
        for number in range(PROCESSES):
            given = {
                "url": url,
                "pepper": PEPPER,
                "kind": ("sync", "async")[number % 2],
                "target": target,
                "others": others[number:] + others[:number],
                # Of the other keys only a few are remembered, so that every second call asks the store.
                "options": {"max_staleness": MAX_STALENESS, "max_known": OTHERS // 8},
            }
            process = subprocess.Popen(
                [sys.executable, load.__file__, json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            self._processes.append(process)
        self._answers("ready")

    def _answers(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == word

    def begin(self, phase: str, seconds: float = SETTLE) -> None:
        """Let a phase begin in all processes, and last a while."""
        self._tell(phase)
        self._answers(phase)
        time.sleep(seconds)  # load, not synchronization: what is asserted does not hang on how long

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()

    def stop(self) -> list[dict[str, Any]]:
        self._tell("stop")
        reports = []
        for process in self._processes:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            reports.append(json.loads(out.splitlines()[-1]))
        return reports


class Estate(NamedTuple):
    """A store under load, and its administrator."""

    broken: Broken
    keys: Keys
    target: str  # the id of the key all processes ask about
    load: Load


@pytest.fixture
def estate(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Estate]:
    kind: Kind = request.param
    with ExitStack() as stack:
        broken = stack.enter_context(kind(tmp_path))
        open_store(broken.url, create=True).close()
        keys = stack.enter_context(Keys(broken.url, peppers=parse_peppers(PEPPER)))
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon").id
        names = [f"Production - {number}" for number in range(OTHERS + 1)]
        made = [keys.create_key(machine, name=name, environment="prod") for name in names]
        texts = [new.secret.reveal() for new in made]
        yield Estate(broken, keys, made[0].key.id, Load(stack, broken.verifying_url, texts[0], texts[1:]))


def outcomes(reports: list[dict[str, Any]], phase: str, what: str) -> set[str]:
    return {outcome for report in reports for outcome in report[phase]["outcomes"][what]}


@pytest.mark.parametrize("estate", [sqlite_file, redis_killed, postgresql_killed], indirect=True)
def test_a_key_disabled_under_load_is_refused_by_every_process_within_the_bound(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    estate.load.begin("before")
    estate.load.begin("during", 0)
    estate.keys.disable_key(estate.target)
    committed = time.monotonic()
    time.sleep(MAX_STALENESS + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    last = max(report["during"]["last_accepted"] for report in reports)
    record_property("milliseconds from commit to last acceptance", round((last - committed) * 1000, 1))
    assert last < committed + MAX_STALENESS + SLACK
    assert outcomes(reports, "before", "target") == {"accepted"}
    assert outcomes(reports, "after", "target") == {"key_inactive"}
    assert outcomes(reports, "after", "other") == {"accepted"}
    assert outcomes(reports, "after", "unknown") == {"unknown_key"}
    assert estate.keys.key(estate.target).status == "inactive"


@pytest.mark.parametrize("estate", [redis_cut_off, postgresql_cut_off], indirect=True)
def test_pitfall_18_with_the_feed_cut_a_disabled_key_is_not_accepted_beyond_the_bound(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    """The administrator reaches the store, the verifiers hear and reach nothing."""
    estate.load.begin("before")
    estate.load.begin("cut", 0)
    estate.broken.take_away()
    estate.keys.disable_key(estate.target)
    committed = time.monotonic()
    time.sleep(MAX_STALENESS + SLACK)
    estate.load.begin("deaf")
    estate.load.begin("healing", 0)
    estate.broken.give_back()
    time.sleep(1.0 + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    last = max(report["cut"]["last_accepted"] for report in reports)
    record_property("milliseconds from commit to last acceptance", round((last - committed) * 1000, 1))
    assert last < committed + MAX_STALENESS + SLACK
    for what in ("target", "other", "unknown"):
        assert outcomes(reports, "deaf", what) == {"store_unavailable"}
    assert outcomes(reports, "healing", "target") <= {"store_unavailable", "key_inactive"}
    assert outcomes(reports, "after", "target") == {"key_inactive"}
    assert outcomes(reports, "after", "other") == {"accepted"}


@pytest.mark.parametrize(
    "estate", [sqlite_file, redis_killed, redis_frozen, postgresql_killed], indirect=True
)
def test_a_store_that_goes_away_under_load_is_an_outage_and_is_used_again_when_it_is_back(
    estate: Estate, record_property: Callable[[str, object], None]
) -> None:
    estate.load.begin("before")
    estate.load.begin("outage", 0)
    estate.broken.take_away()
    time.sleep(MAX_STALENESS + 1.0)
    estate.load.begin("recovery", 0)
    back = time.monotonic()
    estate.broken.give_back()
    time.sleep(1.0 + SLACK)
    estate.load.begin("after")
    reports = estate.load.stop()
    for phase in ("outage", "recovery"):
        for what in ("target", "other"):
            assert outcomes(reports, phase, what) <= {"accepted", "store_unavailable"}
        assert outcomes(reports, phase, "unknown") <= {"unknown_key", "store_unavailable"}
    assert outcomes(reports, "outage", "other") >= {"store_unavailable"}
    assert outcomes(reports, "after", "target") == {"accepted"}
    assert outcomes(reports, "after", "other") == {"accepted"}
    recovered = max(report["recovery"]["first_accepted"] for report in reports) - back
    record_property("seconds until an uncached call was answered again", round(recovered, 3))
    assert 0 < recovered < 1.0 + SLACK
    before = max(report["before"]["threads"] for report in reports)
    assert max(report["outage"]["threads"] for report in reports) <= before + 1, "threads pile up"
