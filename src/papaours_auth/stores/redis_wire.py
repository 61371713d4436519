"""How steps are carried out: connections, blocking and for event loops, which differ by waiting.

redis-py's connections are used without its clients and pools: those retry for seconds, raise when a pool is empty,
and take longer than our script.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from queue import Empty
from socket import socket
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

import redis.asyncio.connection as async_connection
import redis.connection as sync_connection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .._fork import hold_across_fork, in_own_process, notice_fork
from .._locks import Room
from .._patience import Bound, Patience
from ..exceptions import Overloaded, StoreUnavailable
from .redis_place import Node, Place
from .redis_router import WORD, Ask, Command, Router, Steps, Stray, Unreachable, refused

_T = TypeVar("_T")
_CHUNK: Final = 65536


def unreachable(node: Node, error: Exception, *, sent: bool, own_timer: bool = False) -> Unreachable:
    """Say of an error of redis-py's what it means. ``own_timer``: one on the event loop, not the socket's."""
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
    made.own_timer = own_timer
    return made


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


def converse(link: Link, commands: Iterable[Command]) -> list[Any]:
    """Send commands and read a reply for each. Error replies are among them, not raised."""
    link.send_packed_command(link.pack_commands(commands))
    replies = []
    for _ in commands:
        try:
            replies.append(link.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


# Each question bears a random word, and no reply is believed that does not bring it back: a process that was forked
# may share the connection, or a proxy mix replies up.

_WORD_LENGTH: Final = 8


def _bearing(commands: Sequence[Command], word: bytes) -> list[Command]:
    """Put the word into the commands that give it back, or else a command behind them that does."""
    if len(commands) == 1 and commands[0][-1] is WORD:  # a lookup on Cluster
        return [(*commands[0][:-1], word)]
    given = [(*command[:-1], word) if command[-1] is WORD else command for command in commands]
    return given if any(command[-1] is WORD for command in commands) else [*given, ("PING", word)]


def _checked(ask: Ask, replies: list[Any], word: bytes) -> list[Any]:
    """Take the word out of the replies. Raises `Stray` where it is another; an error bears none, and is no answer.

    A Sentinel before Redis 7 takes no word (PING is all it has). It says who is asked next, not who comes in.
    """
    commands = ask.commands
    if len(replies) == 1 and commands[0][-1] is WORD and not isinstance(replies[0], ResponseError):
        return [_without(word, replies[0])]
    if len(replies) > len(commands):
        last = replies.pop()
        if isinstance(last, ResponseError):
            if not ask.node.sentinel and not any(isinstance(reply, ResponseError) for reply in replies):
                raise refused(last)
        elif last != word:
            raise _stray()
    return [
        reply if command[-1] is not WORD or isinstance(reply, ResponseError) else _without(word, reply)
        for command, reply in zip(commands, replies, strict=True)
    ]


def _without(word: bytes, reply: Any) -> Any:  # Any: a list, or a string
    if isinstance(reply, list) and reply[:1] == [word]:
        return reply[1:]
    if isinstance(reply, bytes) and reply[:_WORD_LENGTH] == word:
        return reply[_WORD_LENGTH:]
    raise _stray()


def _stray() -> Stray:
    return Stray(
        "Redis gave the answer to another question, so its connections are closed: does anything share them, a "
        "process that was forked or a proxy?"
    )


# The short way: one command and its reply, a string, past redis-py, whose own takes 12 µs more (of 33).


def _exchanged(link: Link, packed: bytes) -> bytes | None:
    """Send a command, all but its last word, which is `WORD`, and read its reply from the connection's own socket.

    None for an error: then ask by steps. Raises `Stray` for any other reply but a string that begins with the word.
    """
    sock: socket | None = getattr(link, "_sock", None)  # there is no public way to it
    if sock is None:
        return None
    word = os.urandom(_WORD_LENGTH)
    try:
        sock.sendall(b"%b$8\r\n%b\r\n" % (packed, word))
        data = _more(sock.recv(_CHUNK))
        while (found := _string_in(data)) is _PART:
            data += _more(sock.recv(_CHUNK))
        return None if found is None else _without(word, found)
    except BaseException:
        link.disconnect()  # half a reply may be in it, or another's
        raise


def _more(data: bytes) -> bytes:
    if not data:
        raise ConnectionResetError
    return data


_PART: Final = b"a part of a reply"  # told from a string by its identity


def _string_in(data: bytes) -> bytes | None:
    """Give the string that a reply is, None where it is an error, `_PART` where more of it is to come.

    A string's length is told first (RESP 2); an error is one line. Raises `Stray` for what is neither, or for more.
    """
    head, ended, rest = data.partition(b"\r\n")
    if not ended and head[:1] in b"$-":
        return _PART
    if head.startswith(b"-") and not rest:
        return None
    if not head.startswith(b"$") or not head[1:].isdigit():
        raise _stray()
    left = int(head[1:]) + 2 - len(rest)
    if left < 0:
        raise _stray()
    return rest[:-2] if left == 0 else _PART


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
        self._room = Room(self._place.connections)
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

    def exchange(self, node: Node, packed: bytes) -> bytes | None:
        """Have a command answered by a string, the short way; None where that cannot be: then ask by steps.

        ``packed`` lacks its last word, `WORD`. Raises `Unreachable` where the node does not answer in time; `Stray`.
        """
        if not in_own_process():
            notice_fork()
        room, idle = self._room.now(), self._idle.get(node)
        if not idle:
            return None
        try:
            room.get(block=False)
        except Empty:  # as many as may be are in use, and by steps one can wait
            return None
        try:
            link = idle.pop()
            found = _exchanged(link, packed)
        except IndexError:  # another thread was faster
            return None
        except TimeoutError as error:
            raise unreachable(node, error, sent=True) from error
        except (RedisError, OSError):  # it lay idle while the server was restarted: the others did too
            self.discard(node)
            return None
        except Stray:  # what was forked with one connection has them all
            self.discard(node)
            raise
        finally:
            room.put(None)
        self._give(node, link)
        return found

    def _exchange(self, ask: Ask) -> list[Any]:
        notice_fork()
        room = self._room.now()
        try:
            room.get(timeout=self._timeout)
        except Empty:
            raise _all_in_use() from None
        try:
            while True:
                link = self._take(ask)
                fresh = link is None
                if link is None:
                    self._prune()
                    link = connect(self._place, ask.node, self._timeout)
                try:
                    word = os.urandom(_WORD_LENGTH)
                    replies = converse(link, _bearing(ask.commands, word))
                except (RedisError, OSError) as error:
                    link.disconnect()
                    # One that lay idle while the server was restarted says nothing about the server.
                    if fresh or ask.write or isinstance(error, RedisTimeoutError | TimeoutError):
                        raise unreachable(ask.node, error, sent=True) from error
                    self.discard(ask.node)
                    continue
                try:
                    replies = _checked(ask, replies, word)
                except StoreUnavailable:
                    link.disconnect()
                    self.discard(ask.node)
                    raise
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


def _all_in_use() -> Overloaded:
    return Overloaded("all connections to Redis are in use: see connections= and timeout=")


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

    def __init__(self, connections: int, timeout: float) -> None:
        self.room = asyncio.Semaphore(connections)
        self.idle: dict[Node, list[_AsyncLink]] = {}
        self.guard: AsyncGenerator[None, None] | None = None
        self.patience = Patience(timeout)

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

    async def exchange(self, node: Node, packed: bytes) -> bytes | None:
        """See `Wire.exchange`."""
        if not in_own_process():
            notice_fork()
        mine = self._loops.get(asyncio.get_running_loop())
        if mine is None or not (idle := mine.idle.get(node)) or mine.room.locked():
            return None
        await mine.room.acquire()  # does not wait; `async with` makes coroutines that take 3 µs after a wait
        link = idle.pop()
        done = False
        try:
            found = await _async_exchanged(mine, link, packed)
            done = True
        except TimeoutError as error:
            raise unreachable(node, error, sent=True, own_timer=True) from error
        except (RedisError, OSError):
            await mine.discard(node)
            return None
        except Stray:
            await mine.discard(node)
            raise
        finally:
            mine.room.release()
            if not (done and self._kept(mine, node, link)):
                await _hang_up(link)
        return found

    def _kept(self, mine: _Loop, node: Node, link: _AsyncLink) -> bool:
        """Keep a connection for the next lookup, if it is worth that."""
        if self._closed or not self._router.knows(node):
            return False
        mine.idle.setdefault(node, []).append(link)
        return True

    async def _exchange(self, ask: Ask) -> list[Any]:
        notice_fork()
        if self._closed:
            raise StoreUnavailable("the Redis store is closed")
        mine = self._loops.get(asyncio.get_running_loop()) or await self._open()
        try:
            # One bound for waiting, connecting, sending and reading: redis-py would make a task for each.
            with mine.patience.bound() as bound:
                await _enter(mine.room, bound)
                try:
                    return await self._ask(mine, ask)
                finally:
                    mine.room.release()
        except TimeoutError as error:
            raise unreachable(ask.node, error, sent=True, own_timer=True) from error

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
                word = os.urandom(_WORD_LENGTH)
                replies = await _converse(link, _bearing(ask.commands, word))
                replies = _checked(ask, replies, word)
                done = True
            except Stray:
                await mine.discard(ask.node)
                raise
            except (RedisError, OSError) as error:
                if isinstance(error, TimeoutError) or fresh:
                    raise unreachable(
                        ask.node,
                        error,
                        sent=True,
                        own_timer=isinstance(error, RedisTimeoutError | TimeoutError),
                    ) from error
                await mine.discard(ask.node)
                continue
            finally:
                if not (done and self._kept(mine, ask.node, link)):
                    await _hang_up(link)
            return replies

    def _link(self, node: Node) -> _AsyncLink:
        kind = async_connection.SSLConnection if self._place.tls else async_connection.Connection
        made = kind(
            **self._place.settings(node),
            socket_timeout=None,
            socket_connect_timeout=None,  # the bound of the exchange: redis-py's would blame a stalled loop on Redis
            retry=AsyncRetry(NoBackoff(), 0),
        )
        return cast("_AsyncLink", made)

    async def _open(self) -> _Loop:
        loop = asyncio.get_running_loop()
        mine = self._loops[loop] = _Loop(self._place.connections, self._place.timeout)
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


async def _enter(room: asyncio.Semaphore, bound: Bound) -> None:
    """Wait for a connection that nobody uses."""
    try:
        await room.acquire()
    except asyncio.CancelledError:
        if bound.is_why():
            raise _all_in_use() from None
        raise


async def _converse(link: _AsyncLink, commands: Iterable[Command]) -> list[Any]:
    await link.send_packed_command(link.pack_commands(commands))
    replies = []
    for _ in commands:
        try:
            replies.append(await link.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


async def _async_exchanged(mine: _Loop, link: _AsyncLink, packed: bytes) -> bytes | None:
    """See `_exchanged`. The caller hangs up where this is broken off."""
    reader: asyncio.StreamReader | None = getattr(link, "_reader", None)
    writer: asyncio.StreamWriter | None = getattr(link, "_writer", None)
    if reader is None or writer is None:
        return None
    word = os.urandom(_WORD_LENGTH)
    with mine.patience.bound():
        writer.write(
            b"%b$8\r\n%b\r\n" % (packed, word)
        )  # no drain: some 300 bytes, and the reply is waited for
        data = _more(await reader.read(_CHUNK))
        while (found := _string_in(data)) is _PART:
            data += _more(await reader.read(_CHUNK))
    return None if found is None else _without(word, found)


async def _hang_up(link: _AsyncLink) -> None:
    with suppress(RedisError, OSError):  # it is gone already
        await link.disconnect(nowait=True)
