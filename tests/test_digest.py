"""Peppers: where they come from, what is made with them, and how a wrong one is told."""

from __future__ import annotations

import base64
import traceback
from pathlib import Path

import pytest

from papaours_auth import ConfigurationError, PepperRing, parse_peppers, peppers_from_environment
from papaours_auth.digest import PepperStatus, new_pepper

VALUE = base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
OTHER = base64.urlsafe_b64encode(bytes(range(100, 140))).decode()


def ring(*ids: str, **statuses: PepperStatus) -> PepperRing:
    text = ",".join(
        f"{id_}:{base64.urlsafe_b64encode(bytes(range(n, n + 32))).decode()}" for n, id_ in enumerate(ids)
    )
    parsed = parse_peppers(text)
    return parsed.with_statuses(statuses) if statuses else parsed


@pytest.mark.parametrize(
    "text",
    [
        f"p1:{VALUE}",
        f"p1:{VALUE}=\n",
        f" p1:{VALUE} , p2:{OTHER}",
        f"# made in 2026\np1:{VALUE}\n\n# the next\np2:{OTHER}\n",
    ],
)
def test_amendment_15_peppers_are_read_from_one_line_or_several(text: str) -> None:
    assert [pepper.id for pepper in parse_peppers(text).peppers] == ["p1", "p2"][: text.count(":")]


WRONG = {
    "": "no pepper",
    "  \n# only a comment\n": "no pepper",
    "c2VjcmV0": "pepper 1 is not written id:base64url",
    f"p1:{VALUE},nonsense": "pepper 2 is not written id:base64url",
    "p1:not*base64": "pepper 1 is not base64url",
    "p1:" + "é" * 43: "pepper 1 is not base64url",
    # Characters that a lenient decoder drops: what is left would be another pepper than the one that was meant.
    f"p1:{VALUE[:20]} {VALUE[20:]}": "pepper 1 is not base64url",
    f"p1:{VALUE[:20]}!!!!{VALUE[20:]}": "pepper 1 is not base64url",
    f"p1: {VALUE}": "pepper 1 is not base64url",
    f"p1:'{VALUE}'": "pepper 1 is not base64url",
    f"p1:{VALUE[:20]}={VALUE[20:]}": "pepper 1 is not base64url",
    "p1:" + VALUE[:40]: "has 30 bytes and needs at least 32",
    "p1:": "has 0 bytes",
    "p1:" + base64.b64encode(b"a" * 32).decode(): "placeholder",
    "p1:" + base64.b64encode(b"changeme" * 4).decode(): "placeholder",
    "p1:" + base64.b64encode(bytes(64)).decode(): "placeholder",
    f"p 1:{VALUE}": "id must be",
    f"{'p' * 33}:{VALUE}": "id must be",
    f"p1:{VALUE},p1:{OTHER}": "same id",
}


def test_sixteen_different_bytes_are_enough_and_fifteen_are_a_placeholder() -> None:
    enough, few = (base64.urlsafe_b64encode((bytes(range(n)) * 3)[:32]).decode() for n in (16, 15))
    assert parse_peppers(f"p1:{enough}").primary.id == "p1"
    with pytest.raises(ConfigurationError, match="placeholder"):
        parse_peppers(f"p1:{few}")


@pytest.mark.parametrize(("text", "said"), WRONG.items())
def test_pitfall_32_a_pepper_that_protects_nothing_stops_at_start(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as error:
        peppers_from_environment({"PAPAOURS_PEPPER": text})
    assert "\n" not in str(error.value)
    for value in text.replace(",", " ").split():
        secret = value.partition(":")[2]
        assert not secret or secret not in "".join(traceback.format_exception(error.value))


def test_pitfall_32_a_missing_pepper_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="papaours-auth init"):
        peppers_from_environment({})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(tmp_path / "missing")})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(tmp_path / "binary")})


def test_pitfall_32_two_sources_of_peppers_are_one_too_many() -> None:
    with pytest.raises(ConfigurationError, match="both set"):
        peppers_from_environment(
            {"PAPAOURS_PEPPER": f"p1:{VALUE}", "PAPAOURS_PEPPER_FILE": "/run/secrets/pepper"}
        )


def test_a_pepper_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text(new_pepper() + "\n")
    (tmp_path / "pepper").chmod(0o600)
    assert peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(tmp_path / "pepper")}).primary.id == "p1"


def test_new_peppers_are_good_different_and_take_a_free_id() -> None:
    made = {new_pepper() for _ in range(100)}
    assert len(made) == 100
    assert all(parse_peppers(text).primary.id == "p1" for text in made)
    assert new_pepper(["p1", "p2"]).startswith("p3:")
    assert new_pepper(["p2"]).startswith("p1:")


def test_one_pepper_cannot_stand_in_for_another_nor_one_use_for_another() -> None:
    first, second = ring("a", "b").peppers
    made = [(pepper.digest(b"x"), pepper.proof("x"), pepper.tag(b"x")) for pepper in (first, second)]
    assert len({part for parts in made for part in parts}) == 6
    assert int.from_bytes(first.digest(b"x")[:4], "big") != first.tag(b"x")


def test_the_first_pepper_is_primary_until_a_store_says_otherwise() -> None:
    assert ring("a", "b").primary.id == "a"
    assert ring("a", "b", a="accept", b="primary").primary.id == "b"
    assert ring("a", "b", b="primary").status(ring("a", "b").peppers[0]) == "accept"


def test_amendment_13_a_retired_pepper_digests_nothing_and_still_knows_its_own_tags() -> None:
    retired = ring("a", "b", a="retired", b="primary")
    assert [candidate.pepper_id for candidate in retired.candidates(b"x")] == ["b"]
    first, second = retired.peppers
    assert retired.issued(b"x", first.tag(b"x"))
    assert retired.issued(b"x", second.tag(b"x"))
    assert not retired.issued(b"x", first.tag(b"y"))


def test_amendment_14_a_wrong_pepper_is_told_from_an_unknown_key() -> None:
    here, elsewhere = ring("p1"), parse_peppers(f"p1:{OTHER}")
    recorded = {"p1": (here.primary.proof("installation"), "primary")}
    assert here.bound_to("installation", recorded).primary.id == "p1"  # type: ignore[arg-type]  # a literal
    for wrong, installation in ((elsewhere, "installation"), (here, "another installation")):
        with pytest.raises(ConfigurationError, match="not the one this store was made with"):
            wrong.bound_to(installation, recorded)  # type: ignore[arg-type]  # a literal


def test_a_missing_primary_is_known_and_cannot_mint() -> None:
    lacking = ring("a", a="accept", b="primary")
    assert lacking.primary_missing
    assert not ring("a", a="primary").primary_missing
    with pytest.raises(ConfigurationError, match="primary pepper is not among those given"):
        _ = lacking.primary


def test_no_repr_shows_a_subkey() -> None:
    shown = repr(ring("a", "b"))
    assert "a" in shown
    for pepper in ring("a", "b").peppers:
        for secret in (pepper._digest_key, pepper._tag_key, pepper._check_key):
            assert repr(secret) not in shown
            assert secret.hex() not in shown
