"""The contract over our stores, and how a store is opened by its URL."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from papaours_auth import ConfigurationError, open_async_store, open_store
from papaours_auth.stores import AsyncStore, Store
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.testing import StoreContract


class TestMemory(StoreContract):
    store: MemoryStore

    def open(self) -> Store:
        self.store = MemoryStore()
        return self.store

    def open_async(self) -> AsyncStore:
        return AsyncMemoryStore(self.store)


class TestSQLite(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/keys.db"

    def open(self) -> Store:
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)


@pytest.mark.parametrize("opener", [open_store, open_async_store])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "not written as a URL"),
        ("keys.db", "not written as a URL"),
        (
            "oracle://alice:hunter2@host/db",
            "no store is known for 'oracle' URLs: use one of mariadb, memory, mysql, postgresql, redis",
        ),
        ("sqlite:///missing.db", "no SQLite store at .*papaours-auth init"),
        ("sqlite:///", "an SQLite store is a file"),
        ("sqlite://host/keys.db", "an SQLite store is a file|no SQLite store"),
        ("sqlite:///:memory:", "an SQLite store is a file"),
        ("sqlite:///keys.db?mode=ro", "an SQLite store is a file"),
        ("memory://somewhere", "the memory store is written memory://"),
    ],
)
def test_a_wrong_url_is_one_clear_line_without_its_password(opener: object, url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as error:
        opener(url)  # type: ignore[operator]  # one of two functions
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_another_package_can_add_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_store.py").write_text(
        "from papaours_auth.stores.memory import MemoryStore, AsyncMemoryStore\n"
        "def open_store(url, create): return MemoryStore()\n"
        "def open_async_store(url, create): return AsyncMemoryStore(MemoryStore())\n"
    )
    info = tmp_path / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[papaours_auth.stores]\nacme = acme_store\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(open_store("acme://"), MemoryStore)
    assert isinstance(open_async_store("acme://"), AsyncMemoryStore)
    with pytest.raises(ConfigurationError, match="acme, mariadb, memory"):
        open_store("other://")
    del sys.modules["acme_store"]


def test_the_contract_finds_a_store_that_breaks_it() -> None:
    class Forgetful(MemoryStore):
        def close(self) -> None:
            pass

    class Contract(TestMemory):
        def open(self) -> Store:
            return Forgetful()

    with pytest.raises(AssertionError, match="StoreUnavailable was not raised"):
        Contract().test_a_closed_store_is_unavailable()
