"""Requests a second and latencies of real servers, with and without the middleware.

Two servers with one worker each run side by side, one guarded; the load goes to one and the other in turn. The
load generator is wrk; where it is not installed, threads of Python, which are slow enough to flatter us: the
table says which.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, NamedTuple

from papaours_auth.digest import PEPPER_VARIABLE

from .harness import Result, compared, installed, on_cores, percentile
from .subjects import left_out_usage, one_key, place

CONNECTIONS: Final = (1, 64)
SECONDS: Final = 1.0
START_SECONDS: Final = 30.0
_MICROSECONDS: Final = {"us": 1.0, "ms": 1e3, "s": 1e6}


class Case(NamedTuple):
    """A server and an app, and what share of its requests is to remain."""

    name: str
    command: tuple[str, ...]  # after `python -m`; {port} is filled in
    goal: float | None
    rounds: int = 4
    """At scale 1: more where a goal is to be judged."""


CASES: Final = (
    Case(
        "uvicorn, FastAPI JSON route",
        ("uvicorn", "benchmarks.apps:fastapi_app", "--port={port}", "--no-access-log"),
        0.97,
        10,
    ),
    Case(
        "uvicorn, bare app",
        ("uvicorn", "benchmarks.apps:bare_app", "--port={port}", "--no-access-log"),
        0.85,
        10,
    ),
    Case(
        "granian, FastAPI JSON route",
        ("granian", "benchmarks.apps:fastapi_app", "--interface=asgi", "--port={port}", "--no-access-log"),
        None,
    ),
    Case(
        "gunicorn, 4 threads, WSGI JSON",
        ("gunicorn", "benchmarks.apps:wsgi_app", "--bind=127.0.0.1:{port}", "--threads=4"),
        None,
    ),
)


class Load(NamedTuple):
    """What a load generator saw: requests a second, and microseconds."""

    rate: float
    p50: float
    p99: float


def run(scale: float = 1.0) -> Result:
    generator = "wrk" if shutil.which("wrk") else "Python threads, wrk not being installed"
    result = Result("server", f"Requests a second with / without the middleware, by {generator}")
    for case in CASES:
        measure(result, case, rounds=max(2, int(case.rounds * scale)))
    result.versions = {name: installed(name) for name in ("uvicorn", "granian", "gunicorn", "fastapi")}
    result.left_out.append(left_out_usage())
    return result


def measure(result: Result, case: Case, *, rounds: int) -> None:
    with ExitStack() as stack:
        there = stack.enter_context(place("sqlite"))
        key = one_key(there.url, there.peppers)[0]
        guard = {"PAPAOURS_STORE": there.url, PEPPER_VARIABLE: there.secret}
        ports = [stack.enter_context(serving(case, environ, key)).port for environ in ({}, guard)]
        for connections in CONNECTIONS:
            bare: list[Load] = []
            guarded: list[Load] = []
            for turn in range(rounds):
                order = [(bare, ports[0]), (guarded, ports[1])]
                for loads, port in order if turn % 2 else order[::-1]:
                    with on_cores(last=True):
                        loads.append(load(port, key, connections, SECONDS))
            _report(result, case, connections, bare, guarded)


def _report(result: Result, case: Case, connections: int, bare: list[Load], guarded: list[Load]) -> None:
    name = f"{case.name}, {connections} connection{'s' if connections > 1 else ''}"
    rates = compared([one.rate for one in guarded], [one.rate for one in bare])
    each, more = (1e6 / statistics.median(one.rate for one in loads) for loads in (bare, guarded))
    reason = (
        f"a request takes {each:.0f} µs without the middleware and {more:.0f} with it, of which the benchmark "
        "'middleware' says what is ours; the rest is a response header more for the server to write, and noise"
    )
    result.add(name, **rates, goal=case.goal, at_most=False, reason=reason)
    for what, loads in (("without", bare), ("with", guarded)):
        rate, p50, p99 = (statistics.median(column) for column in zip(*loads, strict=True))
        result.add(f"  {what}", rate, "requests/s", note=f"p50 {p50:,.0f} µs, p99 {p99:,.0f} µs")


class Serving(NamedTuple):
    """A server under way."""

    port: int
    pid: int


@contextmanager
def serving(case: Case, environ: Mapping[str, str], key: str) -> Iterator[Serving]:
    """Start a server on a free port, wait until it answers with 200, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [part.format(port=port) for part in case.command]
    with TemporaryFile() as log:
        with on_cores(last=False):
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **environ},
                cwd=Path(__file__).parents[1],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(process, port, key)
            yield Serving(port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, key: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                if _get(connection, key) == 200:
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the server does not answer with 200")
        time.sleep(0.05)


def _get(connection: http.client.HTTPConnection, key: str) -> int:
    connection.request("GET", "/", headers={"X-API-KEY": key})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def load(port: int, key: str, connections: int, seconds: float) -> Load:
    return (wrk if shutil.which("wrk") else threads)(port, key, connections, seconds)


def wrk(port: int, key: str, connections: int, seconds: float) -> Load:
    asked = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"),
            *("-H", f"X-API-KEY: {key}", f"http://127.0.0.1:{port}/"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return read_wrk(asked)


def read_wrk(text: str) -> Load:
    """Read what wrk prints. Raises where an answer was not 2xx or a connection broke."""
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"the server did not answer all requests well: {text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    shares = {
        share: float(value) * _MICROSECONDS[unit]
        for share, value, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", text)
    }
    if rate is None:
        raise RuntimeError(f"wrk prints something else now: {text}")
    return Load(float(rate[1]), shares["50"], shares["99"])


def threads(port: int, key: str, connections: int, seconds: float) -> Load:
    """Do what wrk does, by a thread each connection."""
    times: list[float] = []
    until = time.monotonic() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        while time.monotonic() < until:
            begin = time.perf_counter()
            if _get(connection, key) != 200:
                raise RuntimeError("the server does not answer with 200")
            times.append((time.perf_counter() - begin) * 1e6)
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(connections)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return Load(len(times) / seconds, percentile(times, 0.5), percentile(times, 0.99))
