"""How the Redis store reaches its servers: URLs, connections, and which node answers for a partition.

What is asked is written once, as *steps*: a generator that yields an `Ask`, one round trip, and is sent the
replies. `Wire` and `AsyncWire` carry steps out, and differ by waiting. redis-py's connections are used without
its clients and pools: those retry for seconds, raise when a pool is empty, and take longer than our script.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from binascii import crc_hqx
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import socket
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

try:
    import redis.asyncio.connection as async_connection
    import redis.connection as sync_connection
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import NoBackoff
    from redis.exceptions import (
        AskError,
        AuthenticationError,
        BusyLoadingError,
        MovedError,
        NoPermissionError,
        NoScriptError,
        ReadOnlyError,
        RedisError,
        ResponseError,
    )
    from redis.exceptions import TimeoutError as RedisTimeoutError
    from redis.retry import Retry
except ImportError as error:
    from ..exceptions import ConfigurationError

    raise ConfigurationError(
        "a Redis store needs redis-py, which is not installed: pip install 'papaours-auth[redis]'"
    ) from error

from .._fork import hold_across_fork
from ..exceptions import ConfigurationError, StoreUnavailable

_T = TypeVar("_T")
Word: TypeAlias = str | bytes | int
Command: TypeAlias = tuple[Word, ...]
_REDIRECTIONS: Final = 4
_SLOTS: Final = 16384
_CHUNK: Final = 65536
_FORM: Final = (
    "a Redis store is written redis://[user:password@]host[:port][/db] (rediss:// with TLS), "
    "redis+cluster://host[:port][,host…] or redis+sentinel://host[:port][,host…]/service[/db], with options "
    "after '?': prefix, timeout, connections, wait_replicas, wait_timeout, tls, ca_certs, certfile, keyfile, "
    "sentinel_username, sentinel_password; a password is percent-encoded"
)


class Node(NamedTuple):
    """A server to ask. Sentinels have credentials and settings of their own."""

    host: str
    port: int
    sentinel: bool = False


class Ask(NamedTuple):
    """One round trip: commands for one node, all sent before the first reply is read.

    ``packed`` is the same as it is sent, where that is one command whose reply is a string: see `Exchange`.
    """

    node: Node
    commands: tuple[Command, ...]
    write: bool = False
    packed: bytes | None = None


class Unreachable(StoreUnavailable):
    """A node did not answer. ``sent`` tells that a write may have been made all the same."""

    sent = False


class Refusal(StoreUnavailable):
    """A node answered with an error."""


# Any: a reply is whatever a command answers; an error reply is an instance of ResponseError
Steps: TypeAlias = Generator[Ask, list[Any], _T]


# URLs


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says."""

    kind: Literal["single", "cluster", "sentinel"]
    nodes: tuple[Node, ...]
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    certificates: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "papaours"
    timeout: float = 0.5
    connections: int = 32
    wait_replicas: int = 0
    wait_timeout: int = 1000

    def settings(self, node: Node) -> dict[str, Any]:  # Any: keyword arguments of redis-py's
        """Give the keyword arguments of a connection to a node."""
        username, password = self.username, self.password
        if node.sentinel:
            username, password = self.sentinel_username, self.sentinel_password
        given: dict[str, Any] = {
            "host": node.host,
            "port": node.port,
            "username": username,
            "password": password,
            "protocol": 2,
            "socket_keepalive": True,
        }
        if not node.sentinel:
            given["db"] = self.db
        if self.tls:
            given |= {f"ssl_{name}": value for name, value in self.certificates.items()}
            given |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
        return given


def place_of(url: str) -> Place:
    """Read a URL. Raises `ConfigurationError`, which quotes nothing of it."""
    try:
        return _place(url)
    except (ValueError, KeyError):
        raise ConfigurationError(_FORM) from None


def _place(url: str) -> Place:
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    username, colon, password = credentials.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    kinds: Mapping[str, Literal["single", "cluster", "sentinel"]] = {
        "redis": "single", "rediss": "single", "redis+cluster": "cluster", "redis+sentinel": "sentinel",
    }  # fmt: skip
    kind = kinds[scheme]
    service, path = _service(path) if kind == "sentinel" else ("", path)
    if kind == "cluster" and path:
        raise ValueError("a cluster has one database")
    nodes = tuple(_node(host, kind == "sentinel") for host in hosts.split(","))
    if kind == "single" and len(nodes) > 1:
        raise ValueError("several hosts")
    return Place(
        kind,
        nodes,
        service,
        int(path or 0),
        unquote(username) or None,
        unquote(password) if colon else None,
        tls=scheme == "rediss" or _switch(options.pop("tls", "no")),
        certificates={
            name: options.pop(name) for name in ("ca_certs", "certfile", "keyfile") if name in options
        },
        **_options(options),
    )


def _service(path: str) -> tuple[str, str]:
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("no service")
    return unquote(service), db


def _node(text: str, sentinel: bool) -> Node:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path or parts.query or parts.fragment:
        raise ValueError("no host")
    return Node(parts.hostname, parts.port or (26379 if sentinel else 6379), sentinel)


def _switch(text: str) -> bool:
    return {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}[text.lower()]


def _options(given: dict[str, str]) -> dict[str, Any]:  # Any: of several types, each checked here
    readers: Mapping[str, Callable[[str], object]] = {
        "prefix": _prefix, "timeout": _seconds, "connections": _count, "wait_replicas": int,
        "wait_timeout": _count, "sentinel_username": str, "sentinel_password": str,
    }  # fmt: skip
    return {name: readers[name](value) for name, value in given.items()}


def _prefix(text: str) -> str:
    # It stands in hash tags and in ACL patterns: no braces, no wildcards, no colons.
    if not 0 < len(text) <= 64 or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in text):
        raise ValueError("prefix")
    return text


def _seconds(text: str) -> float:
    if not 0 < float(text) <= 60:
        raise ValueError("timeout")
    return float(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError("count")
    return int(text)


# scripts

_SOURCES: Final[dict[Word, str]] = {}


def script(name: str) -> str:
    """Read a script beside this file and give the SHA-1 by which servers know it."""
    source = Path(__file__).with_name(f"redis_{name}.lua").read_text(encoding="utf-8")
    digest = sha1(source.encode(), usedforsecurity=False).hexdigest()
    _SOURCES[digest] = source
    return digest


def _in_full(commands: Iterable[Command]) -> tuple[Command, ...]:
    """Send the scripts themselves: the server has been restarted, or never saw them."""
    return tuple(
        ("EVAL", _SOURCES[command[1]], *command[2:]) if command[0] == "EVALSHA" else command
        for command in commands
    )


# which node


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

    def run(
        self, partition: int, *commands: Command, write: bool = False, packed: bytes | None = None
    ) -> Steps[list[Any]]:
        """Have the node of a partition answer. Raises `StoreUnavailable` for any error reply."""
        node = self._nodes.get(partition) or (yield from self.locate(partition))
        asking = False
        for _ in range(_REDIRECTIONS):
            try:
                replies = yield Ask(node, (("ASKING",), *commands) if asking else commands, write, packed)
            except Unreachable as error:
                node = yield from self._elsewhere(partition, node, error, write)
                asking = False
                continue
            packed = None
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
                if isinstance(problem, ReadOnlyError):
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
        for node in sorted(self._informants, key=lambda node: node == avoid):
            try:
                (reply,) = yield Ask(node, (command,))
            except Unreachable:
                continue
            nodes = self._read_nodes(node, reply)
            if nodes:
                others = self._place.nodes if self.sentinel else (*nodes.values(), *self._place.nodes)
                self._informants = [*dict.fromkeys([node, *others])]
                self._nodes = nodes
                return nodes
        raise StoreUnavailable(
            "no Sentinel can be reached that knows the service's primary"
            if self._place.kind == "sentinel"
            else "no node of the Redis Cluster can be reached"
        )

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
    """Say what an error reply means. Its text is not quoted: it may hold words of the command."""
    if isinstance(error, NoPermissionError):
        return Refusal("the Redis user lacks a permission: compare it with docs/stores/redis.md")
    if isinstance(error, ReadOnlyError):
        return Refusal("the Redis server asked is a replica now")
    word = str(error).partition(" ")[0]
    kind = word if word.isupper() and word.isalpha() else type(error).__name__
    return Refusal(f"Redis refuses with {kind}")


def unreachable(node: Node, error: Exception, *, sent: bool) -> Unreachable:
    """Say of an error of redis-py's what it means."""
    who = f"Redis{' Sentinel' if node.sentinel else ''} at {node.host}:{node.port}"
    if isinstance(error, RedisTimeoutError | TimeoutError):
        said = f"{who} does not answer in time"
    elif isinstance(error, AuthenticationError):
        said = f"{who} does not take the URL's credentials"
    elif isinstance(error, BusyLoadingError):
        said = f"{who} is loading its data"
    elif isinstance(error.__cause__ or error.__context__ or error, ssl.SSLError):
        said = f"{who} cannot be trusted, or does not speak TLS"
    else:
        said = f"{who} cannot be reached ({type(error).__name__})"
    made = Unreachable(said)
    made.sent = sent
    return made


# carrying steps out


class _Link(Protocol):
    """The part of redis-py's blocking connection that is used."""

    _sock: socket | None  # to wait for it and for something else at once there is no other way

    # Any: redis-py's own words
    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]: ...
    def send_packed_command(self, command: list[bytes], check_health: bool = ...) -> None: ...
    def read_response(self) -> Any: ...
    def can_read(self, timeout: float = ...) -> bool: ...


Link: TypeAlias = _Link


def connect(place: Place, node: Node, timeout: float) -> Link:
    """Open a blocking connection. Raises `Unreachable`."""
    kind = sync_connection.SSLConnection if place.tls else sync_connection.Connection
    made = kind(
        **place.settings(node),
        socket_timeout=timeout,
        socket_connect_timeout=min(timeout, place.timeout),
        retry=Retry(NoBackoff(), 0),
    )
    link = cast("Link", made)
    try:
        link.connect()
    except (RedisError, OSError) as error:
        link.disconnect()
        raise unreachable(node, error, sent=False) from error
    return link


def converse(link: Link, commands: Iterable[Command], packed: bytes | None = None) -> list[Any]:
    """Send commands and read a reply for each. Error replies are among them, not raised."""
    if packed is not None:
        exchanged = _exchanged(link, packed)
        if exchanged is not None:
            return [exchanged.reply]
    link.send_packed_command(link.pack_commands(commands))
    replies = []
    for _ in commands:
        try:
            replies.append(link.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


class Exchange(NamedTuple):
    """A bulk string, or a null, that was read from a connection's own socket.

    redis-py's way to write a command and to read its reply takes 12 µs more (of 30 that a GET takes by its client).
    """

    reply: bytes | None


def _exchanged(link: Link, packed: bytes) -> Exchange | None:
    """Send a command and read its reply past redis-py. None for any other reply: then ask in redis-py's way."""
    sock: socket | None = getattr(link, "_sock", None)  # there is no public way to it
    if sock is None:
        return None
    try:
        sock.sendall(packed)
        data = _more(sock.recv(_CHUNK))
        while not _is_whole(data):
            data += _more(sock.recv(_CHUNK))
    except BaseException:
        link.disconnect()  # half a reply may be in it
        raise
    return _exchange_of(data)


def _more(data: bytes) -> bytes:
    if not data:
        raise ConnectionResetError
    return data


def _is_whole(data: bytes) -> bool:
    """Tell whether a reply has come in to its end: a bulk string's is counted, any other is one line."""
    if not data.endswith(b"\r\n"):
        return False
    length = _length(data)
    return length is None or len(data) == data.index(b"\n") + length + 3


def _length(data: bytes) -> int | None:
    """Read the length of a bulk string (RESP 2); None for anything else, null too."""
    head, _, _ = data[1:16].partition(b"\r")
    return int(head) if data[:1] == b"$" and head.isdigit() else None


def _exchange_of(data: bytes) -> Exchange | None:
    length = _length(data)
    if length is not None:
        return Exchange(data[len(data) - length - 2 : -2])
    return Exchange(None) if data == b"$-1\r\n" else None


def hear(link: Link) -> bool | None:
    """Take in what a subscription has brought, and tell whether there was anything; None where it is lost."""
    heard = False
    try:
        while link.can_read(timeout=0):
            link.read_response()
            heard = True
    except (RedisError, OSError):
        return None
    return heard


class Wire:
    """Carries steps out, blocking. Any number of threads; at most ``place.connections`` at once, others wait.

    Fork: the child closes its copies of idle connections and opens its own.
    """

    def __init__(self, place: Place, router: Router, *, timeout: float | None = None) -> None:
        self._place = place
        self._router = router
        self._timeout = place.timeout if timeout is None else timeout
        self._closed = False
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._room: SimpleQueue[None] = SimpleQueue()  # a semaphore, without its 0.7 µs
        for _ in range(self._place.connections):
            self._room.put(None)
        self._idle: dict[Node, list[Link]] = {}

    def drive(self, steps: Steps[_T]) -> _T:
        """Carry steps out and give what they come to. Raises `StoreUnavailable`."""
        try:
            ask = next(steps)
            while True:
                try:
                    replies = self._exchange(ask)
                except Unreachable as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(replies)
        except StopIteration as stop:
            return cast("_T", stop.value)

    def _exchange(self, ask: Ask) -> list[Any]:
        room = self._room
        try:
            room.get(timeout=self._timeout)
        except Empty:
            raise StoreUnavailable(
                "all connections to Redis are in use: see connections= and timeout="
            ) from None
        try:
            while True:
                link = self._take(ask)
                fresh = link is None
                if link is None:
                    self._prune()
                    link = connect(self._place, ask.node, self._timeout)
                try:
                    replies = converse(link, ask.commands, ask.packed)
                except (RedisError, OSError) as error:
                    link.disconnect()
                    # One that lay idle while the server was restarted says nothing about the server.
                    if fresh or ask.write or isinstance(error, RedisTimeoutError | TimeoutError):
                        raise unreachable(ask.node, error, sent=True) from error
                    self.discard(ask.node)
                    continue
                self._give(ask.node, link)
                return replies
        finally:
            room.put(None)

    def _take(self, ask: Ask) -> Link | None:
        if self._closed:
            raise StoreUnavailable("the Redis store is closed")
        while True:
            with self._lock:
                idle = self._idle.get(ask.node)
                if not idle:
                    return None
                link = idle.pop()
            # Before a write, which cannot be tried twice: is it still open?
            if not ask.write or not _is_dead(link):
                return link
            link.disconnect()

    def _give(self, node: Node, link: Link) -> None:
        with self._lock:
            if not self._closed and self._router.knows(node):
                self._idle.setdefault(node, []).append(link)
                return
        link.disconnect()

    def once(self, link: Link, node: Node, *commands: Command) -> list[Any]:
        """Send commands over a connection of one's own. Raises `Unreachable`."""
        try:
            return converse(link, commands)
        except (RedisError, OSError) as error:
            raise unreachable(node, error, sent=True) from error

    def _prune(self) -> None:
        for node in [node for node in list(self._idle) if not self._router.knows(node)]:
            self.discard(node)

    def discard(self, node: Node | None = None) -> None:
        """Close what is idle: of one node, or everything."""
        with self._lock:
            nodes = list(self._idle) if node is None else [node]
            links = [link for node in nodes for link in self._idle.pop(node, [])]
        for link in links:
            link.disconnect()

    def close(self) -> None:
        """Close for good."""
        self._closed = True
        self.discard()

    def before_fork(self) -> None:
        """Keep other threads from being in the middle of a change."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child without its parent's connections (redis-py closes, and does not shut down, in a child)."""
        if not child:
            self._lock.release()
            return
        links = [link for idle in self._idle.values() for link in idle]
        self._reset()
        for link in links:
            link.disconnect()


def _is_dead(link: Link) -> bool:
    try:
        return link.can_read(timeout=0)  # nothing is due: what can be read is the end
    except (RedisError, OSError):
        return True


class _AsyncLink(Protocol):
    """The part of redis-py's asyncio connection that is used."""

    # Any: redis-py's own words
    async def connect(self) -> None: ...
    async def disconnect(self, nowait: bool = ...) -> None: ...
    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]: ...
    async def send_packed_command(self, command: list[bytes], check_health: bool = ...) -> None: ...
    async def read_response(self) -> Any: ...


class _Loop:
    """The connections of one event loop."""

    def __init__(self, connections: int) -> None:
        self.room = asyncio.Semaphore(connections)
        self.idle: dict[Node, list[_AsyncLink]] = {}
        self.guard: AsyncGenerator[None, None] | None = None

    async def discard(self, node: Node | None = None) -> None:
        nodes = list(self.idle) if node is None else [node]
        for link in [link for node in nodes for link in self.idle.pop(node, [])]:
            await _hang_up(link)


class AsyncWire:
    """Carries steps out for event loops, each with connections of its own. See `Wire`.

    A loop's connections are closed with it: ``loop.shutdown_asyncgens``, which `asyncio.run` and all servers
    call, ends the generator that guards them. Fork: the child leaves its parent's alone, whose loop it shares.
    """

    def __init__(self, place: Place, router: Router) -> None:
        self._place = place
        self._router = router
        self._closed = False
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        hold_across_fork(self)

    async def drive(self, steps: Steps[_T]) -> _T:
        """See `Wire.drive`."""
        try:
            ask = next(steps)
            while True:
                try:
                    replies = await self._exchange(ask)
                except Unreachable as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(replies)
        except StopIteration as stop:
            return cast("_T", stop.value)

    async def _exchange(self, ask: Ask) -> list[Any]:
        if self._closed:
            raise StoreUnavailable("the Redis store is closed")
        mine = self._loops.get(asyncio.get_running_loop()) or await self._open()
        try:
            # One bound for waiting, connecting, sending and reading: redis-py would make a task for each.
            async with asyncio.timeout(self._place.timeout), mine.room:
                return await self._ask(mine, ask)
        except TimeoutError as error:
            raise unreachable(ask.node, error, sent=True) from error

    async def _ask(self, mine: _Loop, ask: Ask) -> list[Any]:
        while True:
            idle = mine.idle.get(ask.node)
            fresh = not idle
            link = idle.pop() if idle else self._link(ask.node)
            done = False
            try:
                if fresh:
                    for other in [other for other in list(mine.idle) if not self._router.knows(other)]:
                        await mine.discard(other)
                    await link.connect()
                replies = await _converse(link, ask.commands, ask.packed)
                done = True
            except (RedisError, OSError) as error:
                if isinstance(error, TimeoutError) or fresh:
                    raise unreachable(ask.node, error, sent=True) from error
                await mine.discard(ask.node)
                continue
            finally:
                if not done:
                    await _hang_up(link)
            if self._closed or not self._router.knows(ask.node):
                await _hang_up(link)
            else:
                mine.idle.setdefault(ask.node, []).append(link)
            return replies

    def _link(self, node: Node) -> _AsyncLink:
        kind = async_connection.SSLConnection if self._place.tls else async_connection.Connection
        made = kind(
            **self._place.settings(node),
            socket_timeout=None,
            socket_connect_timeout=self._place.timeout,
            retry=AsyncRetry(NoBackoff(), 0),
        )
        return cast("_AsyncLink", made)

    async def _open(self) -> _Loop:
        loop = asyncio.get_running_loop()
        mine = self._loops[loop] = _Loop(self._place.connections)
        mine.guard = self._guarding(loop, mine)
        await anext(mine.guard)
        return mine

    async def _guarding(self, loop: asyncio.AbstractEventLoop, mine: _Loop) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._loops.pop(loop, None)
            await mine.discard()

    async def aclose(self) -> None:
        """Close for good. Connections of other loops are closed with those."""
        self._closed = True
        mine = self._loops.get(asyncio.get_running_loop())
        if mine is not None and mine.guard is not None:
            await mine.guard.aclose()

    def before_fork(self) -> None:
        """Do nothing: a loop's connections are its thread's alone."""

    def after_fork(self, *, child: bool) -> None:
        """Leave the parent's connections alone: closing them here would take them out of its loop's selector."""
        if child:
            _abandoned.append(self._loops)
            self._loops = {}


_abandoned: list[object] = []  # never finalized


async def _converse(link: _AsyncLink, commands: Iterable[Command], packed: bytes | None) -> list[Any]:
    if packed is not None:
        exchanged = await _async_exchanged(link, packed)
        if exchanged is not None:
            return [exchanged.reply]
    await link.send_packed_command(link.pack_commands(commands))
    replies = []
    for _ in commands:
        try:
            replies.append(await link.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


async def _async_exchanged(link: _AsyncLink, packed: bytes) -> Exchange | None:
    """See `_exchanged`. The caller hangs up where this is broken off."""
    reader: asyncio.StreamReader | None = getattr(link, "_reader", None)
    writer: asyncio.StreamWriter | None = getattr(link, "_writer", None)
    if reader is None or writer is None:
        return None
    writer.write(packed)  # no drain: some 300 bytes, and the reply is waited for
    data = _more(await reader.read(_CHUNK))
    while not _is_whole(data):
        data += _more(await reader.read(_CHUNK))
    return _exchange_of(data)


async def _hang_up(link: _AsyncLink) -> None:
    with suppress(RedisError, OSError):  # it is gone already
        await link.disconnect(nowait=True)
