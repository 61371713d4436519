"""Recorder, spool and SQLite sink under faults: nothing lost, nothing doubled, nobody harmed."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papaours_auth import Identity, Reason
from papaours_auth.exceptions import ConfigurationError
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.usage import Batch, Call, CallableSink, Outcome, Recorder, open_sink
from papaours_auth.usage.spool import EVENT, Segment, records
from papaours_auth.usage.sqlite import Retention, SQLiteSink
from support.servers import wait_until

CALLER = Identity(
    KeyInfo("key-1", "Production - Banc", "prod", "", None),
    MachineInfo("machine-1", "Banc", "cfa-lyon", False),
    (),
    frozenset(),
)
SLOW = 3600.0  # the thread delivers at its start, and then not before the test has ended


def rows(
    path: Path, statement: str = "select status, count(*) from usage_events group by 1"
) -> dict[Any, Any]:
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute(statement).fetchall())
    except sqlite3.OperationalError:  # no batch has come yet
        return {}
    finally:
        connection.close()


def call(recorder: Recorder, status: int = 200, *, route: str = "/contracts", end: bool = True) -> Call:
    made = Call(CALLER, "192.0.2.7", "GET")
    made.route = route
    recorder.sent(made, status)
    if end:
        recorder.done(made, Outcome.COMPLETED)
    return made


class Faulty:
    """A sink that obeys a plan: each write takes the next step, and the last one stays."""

    def __init__(self, path: Path, *plan: str) -> None:
        self.inner, self.plan = SQLiteSink(path), list(plan)

    def write(self, batch: Batch) -> None:
        step = self.plan.pop(0) if self.plan else "work"
        if step == "exit":
            raise SystemExit
        if step == "down":
            raise RuntimeError("pk_prod_canary")
        self.inner.write(batch)
        if step == "reply lost":
            raise TimeoutError


@pytest.fixture(params=["memory", "spool"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Recorder]:
    def made(sink: Any, **options: Any) -> Recorder:
        spool = tmp_path / "spool" if request.param == "spool" else None
        return Recorder(sink, spool=spool, **{"interval": SLOW, "segment_bytes": 64 << 10, **options})

    return made


@pytest.mark.parametrize("plan", [(), ("down",) * 3, ("reply lost",) * 3, ("exit", "down", "reply lost")])
def test_a_sink_that_fails_neither_loses_nor_doubles(
    make: Callable[..., Recorder], tmp_path: Path, plan: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.db"
    with make(Faulty(path, *plan)) as recorder:
        for number in range(1000):
            call(recorder, 200 if number % 4 else 404)
            if number % 300 == 0:
                recorder.flush()
        wait_until(recorder.flush, 10, what="the sink to work again")
        while recorder.stats().pending:
            recorder.flush()
    assert rows(path) == {200: 750, 404: 250}
    assert rows(path, "select key_id, calls from usage_keys") == {"key-1": 1000}
    assert rows(path, "select step, sum(calls) from usage_series group by 1") == dict.fromkeys(
        ("minute", "hour", "day"), 1000
    )
    assert recorder.stats().lost == 0
    assert "canary" not in caplog.text


def test_what_a_dead_sink_leaves_in_the_spool_comes_later_and_in_memory_is_counted(
    make: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "usage.db"
    with make(Faulty(path, *["down"] * 1000)) as recorder:
        for _ in range(500):
            call(recorder)
    with make(SQLiteSink(path)) as heir:
        heir.start()
        heir.flush()
    assert rows(path).get(200, 0) + recorder.stats().lost == 500
    assert (tmp_path / "spool").exists() == (recorder.stats().lost == 0)
    assert not list((tmp_path / "spool").glob("*"))


def test_memory_is_bounded_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    with Recorder(Faulty(tmp_path / "usage.db", *["down"] * 99), interval=SLOW, max_pending=100) as recorder:
        for _ in range(1000):
            call(recorder)
            recorder.flush()
        assert recorder.stats().pending <= 200
        assert recorder.stats().pending + recorder.stats().lost == 1000 - recorder.stats().delivered


def test_disk_full_is_answered_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "usage.db"
    spool = tmp_path / "spool"
    with Recorder(SQLiteSink(path), spool=spool, interval=SLOW, segment_bytes=8192) as recorder:
        call(recorder)
        recorder.flush()
        monkeypatch.setattr(os, "posix_fallocate", full)
        for _ in range(500):
            call(recorder)
            recorder.flush()
        assert recorder.stats().lost > 0
        monkeypatch.undo()
        recorder.flush()
        call(recorder)
    assert sum(rows(path).values()) + recorder.stats().lost == 502
    assert "being lost" in caplog.text


def test_the_spool_has_a_bound(tmp_path: Path) -> None:
    sink = Faulty(tmp_path / "usage.db", *["down"] * 9999)
    spool = tmp_path / "spool"
    with Recorder(sink, spool=spool, interval=SLOW, segment_bytes=8192, max_spool=40_000) as recorder:
        for _ in range(1000):
            call(recorder)
            recorder.flush()
        assert sum(file.stat().st_size for file in spool.iterdir()) <= 40_000
        assert recorder.stats().lost > 0


def test_the_spool_is_its_owners_alone(tmp_path: Path) -> None:
    with Recorder(SQLiteSink(tmp_path / "usage.db"), spool=tmp_path / "spool", interval=SLOW) as recorder:
        call(recorder)
        assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "spool").iterdir()} == {0o600}
        recorder.flush()
    assert stat.S_IMODE((tmp_path / "usage.db").stat().st_mode) == 0o600


def test_a_call_is_safe_before_its_answer_begins_and_amended_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with Recorder(SQLiteSink(path), spool=tmp_path / "spool", interval=SLOW) as recorder:
        open_call = call(recorder, end=False)
        recorder.flush()
        assert rows(path) == {}, "it may still end"
        recorder.done(open_call, Outcome.FAILED)
        recorder.flush()
        never = call(recorder, 206, end=False)
    recorder.done(never, Outcome.COMPLETED)  # too late, and harmless
    assert rows(path, "select status, outcome from usage_events") == {200: "failed", 206: "started"}


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_usage_recorder import Faulty, SLOW, call
from papaours_auth.usage import Recorder
plan = ["reply lost"] + ["down"] * 999
recorder = Recorder(Faulty(Path({path!r}), *plan), spool={spool!r}, interval=SLOW, segment_bytes=65536)
for number in range(3000):
    call(recorder, 200 if number % 3 else 500)
    if number % 100 == 50:
        recorder.flush()
call(recorder, 207, end=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, spool = tmp_path / "usage.db", tmp_path / "spool"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path), spool=str(spool))
    children = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) for _ in range(3)]
    assert {child.wait(60) for child in children} == {-signal.SIGKILL}
    assert 0 < sum(rows(path).values()) < 9003, "part was delivered, its reply lost"
    with Recorder(SQLiteSink(path), spool=spool, interval=SLOW) as recorder:
        recorder.start()
        recorder.flush()
        assert recorder.stats().damaged == 0
    assert rows(path) == {200: 6000, 500: 3000, 207: 3}
    assert not list(spool.iterdir())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_pitfall_22_a_child_is_a_producer_of_its_own(make: Callable[..., Recorder], tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    recorder = make(SQLiteSink(path))
    for _ in range(10):
        call(recorder)
    child = os.fork()
    if child == 0:
        for _ in range(5):
            call(recorder, 201)
        recorder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    recorder.close()
    assert rows(path) == {200: 10, 201: 5}


def test_refusals_of_nobody_are_counted_by_reason_and_network(
    make: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "usage.db"
    with make(SQLiteSink(path)) as recorder:
        for number in range(100):
            recorder.refused(Reason.UNKNOWN_KEY, f"192.0.2.{number}")
            recorder.refused(Reason.MALFORMED_KEY, "2001:db8:1:2::3")
            recorder.refused(Reason.MALFORMED_KEY, "\udcff not an address")
        recorder.start()
    assert rows(path, "select network, sum(count) from usage_refusals group by 1") == {
        "192.0.2.0/24": 100,
        "2001:db8:1::/48": 100,
        "unknown": 100,
    }


@pytest.mark.parametrize("text", ["x" * 10**6, "\udcff\x1f\x00\n", "é" * 500, "'; drop table usage_events"])
def test_absurd_events_harm_nothing(make: Callable[..., Recorder], tmp_path: Path, text: str) -> None:
    path = tmp_path / "usage.db"
    with make(SQLiteSink(path)) as recorder:
        made = Call(CALLER, text, text, began=1e30)
        made.route = made.request_id = text
        recorder.sent(made, 10**9)
        recorder.done(made, Outcome.COMPLETED)
        call(recorder, 200)
    assert rows(path) == {0: 1, 200: 1}
    assert all(len(route) <= 256 for route in rows(path, "select route, 1 from usage_events"))


def test_damage_is_skipped_and_a_torn_tail_is_no_damage(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "a.1", 1, 8192)
    places = [segment.append(EVENT, bytes(8), b"body %d" % number) for number in range(10)]
    segment.close()
    data = bytearray((tmp_path / "a.1").read_bytes())
    assert [raw and raw.body for raw in records(bytes(data))] == [b"body %d" % n for n in range(10)]
    data[places[9] + 25] ^= 1
    assert len(list(records(bytes(data)))) == 9
    data[places[4] + 5] ^= 0xFF
    found = Counter(raw is None for raw in records(bytes(data)))
    assert found == {False: 8, True: 1}


def test_what_is_no_segment_is_read_as_nothing(tmp_path: Path) -> None:
    for data in (b"", b"x", os.urandom(5000), b"pu" * 4000):
        assert not [raw for raw in records(data) if raw is not None]


def test_old_events_go_and_a_batch_comes_once(tmp_path: Path) -> None:
    sink = SQLiteSink(tmp_path / "usage.db", retention=Retention(events=1, minute=1, hour=1, day=30))
    batches: list[Batch] = []
    with Recorder(CallableSink(batches.append), interval=SLOW) as recorder:
        old = Call(CALLER, None, "GET", began=86400.0 * 365)
        recorder.done(old, Outcome.COMPLETED)
        call(recorder)
    for batch in batches * 2:
        sink.write(batch)
    assert rows(sink.path, "select 1, count(*) from usage_events") == {1: 1}
    assert rows(sink.path, "select 1, calls from usage_keys") == {1: 2}


def test_more_old_events_than_go_at_once_go_with_the_next_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.usage.sqlite._PRUNE_ROWS", 10)
    path = tmp_path / "usage.db"
    with Recorder(SQLiteSink(path), interval=SLOW) as recorder:
        for _ in range(25):
            recorder.done(Call(CALLER, None, "GET", began=0.0), Outcome.COMPLETED)
        for _ in range(4):
            call(recorder)
            recorder.flush()
    assert rows(path, "select time = 0, count(*) from usage_events group by 1").get(1) is None


@pytest.mark.parametrize("url", ["gopher://x", "sqlite:///", "sqlite:///:memory:", "usage.db"])
def test_a_url_that_names_no_sink_stops_the_app(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_sink(url)


def test_a_closed_recorder_counts_what_it_cannot_keep(make: Callable[..., Recorder], tmp_path: Path) -> None:
    recorder = make("sqlite:///" + str(tmp_path / "usage.db"))
    recorder.close()
    call(recorder)
    assert recorder.stats().lost == 1
