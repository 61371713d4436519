"""What may stand in a spool's folder: damage, strange files, other processes. Nothing of it stops what is fine."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from papaours_auth.exceptions import ConfigurationError
from papaours_auth.usage import Batch, CallableSink, Outcome, Recorder, Refusals, begin_call
from papaours_auth.usage.event import body_of, started_cell
from papaours_auth.usage.spool import (
    EVENT,
    REFUSALS,
    Segment,
    Spool,
    Unreadable,
    _forget_new,
    read_segment,
    records,
)
from papaours_auth.usage.spooled import Spooled
from support.servers import wait_until
from support.usage import CALLER, SLOW, call

DEAD = "0123456789abcdef"
HEADER = b"papaours-usage-1"


class Heir:
    """A recorder that finds a folder, and what it delivered."""

    def __init__(self, folder: Path) -> None:
        self.batches: list[Batch] = []
        self.recorder = Recorder(CallableSink(self.batches.append), spool=folder, interval=SLOW)

    def deliver(self) -> list[int]:
        """Give the statuses delivered."""
        self.recorder.start()
        assert self.recorder.flush()
        self.recorder.close()
        return [event.status for batch in self.batches for event in batch.events]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A spool in which a dead producer left a good segment, its 5th."""
    folder = tmp_path / "spool"
    folder.mkdir(0o700)
    (folder / f"{DEAD}.lock").touch()
    segment = Segment(folder / f"{DEAD}.{5:012d}", 5, 8192)
    made = begin_call(CALLER, None, "GET")
    segment.append(EVENT, started_cell(205), body_of(made, 1e9, ""))
    segment.close()
    return folder


def first(folder: Path) -> Path:
    """Name a file that stands before the good segment."""
    return folder / f"{DEAD}.{1:012d}"


def link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(HEADER)
    path.symlink_to(target)


def forbid(path: Path) -> None:
    path.write_bytes(HEADER)
    path.chmod(0)


def pack(kind: int, *bodies: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        segment = Segment(path, 1, 8192)
        for body in bodies:
            segment.append(kind, bytes(8), body)
        segment.close()

    return write


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "random": lambda path: path.write_bytes(secrets.token_bytes(5000)),
    "truncated header": lambda path: path.write_bytes(HEADER[:7]),
    "another version": lambda path: path.write_bytes(b"papaours-usage-9" + bytes(100)),
    "text": lambda path: path.write_text("hello"),
    "folder": Path.mkdir,
    "link": link,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_no_segment_is_set_aside_and_holds_up_nothing(
    folder: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    make(first(folder))
    heir = Heir(folder)
    assert heir.deliver() == [205]
    stats = heir.recorder.stats()
    assert (stats.inherited, stats.set_aside, stats.lost) == (1, 1, 0)
    assert [path.name for path in folder.iterdir()] == [first(folder).name + ".unreadable"]
    assert "set aside" in caplog.text
    again = Heir(folder)
    assert again.deliver() == []
    assert again.recorder.stats().set_aside == 0, "once"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_set_aside(folder: Path) -> None:
    forbid(first(folder))
    heir = Heir(folder)
    assert heir.deliver() == [205]
    assert heir.recorder.stats().set_aside == 1


def test_what_cannot_even_be_renamed_is_passed_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    first(folder).write_text("hello")
    monkeypatch.setattr("papaours_auth.usage.spooled.set_aside", refuse)
    heir = Heir(folder)
    heir.recorder.start()
    for _ in range(3):
        assert heir.recorder.flush()
    assert heir.deliver() == [205]
    assert heir.recorder.stats().set_aside == 1
    assert first(folder).exists()


@pytest.mark.parametrize("data", [b"", bytes(8192), HEADER, HEADER + bytes(8000)], ids=repr)
def test_a_process_that_died_before_it_wrote_left_nothing(folder: Path, data: bytes) -> None:
    first(folder).write_bytes(data)
    heir = Heir(folder)
    assert heir.deliver() == [205]
    assert heir.recorder.stats().set_aside == heir.recorder.stats().damaged == 0
    assert not list(folder.iterdir())


FOREIGN = {
    "no fields": pack(EVENT, b"", b"\x1f" * 3),
    "no time": pack(EVENT, b"\x1f".join([b"soon"] * 10), b"\x1f".join([b"--5"] * 10)),
    "a time of 5,000 digits": pack(EVENT, b"9" * 5000 + b"\x1fx" * 9),
    "no text": pack(EVENT, b"1" + b"\x1f\xff" * 9),
    "no JSON": pack(REFUSALS, b"{"),
    "other JSON": pack(REFUSALS, b"5", b"[5]", b'[["a", 1, 2, 3]]', b"[" * 5000),
    "another kind": pack(99, b"body"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_records_with_a_good_checksum_that_are_not_ours_are_counted_damaged(
    folder: Path, make: Callable[[Path], None]
) -> None:
    make(first(folder))
    heir = Heir(folder)
    assert heir.deliver() == [205]
    assert heir.recorder.stats().damaged >= 1
    assert not list(folder.iterdir())


def test_refusals_come_out_of_a_dead_producers_spool(folder: Path) -> None:
    pack(REFUSALS, json.dumps([[60_000_000, "unknown_key", "192.0.2.0/24", 7]]).encode())(first(folder))
    heir = Heir(folder)
    heir.deliver()
    assert [tuple(entry) for batch in heir.batches for entry in batch.refusals] == [
        (60_000_000, "unknown_key", "192.0.2.0/24", 7)
    ]


def test_files_of_others_stay_where_they_are(folder: Path) -> None:
    strangers = ["README", "other.lock", f"{DEAD}.txt", "0123.000000000001", ".hidden"]
    for name in strangers:
        (folder / name).write_text("mine")
    heir = Heir(folder)
    assert heir.deliver() == [205]
    assert sorted(path.name for path in folder.iterdir()) == sorted(strangers)


def test_a_lock_that_is_a_link_is_nobodys(folder: Path) -> None:
    (folder / f"{'f' * 16}.lock").symlink_to(folder.parent / "elsewhere")
    assert Heir(folder).deliver() == [205]


def test_the_lock_of_one_that_died_at_birth_is_cleared_away(folder: Path) -> None:
    (folder / f"{DEAD}.01234567.new").touch()
    Heir(folder).deliver()
    assert not list(folder.iterdir())


def test_a_file_that_cannot_be_opened_for_now_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> bytes:
        raise OSError(24, "Too many open files")

    heir = Heir(folder)
    with monkeypatch.context() as patch:
        patch.setattr("papaours_auth.usage.spool._read_file", too_many)
        heir.recorder.start()
        assert not heir.recorder.flush()
        assert "OSError" in heir.recorder.health().error
    assert heir.deliver() == [205]
    assert heir.recorder.stats().set_aside == 0
    assert heir.recorder.health().error == ""


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(Unreadable):
        read_segment(tmp_path / "large")
    assert read_segment(tmp_path / "absent") == b""


def test_a_long_length_in_a_damaged_record_is_no_reason_to_read_on(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "a.1", 1, 4 << 20)
    place = segment.append(EVENT, bytes(8), b"x" * (2 << 20))
    assert segment.append(EVENT, bytes(8), b"behind") > place
    found = list(records(segment.read()))
    assert [raw.body for raw in found if raw is not None] == [b"behind"]
    assert found[0] is None


def test_two_recorders_share_a_folder_and_take_nothing_from_each_other(tmp_path: Path) -> None:
    first, second = Heir(tmp_path / "spool"), Heir(tmp_path / "spool")
    for heir in (first, second):
        heir.recorder.start()
    for number in range(100):
        call(first.recorder, 201)
        call(second.recorder, 202)
        if number % 10 == 0:
            first.recorder.flush()
            second.recorder.flush()
    assert set(first.deliver()) == {201}
    assert set(second.deliver()) == {202}
    assert first.recorder.stats().delivered == second.recorder.stats().delivered == 100
    assert first.recorder.stats().inherited == second.recorder.stats().inherited == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_stops_the_app(tmp_path: Path, mode: int) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool").chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        Heir(tmp_path / "spool")


def test_a_spool_that_is_no_folder_stops_the_app(tmp_path: Path) -> None:
    (tmp_path / "spool").touch()
    with pytest.raises(ConfigurationError, match="no folder"):
        Heir(tmp_path / "spool")


def test_a_folder_that_cannot_be_made_loses_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    heir = Heir(tmp_path / "file" / "spool")
    call(heir.recorder)
    heir.recorder.close()
    assert heir.recorder.stats().lost == 1
    assert "the usage spool failed" in caplog.text
    assert [record.levelno for record in caplog.records if "being lost" in record.message] == [logging.ERROR]


def test_a_lock_that_another_took_meanwhile_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr("fcntl.flock", taken)
    with pytest.raises(BlockingIOError):
        Spool(tmp_path, producer=DEAD, segment_bytes=8192, max_bytes=1 << 20)


@pytest.mark.parametrize("other", ["holds it", "has cleared it away"])
def test_a_new_lock_that_another_process_takes_for_a_dead_ones_is_made_again(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that begin at once: one looks for the dead between the other's opening and locking of its own."""
    real = fcntl.flock
    met: list[str] = []

    def first_met(descriptor: int, operation: int) -> None:
        if not met:
            met.append(other)
            (made,) = tmp_path.glob("*.new")
            if other == "holds it":
                made.unlink()
                raise BlockingIOError
            _forget_new(made)
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", first_met)
    spool = Spool(tmp_path, producer=DEAD, segment_bytes=8192, max_bytes=1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [f"{DEAD}.lock"]
    assert met
    spool.close(keep=False)


def test_calls_that_take_the_spare_while_a_segment_is_sealed_leave_one_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recorder(
        CallableSink(lambda _: None), spool=tmp_path / "spool", interval=SLOW, segment_bytes=8192
    ) as recorder:
        keeper = recorder._keeper
        assert isinstance(keeper, Spooled)
        call(recorder)
        wait_until(lambda: keeper._spare is not None, 10, what="a spare")

        def meanwhile() -> list[Refusals]:
            while keeper._spare is not None:
                call(recorder)
            return []

        with keeper._tending:  # the thread that makes spares is late
            while keeper._active is not None and not keeper._active.half_full:
                call(recorder)
            monkeypatch.setattr(keeper._tally, "take", meanwhile)
            keeper._seal(last=False)
            monkeypatch.undo()
            call(recorder)
            assert recorder.stats().lost == 0


def test_a_sink_that_hangs_does_not_stop_the_making_of_segments(tmp_path: Path) -> None:
    """The courier's thread waits for the sink; a thread of its own makes room, or 8 KB would be all there is."""
    release = threading.Event()
    seen: list[Batch] = []

    def hang(batch: Batch) -> None:
        release.wait(60)
        seen.append(batch)

    recorder = Recorder(CallableSink(hang), spool=tmp_path / "spool", interval=0.01, segment_bytes=8192)
    call(recorder)
    for _ in range(300):
        kept = recorder.stats().pending
        wait_until(lambda: recorder._keeper._spare is not None, 10, what="a spare")  # type: ignore[attr-defined]  # how full it is shows nowhere else
        call(recorder)
        assert recorder.stats().pending == kept + 1
    assert recorder.stats().lost == 0
    release.set()
    recorder.close()
    assert sum(len(batch.events) for batch in seen) == 301


def test_a_call_that_outlives_its_segment_is_amended_nowhere(tmp_path: Path) -> None:
    heir = Heir(tmp_path / "spool")
    heir.recorder.start()
    slow = call(heir.recorder, 206, end=False)
    heir.recorder.close()
    heir.recorder.done(slow, Outcome.COMPLETED)
    assert [event.outcome for batch in heir.batches for event in batch.events] == ["started"]


def test_a_file_that_another_process_delivers_meanwhile_has_no_size(folder: Path) -> None:
    spool = Spool(folder, producer="f" * 16, segment_bytes=8192, max_bytes=1 << 20)
    entries = list(os.scandir(folder))
    for entry in entries:
        Path(entry.path).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.scandir", lambda _: entries)
        spool.segment(1).remove()
    spool.close(keep=False)


def test_a_new_lock_that_its_maker_holds_is_left_alone(folder: Path) -> None:
    new = folder / f"{'f' * 16}.01234567.new"
    with new.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Heir(folder).deliver()
        assert new.exists()


def test_what_does_not_fit_any_segment_is_lost_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papaours_auth.usage.spooled.body_of", lambda *_: b"x" * 9000)
    recorder = Recorder(
        CallableSink(lambda _: None), spool=tmp_path / "spool", interval=SLOW, segment_bytes=8192
    )
    lost = call(recorder)
    monkeypatch.undo()
    recorder.done(lost, Outcome.COMPLETED)
    assert recorder.stats().lost == 1
    recorder.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_call_under_way_at_a_fork_is_the_parents_to_end(tmp_path: Path) -> None:
    heir = Heir(tmp_path / "spool")
    heir.recorder.start()
    open_call = call(heir.recorder, 206, end=False)
    child = os.fork()
    if child == 0:
        heir.recorder.done(open_call, Outcome.FAILED)
        os._exit(heir.recorder.stats().recorded)
    assert os.waitpid(child, 0)[1] == 0
    heir.recorder.close()
    assert [event.outcome for batch in heir.batches for event in batch.events] == ["started"]
