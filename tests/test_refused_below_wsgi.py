"""Pitfall 40: what an app refuses by itself is answered by the guard around it, whatever it is written in."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from wsgiref.validate import validator

import pytest
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from papaours_auth import Authenticator, Reason, Refused, wsgi
from papaours_auth.flask import PapaoursAuth
from papaours_auth.http import render
from papaours_auth.wsgi import PapaoursAuthMiddleware
from support import wsgi_frameworks as frameworks
from support.calls import environ_of, run_wsgi
from support.usage import Kept

KEY = [("X-API-KEY", "pk_prod_abc123def456ghi789")]
REFUSALS = [
    Reason.UNKNOWN_KEY, Reason.INSUFFICIENT_RIGHTS, Reason.TOO_MANY_FAILURES, Reason.STORE_UNAVAILABLE,
    Reason.AMBIGUOUS_CREDENTIALS,
]  # fmt: skip


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


def mounted(app: Any) -> Any:
    """An app below another one, as Werkzeug mounts it."""
    return DispatcherMiddleware(Flask("outer"), {"/raise": unmounted(app), "/asks": unmounted(app)})


def unmounted(app: Any) -> Any:
    def whole(environ: Any, start_response: Any) -> Any:
        environ["PATH_INFO"], environ["SCRIPT_NAME"] = environ["SCRIPT_NAME"] + environ["PATH_INFO"], ""
        return app(environ, start_response)

    return whole


APPS: dict[str, Any] = {
    **frameworks.APPS,
    "generator": lambda: frameworks.generator,
    "said 200 before": lambda: frameworks.late,
    "mounted flask": lambda: mounted(frameworks.flask_with_handler()),
    "mounted pyramid": lambda: mounted(frameworks.pyramid()),
}


@pytest.fixture(scope="module", params=APPS)
def app(request: pytest.FixtureRequest) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what frameworks have to say of their own imports
        return APPS[request.param]()


@pytest.mark.parametrize("options", [{}, {"everywhere": False}, {"exempt": ["/raise/*", "/asks"]}], ids=str)
def test_pitfall_40_a_refusal_from_below_is_the_one_answer_in_every_framework(
    app: Any, options: dict[str, Any], blocking: Authenticator, kept: Kept
) -> None:
    guarded = PapaoursAuthMiddleware(app, authenticator=blocking, usage=kept.recorder, **options)
    for reason in REFUSALS:
        status, headers, body = run_wsgi(
            guarded, environ_of(f"/raise/{reason.value}", KEY, HTTP_HOST="a.example")
        )
        expected = render(Refused(reason))
        assert (int(status[:3]), body) == (expected.status, expected.body)
        assert {(name.lower(), value) for name, value in expected.headers} <= headers.items()
    status, headers, body = run_wsgi(guarded, environ_of("/asks", KEY, HTTP_HOST="a.example"))
    known = "exempt" not in options
    reason = Reason.INSUFFICIENT_RIGHTS if known else Reason.MISSING_KEY
    assert (status[:3], b'"code": "%s"' % reason.encode() in body) == (
        str(render(Refused(reason)).status),
        True,
    )
    events = [(event.status, event.reason, event.outcome) for event in kept.events()]
    counted = [entry[1] for batch in kept.batches for entry in batch.refusals]
    if known:
        asked = (render(Refused(reason)).status, reason.value, "completed")
        assert events == [*((render(Refused(r)).status, r.value, "completed") for r in REFUSALS), asked]
        assert counted == []
    else:  # nobody whom the guard knows
        assert events == []
        assert sorted(counted) == sorted([*REFUSALS, Reason.MISSING_KEY])


@pytest.mark.parametrize("mount", [lambda app: app, mounted], ids=["alone", "mounted"])
def test_flask_without_handlers_answers_what_flasks_own_require_raises(
    mount: Any, blocking: Authenticator
) -> None:
    guarded = PapaoursAuthMiddleware(mount(frameworks.flask()), authenticator=blocking)
    status, headers, body = run_wsgi(guarded, environ_of("/asks", KEY, HTTP_HOST="a.example"))
    assert (status, headers["content-type"]) == ("403 FORBIDDEN", "application/problem+json")
    assert b"insufficient_rights" in body


def test_an_answer_that_has_begun_is_not_begun_anew(blocking: Authenticator, kept: Kept) -> None:
    def written(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(b"one")
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    def yielded(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"one"
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    for app in (written, yielded):
        started: list[str] = []

        def start(status: str, headers: Any, exc_info: Any = None, started: list[str] = started) -> Any:
            started.append(status)
            return bytes

        guarded = PapaoursAuthMiddleware(app, authenticator=blocking, usage=kept.recorder)
        with pytest.raises(Refused):
            list(guarded(environ_of(headers=KEY), start))
        assert started == ["200 OK"]
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "failed")] * 2


def test_a_server_that_has_sent_its_status_early_raises_and_is_believed(
    blocking: Authenticator, kept: Kept
) -> None:
    def refuses(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info:
            raise exc_info[1]
        return bytes

    guarded = PapaoursAuthMiddleware(refuses, authenticator=blocking, usage=kept.recorder)
    with pytest.raises(Refused):
        guarded(environ_of(headers=KEY), start)
    assert [event.outcome for event in kept.events()] == ["failed"]


def test_an_app_that_goes_on_after_a_refusal_has_refused_nobody(blocking: Authenticator, kept: Kept) -> None:
    app = Flask("goes on")
    auth = PapaoursAuth(app, authenticator=blocking, usage=kept.recorder, everywhere=False)

    @auth.required("contrats:suppression")
    def inner() -> str:
        return "never"

    @app.get("/contracts")
    def contracts() -> str:
        with contextlib.suppress(Refused):
            return inner()
        return "for everybody"

    for headers in (KEY, []):
        assert app.test_client().get("/contracts", headers=headers).text == "for everybody"
    assert [(event.status, event.reason) for event in kept.events()] == [(200, "")]
    assert [batch.refusals for batch in kept.batches if batch.refusals] == []


def test_an_apps_own_page_for_any_error_gives_way_to_a_refusal(blocking: Authenticator, kept: Kept) -> None:
    """As WebError's and Paste's: a 500, sent with the error or while it is handled, by an app or by a generator."""

    def page(environ: Any, start_response: Any, told: bool) -> Any:
        try:
            raise Refused(Reason.INSUFFICIENT_RIGHTS)
        except Refused:
            write = start_response("500 Internal Server Error", [], *([sys.exc_info()] if told else []))
            write(b"sorry")
        return [b"sorry"]

    def told(environ: Any, start_response: Any) -> Any:
        return page(environ, start_response, True)

    def handled(environ: Any, start_response: Any) -> Any:
        return page(environ, start_response, False)

    def generated(environ: Any, start_response: Any) -> Any:
        yield from page(environ, start_response, True)

    for app in (told, handled, generated):
        guarded = PapaoursAuthMiddleware(app, authenticator=blocking, usage=kept.recorder)
        status, _, body = run_wsgi(guarded, environ_of(headers=KEY))
        assert (status, body) == ("403 Forbidden", render(Refused(Reason.INSUFFICIENT_RIGHTS)).body)
    assert [(event.status, event.reason) for event in kept.events()] == [(403, "insufficient_rights")] * 3


def test_what_is_answered_keeps_to_pep_3333(blocking: Authenticator) -> None:
    """The validator of the standard library stands on both sides."""
    for app in (frameworks.bare, frameworks.generator, frameworks.late):
        inner: Any = validator(app)
        guarded: Any = validator(PapaoursAuthMiddleware(inner, authenticator=blocking))
        environ = environ_of("/raise/unknown_key", KEY) | {
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
        }
        started: list[str] = []

        def start(status: str, headers: Any, exc_info: Any = None, started: list[str] = started) -> Any:
            started.append(status)
            return bytes

        body = guarded(environ, start)
        assert b"unknown_key" in b"".join(body)
        body.close()
        assert started[-1] == "401 Unauthorized"


def _yields_a_500(environ: Any, start_response: Any) -> Any:
    try:
        wsgi.require(environ, "contrats:suppression")
    except Refused:
        start_response("500 Oops", [("Content-Length", "4")], sys.exc_info())
        yield b"oops"


def _writes_a_500(environ: Any, start_response: Any) -> Any:
    try:
        wsgi.require(environ, "contrats:suppression")
    except Refused:
        start_response("500 Oops", [("Content-Length", "4")], sys.exc_info())(b"oops")
    yield from ()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("app", [_yields_a_500, _writes_a_500])
def test_a_generator_that_answers_a_refusal_by_a_500_sends_nothing_of_its_own_body(
    app: Any, recorded: bool, blocking: Authenticator, kept: Kept
) -> None:
    """Under the headers of ours, whose Content-Length is another, a client would wait for the rest."""
    guarded = PapaoursAuthMiddleware(app, authenticator=blocking, usage=kept.recorder if recorded else None)
    status, headers, body = run_wsgi(guarded, environ_of(headers=KEY))
    assert status == "403 Forbidden"
    assert b"insufficient_rights" in body
    assert headers["content-length"] == str(len(body))
    if recorded:
        assert [(event.status, event.outcome) for event in kept.events()] == [(403, "completed")]


def test_an_app_whose_first_piece_the_server_has_answers_a_refusal_itself(blocking: Authenticator) -> None:
    def late(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b""  # nothing is sent yet: PEP 3333 lets the app change its mind
        try:
            wsgi.require(environ, "contrats:suppression")
        except Refused:
            start_response("500 Oops", [("Content-Length", "4")], sys.exc_info())
            yield b"oops"

    guarded = PapaoursAuthMiddleware(late, authenticator=blocking)
    status, _, body = run_wsgi(guarded, environ_of(headers=KEY))
    assert (status, body) == ("500 Oops", b"oops")
