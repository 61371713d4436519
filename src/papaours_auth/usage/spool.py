"""The spool: segments of events in a folder, so that a killed process loses none (docs/design/usage.md)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ..exceptions import ConfigurationError

_HEADER: Final = b"papaours-usage-1"
_RECORD: Final = struct.Struct("<2sBxII4x")
_MARK: Final = b"pu"
_LONGEST_BODY: Final = 1 << 20
_LARGEST: Final = 1 << 30  # bytes of a file that is read whole
_LOCK: Final = re.compile(r"[0-9a-f]{16}\.lock")
_NEW: Final = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{8}\.new")
_SET_ASIDE: Final = ".unreadable"
_TRIES: Final = 10  # to make a lock, which other processes may take for a dead one's before it is locked
_PASSING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
CELL: Final = 8
EVENT, REFUSALS = 1, 2


class Unreadable(Exception):
    """A file that no process of ours wrote, or that is not as we wrote it."""


class Raw(NamedTuple):
    """A record as it stands in a segment."""

    kind: int
    place: int
    cell: bytes
    body: bytes


class Segment:
    """A file one process appends to. Not locked: its recorder is."""

    def __init__(self, path: Path, sequence: int, size: int) -> None:
        """Make it, with its disk space. Raises `OSError`, and leaves nothing then."""
        self.path, self.sequence = path, sequence
        self.frozen = False
        self.unfinished = 0
        self.events = 0
        self.end = len(_HEADER)
        self._size = size
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._map[: self.end] = _HEADER

    @property
    def empty(self) -> bool:
        """Whether it holds no record."""
        return self.end == len(_HEADER)

    @property
    def half_full(self) -> bool:
        """Whether a spare will soon be needed."""
        return self.end * 2 > self._size

    def append(self, kind: int, cell: bytes, body: bytes) -> int:
        """Write a record and give its place; 0 where it does not fit."""
        record = _RECORD.pack(_MARK, kind, len(body), zlib.crc32(body)) + cell + body
        place, end = self.end, self.end + len(record)
        if end > self._size:
            return 0
        self._map[place:end] = record
        self.end = end + -end % 8
        return place

    def amend(self, place: int, cell: bytes) -> None:
        """Replace the outcome of a record: 8 aligned bytes, so one store."""
        start = place + _RECORD.size
        self._map[start : start + CELL] = cell

    def read(self) -> bytes:
        """Give what was written."""
        return self._map[: min(self.end, self._size)]

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        self._map.close()

    def remove(self) -> None:
        """Delete it: it is delivered."""
        self._map.close()
        self.path.unlink(missing_ok=True)


def records(data: bytes) -> Iterator[Raw | None]:
    """Read a segment; None stands for a damaged stretch. Zeros are the end, unless more follows."""
    place, damaged = len(_HEADER), False
    while place + _RECORD.size + CELL <= len(data):
        raw = _record(data, place)
        if raw is not None:
            if damaged:
                yield None
            damaged = False
            yield raw
            place += _RECORD.size + CELL + len(raw.body)
            place += -place % 8
            continue
        damaged = True
        place = data.find(_MARK, place + 1)
        if place < 0:
            break
        place += -place % 8


def _record(data: bytes, place: int) -> Raw | None:
    mark, kind, length, crc = _RECORD.unpack_from(data, place)
    start = place + _RECORD.size + CELL
    if mark != _MARK or length > _LONGEST_BODY or start + length > len(data):
        return None
    body = data[start : start + length]
    return Raw(kind, place, data[start - CELL : start], body) if zlib.crc32(body) == crc else None


def read_segment(path: Path) -> bytes:
    """Read what a dead process left; nothing where it died before it wrote.

    Raises `Unreadable` for what is no segment of ours, `OSError` for what may pass.
    """
    try:
        data = _read_file(path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno in _PASSING:
            raise
        raise Unreadable from error
    if not data.startswith(_HEADER) and any(data):
        raise Unreadable
    return data


def _read_file(path: Path) -> bytes:
    # Not through a link, and not held up by a pipe: what stands in the folder may be anybody's.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise Unreadable
        return file.read()


class Left(NamedTuple):
    """What a dead producer left; its lock is ours until `release`."""

    producer: str
    segments: list[tuple[int, Path]]
    lock: Path
    descriptor: int

    def release(self) -> None:
        """Give the lock back; without segments, the producer is forgotten."""
        if not any(os.path.lexists(path) for _, path in self.segments):
            self.lock.unlink(missing_ok=True)
        os.close(self.descriptor)


def set_aside(path: Path) -> None:
    """Rename a file that cannot be read, for a person to look at. Raises `OSError`."""
    path.rename(path.with_name(path.name + _SET_ASIDE))


def check_folder(folder: Path) -> None:
    """Raise `ConfigurationError` for a folder that others may write to: they could put events into it."""
    try:
        found = folder.stat()
    except OSError:
        return  # it is made when it is needed
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError("the usage spool is no folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError("others may write to the folder of the usage spool: chmod 700 it")


class Spool:
    """A folder of segments, ours and those that dead processes left. Raises `OSError` where it cannot be."""

    def __init__(self, folder: Path, *, producer: str, segment_bytes: int, max_bytes: int) -> None:
        self.folder, self.producer = folder, producer
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = folder / f"{producer}.lock"
        for tries_left in reversed(range(_TRIES)):
            try:
                self._descriptor = _lock_anew(self._lock)
            except (BlockingIOError, FileNotFoundError):  # another process has just taken it for a dead one's
                if not tries_left:
                    raise
            else:
                return

    def segment(self, sequence: int) -> Segment:
        """Make the next segment. Raises `OSError`, also where the folder has reached its bound."""
        if self._size() + self._segment_bytes > self._max_bytes:
            raise OSError(errno.EDQUOT, "the usage spool has reached its bound")
        return Segment(self.folder / f"{self.producer}.{sequence:012d}", sequence, self._segment_bytes)

    def _size(self) -> int:
        total = 0
        for entry in os.scandir(self.folder):
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # another process has delivered it
                continue
        return total

    def left(self) -> Iterator[Left]:
        """Give what dead producers left, each under its lock."""
        for path in sorted(self.folder.iterdir()):
            if _LOCK.fullmatch(path.name) and path != self._lock and (found := _adopt(path)) is not None:
                yield found
            if _NEW.fullmatch(path.name):
                _forget_new(path)

    def close(self, *, keep: bool) -> None:
        """Give up our lock; ``keep`` where segments are left for who comes next."""
        if not keep:
            self._lock.unlink(missing_ok=True)
        os.close(self._descriptor)

    def forget(self) -> None:
        """In a child: the lock is the parent's. Closing our copy does not release it."""
        os.close(self._descriptor)


def _lock_anew(lock: Path) -> int:
    """Make a lock, locked before it has its name, so that nobody takes it for a dead producer's."""
    made = lock.with_name(f"{lock.stem}.{secrets.token_hex(4)}.new")
    descriptor = os.open(made, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(lock)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _adopt(lock: Path) -> Left | None:
    descriptor = _locked(lock)
    if descriptor is None:
        return None
    found = sorted(path for path in lock.parent.glob(f"{lock.stem}.*") if path.suffix[1:].isdecimal())
    return Left(lock.stem, [(int(path.suffix[1:]), path) for path in found], lock, descriptor)


def _forget_new(path: Path) -> None:
    """Delete the lock of a process that died before it was one. Its maker, should it live, tries again."""
    descriptor = _locked(path)
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """Take a lock that is nobody's; None where it is somebody's, gone, or not for us to open."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
