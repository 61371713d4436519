"""A TCP proxy that misbehaves when told to: between an app and its store, in the test's own process."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Literal, Self

Mode = Literal["pass", "blackhole", "mute", "refuse", "half-close"]


class Proxy:
    """Forwards to a port of the loopback. One thread serves all connections.

    ``"blackhole"`` swallows whatever comes, in both directions, and accepts new connections all the same;
    ``"mute"`` hands requests on and swallows the answers: what was asked for is done, and nobody is told;
    ``"refuse"`` ends what is open and what comes; ``"half-close"`` ends the sending side of each open connection.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._mode: Mode = "pass"
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._orders, self._commands = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._orders, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._changed = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.sendall(b"q")
        self._thread.join(10)
        for end in (*self._peers, self._listener, self._orders, self._commands):
            end.close()
        self._selector.close()

    def turn(self, mode: Mode) -> None:
        """Behave so from now on: when this returns, it does."""
        self._changed.clear()
        self._mode = mode
        self._commands.sendall(b"m")
        if not self._changed.wait(10):
            raise AssertionError("the proxy's thread is gone")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._orders:
                    if source.recv(1) == b"q":
                        return
                    self._obey()
                elif source is self._listener:
                    self._accept()
                elif source in self._peers:
                    self._forward(source)

    def _obey(self) -> None:
        if self._mode in ("refuse", "half-close"):
            for end in list(self._peers):
                if self._mode == "refuse":
                    self._drop(end)
                else:
                    end.shutdown(socket.SHUT_WR)
        self._changed.set()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._mode == "refuse":
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.close()
            return
        self._servers.add(server)
        for end, other in ((client, server), (server, client)):
            self._peers[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        try:
            data = source.recv(65_536)
        except OSError:
            data = b""
        if not data:
            self._drop(source)
        elif self._mode == "pass" or (self._mode == "mute" and source not in self._servers):
            try:
                self._pass_on(source, data)
            except OSError:
                self._drop(source)

    def _pass_on(self, source: socket.socket, data: bytes) -> None:
        self._peers[source].sendall(data)

    def _drop(self, end: socket.socket) -> None:
        for each in (end, self._peers.get(end)):
            if each is not None and self._peers.pop(each, None) is not None:
                self._servers.discard(each)
                self._selector.unregister(each)
                each.close()
