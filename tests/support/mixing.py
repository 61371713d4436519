"""A TCP proxy that gives the reply to one question to another one."""

from __future__ import annotations

import socket
from typing import Literal

from support.proxy import Proxy

Mixing = Literal["pass", "swap", "repeat", "late"]


class MixingProxy(Proxy):
    """Forwards to a port of the loopback, and mixes up what the server says.

    ``"swap"`` holds a reply until another connection has one too, and gives each the other's; ``"repeat"`` gives what
    the server said before, on whichever connection; ``"late"`` what it said before on the same one. A chunk of bytes
    is a reply: those of the tests are short, and each connection has one question under way.
    """

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.mixing: Mixing = "pass"
        self.mixed = 0
        self._held: tuple[socket.socket, bytes] | None = None
        self._said: dict[socket.socket | None, bytes] = {}

    def mix(self, how: Mixing) -> None:
        """Behave so from now on. What was held is forgotten."""
        self.mixing = how
        self._held = None

    def _pass_on(self, source: socket.socket, data: bytes) -> None:
        if source not in self._servers:
            self._peers[source].sendall(data)
            return
        how = self.mixing
        before = self._said.get(source if how == "late" else None)
        self._said[source] = self._said[None] = data
        if how == "swap":
            self._swap(source, data)
        elif how == "pass" or before is None or before == data:
            self._peers[source].sendall(data)
        else:
            self.mixed += 1
            self._peers[source].sendall(before)

    def _swap(self, source: socket.socket, data: bytes) -> None:
        held, self._held = self._held, (source, data)
        if held is None or held[0] is source or held[0] not in self._peers:
            return
        self._held = None
        self.mixed += 1
        self._peers[source].sendall(held[1])
        self._peers[held[0]].sendall(data)
