"""Keys minted elsewhere: while a store holds none, all of their shape are unknown without a lookup."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from papaours_auth import Identity, KeyFormat, Keys, Machine, Reason, Refused, StoreUnavailable
from papaours_auth.stores import Author, PepperRecord, Reading, Store
from papaours_auth.verify import PARTITIONS
from support.doors import Door, Spy

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"
STRANGERS = [f"pk_prod_{number:018}" for number in range(10_000)]


@pytest.fixture
def opens_plain(opens: Callable[..., Door]) -> Callable[..., Door]:
    """Open authenticators with the format that is the default."""
    return lambda **options: opens(**{"format": KeyFormat(), **options})


@pytest.fixture
def machine(admin: Keys) -> Machine:
    return admin.create_machine("Service de facturation", organisation="cfa-lyon")


@pytest.fixture
def minted(admin: Keys, machine: Machine) -> str:
    """A key of our own, in a store that holds nothing else."""
    return admin.create_key(machine.id, name="A - Key", environment="prod").secret.reveal()


def refusals(door: Door, keys: list[str]) -> list[Reason]:
    """Present one key after the other, on one event loop where it takes one."""
    authenticator = door.authenticator
    refused: list[Reason] = []

    async def ask() -> None:
        for key in keys:
            try:
                answer = authenticator.authenticate(key)
                if not isinstance(answer, Identity):
                    await answer
            except Refused as refusal:
                refused.append(refusal.reason)

    asyncio.run(ask())
    return refused


def test_ten_thousand_foreign_keys_cost_no_lookup_while_the_store_holds_none(
    opens_plain: Callable[..., Door], spy: Spy, minted: str
) -> None:
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)
    before = spy.lookups
    assert refusals(door, STRANGERS) == [Reason.UNKNOWN_KEY] * len(STRANGERS)
    assert spy.lookups == before


def test_a_store_that_holds_a_foreign_key_is_asked_for_every_other(
    opens_plain: Callable[..., Door], spy: Spy, admin: Keys, machine: Machine
) -> None:
    admin.import_key(machine.id, SEED, name="A - Import")
    door = opens_plain()
    assert isinstance(door.knock(SEED), Identity)
    assert door.knock(STRANGERS[0]) is Reason.UNKNOWN_KEY
    assert spy.lookups == 2


def test_an_import_is_seen_by_a_running_verifier_with_its_next_reading(
    opens_plain: Callable[..., Door], admin: Keys, machine: Machine, minted: str
) -> None:
    """And for good: the mark stays when the key is gone."""
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)
    assert door.knock(SEED) is Reason.UNKNOWN_KEY
    admin.import_key(machine.id, SEED, name="A - Import")
    door.refresh()
    assert isinstance(door.knock(SEED), Identity)


def test_an_import_is_seen_within_max_staleness_although_no_reading_comes(
    opens_plain: Callable[..., Door], admin: Keys, machine: Machine, minted: str, clock: ManualClock
) -> None:
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)
    admin.import_key(machine.id, SEED, name="A - Import")
    clock.advance(1.9)
    assert door.knock(SEED) is Reason.UNKNOWN_KEY
    clock.advance(0.2)
    assert isinstance(door.knock(SEED), Identity)


@pytest.mark.parametrize(
    ("foreign", "reason", "reads"),
    [(None, Reason.UNKNOWN_KEY, 0), (True, Reason.UNKNOWN_KEY, 1), (False, Reason.MALFORMED_KEY, 0)],
)
def test_a_format_may_force_either(
    opens_plain: Callable[..., Door], spy: Spy, minted: str, foreign: bool | None, reason: Reason, reads: int
) -> None:
    door = opens_plain(format=KeyFormat(foreign=foreign))
    assert isinstance(door.knock(minted), Identity)
    before = spy.lookups
    assert door.knock(STRANGERS[0]) is reason
    assert spy.lookups == before + reads


def told_of(partitions: Collection[int]) -> Callable[[Callable[[], Reading]], Reading]:
    """Have readings tell that these partitions alone hold no foreign key."""

    def read(ask: Callable[[], Reading]) -> Reading:
        reading = ask()
        return reading._replace(news={0: reading.news[0]._replace(minted_only=partitions)})

    return read


def test_a_partition_of_which_no_reading_tells_is_asked(
    opens_plain: Callable[..., Door], spy: Spy, minted: str
) -> None:
    """A third party's store that keeps no mark, a part that no reading has brought yet."""
    spy.on_read = told_of(())
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)
    before = spy.lookups
    assert door.knock(STRANGERS[0]) is Reason.UNKNOWN_KEY
    assert spy.lookups == before + 1
    spy.on_read = told_of(range(PARTITIONS))
    door.refresh()
    assert door.knock(STRANGERS[1]) is Reason.UNKNOWN_KEY
    assert spy.lookups == before + 1


def test_without_the_store_a_foreign_key_is_unknown_as_long_as_the_last_reading_is_believed(
    opens_plain: Callable[..., Door], spy: Spy, minted: str, clock: ManualClock
) -> None:
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)

    def away(_: object) -> object:
        raise StoreUnavailable("away")

    spy.on_lookup = spy.on_describe = away  # type: ignore[assignment]  # it answers nothing
    assert door.knock(STRANGERS[0]) is Reason.UNKNOWN_KEY
    clock.advance(2.1)
    assert door.knock(STRANGERS[0]) is Reason.STORE_UNAVAILABLE


def test_an_app_with_other_peppers_than_the_stores_tells_nobody_that_a_key_is_unknown(
    opens_plain: Callable[..., Door], spy: Spy, store: Store, minted: str
) -> None:
    """The store's primary is one that the app does not have; then they contradict each other."""
    door = opens_plain()
    assert isinstance(door.knock(minted), Identity)
    author = Author("Alice", datetime.now(UTC))
    store.add_pepper(PepperRecord("p2", b"?" * 32, "accept"), author)
    store.set_pepper_status("p2", "primary", author)
    door.refresh()
    assert door.knock(STRANGERS[0]) is Reason.STORE_UNAVAILABLE

    told = PepperRecord("p1", b"?" * 32, "primary")
    spy.on_describe = lambda ask: ask()._replace(peppers=(told,))
    spy.on_read = lambda ask: _with_peppers(ask(), told)
    door.refresh()
    assert door.knock(STRANGERS[0]) is Reason.STORE_UNAVAILABLE


def _with_peppers(reading: Reading, *peppers: PepperRecord) -> Reading:
    return reading._replace(news={0: reading.news[0]._replace(peppers=peppers)})
