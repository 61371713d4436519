"""Pitfall 35: paths that an app and its guard could read differently, through real servers and frameworks.

Nothing on the way normalises what is asked for: the requests are written onto a socket.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support.frameworks import APPS, GUARDED, OPEN
from support.servers import Server, serving

SEED = "pk_prod_abc123def456ghi789"
SERVERS = ["uvicorn", "uvicorn-api", "uvicorn-api-slash", "hypercorn-api", "granian-api", "daphne-api"]


class Asked(NamedTuple):
    """What is asked for, and the root path that the client chooses where the server lets it (daphne)."""

    target: str
    root: str = ""


PATHS = [
    # as meant
    *("/", "/admin", "/healthz", "/public/x", "/public/x/y", "/public/", "/public"),
    # the root path at the beginning, in the middle, at the end, twice, and what looks like it
    *("/api", "/api/", "/api/admin", "/api/healthz", "/api/public/x", "/api/public/", "/api/public"),
    *("/public/api/admin", "/public/api/", "/public/api", "/healthz/api/admin", "/healthz/api", "/public/x/api/admin"),
    *("/api/api/public/x", "/api/public/api/admin", "/api/public/api/api/admin", "/public/public/x"),
    *("/apix/public/x", "/apihealthz", "/apipublic/x", "/xapi/public/x", "/API/public/x", "/public/API/admin"),
    # dots and slashes
    *("//healthz", "//public/x", "/public//x", "/public//api/admin", "/api//public/x", "//api/public/x", "/api//healthz"),
    *("/public/../admin", "/public/./x", "/./public/x", "/x/../public/y", "/api/public/../admin", "/public/.."),
    *("/api/../public/x", "/public/x/../../admin", "/public/api/../admin", "/..", "/public/x/..", "/public/..;/admin"),
    # encoded, once and twice
    *("/public%2fadmin", "/public%2Fx", "/api%2fpublic%2fx", "/%61pi/public/x", "/%70ublic/x", "/public%2f..%2fadmin"),
    *("/public/%2e%2e/admin", "/public/%2E%2E%2Fadmin", "/public/%252e%252e/admin", "/public%252fx", "/healthz%2f"),
    *("/public/%2fapi%2fadmin", "/public%2fapi%2fadmin", "/%2fhealthz", "/public/%C0%AE%C0%AE/admin", "/public/%FF"),
    *("/api/%70ublic/x", "/api/public%2fx", "/api%2fhealthz", "/public/%61pi/admin", "/healthz%2fapi%2fadmin"),
    # what another reader cuts or folds
    *("/healthz/", "/api/healthz/", "/healthz.", "/healthz%00", "/healthz%20", "/healthz%0a", "/healthz%09", "/HEALTHZ"),
    *("/healthz%3fx", "/healthz%23x", "/healthz;x", "/healthz%3bx", "/public;/x", "/public/x;/../../admin", "/healthz?/x"),
    *("/public\\x", "/public/%5c..%5cadmin", "/public%5cx", "/api\\public\\x", "/public/\\..\\admin", "/Public/x"),
    *("/public/\u00e9", "/public/%C3%A9", "/public/%EF%BC%8F", "/public/%E2%80%AE", "/healthz%C2%A0", "/healthz%EF%BC%8E"),
    # no path
    *("http://a.example/public/../admin", "http://a.example/admin", "http://a.example/healthz", "*", "public/x"),
    *("?/healthz", "/?/healthz", "/admin?/public/x", "/admin#/public/x", "/public/x#/admin"),
]  # fmt: skip
# A client of daphne chooses the root path itself.
CHOSEN = [
    Asked(target, root)
    for root in ("/x", "/public", "/public/", "/pub", "/healthz", "x", "%2fx", "/x/")
    for target in (
        *("/x/public/y", "/x/healthz", "/public/admin", "/public/x/admin", "/healthz/admin", "/admin/public/x", "/public"),
        *("/public/x/public/y", "/xpublic/y", "/public/public/x", "/admin", "//public/x", "/public//admin"),
    )
]  # fmt: skip


class Answered(NamedTuple):
    asked: Asked
    status: int
    body: str


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("roots")
    store = f"sqlite:///{folder}/keys.db"
    keys = Keys(open_store(store, create=True), peppers=parse_peppers(PEPPER))
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    keys.import_key(machine.id, SEED, name="Production - Service Facturation")
    keys.close()
    environ = {"PAPAOURS_STORE": store, "PAPAOURS_PEPPER": PEPPER}
    with serving(request.param, environ, folder, "frameworks_app:app") as running:
        yield running


def ask(server: Server, name: str, asked: Asked, key: str = "") -> Answered:
    lines = [f"GET {asked.target} HTTP/1.1", "Host: a.example", f"X-App: {name}", "Connection: close"]
    if asked.root:
        lines.append(f"Daphne-Root-Path: {asked.root}")
    if key:
        lines.append(f"X-API-KEY: {key}")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("utf-8"))
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status = head[9:12]
    return Answered(asked, int(status) if status.isdigit() else 0, body.decode("latin-1"))


def asked_of(server: Server, name: str) -> list[Asked]:
    if name == "sanic" and server.log.name.startswith("daphne"):
        pytest.skip("Sanic starts in its lifespan, which daphne has not")
    return [Asked(path) for path in PATHS] + (CHOSEN if server.log.name.startswith("daphne") else [])


@pytest.mark.parametrize("name", APPS)
def test_pitfall_35_no_guarded_route_is_reached_without_a_key(server: Server, name: str) -> None:
    answers = [ask(server, name, asked) for asked in asked_of(server, name)]
    assert [answer for answer in answers if GUARDED in answer.body] == []
    # It is the guard that keeps them from it: with a key, many of them reach it.
    let_in = [ask(server, name, Asked(path), SEED) for path in PATHS[:40]]
    assert sum(GUARDED in answer.body for answer in let_in) > 8, let_in
    assert {answer.status for answer in answers} & {401}


@pytest.mark.parametrize("name", APPS)
def test_what_is_exempt_is_open_where_it_can_be_read_in_one_way(server: Server, name: str) -> None:
    asked_of(server, name)

    def opens(path: str) -> bool:
        answer = ask(server, name, Asked(path))
        return (answer.status, OPEN in answer.body) == (200, True)

    open_ = {
        path
        for path in ("/healthz", "/public/x", "/public/%C3%A9", "/public/x%20y", "/public/x?y=/")
        if opens(path)
    }
    if server.log.name == "uvicorn.log" or (
        server.log.name == "uvicorn-api.log" and name in ("starlette", "fastapi")
    ):
        assert len(open_) == 5
    else:
        assert not open_
