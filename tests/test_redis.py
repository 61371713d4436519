"""The Redis store on real servers: the contract, and what only Redis can do to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from papaours_auth import open_async_store, open_store
from papaours_auth.stores import AsyncStore, Store
from papaours_auth.testing import StoreContract
from support.redis_servers import BINARIES, NEWEST, WHY_NOT, RedisServer, redis_cluster, redis_server

_numbers = itertools.count(1)


class Estate(NamedTuple):
    """Servers under way, and how a store there is written."""

    scheme: str
    servers: list[RedisServer]

    def url(self, **options: object) -> str:
        """Write the URL of a store that nobody has used yet."""
        given = {"prefix": f"test{next(_numbers)}", **options}
        query = "&".join(f"{name}={value}" for name, value in given.items())
        return f"{self.scheme}://{self.servers[0].address}/?{query}"


def binary_of(name: str) -> str:
    binary = BINARIES[name]
    if binary is None:
        pytest.skip(WHY_NOT[name])
    return binary


@pytest.fixture(scope="session", params=["6.2", "installed", "cluster"])
def estate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    folder = tmp_path_factory.mktemp("redis")
    if request.param == "cluster":
        with redis_cluster(NEWEST or binary_of("6.2"), folder) as servers:
            yield Estate("redis+cluster", servers)
    else:
        with redis_server(binary_of(request.param), folder) as server:
            yield Estate("redis", [server])


class TestContract(StoreContract):
    @pytest.fixture(autouse=True)
    def _place(self, estate: Estate) -> None:
        self.estate = estate

    def open(self) -> Store:
        self.url = self.estate.url()
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)
