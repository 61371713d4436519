"""The contract over our stores, and how a store is opened by its URL."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from papaours_auth import ConfigurationError, open_async_store, open_store
from papaours_auth.digest import Candidate
from papaours_auth.model import Record
from papaours_auth.stores import AsyncStore, Epoch, Found, Reading, Store
from papaours_auth.stores.memory import AsyncMemoryStore, MemoryStore
from papaours_auth.testing import StoreContract
from papaours_auth.verify import PARTITIONS, Claim


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


def echoing(claim: Claim, record: Record | None) -> Record | None:
    """A record with the digest that was asked for: right, as long as nothing goes wrong."""
    asked = [candidate.digest for candidate in claim.candidates]
    return record and replace(record, digest=asked[asked.index(record.digest)])


def test_pitfall_33_the_contract_finds_a_store_that_echoes_the_questions_digest() -> None:
    class Echo(MemoryStore):
        def lookup(self, claim: Claim) -> Found:
            found = super().lookup(claim)
            return found._replace(record=echoing(claim, found.record))

    class Loose(MemoryStore):
        """Compares as a collation that ignores case does, and gives a copy of what was asked for."""

        def lookup(self, claim: Claim) -> Found:
            for candidate in claim.candidates:
                for kept in list(self._digests):
                    if kept.lower() == candidate.digest.lower():
                        found = super().lookup(claim._replace(candidates=(Candidate("p1", kept),)))
                        copy = bytes(bytearray(candidate.digest))
                        return found._replace(record=found.record and replace(found.record, digest=copy))
            return super().lookup(claim)

    class AsyncEcho(AsyncMemoryStore):
        async def lookup(self, claim: Claim) -> Found:
            found = await super().lookup(claim)
            return found._replace(record=echoing(claim, found.record))

    class Contract(StoreContract):
        def __init__(self, store: MemoryStore, twin: AsyncMemoryStore | None = None) -> None:
            self.open = lambda: store  # type: ignore[method-assign]  # a store each
            self.open_async = lambda: twin  # type: ignore[method-assign]  # likewise

    Contract(MemoryStore()).test_the_digest_of_a_record_is_the_one_that_the_store_keeps()
    real = MemoryStore()
    for contract in (Contract(Echo()), Contract(Loose()), Contract(real, AsyncEcho(real))):
        with pytest.raises(AssertionError, match="taken from the question"):
            contract.test_the_digest_of_a_record_is_the_one_that_the_store_keeps()


def test_the_contract_finds_a_store_that_forgets_to_tell_of_a_foreign_key() -> None:
    class Forgetful(MemoryStore):
        def read_log(self, known: Epoch | None) -> Reading:
            reading = super().read_log(known)
            return reading._replace(news={0: reading.news[0]._replace(minted_only=range(PARTITIONS))})

    class Untold(MemoryStore):
        def read_log(self, known: Epoch | None) -> Reading:
            reading = super().read_log(known)
            return reading._replace(news={0: reading.news[0]._replace(minted_only=())})

    class Contract(StoreContract):
        def open(self) -> Store:
            return Forgetful()

    class Lazy(StoreContract):
        tells_minted_only = False

        def open(self) -> Store:
            return Untold()

    with pytest.raises(AssertionError, match="the foreign key is not told"):
        Contract().test_readings_tell_that_no_foreign_key_was_added_until_one_is()
    Lazy().test_readings_tell_that_no_foreign_key_was_added_until_one_is()
