"""The decision, row by row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from papaours_auth import Grant, Identity, InvalidInput, Key, KeyFormat, Machine, PepperRing, Reason, Refused
from papaours_auth.digest import Candidate, Pepper
from papaours_auth.model import Record
from papaours_auth.verify import PARTITIONS, Claim, Standing, admit, authorize, decide, partition, read

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DIGEST = b"d" * 32
CLAIM = Claim("prod", 3, (Candidate("p1", DIGEST),))
MACHINE = Machine(
    "machine_1",
    "Service de facturation",
    "cfa-lyon",
    "active",
    NOW,
    "alice",
    grants=(
        Grant("contrats", "lecture", ("cfa-lyon",), ("cfa-lyon",)),
        Grant("contrats", "écriture", ("cfa-lyon",), ("cfa-paris",)),  # not in force: home is outside
        Grant("factures", "archivage", ("*",), ("*",)),
    ),
)
KEY = Key("key_1", "machine_1", "Production", "prod", "", "x7Qz", "active", NOW, "alice")


def record(digest: bytes = DIGEST, machine: dict[str, Any] | None = None, **key: Any) -> Record:
    return Record(KEY._replace(**key), replace(MACHINE, **(machine or {})), digest)


def judge(found: Record | None, **request: Any) -> Identity | Refused:
    return decide(CLAIM, found, **{"now": NOW, "environment": "prod", **request})


def reason(found: Record | None, **request: Any) -> Reason | None:
    answer = judge(found, **request)
    return answer.reason if isinstance(answer, Refused) else None


SECOND = timedelta(seconds=1)
INACTIVE = {"status": "inactive"}
ROWS: list[tuple[str, Record | None, dict[str, Any], Reason | None]] = [
    ("a good key", record(), {}, None),
    ("no record", None, {}, Reason.UNKNOWN_KEY),
    ("another environment, by what is stored", record(environment="test"), {}, Reason.WRONG_ENVIRONMENT),
    ("an app of another environment", record(), {"environment": "test"}, Reason.WRONG_ENVIRONMENT),
    ("an inactive key", record(status="inactive"), {}, Reason.KEY_INACTIVE),
    ("an inactive machine", record(machine=INACTIVE), {}, Reason.MACHINE_INACTIVE),
    ("a second before its expiry", record(expires_at=NOW + SECOND), {}, None),
    ("at its expiry", record(expires_at=NOW), {}, Reason.KEY_EXPIRED),
    ("after its expiry", record(expires_at=NOW - SECOND), {}, Reason.KEY_EXPIRED),
    ("a right it has", record(), {"needs": "contrats:lecture"}, None),
    ("several rights it has", record(), {"needs": ["contrats:lecture", "factures:archivage"]}, None),
    ("a right typed otherwise", record(), {"needs": " contrats: Lecture "}, None),
    ("a right it lacks", record(), {"needs": "contrats:suppression"}, Reason.INSUFFICIENT_RIGHTS),
    ("one right of two", record(), {"needs": ["contrats:lecture", "x:lecture"]}, Reason.INSUFFICIENT_RIGHTS),
    ("a right of another perimeter", record(), {"needs": "contrats:écriture"}, Reason.INSUFFICIENT_RIGHTS),
]  # fmt: skip


@pytest.mark.parametrize(("what", "found", "request_", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_the_decision(
    what: str, found: Record | None, request_: dict[str, Any], expected: Reason | None
) -> None:
    assert reason(found, **request_) is expected


@pytest.mark.parametrize(
    ("networks", "client", "let_in"),
    [
        ([], None, True),
        (["192.0.2.0/24"], "192.0.2.200", True),
        (["192.0.2.0/24"], "192.0.3.1", False),
        (["192.0.2.0/24", "2001:db8::/32"], "2001:db8::1", True),
        (["192.0.2.0/24"], "2001:db8::1", False),
        (["192.0.2.0/24"], "::ffff:192.0.2.9", True),
        (["192.0.2.0/24"], ip_address("192.0.2.9"), True),
        (["192.0.2.0/24"], None, False),
        (["0.0.0.0/0"], None, False),
        (["192.0.2.0/24"], "", False),
        (["192.0.2.0/24"], "192.0.2.9, 192.0.2.1", False),
        (["192.0.2.0/24"], "localhost", False),
    ],
)
def test_an_address_outside_a_keys_networks_is_refused_as_is_one_not_known(
    networks: list[str], client: str | None, let_in: bool
) -> None:
    found = record(networks=tuple(ip_network(network) for network in networks))
    assert reason(found, client=client) is (None if let_in else Reason.NETWORK_NOT_ALLOWED)


def test_of_several_reasons_the_gravest_is_given() -> None:
    steps: list[tuple[dict[str, Any], Reason]] = [
        ({"environment": "test"}, Reason.WRONG_ENVIRONMENT),
        ({"status": "inactive"}, Reason.KEY_INACTIVE),
        ({"expires_at": NOW}, Reason.KEY_EXPIRED),
        ({"machine": INACTIVE}, Reason.MACHINE_INACTIVE),
        ({"networks": (ip_network("192.0.2.0/24"),)}, Reason.NETWORK_NOT_ALLOWED),
    ]
    for place, (_, expected) in enumerate(steps):
        faults: dict[str, Any] = {}
        for step, _ in steps[place:]:
            faults |= step
        assert reason(record(**faults), needs="contrats:suppression") is expected


def test_a_right_that_could_never_match_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidInput, match="<permission>:<operation>"):
        judge(record(), needs="contrats")


def test_a_refusal_knows_its_caller_only_where_the_digest_matched() -> None:
    known = judge(record(status="inactive"))
    unknown = judge(record(digest=b"e" * 32, status="inactive"))
    assert isinstance(known, Refused)
    assert known.known is not None
    assert known.known.key.id == "key_1"
    assert isinstance(unknown, Refused)
    assert unknown.known is None


def test_pitfall_08_a_stored_digest_presented_as_a_key_is_refused() -> None:
    pepper = Pepper.from_bytes("p1", bytes(range(32)))
    ring = PepperRing((pepper,))
    digest = pepper.digest(b"pk_prod_abc123def456ghi789")
    hexed = digest.hex()
    for presented in (digest, hexed.encode(), b"pk_prod_" + digest, b"pk_prod_" + hexed.encode()):
        claim = read(presented, format=KeyFormat(), peppers=ring)
        if isinstance(claim, Claim):
            stored = replace(record(), digest=digest)
            answer = decide(claim, stored, now=NOW, environment="prod")
            assert isinstance(answer, Refused)
            assert answer.reason is Reason.UNKNOWN_KEY


def test_pitfall_09_a_record_found_by_a_loose_comparison_is_unknown() -> None:
    """MySQL's default collations ignore case: what comes back is compared again, byte by byte."""
    assert reason(record(digest=DIGEST.upper())) is Reason.UNKNOWN_KEY
    assert reason(record(digest=DIGEST[:-1])) is Reason.UNKNOWN_KEY


def test_pitfall_26_the_stored_environment_decides_not_the_keys_text() -> None:
    claim = CLAIM._replace(environment="prod")
    for stored, app, expected in (
        ("prod", "prod", None),
        ("test", "prod", Reason.WRONG_ENVIRONMENT),
        ("prod", "pro", Reason.WRONG_ENVIRONMENT),
        ("pro", "prod", Reason.WRONG_ENVIRONMENT),
        ("test", "test", None),  # though its text says prod
    ):
        answer = decide(claim, record(environment=stored), now=NOW, environment=app)
        assert (answer.reason if isinstance(answer, Refused) else None) is expected


def test_partitions_are_spread_and_do_not_depend_on_the_pepper() -> None:
    rings = [PepperRing((Pepper.from_bytes("p", bytes(range(n, n + 32))),)) for n in (0, 1)]
    seen = set()
    for number in range(500):
        claims = [read(f"pk_prod_{number:012}".encode(), format=KeyFormat(), peppers=ring) for ring in rings]
        partitions = {claim.partition for claim in claims if isinstance(claim, Claim)}
        assert len(partitions) == 1
        seen |= partitions
    assert seen == set(range(PARTITIONS))


def test_a_standing_that_says_nothing_lets_nobody_in() -> None:
    """`stand` makes none, but whoever builds one by hand must not get an identity of None for an answer."""
    answer = admit(Standing(None, None), client=None, needs=None)
    assert isinstance(answer, Refused)
    assert answer.reason is Reason.UNKNOWN_KEY


def test_the_number_of_partitions_is_written_into_stores() -> None:
    """Where a key of another day is kept: another number, or another checksum, and it is unknown."""
    assert PARTITIONS == 16
    presented = [b"pk_prod_abc123def456ghi789", b"pk_prod_0123456789abcdef", b"pk_test_0123456789abcdef"]
    assert [partition(text) for text in presented] == [14, 8, 0]


def test_pitfall_28_neither_claim_nor_record_nor_refusal_shows_a_digest() -> None:
    refused = judge(record(status="inactive"))
    for shown in (repr(CLAIM), repr(record()), repr(refused), str(refused), repr(vars(refused))):
        assert repr(DIGEST)[2:-1] not in shown


# rights: one function judges them, for `needs` and for every `require`

CALLER = Identity.of(KEY, MACHINE)


def test_a_caller_is_authorized_for_all_rights_it_has() -> None:
    assert authorize(CALLER, "contrats:lecture") is CALLER
    assert authorize(CALLER, ["contrats:lecture", "factures:archivage"], "cfa-lyon") is CALLER


@pytest.mark.parametrize(
    ("rights", "organisation"),
    [(["contrats:lecture", "contrats:écriture"], "cfa-lyon"), (["contrats: Lecture"], "cfa-paris")],
)
def test_a_right_that_lacks_anywhere_is_refused_with_all_that_was_asked(
    rights: list[str], organisation: str
) -> None:
    answer = authorize(CALLER, rights, organisation)
    assert isinstance(answer, Refused)
    assert (answer.reason, answer.known) == (Reason.INSUFFICIENT_RIGHTS, CALLER)
    assert answer.needs == tuple(right.replace(" ", "").lower() for right in rights)


@pytest.mark.parametrize("organisation", [None, ""])
def test_an_organisation_that_was_not_found_is_an_error_and_not_any(organisation: Any) -> None:
    for ask in (
        lambda: authorize(CALLER, "contrats:lecture", organisation),
        lambda: authorize(CALLER, ["contrats:suppression", "contrats:lecture"], organisation),
        lambda: CALLER.allows("contrats:lecture", organisation),
    ):
        with pytest.raises(InvalidInput, match="organisation is None or empty"):
            ask()


@pytest.mark.parametrize("needs", ["", (), []])
def test_empty_needs_are_an_error_and_not_anything_goes(needs: Any) -> None:
    with pytest.raises(InvalidInput):
        authorize(CALLER, needs)
    with pytest.raises(InvalidInput):
        judge(record(), needs=needs)
