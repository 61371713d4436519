"""Real clients against real servers: the example apps, as people would run them."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import requests

from papaours_auth import Keys, open_store, parse_peppers
from support.servers import ASGI, WSGI, Server, serving, stop, wait_until

SEED = "pk_prod_abc123def456ghi789"
PEPPER = "p1:" + base64.urlsafe_b64encode(bytes(range(32))).decode()
MAX_STALENESS = 2.0
SLACK = 3.0
"""Seconds a loaded machine may add to the bound before a test calls it broken: scheduling, a new connection."""

# The document's own code (05, "Exemple de bonne pratique"), with the address of the server under test.
FETCH = """
const API_KEY = process.env.PAPAOURS_API_KEY;

fetch("%s/contracts", {
  headers: {
    "Authorization": `Bearer ${API_KEY}`
  }
}).then(response => console.log(response.status));
"""


def curl(url: str, key: str) -> int:
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-H", f"Authorization: Bearer {key}"]
    return int(_output(*command, f"{url}/contracts"))


def curl_with_x_api_key(url: str, key: str) -> int:
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-H", f"X-API-KEY: {key}"]
    return int(_output(*command, f"{url}/contracts"))


def node_fetch(url: str, key: str) -> int:
    return int(_output("node", "--eval", FETCH % url, PAPAOURS_API_KEY=key))


def requests_session(url: str, key: str) -> int:
    with requests.Session() as session:
        session.headers["X-API-KEY"] = key
        return session.get(f"{url}/contracts", timeout=10).status_code


def httpx_client(url: str, key: str) -> int:
    with httpx.Client(headers={"authorization": f"bearer {key}"}, trust_env=False) as client:
        return client.get(f"{url}/contracts").status_code


CLIENTS: list[Callable[[str, str], int]] = [
    curl,
    curl_with_x_api_key,
    node_fetch,
    requests_session,
    httpx_client,
]


def _output(*command: str, **environ: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on this machine, and is no Python package")
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


class Estate:
    """A store with the seed's key, and the servers started on it so far."""

    def __init__(self, folder: Path) -> None:
        store = f"sqlite:///{folder}/keys.db"
        self.environ = {"PAPAOURS_STORE": store, "PAPAOURS_PEPPER": PEPPER}
        self.keys = Keys(open_store(store, create=True), peppers=parse_peppers(PEPPER))
        self.machine = self.keys.create_machine(
            "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
        )
        self.keys.import_key(self.machine.id, SEED, name="Production - Service Facturation")


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    return Estate(tmp_path_factory.mktemp("estate"))


@pytest.fixture(scope="module", params=[*ASGI, *WSGI])
def server(
    request: pytest.FixtureRequest, estate: Estate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(request.param, estate.environ, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_real_client_is_let_in_with_the_seeds_key_and_refused_with_another(
    server: Server, client: Callable[[str, str], int]
) -> None:
    assert client(server.url, SEED) == 200
    assert client(server.url, SEED + "0") == 401


def test_a_key_disabled_elsewhere_is_refused_within_the_bound_and_never_comes_back(
    server: Server, estate: Estate
) -> None:
    new = estate.keys.create_key(estate.machine.id, name="Production - Export", environment="prod")
    headers = {"Authorization": f"Bearer {new.secret.reveal()}"}
    for _ in range(20):  # every worker has it in its cache
        assert server.get(headers)[0] == 200
    estate.keys.disable_key(new.key.id)
    disabled = time.monotonic()
    last_accepted = disabled
    while time.monotonic() < disabled + 0.5 or last_accepted > time.monotonic() - 0.2:
        asked = time.monotonic()
        if server.get(headers)[0] == 200:
            last_accepted = asked
        assert asked < disabled + MAX_STALENESS + SLACK
    assert {server.get(headers)[0] for _ in range(200)} == {401}
    assert estate.keys.key(new.key.id).status == "inactive"
    estate.keys.enable_key(new.key.id)
    wait_until(
        lambda: server.get(headers)[0] == 200, MAX_STALENESS + SLACK, what="the key to be let in again"
    )


def test_a_server_tells_an_outage_from_an_unknown_key(estate: Estate, tmp_path: Path) -> None:
    path, away = tmp_path / "keys.db", tmp_path / "away.db"
    environ = {**estate.environ, "PAPAOURS_STORE": f"sqlite:///{path}"}
    open_store(environ["PAPAOURS_STORE"], create=True).close()
    with serving("waitress", environ, tmp_path) as server:
        headers = {"X-API-KEY": SEED}
        assert server.get(headers)[0] == 401
        path.rename(away)
        wait_until(lambda: server.get(headers)[0] == 503, MAX_STALENESS + SLACK, what="the outage to be told")
        away.rename(path)
        wait_until(lambda: server.get(headers)[0] == 401, MAX_STALENESS + SLACK, what="the end of the outage")


@pytest.mark.parametrize("name", [*ASGI, *WSGI])
def test_a_server_stops_when_asked_to(name: str, estate: Estate, tmp_path: Path) -> None:
    with serving(name, estate.environ, tmp_path) as server:
        assert server.get({"X-API-KEY": SEED})[0] == 200  # so that the watcher's thread runs
        assert stop(server.process) in (0, -signal.SIGTERM), server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("name", [*ASGI, *WSGI])
def test_a_server_does_not_start_on_a_wrong_pepper(name: str, estate: Estate, tmp_path: Path) -> None:
    other = "p1:" + base64.urlsafe_b64encode(bytes(range(100, 132))).decode()
    environ = {**estate.environ, "PAPAOURS_PEPPER": other}
    with (
        pytest.raises(AssertionError, match="not the one this store was made with"),
        serving(name, environ, tmp_path),
    ):
        pass


UNDERSCORES = {
    "uvicorn": "kept apart", "granian": "kept apart", "hypercorn": "kept apart", "gunicorn": "dropped",
    "gunicorn-preload": "dropped", "waitress": "dropped", "granian-wsgi": "taken for it",
}  # fmt: skip


def test_pitfall_05_what_each_server_makes_of_a_header_with_underscores(
    server: Server, request: pytest.FixtureRequest
) -> None:
    """CVE-2015-0219: docs/servers.md says the same."""
    name = request.node.callspec.params["server"]
    status, body = server.get({"X_API_Key": SEED})
    expected = (200, b"") if UNDERSCORES[name] == "taken for it" else (401, b"missing_key")
    assert status == expected[0], body
    assert expected[1] in body
