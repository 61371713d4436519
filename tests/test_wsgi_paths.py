"""Pitfall 35: a path reaches a guarded route without a key in no framework, on no server, at no root."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support import paths
from support.servers import Server, serving
from support.wsgi_frameworks import APPS, GUARDED, OPEN

SEED = "pk_prod_abc123def456ghi789"
FRAMEWORKS = (*APPS, "flask extension")


class Site(NamedTuple):
    server: Server
    root: str


class Setup(NamedTuple):
    """How a server is told its root."""

    server: str
    root: str = ""
    options: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()


SETUPS = {
    "werkzeug": Setup("werkzeug"),
    "gunicorn at a root": Setup("gunicorn-gthread", paths.ROOT, environ=(("SCRIPT_NAME", paths.ROOT),)),
    "waitress at a root": Setup("waitress-root", paths.ROOT),
    "granian at a root": Setup("granian-wsgi", paths.ROOT, (f"--url-path-prefix={paths.ROOT}",)),
    "uwsgi at a root": Setup(
        "uwsgi", paths.ROOT, ("--manage-script-name", f"--mount={paths.ROOT}=wsgi_frameworks:app")
    ),
}


@pytest.fixture(scope="module", params=SETUPS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    setup, folder = SETUPS[request.param], tmp_path_factory.mktemp("site")
    url = f"sqlite:///{folder}/keys.db"
    with Keys(open_store(url, create=True), peppers=parse_peppers(PEPPER)) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(machine.id, SEED, name="Production - Service Facturation")
    environ = {"PAPAOURS_STORE": url, "PAPAOURS_PEPPER": PEPPER, "WSGI_FRAMEWORKS": "all"} | dict(
        setup.environ
    )
    with serving(
        setup.server,
        environ,
        folder,
        "wsgi_frameworks:app",
        options=setup.options,
        ready=f"{setup.root}/healthz",
    ) as server:
        yield Site(server, setup.root)


def ask(server: Server, target: str, framework: str, *headers: str) -> tuple[str, str]:
    """Send a request target as it is, and return status and body."""
    lines = (
        f"GET {target} HTTP/1.0", "Host: a.example", "X-Real-IP: 127.0.0.1", f"X-Framework: {framework}", *headers
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall("\r\n".join((*lines, "", "")).encode("utf-8"))
        received = b""
        try:
            while block := connection.recv(1 << 16):
                received += block
        except OSError:  # a server may cut off what it cannot read
            pass
    head, _, body = received.decode("latin-1").partition("\r\n\r\n")
    return head[9:12], body


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_app_is_reached_as_it_should_be(site: Site, framework: str) -> None:
    """Else the next test would show nothing."""
    for path, key, expected in (
        ("/healthz", (), ("200", OPEN)),
        ("/public/a/b", (), ("200", OPEN)),
        ("/contracts", (f"X-API-KEY: {SEED}",), ("200", GUARDED)),
    ):
        status, body = ask(site.server, site.root + path, framework, *key)
        assert status == expected[0], path
        assert expected[1] in body, path  # Werkzeug parts it in chunks
    assert ask(site.server, site.root + "/contracts", framework)[0] == "401"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pitfall_35_no_path_reaches_a_guarded_route_without_a_key(site: Site, framework: str) -> None:
    targets = {site.root + target if target.startswith("/") else target for target in paths.TARGETS}
    if site.root:
        targets |= {
            root + target for root in paths.ROOTS for target in ("/contracts", "/healthz", "/public/a")
        }
    entered = [target for target in sorted(targets) if reached(ask(site.server, target, framework))]
    assert entered == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pitfall_35_no_header_moves_an_open_path_over_a_guarded_route(site: Site, framework: str) -> None:
    """Gunicorn takes SCRIPT_NAME and PATH_INFO from headers of those that it trusts, as a client on this machine."""
    roots = ("/public", "/public/a", "/healthz", "/contracts", "/", "/con", f"{site.root}/public", site.root)
    names = (
        "SCRIPT_NAME",
        "SCRIPT-NAME",
        "PATH_INFO",
        "X-Script-Name",
        "X-Forwarded-Prefix",
        "X-Original-URL",
    )
    entered = [
        (target, name, root)
        for target in ("/contracts", "/public/contracts", "/public/../contracts", "/healthz/contracts")
        for name in names
        for root in roots
        if reached(ask(site.server, site.root + target, framework, f"{name}: {root}"))
    ]
    assert entered == []


def reached(answer: tuple[str, str]) -> bool:
    status, body = answer
    return status == "200" and GUARDED in body
