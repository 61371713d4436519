"""WSGI middleware for any PEP 3333 app. The identity is ``environ["papaours.identity"]``.

It waits for the store in the calling thread: there is no event loop here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Unpack

from ._middleware import (
    REFUSAL,
    WSGIOptions,
    authorized,
    known,
    needed,
    recordable,
    recorder_for,
    split_options,
    store_url,
)
from .authenticator import Authenticator
from .exceptions import ConfigurationError, Reason, Refused, StoreUnavailable
from .format import KeyFormat
from .http import Gate, credentials, render
from .model import UNSET, Identity, Unset
from .stores import Store
from .usage import Call, Outcome, Recorder, begin_call

logger = logging.getLogger("papaours_auth")
# Bound once: to name a member of an enum costs 100 ns.
_COMPLETED, _FAILED, _GONE = Outcome.COMPLETED, Outcome.FAILED, Outcome.GONE
_DROPPING: Final = ("gunicorn/", "waitress", "Werkzeug/")
"""How servers call themselves that drop headers with underscores in their names, each held by a test."""
REFUSED: Final = "papaours.refused"
"""Where in an environ an integration puts the `Refused` that a view raised, for what is recorded."""

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    _ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None


class Guard:
    """Finds who calls a WSGI app: what the middleware and the integrations share.

    Options as on `papaours_auth.asgi.Guard`, with a blocking ``store`` or ``authenticator``. Peppers that are not
    the store's stop the app here, at start: WSGI has no other. No thread is started: the server may fork.

    ``proxy_drops_underscores`` says that every trusted proxy drops headers with underscores in their names, as nginx
    does by default. Without it, ``trusted_proxies`` count only on servers that drop those themselves (gunicorn,
    waitress, Werkzeug); elsewhere the client is unknown.
    """

    def __init__(
        self,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        **options: Unpack[WSGIOptions],
    ) -> None:
        self._underscores_dropped, self._told = options.pop("proxy_drops_underscores", False), False
        if self._underscores_dropped and not options.get("trusted_proxies"):
            raise ConfigurationError("proxy_drops_underscores is about trusted_proxies, and none are given")
        gate, rest, self.throttle = split_options(options)
        if authenticator is not None and (environment is not None or store is not None or rest):
            raise ConfigurationError("authenticator is ready: environment, store and its options go into it")
        self.gate = Gate(**gate)
        self.authenticator = authenticator or Authenticator(
            store if store is not None else store_url(), environment=needed(environment), **rest
        )
        self._token = f"{self.authenticator.format.token}_".encode("ascii")
        try:
            self.authenticator.check()
        except StoreUnavailable as error:
            logger.warning("starting although the key store cannot answer, so calls meet 503: %s", error)

    def identify(self, environ: WSGIEnvironment) -> Identity | None:
        """Give who calls; None where a request may pass without a key. Raises `Refused`."""
        try:
            key = credentials(
                _header(environ, "HTTP_AUTHORIZATION"), _header(environ, "HTTP_X_API_KEY"), token=self._token
            )
            return self.authenticator.authenticate(key, client=self._client(environ))
        except Refused as refused:
            if self._passes(refused, environ):
                return None
            judged = self._judged(refused, environ)
            try:
                if judged is refused:
                    raise
                raise judged from refused
            finally:
                del judged  # no cycle of an error and its frame

    def _judged(self, refused: Refused, environ: WSGIEnvironment) -> Refused:
        if self.throttle is None:
            return refused
        return self.throttle.judge(refused, self._client(environ))

    def _client(self, environ: WSGIEnvironment) -> str | None:
        peer = environ.get("REMOTE_ADDR") or ""
        forwarded = None
        if self.gate.believes_proxies and (self._underscores_dropped or self._drops_underscores(environ)):
            forwarded = _header(environ, "HTTP_X_FORWARDED_FOR")
        return self.gate.client(peer, forwarded)

    def _drops_underscores(self, environ: WSGIEnvironment) -> bool:
        """Whether the server drops ``X_Forwarded_For``, which anyone can send past a proxy (CVE-2015-0219).

        WSGI has one name for it and ``X-Forwarded-For``. A server that is not known to drop it, or a bridge, has its
        clients unknown: no address is better than one that the client chose.
        """
        software = str(environ.get("SERVER_SOFTWARE", ""))
        if software.startswith(_DROPPING):
            return True
        if not self._told:
            self._told = True
            logger.error(
                "this server takes X_Forwarded_For for X-Forwarded-For, so no client's address is believed: see "
                "proxy_drops_underscores in docs/servers.md"
            )
        return False

    def _passes(self, refused: Refused, environ: WSGIEnvironment) -> bool:
        if refused.reason is not Reason.MISSING_KEY:
            return False
        return not self.gate.required or (
            self.gate.passes_preflight
            and environ["REQUEST_METHOD"] == "OPTIONS"
            and "HTTP_ORIGIN" in environ
            and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        )


class PapaoursAuthMiddleware(Guard):
    """Lets requests with a valid key through to ``app`` and answers the others itself. Options: see `Guard`.

    ``usage``: where calls are recorded, a `Recorder` or a URL such as ``sqlite:///usage.db``; nowhere by default.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        usage: Recorder | str | None = None,
        **options: Unpack[WSGIOptions],
    ) -> None:
        self.app = app
        super().__init__(environment=environment, store=store, authenticator=authenticator, **options)
        self.recorder = recorder_for(usage)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Guard one request (PEP 3333)."""
        environ["papaours.identity"] = environ[REFUSAL] = None  # not those of a guard further out
        if not self.gate.everything and not self.gate.guards(_path(environ)):
            return self.app(environ, start_response)
        try:
            identity = environ["papaours.identity"] = self.identify(environ)
        except Refused as refused:
            if self.gate.everywhere:
                return self._refuse(refused, environ, start_response)
            environ[REFUSAL] = refused.copy()
            identity = None
        if identity is None:
            return self.app(environ, start_response)
        if self.recorder is None:
            return self.app(environ, private(start_response))
        call = begin_call(identity, self._client(environ), environ["REQUEST_METHOD"])
        return _Recording(self.recorder, call, environ, self.authenticator.format).run(
            self.app, start_response
        )

    def _refuse(
        self, refused: Refused, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if self.recorder is None:
            return respond(refused, environ, start_response)
        client = self._client(environ)
        if refused.known is None:
            self.recorder.refused(refused.reason, client)
            return respond(refused, environ, start_response)
        call = begin_call(refused.known, client, environ["REQUEST_METHOD"], refused.reason.value)
        recording = _Recording(self.recorder, call, environ, self.authenticator.format)
        return recording.run(lambda environ, start: respond(refused, environ, start), start_response)


class _Recording:
    """One call's answer: an iterable that knows when it begins, and how it ends."""

    __slots__ = ("_body", "_call", "_ended", "_environ", "_format", "_recorder", "_whole")

    def __init__(self, recorder: Recorder, call: Call, environ: WSGIEnvironment, format: KeyFormat) -> None:  # noqa: A002
        self._recorder, self._call, self._environ, self._format = recorder, call, environ, format
        self._ended = self._whole = False
        self._body: Iterable[bytes] = ()

    def run(self, app: WSGIApplication, start_response: StartResponse) -> Iterable[bytes]:
        """Call the app; what it gives is passed on piece by piece. Does what `private` does, in one wrapper."""

        def started(
            status: str, headers: list[tuple[str, str]], exc_info: _ExcInfo = None, /
        ) -> Callable[[bytes], object]:
            self._sent(status)
            if exc_info is None:
                return start_response(status, _marked(headers))
            return start_response(status, _marked(headers), exc_info)

        try:
            self._body = app(self._environ, started)
        except BaseException:
            self._end(_FAILED)
            raise
        return self

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._body
        except GeneratorExit:
            raise
        except BaseException:
            self._end(_FAILED)
            raise
        self._whole = True

    def close(self) -> None:
        """Close the app's own iterable, and note the end (PEP 3333: servers call it whatever happens)."""
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._end(_COMPLETED if self._whole else _GONE)

    def _sent(self, status: str) -> None:
        self._describe()
        self._call.status = int(status[:3]) if status[:3].isdecimal() else 0
        self._recorder.sent(self._call)

    def _end(self, outcome: Outcome) -> None:
        if self._ended:
            return
        self._ended = True
        if not self._call.status:
            self._describe()
        self._recorder.done(self._call, outcome)

    def _describe(self) -> None:
        environ, call = self._environ, self._call
        call.route = recordable(route_of(environ), self._format)
        if not call.reason and REFUSED in environ:
            call.reason = environ[REFUSED].reason.value
        call.request_id = recordable(environ.get("HTTP_X_REQUEST_ID", ""), self._format)


def respond(refused: Refused, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer a refused request."""
    answer = render(refused, accept_language=environ.get("HTTP_ACCEPT_LANGUAGE", ""))
    start_response(answer.status_line, list(answer.headers))
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]


def identity_of(environ: WSGIEnvironment) -> Identity | None:
    """Give the identity a middleware found, or None on an anonymous request."""
    identity = environ.get("papaours.identity")
    return identity if isinstance(identity, Identity) else None


def identity(environ: WSGIEnvironment) -> Identity:
    """Return who calls. Raises `Refused` if it came without a valid key; the middleware answers it."""
    return known(identity_of(environ), environ.get(REFUSAL))


def require(environ: WSGIEnvironment, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights: on this organisation's data, or on any if none is named.

    Raises `Refused`, which the middleware answers, and `InvalidInput` for no right, a right that is none, or an
    organisation that is ``None`` or empty.
    """
    return authorized(identity(environ), rights, organisation)


def route_of(environ: WSGIEnvironment) -> str:
    """Give the route's template where the framework tells it (Flask), else the path."""
    rule = getattr(getattr(environ.get("werkzeug.request"), "url_rule", None), "rule", None)
    return rule if isinstance(rule, str) else _path(environ)


def _path(environ: WSGIEnvironment) -> str:
    path: str = environ.get("PATH_INFO", "")
    return path.encode("latin-1", "replace").decode("utf-8", "replace")  # PEP 3333: bytes dressed as latin-1


def _header(environ: WSGIEnvironment, name: str) -> bytes | None:
    value: str | None = environ.get(name)
    # PEP 3333: bytes dressed as latin-1. A server that breaks that gets '?', which is in no key.
    return None if value is None else value.encode("latin-1", "replace")


def private(start_response: StartResponse) -> StartResponse:
    """Keep shared caches from an answer where the app said nothing (they know Authorization, not X-API-KEY)."""

    def wrapped(
        status: str, headers: list[tuple[str, str]], exc_info: _ExcInfo = None, /
    ) -> Callable[[bytes], object]:
        if exc_info is None:
            return start_response(status, _marked(headers))
        return start_response(status, _marked(headers), exc_info)

    return wrapped


def _marked(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    for name, _ in headers:  # no all(): its generator costs 250 ns an answer
        if name.lower() == "cache-control":
            return headers
    return [*headers, ("Cache-Control", "private")]
