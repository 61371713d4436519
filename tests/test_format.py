"""The key's text: fixed vectors, round trips, and every way of getting it wrong."""

from __future__ import annotations

import json
import pickle
import string
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import make_vectors
from papaours_auth import (
    Authenticator,
    ConfigurationError,
    InvalidInput,
    KeyFormat,
    PepperRing,
    Reason,
    Refused,
    Secret,
)
from papaours_auth.digest import Pepper
from papaours_auth.format import ALPHABET, MAX_LENGTH, base62
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.verify import Claim, read

FORMAT = KeyFormat()
OURS = KeyFormat(foreign=False)
PEPPER = Pepper.from_bytes("p1", bytes(range(32)))
RING = PepperRing((PEPPER,))
VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())

environments = st.sampled_from(FORMAT.environments)
usages = st.lists(st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=32), max_size=3).map(
    "_".join
)
minted = st.builds(
    lambda environment, usage: FORMAT.mint(environment, usage=usage, tag=PEPPER.tag).reveal(),
    environments,
    usages,
)


def reads(text: str | bytes, format: KeyFormat = FORMAT) -> bool:
    presented = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return isinstance(read(presented, format=format, peppers=RING), Claim)


def test_the_vectors_are_what_their_recipe_makes() -> None:
    assert make_vectors.make() == VECTORS


@pytest.mark.parametrize("id_", VECTORS)
def test_the_library_agrees_with_the_vectors(id_: str) -> None:
    vector = VECTORS[id_]
    pepper = Pepper.from_bytes(id_, bytes.fromhex(vector["pepper"]))
    assert pepper.proof(vector["installation"]).hex() == vector["proof"]
    for key in vector["minted"]:
        text = FORMAT.read(key["key"].encode())
        assert text is not None
        assert text.tagged is not None
        assert (text.tag, pepper.tag(text.tagged)) == (key["tag"], key["tag"])
        assert key["key"].endswith(base62(key["checksum"], 6))
        assert pepper.digest(key["key"].encode()).hex() == key["digest"]
    for key in vector["foreign"]:
        text = FORMAT.read(key["key"].encode())
        assert text is not None
        assert text.foreign
        assert pepper.digest(key["key"].encode()).hex() == key["digest"]


@given(environments, usages)
def test_what_is_minted_can_be_read(environment: str, usage: str) -> None:
    key = FORMAT.mint(environment, usage=usage, tag=PEPPER.tag).reveal()
    text = FORMAT.read(key.encode())
    assert text is not None
    assert (text.environment, text.usage, text.last4, text.foreign) == (environment, usage, key[-4:], False)
    assert reads(key)
    assert reads(key, OURS)


def test_keys_are_as_random_as_promised() -> None:
    keys = {FORMAT.mint("prod", tag=PEPPER.tag).reveal() for _ in range(1_000)}
    bodies = [key.removeprefix("pk_prod_") for key in keys]
    assert len(keys) == 1_000
    assert {len(body) for body in bodies} == {36}
    assert {character for body in bodies for character in body[:24]} == set(ALPHABET)


@given(minted, st.data())
def test_a_changed_character_is_refused(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.characters().filter(lambda character: character != key[place]))
    damaged = key[:place] + other + key[place + 1 :]
    body = damaged.removeprefix(key[:-36])
    assert not reads(damaged, OURS)
    assert not reads(damaged) or len(body) != 36 or "_" in body  # else: foreign, for the store to refuse


@given(minted, st.data())
def test_swapped_neighbors_are_refused(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 2))
    damaged = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
    if damaged != key:
        assert not reads(damaged, OURS)
        assert not reads(damaged) or "_" in key[place : place + 2]  # else: of another length, so foreign


@given(minted, st.data())
def test_a_dropped_or_added_character_is_never_taken_for_ours(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 1))
    dropped = key[:place] + key[place + 1 :]
    added = key[:place] + data.draw(st.sampled_from(ALPHABET + "_")) + key[place:]
    for damaged in (dropped, added):
        assert not reads(damaged, OURS)  # amendment 12: no store read
        text = FORMAT.read(damaged.encode())
        assert text is None or text.foreign or not reads(damaged)  # with foreign keys allowed: at most one


@given(minted)
def test_only_an_issuer_can_make_a_tag(key: str) -> None:
    forged = key[:-12] + ("1" if key[-12] == "0" else "0") + key[-11:-6]
    forged += base62(zlib.crc32(forged.encode()), 6)  # anyone can make the checksum
    assert FORMAT.read(forged.encode()) is not None
    assert not reads(forged)


@pytest.mark.parametrize("value", [2**32, 62**6 - 1])
def test_amendment_12_a_tag_or_checksum_past_32_bits_is_malformed(value: int) -> None:
    tagged = "pk_prod_" + "a" * 24
    checked = tagged + base62(value, 6)
    assert FORMAT.read((checked + base62(zlib.crc32(checked.encode()), 6)).encode()) is None
    assert FORMAT.read((tagged + "a" * 6 + base62(value, 6)).encode()) is None


SHAPES = {
    "pk_prod_abc123def456ghi789": True,
    "pk_prod_export_a1b2c3d4e5f6": True,
    "pk_test_consultation_x9y8z7w6v5u4": True,
    "pk_prod_cf_export_" + "x" * 12: True,
    "pk_prod_" + "x" * 128: True,
    "pk_prod_" + "x" * 129: False,
    "pk_prod_" + "x" * 11: False,
    "pk_prod_" + "x" * 36: False,  # ours by its length, without tag and checksum
    "pk_prod__" + "x" * 12: False,
    "pk_prod_" + "u" * 33 + "_" + "x" * 12: False,
    "pk_prod_Export_" + "x" * 12: False,
    "pk_production_" + "x" * 12: False,
    "PK_prod_" + "x" * 12: False,
    "sk_prod_" + "x" * 12: False,
    "pk_prod_" + "x" * 12 + "\n": False,
    " pk_prod_" + "x" * 12: False,
    "pk_prod_": False,
    "": False,
    "_".join(["pk_prod", *["u" * 32] * 7, "x" * 17]): True,  # 256 characters
    "_".join(["pk_prod", *["u" * 32] * 7, "x" * 18]): False,
}


@pytest.mark.parametrize(("text", "well_formed"), SHAPES.items())
def test_the_grammar(text: str, well_formed: bool) -> None:
    assert (FORMAT.read(text.encode()) is not None) is well_formed


HOSTILE = [
    b"\xff\xfe\xfa",
    "pk_prod_“abc123def456”".encode(),
    "\ufeffpk_prod_abc123def456ghi789".encode(),
    "pk_prod_abc123def456ghi78é".encode("latin-1"),
    "pk_prod_abc123def456\ud800".encode("utf-8", "surrogatepass"),
    b"pk_prod_abc123def456\x00",
    b"pk_prod_abc123def456\x07ghi",
    "pk_prod_аbc123def456ghi789".encode(),  # a Cyrillic letter
    "pk_prod_abc123def456ghi78９".encode(),  # a full-width digit, which str.isdigit takes
]


@pytest.mark.parametrize("presented", HOSTILE)
def test_pitfall_01_undecodable_credentials_are_malformed_not_an_error(presented: bytes) -> None:
    """`hmac.compare_digest` raises TypeError on non-ASCII text: six projects answered 500."""
    assert read(presented, format=FORMAT, peppers=RING) == Refused(Reason.MALFORMED_KEY) or not reads(
        presented
    )


@given(st.binary(max_size=400) | st.text(max_size=200) | st.text(st.characters(categories=["Cs"])))
def test_pitfall_01_nothing_presented_raises_anything_but_refused(presented: bytes | str) -> None:
    store = MemoryStore()
    authenticator = Authenticator(store, environment="prod", peppers=RING, watch=False)
    with pytest.raises(Refused):
        authenticator.authenticate(presented)


class CountingLength(bytes):
    """Bytes that tell whether anybody read more of them than their length."""

    touched = False

    def isascii(self) -> bool:
        CountingLength.touched = True
        return super().isascii()


def test_pitfall_02_an_oversized_credential_is_refused_before_it_is_hashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authenticator = Authenticator(MemoryStore(), environment="prod", peppers=RING, watch=False)

    def hashed() -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr(authenticator, "_keyed_hash", hashed)
    for presented in (b"pk_prod_" + b"a" * 1_000_000, "é" * (MAX_LENGTH // 2 + 1)):
        with pytest.raises(Refused, match="malformed_key"):
            authenticator.authenticate(presented)
    assert FORMAT.read(CountingLength(b"a" * (MAX_LENGTH + 1))) is None
    assert not CountingLength.touched


def test_a_secret_shows_stars_wherever_it_is_put() -> None:
    secret = Secret("pk_prod_abc123def456ghi789")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>40}",
        f"{[secret]!r}",
        repr({"k": secret}),
    ]
    assert all("abc123" not in text and "*****" in text for text in shown)
    assert secret.reveal() == "pk_prod_abc123def456ghi789"


def test_a_secret_is_compared_but_neither_hashed_nor_pickled() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    with pytest.raises(TypeError):
        hash(Secret("a"))
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Secret("a"))


def test_the_printable_form_names_a_key_without_giving_it_away() -> None:
    assert FORMAT.printable("prod", "", "x7Qz") == "pk_prod_…x7Qz"
    assert FORMAT.printable("prod", "cf_export", "x7Qz") == "pk_prod_cf_export_…x7Qz"


def test_another_token_and_other_environments() -> None:
    format = KeyFormat(token="acme", environments=("live",))
    key = format.mint("live", tag=PEPPER.tag).reveal()
    assert key.startswith("acme_live_")
    assert reads(key, format)
    assert not reads(key)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        (lambda: KeyFormat(token="P_K"), "'P_K' cannot be a key's token"),
        (lambda: KeyFormat(token=""), "cannot be a key's token"),
        (lambda: KeyFormat(environments=("prod", "a b")), "'a b' cannot be"),
        (lambda: KeyFormat(environments=()), "at least one environment"),
        (lambda: FORMAT.check_environment("production"), "use one of prod, test, dev, staging"),
    ],
)
def test_a_format_that_no_key_could_have_stops_at_start(format: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        format()  # type: ignore[operator]  # each row is a callable


@pytest.mark.parametrize(
    ("environment", "usage", "said"),
    [
        ("production", "", "does not exist"),
        ("prod", "Export", "small letters"),
        ("prod", "a__b", "small letters"),
        ("prod", "_", "small letters"),
        ("prod", "u" * 33, "small letters"),
        ("prod", "_".join(["u" * 32] * 7), "too long"),
    ],
)
def test_what_could_not_be_read_is_not_minted(environment: str, usage: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        FORMAT.mint(environment, usage=usage, tag=PEPPER.tag)


GLUE = [
    "{}", "key={}", '"{}"', "«{}»", "https://api.example/v1?key={}&page=2", "Facturation{}", "{}Facturation",
    "x{}x", "_{}_", "-{}-", "Facturation\u00a0{}", "Facturation\u200b{}", "{}\u2060", "\ufeff{}", "clé :{}.",
    "Bearer%20{}", "key%3D{}",
]  # fmt: skip
"""What people paste a key into."""


def _upper(key: str) -> str:
    return key.upper()


def _full_width(key: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) for c in key)


def _zero_width(key: str) -> str:
    return "\u200b".join(key)


def _accented(key: str) -> str:
    return "".join(f"{c}\u0301" for c in key)


def _escaped(key: str) -> str:
    return key.replace("_", "\\_")  # as Markdown wants it


def _percent(key: str) -> str:
    return "".join(f"%{ord(c):02x}" for c in key)


def _broken(key: str) -> str:
    return f"{key[:12]}\u00a0{key[12:20]} {key[20:]}"


DRESSES = [str, _upper, _full_width, _zero_width, _accented, _escaped, _percent, _broken]


@given(
    st.one_of(minted, st.just("pk_prod_abc123def456ghi789"), st.just("pk_recette_export_" + "a" * 12)),
    st.sampled_from(GLUE),
    st.sampled_from(DRESSES),
    st.text(max_size=20),
    st.text(max_size=20),
)
def test_pitfall_56_a_key_is_found_in_a_text_however_it_is_glued_in(
    key: str, glue: str, dress: Callable[[str], str], before: str, after: str
) -> None:
    text = before + glue.format(dress(key)) + after
    assert FORMAT.found_in(text)
    assert OURS.found_in(text)


@given(st.text(string.ascii_letters + string.digits + " :,.;/-éè&?", max_size=100))
def test_a_text_without_underscores_holds_no_key(text: str) -> None:
    assert not FORMAT.found_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "pk_", "pk_prod_", "pk_prod_…x7Qz", "Remplace pk_prod_export_…x7Qz",
        "Production - Service Facturation v2",
        "/contrats/{contrat_id}/lignes_de_facture", "/backup_files_of_yesterday", "pk_prod_abc123",
        "sk_prod_" + "a" * 36,
        "Clé pk_prod_ : voir le coffre", "0" * 40, "%", "%zz", "{pk_id}",
    ],
)  # fmt: skip
def test_what_holds_no_key_is_left_alone(text: str) -> None:
    assert not FORMAT.found_in(text)


@given(minted)
def test_the_printable_form_is_no_key(key: str) -> None:
    text = FORMAT.read(key.encode())
    assert text is not None
    assert not FORMAT.found_in(FORMAT.printable(text.environment, "export", text.last4))


def test_a_long_text_is_searched_in_linear_time() -> None:
    began = time.process_time()
    assert not FORMAT.found_in("pk_prod_" * 50_000)
    assert time.process_time() - began < 5
