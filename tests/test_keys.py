"""Administration: what may be done, what may not, and what the journal says of it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conftest import PEPPER
from papaours_auth import (
    AsyncKeys,
    Authenticator,
    ConfigurationError,
    Conflict,
    Grant,
    InvalidInput,
    Keys,
    NotFound,
    PepperRing,
    Refused,
    Secret,
    StoreUnavailable,
    SystemMachineProtected,
    open_store,
    parse_peppers,
)
from papaours_auth.digest import new_pepper
from papaours_auth.stores import Author, PepperRecord, Store
from papaours_auth.stores.memory import MemoryStore

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"
HOME = "cfa-lyon"


@pytest.fixture
def machine(keys: Keys) -> str:
    return keys.create_machine("Service de facturation", organisation=HOME).id


def test_a_machine_and_its_keys_go_by_id_or_exact_name(keys: Keys, machine: str) -> None:
    key = keys.create_key("Service de facturation", name="Production - A", environment="prod").key
    assert keys.machine(machine) == keys.machine("Service de facturation")
    assert keys.key(key.id) == keys.key("Production - A") == key
    assert keys.keys("Service de facturation") == [key]
    for missing in ("Service", "", "machine_0"):
        with pytest.raises(NotFound, match="no machine with this id or exact name"):
            keys.machine(missing)


def test_the_keys_of_a_machine_are_its_own_alone(keys: Keys, machine: str) -> None:
    other = keys.create_machine("Export", organisation=HOME)
    first = keys.create_key(machine, name="Production - A", environment="prod").key
    second = keys.create_key(other.id, name="Production - B", environment="prod").key
    assert keys.keys() == [first, second]
    for named in (other.id, "Export"):
        assert keys.keys(named) == [second]
    with pytest.raises(NotFound):
        keys.keys("nobody")


def test_an_id_goes_before_a_name_that_is_equal_to_it(keys: Keys, machine: str, store: Store) -> None:
    """`Keys` gives no such name, but a store may have one: its command must not meet, nor stop, another's."""
    key, twin = (keys.create_key(machine, name=name, environment="prod").key for name in ("A", "B"))
    other, author = keys.create_machine("Export", organisation=HOME), Author("alice", datetime.now(UTC))
    store.update_key(twin.id, {"name": key.id}, "key.renamed", author)
    store.update_machine(other.id, {"name": machine}, "machine.updated", author)
    assert keys.key(key.id) == key
    assert keys.machine(machine).id == machine
    assert keys.disable_key(key.id).name == "A"


def test_a_name_that_fits_several_is_asked_back_with_their_ids(keys: Keys, machine: str) -> None:
    made = [keys.create_key(machine, name="Production", environment="prod").key.id for _ in range(2)]
    with pytest.raises(Conflict, match="2 keys have this name") as error:
        keys.disable_key("Production")
    assert all(id_ in str(error.value) for id_ in made)
    assert {key.status for key in keys.keys()} == {"active"}
    assert keys.disable_key(made[0]).status == "inactive"


def test_disabling_keeps_the_key_in_the_list_and_enabling_restores_it(keys: Keys, machine: str) -> None:
    key = keys.create_key(machine, name="Production - A", environment="prod").key
    assert keys.disable_key(key.id).status == "inactive"
    assert [listed.status for listed in keys.keys()] == ["inactive"]
    assert keys.enable_key(key.id) == key
    assert keys.disable_machine(machine).status == "inactive"
    assert keys.enable_machine(machine).status == "active"
    assert keys.rename_key(key.id, "Production - B").name == "Production - B"


def test_the_journal_names_who_did_what(store: Store, ring: PepperRing) -> None:
    keys = Keys(store, peppers=ring, actor="alice@papaours.example")
    machine = keys.create_machine("Service", organisation=HOME)
    key = keys.create_key(machine.id, name="Production - A", environment="prod").key
    keys.disable_key(key.id)
    keys.disable_key(key.id)  # again: no change, no entry
    changes = keys.journal(key.id)
    assert [(change.kind, change.actor) for change in changes] == [
        ("key.disabled", "alice@papaours.example"),
        ("key.created", "alice@papaours.example"),
    ]
    assert (changes[0].before, changes[0].after) == ('{"status": "active"}', '{"status": "inactive"}')


def test_the_seeds_key_is_imported_with_its_digest(
    keys: Keys, machine: str, ring: PepperRing, store: Store
) -> None:
    key = keys.import_key(machine, SEED, name="Production - Document 05")
    assert (key.environment, key.usage, key.last4) == ("prod", "", "i789")
    assert keys.printable(key) == "pk_prod_…i789"
    with pytest.raises(Conflict, match="already has this key"):
        keys.import_key(machine, Secret(SEED), name="Encore")


SECOND = new_pepper(["p1"])


def test_a_key_of_a_former_primary_pepper_is_not_imported_a_second_time(
    keys: Keys, machine: str, store: Store
) -> None:
    """It would be one text with two records: who disables the one that is shown leaves the other's door open."""
    keys.import_key(machine, SEED, name="Production - Document 05")
    both = parse_peppers(f"{PEPPER},{SECOND}")
    added = both.peppers[1].proof(store.describe().installation)
    author = Author("alice", datetime.now(UTC))
    store.add_pepper(PepperRecord("p2", added, "accept"), author)
    store.set_pepper_status("p2", "primary", author)
    for ring in (both, parse_peppers(f"{SECOND},{PEPPER}")):
        later = Keys(store, peppers=ring)
        with pytest.raises(Conflict, match="already has this key"):
            later.import_key(machine, SEED, name="Encore")
        later.create_key(machine, name="Production", environment="prod")
    assert [key.name for key in keys.keys()] == ["Production - Document 05", "Production", "Production"]
    assert (store.count_digests("p1"), store.count_digests("p2")) == (1, 2)  # digested under the new one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is no key"),
        ("pk_prod_short", "this is no key"),
        ("sk_live_abc123def456ghi789", "this is no key"),
        ("pk_prod_" + "a" * 36, "this is no key"),
        (SEED + "\ud800", "this is no key"),
    ],
)
def test_what_is_no_key_is_not_imported(keys: Keys, machine: str, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as error:
        keys.import_key(machine, text, name="Production")
    assert not text or text not in str(error.value)
    assert keys.keys() == []


def test_amendment_12_a_key_of_our_own_format_is_never_imported(keys: Keys, machine: str) -> None:
    made = keys.create_key(machine, name="Production", environment="prod").secret
    with pytest.raises(InvalidInput, match="only Papaours mints those"):
        keys.import_key(machine, made, name="Production v2")


def test_a_label_of_200_characters_is_not_too_long(keys: Keys, machine: str) -> None:
    label = "x" * 200
    assert keys.create_machine(label, organisation=label, description=label).name == label
    assert keys.create_key(machine, name=f" {label} ", environment="prod").key.name == label


LABELS = {
    "": "empty",
    " \t": "empty",
    "x" * 201: "longer than 200",
    "a\nb": "cannot be shown",
    "a\x1b[31mb": "cannot be shown",
    f"Production {SEED}": "contains a key",
    f"key={SEED}": "contains a key",
    f"https://api.example/v1?key={SEED}&page=2": "contains a key",
    f'"{SEED}"': "contains a key",
    f"x{SEED}x": "contains a key",
    SEED.upper(): "contains a key",
    "".join(chr(ord(c) + 0xFEE0) for c in SEED): "contains a key",
    SEED.replace("_", r"\_"): "contains a key",
    f"{SEED[:11]} {SEED[11:]}": "contains a key",
    f"\u200b{SEED}": "cannot be shown",
}


@pytest.mark.parametrize(("label", "said"), LABELS.items())
def test_a_label_that_people_could_not_read_is_refused(
    keys: Keys, store: Store, machine: str, label: str, said: str
) -> None:
    kept = keys.create_key(machine, name="Production", environment="prod").key
    calls: list[Callable[[], object]] = [
        lambda: keys.create_machine(label, organisation=HOME),
        lambda: keys.create_machine("m", organisation=label),
        lambda: keys.create_machine("m", organisation=HOME, grants=[Grant("x", "lecture", (label,), ("*",))]),
        lambda: keys.create_machine("m", organisation=HOME, grants=[Grant("x", "lecture", ("*",), (label,))]),
        lambda: keys.create_key(machine, name=label, environment="prod"),
        lambda: keys.import_key(machine, SEED, name=label),
        lambda: keys.rename_key(kept.id, label),
        lambda: Keys(store, actor=label),
        *((lambda: keys.rotate_key(kept.id, name=label),) if label else ()),
        *((lambda: keys.create_machine("m", organisation=HOME, description=label),) if label.strip() else ()),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match=said):
            call()
    assert len(keys.machines()) == 1
    assert keys.keys() == [kept]


def test_pitfall_56_rights_usage_and_peppers_hold_no_key_either(
    keys: Keys, store: Store, machine: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: keys.create_machine("m", organisation=HOME, rights=[f"{SEED}:lecture"]),
        lambda: keys.create_machine("m", organisation=HOME, rights=[f"contrats:lecture@org-a,x{SEED}"]),
        lambda: keys.create_machine(
            "m", organisation=HOME, grants=[Grant(f"x{SEED}", "lecture", (), ("*",))]
        ),
        lambda: keys.create_key(machine, name="Production", environment="prod", usage=SEED),
        lambda: keys.create_key(machine, name="Production", environment="prod", usage=f"export_{SEED}_x"),
        lambda: keys.import_key(machine, f"pk_prod_{SEED}_abc123def456ghi789", name="Production"),
        lambda: Keys(MemoryStore(), peppers=parse_peppers(new_pepper().replace("p1:", f"{SEED}:"))),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="contains a key") as error:
            call()
        assert SEED not in str(error.value)
    assert len(keys.machines()) == 1
    assert keys.keys() == []


STARS = ["*", " * ", "**", "cfa-*", "\uff0a", "a,b", "a@b", "\uff0c"]


@pytest.mark.parametrize("name", STARS)
def test_pitfall_56_no_organisation_is_called_by_what_rights_are_written_with(keys: Keys, name: str) -> None:
    """A machine at home in ``*`` had rights on all organisations by ``contrats:lecture`` alone."""
    with pytest.raises(InvalidInput, match="organisation"):
        keys.create_machine("Portail", organisation=name, rights=["contrats:lecture"])
    assert keys.machines() == []


@pytest.mark.parametrize(
    "right",
    [
        "contrats:lecture@", "contrats:lecture@,", "contrats:lecture@ ", "contrats:lecture@a,", "contrats:lecture@,a",
        "contrats:lecture@a,,b", "contrats:lecture@*,a", "contrats:lecture@a,*", "contrats:lecture@**",
        "contrats:lecture@a*", "contrats:lecture@\uff0a", "contrats:lecture@a@b", "contrats@a:lecture", "*:lecture",
        "con,trats:lecture", "@*", "contrats:lecture@@*", "contrats:lecture@a\nb", "contrats:lecture@a\u200b",
    ],
)  # fmt: skip
def test_a_right_that_can_be_read_in_two_ways_is_refused(keys: Keys, right: str) -> None:
    with pytest.raises(InvalidInput):
        keys.create_machine("Portail", organisation=HOME, rights=[right])
    assert keys.machines() == []


def test_blanks_around_the_organisations_of_a_right_are_no_part_of_them(keys: Keys) -> None:
    machine = keys.create_machine("Portail", organisation=HOME, rights=["contrats:lecture@ org-a , org-b "])
    assert machine.grants[0].organisations == ("org-a", "org-b")


def test_pitfall_56_no_name_looks_like_an_id(keys: Keys, machine: str) -> None:
    """Whoever types an id must not reach what somebody called so."""
    key = keys.create_key(machine, name="Production", environment="prod").key
    for name in (machine, key.id, f" {key.id} ", key.id.upper()):
        with pytest.raises(InvalidInput, match="reads like an id"):
            keys.create_machine(name, organisation=HOME)
        with pytest.raises(InvalidInput, match="reads like an id"):
            keys.rename_key(key.id, name)


def test_rights_are_shorthand_for_grants(keys: Keys) -> None:
    machine = keys.create_machine(
        "Portail",
        organisation=HOME,
        rights=["contrats:lecture", "contrats:ecriture@a,b", "x:archivage@*"],
        grants=[Grant("y", "lecture", (), ("z",))],
    )
    assert machine.grants == (
        Grant("contrats", "lecture", (HOME,), (HOME,)),
        Grant("contrats", "écriture", ("a", "b"), (HOME, "a", "b")),
        Grant("x", "archivage", ("*",), ("*",)),
        Grant("y", "lecture", (), ("z",)),
    )
    for wrong in ("contrats", "contrats:danser", "contrats:lecture@", "contrats:lecture@,"):
        with pytest.raises(InvalidInput):
            keys.create_machine("Faux", organisation=HOME, rights=[wrong])


WRONG_EXPIRIES: dict[str, Any] = {
    "no time zone": datetime(2090, 1, 1),  # noqa: DTZ001 - that is the point
    "lies in the past": datetime(2001, 1, 1, tzinfo=UTC),
    "further away": timedelta(days=99_999_999),
    "the past": timedelta(seconds=-1),
}


@pytest.mark.parametrize(("said", "expires"), WRONG_EXPIRIES.items())
def test_pitfall_16_an_expiry_that_names_no_future_moment_is_refused(
    keys: Keys, machine: str, said: str, expires: Any
) -> None:
    with pytest.raises(InvalidInput, match=said):
        keys.create_key(machine, name="Production", environment="prod", expires=expires)
    assert keys.keys() == []


def test_an_environment_that_does_not_exist_makes_no_key(keys: Keys, machine: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: keys.create_key(machine, name="Production - A", environment="production"),
        lambda: keys.import_key(machine, SEED, name="Production - A", environment="production"),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="'production' does not exist: use one of prod, test"):
            call()
    assert len(keys.keys()) == 0


def test_networks_are_addresses_or_blocks(keys: Keys, machine: str) -> None:
    key = keys.create_key(
        machine, name="Production", environment="prod", networks=["192.0.2.7", " 2001:db8::/32 "]
    ).key
    assert [str(network) for network in key.networks] == ["192.0.2.7/32", "2001:db8::/32"]
    for wrong in ("", "localhost", "192.0.2.7/24", "192.0.2.0/33"):
        with pytest.raises(InvalidInput, match="a network is"):
            keys.create_key(machine, name="Production", environment="prod", networks=[wrong])


def test_a_rotated_key_has_a_successor_like_itself_and_lives_on(admin: Keys, clock: ManualClock) -> None:
    owner = admin.create_machine("Service de facturation", organisation=HOME)
    old = admin.create_key(
        owner.id, name="Production - Export", environment="prod", usage="export", networks=["192.0.2.0/24"]
    ).key
    clock.advance(3600)
    new = admin.rotate_key(old.id)
    assert new.key.replaces == old.id
    assert new.key.name == "Production - Export v2"
    assert new.key.expires_at is None
    for same in ("machine_id", "environment", "usage", "networks", "status"):
        assert getattr(new.key, same) == getattr(old, same)
    assert new.secret.reveal().startswith("pk_prod_export_")
    assert admin.key(old.id) == old
    assert admin.rotate_key(new.key.id).key.name == "Production - Export v3"
    assert admin.rotate_key(old.id, name="Production - Autre").key.name == "Production - Autre"


def test_pitfall_20_rotation_does_not_extend_the_old_keys_life(admin: Keys, clock: ManualClock) -> None:
    owner = admin.create_machine("Service de facturation", organisation=HOME)
    old = admin.create_key(
        owner.id, name="Production - A", environment="prod", expires=timedelta(days=90)
    ).key
    clock.advance(86_400)
    new = admin.rotate_key(old.id).key
    assert admin.key(old.id).expires_at == old.expires_at
    assert new.expires_at is not None
    assert new.expires_at - new.created_at == timedelta(days=90)
    assert admin.rotate_key(old.id, expires=timedelta(days=1)).key.expires_at == new.created_at + timedelta(
        days=1
    )


def test_pitfall_25_system_machines_refuse_every_change(keys: Keys, store: Store) -> None:
    system = keys.create_machine("Papaours", organisation=HOME, system=True)
    usual = keys.create_machine("Service", organisation=HOME)
    key = keys.create_key(usual.id, name="Production", environment="prod").key
    calls: dict[str, Callable[[], object]] = {
        "create_key": lambda: keys.create_key(system.id, name="Production", environment="prod"),
        "import_key": lambda: keys.import_key(system.id, SEED, name="Production"),
        "disable_machine": lambda: keys.disable_machine(system.id),
        "enable_machine": lambda: keys.enable_machine(system.id),
    }
    before = store.journal(), store.machines(), store.keys()
    for call in calls.values():
        with pytest.raises(SystemMachineProtected):
            call()
    assert (store.journal(), store.machines(), store.keys()) == before
    # Its keys are as protected as itself: make the usual one's machine look like the system's.
    protected = Keys(_Pretending(store), actor="mallory")
    of_keys = {
        "disable_key": lambda: protected.disable_key(key.id),
        "enable_key": lambda: protected.enable_key(key.id),
        "rename_key": lambda: protected.rename_key(key.id, "x"),
        "rotate_key": lambda: protected.rotate_key(key.id),
    }
    for call in of_keys.values():
        with pytest.raises(SystemMachineProtected):
            call()
    reading = {"machine", "machines", "key", "keys", "journal", "printable", "close", "create_machine"}
    public = {name for name, _ in inspect.getmembers(Keys, inspect.isfunction) if not name.startswith("_")}
    assert public == reading | calls.keys() | of_keys.keys(), (
        "a new method: say here what it does to a system machine"
    )


class _Pretending:
    """A store all of whose machines are Papaours' own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def machines(self, id_or_name: str | None = None) -> list[Any]:
        from dataclasses import replace

        return [replace(machine, system=True) for machine in self._store.machines(id_or_name)]


def test_amendment_14_administration_with_a_wrong_pepper_stops_before_it_does_harm(
    keys: Keys, store: Store
) -> None:
    with pytest.raises(ConfigurationError, match="not the one this store was made with"):
        Keys(store, peppers=parse_peppers(new_pepper()))


def test_whoever_must_disable_a_key_at_night_needs_no_pepper(
    keys: Keys, machine: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.create_key(machine, name="Production", environment="prod").key
    monkeypatch.delenv("PAPAOURS_PEPPER", raising=False)
    monkeypatch.delenv("PAPAOURS_PEPPER_FILE", raising=False)
    at_night = Keys(store, actor="on call")
    assert at_night.disable_key(key.id).status == "inactive"
    with pytest.raises(ConfigurationError, match="no pepper"):
        at_night.create_key(machine, name="Production v2", environment="prod")


def test_a_store_that_was_opened_from_a_url_is_closed_and_one_that_was_given_is_not(
    store: Store, ring: PepperRing, tmp_path: Path
) -> None:
    with Keys(store, peppers=ring) as given:
        given.create_machine("Service", organisation=HOME)
    assert len(given.machines()) == 1
    url = f"sqlite:///{tmp_path}/owned.db"
    open_store(url, create=True).close()
    with Keys(url, peppers=ring) as owned:
        owned.create_machine("Service", organisation=HOME)
    with pytest.raises(StoreUnavailable, match="closed"):
        owned.machines()


def test_a_store_is_closed_where_the_peppers_are_not_its_own(
    ring: PepperRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/owned.db"
    open_store(url, create=True).close()
    Keys(url, peppers=ring).close()
    opened = open_store(url)
    monkeypatch.setattr("papaours_auth.keys.open_store", lambda _: opened)
    with pytest.raises(ConfigurationError, match="not the one this store was made with"):
        Keys(url, peppers=parse_peppers(new_pepper()))
    with pytest.raises(StoreUnavailable, match="closed"):
        opened.machines()


def test_the_async_twin_has_every_method_and_they_do_the_same(keys: Keys, machine: str) -> None:
    names = {name for name, _ in inspect.getmembers(Keys, inspect.isfunction) if not name.startswith("_")}
    assert {name for name in names if not hasattr(AsyncKeys, name)} == {"close", "printable"}

    async def live() -> None:
        twin = AsyncKeys(keys)
        new = await twin.create_key(machine, name="Production", environment="prod")
        assert await twin.key(new.key.id) == new.key
        assert (await twin.disable_key(new.key.id)).status == "inactive"
        assert await twin.keys() == keys.keys()
        with pytest.raises(NotFound):
            await twin.key("nothing")

    asyncio.run(live())


def test_pitfall_47_a_key_bound_to_a_mapped_network_comes_in_from_it(
    keys: Keys, ring: PepperRing, store: Store
) -> None:
    """slskd#1605: ``::ffff:192.0.2.0/120`` was taken, and no address was ever in it."""
    machine = keys.create_machine("Portail", organisation=HOME)
    new = keys.create_key(
        machine.id, name="Production", environment="prod", networks=["::ffff:192.0.2.0/120"]
    )
    assert [str(network) for network in keys.key(new.key.id).networks] == ["192.0.2.0/24"]
    with Authenticator(store, environment="prod", peppers=ring, watch=False) as door:
        for client in ("192.0.2.7", "::ffff:192.0.2.7"):
            assert door.authenticate(new.secret.reveal(), client=client).key.id == new.key.id
        with pytest.raises(Refused, match="network_not_allowed"):
            door.authenticate(new.secret.reveal(), client="192.0.3.7")
