"""What is asked of Redis, and which node answers for a partition.

What is asked is written once, as *steps*: a generator that yields an `Ask`, one round trip, and is sent the
replies. `redis_wire` carries steps out.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Generator, Iterable, Sequence
from hashlib import sha1
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from redis.exceptions import AskError, MovedError, NoScriptError, ResponseError

from ..exceptions import StoreUnavailable
from .redis_errors import REPLICA, kind_of, meaning_of
from .redis_place import Node, Place

_T = TypeVar("_T")

Word: TypeAlias = str | bytes | int

Command: TypeAlias = tuple[Word, ...]

WORD: Final = b"word"
"""Stands last in a command whose script gives it back, first of its reply. A random word is sent in its place, and
taken out of the reply before steps see that. Commands without it are followed by a PING that brings one back.
"""

_REDIRECTIONS: Final = 4

_SLOTS: Final = 16384


class Ask(NamedTuple):
    """One round trip: commands for one node, all sent before the first reply is read."""

    node: Node
    commands: tuple[Command, ...]
    write: bool = False


class Unreachable(StoreUnavailable):
    """A node did not answer. ``sent`` tells that a write may have been made all the same."""

    sent = False


class Stray(StoreUnavailable):
    """A reply to another question. What else its connection has in store belongs to somebody else too."""

    sent = True  # see Unreachable


class Refusal(StoreUnavailable):
    """A node answered with an error."""


# Any: a reply is whatever a command answers; an error reply is an instance of ResponseError
Steps: TypeAlias = Generator[Ask, list[Any], _T]

_SOURCES: Final[dict[Word, str]] = {}


def script(name: str) -> str:
    """Read a script beside this file and give the SHA-1 by which servers know it."""
    return known(Path(__file__).with_name(f"redis_{name}.lua"))


def known(path: Path) -> str:
    """Read a script and give the SHA-1 by which servers know it."""
    source = path.read_text(encoding="utf-8")
    digest = sha1(source.encode(), usedforsecurity=False).hexdigest()
    _SOURCES[digest] = source
    return digest


def _in_full(commands: Iterable[Command]) -> tuple[Command, ...]:
    """Send the scripts themselves: the server has been restarted, or never saw them."""
    return tuple(
        ("EVAL", _SOURCES[command[1]], *command[2:]) if command[0] == "EVALSHA" else command
        for command in commands
    )


class Router:
    """Knows which node answers for a partition, and finds out anew when it is another one by now.

    ``tags`` are the partitions' hash tags. Shared by threads and event loops: each attribute is replaced whole.
    """

    def __init__(self, place: Place, tags: Sequence[str]) -> None:
        self._place = place
        self._slots = [crc_hqx(tag.encode(), 0) % _SLOTS for tag in tags]
        self._nodes: dict[int, Node] = {}
        self._informants = list(place.nodes)  # whom to ask for nodes, the one that answered last first
        if place.kind == "single":
            self._nodes = dict.fromkeys(range(len(tags)), place.nodes[0])

    @property
    def single(self) -> bool:
        """Whether one node answers for every partition."""
        return self._place.kind != "cluster"

    @property
    def sentinel(self) -> bool:
        """Whether Sentinels say which node that is."""
        return self._place.kind == "sentinel"

    def run(self, partition: int, *commands: Command, write: bool = False) -> Steps[list[Any]]:
        """Have the node of a partition answer. Raises `StoreUnavailable` for any error reply."""
        node = self.known(partition) or (yield from self.locate(partition))
        asking = False
        for _ in range(_REDIRECTIONS):
            try:
                replies = yield Ask(node, (("ASKING",), *commands) if asking else commands, write)
            except Unreachable as error:
                node = yield from self._elsewhere(partition, node, error, write)
                asking = False
                continue
            replies = replies[1:] if asking else replies
            problem = _problem(replies)
            if problem is None:
                return replies
            if isinstance(problem, NoScriptError):
                commands = _in_full(commands)
            elif isinstance(problem, AskError):  # MOVED is one too
                asking = not isinstance(problem, MovedError)
                node = Node(str(problem.host) or node.host, int(problem.port))
                if not asking:
                    self.forget()
            else:
                if kind_of(problem) in REPLICA:
                    self.forget()
                raise refused(problem) from problem
        raise StoreUnavailable("Redis keeps sending us to another node")

    def _elsewhere(self, partition: int, node: Node, error: Unreachable, write: bool) -> Steps[Node]:
        """Find the node that has taken over. Raises the error again where there is none."""
        if self._place.kind == "single":
            raise error
        self.forget()
        if write and error.sent:
            raise error
        other = yield from self.locate(partition, avoid=node)
        if other == node:
            raise error
        return other

    def ask(self, node: Node, partitions: Sequence[int], commands: Sequence[Command]) -> Steps[list[Any]]:
        """Have one node answer commands, each of the partition beside it; what has moved is asked for there."""
        replies = yield Ask(node, tuple(commands))
        if any(isinstance(reply, NoScriptError) for reply in replies):
            replies = yield Ask(node, _in_full(commands))
        for place, (partition, command) in enumerate(zip(partitions, commands, strict=True)):
            if isinstance(replies[place], AskError):
                replies[place : place + 1] = yield from self.run(partition, command)
        problem = _problem(replies)
        if problem is not None:
            raise refused(problem) from problem
        return replies

    def known(self, partition: int) -> Node | None:
        """Give the node of a partition, as far as it is known."""
        return self._nodes.get(partition)

    def forget(self) -> None:
        """Ask anew which nodes there are."""
        if self._place.kind != "single":
            self._nodes = {}

    def locate(self, partition: int, avoid: Node | None = None) -> Steps[Node]:
        """Give the node of a partition."""
        nodes = self._nodes
        if partition not in nodes:
            nodes = yield from self.refresh(avoid)
        if partition not in nodes:
            raise StoreUnavailable("no node of the Redis Cluster holds this part of the store")
        return nodes[partition]

    def refresh(self, avoid: Node | None = None) -> Steps[dict[int, Node]]:
        """Ask the Sentinels, or the cluster, which nodes there are."""
        command: Command = ("CLUSTER", "SLOTS")
        if self._place.kind == "sentinel":
            command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._place.service)
        own_timers = True
        for node in sorted(self._informants, key=lambda node: node == avoid):
            try:
                (reply,) = yield Ask(node, (command,))
            except Unreachable as error:
                own_timers &= error.own_timer
                continue
            own_timers = False
            nodes = self._read_nodes(node, reply)
            if nodes:
                others = self._place.nodes if self.sentinel else (*nodes.values(), *self._place.nodes)
                self._informants = [*dict.fromkeys([node, *others])]
                self._nodes = nodes
                return nodes
        unavailable = StoreUnavailable(
            "no Sentinel can be reached that knows the service's primary"
            if self._place.kind == "sentinel"
            else "no node of the Redis Cluster can be reached"
        )
        unavailable.own_timer = own_timers
        raise unavailable

    def _read_nodes(self, asked: Node, reply: Any) -> dict[int, Node]:  # Any: see Steps
        if not isinstance(reply, list):
            return {}
        if self._place.kind == "sentinel":
            return dict.fromkeys(range(len(self._slots)), Node(_text(reply[0]), int(reply[1])))
        ranges = [
            (row[0], row[1], Node(_text(row[2][0] or b"") or asked.host, int(row[2][1]))) for row in reply
        ]
        return {
            partition: node
            for partition, slot in enumerate(self._slots)
            for first, last, node in ranges
            if first <= slot <= last
        }

    def nodes(self) -> Steps[dict[int, Node]]:
        """Give the nodes as far as they are known, or find out."""
        nodes = self._nodes
        if not nodes:
            nodes = yield from self.refresh()
        return nodes

    def knows(self, node: Node) -> bool:
        """Tell whether a connection to a node is worth keeping."""
        return node in self._nodes.values() or node.sentinel or not self._nodes


def _problem(replies: Iterable[Any]) -> ResponseError | None:  # Any: see Steps
    for reply in replies:
        if isinstance(reply, ResponseError):
            return reply
    return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def refused(error: ResponseError) -> Refusal:
    """Return what an error reply means, as an outage."""
    return Refusal(meaning_of(error))
