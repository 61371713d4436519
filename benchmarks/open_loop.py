"""A client in open loop: requests leave at times drawn beforehand, whether or not earlier ones were answered.

    python -m benchmarks.open_loop PORT VALID_KEY|forged|foreign|@FILE [CONNECTIONS]

``@FILE`` has a key a line, each of which is sent once.
A latency runs from the time drawn, so that one which had to wait for a connection counts its waiting. Each line of
standard input, ``rate seconds``, is a window; its latencies in microseconds are answered as a line of JSON, with what
the answers' statuses were.
"""

from __future__ import annotations

import json
import random
import re
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final, Self

CONNECTIONS: Final = 16
PATIENCE: Final = 10.0
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Exchange:
    """One connection: what it asked, and what has come back so far."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self._got = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def ask(self, key: bytes, due: float) -> None:
        self.due, self._got = due, b""
        self.socket.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\nX-API-KEY: " + key + b"\r\n\r\n")

    def status(self) -> bytes | None:
        """Read on; give the answer's status once it is whole."""
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("the server closed a connection in the middle")
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or length is None or len(body) < int(length[1]):
            return None
        return head[9:12]


def window(
    exchanges: Sequence[Exchange], keys: Sequence[bytes], times: Sequence[float]
) -> tuple[list[float], Counter[str]]:
    """Send a request at each time (seconds from now); give the latencies in microseconds and the statuses."""
    idle, busy = list(exchanges), set[Exchange]()
    begin = time.perf_counter()
    waiting = deque((begin + at, key) for at, key in zip(times, keys, strict=True))
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    while waiting or busy:
        now = time.perf_counter()
        while waiting and idle and waiting[0][0] <= now:
            due, key = waiting.popleft()
            exchange = idle.pop()
            exchange.ask(key, due)
            busy.add(exchange)
        pause = max(0.0, waiting[0][0] - time.perf_counter()) if waiting and idle else PATIENCE
        # Not a selector of the system's own: epoll waits in whole milliseconds.
        for exchange in select.select(list(busy), [], [], pause)[0]:
            status = exchange.status()
            if status is not None:
                latencies.append((time.perf_counter() - exchange.due) * 1e6)
                statuses[status.decode("ascii")] += 1
                busy.discard(exchange)
                idle.append(exchange)
    return latencies, statuses


def poisson(rate: float, seconds: float) -> list[float]:
    """Draw arrivals."""
    found, at = [], 0.0
    while rate and (at := at + random.expovariate(rate)) < seconds:
        found.append(at)
    return found


class Client:
    """Such a process, seen from outside."""

    def __init__(self, port: int, key: str, connections: int = CONNECTIONS) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.open_loop", str(port), key, str(connections)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, rate: float, seconds: float) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the client has no standard input")
        self._process.stdin.write(f"{rate} {seconds}\n")
        self._process.stdin.flush()

    def end(self, status: str) -> list[float]:
        """Give the latencies, once the window is over. Raises where an answer had another status."""
        latencies, statuses = self.result()
        if set(statuses) - {status}:
            raise RuntimeError(f"answers with {status} were expected: {statuses}")
        return latencies

    def result(self) -> tuple[list[float], Counter[str]]:
        """Return the latencies and how often each status was answered, once the window is over."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        found: dict[str, Any] = json.loads(line)
        return [float(each) for each in found["latencies"]], Counter(found["statuses"])


def source(key: str) -> Callable[[], bytes]:
    """Return what gives the next key to send."""
    from .subjects import foreign, forged

    if key.startswith("@"):
        return iter(Path(key[1:]).read_bytes().split()).__next__
    makers: dict[str, Callable[[], bytes]] = {"forged": forged, "foreign": foreign}
    return makers.get(key, key.encode)


def main(port: int, key: str, connections: int) -> None:
    next_key = source(key)
    for line in sys.stdin:
        rate, seconds = map(float, line.split())
        times = poisson(rate, seconds)
        keys = [next_key() for _ in times]
        with ExitStack() as stack:  # anew each time: servers close what was idle for seconds
            exchanges = [stack.enter_context(closing(Exchange(port))) for _ in range(connections)]
            latencies, statuses = window(exchanges, keys, times)
        print(
            json.dumps({"latencies": [round(each) for each in latencies], "statuses": statuses}), flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
