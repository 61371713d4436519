"""Real HTTP servers over the example apps, each a process of its own on a free port of the loopback."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from . import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
APPS = Path(__file__).resolve().parent
START_SECONDS = 60.0

COMMANDS: Mapping[str, Callable[[str, int], list[str]]] = {
    "uvicorn": lambda app, port: ["uvicorn", app, f"--port={port}"],
    "granian": lambda app, port: ["granian", app, "--interface=asgi", f"--port={port}"],
    "hypercorn": lambda app, port: ["hypercorn", app, f"--bind=127.0.0.1:{port}"],
    # Below a root path, each by its own option.
    "uvicorn-api": lambda app, port: ["uvicorn", app, f"--port={port}", "--root-path=/api"],
    "uvicorn-api-slash": lambda app, port: ["uvicorn", app, f"--port={port}", "--root-path=/api/"],
    "hypercorn-api": lambda app, port: ["hypercorn", app, f"--bind=127.0.0.1:{port}", "--root-path=/api"],
    "granian-api": lambda app, port: [
        *("granian", app, "--interface=asgi", f"--port={port}", "--url-path-prefix=/api")
    ],
    "daphne-api": lambda app, port: ["daphne", f"--port={port}", "--root-path=/api", app],
    "hypercorn-trio": lambda app, port: ["hypercorn", app, f"--bind=127.0.0.1:{port}", "--worker-class=trio"],
    "gunicorn": lambda app, port: ["gunicorn", app, f"--bind=127.0.0.1:{port}", "--workers=2"],
    # The app, its store and its watcher are there before the fork.
    "gunicorn-preload": lambda app, port: [
        *("gunicorn", app, f"--bind=127.0.0.1:{port}", "--workers=2", "--threads=2", "--preload")
    ],
    # Of the tests of usage: several workers, recycled and killed.
    "uvicorn-workers": lambda app, port: ["uvicorn", app, f"--port={port}", "--workers=2"],
    "uvicorn-reload": lambda app, port: ["uvicorn", app, f"--port={port}", "--reload"],
    "gunicorn-threads": lambda app, port: [
        *("gunicorn", app, f"--bind=127.0.0.1:{port}", "--workers=2", "--threads=4", "--max-requests=1000")
    ],
    "gunicorn-gthread": lambda app, port: ["gunicorn", app, f"--bind=127.0.0.1:{port}", "--threads=4"],
    "granian-workers": lambda app, port: [
        *("granian", app, "--interface=asgi", f"--port={port}", "--workers=2", "--respawn-failed-workers")
    ],
    "granian-wsgi-workers": lambda app, port: [
        *("granian", app, "--interface=wsgi", f"--port={port}", "--workers=2", "--respawn-failed-workers")
    ],
    "gunicorn-gevent": lambda app, port: [
        *("gunicorn", app, f"--bind=127.0.0.1:{port}", "--workers=2", "--worker-class=gevent")
    ],
    "gunicorn-gevent-preload": lambda app, port: [
        *("gunicorn", app, f"--bind=127.0.0.1:{port}", "--workers=2", "--worker-class=gevent", "--preload")
    ],
    # All its options are the defaults: it forks in C, and runs Python's *after* hooks alone.
    "uwsgi-workers": lambda app, port: ["plain_servers", "uwsgi-workers", app, str(port)],
    "daphne": lambda app, port: ["daphne", f"--port={port}", app],
    "waitress": lambda app, port: ["waitress", f"--listen=127.0.0.1:{port}", app],
    "granian-wsgi": lambda app, port: ["granian", app, "--interface=wsgi", f"--port={port}"],
    "waitress-root": lambda app, port: ["waitress", f"--listen=127.0.0.1:{port}", "--url-prefix=/api", app],
    "wsgiref": lambda app, port: ["plain_servers", "wsgiref", app, str(port)],
    "werkzeug": lambda app, port: ["plain_servers", "werkzeug", app, str(port)],
    "uwsgi": lambda app, port: ["plain_servers", "uwsgi", app, str(port)],
}
ASGI = ("uvicorn", "granian", "hypercorn")
WSGI = ("gunicorn", "gunicorn-preload", "waitress", "granian-wsgi")


class Server(NamedTuple):
    """A server under way, and where its words go."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, headers: Mapping[str, str], path: str = "/contracts") -> tuple[int, bytes]:
        """Make one request on a connection of its own, so that any worker may answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers=dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def free_port() -> int:
    """Return a port that is free, as is the one 10,000 above it, which is a Redis Cluster's bus.

    Both are below those that the kernel gives to connections, which other workers' tests open by the thousand.
    """
    while True:
        port = 10_000 + secrets.randbelow(10_000)  # Hypothesis gives `random` the same seed in every worker
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            return port


@contextmanager
def serving(
    name: str,
    environ: Mapping[str, str],
    folder: Path,
    app: str | None = None,
    *,
    options: Sequence[str] = (),
    ready: str = "/healthz",
) -> Iterator[Server]:
    """Start a server with more ``options``, wait until it answers at ``ready``, and stop it."""
    port = free_port()
    app = app or ("asgi_app:app" if name in ASGI else "wsgi_app:app")
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            run.bound([sys.executable, "-m", *COMMANDS[name](app, port), *options]),
            env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, APPS, folder)))},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be stopped with it
        )
    server = Server(process, port, log)
    try:
        wait_until(lambda: _answers(server, ready), START_SECONDS, what=f"{name} to answer: {log}")
        yield server
    finally:
        stop(process, STOPS.get(name, signal.SIGTERM))


STOPS = {"uwsgi-workers": signal.SIGINT}  # which reloads on SIGTERM


def stop(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
    """Ask a server to stop, make sure that it and its workers did, and give its exit code."""
    process.send_signal(number)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def wait_for_workers(server: Server, started: int) -> None:
    """Wait until workers have started: else a SIGTERM is lost to them, and `stop` has to kill them, 20 s later.

    Granian logs how many have ``started`` in all. Gunicorn's two are ready once they handle SIGABRT; no master does.
    """
    log = server.log.read_bytes()
    if b"granian" in log:
        wait_until(lambda: server.log.read_bytes().count(b"Started worker") >= started, 30, what="workers")
    elif b"gunicorn" in log:
        wait_until(lambda: _handles_abort(server.process.pid) == [True, True], 30, what="workers")


def workers(process: int) -> list[int]:
    """Give the processes a server serves from: those that live, of which one may end before it is looked at."""
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    commands = {int(word): _command(int(word)) for word in listed.stdout.split()}
    return [pid for pid, command in commands.items() if command and b"resource_tracker" not in command]


def _command(pid: int) -> bytes:
    """Give what a process was started with; nothing for one that is gone, or dead and not yet buried."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _handles_abort(master: int) -> list[bool]:
    """Tell of each worker of a gunicorn whether it handles SIGABRT."""
    found = []
    for worker in workers(master):
        with suppress(FileNotFoundError, ProcessLookupError):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines()
            )
            found.append(bool(int(status["SigCgt"], 16) >> (signal.SIGABRT - 1) & 1))
    return found


def is_stopped(pid: int) -> bool:
    """Tell whether SIGSTOP has reached every thread of a process: some run on for a moment after it was sent.

    A thread that has ended runs no more either, reaped (no file) or not (state Z, then X).
    """
    return all(_state(task) in "TZX" for task in Path(f"/proc/{pid}/task").glob("*/stat"))


def _state(task: Path) -> str:
    try:
        return task.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def wait_until(condition: Callable[[], bool], seconds: float, *, what: str | Callable[[], str]) -> None:
    """Look for a condition until it holds; fail the test where it does not in time, saying what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.01)


def _answers(server: Server, ready: str) -> bool:
    if server.process.poll() is not None:
        raise AssertionError(f"the server ended: {server.log.read_text()}")
    try:
        return server.get({}, ready)[0] == 200
    except OSError:
        return False
