"""The watcher and the feeds it reads: early when announcements work, in time when they do not."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from papaours_auth import (
    ConfigurationError,
    Identity,
    Keys,
    Machine,
    PepperRing,
    Reason,
    StoreUnavailable,
    open_store,
)
from papaours_auth.cache import Cache
from papaours_auth.readiness import readiness_of
from papaours_auth.stores import Epoch, Feed, News, Reading, Store, sqlite
from papaours_auth.watcher import FIRST_RETRY, Watcher
from support.alone import run_alone
from support.doors import Door, Spy
from support.servers import wait_until
from support.watchers import watchers

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"
FOR_EVER = 600.0
"""A bound so long that a test which ends did not wait for it."""


@pytest.fixture
def machine(admin: Keys) -> Machine:
    return admin.create_machine("Service de facturation", organisation="cfa-lyon")


@pytest.fixture
def seed(admin: Keys, machine: Machine) -> str:
    """The id of the seed document's key, imported."""
    return admin.import_key(machine.id, SEED, name="Production - Service Facturation").id


# the thread, in real time


@pytest.fixture
def watched(opens: Callable[..., Door]) -> Callable[..., Door]:
    """Open a door with its thread, in real time."""
    return lambda **options: opens(watch=True, clock=time, **options)


def test_an_announced_change_is_applied_at_once(watched: Callable[..., Door], admin: Keys, seed: str) -> None:
    door = watched(max_staleness=FOR_EVER)
    assert isinstance(door.knock(SEED), Identity)
    admin.disable_key(seed)
    wait_until(lambda: door.knock(SEED) is Reason.KEY_INACTIVE, 10, what="the key to be refused")
    admin.enable_key(seed)
    wait_until(lambda: isinstance(door.knock(SEED), Identity), 10, what="the key to be let in")


def test_pitfall_18_without_any_announcement_the_interval_still_finds_the_change(
    watched: Callable[..., Door], spy: Spy, admin: Keys, seed: str
) -> None:
    spy.on_wait = lambda wait: time.sleep(0.05)  # deaf for a quarter of max_staleness
    door = watched(max_staleness=0.2)
    assert isinstance(door.knock(SEED), Identity)
    admin.disable_key(seed)
    wait_until(lambda: door.knock(SEED) is Reason.KEY_INACTIVE, 10, what="the key to be refused")


def test_hits_go_on_for_longer_than_max_staleness_while_the_watcher_reads(
    watched: Callable[..., Door], spy: Spy, seed: str
) -> None:
    door = watched(max_staleness=0.2)
    calls, until = 0, time.monotonic() + 0.6
    while time.monotonic() < until:
        assert isinstance(door.knock(SEED), Identity)
        calls += 1
        time.sleep(0.005)
    assert spy.lookups <= 1 + calls // 4  # without renewal every call after the first third is one


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_pitfall_18_a_watcher_that_died_is_started_again_by_the_next_uncached_call(
    watched: Callable[..., Door], spy: Spy, admin: Keys, seed: str
) -> None:
    """A driver may raise what no contract names. Trust runs out by itself, and the next call starts anew."""

    def dies(wait: Callable[[], None]) -> None:
        spy.on_wait = lambda wait: wait()
        raise RuntimeError("a driver's bug")

    spy.on_wait = dies
    door = watched(max_staleness=0.2)
    door.knock(SEED)
    wait_until(lambda: watchers() == [], 10, what="the watcher to die")
    admin.disable_key(seed)
    wait_until(lambda: door.knock(SEED) is Reason.KEY_INACTIVE, 10, what="the key to be refused")
    assert len(watchers()) == 1


def test_a_watcher_that_got_no_thread_is_started_by_the_next_uncached_call(
    watched: Callable[..., Door], seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    door = watched(max_staleness=FOR_EVER)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
        assert not door.authenticator.health().watching
        assert readiness_of(door.authenticator).status == 503
    assert isinstance(door.knock(SEED), Identity), "a thread too few of ours is no outage of the store's"
    assert door.authenticator.health().watching


@pytest.mark.parametrize("kind", [StoreUnavailable, ConfigurationError])
def test_a_store_that_cannot_be_watched_is_logged_once_and_tried_again(
    watched: Callable[..., Door], spy: Spy, seed: str, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    """An outage, or a store that is not set up for us: of a newer schema, say, until it is restored."""
    door = watched(max_staleness=0.2)
    door.knock(SEED)
    failures: list[None] = []

    def fails(ask: Callable[[], Reading]) -> Reading:
        failures.append(None)
        raise kind("no route to host")

    with caplog.at_level(logging.WARNING, logger="papaours_auth"):
        spy.on_read = fails
        wait_until(lambda: len(failures) > 3, 10, what="some readings to fail")
        assert isinstance(door.knock(SEED), Identity)  # lookups still answer; nothing is cached
        spy.on_read = lambda ask: ask()
        wait_until(lambda: "can be watched again" in caplog.text, 10, what="the store to be watched again")
    assert [record.getMessage() for record in caplog.records] == [
        "the key store cannot be watched, so uncached answers are due: no route to host",
        "the key store can be watched again",
    ]


def test_a_second_outage_is_logged_as_the_first(
    watched: Callable[..., Door], spy: Spy, seed: str, caplog: pytest.LogCaptureFixture
) -> None:
    door = watched(max_staleness=0.2)
    door.knock(SEED)

    def fails(ask: Callable[[], Reading]) -> Reading:
        raise StoreUnavailable("no route to host")

    def said() -> list[str]:
        return [record.getMessage().partition(",")[0] for record in caplog.records]

    once = ["the key store cannot be watched", "the key store can be watched again"]
    with caplog.at_level(logging.WARNING, logger="papaours_auth"):
        for outage in (1, 2):
            spy.on_read = fails
            wait_until(lambda: len(said()) == 2 * outage - 1, 10, what="the outage to be told")  # noqa: B023
            spy.on_read = lambda ask: ask()
            wait_until(lambda: len(said()) == 2 * outage, 10, what="its end to be told")  # noqa: B023
    assert said() == once * 2


AT_THE_END = """
from papaours_auth import Authenticator, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores.memory import MemoryStore

authenticator = Authenticator(MemoryStore(), environment="prod", peppers=parse_peppers(new_pepper()))
authenticator.start()
assert authenticator.health().watching
"""


def test_a_watcher_that_nobody_closed_keeps_no_process_from_ending() -> None:
    run_alone(AT_THE_END, seconds=30)


# one reading


class Slow:
    """A feed whose readings take 0.7 seconds."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.closed = False

    def read(self, known: object) -> Reading:
        self.clock.advance(0.7)
        return Reading("ours", {0: News(Epoch(1, b"a" * 16), None)})

    def wait(self, timeout: float) -> None:
        raise AssertionError("only the thread waits")

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_trust_counts_from_when_a_reading_was_sent_and_not_from_when_it_came_back(clock: ManualClock) -> None:
    cache = Cache(clock=clock, max_staleness=2.0, max_known=1, max_unknown=1, lifetime=1.0)
    feed = Slow(clock)
    watcher = Watcher(cache, feed, clock, max_staleness=2.0)
    began = clock.mono
    watcher.poll()
    assert cache.trusted_until == began + 2.0
    watcher.close()
    assert feed.closed


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_pitfall_16_each_reading_looks_whether_the_wall_clock_has_jumped(
    door: Door, admin: Keys, machine: Machine, clock: ManualClock, jump: float
) -> None:
    """An expiry was turned into a monotonic time when the wall clock still said something else."""
    expires = timedelta(minutes=30)
    key = admin.create_key(machine.id, name="Production - Court", environment="prod", expires=expires)
    door.refresh()
    text = key.secret.reveal()
    assert isinstance(door.knock(text), Identity)
    clock.wall += jump
    door.refresh()
    assert door.authenticator.health().known == 0
    assert isinstance(door.knock(text), Identity) if jump < 0 else door.knock(text) is Reason.KEY_EXPIRED


class Timed(Slow):
    """A feed that remembers for how long it was to wait, and stops the watcher when it was asked to a few times."""

    def __init__(self, clock: ManualClock, readings: list[tuple[float, bool]]) -> None:
        super().__init__(clock)
        self.readings = readings
        self.waits: list[float] = []
        self.stop: Callable[[], None] = lambda: None

    def read(self, known: object) -> Reading:
        seconds, answers = self.readings.pop(0)
        self.clock.advance(seconds)
        if not answers:
            raise StoreUnavailable("does not answer in time")
        return Reading("ours", {0: News(Epoch(1, b"a" * 16), None)})

    def wait(self, timeout: float) -> None:
        self.waits.append(timeout)
        self.clock.advance(timeout)
        if not self.readings:
            self.stop()


@pytest.mark.parametrize(
    ("interval", "readings", "waits"),
    [
        pytest.param(0.5, [(0.0, True), (0.2, True), (0.7, True)], [0.5, 0.3, FIRST_RETRY], id="it answers"),
        pytest.param(0.5, [(0.0, False)] * 5, [0.05, 0.1, 0.2, 0.25, 0.25], id="it refuses: twice as long, to 0.25"),
        pytest.param(0.5, [(0.5, False)] * 5, [FIRST_RETRY] * 5, id="it hangs: a reading is nearly always under way"),
        pytest.param(
            0.5,
            [(0.0, False), (0.0, False), (0.0, True), (0.1, False), (0.05, False)],
            [0.05, 0.1, 0.5, FIRST_RETRY, FIRST_RETRY],
            id="it answered meanwhile: from the beginning",
        ),
        pytest.param(0.025, [(0.0, True), (0.0, False), (0.0, False)], [0.025] * 3, id="no longer than the interval"),
    ],
)  # fmt: skip
def test_readings_come_in_intervals_and_soon_after_one_that_failed(
    clock: ManualClock, interval: float, readings: list[tuple[float, bool]], waits: list[float]
) -> None:
    feed, max_staleness = Timed(clock, readings), interval * 4
    cache = Cache(clock=clock, max_staleness=max_staleness, max_known=1, max_unknown=1, lifetime=1.0)
    watcher = Watcher(cache, feed, clock, max_staleness=max_staleness)
    feed.stop = watcher.close
    watcher._run()
    assert feed.waits == pytest.approx(waits)


class Interrupted:
    """Clocks of a process that is held for five seconds after each reading of its monotonic one."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        self.now += 5.0
        return self.now - 5.0

    def time(self) -> float:
        return 1_790_000_000.0 + self.now


def test_trust_is_no_younger_than_the_comparison_of_the_clocks(clock: ManualClock) -> None:
    """Else a wall clock that jumps during a pause between the two is found out later than `max_staleness`."""
    held = Interrupted()
    cache = Cache(clock=held, max_staleness=2.0, max_known=1, max_unknown=1, lifetime=1.0)
    began = held.now
    Watcher(cache, Slow(clock), held, max_staleness=2.0).poll()
    assert cache.trusted_until == began + 2.0


# feeds, memory and SQLite


@pytest.fixture
def feed(store: Store) -> Iterator[Feed]:
    feed = store.feed()
    yield feed
    feed.close()


def read_all(feed: Feed, known: dict[int, Epoch]) -> tuple[Epoch, Any]:
    news = feed.read(known).news[0]
    return news.epoch, None if news.changes is None else list(news.changes)


def test_a_feed_tells_what_changed_since_the_tip_one_knows(feed: Feed, admin: Keys, machine: Machine) -> None:
    first, changes = read_all(feed, {})
    assert changes is None  # nothing known, so everything may have changed
    assert read_all(feed, {0: first}) == (first, [])
    key = admin.import_key(machine.id, SEED, name="Production - Import")
    admin.disable_key(key.id)
    last, changes = read_all(feed, {0: first})
    assert changes == [("key.imported", key.id), ("key.disabled", key.id)]
    assert read_all(feed, {0: last}) == (last, [])


@pytest.mark.parametrize("offset", [-1, 0, 1, 1_000])
def test_a_tip_that_is_not_in_the_log_drops_everything(feed: Feed, machine: Machine, offset: int) -> None:
    """Amendment 4: a store restored from a backup, or another one."""
    tip, _ = read_all(feed, {})
    stranger = Epoch(tip.seq + offset, b"another history!")
    assert read_all(feed, {0: stranger}) == (tip, None)


def test_a_feed_waits_until_something_changes_or_it_is_woken(feed: Feed, admin: Keys, seed: str) -> None:
    feed.read({})
    began = time.monotonic()
    feed.wait(0.1)
    assert time.monotonic() - began >= 0.09
    admin.disable_key(seed)
    feed.wait(FOR_EVER)
    feed.wake()
    feed.wait(FOR_EVER)


def test_a_feed_misses_no_change_while_others_read_it_too(feed: Feed, admin: Keys, seed: str) -> None:
    """An app may `refresh` beside its watcher: `data_version` means something on one connection only."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            feed.read({})

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(10):
        admin.rename_key(seed, f"Production - v{number}")
        feed.wait(FOR_EVER)  # may return early; must return
    stop.set()
    for reader in readers:
        reader.join()
    feed.read({})
    admin.rename_key(seed, "Production - last")
    feed.wait(FOR_EVER)


# the feed of an SQLite file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "watched.db"


@pytest.fixture
def on_disk(path: Path, ring: PepperRing) -> Iterator[Keys]:
    open_store(f"sqlite:///{path}", create=True).close()
    with Keys(f"sqlite:///{path}", peppers=ring) as keys:
        keys.create_machine("Service de facturation", organisation="cfa-lyon")
        yield keys


@pytest.fixture
def file_feed(on_disk: Keys, path: Path) -> Iterator[Feed]:
    store = open_store(f"sqlite:///{path}")
    feed = store.feed()
    yield feed
    feed.close()
    store.close()


def test_pitfall_18_a_file_put_in_the_stores_place_is_noticed_and_drops_everything(
    file_feed: Feed, on_disk: Keys, path: Path
) -> None:
    tip, _ = read_all(file_feed, {})
    copy = path.with_suffix(".copy")
    with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    for connection in (source, target):
        connection.close()
    copy.replace(path)
    file_feed.wait(FOR_EVER)
    assert read_all(file_feed, {0: tip}) == (tip, None)  # the same log, from another file: trust nothing
    assert read_all(file_feed, {0: tip}) == (tip, [])


def test_pitfall_18_a_file_that_is_gone_is_an_outage_until_it_is_back(file_feed: Feed, path: Path) -> None:
    tip, _ = read_all(file_feed, {})
    away = path.with_suffix(".away")
    path.rename(away)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        file_feed.read({0: tip})
    file_feed.wait(0.05)
    away.rename(path)
    assert read_all(file_feed, {0: tip}) == (tip, [])


def test_a_store_without_its_installation_mark_is_an_outage(file_feed: Feed, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("delete from meta")
    connection.close()
    with pytest.raises(StoreUnavailable, match="lost its installation mark"):
        file_feed.read({})


def test_a_watcher_too_far_behind_drops_everything_instead_of_reading_it_all(
    file_feed: Feed, on_disk: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "LOG_READ", 3)
    first, _ = read_all(file_feed, {})
    machine = on_disk.machines()[0]
    on_disk.disable_machine(machine.id)
    on_disk.enable_machine(machine.id)
    third, changes = read_all(file_feed, {0: first})
    assert changes == [("machine.disabled", machine.id), ("machine.enabled", machine.id)]
    on_disk.disable_machine(machine.id)
    last, changes = read_all(file_feed, {0: first})
    assert (last.seq, changes) == (third.seq + 1, None)


def test_amendment_08_the_polling_never_opens_the_file_again(
    file_feed: Feed, on_disk: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing any descriptor of a file drops the process's POSIX locks on it, SQLite's among them."""
    file_feed.read({})

    def boom(*_: object, **__: object) -> Any:
        raise AssertionError("opened")

    for opener in ("sqlite3.connect", "os.open", "builtins.open", "io.open"):
        monkeypatch.setattr(opener, boom)
    for _ in range(3):
        file_feed.wait(0.03)
        file_feed.read({})
