"""Whose address it is: one table of servers, spellings of X-Forwarded-For and peers, each cell on a real server.

A key is bound to the network `INSIDE`. Whoever comes from `OUTSIDE` must not be let in, whatever they send.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from papaours_auth import Keys, open_store
from papaours_auth.digest import new_pepper, parse_peppers
from support.run import bound
from support.servers import APPS, stop, wait_until

INSIDE, OUTSIDE = "198.51.100.7", "203.0.113.9"

Command = Callable[[str], Sequence[str]]
"""From a port, or a Unix socket's path, to what starts a server there."""


class Row(NamedTuple):
    """A server: how it is started, and what docs/servers.md says of it."""

    tcp: Command
    unix: Command | None
    believed: bool
    """Whether `X-Forwarded-For` counts there: on WSGI, whether the server keeps `X_Forwarded_For` apart."""


def _uvicorn(app: str, *more: str) -> tuple[Command, Command]:
    command = ("-m", "uvicorn", "--factory", f"peers_app:{app}", *more)
    return (lambda port: [*command, f"--port={port}"]), (lambda path: [*command, f"--uds={path}"])


def _hypercorn(app: str) -> tuple[Command, Command]:
    command = ("-m", "hypercorn", app)
    return (lambda port: [*command, f"--bind=127.0.0.1:{port}"]), (
        lambda path: [*command, f"--bind=unix:{path}"]
    )


def _granian(kind: str) -> tuple[Command, Command]:
    command = ("-m", "granian", "--factory", f"peers_app:{kind}", f"--interface={kind}")
    return (lambda port: [*command, f"--port={port}"]), (lambda path: [*command, f"--uds={path}"])


def _gunicorn(*more: str) -> tuple[Command, Command]:
    command = ("-m", "gunicorn", *more)
    return (lambda port: [*command, f"--bind=127.0.0.1:{port}"]), (
        lambda path: [*command, f"--bind=unix:{path}"]
    )


def _waitress(*more: str, app: str = "wsgi") -> tuple[Command, Command]:
    command = ("-m", "waitress", *more)
    made = ("--call", f"peers_app:{app}")
    return (
        lambda port: [*command, f"--listen=127.0.0.1:{port}", *made],
        lambda path: [*command, f"--unix-socket={path}", *made],
    )


def _uwsgi() -> tuple[Command, Command]:
    run = (
        "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"  # of PyPI's pyuwsgi, which has no module to run
    )
    command = ("-c", run, str(Path(sys.executable).with_name("uwsgi")))
    more = ("--module=peers_made:wsgi_app", "--enable-threads", "--need-app", "--die-on-term")
    return (
        lambda port: [*command, f"--http-socket=127.0.0.1:{port}", *more],
        lambda path: [*command, f"--http-socket={path}", *more],
    )


def _daphne() -> tuple[Command, Command]:
    command = ("-m", "daphne", "peers_made:asgi_app")
    return (lambda port: [*command, f"--port={port}"]), (lambda path: [*command, "-u", path])


def _script(name: str, *more: str) -> Command:
    return lambda address: [str(APPS / "peers_app.py"), name, address, *more]


SERVERS: Mapping[str, Row] = {
    "uvicorn": Row(*_uvicorn("asgi", "--no-proxy-headers"), believed=True),
    "uvicorn by default": Row(*_uvicorn("asgi"), believed=True),  # it reads the header itself, from 127.0.0.1
    "granian": Row(*_granian("asgi"), believed=True),
    "daphne": Row(*_daphne(), believed=True),
    "hypercorn": Row(*_hypercorn("asgi:peers_made:asgi_app"), believed=True),
    "gunicorn": Row(*_gunicorn("peers_app:wsgi()"), believed=True),
    "gunicorn gevent": Row(*_gunicorn("peers_app:wsgi()", "-k=gevent"), believed=True),
    "gevent": Row(_script("gevent"), _script("gevent"), believed=True),
    "uwsgi": Row(*_uwsgi(), believed=False),
    "waitress": Row(*_waitress("--no-clear-untrusted-proxy-headers"), believed=True),
    "waitress by default": Row(*_waitress(), believed=False),  # it strips the header
    "werkzeug": Row(_script("werkzeug"), lambda path: _script("werkzeug")(f"unix://{path}"), believed=True),
    "granian-wsgi": Row(*_granian("wsgi"), believed=False),
    "hypercorn-wsgi": Row(*_hypercorn("wsgi:peers_made:wsgi_app"), believed=False),
    "wsgiref": Row(_script("wsgiref"), None, believed=False),
    "starlette's bridge": Row(*_uvicorn("starlette_bridge", "--no-proxy-headers"), believed=False),
    "asgi under waitress": Row(
        _waitress("--no-clear-untrusted-proxy-headers", app="asgi_under_wsgi")[0],
        None,  # a2wsgi reads SERVER_PORT as a number, and waitress has none there
        believed=False,
    ),
    "asgi under wsgiref": Row(_script("wsgiref", "asgi"), None, believed=False),
    "a2wsgi": Row(*_uvicorn("a2wsgi_bridge", "--no-proxy-headers"), believed=False),
}
ASGI = (
    "uvicorn",
    "uvicorn by default",
    "granian",
    "daphne",
    "hypercorn",
    "asgi under waitress",
    "asgi under wsgiref",
)
WSGI = [name for name in SERVERS if name not in ASGI]

HYPHENS = f"X-Forwarded-For: {INSIDE}"
PROXYS = f"X-Forwarded-For: {OUTSIDE}"
FORGED: Mapping[str, Sequence[str]] = {
    "underscores": [f"X_Forwarded_For: {INSIDE}"],
    "underscores first": [f"X_Forwarded_For: {INSIDE}", PROXYS],
    "underscores last": [PROXYS, f"X_Forwarded_For: {INSIDE}"],
    "one underscore": [PROXYS, f"X-Forwarded_For: {INSIDE}"],
    "the other underscore": [PROXYS, f"x_forwarded-for: {INSIDE}"],
    "on a line before": [HYPHENS, PROXYS],
    "in the same line": [f"X-Forwarded-For: {INSIDE}, {OUTSIDE}"],
    "no address at the end": [f"X-Forwarded-For: {INSIDE}, unknown"],
    "nothing at the end": [f"X-Forwarded-For: {INSIDE},"],
    "an empty line after": [HYPHENS, "X-Forwarded-For:"],
    "a space before the colon": [PROXYS, f"X-Forwarded-For : {INSIDE}"],
    "another header": [f"X-Real-IP: {INSIDE}", f"Forwarded: for={INSIDE}", f"Client-IP: {INSIDE}"],
    "none": [],
}
"""What is sent by, or through a trusted proxy for, somebody outside."""
REFUSED = (403, 400)
"""400: some servers do not take such a header at all."""
HONEST: Mapping[str, Sequence[str]] = {
    "one line": [HYPHENS],
    "after another": [f"X-Forwarded-For: {OUTSIDE}", HYPHENS],
    "the last of a line": [f"X-Forwarded-For: {OUTSIDE}, {INSIDE}"],
    "small letters": [HYPHENS.lower()],
    "a port": [f"X-Forwarded-For: {INSIDE}:4711"],
    "mapped": [f"X-Forwarded-For: [::ffff:{INSIDE}]:4711"],
    "through two": [f"X-Forwarded-For: {INSIDE}, 127.0.0.2"],
}


class Estate(NamedTuple):
    """A store, and keys by the network they are bound to."""

    environ: dict[str, str]
    inside: str
    loopback: str
    anywhere: str
    mapped: str


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    url, text = f"sqlite:///{tmp_path_factory.mktemp('estate')}/keys.db", new_pepper()
    open_store(url, create=True).close()
    with Keys(url, peppers=parse_peppers(text)) as keys:
        machine = keys.create_machine("Portail", organisation="cfa-lyon").id
        networks: Sequence[Sequence[str]] = (
            ["198.51.100.0/24"],
            ["127.0.0.0/8", "::1"],
            [],
            ["::ffff:198.51.100.0/120"],
        )
        made = [
            keys.create_key(machine, name="Production", environment="prod", networks=bound).secret.reveal()
            for bound in networks
        ]
    return Estate({"PAPAOURS_STORE": url, "PAPAOURS_PEPPER": text}, *made)


def status(address: str, path: str, key: str, headers: Sequence[str]) -> int:
    """Send exactly these header lines, in this order."""
    family = socket.AF_UNIX if address.startswith("/") else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(20)
        connection.connect(address if family == socket.AF_UNIX else ("127.0.0.1", int(address)))
        lines = [
            f"GET /{path}/contrats HTTP/1.1",
            "Host: localhost",
            f"X-API-KEY: {key}",
            *headers,
            "Connection: close",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while b"\r\n" not in answer:
            answer += connection.recv(4096) or b"\r\n"
    return int(answer.split()[1])


@contextmanager
def serving(command: Sequence[str], address: str, estate: Estate, folder: Path) -> Iterator[str]:
    log = folder / "log"
    (folder / "peers_made.py").write_text(
        "import peers_app\nasgi_app, wsgi_app = peers_app.asgi(), peers_app.wsgi()\n"
    )
    environ = {**os.environ, **estate.environ, "PYTHONPATH": os.pathsep.join([str(APPS), str(folder)])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            bound([sys.executable, *command]),
            env=environ,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return status(address, "nobody", estate.anywhere, []) == 200
        except (OSError, IndexError):
            return False

    try:
        wait_until(answers, 60, what=lambda: log.read_text())
        yield address
    finally:
        stop(process)


@pytest.fixture(scope="module", params=SERVERS)
def tcp(
    request: pytest.FixtureRequest, estate: Estate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Row]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    row = SERVERS[request.param]
    with serving(row.tcp(port), port, estate, tmp_path_factory.mktemp("tcp")) as address:
        yield address, row


@pytest.fixture(scope="module", params=[name for name, row in SERVERS.items() if row.unix is not None])
def unix(
    request: pytest.FixtureRequest, estate: Estate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Row]]:
    row = SERVERS[request.param]
    folder = tmp_path_factory.mktemp("unix")
    path = str(folder / "s")
    assert row.unix is not None
    with serving(row.unix(path), path, estate, folder) as address:
        yield address, row


@pytest.mark.parametrize("proxies", ["tcp", "mapped", "others", "nobody", "unix"])
def test_pitfall_47_what_is_forged_lets_nobody_in(
    tcp: tuple[str, Row], estate: Estate, proxies: str, request: pytest.FixtureRequest
) -> None:
    sent = dict(FORGED)
    if proxies in ("others", "nobody", "unix") and "default" not in request.node.name:
        sent |= HONEST  # whoever says it here is nobody's proxy
    let_in = [
        name for name, lines in sent.items() if status(tcp[0], proxies, estate.inside, lines) not in REFUSED
    ]
    assert let_in == []


@pytest.mark.parametrize("proxies", ["tcp", "mapped"])
def test_pitfall_27_what_a_trusted_proxy_says_counts_where_it_cannot_be_forged(
    tcp: tuple[str, Row], estate: Estate, proxies: str
) -> None:
    expected = 200 if tcp[1].believed else 403
    for key in (estate.inside, estate.mapped):
        assert {name: status(tcp[0], proxies, key, lines) for name, lines in HONEST.items()} == dict.fromkeys(
            HONEST, expected
        )
    assert status(tcp[0], proxies, estate.anywhere, []) == 200


def test_pitfall_47_a_trusted_proxy_that_sends_no_header_is_not_the_client(
    tcp: tuple[str, Row], estate: Estate, request: pytest.FixtureRequest
) -> None:
    assert status(tcp[0], "tcp", estate.loopback, []) == 403
    # The peer itself, whom nobody trusts. Under wsgiref the bridge tells no peer at all.
    expected = 403 if "asgi under wsgiref" in request.node.name else 200
    assert status(tcp[0], "others", estate.loopback, []) == expected
    assert status(tcp[0], "nobody", estate.loopback, []) == expected


@pytest.mark.parametrize("tcp", WSGI, indirect=True)
def test_where_the_proxy_drops_underscores_its_word_counts_on_every_server(
    tcp: tuple[str, Row], estate: Estate, request: pytest.FixtureRequest
) -> None:
    stripped = "default" in request.node.name
    assert status(tcp[0], "dropping", estate.inside, HONEST["one line"]) == (403 if stripped else 200)
    without = {name: lines for name, lines in FORGED.items() if not any("_" in line for line in lines)}
    assert [
        name
        for name, lines in without.items()
        if status(tcp[0], "dropping", estate.inside, lines) not in REFUSED
    ] == []


def test_pitfall_47_a_peer_that_is_no_address_is_a_unix_socket(
    unix: tuple[str, Row], estate: Estate, request: pytest.FixtureRequest
) -> None:
    address, row = unix
    honest = {name: status(address, "unix", estate.inside, lines) for name, lines in HONEST.items()}
    expected = dict.fromkeys(HONEST, 200 if row.believed else 403)
    assert honest == {**expected, "through two": 403}  # 127.0.0.2 is not trusted here
    for proxies in ("unix", "tcp", "others", "nobody"):
        assert [
            name
            for name, lines in FORGED.items()
            if status(address, proxies, estate.inside, lines) not in REFUSED
        ] == []
    assert status(address, "unix", estate.loopback, []) == 403
    if request.node.callspec.params["unix"] in WSGI and "default" not in request.node.name:
        assert status(address, "dropping", estate.inside, HONEST["one line"]) == 200
    assert status(address, "unix", estate.anywhere, []) == 200
