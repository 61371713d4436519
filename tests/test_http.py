"""The gate and the one table: what the conformance rows do not reach."""

from __future__ import annotations

from typing import Any

import pytest

from papaours_auth import ConfigurationError, Reason, Refused
from papaours_auth.http import Gate, credentials, language, render

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


def test_a_proxy_on_a_unix_socket_is_trusted_where_told_to() -> None:
    assert Gate(trusted_proxies=["unix"]).client("", b"192.0.2.7") == "192.0.2.7"
    assert Gate(trusted_proxies=["10.0.0.0/8"]).client("", b"192.0.2.7") is None
    assert Gate().client("", b"192.0.2.7") is None


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


@pytest.mark.parametrize(
    "path", ["/public/..;/admin", "/public/%2e%2e/admin", "/public/a;b", "/public/..\\admin", "/public/\x00"]
)
def test_pitfall_10_what_something_behind_us_might_read_anew_needs_a_key(path: str) -> None:
    assert Gate(exempt=["/public/*"]).guards(path)
    assert not Gate(exempt=["/public/*"]).guards("/public/été.html")


def test_a_right_with_an_accent_is_left_out_of_the_challenge() -> None:
    """RFC 6750 section 3 allows no accents in scope."""
    refused = Refused(Reason.INSUFFICIENT_RIGHTS, needs=("contrats:écriture", "contrats:lecture"))
    assert dict(render(refused).headers)["WWW-Authenticate"].endswith('scope="contrats:lecture"')
