"""The promise, with real processes on one SQLite file: a disabled key is refused everywhere, and stays disabled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from papaours_auth import Identity, Keys, PepperRing, Reason, StoreUnavailable, open_store
from papaours_auth.stores import Reading, Store
from support.doors import Door, Spy, open_door

SEED = "pk_prod_abc123def456ghi789"
NAME = "Production - Service Facturation"
MAX_STALENESS = 2.0
SLACK = 1.0
"""Seconds a loaded machine may add between the commit elsewhere and the clock reading here."""

DISABLE = """
import sys, time
from papaours_auth import Keys
with Keys(sys.argv[1]) as keys:
    keys.disable_key(sys.argv[2])
    print(time.monotonic())  # one clock for all processes of a machine
"""


@pytest.fixture
def url(tmp_path: Path, ring: PepperRing) -> str:
    url = f"sqlite:///{tmp_path}/keys.db"
    open_store(url, create=True).close()
    with Keys(url, peppers=ring) as keys:
        owner = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        keys.import_key(owner.id, SEED, name=NAME)
    return url


@pytest.fixture(params=["sync", "async"])
def door(request: pytest.FixtureRequest, url: str, ring: PepperRing) -> Iterator[Door]:
    door = open_door(request.param, url, peppers=ring, max_staleness=MAX_STALENESS)
    yield door
    door.close()


def test_pitfall_14_a_key_disabled_in_one_process_is_refused_in_another_and_never_comes_back(
    door: Door, url: str, record_property: Callable[[str, object], None]
) -> None:
    """keyshield and LiteLLM write the revoked key back as active on a cached hit."""
    for _ in range(1000):
        assert isinstance(door.knock(SEED), Identity)
    disabling = subprocess.Popen(
        [sys.executable, "-c", DISABLE, url, NAME], stdout=subprocess.PIPE, text=True
    )
    accepted = time.monotonic()
    while True:
        asked = time.monotonic()
        if door.knock(SEED) is Reason.KEY_INACTIVE:
            break
        accepted = asked
    committed = float(disabling.communicate(timeout=30)[0])
    record_property("milliseconds from commit to last acceptance", round((accepted - committed) * 1000, 1))
    assert accepted < committed + MAX_STALENESS + SLACK
    assert {door.knock(SEED) for _ in range(1000)} == {Reason.KEY_INACTIVE}
    with Keys(url) as keys:
        assert keys.key(NAME).status == "inactive"
        assert [change.kind for change in keys.journal(keys.key(NAME).id)] == ["key.disabled", "key.imported"]


def test_pitfall_14_nothing_on_the_verifying_side_writes(door: Door, url: str) -> None:
    assert isinstance(door.knock(SEED), Identity)
    path = Path(url.removeprefix("sqlite:///"))
    files = [path, path.with_name(path.name + "-wal")]
    before = [file.read_bytes() for file in files]
    for _ in range(1000):
        assert isinstance(door.knock(SEED), Identity)
        assert door.knock("pk_prod_0123456789abcdef") is Reason.UNKNOWN_KEY
    assert [file.read_bytes() for file in files] == before


def test_pitfall_19_a_change_that_was_committed_stands_though_no_cache_hears_of_it(
    opens: Callable[..., Door], spy: Spy, admin: Keys, store: Store, clock: object
) -> None:
    """The administrator is told of success, the store says inactive, and the deaf cache stays bounded."""
    owner = admin.create_machine("Service de facturation", organisation="cfa-lyon")
    key = admin.import_key(owner.id, SEED, name=NAME)
    door = opens(max_staleness=MAX_STALENESS)
    assert isinstance(door.knock(SEED), Identity)

    def deaf(ask: Callable[[], Reading]) -> Reading:
        raise StoreUnavailable("the eviction fails")

    spy.on_read = deaf
    assert admin.disable_key(key.id).status == "inactive"
    assert store.keys(key.id)[0].status == "inactive"
    with pytest.raises(StoreUnavailable):
        door.refresh()
    assert isinstance(door.knock(SEED), Identity)  # within the bound
    clock.advance(MAX_STALENESS)  # type: ignore[attr-defined]  # conftest's ManualClock
    assert door.knock(SEED) is Reason.KEY_INACTIVE
