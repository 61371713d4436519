"""One contract for every store, ours and third parties', blocking and for event loops.

    from papaours_auth.testing import StoreContract

    class TestMyStore(StoreContract):
        def open(self) -> Store:             # new and empty
            return open_store("mystore://…", create=True)

        def open_async(self) -> AsyncStore:  # over what `open` gave last
            return open_async_store("mystore://…")

A test runner finds the methods in the subclass; nothing here depends on which runner that is.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_network
from typing import Final, cast

from .digest import Candidate
from .exceptions import Conflict, NotFound, StoreUnavailable
from .model import Grant, Key, Machine, Record
from .stores import AsyncStore, Author, Epoch, MachineColumns, News, PepperRecord, Store
from .stores.records import microseconds
from .usage import Batch, Event, Refusals, Sink
from .verify import PARTITIONS, Claim

__all__ = ["SinkContract", "StoreContract"]

_NOW: Final = datetime(2026, 11, 24, 12, 30, 15, 123456, tzinfo=UTC)
_AUTHOR: Final = Author("Alice é", _NOW)
_PATIENCE: Final = 10.0
"""Seconds to wait for what should come at once: for machines that are busy with something else."""


def _ids(items: Sequence[Machine | Key]) -> list[str]:
    return [item.id for item in items]


def _machine(name: str = "Service de facturation", number: int = 1) -> Machine:
    grants = (
        Grant("contrats", "écriture", ("cfa-lyon", "cfa-“été”"), ("*",)),
        Grant("x", "lecture", (), ("*",)),
    )
    return Machine(
        f"machine_{number}", name, "cfa-lyon", "active", _NOW + timedelta(seconds=number), "Alice é",
        "Émet les factures", system=False, grants=grants, attributes={"équipe": "1", "b": ""},
    )  # fmt: skip


def _key(number: int = 1, *, machine: int = 1, name: str = "Production - Facturation") -> Key:
    return Key(
        f"key_{number}", f"machine_{machine}", name, "prod", "cf_export", "x7Qz", "active",
        _NOW + timedelta(microseconds=number), "Alice é", _NOW + timedelta(days=90), "key_0",
        (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")), {"a": "“b”"},
    )  # fmt: skip


def _claim(number: int = 1, *others: int) -> Claim:
    text = f"pk_prod_contract{number:08}".encode()
    digests = [sha256(f"{n}".encode()).digest() for n in (number, *others)]
    candidates = tuple(Candidate(f"p{place + 1}", digest) for place, digest in enumerate(digests))
    return Claim("prod", zlib.crc32(text) % PARTITIONS, candidates)


def _check(condition: object, what: str) -> None:
    if not condition:  # an `assert` would vanish under python -O
        raise AssertionError(what)


def _equal(found: object, wanted: object) -> None:
    kinds = [
        [type(item) for item in value] if isinstance(value, list) else type(value)
        for value in (found, wanted)
    ]  # a bare row equals a `Key`, which is a tuple
    _check(found == wanted and kinds[0] == kinds[1], f"{found!r} is not {wanted!r}")


@contextmanager
def _raises(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


class StoreContract:
    """What every store promises. Subclass it, and give `open`; `open_async` where there is an async store.

    ``tells_minted_only``: set it to False for a store that never tells `News.minted_only`. Its verifiers then look up
    every foreign key.
    """

    tells_minted_only = True

    def open(self) -> Store:
        """Give a new and empty store."""
        raise NotImplementedError

    def open_async(self) -> AsyncStore | None:
        """Give an async store over what `open` gave last; None where the driver has none."""
        return None

    # verification

    def test_a_key_is_found_with_its_machine_by_any_of_its_digests(self) -> None:
        """The claim may hold digests under several peppers; the record says which one it was."""
        with self._filled() as store:
            stored = _claim(1).candidates[0]
            wanted = Record(_key(), _machine(), stored.digest)
            _equal(store.lookup(_claim(1)).record, wanted)
            later = _claim(1)._replace(candidates=(Candidate("p2", b"?" * 32), stored))
            _equal(store.lookup(later).record, wanted)

    def test_the_digest_of_a_record_is_the_one_that_the_store_keeps(self) -> None:
        """Never one of the question's: verifiers compare the two, and a digest compared with itself is always equal.

        Where the store compares loosely it is another digest, else it is the same one in another place in memory.
        """
        loose = b"The digest of a key, of 32 bytes"
        with self._filled() as store:
            only = _claim(2)._replace(candidates=(Candidate("p1", loose),))
            store.add_key(_key(2), only, "key.created", _AUTHOR)
            for variant in (
                loose.lower(),
                loose.swapcase(),
                loose[:-1] + b"\0",
                loose[:-1] + b" ",
                loose[:-1],
            ):
                found = store.lookup(self._claim_of(variant.ljust(32))).record
                same = found is None or hmac.compare_digest(found.digest, loose)
                _check(same, "the digest was taken from the question")
            twin, asked = self.open_async(), self._claim_of(bytes(bytearray(loose)))
            records = [store.lookup(asked).record]
            if twin is not None:
                records.append(asyncio.run(self._look_up_and_close(twin, asked)))
            for record in records:
                _equal(record, Record(_key(2), _machine(), loose))
                echoed = record is not None and record.digest is asked.candidates[-1].digest
                _check(not echoed, "the digest was taken from the question")

    @staticmethod
    def _claim_of(digest: bytes) -> Claim:
        return _claim(2)._replace(candidates=(Candidate("p1", b"?" * 32), Candidate("p1", digest)))

    @staticmethod
    async def _look_up_and_close(store: AsyncStore, claim: Claim) -> Record | None:
        try:
            return (await store.lookup(claim)).record
        finally:
            await store.aclose()

    def test_what_is_not_there_is_not_found(self) -> None:
        """Unknown is an answer, not an error."""
        with self._filled() as store:
            found = store.lookup(_claim(9))
            _equal(found.record, None)
            _check(found.epochs, "an answer without an epoch cannot be kept")

    def test_a_lookup_carries_the_epoch_of_what_it_saw(self) -> None:
        """Every epoch of an answer is the feed's, until something changes there."""
        with self._filled() as store:
            feed = store.feed()
            before = feed.read({}).news
            found = store.lookup(_claim(1)).epochs
            _equal({partition: before[partition].epoch for partition in found}, dict(found))
            store.update_key("key_1", {"status": "inactive"}, "key.disabled", _AUTHOR)
            again = store.lookup(_claim(1))
            _check(again.record and again.record.key.status == "inactive", "the change is not seen")
            _check(dict(again.epochs) != dict(found), "the change did not move the epoch")
            feed.close()

    def test_the_async_store_finds_the_same(self) -> None:
        """Both halves stand over the same data."""
        with self._filled() as store:
            twin = self.open_async()
            if twin is None:
                return

            async def look() -> None:
                _equal(await twin.lookup(_claim(1)), store.lookup(_claim(1)))
                _equal((await twin.lookup(_claim(9))).record, None)
                _equal(await twin.describe(), store.describe())
                many = await asyncio.gather(*[twin.lookup(_claim(1)) for _ in range(50)])
                _check(all(found.record == many[0].record for found in many), "lookups at once differ")
                store.update_key("key_1", {"status": "inactive"}, "key.disabled", _AUTHOR)
                found = (await twin.lookup(_claim(1))).record
                _check(found and found.key.status == "inactive", "the change is not seen")
                await twin.aclose()
                with _raises(StoreUnavailable):
                    await twin.lookup(_claim(1))

            asyncio.run(look())

    # the change feed

    def test_every_change_moves_the_epoch_and_is_named(self) -> None:
        """Kind and subject of each change, in order; nothing where nothing changed."""
        with self._opened() as store:
            pepper, off = PepperRecord("p1", b"1" * 32, "primary"), MachineColumns(status="inactive")
            changes: list[tuple[Callable[[], object], str, str]] = [
                (lambda: store.add_pepper(pepper, _AUTHOR), "pepper.added", "p1"),
                (lambda: store.add_machine(_machine(), _AUTHOR), "machine.created", "machine_1"),
                (lambda: store.add_key(_key(), _claim(), "key.imported", _AUTHOR), "key.imported", "key_1"),
                (lambda: store.update_key("key_1", {"name": "x"}, "key.renamed", _AUTHOR), "key.renamed", "key_1"),
                (lambda: store.update_machine("machine_1", off, "machine.off", _AUTHOR), "machine.off", "machine_1"),
                (lambda: store.delete_machine("machine_1", _AUTHOR), "machine.deleted", "machine_1"),
            ]  # fmt: skip
            feed = store.feed()
            for change, kind, subject in changes:
                known = {partition: news.epoch for partition, news in feed.read({}).news.items()}
                _equal(self._changes(feed.read(known).news), [])
                change()
                told = self._changes(feed.read(known).news)
                # A store in several partitions tells of the machine's keys too, each in its own.
                _equal([change for change in told if change[0] != "key.deleted"], [(kind, subject)])
            feed.close()

    def test_an_update_that_changes_nothing_is_no_change(self) -> None:
        """Neither epoch nor journal move."""
        with self._filled() as store:
            feed, journal = store.feed(), store.journal()
            before = feed.read({})
            _equal(store.update_key("key_1", {"status": "active"}, "key.enabled", _AUTHOR), _key())
            _equal(
                store.update_machine("machine_1", {"status": "active"}, "machine.enabled", _AUTHOR),
                _machine(),
            )
            _equal(feed.read({}).news, before.news)
            _equal(store.journal(), journal)
            feed.close()

    def test_an_epoch_that_is_not_in_the_log_is_told(self) -> None:
        """Of another history, by number or by nonce: the watcher then drops everything."""
        with self._filled() as store:
            feed = store.feed()
            reading = feed.read({})
            _check(reading.installation == store.describe().installation, "of another store")
            for partition, news in reading.news.items():
                for other in (Epoch(news.epoch.seq, b"?" * 16), Epoch(news.epoch.seq + 7, news.epoch.nonce)):
                    _equal(feed.read({partition: other}).news[partition].changes, None)
            feed.close()

    def test_readings_tell_that_no_foreign_key_was_added_until_one_is(self) -> None:
        """The first one ends it for its partition: with its change, and for good."""
        with self._opened() as store:
            store.add_pepper(PepperRecord("p1", b"1" * 32, "primary"), _AUTHOR)
            store.add_machine(_machine(), _AUTHOR)
            store.add_key(_key(), _claim(1)._replace(foreign=False), "key.created", _AUTHOR)
            feed, foreign = store.feed(), _claim(2)
            before = feed.read({}).news
            tellers = [p for p, news in before.items() if foreign.partition in news.minted_only]
            told = sorted(value for news in before.values() for value in news.minted_only)
            _equal(told, list(range(PARTITIONS)) if self.tells_minted_only else [])
            store.add_key(_key(2), foreign, "key.imported", _AUTHOR)
            for known in ({p: news.epoch for p, news in before.items()}, {}):
                after = feed.read(known).news
                _check(not self._tells(after, foreign), "the foreign key is not told")
                _check(all(after[p].epoch != before[p].epoch for p in tellers), "it moved no epoch")
            store.update_key("key_2", {"status": "inactive"}, "key.disabled", _AUTHOR)
            store.add_key(
                _key(3),
                _claim(3)._replace(foreign=False, partition=foreign.partition),
                "key.created",
                _AUTHOR,
            )
            store.delete_machine("machine_1", _AUTHOR)
            _check(not self._tells(feed.read({}).news, foreign), "it was forgotten")
            feed.close()

    @staticmethod
    def _tells(news: Mapping[int, News], claim: Claim) -> bool:
        return any(claim.partition in partition.minted_only for partition in news.values())

    def test_readings_tell_the_peppers(self) -> None:
        """All of them, whether or not anything changed, in the news of the one log that tells of their changes."""
        with self._filled() as store:
            feed = store.feed()
            reading = feed.read({})
            (home,) = [partition for partition, news in reading.news.items() if news.peppers is not None]

            second = PepperRecord("p2", b"\x00\xff\n " * 8, "accept")
            changes: list[tuple[Callable[[], object], list[str]]] = [
                (lambda: None, []),
                (lambda: store.add_pepper(second, _AUTHOR), ["pepper.added"]),
                (
                    lambda: store.set_pepper_status("p2", "primary", _AUTHOR),
                    ["pepper.accept", "pepper.primary"],
                ),
                (lambda: store.set_pepper_status("p1", "retired", _AUTHOR), ["pepper.retired"]),
                (lambda: store.update_key("key_1", {"name": "x"}, "key.renamed", _AUTHOR), []),
            ]
            for change, told in changes:
                before = reading
                change()
                reading = feed.read({partition: news.epoch for partition, news in before.news.items()})
                kinds = [kind for kind, _ in reading.news[home].changes or ()]
                _equal(sorted(kind for kind in kinds if kind.startswith("pepper.")), told)
                for known in (reading, feed.read({})):
                    news = known.news[home]
                    _equal(sorted(news.peppers or ()), sorted(store.describe().peppers))
                    _check(
                        bool(told) <= (news.epoch != before.news[home].epoch), "a change that moved no epoch"
                    )
                    others = [other for partition, other in known.news.items() if partition != home]
                    _equal([other.peppers for other in others if other.peppers is not None], [])
            feed.close()

    def test_waiting_ends_when_something_changes_or_somebody_wakes(self) -> None:
        """Long before the time given: that is what makes a revocation fast."""
        with self._filled() as store:
            feed = store.feed()
            feed.read({})

            def disable() -> None:
                store.update_key("key_1", {"status": "inactive"}, "key.disabled", _AUTHOR)

            for ending in (disable, feed.wake):
                done = threading.Event()

                def wait(done: threading.Event = done) -> None:
                    feed.wait(_PATIENCE * 3)
                    done.set()

                waiting = threading.Thread(target=wait)
                waiting.start()
                ending()
                _check(done.wait(_PATIENCE), f"still waiting after {_PATIENCE} s")
                waiting.join()
                feed.read({})
            feed.close()

    def test_waiting_ends_after_the_time_given(self) -> None:
        """A watcher reads the epoch whether or not anything is announced."""
        with self._filled() as store:
            feed = store.feed()
            feed.read({})
            begin = time.monotonic()
            feed.wait(0.05)
            _check(time.monotonic() - begin < _PATIENCE, "waited too long")
            feed.close()

    # administration

    def test_everything_comes_back_as_it_was_put_in(self) -> None:
        """Every column: microseconds, accents, networks, grants, nothing at all."""
        with self._filled() as store:
            _equal(store.machines(), [_machine()])
            _equal(store.keys(), [_key()])
            bare = _key(2)._replace(
                expires_at=None,
                replaces=None,
                networks=(),
                attributes={},
                usage="",
                name="a'b\"c\\d%_?",
            )
            store.add_key(bare, _claim(2), "key.created", _AUTHOR)
            _equal(store.keys("key_2"), [bare])
            _equal(store.keys(bare.name), [bare])

    def test_lists_are_in_order_and_found_by_id_or_exact_name(self) -> None:
        """Oldest first; a name that several have gives them all; part of a name gives none."""
        with self._filled() as store:
            store.add_machine(_machine(number=3), _AUTHOR)
            store.add_machine(_machine("Portail", number=2), _AUTHOR)
            for number, machine in ((4, 2), (3, 1), (2, 1)):
                store.add_key(
                    _key(number, machine=machine, name=f"N{number % 2}"),
                    _claim(number),
                    "key.created",
                    _AUTHOR,
                )
            _equal(_ids(store.machines()), ["machine_1", "machine_2", "machine_3"])
            _equal(_ids(store.machines("Service de facturation")), ["machine_1", "machine_3"])
            _equal(_ids(store.machines("machine_2")), ["machine_2"])
            _equal(store.machines("Service"), [])
            _equal(_ids(store.keys()), ["key_1", "key_2", "key_3", "key_4"])
            _equal(_ids(store.keys("N0")), ["key_2", "key_4"])
            _equal(_ids(store.keys(machine_id="machine_1")), ["key_1", "key_2", "key_3"])
            _equal(_ids(store.keys("N0", machine_id="machine_1")), ["key_2"])
            _equal(store.keys("n0"), [])

    def test_a_renamed_key_goes_by_its_new_name_alone(self) -> None:
        """And nothing else of it changes."""
        with self._filled() as store:
            renamed = store.update_key("key_1", {"name": "Nouveau"}, "key.renamed", _AUTHOR)
            _equal(renamed, _key()._replace(name="Nouveau"))
            _equal(store.keys("Nouveau"), [renamed])
            _equal(store.keys(_key().name), [])
            columns = MachineColumns(name="M", organisation="o", grants=())
            moved = store.update_machine("machine_1", columns, "machine.updated", _AUTHOR)
            _equal(moved, replace(_machine(), name="M", organisation="o", grants=()))
            _equal(store.machines("M"), [moved])

    def test_a_change_that_cannot_be_made_changes_nothing(self) -> None:
        """`Conflict` for what is there, `NotFound` for what is not; the journal stays."""
        with self._filled() as store:
            before = store.journal(), store.machines(), store.keys(), store.describe()
            under_an_older_pepper = _claim(1)._replace(candidates=_claim(2, 1).candidates)
            conflicts: list[Callable[[], object]] = [
                lambda: store.add_machine(_machine(), _AUTHOR),
                lambda: store.add_key(_key(), _claim(2), "key.created", _AUTHOR),
                lambda: store.add_key(_key(2), _claim(1), "key.created", _AUTHOR),
                lambda: store.add_key(_key(2), under_an_older_pepper, "key.created", _AUTHOR),
                lambda: store.add_pepper(PepperRecord("p1", b"2" * 32, "accept"), _AUTHOR),
            ]  # fmt: skip
            missing: list[Callable[[], object]] = [
                lambda: store.add_key(_key(2, machine=9), _claim(2), "key.created", _AUTHOR),
                lambda: store.update_key("key_9", {"status": "inactive"}, "key.disabled", _AUTHOR),
                lambda: store.update_machine("machine_9", {"name": "x"}, "machine.updated", _AUTHOR),
                lambda: store.delete_machine("machine_9", _AUTHOR),
                lambda: store.set_pepper_status("p9", "primary", _AUTHOR),
            ]
            for error, calls in ((Conflict, conflicts), (NotFound, missing)):
                for call in calls:
                    with _raises(error):
                        call()
            _equal((store.journal(), store.machines(), store.keys(), store.describe()), before)

    def test_a_deleted_machine_takes_its_keys_with_it(self) -> None:
        """And no others; their digests are free again."""
        with self._filled() as store:
            store.add_machine(_machine("Autre", number=2), _AUTHOR)
            store.add_key(_key(2, machine=2), _claim(2), "key.created", _AUTHOR)
            store.delete_machine("machine_1", _AUTHOR)
            _equal(store.lookup(_claim(1)).record, None)
            _equal(_ids(store.machines()), ["machine_2"])
            _equal(_ids(store.keys()), ["key_2"])
            _check(store.lookup(_claim(2)).record, "another machine's key is gone")
            _equal(store.count_digests("p1"), 1)

    def test_a_deletion_moves_every_epoch_that_its_keys_were_found_in(self) -> None:
        """Also that of a key's partition: else "unknown" would be believed there after a restore from before."""
        with self._filled() as store:
            before = store.lookup(_claim(1)).epochs
            store.delete_machine("machine_1", _AUTHOR)
            after = store.lookup(_claim(1)).epochs
            _check(after, "no epoch")
            _check(all(before[partition] != epoch for partition, epoch in after.items()), "an epoch stayed")

    def test_the_journal_tells_who_did_what_when(self) -> None:
        """Newest first, at most ``limit``, before and after; never a digest."""
        with self._filled() as store:
            later = Author("Bob", _NOW + timedelta(hours=1))
            store.update_key("key_1", {"status": "inactive", "expires_at": None}, "key.disabled", later)
            newest, created = store.journal("key_1")
            _equal((newest.kind, newest.actor, newest.at), ("key.disabled", "Bob", later.at))
            expiry = microseconds(_NOW + timedelta(days=90))
            _equal(newest.before, f'{{"expires_at": {expiry}, "status": "active"}}')
            _equal(newest.after, '{"expires_at": null, "status": "inactive"}')
            _equal((created.kind, created.subject), ("key.created", "key_1"))
            _equal(store.journal(limit=1), [newest])
            _equal(
                [change.kind for change in store.journal()][:3],
                ["key.disabled", "key.created", "machine.created"],
            )
            digest = _claim(1).candidates[0].digest
            _check(digest.hex() not in repr(store.journal()), "a digest in the journal")

    def test_one_pepper_is_primary(self) -> None:
        """Making another one so makes the former ``accept``; both are journaled."""
        with self._opened() as store:
            first, second = (
                PepperRecord("p1", b"\x00\xff" * 16, "primary"),
                PepperRecord("p2", b"2" * 32, "accept"),
            )
            store.add_pepper(first, _AUTHOR)
            store.add_pepper(second, _AUTHOR)
            _equal(set(store.describe().peppers), {first, second})
            store.set_pepper_status("p2", "primary", _AUTHOR)
            _equal(
                set(store.describe().peppers),
                {first._replace(status="accept"), second._replace(status="primary")},
            )
            _equal({change.kind for change in store.journal("p1")}, {"pepper.added", "pepper.accept"})
            store.set_pepper_status("p1", "retired", _AUTHOR)
            _equal(
                {record.id: record.status for record in store.describe().peppers},
                {"p1": "retired", "p2": "primary"},
            )

    def test_digests_are_counted_by_pepper(self) -> None:
        """A pepper is not retired while keys use it."""
        with self._filled() as store:
            store.add_key(_key(2), _claim(2), "key.created", _AUTHOR)
            _equal((store.count_digests("p1"), store.count_digests("p2")), (2, 0))

    def test_threads_do_not_lose_each_others_changes(self) -> None:
        """Every key is there, and no two changes have one epoch."""
        with self._filled() as store:
            failures: list[BaseException] = []

            def add(start: int) -> None:
                try:
                    for number in range(start, start + 10):
                        store.add_key(_key(number), _claim(number), "key.created", _AUTHOR)
                except BaseException as error:  # noqa: BLE001 - told below, in the thread that tests
                    failures.append(error)

            threads = [threading.Thread(target=add, args=(start,)) for start in (100, 200, 300, 400)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            _equal(failures, [])
            _equal(len(store.keys()), 41)
            journal = store.journal(limit=1000)
            _equal(len({change.epoch for change in journal}), len(journal))

    def test_a_closed_store_is_unavailable(self) -> None:
        """Never empty: its callers would be told that they are unknown."""
        store = self.open()
        store.close()
        calls: list[Callable[[], object]] = [lambda: store.lookup(_claim()), store.describe, store.keys]
        for call in calls:
            with _raises(StoreUnavailable):
                call()

    # what the tests share

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        store = self.open()
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def _filled(self) -> Iterator[Store]:
        with self._opened() as store:
            store.add_pepper(PepperRecord("p1", b"1" * 32, "primary"), _AUTHOR)
            store.add_machine(_machine(), _AUTHOR)
            store.add_key(_key(), _claim(), "key.created", _AUTHOR)
            yield store

    @staticmethod
    def _changes(news: Mapping[int, News]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for partition in news.values():
            _check(partition.changes is not None, "the log does not reach back to the last reading")
            found += partition.changes or ()
        return found


# sinks


def _event(number: int, *, key: str = "key_1", status: int = 200, route: str = "/contrats/{id}") -> Event:
    return Event(
        1, f"p-1-{number}", time.time_ns() // 1000, key, "machine_1", "2001:db8::7", "GET", route, status, "",
        "completed", "contrats", "prod", 1_234, "8f14e45f",
    )  # fmt: skip


def _deliver(sink: Sink, batch: Batch) -> None:
    """Deliver as a recorder does: whatever the sink raises, the batch comes again."""
    for _ in range(20):
        with suppress(Exception):
            sink.write(batch)
            return
    sink.write(batch)


class SinkContract:
    """What every sink that stores exactly once promises. Subclass it, and give `open` and `stored`."""

    def open(self) -> Sink:
        """Give a sink over a place that is this test's own; called again, another one over the same place."""
        raise NotImplementedError

    def stored(self) -> Mapping[tuple[str, int], int]:
        """Count what is in that place, by key and status."""
        raise NotImplementedError

    def test_a_batch_that_comes_again_is_stored_once(self) -> None:
        """A producer's batches come in order, and any of them more than once."""
        sink = self.open()
        first, second = Batch("p", 1, [_event(1), _event(2)]), Batch("p", 7, [_event(3, status=500)])
        for batch in (first, first, second, first, second):
            sink.write(batch)
        _equal(dict(self.stored()), {("key_1", 200): 2, ("key_1", 500): 1})

    def test_a_reply_lost_after_the_commit_doubles_nothing(self) -> None:
        """The batch was stored, its sender never learnt so, and another process delivers it again."""
        lost = Batch("p", 1, [_event(1)], [Refusals(microseconds(_NOW), "unknown_key", "192.0.2.0/24", 3)])
        self.open().write(lost)
        again = self.open()
        again.write(lost)
        again.write(Batch("p", 2, [_event(2)]))
        _equal(dict(self.stored()), {("key_1", 200): 2})

    def test_a_batch_that_fails_in_the_middle_leaves_nothing(self) -> None:
        """All of it or none: then it may come again under its own name."""
        sink = self.open()
        whole = [_event(number) for number in range(2_500)]
        with _raises(Exception):
            sink.write(Batch("p", 1, [*whole, _event(0)._replace(status=cast("int", object()))]))
        _equal(dict(self.stored()), {})
        sink.write(Batch("p", 1, whole))
        _equal(dict(self.stored()), {("key_1", 200): 2_500})

    def test_producers_at_once_lose_and_double_nothing(self) -> None:
        """Each is a process of its own; they count into the same rows."""

        def produce(name: str) -> None:
            sink = self.open()
            for sequence in range(1, 11):
                events = [_event(number, key=f"key_{number % 3}") for number in range(30)]
                for _ in range(2):
                    _deliver(sink, Batch(name, sequence, events))

        threads = [threading.Thread(target=produce, args=(f"p{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _equal(dict(self.stored()), {(f"key_{number}", 200): 400 for number in range(3)})

    def test_odd_texts_and_numbers_are_stored(self) -> None:
        """What the recorder lets through is stored, however odd."""
        sink = self.open()
        odd = ["'; drop table usage_events --", "“é” \U0001f43b", "é" * 256, "", "%s :name ? {}", "a\\"]
        events = [_event(number, route=text) for number, text in enumerate(odd)]
        sink.write(Batch("p", 1, [*events, _event(9, status=0)._replace(time=1 << 62, duration=0xFFFF_FFFF)]))
        sink.write(Batch("p", 1 << 40, [_event(10)]))
        _equal(sum(self.stored().values()), len(odd) + 2)
