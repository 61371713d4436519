"""The verifying half of the Redis store as steps: what both shells ask."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from ..exceptions import ConfigurationError, StoreUnavailable, UnreadableRecord
from ..model import Record
from ..verify import Claim
from . import (
    Description,
    Epoch,
    Found,
    News,
    PepperRecord,
    Reading,
)
from .redis_layout import (
    META,
    Layout,
    epoch_of,
    lost,
    news_of,
    pairs,
    read_packed_key,
    read_packed_machine,
    read_peppers,
    tip_of,
)
from .redis_place import Node, Place
from .redis_router import WORD, Command, Refusal, Router, Steps, Unreachable, script

logger = logging.getLogger("papaours_auth")

SCHEMA_VERSION: Final = 1

LOG_READ: Final = 10_000
"""Changes a watcher reads at once: further behind, it drops its whole cache."""

_DIGEST: Final = 32  # bytes

_LOOKUP, _MACHINE, _NEWS = map(script, ("lookup", "machine", "news"))


class Questions:
    """The verifying half as steps: what `Wire` and `AsyncWire` carry out."""

    def __init__(self, place: Place) -> None:
        self.layout = Layout(place.prefix)
        self.router = Router(place, self.layout.tags)
        self._lookups: dict[tuple[int, int], tuple[Command, bytes]] = {}
        self.warnings: list[str] = []
        self.installation: str | None = None

    def lookup(self, claim: Claim) -> Steps[Found]:
        """Find a claim's record: in one round trip, or in two on Cluster."""
        digests = [candidate.digest for candidate in claim.candidates]
        command, _ = self._lookup_command(claim.partition, len(digests))
        (reply,) = yield from self.router.run(claim.partition, (*command, *digests, WORD))
        tip, *found = _lines(reply, 6 if self.router.single else 4)
        if found and not self.router.single:
            found[3:3] = yield from self._machine(int(found[1]), found[2])
        return _found(claim, tip, found)

    def packed_lookup(self, claim: Claim) -> bytes:
        """Give the lookup as it is sent, but for its word: redis-py packs a word in half a µs."""
        _, start = self._lookup_command(claim.partition, len(claim.candidates))
        return start + b"".join([b"$32\r\n%b\r\n" % candidate.digest for candidate in claim.candidates])

    def read_found(self, claim: Claim, reply: bytes) -> Found:
        """Read what one server says to `packed_lookup`."""
        tip, *found = _lines(reply, 6)
        return _found(claim, tip, found)

    def _lookup_command(self, partition: int, digests: int) -> tuple[Command, bytes]:
        """Give a lookup but for its digests and its word, as words and as they are sent."""
        made = self._lookups.get((partition, digests))
        if made is not None:
            return made
        structures = ("digests", "keys", "changes", "digest-of")
        names = [self.layout.name(partition, structure) for structure in structures]
        command: Command = (
            "EVALSHA",
            _LOOKUP,
            len(names),
            *names,
            self.layout.start if self.router.single else "",
        )
        words = [str(word).encode() for word in command]
        start = [
            b"*%d\r\n" % (len(words) + digests + 1),
            *[b"$%d\r\n%b\r\n" % (len(word), word) for word in words],
        ]
        self._lookups[partition, digests] = command, b"".join(start)
        return self._lookups[partition, digests]

    def _machine(self, partition: int, machine_id: bytes) -> Steps[Sequence[bytes | None]]:
        names = [self.layout.name(partition, structure) for structure in ("machines", "changes")]
        (reply,) = yield from self.router.run(partition, ("EVALSHA", _MACHINE, 2, *names, machine_id, WORD))
        return cast("Sequence[bytes | None]", reply)

    def describe(self) -> Steps[Description]:
        """Tell whose store this is, and check how the server is set up."""
        yield from self.check_policy()
        names = [self.layout.name(META, structure) for structure in ("mark", "peppers")]
        marks, peppers = yield from self.router.run(META, *[("HGETALL", name) for name in names])
        mark = pairs(marks)
        if b"ready" not in mark:
            raise self._missing()
        if mark[b"schema"] != b"%d" % SCHEMA_VERSION:
            raise ConfigurationError("the Redis store has another schema: upgrade papaours-auth everywhere")
        self.installation = mark[b"installation"].decode()
        return Description(self.installation, tuple(read_peppers(peppers)))

    def _missing(self) -> Exception:
        """An outage where a store was seen before, otherwise a wrong URL."""
        if self.installation is not None:
            return lost()
        return ConfigurationError(
            "there is no store in this Redis under this prefix: check PAPAOURS_STORE, or make one with "
            "'papaours-auth init'"
        )

    def check_policy(self) -> Steps[None]:
        """Refuse servers that may throw away keys: an evicted record would be an unknown key."""
        nodes = yield from self.router.nodes()
        for node in dict.fromkeys(nodes.values()):
            partition = next(partition for partition, at in nodes.items() if at == node)
            try:
                yield from self._check_policy(partition)
            except Unreachable:
                if self.router.single:  # to ask it more would cost its caller another timeout
                    raise

    def _check_policy(self, partition: int) -> Steps[None]:
        try:
            ((_, policy),) = yield from self.router.run(partition, ("CONFIG", "GET", "maxmemory-policy"))
        except (Refusal, ValueError):
            self._warn("maxmemory-policy cannot be read here: see that it is noeviction, or volatile-…")
            return
        if policy != b"noeviction" and not policy.startswith(b"volatile-"):
            raise ConfigurationError(
                "this Redis may evict any key when its memory is full, and customers would be told that "
                "theirs is unknown: set maxmemory-policy to noeviction"
            )

    def _warn(self, what: str) -> None:
        if what not in self.warnings:
            self.warnings.append(what)
            logger.warning("the Redis store: %s", what)

    def read(self, known: Mapping[int, Epoch]) -> Steps[Reading]:
        """Read every log's tip and what came after those known, from the primaries."""
        if self.router.sentinel:
            yield from self.router.refresh()
        nodes = yield from self.router.nodes()
        news: dict[int, News] = {}
        problem: StoreUnavailable = lost()
        for node in dict.fromkeys(nodes.values()):
            theirs = [partition for partition, at in nodes.items() if at == node]
            try:
                news |= yield from self._read_node(node, theirs, known)
            except StoreUnavailable as error:
                problem = error
                self.router.forget()
        if not news or self.installation is None:
            raise problem
        return Reading(self.installation, news)

    def _read_node(
        self, node: Node, partitions: Sequence[int], known: Mapping[int, Epoch]
    ) -> Steps[dict[int, News]]:
        """Read the logs of one node: all in one script, or on Cluster in a script each, sent together.

        ``partitions`` in their order: of `META`, the last, there is more to tell.
        """
        groups = [list(partitions)] if self.router.single else [[partition] for partition in partitions]
        commands = [self._news_command(group, known) for group in groups]
        replies = yield from self.router.ask(node, [group[0] for group in groups], commands)
        peppers: list[PepperRecord] | None = None
        if META in partitions:
            *replies[-1], mark, packed = replies[-1]
            if mark is None:
                raise lost()
            self.installation = mark.decode()
            peppers = read_peppers(packed)
        found = zip(partitions, (item for reply in replies for item in reply), strict=True)
        news = {partition: news_of(partition, *item) for partition, item in found if item}  # none: no tip
        if META in news:
            news[META] = news[META]._replace(peppers=peppers)
        return news

    def _news_command(self, partitions: Sequence[int], known: Mapping[int, Epoch]) -> Command:
        tips = [tip_of(known[partition]) if partition in known else "" for partition in partitions]
        names = [self.layout.name(partition, "changes") for partition in partitions]
        if META in partitions:
            names += [self.layout.name(META, structure) for structure in ("mark", "peppers")]
        return ("EVALSHA", _NEWS, len(names), *names, LOG_READ, *tips, WORD)


def _lines(reply: bytes, wanted: int) -> list[Any]:  # Any: a reply
    """Part a lookup's reply: the tip, and so many lines more where anything was found, the digest last."""
    if not reply:
        raise lost()
    lines = reply.split(b"\n", wanted)  # a digest may hold line breaks
    if len(lines) == 1:
        return lines
    if len(lines) != 1 + wanted or len(lines[-1]) not in (0, _DIGEST):
        raise UnreadableRecord("a record of the Redis store cannot be read: it holds a line break")
    return lines


def _found(claim: Claim, tip: bytes, found: Sequence[bytes | None]) -> Found:
    """Read a lookup's reply: after the tip nothing, or all there is of a key and its machine."""
    epochs = {claim.partition: epoch_of(tip)}
    if not found:
        return Found(None, epochs)
    key, at, _, machines_tip, machine, digest = found
    if at is None or not machines_tip or not key or not digest:
        raise lost()
    epochs[int(at)] = epoch_of(machines_tip)
    if not machine:  # deleted; its keys are on their way
        return Found(None, epochs)
    return Found(Record(read_packed_key(key), read_packed_machine(machine), digest), epochs)
