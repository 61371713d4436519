"""Rights, grants and addresses."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest

from papaours_auth import Grant, Identity, InvalidInput, Key, Machine
from papaours_auth.model import parse_address, parse_network, parse_right
from papaours_auth.names import unclear

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def identity(*grants: Grant, organisation: str = "cfa-lyon") -> Identity:
    machine = Machine("m", "Service de facturation", organisation, "active", NOW, "alice", grants=grants)
    return Identity.of(Key("k", "m", "Production", "prod", "", "x7Qz", "active", NOW, "alice"), machine)


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("contrats:lecture", "contrats:lecture"),
        ("contrats:Écriture", "contrats:écriture"),
        ("contrats:ecriture", "contrats:écriture"),
        ("contrats:e\u0301criture", "contrats:écriture"),  # an accent as a character of its own
        ("Contrats:suppression", "Contrats:suppression"),
    ],
)
def test_a_right_has_one_spelling(text: str, spelling: str) -> None:
    assert parse_right(text) == spelling


@pytest.mark.parametrize(
    "text",
    [
        "",
        "contrats",
        "contrats:",
        ":lecture",
        "contrats:read",
        "a b:lecture",
        "a:b:lecture",
        "*:lecture",
        "a@b:lecture",
        "a,b:lecture",
    ],
)
def test_what_is_no_right_is_told(text: str) -> None:
    with pytest.raises(InvalidInput, match="right"):
        parse_right(text)


def test_a_grant_counts_only_while_home_is_inside_its_perimeter() -> None:
    grant = Grant("contrats", "lecture", ("cfa-lyon", "cfa-paris"), ("cfa-lyon",))
    assert identity(grant).allows("contrats:lecture")
    moved = identity(grant, organisation="cfa-paris")
    assert not moved.allows("contrats:lecture")
    assert moved.grants == ()
    assert identity(Grant("contrats", "lecture", (), ())).rights == frozenset()


def test_pitfall_56_a_machine_at_home_in_a_star_has_no_rights_whatever_a_store_says() -> None:
    """A star is a mark of grants, never a name: such a record gave rights on every organisation."""
    caller = identity(
        Grant("contrats", "lecture", ("*",), ("*",)),
        Grant("contrats", "lecture", ("*",), ("cfa-lyon", "*")),
        organisation="*",
    )
    assert caller.rights == frozenset()
    assert not caller.allows("contrats:lecture", "cfa-lyon")
    assert not caller.allows("contrats:lecture", "*")


def test_a_right_reaches_the_organisations_of_its_grant_and_no_others() -> None:
    some = identity(
        Grant("contrats", "lecture", ("cfa-lyon",), ("*",)),
        Grant("contrats", "écriture", ("*",), ("cfa-lyon",)),
    )
    assert some.allows("contrats:lecture", "cfa-lyon")
    assert not some.allows("contrats:lecture", "cfa-paris")
    assert some.allows("contrats:ecriture", "cfa-paris")
    with pytest.raises(InvalidInput):
        some.allows("contrats")


def test_an_identity_answers_to_the_names_starlette_reads() -> None:
    caller = identity(Grant("contrats", "lecture", ("*",), ("*",)))
    assert caller.is_authenticated
    assert (caller.display_name, caller.identity) == ("Service de facturation", "m")
    assert caller.scopes == {"contrats:lecture"}


def test_nothing_of_the_model_can_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity().machine = None  # type: ignore[misc,assignment]  # that is the point
    with pytest.raises(AttributeError):
        identity().key.name = "x"  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("192.0.2.1:80", None),
        ("192.0.2", None),
        ("192.0.2.01", None),  # octal to some, decimal to others
        ("unix", None),
        ("", None),
    ],
)
def test_addresses(text: str, read: str | None) -> None:
    parsed = parse_address(text)
    assert (None if parsed is None else str(parsed)) == read


CLEAR = [
    "Production - Service Facturation",
    "Test - Intégration Partenaire",
    "Développement - Application Mobile",
    "Staging - API Externe v2",
]


@pytest.mark.parametrize("label", CLEAR)
def test_a_clear_label_is_clear(label: str) -> None:
    assert unclear(label) is None


@pytest.mark.parametrize("label", ["Clé 1", "Ma clé", "Test", "API", "Service Facturation", "key_2", ""])
def test_a_vague_label_is_told_what_it_lacks(label: str) -> None:
    assert "does not say which" in (unclear(label) or "")


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("::ffff:0:0:0/96", "::ffff:0:0:0/96"),  # translated, not mapped
    ],
)
def test_pitfall_47_a_mapped_network_is_read_as_the_one_it_maps(text: str, network: str) -> None:
    assert str(parse_network(text)) == network


def test_a_mapped_network_with_host_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="host bits"):
        parse_network("::ffff:192.0.2.1/120")
