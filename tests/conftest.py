"""Fixtures every test may use: a pepper, opened stores, and a clock to bend.

How a test gets a server:

- A database: `postgresql_server`, `mariadb_server` or `mysql_server`, which the tests of a worker share and none may
  stop. ``server.url(server.database())`` is the URL of a new database there.
- Redis: ``with redis_server(NEWEST, tmp_path)`` of `support.redis_servers`, which starts at once; a module with many
  tests has a fixture over it, and a prefix a test. `BINARIES` holds each version that is here; there are
  `redis_cluster` and `redis_sentinel` too.
- A database to kill: ``with postgresql() as server`` of `support.sql_servers`, likewise.
- An HTTP server over an app: ``with serving("uvicorn", environ, tmp_path)`` of `support.servers`.
- Any other: ``subprocess.Popen(run.bound(command))`` of `support.run`, so that it ends with the run. Look for it by
  `support.hidden.which`, add its name to `hidden.SERVERS`, and skip with what to install where it is not there.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    KeyFormat,
    Keys,
    PepperRing,
    open_store,
    parse_peppers,
)
from papaours_auth.stores import Store
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from support.doors import Door, Spy, open_door
from support.sql_servers import SQLServer, mariadb, mysql, postgresql
from support.watchers import note_earlier


@pytest.fixture(autouse=True)
def _earlier_watchers() -> None:
    note_earlier()


PEPPER = "p1:" + base64.urlsafe_b64encode(bytes(range(32))).decode()


class ManualClock:
    """Time stands still until a test moves it."""

    def __init__(self) -> None:
        self.mono = 1_000.0
        self.wall = 1_790_000_000.0

    def monotonic(self) -> float:
        return self.mono

    def time(self) -> float:
        return self.wall

    def advance(self, seconds: float) -> None:
        self.mono += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def ring() -> PepperRing:
    return parse_peppers(PEPPER)


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/keys.db"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = open_store(store_url, create=True)
    yield store
    store.close()


@pytest.fixture
def keys(store: Store, ring: PepperRing) -> Keys:
    return Keys(store, peppers=ring)


@pytest.fixture
def admin(store: Store, ring: PepperRing, clock: ManualClock) -> Keys:
    """Administration that lives by the test's clock."""
    return Keys(store, peppers=ring, clock=clock)


@pytest.fixture
def memory(ring: PepperRing) -> MemoryStore:
    """A store with the seed's key, whose machine may read contracts."""
    store = MemoryStore()
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine(
        "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
    )
    keys.import_key(machine.id, "pk_prod_abc123def456ghi789", name="Production - Service Facturation")
    return store


@pytest.fixture
def waiting(memory: MemoryStore, ring: PepperRing) -> Iterator[AsyncAuthenticator]:
    authenticator = AsyncAuthenticator(AsyncMemoryStore(memory), environment="prod", peppers=ring)
    yield authenticator
    asyncio.run(authenticator.aclose())


@pytest.fixture
def blocking(memory: MemoryStore, ring: PepperRing) -> Iterator[Authenticator]:
    with Authenticator(memory, environment="prod", peppers=ring) as authenticator:
        yield authenticator


@pytest.fixture
def spy(store: Store) -> Spy:
    return Spy(store)


@pytest.fixture(params=["sync", "async"])
def opens(
    request: pytest.FixtureRequest, spy: Spy, ring: PepperRing, clock: ManualClock
) -> Iterator[Callable[..., Door]]:
    """Open authenticators over the spy, watched by hand: the first reading is done, `Door.refresh` does more.

    Foreign keys are looked up whatever the store holds: `test_foreign` is about when they are not.
    """
    doors: list[Door] = []

    def opened(**options: Any) -> Door:
        looked_up = KeyFormat(foreign=True)
        given = {"peppers": ring, "clock": clock, "watch": False, "format": looked_up, **options}
        doors.append(open_door(request.param, spy.store, **given))
        if not given["watch"]:
            doors[-1].refresh()
        return doors[-1]

    yield opened
    for door in doors:
        door.close()


@pytest.fixture
def door(opens: Callable[..., Door]) -> Door:
    return opens()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[SQLServer]:
    """PostgreSQL, for tests that leave it running."""
    with postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[SQLServer]:
    """MariaDB, likewise."""
    with mariadb() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[SQLServer]:
    """Oracle's MySQL, likewise."""
    with mysql() as server:
        yield server
