"""Pitfall 42: Django Channels inside the middleware: its `AuthMiddlewareStack` writes into ``scope["user"]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from conftest import PEPPER
from papaours_auth import Keys, open_store, parse_peppers
from support.servers import Server, serving

SEED = "pk_prod_abc123def456ghi789"


class Running(NamedTuple):
    server: Server
    session: str


@pytest.fixture(scope="module", params=["uvicorn", "daphne"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("channels")
    store, session = f"sqlite:///{folder}/keys.db", folder / "session"
    with Keys(open_store(store, create=True), peppers=parse_peppers(PEPPER)) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(machine.id, SEED, name="Production - Service Facturation")
    environ = {
        "PAPAOURS_STORE": store,
        "PAPAOURS_PEPPER": PEPPER,
        "DJANGO_DB": str(folder / "django.db"),
        "SESSION": str(session),
    }
    with serving(request.param, environ, folder, "channels_app:app") as server:
        yield Running(server, session.read_text())


def say(running: Running, path: str, headers: dict[str, str]) -> str:
    url = f"ws://127.0.0.1:{running.server.port}{path}"
    with connect(url, additional_headers=headers, proxy=None) as socket:
        return str(socket.recv(timeout=20))


def test_pitfall_42_a_websocket_with_a_valid_key_works_under_channels_sessions(running: Running) -> None:
    """django-rest-knox#258."""
    key, cookie = {"X-API-KEY": SEED}, {"Cookie": f"sessionid={running.session}"}
    assert say(running, "/live", key) == "Service de facturation, anonymous"
    assert say(running, "/live", {**key, **cookie}) == "Service de facturation, ada"


def test_pitfall_42_a_person_who_is_logged_in_stays_so_on_an_exempt_path(running: Running) -> None:
    assert say(running, "/public/live", {"Cookie": f"sessionid={running.session}"}) == "nobody, ada"
    assert say(running, "/public/live", {}) == "nobody, anonymous"


def test_a_websocket_without_a_key_is_denied(running: Running) -> None:
    with pytest.raises(InvalidStatus) as refused:
        say(running, "/live", {"Cookie": f"sessionid={running.session}"})
    assert refused.value.response.status_code in (401, 403)
