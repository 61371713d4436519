"""What the Redis store's structures are called, and how records and logs are written in them.

Every partition is a hash tag, ``{papaours:07}``, so that what changes together lies in one slot: keys in
partitions 0-15 by the CRC-32 of their text (`verify.partition`), machines in 16-31 by that of their id, the
store's mark and its peppers in 32. Each has a log whose last entry is its epoch. `docs/design/redis.md` has the
rest.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from ..exceptions import StoreUnavailable, UnreadableRecord
from ..model import Key, Machine
from ..verify import PARTITIONS
from . import (
    Epoch,
    News,
    PepperRecord,
)
from .records import (
    read_key,
    read_machine,
)

KEYS: Final = range(PARTITIONS)

MACHINES: Final = range(PARTITIONS, 2 * PARTITIONS)

META: Final = 2 * PARTITIONS

_read_json: Final = json.JSONDecoder().raw_decode  # `json.loads` looks for white space too: 0.8 µs of 1.3

ALL: Final = range(META + 1)


class Layout:
    """What each structure of each partition is called."""

    def __init__(self, prefix: str) -> None:
        self.start = f"{{{prefix}:"  # of every name; a partition's number follows
        self.tags = [f"{prefix}:{partition:02}" for partition in ALL]
        self.channel = f"{prefix}:changes"
        self._in = [f"{{{tag}}}:" for tag in self.tags]

    def name(self, partition: int, structure: str) -> str:
        """Name a structure of a partition."""
        return self._in[partition] + structure


def machine_partition(machine_id: str) -> int:
    """Tell which partition a machine is in."""
    return PARTITIONS + zlib.crc32(machine_id.encode()) % PARTITIONS


def pack(cells: Sequence[object]) -> str:
    """Write cells as JSON."""
    return json.dumps(cells, ensure_ascii=False, separators=(",", ":"))


def unpack(packed: bytes) -> list[Any]:  # Any: cells, checked where they are read
    """Read cells back. Raises `UnreadableRecord`."""
    cells: list[Any]
    try:
        text = packed.decode()
        cells, end = _read_json(text)
        if end != len(text):
            raise ValueError("more than one value")
    except ValueError as error:
        raise UnreadableRecord("a record of the Redis store cannot be read") from error
    return cells


def read_packed_key(packed: bytes) -> Key:
    """Read a key. Raises `UnreadableRecord`."""
    return read_key(unpack(packed))


@lru_cache(maxsize=1024)  # many keys of few machines: by the packed text, so never an old one
def read_packed_machine(packed: bytes) -> Machine:
    """Read a machine. Raises `UnreadableRecord`."""
    try:
        return read_machine(unpack(packed))
    except (ValueError, TypeError) as error:
        raise UnreadableRecord("a machine's record in the Redis store cannot be read") from error


@lru_cache(maxsize=1024)
def epoch_of(tip: bytes) -> Epoch:
    """Read an epoch: the sequence number and the nonce in hexadecimal. Raises `StoreUnavailable`."""
    seq, _, nonce = tip.partition(b" ")
    try:
        return Epoch(int(seq), bytes.fromhex(nonce.decode()))
    except ValueError as error:
        raise lost() from error


def tip_of(epoch: Epoch) -> str:
    """Write an epoch as it stands in a log."""
    return f"{epoch.seq} {epoch.nonce.hex()}"


class Logged(NamedTuple):
    """An entry of a log, read back. ``committed`` is the server's time, in microseconds."""

    epoch: Epoch
    committed: int
    cells: list[Any]  # Any: at, actor, kind, subject, before, after


def read_entry(entry: bytes) -> Logged:
    """Read an entry of a log. Raises `StoreUnavailable`."""
    try:
        seq, nonce, committed, cells = entry.split(b" ", 3)
        return Logged(epoch_of(seq + b" " + nonce), int(committed.removesuffix(b"m")), unpack(cells))
    except ValueError as error:
        raise lost() from error


def news_of(partition: int, tip: bytes, minted_only: bytes = b"", entries: list[bytes] | None = None) -> News:
    """Read what the script of the feed says of one log."""
    told = (partition,) if minted_only else ()  # those of keys are numbered as `Claim.partition` is
    if entries is None:
        return News(epoch_of(tip), None, minted_only=told)
    changes = [read_entry(entry).cells for entry in entries]
    return News(epoch_of(tip), [(cells[2], cells[3]) for cells in changes], minted_only=told)


def read_peppers(flat: Sequence[bytes]) -> list[PepperRecord]:
    """Read all that the store knows of peppers."""
    return sorted(read_pepper(id_, packed) for id_, packed in pairs(flat).items())


def lost() -> StoreUnavailable:
    """Make the error of a store that lacks a part of itself: an outage, never unknown keys."""
    return StoreUnavailable(
        "the Redis store has lost its installation mark or a part of itself: restore it from a backup"
    )


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Read the reply of HGETALL or HSCAN."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def read_pepper(id_: bytes, packed: bytes) -> PepperRecord:
    """Read what the store knows of a pepper. Raises `StoreUnavailable`: it concerns every key."""
    try:
        proof, status = unpack(packed)
        return PepperRecord(id_.decode(), bytes.fromhex(proof), status)
    except (ValueError, TypeError, UnreadableRecord) as error:
        raise lost() from error


def packed_pepper(pepper: PepperRecord) -> str:
    """Write it."""
    return pack((pepper.proof.hex(), pepper.status))
