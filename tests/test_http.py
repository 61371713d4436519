"""The gate and the one table: what the conformance rows do not reach."""

from __future__ import annotations

import json
from typing import Any

import pytest

from papaours_auth import ConfigurationError, Reason, Refused
from papaours_auth.http import Gate, credentials, language, render, status_of

WRONG_GATES: list[tuple[dict[str, Any], str]] = [
    ({"everywhere": False, "exempt": ["/a"]}, "everywhere=False refuses nobody"),
    ({"everywhere": False, "required": False}, "everywhere=False refuses nobody"),
    ({"everywhere": False, "preflight": "pass"}, "everywhere=False refuses nobody"),
    ({"exempt": "/healthz"}, r"exempt is a list, as in \['/healthz'\]"),
    ({"trusted_proxies": "10.0.0.0/8"}, "trusted_proxies is a list"),
    ({"trusted_proxies": ["10.0.0.1/8"]}, "without host bits"),
    ({"trusted_proxies": ["proxy.example"]}, "trusted_proxies"),
    ({"preflight": "allow"}, "preflight is 'refuse' or 'pass'"),
    *(
        ({"exempt": [pattern]}, "is neither a path like")
        for pattern in ("healthz", "", "*", "/a*", "/a/*/b", "//a", "/a/../b", "/a\\b", "/a\n")
    ),
]


@pytest.mark.parametrize(("options", "said"), WRONG_GATES, ids=lambda value: str(value)[:40])
def test_a_gate_that_means_nothing_stops_at_start(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Gate(**options)


@pytest.mark.parametrize(
    "peer", ["", "localhost", "<local>", "/run/app.sock", "unix:", "unknown", "0.0.0.0", "::"]
)
def test_pitfall_47_a_proxy_on_a_unix_socket_is_trusted_where_told_to(peer: str) -> None:
    """Whatever servers call it: nothing, ``localhost`` (waitress), ``<local>`` (Werkzeug), 0.0.0.0 (uWSGI)."""
    assert Gate(trusted_proxies=["unix"]).client(peer, b"192.0.2.7") == "192.0.2.7"
    assert Gate(trusted_proxies=["unix"]).client(peer, None) is None
    assert Gate(trusted_proxies=["10.0.0.0/8"]).client(peer, b"192.0.2.7") == (peer or None)
    assert Gate().client(peer, b"192.0.2.7") == (peer or None)


def test_pitfall_47_unix_trusts_no_address() -> None:
    assert Gate(trusted_proxies=["unix"]).client("192.0.2.1", b"192.0.2.7") == "192.0.2.1"
    assert Gate(trusted_proxies=["unix", "10.0.0.0/8"]).client("", b"192.0.2.7, 10.0.0.1") == "192.0.2.7"


def test_pitfall_47_a_trusted_proxy_without_the_header_leaves_the_client_unknown() -> None:
    gate = Gate(trusted_proxies=["10.0.0.0/8"])
    assert gate.client("10.0.0.1", None) is None
    assert gate.client("192.0.2.1", None) == "192.0.2.1"


@pytest.mark.parametrize("network", ["::ffff:192.0.2.0/120", "::ffff:c000:200/120", " 192.0.2.0/24 "])
@pytest.mark.parametrize("peer", ["192.0.2.1", "::ffff:192.0.2.1"])
def test_pitfall_47_a_mapped_network_is_the_one_it_maps(network: str, peer: str) -> None:
    assert Gate(trusted_proxies=[network]).client(peer, b"203.0.113.9") == "203.0.113.9"
    assert Gate(trusted_proxies=[network]).client("192.0.3.1", b"203.0.113.9") == "192.0.3.1"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (b"192.0.2.7:4711", "192.0.2.7"),
        (b"[2001:db8::7]:4711", "2001:db8::7"),
        (b"[2001:db8::7]", "2001:db8::7"),
        (b"2001:db8::7", "2001:db8::7"),
        (b"unknown", None),
        (b"", None),
        (b"192.0.2.7, ", None),
        (b"10.0.0.3, 10.0.0.2", "10.0.0.3"),
        (b"192.0.2.7\xff", None),
    ],
)
def test_pitfall_27_hops_are_read_as_proxies_write_them(forwarded: bytes, client: str | None) -> None:
    assert Gate(trusted_proxies=["10.0.0.0/8"]).client("10.0.0.1", forwarded) == client


@pytest.mark.parametrize(
    ("accepted", "spoken"),
    [
        ("", "en"),
        ("fr", "fr"),
        ("FR-CA", "fr"),
        ("en;q=0.5, fr;q=0.6", "fr"),
        ("en, fr", "en"),
        ("*", "en"),
        ("fr;q=0", "en"),
        ("en;q=0, *", "fr"),
        ("fr;q=2", "fr"),
        ("x" * 10_000 + ", fr", "en"),
    ],
)
def test_the_language_is_the_one_asked_for(accepted: str, spoken: str) -> None:
    assert language(accepted) == spoken


def test_blanks_around_a_header_are_no_part_of_the_key() -> None:
    """Servers take them off, mostly."""
    key = b"pk_prod_abc123def456ghi789"
    for named in (key, b" " + key, key + b"\t", b"\t " + key + b" "):
        assert credentials(None, named, token=b"pk_") == key
        assert credentials(b"Bearer " + key + b"\t", named, token=b"pk_") == key


KEY = b"pk_prod_abc123def456ghi789"


@pytest.mark.parametrize(
    ("authorization", "found"),
    [
        (b"Bearer " + KEY, KEY),
        (b"bEaReR " + KEY, KEY),
        (b"Bearer" + KEY, Reason.MISSING_KEY),  # another scheme, whose name begins like ours
        (b"Bearer:" + KEY, Reason.MISSING_KEY),
        (b"Bearers " + KEY, Reason.MISSING_KEY),
        (b"Bearer", Reason.MISSING_KEY),
        (b"Bearer,", Reason.AMBIGUOUS_CREDENTIALS),
        (b'Bearer,realm="x"', Reason.AMBIGUOUS_CREDENTIALS),
        (b"Bearer ,", Reason.AMBIGUOUS_CREDENTIALS),
        (b"Bearer, " + KEY, Reason.AMBIGUOUS_CREDENTIALS),
        (b"Bearer " + KEY + b",", Reason.AMBIGUOUS_CREDENTIALS),
        # one credential of another scheme, and two
        (b'Digest username="a", uri="/"', Reason.MISSING_KEY),
        (b'Digest username="a", uri = "/"', Reason.MISSING_KEY),
        (b"Basic dTpw,", Reason.AMBIGUOUS_CREDENTIALS),
        (b"Basic dTpw, \t", Reason.AMBIGUOUS_CREDENTIALS),
        (b'Digest a="b",,c="d"', Reason.AMBIGUOUS_CREDENTIALS),
        (b"Basic dTpw,Negotiate", Reason.AMBIGUOUS_CREDENTIALS),
        (b"Basic dTpw, Negotiate", Reason.AMBIGUOUS_CREDENTIALS),
        (b"Basic dTpw, Bearer " + KEY, Reason.AMBIGUOUS_CREDENTIALS),
        (b'Digest a="b", c="d", Bearer ' + KEY, Reason.AMBIGUOUS_CREDENTIALS),
        (b'Digest a="b", Negotiate, c="d"', Reason.AMBIGUOUS_CREDENTIALS),
    ],
)
def test_pitfall_3_pitfall_4_an_authorization_is_one_credential_or_an_ambiguous_one(
    authorization: bytes, found: bytes | Reason
) -> None:
    try:
        got: bytes | Reason = credentials(authorization, None, token=b"pk_")
    except Refused as refused:
        got = refused.reason
    assert got == found


@pytest.mark.parametrize(
    "path", ["/public/..;/admin", "/public/%2e%2e/admin", "/public/a;b", "/public/..\\admin", "/public/\x00"]
)
def test_pitfall_10_what_something_behind_us_might_read_anew_needs_a_key(path: str) -> None:
    assert Gate(exempt=["/public/*"]).guards(path)
    assert not Gate(exempt=["/public/*"]).guards("/public/été.html")


def test_pitfall_35_a_folder_without_more_is_not_in_it() -> None:
    """Litestar, and Flask or Falcon where told to, take ``/public/`` for ``/public``: perhaps a guarded route."""
    gate = Gate(exempt=["/public/*"])
    assert [gate.guards(path) for path in ("/public", "/public/", "/public/a", "/public/a/")] == [
        True,
        True,
        False,
        False,
    ]
    assert not Gate(exempt=["/public/*", "/public/"]).guards("/public/")
    assert [Gate(exempt=["/*"]).guards(path) for path in ("", "/", "/a")] == [False, False, False]


def test_an_answer_speaks_the_language_that_its_headers_name() -> None:
    for reason in Reason:
        english, french = (
            render(Refused(reason), accept_language=asked) for asked in ("en, fr;q=0.5", "fr, en;q=0.5")
        )
        for answer, tongue in ((english, "en"), (french, "fr")):
            assert dict(answer.headers)["Content-Language"] == tongue
            assert dict(answer.headers)["Vary"] == "Accept-Language"  # else a cache gives one's to the other
            assert json.loads(answer.body)["code"] == reason
        assert json.loads(english.body)["detail"] != json.loads(french.body)["detail"]
    assert json.loads(render(Refused(Reason.UNKNOWN_KEY)).body)["title"] == "API key unknown"
    answer = render(Refused(Reason.UNKNOWN_KEY), accept_language="fr")
    assert json.loads(answer.body)["title"] == "Clé API inconnue"


def test_who_is_to_come_back_later_is_told_when_and_nobody_else_is() -> None:
    def after(reason: Reason, seconds: int | None = None) -> str | None:
        return dict(render(Refused(reason, retry_after=seconds)).headers).get("Retry-After")

    assert after(Reason.TOO_MANY_FAILURES, 48) == "48"
    assert after(Reason.TOO_MANY_FAILURES) == "5"
    assert after(Reason.STORE_UNAVAILABLE) == "5"
    assert after(Reason.STORE_UNAVAILABLE, 7) == "7"
    assert {after(reason, 48) for reason in Reason if status_of(reason) not in (429, 503)} == {None}


def test_a_problem_is_one_in_readable_utf_8_and_as_long_as_it_says() -> None:
    answer = render(Refused(Reason.UNKNOWN_KEY), accept_language="fr")
    headers = dict(answer.headers)
    assert "Clé API inconnue".encode() in answer.body
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Content-Length"] == str(len(answer.body))
    assert headers["Cache-Control"] == "no-store"


def test_a_challenge_names_rights_where_they_are_lacking_and_nowhere_else() -> None:
    """RFC 6750 section 3.1: ``scope`` belongs to ``insufficient_scope``, and an empty one says nothing."""

    def challenge(reason: Reason, *needs: str) -> str:
        return dict(render(Refused(reason, needs=needs)).headers)["WWW-Authenticate"]

    realm = 'Bearer realm="papaours"'
    lacking = f'{realm}, error="insufficient_scope"'
    assert (
        challenge(Reason.INSUFFICIENT_RIGHTS, "a:lecture", "b:lecture")
        == f'{lacking}, scope="a:lecture b:lecture"'
    )
    assert challenge(Reason.INSUFFICIENT_RIGHTS) == lacking
    assert challenge(Reason.INSUFFICIENT_RIGHTS, "contrats:écriture") == lacking
    assert challenge(Reason.UNKNOWN_KEY, "a:lecture") == f'{realm}, error="invalid_token"'
    assert challenge(Reason.MISSING_KEY, "a:lecture") == realm


def test_a_right_with_an_accent_is_left_out_of_the_challenge() -> None:
    """RFC 6750 section 3 allows no accents in scope."""
    refused = Refused(Reason.INSUFFICIENT_RIGHTS, needs=("contrats:écriture", "contrats:lecture"))
    assert dict(render(refused).headers)["WWW-Authenticate"].endswith('scope="contrats:lecture"')
