"""Recorder, spool and SQLite sink under faults: nothing lost, nothing doubled, nobody harmed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papaours_auth import Reason
from papaours_auth.exceptions import ConfigurationError
from papaours_auth.usage import Batch, CallableSink, Health, Outcome, Recorder, begin_call, open_sink
from papaours_auth.usage.event import body_of, event_from, event_of
from papaours_auth.usage.recorder import _close
from papaours_auth.usage.spool import EVENT, Segment, records
from papaours_auth.usage.sqlite import Retention, SQLiteSink
from papaours_auth.usage.tally import Tally
from support.servers import wait_until
from support.usage import CALLER, SLOW, Faulty, call, rows


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


def test_a_sink_with_a_bad_moment_at_the_end_is_asked_again_where_all_would_be_lost(tmp_path: Path) -> None:
    sink = Faulty(tmp_path / "usage.db", "down", "reply lost", "work")
    recorder = Recorder(sink, interval=SLOW)
    call(recorder)
    wait_until(lambda: recorder.stats().sink_failures == 1, 10, what="the thread's first try")
    recorder.close()
    assert rows(tmp_path / "usage.db") == {200: 1}
    assert recorder.stats().lost == 0


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
from support.usage import Faulty, SLOW, call
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
        made = begin_call(CALLER, text, text)
        made.started = 1e30
        made.route = made.request_id = text
        made.status = 10**9
        recorder.sent(made)
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
        old = begin_call(CALLER, None, "GET")
        old.started -= 86400.0 * 365
        recorder.done(old, Outcome.COMPLETED)
        call(recorder)
    for batch in batches * 2:
        sink.write(batch)
    sink._pruned = float("-inf")  # a minute later, and for an old one that was the newest when it came
    sink.write(batches[-1])
    assert rows(sink.path, "select 1, count(*) from usage_events") == {1: 1}
    assert rows(sink.path, "select 1, calls from usage_keys") == {1: 2}


def test_more_old_events_than_go_at_once_go_with_the_next_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.usage.sqlite._PRUNE_ROWS", 10)
    path, made = tmp_path / "usage.db", begin_call(CALLER, None, "GET")
    made.ended = made.started
    old = event_from(made, "e", -1e12, "")
    SQLiteSink(path, retention=Retention(events=50_000)).write(Batch("p", 1, [old] * 25))
    sink, left = SQLiteSink(path), []
    for sequence in range(2, 6):
        sink.write(Batch("p", sequence, [event_from(made, "e", 1e9, "")]))
        left.append(rows(path, "select time = 0, count(*) from usage_events group by 1").get(1, 0))
    assert left == [15, 5, 0, 0]


@pytest.mark.parametrize("url", ["gopher://x", "sqlite:///", "sqlite:///:memory:", "usage.db"])
def test_a_url_that_names_no_sink_stops_the_app(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_sink(url)


def test_a_closed_recorder_counts_what_it_cannot_keep(make: Callable[..., Recorder], tmp_path: Path) -> None:
    recorder = make("sqlite:///" + str(tmp_path / "usage.db"))
    recorder.close()
    call(recorder)
    assert recorder.stats().lost == 1


@pytest.mark.parametrize(
    "error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MemoryError]
)
def test_a_sink_may_throw_anything(make: Callable[..., Recorder], error: type[BaseException]) -> None:
    seen: list[Batch] = []

    def write(batch: Batch) -> None:
        seen.append(batch)
        if len(seen) == 1:
            raise error("pk_prod_canary")

    recorder = make(CallableSink(write), interval=0.01)
    call(recorder)
    wait_until(lambda: recorder.stats().delivered == 1, 10, what="the second try")
    assert recorder.health().running
    assert (recorder.stats().sink_failures, recorder.stats().last_failure) == (1, "")
    recorder.close()
    assert [batch.id for batch in seen] == [seen[0].id] * 2


def test_somebody_who_stops_the_program_is_heard(make: Callable[..., Recorder]) -> None:
    def write(_: Batch) -> None:
        raise KeyboardInterrupt

    recorder = make(CallableSink(lambda _: None))
    recorder.start()
    wait_until(lambda: recorder.health().running, 10, what="the thread")
    recorder.flush()
    recorder._courier._sink = CallableSink(write)
    call(recorder)
    with pytest.raises(KeyboardInterrupt):
        recorder.flush()
    recorder._courier._sink = CallableSink(lambda _: None)
    recorder.close()
    assert recorder.stats().delivered == 1


def test_a_sink_that_never_comes_back_does_not_hold_up_the_end(
    make: Callable[..., Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    release, entered = threading.Event(), threading.Event()

    def hang(_: Batch) -> None:
        entered.set()
        release.wait(60)

    recorder = make(CallableSink(hang), interval=0.01)
    call(recorder)
    assert entered.wait(10)
    call(recorder)
    begun = time.monotonic()
    recorder.close(timeout=0.05)
    assert time.monotonic() - begun < 5
    stats = recorder.stats()
    assert stats.lost + stats.pending == 2, (
        "in memory they are lost, in the spool they wait for the next process"
    )
    assert "does not come back" in caplog.text
    call(recorder)
    assert recorder.stats().lost == stats.lost + 1
    recorder.start()  # as a producer of its own, with the old thread still hanging
    assert recorder.stats().recorded == 0
    release.set()
    recorder.close()


ENDS = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from support.usage import call
from papaours_auth.usage import CallableSink, Recorder
recorder = Recorder(CallableSink(lambda _: time.sleep(3600)), spool={spool!r}, interval=0.01)
call(recorder)
time.sleep(0.2)
call(recorder)
"""


@pytest.mark.parametrize("spool", [False, True])
def test_an_interpreter_ends_although_the_sink_hangs(tmp_path: Path, spool: bool) -> None:
    folder = str(tmp_path / "spool") if spool else None
    code = ENDS.format(tests=str(Path(__file__).parent), spool=folder)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert time.monotonic() - begun < 30
    assert "does not come back" in done.stderr
    if spool:
        path = tmp_path / "usage.db"
        with Recorder(SQLiteSink(path), spool=tmp_path / "spool", interval=SLOW) as heir:
            heir.start()
            heir.flush()
        assert rows(path) == {200: 2}
    else:
        assert "2 so far" in done.stderr


def test_a_recorder_that_is_forgotten_ends_its_threads(make: Callable[..., Recorder]) -> None:
    recorder = make(CallableSink(lambda _: None), interval=0.01)
    call(recorder)
    thread = recorder._courier._thread
    assert thread is not None
    del recorder
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_sink_that_closes_its_recorder_does_no_harm(make: Callable[..., Recorder]) -> None:
    made: list[Recorder] = []
    recorder = make(CallableSink(lambda _: made[0].close()), interval=0.01)
    made.append(recorder)
    call(recorder)
    wait_until(lambda: recorder.stats().delivered == 1 and not recorder.health().running, 10, what="the end")


def test_health_tells_what_fails_and_for_how_long(make: Callable[..., Recorder], tmp_path: Path) -> None:
    sink = Faulty(tmp_path / "usage.db")
    recorder = make(sink)
    assert recorder.health() == Health(True, False, 0.0, 0, 0, "")
    recorder.start()
    wait_until(lambda: recorder.flush() and recorder.health().running, 10, what="the thread")
    sink.plan = ["down"] * 3
    call(recorder)
    assert not recorder.flush()
    health = recorder.health()
    assert (health.ok, health.pending, health.error) == (False, 1, "the usage sink failed: RuntimeError")
    assert 0 < health.behind < 60
    sink.plan = []
    assert recorder.flush()
    assert recorder.health()._replace(behind=0) == Health(True, True, 0, 0, 0, "")
    recorder.close()


def test_losses_are_logged_again_after_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(CallableSink(lambda _: None), interval=SLOW)
    recorder.close()
    now = 1000.0
    monkeypatch.setattr("papaours_auth.usage.courier.time.monotonic", lambda: now)
    for passed in (0, 30, 61):
        now = 1000.0 + passed
        call(recorder)
        recorder._courier.say_lost()
    told = [record.args for record in caplog.records if "being lost" in record.msg]
    assert told == [(1,), (3,)]


def test_a_clock_that_runs_backwards_harms_nothing(
    make: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []
    recorder = make(CallableSink(seen.append))
    recorder.start()
    recorder.flush()
    for wall in (2e9, 1e9, -5.0):
        monkeypatch.setattr("time.time", lambda wall=wall: wall)
        recorder.flush()  # reads the clock
        call(recorder)
        recorder.flush()
    recorder.close()
    events = [event for batch in seen for event in batch.events]
    assert len(events) == 3
    assert [round(event.time / 1e15) for event in events] == [2, 1, 0]
    assert all(0 <= event.duration < 60e6 and event.time >= 0 for event in events)


@pytest.mark.parametrize("field", ["address", "method", "route", "reason", "request_id", "status"])
@pytest.mark.parametrize("value", [None, 7, b"bytes", ["list"], object(), -1, 10**30, "x" * 10**6, 1.5])
def test_absurd_values_of_any_type_harm_nothing(
    make: Callable[..., Recorder], tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / "usage.db"
    with make(SQLiteSink(path)) as recorder:
        made = begin_call(CALLER, "192.0.2.7", "GET")
        setattr(made, field, value)
        recorder.sent(made)
        recorder.done(made, Outcome.COMPLETED)
        call(recorder, 201)
    assert sum(rows(path).values()) == 2
    assert recorder.stats().lost == 0


class Evil:
    def __str__(self) -> str:
        raise LookupError


def test_what_cannot_even_be_told_is_one_event_lost(make: Callable[..., Recorder], tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with make(SQLiteSink(path)) as recorder:
        made = begin_call(CALLER, "192.0.2.7", "GET")
        made.route = Evil()  # type: ignore[assignment]  # that is the point
        recorder.sent(made)
        recorder.done(made, Outcome.COMPLETED)
        call(recorder, 201)
    assert rows(path) == {201: 1}
    assert recorder.stats().lost == 1


def test_threads_and_loops_record_one_event_each(make: Callable[..., Recorder], tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with make(SQLiteSink(path), interval=0.01, max_spool=64 << 20, segment_bytes=1 << 20) as recorder:

        def calls() -> None:
            for _ in range(2000):
                call(recorder, 200)

        async def loop() -> None:
            for number in range(2000):
                made = call(recorder, 202, end=False)
                if number % 100 == 0:
                    await asyncio.sleep(0)
                recorder.done(made, Outcome.COMPLETED)

        async def loops() -> None:
            await asyncio.gather(loop(), loop())

        threads = [threading.Thread(target=calls) for _ in range(4)]
        threads += [threading.Thread(target=asyncio.run, args=(loops(),))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.stats().lost == 0
    assert rows(path) == {200: 8000, 202: 4000}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_the_sink_hangs_gives_a_child_that_records(
    make: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("papaours_auth.usage.courier._LONGEST_HOLD", 0.05)
    release, entered, parent = threading.Event(), threading.Event(), os.getpid()
    sink = SQLiteSink(tmp_path / "usage.db")

    def write(batch: Batch) -> None:
        if os.getpid() == parent:
            entered.set()
            release.wait(60)
        sink.write(batch)

    recorder = make(CallableSink(write), interval=0.01)
    call(recorder)
    assert entered.wait(10)
    child = os.fork()
    if child == 0:
        call(recorder, 201)
        recorder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    release.set()
    recorder.close()
    assert rows(sink.path) == {200: 1, 201: 1}


def test_a_thread_that_was_not_to_be_had_is_asked_for_again_by_the_next_call(
    make: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    taken: list[Batch] = []
    recorder = make(CallableSink(taken.append), interval=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        call(recorder)
    call(recorder)
    wait_until(lambda: sum(len(batch.events) for batch in taken) == 2, 10, what="both calls to be delivered")
    recorder.close()


def test_a_thread_that_cannot_start_any_more_leaves_delivery_to_the_end(
    make: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ending(_: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    path = tmp_path / "usage.db"
    recorder = make(SQLiteSink(path))
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", ending)
        call(recorder)
    recorder.close()
    assert rows(path) == {200: 1}


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0},
        {"interval": float("inf")},
        {"max_pending": 0},
        {"segment_bytes": 100},
        {"max_spool": 8192, "segment_bytes": 8193},
    ],
)
def test_a_recorder_set_up_wrongly_stops_the_app(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Recorder(CallableSink(lambda _: None), **options)


def test_a_recorder_that_is_gone_is_neither_started_nor_closed(make: Callable[..., Recorder]) -> None:
    recorder = make(CallableSink(lambda _: None))
    done, reference = recorder.done, weakref.ref(recorder)
    del recorder
    gc.collect()
    done(begin_call(CALLER, None, "GET"), Outcome.COMPLETED)
    _close(reference)
    assert reference() is None


def test_an_attacker_cannot_name_more_networks_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papaours_auth.usage.tally._MOST", 10)
    tally = Tally()
    for number in range(100):
        tally.add(Reason.UNKNOWN_KEY, f"192.0.{number}.1")
    taken = tally.take()
    assert len(taken) <= 12  # a minute may have begun in between
    assert sum(entry.calls for entry in taken) == 100
    assert {entry.network for entry in taken} > {"other"}
    assert tally.take() == []


def test_refusals_that_do_not_fit_a_full_spool_are_counted_lost(tmp_path: Path) -> None:
    seen: list[Batch] = []
    options = {"spool": tmp_path / "spool", "segment_bytes": 8192, "max_spool": 16384}
    recorder = Recorder(CallableSink(seen.append), interval=SLOW, **options)  # type: ignore[arg-type]  # of several types
    recorder.start()
    wait_until(lambda: recorder.health().running, 10, what="the thread")
    recorder.flush()
    for number in range(600):
        recorder.refused(Reason.UNKNOWN_KEY, f"10.{number // 250}.{number % 250}.1")
    recorder.close()
    assert sum(entry.calls for batch in seen for entry in batch.refusals) + recorder.stats().lost == 600
    assert recorder.stats().lost > 0


def test_a_damaged_outcome_leaves_the_rest_of_the_event(tmp_path: Path) -> None:
    event = event_of("e", b"\xff" * 8, body_of(begin_call(CALLER, "192.0.2.7", "GET"), 0.0, ""))
    assert event is not None
    assert (event.status, event.outcome, event.key_id) == (0, "started", "key-1")


def test_pitfall_56_a_service_is_not_called_by_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "pk_prod_abc123def456ghi789",
        "facturation:pk_prod_abc123def456ghi789",
        "pk\\_prod\\_abc123def456",
    ):
        with pytest.raises(ConfigurationError, match="contains a key"):
            Recorder(CallableSink(lambda batch: None), service=name)
        monkeypatch.setenv("PAPAOURS_SERVICE", name)
        with pytest.raises(ConfigurationError, match="contains a key") as error:
            Recorder(CallableSink(lambda batch: None))
        assert "abc123" not in str(error.value)
