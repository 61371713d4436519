"""How often a call waits for a server: counted by a proxy between, at each turn of the conversation."""

from __future__ import annotations

import socket

from support.proxy import Proxy


class Counting(Proxy):
    """Forwards, and counts how often a client spoke after the server had: the round trips of one connection."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.turns = 0
        self._asking = False

    def _forward(self, source: socket.socket) -> None:
        asks = source.getsockname()[1] == self.port  # what we accepted; the other end is one we opened
        self.turns += asks and not self._asking
        self._asking = asks
        super()._forward(source)
