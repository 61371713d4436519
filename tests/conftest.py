"""Fixtures every test may use: a pepper, opened stores, and a clock to bend."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from papaours_auth import Keys, PepperRing, open_store, parse_peppers
from papaours_auth.stores import Store

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
