"""The cache: what it believes, until when, and what makes it forget. No store, no thread, no sleep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from papaours_auth import Identity, Key, Machine, Reason
from papaours_auth.cache import CLOCK_SHIFT, Cache, Entry
from papaours_auth.model import Record
from papaours_auth.stores import Epoch, News, PepperRecord, Reading
from papaours_auth.verify import Standing

if TYPE_CHECKING:
    from conftest import ManualClock

MAX_STALENESS = 2.0
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
P1 = PepperRecord("p1", b"1" * 32, "primary")
P2 = PepperRecord("p2", b"2" * 32, "accept")


def epoch(seq: int, history: bytes = b"a") -> Epoch:
    return Epoch(seq, history * 16)


def record(key: str = "k", machine: str = "m", expires_at: datetime | None = None) -> Record:
    return Record(
        Key(key, machine, "A name", "prod", "", "last", "active", LONG_AGO, "us", expires_at=expires_at),
        Machine(machine, "A machine", "org", "active", LONG_AGO, "us"),
        digest=b"stored",
    )


def standing(found: Record | None) -> Standing:
    if found is None:
        return Standing(None, Reason.UNKNOWN_KEY)
    return Standing(Identity.of(found.key, found.machine), None, (), found.key.expires_at)


class Bench:
    """A cache and its clock, with short words for what is done to it."""

    def __init__(self, clock: ManualClock, **bounds: int) -> None:
        self.clock = clock
        self.peppers_in = 0
        self.peppers: Sequence[PepperRecord] = (P1,)
        self.cache = Cache(
            clock=clock,
            max_staleness=MAX_STALENESS,
            lifetime=300.0,
            **{"max_known": 100, "max_unknown": 100, **bounds},
        )

    def hear(
        self,
        tip: Epoch,
        *changes: tuple[str, str],
        partition: int = 0,
        installation: str = "ours",
        broken: bool = False,
        peppers: Sequence[PepperRecord] | None = None,
    ) -> None:
        """Apply a reading sent now; ``broken``: our last tip was not in its log; ``peppers`` from now on."""
        self.peppers = self.peppers if peppers is None else peppers
        told = self.peppers if partition == self.peppers_in else None
        news = News(tip, None if broken else changes, told)
        self.cache.apply(Reading(installation, {partition: news}), sent=self.clock.mono)

    def keep(
        self,
        digest: bytes,
        found: Record | None,
        epochs: Mapping[int, Epoch] | None = None,
    ) -> tuple[bool, bool]:
        """Fill in an answer. Tells whether it may be used, and whether it was kept."""
        epochs = {0: epoch(1)} if epochs is None else epochs
        entry, kept = self.cache.fill(
            digest,
            standing(found),
            epochs,
            monotonic=self.clock.mono,
            wall=self.clock.wall,
            told=self.cache.told(self.clock.mono),
        )
        return entry is not None, kept

    def believes(self, digest: bytes) -> bool:
        return self.cache.recall(digest, self.clock.mono) is not None

    @property
    def size(self) -> int:
        cache = self.cache
        siblings = sum(len(digests) for digests in cache._by_machine.values())
        return (
            len(cache.entries) + len(cache.unknown) + len(cache._by_key) + len(cache._by_machine) + siblings
        )


@pytest.fixture
def bench(clock: ManualClock) -> Bench:
    bench = Bench(clock)
    bench.hear(epoch(1), broken=True)
    return bench


# trust


def test_nothing_is_believed_before_the_first_reading(clock: ManualClock) -> None:
    bench = Bench(clock)
    assert bench.keep(b"d", record()) == (True, False)
    assert not bench.believes(b"d")


def test_amendment_01_trust_counts_from_when_the_reading_was_sent_and_ends_exactly_at_max_staleness(
    bench: Bench,
) -> None:
    bench.keep(b"d", record())
    sent = bench.clock.mono
    bench.clock.advance(0.5)  # the answer was half a second under way
    bench.cache.apply(Reading("ours", {0: News(epoch(1), ())}), sent=sent)
    bench.clock.mono = sent + MAX_STALENESS - 0.001
    assert bench.believes(b"d")
    bench.clock.mono = sent + MAX_STALENESS
    assert not bench.believes(b"d")


def test_that_a_store_holds_no_foreign_key_is_believed_as_long_as_the_reading_that_told_it(
    bench: Bench,
) -> None:
    sent = bench.clock.mono
    news = News(epoch(1), (), bench.peppers, minted_only=(0, 3))
    bench.cache.apply(Reading("ours", {0: news}), sent=sent)
    for now, believed in ((sent, True), (sent + MAX_STALENESS - 0.001, True), (sent + MAX_STALENESS, False)):
        assert bench.cache.minted_only(3, now) is believed
        assert not bench.cache.minted_only(4, now)  # of which nobody told


def test_amendment_01_only_a_reading_renews_trust(bench: Bench) -> None:
    bench.keep(b"d", record())
    for _ in range(4):
        bench.clock.advance(MAX_STALENESS / 4)
        bench.keep(b"d", record())
        bench.cache.check_clock()
    assert not bench.believes(b"d")
    bench.hear(epoch(2), ("key.renamed", "another"))  # steady changes renew it as well as silence does
    assert bench.believes(b"d")


def test_amendment_01_an_entry_needs_its_keys_and_its_machines_partition_fresh_and_no_other(
    bench: Bench,
) -> None:
    bench.peppers_in = 1
    for partition in (1, 2, 3):
        bench.hear(epoch(1), partition=partition, broken=True)
    bench.keep(b"d", record(), {1: epoch(1), 2: epoch(1)})
    bench.clock.advance(1.5)
    bench.hear(epoch(1), partition=1)
    assert bench.believes(b"d")
    bench.clock.advance(0.5)
    assert not bench.believes(b"d")  # partition 2 has not been heard of
    bench.hear(epoch(1), partition=2)
    assert bench.believes(b"d")  # although 0 and 3 have not


def test_what_the_hot_path_compares_with_is_the_earliest_trust_of_all_partitions(bench: Bench) -> None:
    """In whatever order they were heard: the newest would let in a key whose partition is silent."""
    began = bench.clock.mono
    for partition in (1, 2):
        bench.hear(epoch(1), partition=partition, broken=True)
    bench.clock.advance(0.5)
    bench.hear(epoch(1), partition=2)
    bench.clock.advance(0.5)
    bench.hear(epoch(1), partition=0)
    assert bench.cache.trusted_until == began + MAX_STALENESS  # of partition 1
    bench.hear(epoch(1), partition=1)
    assert bench.cache.trusted_until == began + 0.5 + MAX_STALENESS  # of partition 2


def test_in_an_outage_too_every_partition_of_an_entry_must_have_been_heard_of_within_max_age(
    bench: Bench,
) -> None:
    bench.hear(epoch(1), partition=1, broken=True)
    bench.keep(b"d", record(), {0: epoch(1), 1: epoch(1)})
    began = bench.clock.mono
    bench.clock.advance(5.0)
    bench.hear(epoch(1), partition=1)  # 0 has been silent since
    for now, served in ((began + 9.9, True), (began + 10.0, False)):
        assert (bench.cache.recall_stale(b"d", now, 10.0) is not None) is served


# fills


@pytest.mark.parametrize(
    ("epochs", "outcome"),
    [
        pytest.param({0: epoch(5)}, (True, True), id="of the epoch applied: kept"),
        pytest.param({0: epoch(4)}, (False, False), id="from before a change that was applied: asked again"),
        pytest.param({0: epoch(6)}, (True, False), id="ahead of the watcher: used, not kept"),
        pytest.param({0: epoch(5, b"b")}, (True, False), id="of another history: used, not kept"),
        pytest.param(
            {0: epoch(5), 1: epoch(1)}, (True, False), id="of a partition never read: used, not kept"
        ),
        pytest.param({}, (True, False), id="of no partition at all: nothing would evict it"),
    ],
)
def test_pitfall_15_amendment_03_a_fill_is_kept_only_if_it_is_of_the_epoch_last_applied(
    bench: Bench, epochs: Mapping[int, Epoch], outcome: tuple[bool, bool]
) -> None:
    bench.hear(epoch(5), *[("machine.created", "x")] * 4)
    assert bench.keep(b"d", record(), epochs) == outcome
    assert bench.believes(b"d") is outcome[1]


def test_an_entry_is_open_where_there_is_somebody_to_let_in() -> None:
    for said, is_open in (
        (standing(record()), True),
        (standing(record())._replace(reason=Reason.KEY_INACTIVE), False),
        (standing(record())._replace(networks=(ip_network("192.0.2.0/24"),)), False),
        (standing(None), False),
        (Standing(None, None), False),
    ):
        assert Entry(b"d", said, 1.0, 2.0, (0,)).open is is_open


# forgetting


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (("key.disabled", "k1"), {b"k2", b"k3", b"nobody"}),
        (("key.renamed", "k1"), {b"k2", b"k3", b"nobody"}),
        (("machine.disabled", "m1"), {b"k3", b"nobody"}),
        (("machine.deleted", "m1"), {b"k3", b"nobody"}),
        (("key.created", "k9"), {b"k1", b"k2", b"k3"}),
        (("key.imported", "k9"), {b"k1", b"k2", b"k3"}),
        (("a.kind.of.tomorrow", "k3"), {b"k1", b"k2", b"nobody"}),
    ],
)
def test_amendment_05_a_change_evicts_what_it_names_and_nothing_else(
    bench: Bench, change: tuple[str, str], left: set[bytes]
) -> None:
    bench.keep(b"k1", record("k1", "m1"))
    bench.keep(b"k2", record("k2", "m1"))
    bench.keep(b"k3", record("k3", "m2"))
    bench.keep(b"nobody", None)
    bench.hear(epoch(2), change)
    assert {digest for digest in (b"k1", b"k2", b"k3", b"nobody") if bench.believes(digest)} == left


def test_amendment_04_a_log_without_our_last_tip_drops_everything(bench: Bench) -> None:
    bench.keep(b"known", record())
    bench.keep(b"nobody", None)
    bench.hear(epoch(1, b"b"), broken=True)
    assert bench.size == 0


def test_another_installation_drops_everything_and_what_was_known_of_all_partitions(bench: Bench) -> None:
    bench.hear(epoch(7), partition=1, broken=True)
    bench.keep(b"d", record(), {0: epoch(1), 1: epoch(7)})
    bench.hear(epoch(1), installation="theirs", broken=True)
    assert bench.size == 0
    assert bench.cache.epochs == {0: epoch(1)}


def test_trust_is_not_renewed_where_something_failed_before(bench: Bench) -> None:
    def breaks() -> None:
        raise RuntimeError("on purpose")

    bench.hear(epoch(1))
    bench.cache.on_change.append(breaks)
    bench.clock.advance(1.0)
    before = bench.cache.trusted_until
    with pytest.raises(RuntimeError):
        bench.hear(epoch(2), ("key.disabled", "k"))
    assert bench.cache.trusted_until == before


def test_listeners_hear_of_changes_and_not_of_silence(bench: Bench) -> None:
    heard: list[str] = []
    bench.cache.on_change.append(lambda: heard.append("change"))
    bench.hear(epoch(1))
    assert heard == []
    bench.hear(epoch(2), ("key.disabled", "k"))
    assert heard == ["change"]


def test_each_cause_of_a_change_is_heard_of_alone_and_each_reading_too(bench: Bench) -> None:
    heard: list[str] = []
    bench.cache.on_change.append(lambda: heard.append("change"))
    bench.cache.on_reading.append(lambda: heard.append("reading"))
    causes: list[Callable[[], None]] = [
        lambda: bench.hear(epoch(2), broken=True),  # our tip is not in the log
        lambda: bench.hear(epoch(2), installation="theirs"),  # another store
        lambda: bench.hear(epoch(3), ("key.renamed", "k")),
        lambda: bench.hear(epoch(3), peppers=(P1, P2)),
    ]
    for cause in causes:
        heard.clear()
        cause()
        assert heard == ["change", "reading"]
    heard.clear()
    bench.hear(epoch(3))
    assert heard == ["reading"]


def test_another_store_is_not_trusted_for_what_was_read_of_the_one_before(bench: Bench) -> None:
    bench.hear(epoch(7), partition=1, broken=True)
    bench.cache.apply(Reading("theirs", {1: News(epoch(1), None)}), sent=bench.clock.mono)
    now = bench.clock.mono
    assert bench.cache.told(now) is None
    assert now >= bench.cache.trust(0)
    assert now < bench.cache.trust(1)
    assert bench.cache.trusted_until == bench.cache.trust(1)
    bench.cache.apply(Reading("theirs", {0: News(epoch(1), None)}), sent=now)
    assert bench.cache.told(now) is None  # what the other store said of peppers in this partition


def test_another_store_is_a_change_whatever_its_reading_says(bench: Bench) -> None:
    heard: list[str] = []
    bench.cache.on_change.append(lambda: heard.append("change"))
    bench.cache.apply(Reading("theirs", {1: News(epoch(1), ())}), sent=bench.clock.mono)
    assert heard == ["change"]


def test_where_there_are_foreign_keys_is_what_the_log_that_tells_of_them_told_last(bench: Bench) -> None:
    def hear(partition: int, *told: int) -> set[int]:
        news = News(epoch(1), (), bench.peppers if partition == 0 else None, minted_only=told)
        bench.cache.apply(Reading("ours", {partition: news}), sent=bench.clock.mono)
        return {of for of in range(6) if bench.cache.minted_only(of, bench.clock.mono)}

    assert hear(0, 1, 2) == {1, 2}
    assert hear(1, 3, 4) == {1, 2, 3, 4}
    assert hear(1, 3, 4) == {1, 2, 3, 4}
    assert hear(0, 2) == {2, 3, 4}  # a foreign key was added under 1
    assert hear(0) == {3, 4}
    bench.hear(epoch(1), installation="theirs", broken=True)
    assert not bench.cache.minted_only(3, bench.clock.mono)


def test_what_readings_say_of_peppers_is_one_object_until_one_says_otherwise(bench: Bench) -> None:
    told = bench.cache.told(bench.clock.mono)
    assert told == ("ours", 0, (P1,))
    bench.hear(epoch(2), ("key.disabled", "k"), ("pepper.retired", "p1"), ("pepper.primary", "p1"))
    bench.hear(epoch(9), broken=True)
    assert bench.cache.told(bench.clock.mono) is told
    bench.peppers = (P2, P1)
    bench.hear(epoch(10), ("pepper.added", "p2"))
    told = bench.cache.told(bench.clock.mono)
    assert told == ("ours", 0, (P1, P2))
    bench.peppers = (P1, P2)  # in another order
    bench.hear(epoch(10))
    assert bench.cache.told(bench.clock.mono) is told
    bench.clock.advance(MAX_STALENESS)
    assert bench.cache.told(bench.clock.mono) is None
    bench.hear(epoch(1), installation="theirs", broken=True)
    assert bench.cache.told(bench.clock.mono) == ("theirs", 0, (P1, P2))


@pytest.mark.parametrize(
    ("peppers", "left"),
    [
        pytest.param((P1, P2), {b"known", b"unknown"}, id="as they were"),
        pytest.param((P1, P2, PepperRecord("p3", b"3" * 32, "accept")), {b"known"}, id="another"),
        pytest.param((P1._replace(status="accept"), P2._replace(status="primary")), {b"known"}, id="a new primary"),
        pytest.param((P1, P2._replace(status="retired")), set(), id="one retired"),
        pytest.param((P1,), set(), id="one gone"),
        pytest.param((P1, P2._replace(proof=b"?" * 32)), set(), id="another of the same id"),
    ],
)  # fmt: skip
def test_a_pepper_that_retires_takes_its_keys_along_and_another_makes_unknown_ones_known(
    bench: Bench, peppers: Sequence[PepperRecord], left: set[bytes]
) -> None:
    bench.peppers = (P1, P2)
    bench.hear(epoch(1))
    bench.keep(b"known", record())
    bench.keep(b"unknown", None)
    bench.peppers = peppers
    bench.hear(epoch(1))  # whether or not the log says why
    assert {digest for digest in (b"known", b"unknown") if bench.believes(digest)} == left


def test_an_entry_needs_the_partition_fresh_that_tells_of_peppers(bench: Bench) -> None:
    """Known or unknown: a retirement told there would take the one along, a pepper that returns the other."""
    bench.peppers_in = 3
    bench.hear(epoch(1), partition=3, broken=True)
    for name, found in ((b"known", record()), (b"unknown", None)):
        assert bench.keep(name, found) == (True, True)
    bench.clock.advance(MAX_STALENESS)
    bench.hear(epoch(1))
    assert not bench.believes(b"known")
    assert not bench.believes(b"unknown")
    bench.hear(epoch(1), partition=3)
    assert bench.believes(b"known")
    assert bench.believes(b"unknown")


def test_an_answer_found_with_peppers_that_no_reading_told_is_not_kept(bench: Bench) -> None:
    bench.clock.advance(MAX_STALENESS)  # nothing is told any more
    assert bench.keep(b"d", record()) == (True, False)


def test_an_answer_found_with_peppers_of_before_a_change_is_not_used(bench: Bench) -> None:
    found, before = record(), bench.cache.told(bench.clock.mono)
    bench.peppers = (P1, P2)
    bench.hear(epoch(2), ("pepper.added", "p2"))
    entry, kept = bench.cache.fill(
        b"d",
        standing(found),
        {0: epoch(2)},
        monotonic=bench.clock.mono,
        wall=bench.clock.wall,
        told=before,
    )
    assert (entry, kept) == (None, False)


def test_amendment_07_a_child_believes_nothing_of_its_parents(bench: Bench) -> None:
    bench.keep(b"d", record())
    bench.cache.before_fork()
    bench.cache.after_fork(child=True)
    assert bench.size == 0
    assert bench.cache.epochs == {}
    bench.hear(epoch(1), broken=True)  # its lock is its own
    assert bench.keep(b"d", record()) == (True, True)


# bounds


def test_pitfall_17_a_flood_of_unknown_keys_evicts_no_known_one_and_grows_no_memory(
    clock: ManualClock,
) -> None:
    bench = Bench(clock, max_known=3, max_unknown=5)
    bench.hear(epoch(1), broken=True)
    for name in ("k1", "k2", "k3"):
        bench.keep(name.encode(), record(name))
    for number in range(1_000):
        bench.keep(b"random-%d" % number, None)
    assert all(bench.believes(name) for name in (b"k1", b"k2", b"k3"))
    assert len(bench.cache.unknown) == 5
    assert bench.believes(b"random-999")


def test_known_keys_are_bounded_too_and_the_indexes_with_them(clock: ManualClock) -> None:
    bench = Bench(clock, max_known=3)
    bench.hear(epoch(1), broken=True)
    for number in range(1_000):
        bench.keep(b"%d" % number, record(f"k{number}", f"m{number // 2}"))
    assert list(bench.cache.entries) == [b"997", b"998", b"999"]
    assert bench.size == 3 + 3 + 2 + 3  # entries, by key, machines, by machine
    bench.hear(epoch(2), ("machine.deleted", "m498"), ("key.disabled", "k998"), ("key.disabled", "k999"))
    assert bench.size == 0


def test_pitfall_9_a_record_found_by_a_loose_comparison_does_not_stand_in_for_its_key(bench: Bench) -> None:
    """A collation that ignores case finds ``ABC`` for ``abc``: refused, and the real key is still evicted."""
    found = record("k")
    bench.keep(b"the real key", found)
    loose = Standing(None, Reason.UNKNOWN_KEY)
    bench.cache.fill(
        b"its twin",
        loose,
        {0: epoch(1)},
        monotonic=bench.clock.mono,
        wall=bench.clock.wall,
        told=bench.cache.told(bench.clock.mono),
    )
    assert list(bench.cache.unknown) == [b"its twin"]
    bench.hear(epoch(2), ("key.disabled", "k"))
    assert not bench.believes(b"the real key")


# expiry and clocks


def test_pitfall_16_amendment_06_an_entry_ends_with_its_key_to_the_instant(bench: Bench) -> None:
    wall, mono = bench.clock.wall, bench.clock.mono
    bench.keep(b"d", record(expires_at=datetime.fromtimestamp(wall + 1.5, UTC)))
    bench.clock.mono = mono + 1.499
    assert bench.believes(b"d")
    bench.clock.mono = mono + 1.5
    assert not bench.believes(b"d")


def test_an_entry_ends_with_its_lifetime_whatever_the_epoch_says(bench: Bench) -> None:
    bench.keep(b"d", record(expires_at=datetime.fromtimestamp(bench.clock.wall, UTC) + timedelta(days=90)))
    bench.keep(b"nobody", None)
    bench.clock.advance(299.9)
    bench.hear(epoch(1))
    assert bench.believes(b"d")
    assert bench.believes(b"nobody")
    bench.clock.advance(0.1)
    assert not bench.believes(b"d")
    assert not bench.believes(b"nobody")


@pytest.mark.parametrize("jump", [-3600.0, -CLOCK_SHIFT * 1.1, CLOCK_SHIFT * 1.1, 3600.0])
def test_pitfall_16_amendment_06_a_wall_clock_that_jumps_drops_everything_once(
    bench: Bench, jump: float
) -> None:
    bench.keep(b"d", record())
    heard: list[str] = []
    bench.cache.on_change.append(lambda: heard.append("change"))
    bench.clock.wall += jump
    assert bench.keep(b"d", record()) == (True, False)  # the watcher has not looked yet
    bench.cache.check_clock()
    assert not bench.believes(b"d")
    assert bench.keep(b"d", record()) == (True, True)
    bench.cache.check_clock()
    assert bench.believes(b"d")
    assert heard == ["change"]


def test_a_wall_clock_that_is_slewed_a_little_drops_nothing(bench: Bench) -> None:
    bench.keep(b"d", record())
    bench.clock.wall += CLOCK_SHIFT * 0.9
    bench.cache.check_clock()
    assert bench.believes(b"d")


# foreign keys


def test_that_a_partition_holds_no_foreign_key_is_believed_as_long_as_the_reading_that_told_it(
    bench: Bench,
) -> None:
    """By partition: of a Cluster whose nodes fail alone, one may be read while another is not."""
    cache, clock = bench.cache, bench.clock

    def hear(partition: int, *minted_only: int, installation: str = "ours") -> None:
        news = News(epoch(1), (), minted_only=minted_only)
        cache.apply(Reading(installation, {partition: news}), sent=clock.mono)

    def believed() -> list[int]:
        return [value for value in range(4) if cache.minted_only(value, clock.mono)]

    assert believed() == []
    hear(0, 0, 2)
    clock.advance(MAX_STALENESS / 2)
    hear(1, 1)
    assert believed() == [0, 1, 2]
    hear(0, 2)
    assert believed() == [1, 2]
    clock.advance(MAX_STALENESS - 0.001)
    hear(1, 1)
    assert believed() == [1, 2]
    clock.advance(0.001)
    assert believed() == [1]
    hear(3, 3, installation="another")
    assert believed() == [3]
    cache.after_fork(child=True)
    assert believed() == []
