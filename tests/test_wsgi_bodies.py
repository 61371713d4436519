"""What an app answers reaches its client as it would without us, on every WSGI server, and is recorded as it went."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support.bodies import BIG, BODIES
from support.servers import Server, serving, wait_until, workers

SEED = "pk_prod_abc123def456ghi789"
SERVERS = ("gunicorn", "gunicorn-gthread", "waitress", "granian-wsgi", "wsgiref", "werkzeug", "uwsgi")
PATHS = [*BODIES, "/raises", "/file", "/plain-file", "/length", "/write", "/again", "/too-late"]
KEPT_ALIVE = ("gunicorn-gthread", "waitress", "granian-wsgi")
SENDFILE = ("gunicorn", "gunicorn-gthread", "uwsgi")
WHOLE, FAILED, LATE = (200, "completed"), (0, "failed"), (200, "failed")
EVENTS = {
    **dict.fromkeys(PATHS, WHOLE),
    **dict.fromkeys(("/raises", "/none", "/number", "/text", "/list-of-text", "/fails-at-once"), FAILED),
    **dict.fromkeys(("/fails-late", "/too-late"), LATE),
    "/again": (500, "completed"),
}
OTHERWISE = {
    "granian-wsgi": dict.fromkeys(
        ("/write", "/too-late", "/file"), FAILED
    ),  # neither `write` nor a file wrapper
    "werkzeug": {"/file": FAILED},
    "uwsgi": {
        "/again": FAILED,
        "/too-late": (200, "gone"),
    },  # its `start_response` raises where it should not
}
# Granian answers 200 before it asks a generator for its first piece; what reaches the client when one raises is a
# matter of chance, without us too.
CHANCE = {("granian-wsgi", "/fails-at-once"), ("granian-wsgi", "/fails-late")}


class Pair(NamedTuple):
    """The same app twice on one kind of server: as it is, and behind the middleware."""

    name: str
    bare: Server
    guarded: Server
    usage: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    url = f"sqlite:///{folder}/keys.db"
    with Keys(open_store(url, create=True), peppers=parse_peppers(PEPPER)) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(machine.id, SEED, name="Production - Service Facturation")
    return {"PAPAOURS_STORE": url, "PAPAOURS_PEPPER": PEPPER}


@pytest.fixture(scope="module", params=SERVERS)
def pair(
    request: pytest.FixtureRequest, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    usage = folder / "usage.db"
    environ = {**keys, "BODIES_USAGE": f"sqlite:///{usage}"}
    with ExitStack() as stack:
        bare, guarded = (
            stack.enter_context(serving(request.param, environ, folder, f"bodies:{app}"))
            for app in ("bare", "app")
        )
        yield Pair(request.param, bare, guarded, usage)


def on_the_wire(server: Server, path: str, method: str, version: str, request_id: str = "") -> bytes:
    """Return all that is sent for one request, without its date."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        lines = (
            f"{method} {path} HTTP/{version}", "Host: a.example", f"X-API-KEY: {SEED}", "Connection: close",
            f"X-Request-ID: {request_id}",
        )  # fmt: skip
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    if len(received) > 1_000_000:
        head, _, body = received.partition(b"\r\n\r\n")
        received = head + b" and %d zeroes" % body.count(b"\0")
    return re.sub(rb"(?i)\r\ndate: [^\r]*", b"", received)


def by_a_client(server: Server, path: str) -> tuple[Any, ...]:
    """Return what a client sees that would go on with the same connection."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path, headers={"X-API-KEY": SEED})
        response = connection.getresponse()
        closes = response.will_close
        headers = [(name, value) for name, value in response.getheaders() if name.lower() != "date"]
        try:
            body = len(response.read())
        except (OSError, HTTPException):  # an answer that broke off
            body = -1
    except (OSError, HTTPException) as error:
        return (type(error).__name__,)
    else:
        return response.status, headers, body, closes
    finally:
        connection.close()


def test_an_answer_is_the_same_to_the_byte_with_and_without_the_middleware(pair: Pair) -> None:
    """waitress#157, sentry-python#5107: the length of a list and the type of a file were hidden from servers."""
    differ = []
    for path in PATHS:
        if (pair.name, path) in CHANCE:
            continue
        for method, version in (("GET", "1.1"), ("HEAD", "1.1"), ("GET", "1.0")):
            answers = [on_the_wire(server, path, method, version) for server in pair[1:3]]
            if answers[0] != answers[1]:
                differ.append((method, version, path, *answers))
        seen = [by_a_client(server, path) for server in pair[1:3]]
        if seen[0] != seen[1]:
            differ.append((path, *seen))
    assert differ == []


def events(usage: Path, request_id: str, calls: int) -> list[tuple[str, int, str]]:
    """Return route, status and outcome of the calls that were made under a request id."""

    def found() -> list[tuple[str, int, str]]:
        with sqlite3.connect(usage) as connection:
            statement = "select route, status, outcome from usage_events where request_id = ?"
            return connection.execute(statement, [request_id]).fetchall()

    wait_until(lambda: len(found()) >= calls, 30, what=lambda: f"{calls} events, not {found()}")
    return found()


def test_each_answer_is_one_event_with_the_status_that_was_sent(pair: Pair) -> None:
    expected = dict(EVENTS)
    if pair.name in OTHERWISE:
        expected |= OTHERWISE[pair.name]
    sent = {}
    for path in PATHS:
        connection = HTTPConnection("127.0.0.1", pair.guarded.port, timeout=30)
        connection.request("GET", path, headers={"X-API-KEY": SEED, "X-Request-ID": "each"})
        try:
            response = connection.getresponse()
            response.read()
            sent[path] = response.status
        except (OSError, HTTPException):  # closed without an answer, or in the middle of it
            pass
        finally:
            connection.close()
    found = events(pair.usage, "each", len(PATHS) - 1)  # /healthz needs no key
    assert {route: tuple(rest) for route, *rest in found} == {
        path: event for path, event in expected.items() if path != "/healthz"
    }
    assert len(found) == len(PATHS) - 1
    for route, status, _ in found:
        assert status in (0, sent.get(route, 0)) or route not in sent, route


def test_a_connection_is_kept_for_1500_requests(pair: Pair) -> None:
    if pair.name not in KEPT_ALIVE:
        pytest.skip(f"{pair.name} as it is started here closes each connection, without us too")
    connection = HTTPConnection("127.0.0.1", pair.guarded.port, timeout=30)
    headers = {"X-API-KEY": SEED, "X-Request-ID": "kept"}
    connection.connect()
    for _ in range(1_500):
        connection.request("GET", "/list", headers=headers)
        response = connection.getresponse()
        assert (response.read(), response.will_close) == (b"one", False)
    connection.close()
    assert len(events(pair.usage, "kept", 1_500)) == 1_500


def seconds_of(server: Server) -> float:
    """Return the processor time that a server has taken, with its workers."""
    ticks = 0
    for process in (server.process.pid, *workers(server.process.pid)):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_a_file_is_sent_by_the_server_itself(pair: Pair) -> None:
    """200 MB by sendfile take 0.05 s of processor, and 1.7 s when Python reads them."""
    if pair.name not in SENDFILE:
        pytest.skip(f"{pair.name} sends no file by itself")
    taken = []
    for server in pair[1:3]:
        before = seconds_of(server)
        assert on_the_wire(server, "/big-file", "GET", "1.1").endswith(b" and %d zeroes" % BIG)
        taken.append(seconds_of(server) - before)
    assert taken[1] < taken[0] + 0.5, taken


def test_a_client_that_leaves_in_the_middle_of_a_file_is_gone(pair: Pair) -> None:
    if pair.name not in ("gunicorn", "gunicorn-gthread"):
        pytest.skip(f"{pair.name} does not tell us")
    with socket.create_connection(("127.0.0.1", pair.guarded.port), 30) as connection:
        connection.sendall(
            f"GET /big-file HTTP/1.1\r\nX-API-KEY: {SEED}\r\nX-Request-ID: left\r\n\r\n".encode()
        )
        connection.recv(1_000)
    assert events(pair.usage, "left", 1) == [("/big-file", 200, "gone")]


def test_granian_too_answers_500_for_a_generator_that_fails_at_once(pair: Pair) -> None:
    answer = on_the_wire(pair.guarded, "/fails-at-once", "GET", "1.1")
    # gunicorn, wsgiref and Werkzeug differ in their words; uWSGI has sent its status before.
    assert pair.name == "uwsgi" or answer.split(b" ", 2)[1] == b"500", answer


def test_pitfall_40_a_refusal_from_below_is_answered_on_every_server(pair: Pair) -> None:
    """Before the app has named a status, and after, but before anything is sent."""
    paths = ("/refuses", "/refuses-first", "/refuses-late", "/refuses-after-all")
    answers = {path: on_the_wire(pair.guarded, path, "GET", "1.1", "refused") for path in paths}
    for path, answer in answers.items():
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ", 2)[1] == b"403", (path, answer)
        assert b"application/problem+json" in head, (path, answer)
        assert b'"code": "insufficient_rights"' in body, (path, answer)
    assert sorted(events(pair.usage, "refused", len(paths))) == sorted(
        (path, 403, "completed") for path in paths
    )
