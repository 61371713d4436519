"""Stores with what is done to them: taken away and given back, in each way that happens to real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from .proxy import Proxy
from .redis_servers import NEWEST, WHY_NOT, RedisServer, redis_server
from .sql_servers import postgresql

PATIENT = "?timeout=20"


class Broken(NamedTuple):
    """A store, and what is done to it."""

    url: str  # for administration, which waits as long as a busy machine takes
    verifying_url: str  # as the load sees it: perhaps through a proxy
    take_away: Callable[[], object]
    give_back: Callable[[], object]


@contextmanager
def sqlite_file(folder: Path) -> Iterator[Broken]:
    path, away = folder / "keys.db", folder / "away.db"
    url = f"sqlite:///{path}"
    yield Broken(url, url, lambda: path.rename(away), lambda: away.rename(path))


@contextmanager
def redis_killed(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server:
        url = f"redis://{server.address}"
        yield Broken(f"{url}{PATIENT}", url, server.kill, server.start)


@contextmanager
def redis_frozen(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server:
        url = f"redis://{server.address}"
        yield Broken(f"{url}{PATIENT}", url, server.freeze, server.thaw)


@contextmanager
def redis_cut_off(folder: Path) -> Iterator[Broken]:
    with redis(folder) as server, Proxy(server.port) as proxy:
        yield cut_off(f"redis://{server.address}", f"redis://127.0.0.1:{proxy.port}", proxy)


def redis(folder: Path) -> AbstractContextManager[RedisServer]:
    if NEWEST is None:
        pytest.skip(WHY_NOT["6.2"])
    return redis_server(NEWEST, folder, "--appendonly", "yes", "--appendfsync", "always")


@contextmanager
def postgresql_killed(folder: Path) -> Iterator[Broken]:
    with postgresql() as server:
        url = server.url(server.database())
        yield Broken(f"{url}{PATIENT}", url, server.kill, server.start)


@contextmanager
def postgresql_cut_off(folder: Path) -> Iterator[Broken]:
    with postgresql() as server, Proxy(server.port) as proxy:
        database = server.database()
        yield cut_off(server.url(database), server.url(database, port=proxy.port), proxy)


def cut_off(url: str, verifying_url: str, proxy: Proxy) -> Broken:
    """Packets are swallowed, connections stay: the worst that a network does."""
    return Broken(
        f"{url}{PATIENT}", verifying_url, lambda: proxy.turn("blackhole"), lambda: proxy.turn("pass")
    )


Kind = Callable[[Path], AbstractContextManager[Broken]]
