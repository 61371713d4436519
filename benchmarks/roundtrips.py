"""How often a call waits for a server: counted by a proxy between, at each turn of the conversation."""

from __future__ import annotations

import socket
from collections import Counter

from support.proxy import Proxy


class Counting(Proxy):
    """Forwards, and counts for each connection how often the client spoke after the server had: its round trips."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.turns: Counter[int] = Counter()  # by the client's port
        self._asking: set[int] = set()

    def _forward(self, source: socket.socket) -> None:
        asks = source.getsockname()[1] == self.port  # what we accepted; the other end is one we opened
        client = (source if asks else self._peers[source]).getpeername()[1]
        if not asks:
            self._asking.discard(client)
        elif client not in self._asking:
            self._asking.add(client)
            self.turns[client] += 1
        super()._forward(source)
