"""WSGI middleware for any PEP 3333 app. The identity is ``environ["papaours.identity"]``.

It waits for the store in the calling thread: there is no event loop here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Unpack

from ._middleware import MiddlewareOptions, needed, split_options, store_url
from .authenticator import Authenticator
from .exceptions import ConfigurationError, Reason, Refused, StoreUnavailable
from .http import Gate, credentials, render
from .model import Identity
from .stores import Store

logger = logging.getLogger("papaours_auth")

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    _ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None


class Guard:
    """Finds who calls a WSGI app: what the middleware and the integrations share.

    Options as on `papaours_auth.asgi.Guard`, with a blocking ``store`` or ``authenticator``. Peppers that are not
    the store's stop the app here, at start: WSGI has no other. No thread is started: the server may fork.
    """

    def __init__(
        self,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        gate, rest = split_options(options)
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
            forwarded = _header(environ, "HTTP_X_FORWARDED_FOR") if self.gate.believes_proxies else None
            client = self.gate.client(environ.get("REMOTE_ADDR") or "", forwarded)
            return self.authenticator.authenticate(key, client=client)
        except Refused as refused:
            if self._passes(refused, environ):
                return None
            raise

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
    """Lets requests with a valid key through to ``app`` and answers the others itself. Options: see `Guard`."""

    def __init__(
        self,
        app: WSGIApplication,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        self.app = app
        super().__init__(environment=environment, store=store, authenticator=authenticator, **options)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Guard one request (PEP 3333)."""
        environ["papaours.identity"] = None
        if not self.gate.everything and not self.gate.guards(_path(environ)):
            return self.app(environ, start_response)
        try:
            identity = environ["papaours.identity"] = self.identify(environ)
        except Refused as refused:
            return respond(refused, environ, start_response)
        return self.app(environ, start_response if identity is None else private(start_response))


def respond(refused: Refused, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer a refused request."""
    answer = render(refused, accept_language=environ.get("HTTP_ACCEPT_LANGUAGE", ""))
    start_response(answer.status_line, list(answer.headers))
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]


def identity_of(environ: WSGIEnvironment) -> Identity | None:
    """Give the identity a middleware found, or None on an anonymous request."""
    identity = environ.get("papaours.identity")
    return identity if isinstance(identity, Identity) else None


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
        for name, _ in headers:  # no all(): its generator costs 250 ns an answer
            if name.lower() == "cache-control":
                break
        else:
            headers = [*headers, ("Cache-Control", "private")]
        return (
            start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)
        )

    return wrapped
