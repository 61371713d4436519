"""The WSGI middleware beyond the conformance table: starting, answering early, and what is passed on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from papaours_auth import Authenticator, ConfigurationError, PepperRing, StoreUnavailable, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.wsgi import PapaoursAuthMiddleware, identity_of
from support.calls import environ_of, run_wsgi

SEED = "pk_prod_abc123def456ghi789"
HEADERS = [("X-API-KEY", SEED)]


@pytest.fixture
def authenticator(memory: MemoryStore, ring: PepperRing) -> Iterator[Authenticator]:
    with Authenticator(memory, environment="prod", peppers=ring) as authenticator:
        yield authenticator


def app(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    caller = identity_of(environ)
    return [caller.machine.name.encode() if caller else b"nobody"]


def test_a_caller_cannot_bring_an_identity_along(authenticator: Authenticator) -> None:
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, exempt=["/open"])
    environ = environ_of("/open") | {"papaours.identity": authenticator.authenticate(SEED)}
    assert run_wsgi(guarded, environ)[2] == b"nobody"


def test_what_the_app_gives_is_passed_on_as_it_is(authenticator: Authenticator) -> None:
    """A file wrapper, say, which servers recognise by its type."""
    given = iter([b"a", b"b"])

    def streams(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"")
        return given

    guarded = PapaoursAuthMiddleware(streams, authenticator=authenticator)
    assert guarded(environ_of(headers=HEADERS), lambda *_: bytes) is given


def test_an_app_that_starts_its_answer_anew_after_an_error_is_passed_on(authenticator: Authenticator) -> None:
    def breaks(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        try:
            raise ValueError
        except ValueError:
            start_response("500 Internal Server Error", [("Cache-Control", "no-store")], sys.exc_info())
        return [b"broken"]

    status, headers, _ = run_wsgi(
        PapaoursAuthMiddleware(breaks, authenticator=authenticator), environ_of(headers=HEADERS)
    )
    assert status == "500 Internal Server Error"
    assert headers["cache-control"] == "no-store"


def test_pitfall_30_an_answer_that_said_nothing_becomes_private(authenticator: Authenticator) -> None:
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, exempt=["/logo"])
    assert run_wsgi(guarded, environ_of(headers=HEADERS))[1]["cache-control"] == "private"
    assert "cache-control" not in run_wsgi(guarded, environ_of("/logo", HEADERS))[1]


def test_pitfall_05_wsgi_cannot_tell_an_underscore_from_a_hyphen_and_nothing_hangs_on_it(
    authenticator: Authenticator,
) -> None:
    """CVE-2015-0219. Either spelling brings a credential, never trust: a client may send both anyway."""
    environ = environ_of(HTTP_X_API_KEY=f"{SEED},pk_prod_0123456789abcdef")  # both sent, joined
    status, _, body = run_wsgi(PapaoursAuthMiddleware(app, authenticator=authenticator), environ)
    assert status == "400 Bad Request"
    assert b"ambiguous_credentials" in body


def test_a_server_that_hands_over_wide_characters_meets_a_refusal_not_an_error(
    authenticator: Authenticator,
) -> None:
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, exempt=["/open"])
    environ = environ_of("/\u4e2d", HTTP_X_API_KEY="pk_prod_\u4e2d\u4e2d")
    assert run_wsgi(guarded, environ)[0] == "401 Unauthorized"


def test_without_a_remote_address_a_call_still_comes_in(authenticator: Authenticator) -> None:
    environ = environ_of(headers=HEADERS)
    del environ["REMOTE_ADDR"]
    assert run_wsgi(PapaoursAuthMiddleware(app, authenticator=authenticator), environ)[0] == "200 OK"


class Down(MemoryStore):
    def describe(self) -> Any:
        raise StoreUnavailable("down on purpose")


def test_pitfall_21_an_app_starts_although_its_store_is_down_and_says_so(
    ring: PepperRing, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "papaours_auth"):
        guarded = PapaoursAuthMiddleware(app, environment="prod", store=Down(), peppers=ring)
    status, headers, _ = run_wsgi(guarded, environ_of(headers=HEADERS))
    assert (status, headers["retry-after"]) == ("503 Service Unavailable", "5")
    assert "calls meet 503: down on purpose" in caplog.text
    guarded.authenticator.close()


def test_what_is_set_up_wrongly_stops_at_start(authenticator: Authenticator, memory: MemoryStore) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"authenticator": authenticator, "store": memory}, "authenticator is ready"),
        ({"store": memory}, "no environment"),
        (
            {"store": memory, "environment": "prod", "peppers": parse_peppers(new_pepper())},
            "not the one this store was made with",
        ),
    ]
    for options, said in wrong:
        with pytest.raises(ConfigurationError, match=said):
            PapaoursAuthMiddleware(app, **options)
