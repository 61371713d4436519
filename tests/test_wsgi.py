"""The WSGI middleware beyond the conformance table: starting, answering early, and what is passed on."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flask import Flask
from starlette.testclient import TestClient as StarletteClient
from werkzeug.test import Client as WerkzeugClient

from papaours_auth import Authenticator, ConfigurationError, PepperRing, StoreUnavailable, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.wsgi import PapaoursAuthMiddleware, identity_of
from support.calls import environ_of, run_wsgi
from support.usage import Kept

SEED = "pk_prod_abc123def456ghi789"
HEADERS = [("X-API-KEY", SEED)]


@pytest.fixture
def authenticator(memory: MemoryStore, ring: PepperRing) -> Iterator[Authenticator]:
    with Authenticator(memory, environment="prod", peppers=ring) as authenticator:
        yield authenticator


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.recorder.close()


def app(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    caller = identity_of(environ)
    return [caller.machine.name.encode() if caller else b"nobody"]


def test_a_caller_cannot_bring_an_identity_along(authenticator: Authenticator) -> None:
    guarded = PapaoursAuthMiddleware(app, authenticator=authenticator, exempt=["/open"])
    environ = environ_of("/open") | {"papaours.identity": authenticator.authenticate(SEED)}
    assert run_wsgi(guarded, environ)[2] == b"nobody"


class Wrapper:
    """A server's own file wrapper."""

    def __init__(self, file: Any) -> None:
        self.file, self.close = file, file.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a",), [], b"a", None, 5, "a", Wrapper(io.BytesIO(b"a"))])
def test_what_a_server_looks_at_is_handed_on_as_it_is(
    authenticator: Authenticator, kept: Kept, body: Any, usage: bool
) -> None:
    """And what no server takes too: it is the server's to say so."""

    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(b"")
        return body

    guarded = PapaoursAuthMiddleware(
        answers, authenticator=authenticator, usage=kept.recorder if usage else None
    )
    environ = environ_of(headers=HEADERS) | {"wsgi.file_wrapper": Wrapper}
    assert guarded(environ, lambda *_: bytes) is body
    if hasattr(body, "close"):
        body.close()
    faulty = isinstance(body, (str, int, type(None)))
    expected = [(0, "failed") if faulty else (200, "completed")] if usage else []
    assert [(event.status, event.outcome) for event in kept.events()] == expected


class Sized:
    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"one"])

    def __len__(self) -> int:
        return 1

    def close(self) -> None:
        self.closed += 1


def test_another_iterable_keeps_its_length_and_is_closed_once(
    authenticator: Authenticator, kept: Kept
) -> None:
    body = Sized()

    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    guarded: Any = PapaoursAuthMiddleware(answers, authenticator=authenticator, usage=kept.recorder)
    given = guarded(environ_of(headers=HEADERS), lambda *_: bytes)
    assert (len(given), list(given)) == (1, [b"one"])
    given.close()
    assert body.closed == 1
    assert [event.outcome for event in kept.events()] == ["completed"]


def test_an_app_may_be_a_generator(authenticator: Authenticator) -> None:
    """Its answer begins with its first step: granian reads status and headers before it."""

    def generates(environ: Any, start_response: Any) -> Any:
        start_response("201 Created", [("Content-Type", "text/plain")])
        yield b"one"
        yield b"two"

    started: list[str] = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        started.append(status)
        return bytes

    given = PapaoursAuthMiddleware(generates, authenticator=authenticator)(environ_of(headers=HEADERS), start)
    assert started == ["201 Created"]
    assert list(given) == [b"one", b"two"]


def test_pitfall_43_headers_that_can_be_read_once_are_read_once(authenticator: Authenticator) -> None:
    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", iter([("Cache-Control", "no-store"), ("Set-Cookie", "a=b")]))
        return [b"ok"]

    _, headers, _ = run_wsgi(
        PapaoursAuthMiddleware(answers, authenticator=authenticator), environ_of(headers=HEADERS)
    )
    assert headers == {"cache-control": "no-store", "set-cookie": "a=b"}


def starlettes_bridge(app: Any, calls: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and in use
        from starlette.middleware.wsgi import WSGIMiddleware as Bridge
    client = StarletteClient(Bridge(app))
    for _ in range(calls):
        assert client.get("/contracts", headers=dict(HEADERS)).status_code == 200


def werkzeugs_client(app: Any, calls: int) -> None:
    client = WerkzeugClient(app)
    for _ in range(calls):
        assert client.get("/contracts", headers=HEADERS, buffered=False).get_data()


def flasks_client(app: Any, calls: int) -> None:
    flask = Flask(__name__)
    flask.wsgi_app = app  # type: ignore[method-assign]
    for _ in range(calls):
        assert flask.test_client().get("/contracts", headers=HEADERS).data


def one_that_closes_nothing(app: Any, calls: int) -> None:
    for _ in range(calls):
        assert list(app(environ_of(headers=HEADERS), lambda *_: bytes))


@pytest.mark.parametrize(
    "client", [starlettes_bridge, werkzeugs_client, flasks_client, one_that_closes_nothing]
)
@pytest.mark.parametrize("pieces", [[b"list"], iter, "generator"], ids=["list", "iterator", "generator"])
def test_ten_calls_are_ten_events_although_no_body_is_closed(
    authenticator: Authenticator, kept: Kept, client: Any, pieces: Any
) -> None:
    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        if pieces is iter:
            return iter([b"one", b"two"])
        return pieces if isinstance(pieces, list) else (piece for piece in [b"one", b"two"])

    client(PapaoursAuthMiddleware(answers, authenticator=authenticator, usage=kept.recorder), 10)
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "completed")] * 10


def test_a_body_that_is_whole_in_its_first_piece_is_recorded_although_nobody_reads_it(
    authenticator: Authenticator, kept: Kept
) -> None:
    """As Flask's are, in tests that look at the status alone."""
    app = Flask(__name__)
    app.add_url_rule("/contracts", view_func=lambda: {"contracts": []})
    app.wsgi_app = PapaoursAuthMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, authenticator=authenticator, usage=kept.recorder
    )
    client = app.test_client()
    for _ in range(10):
        assert client.get("/contracts", headers=HEADERS).status_code == 200
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "completed")] * 10


class OfC:
    """A file wrapper that takes no attribute."""

    __slots__ = ("file",)

    def __init__(self, file: Any) -> None:
        self.file = file

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)


def as_uwsgi_has_it(file: Any, block_size: int) -> Any:
    """It knows what it gave by identity, and asks it for a file number."""
    assert (block_size, file.read(1), list(file)) == (8192, b"a", [b"b"])
    return file


@pytest.mark.parametrize("wrapper", [OfC, as_uwsgi_has_it])
def test_a_file_is_recorded_whatever_the_servers_wrapper_is(
    authenticator: Authenticator, kept: Kept, wrapper: Any
) -> None:
    file = io.BytesIO(b"ab")
    given: list[Any] = []

    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        given.append(environ["wsgi.file_wrapper"](file))
        return given[0]

    guarded = PapaoursAuthMiddleware(answers, authenticator=authenticator, usage=kept.recorder)
    body: Any = guarded(environ_of(headers=HEADERS) | {"wsgi.file_wrapper": wrapper}, lambda *_: bytes)
    assert body is given[0]
    if wrapper is as_uwsgi_has_it:
        assert kept.events() == []
        body.close()
        assert file.closed
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "completed")]


def test_a_file_that_a_server_closes_amid_an_error_is_gone(authenticator: Authenticator, kept: Kept) -> None:
    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"ab"))

    guarded = PapaoursAuthMiddleware(answers, authenticator=authenticator, usage=kept.recorder)
    body: Any = guarded(environ_of(headers=HEADERS) | {"wsgi.file_wrapper": Wrapper}, lambda *_: bytes)
    with pytest.raises(BrokenPipeError):
        try:
            raise BrokenPipeError
        finally:
            body.close()
    assert [event.outcome for event in kept.events()] == ["gone"]


def test_text_is_no_servers_to_send(authenticator: Authenticator, kept: Kept) -> None:
    bodies: list[Any] = [["text"], iter(["text"])]

    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return bodies.pop()

    guarded = PapaoursAuthMiddleware(answers, authenticator=authenticator, usage=kept.recorder)
    for _ in range(2):
        handed: Any = guarded(environ_of(headers=HEADERS), lambda *_: bytes)
        assert list(handed) == ["text"]
    assert [(event.status, event.outcome) for event in kept.events()] == [(0, "failed")] * 2


def test_a_server_without_write_gives_none(authenticator: Authenticator) -> None:
    given: list[Any] = []

    def answers(environ: Any, start_response: Any) -> list[bytes]:
        given.append(start_response("200 OK", []))
        return []

    nothing: Any = lambda *_: None  # noqa: E731 - as granian's
    PapaoursAuthMiddleware(answers, authenticator=authenticator)(environ_of(headers=HEADERS), nothing)
    assert given == [None]


@pytest.mark.parametrize("usage", [False, True])
def test_a_file_without_wrapper_is_sent_as_any_iterable(
    authenticator: Authenticator, kept: Kept, usage: bool
) -> None:
    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return io.BytesIO(b"a\nb")

    guarded = PapaoursAuthMiddleware(
        answers, authenticator=authenticator, usage=kept.recorder if usage else None
    )
    assert run_wsgi(guarded, environ_of(headers=HEADERS))[2] == b"a\nb"
    assert [event.outcome for event in kept.events()] == ["completed"] * usage


def test_a_status_that_comes_too_late_is_not_the_one_recorded(
    authenticator: Authenticator, kept: Kept
) -> None:
    """Servers raise then. One that does not has sent the first status all the same."""

    def breaks(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"one"
        try:
            raise LookupError
        except LookupError:
            start_response("500 Internal Server Error", [], sys.exc_info())

    for strict in (True, False):

        def begin(status: str, headers: Any, exc_info: Any = None, strict: bool = strict) -> Any:
            if exc_info and strict:
                raise exc_info[1]
            return bytes

        guarded = PapaoursAuthMiddleware(breaks, authenticator=authenticator, usage=kept.recorder)
        with contextlib.suppress(LookupError):
            list(guarded(environ_of(headers=HEADERS), begin))
    assert [(event.status, event.outcome) for event in kept.events()] == [(200, "failed"), (200, "completed")]


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


# what the app does reaches the server, whether or not calls are recorded


@pytest.fixture(params=["recorded", "not recorded"])
def guards(request: pytest.FixtureRequest, authenticator: Authenticator) -> Iterator[Callable[[Any], Any]]:
    kept = Kept()
    usage = kept.recorder if request.param == "recorded" else None
    yield lambda app: PapaoursAuthMiddleware(app, authenticator=authenticator, usage=usage)
    kept.recorder.close()


class Body:
    """An iterable that counts how often it was closed, and may fail in its second piece."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"one"
        if self.fails:
            raise LookupError("in the body")
        yield b"two"

    def close(self) -> None:
        self.closed += 1


def gives(body: Iterable[bytes]) -> Any:
    def answers(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    return answers


def test_an_apps_exception_reaches_the_server(guards: Callable[[Any], Any]) -> None:
    def fails(environ: Any, start_response: Any) -> Any:
        raise LookupError("in the app")

    with pytest.raises(LookupError, match="in the app"):
        guards(fails)(environ_of(headers=HEADERS), lambda *_: bytes)
    with pytest.raises(LookupError, match="in the body"):
        run_wsgi(guards(gives(Body(fails=True))), environ_of(headers=HEADERS))


@pytest.mark.parametrize("read", ["to its end", "in part", "not at all", "until it fails"])
def test_an_apps_iterable_is_closed_once_however_far_it_was_read(
    guards: Callable[[Any], Any], read: str
) -> None:
    body = Body(fails=read == "until it fails")
    given = guards(gives(body))(environ_of(headers=HEADERS), lambda *_: bytes)
    pieces = iter(given) if read != "not at all" else iter(())
    with contextlib.suppress(LookupError):
        got = list(pieces) if read != "in part" else [next(pieces)]
        assert got == {"in part": [b"one"], "not at all": []}.get(read, [b"one", b"two"])
    assert body.closed == 0
    given.close()
    assert body.closed == 1


def test_what_went_wrong_is_handed_on_to_the_server(guards: Callable[[Any], Any]) -> None:
    """PEP 3333: once the headers are sent, the server raises it again, and the client sees a broken answer."""
    error = LookupError("after the first piece")

    def late(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one"
        try:
            raise error
        except LookupError:
            start_response("500 Too Late", [], sys.exc_info())
        yield b"never"

    handed: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None:
            handed.append(exc_info)
            raise exc_info[1].with_traceback(exc_info[2])
        return bytes

    given = guards(late)(environ_of(headers=HEADERS), start_response)
    with pytest.raises(LookupError, match="after the first piece"):
        list(given)
    assert [(info[0], info[1]) for info in handed] == [(LookupError, error)]


def test_a_first_start_brings_the_server_no_exc_info(guards: Callable[[Any], Any]) -> None:
    """Some servers' `start_response` takes two arguments, and reads a third as a failure."""
    got: list[tuple[object, ...]] = []

    def start_response(*arguments: object) -> Any:
        got.append(arguments)
        return bytes

    guards(gives([b"ok"]))(environ_of(headers=HEADERS), start_response)
    assert [len(arguments) for arguments in got] == [2]


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


def test_pitfall_47_a_server_that_is_not_known_to_drop_underscores_is_told_once(
    authenticator: Authenticator, caplog: pytest.LogCaptureFixture
) -> None:
    guard = PapaoursAuthMiddleware(app, authenticator=authenticator, trusted_proxies=["203.0.113.9"])
    forwarded = [("X-Forwarded-For", "198.51.100.7")]
    for software in ("granian", "WSGIServer/0.2 CPython/3.11", "", "mygunicorn/1"):
        assert guard.client_of(environ_of(headers=forwarded, SERVER_SOFTWARE=software)) is None
    assert guard.client_of(environ_of(headers=forwarded)) == "198.51.100.7"
    assert len([record for record in caplog.records if "proxy_drops_underscores" in record.getMessage()]) == 1


def test_what_a_proxy_drops_is_about_proxies_that_are_trusted(authenticator: Authenticator) -> None:
    with pytest.raises(ConfigurationError, match="trusted_proxies"):
        PapaoursAuthMiddleware(app, authenticator=authenticator, proxy_drops_underscores=True)
