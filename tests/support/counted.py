"""Calls with names of their own, driven at a real server, and held against the events that were stored.

What is compared: a call is *answered* when its client has read the whole answer, *unanswered* when it was sent and
the connection broke before that. Each call has a request id, which its event carries. Then

- lost: answered calls without an event; doubled: request ids with two events; wrong: events with another key or
  status than the client saw;
- an event of an unanswered call may exist or not (it is in the spool before the answer begins); an event that belongs
  to no call at all is invented.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from papaours_auth import Keys, open_store
from papaours_auth.digest import new_pepper, parse_peppers
from papaours_auth.usage import Recorder
from papaours_auth.usage.sqlite import SQLiteSink

from .servers import wait_until, workers

THREADS = 4
STATUSES = (200, 200, 200, 404, 500)
WAIT = 60.0


class Client(NamedTuple):
    key_id: str
    text: str


class House:
    """A store with two keys that work and one that is disabled, and the folder the counted app works in."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder / "counted"
        self.folder.mkdir()
        self.spool = folder / "spool"
        self.usage = self.folder / "usage.db"
        pepper, url = new_pepper(), url or f"sqlite:///{folder / 'keys.db'}"
        self.environ = {
            "PAPAOURS_STORE": url,
            "PAPAOURS_PEPPER": pepper,
            "COUNTED": str(self.folder),
            "SPOOL": str(self.spool),
            "SEGMENT": str(256 << 10),
        }
        with Keys(open_store(url, create=True), peppers=parse_peppers(pepper)) as keys:
            machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
            made = [
                keys.create_key(machine.id, name=f"Production - {name}", environment="prod")
                for name in ("Facturation", "Export", "Ancienne")
            ]
            keys.disable_key(made[2].key.id)
        self.clients = [Client(new.key.id, new.secret.reveal()) for new in made]

    def door(self, name: str, *, spool: bool = True) -> Mapping[str, str]:
        """Give the environment of a server."""
        wsgi = name.startswith(("gunicorn", "uwsgi", "waitress", "granian-wsgi"))
        return {**self.environ, "DOOR": "wsgi" if wsgi else "asgi", "SPOOL": str(self.spool) if spool else ""}

    def drain(self) -> None:
        """Deliver what dead processes left, as the next server would. A worker may take its time to die."""
        with Recorder(SQLiteSink(self.usage), spool=self.spool, interval=3600, segment_bytes=8192) as heir:
            heir.start()
            wait_until(
                lambda: heir.flush() and not self._left(heir.producer),
                WAIT,
                what=lambda: f"the spool to be empty of {self._left(heir.producer)}: {heir.stats()}",
            )
            assert not heir.health().error

    def _left(self, heir: str) -> list[str]:
        return [path.name for path in self.spool.iterdir() if not path.name.startswith(heir)]

    def stored(self) -> list[tuple[str, str, int]]:
        with closing(sqlite3.connect(self.usage)) as connection:
            return connection.execute("select request_id, key_id, status from usage_events").fetchall()

    def lost(self) -> int:
        """Count what the app's processes said was lost."""
        return sum(json.loads(path.read_text())["lost"] for path in self.folder.glob("*.json"))

    @contextmanager
    def sink_down(self, seconds: float) -> Iterator[None]:
        """Lock the sink's file, and keep it locked for at least so long."""
        with closing(sqlite3.connect(self.usage, isolation_level=None, timeout=WAIT)) as connection:
            connection.execute("begin immediate")
            until = time.monotonic() + seconds
            yield
            time.sleep(max(0.0, until - time.monotonic()))  # a fault's length, not synchronization
            connection.execute("rollback")

    def a_reply_was_lost(self) -> bool:
        return (self.folder / "reply-lost").exists()

    @contextmanager
    def order(self, name: str) -> Iterator[None]:
        """Have a fault in all processes, as `counted_app` reads it."""
        (self.folder / name).touch()
        yield
        (self.folder / name).unlink()


class Verdict(NamedTuple):
    lost: int
    doubled: int
    wrong: int
    invented: int


class Load:
    """Clients that call, and remember what became of each call. Where they call may change under them."""

    def __init__(self, clients: list[Client]) -> None:
        self.port = 0
        self.given_up = False
        self.answered: dict[str, tuple[str, int]] = {}
        self.unanswered: dict[str, str] = {}
        self._clients = clients
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []

    def drive(self, calls: int) -> None:
        """Make so many calls from several threads, and wait for them."""
        with self.driving(calls):
            pass

    @contextmanager
    def driving(self, calls: int) -> Iterator[None]:
        """Make so many calls while the caller does something else."""
        share = max(1, calls // THREADS)
        self._threads = [threading.Thread(target=_Caller(self, share).run) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException:
            self.given_up = True  # or they would call a server that is gone, into the next test
            raise
        finally:
            for thread in self._threads:
                thread.join()

    def wait_for(self, calls: int) -> None:
        """Wait until so many more calls are answered, or all are made."""
        wanted = len(self.answered) + calls
        wait_until(
            lambda: len(self.answered) >= wanted or not any(thread.is_alive() for thread in self._threads),
            WAIT,
            what="calls",
        )

    def next(self) -> tuple[str, Client, int]:
        number = next(self._numbers)
        return f"r-{number}", self._clients[number % len(self._clients)], STATUSES[number % len(STATUSES)]

    def judge(self, stored: list[tuple[str, str, int]]) -> Verdict:
        seen = Counter(request for request, _, _ in stored)
        events = {request: (key, status) for request, key, status in stored}
        return Verdict(
            lost=sum(request not in events for request in self.answered),
            doubled=sum(count - 1 for count in seen.values()),
            wrong=sum(events[request] != seen for request, seen in self.answered.items() if request in events)
            + sum(events[request][0] != key for request, key in self.unanswered.items() if request in events),
            invented=sum(
                request not in self.answered and request not in self.unanswered for request in events
            ),
        )


class _Caller:
    """One client with its connection."""

    def __init__(self, load: Load, calls: int) -> None:
        self._load, self._calls = load, calls
        self._socket: socket.socket | None = None

    def run(self) -> None:
        for _ in range(self._calls):
            connection = self._socket or self._connect()
            if connection is None:
                return
            request, client, status = self._load.next()
            text = (
                f"GET /s/{status} HTTP/1.1\r\nHost: localhost\r\nX-API-KEY: {client.text}\r\n"
                f"X-Request-Id: {request}\r\n\r\n"
            )
            try:
                connection.sendall(text.encode())
                answer, stays = _read_answer(connection)
            except (OSError, ValueError):
                self._load.unanswered[request] = client.key_id
                stays = False
            else:
                self._load.answered[request] = (client.key_id, answer)
            self._socket = connection
            if not stays:
                self._socket = None
                connection.close()
        if self._socket is not None:
            self._socket.close()

    def _connect(self) -> socket.socket | None:
        deadline = time.monotonic() + WAIT
        while not self._load.given_up:
            try:
                return socket.create_connection(("127.0.0.1", self._load.port), timeout=WAIT)
            except OSError:  # no call: nothing was sent
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return None


def _read_answer(connection: socket.socket) -> tuple[int, bool]:
    """Read a whole answer. Gives its status, and whether the connection stays. Raises where it breaks off."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    while len(body) < length:
        body += _some(connection)
    return int(head[9:12]), b"connection: close" not in lines


def _some(connection: socket.socket) -> bytes:
    # Some servers send head and body apart, without TCP_NODELAY: 40 ms a call, were this not said.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    received = connection.recv(65536)
    if not received:
        raise ValueError("the answer breaks off")
    return received


def signal_a_worker(process: int, number: signal.Signals) -> None:
    """End one of a server's workers by a signal, and wait until it is gone. Others may end by themselves."""
    ended = 0

    def signalled() -> bool:
        nonlocal ended
        for ended in workers(process)[:1]:
            with suppress(ProcessLookupError):
                os.kill(ended, number)
                return True
        return False  # between two workers

    wait_until(signalled, WAIT, what="a worker")
    wait_until(lambda: ended not in workers(process), WAIT, what=f"worker {ended} to end")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Give a folder on a disk of 1 MB, where this user may mount one; else it is full when it is told to be."""
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Leave no room on a disk; on one that is not small, a file says that there is none."""
    filler = folder / "filler"
    if not folder.is_mount():
        yield
        return
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    yield
    filler.unlink()
