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


class PapaoursAuthMiddleware:
    """Lets requests with a valid key through to ``app`` and answers the others itself.

    Options as on `papaours_auth.asgi.PapaoursAuthMiddleware`, with a blocking ``store`` or ``authenticator``. Peppers
    that are not the store's stop the app here, at start: WSGI has no other.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        gate, rest = split_options(options)
        if authenticator is not None and (environment is not None or store is not None or rest):
            raise ConfigurationError("authenticator is ready: environment, store and its options go into it")
        self.app = app
        self.gate = Gate(**gate)
        self.authenticator = authenticator or Authenticator(
            store if store is not None else store_url(), environment=needed(environment), **rest
        )
        self._token = f"{self.authenticator.format.token}_".encode("ascii")
        try:
            self.authenticator.check()
        except StoreUnavailable as error:
            logger.warning("starting although the key store cannot answer, so calls meet 503: %s", error)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Guard one request (PEP 3333)."""
        environ["papaours.identity"] = None
        if not self.gate.everything and not self.gate.guards(_path(environ)):
            return self.app(environ, start_response)
        try:
            key = credentials(
                _header(environ, "HTTP_AUTHORIZATION"), _header(environ, "HTTP_X_API_KEY"), token=self._token
            )
            forwarded = _header(environ, "HTTP_X_FORWARDED_FOR") if self.gate.believes_proxies else None
            client = self.gate.client(environ.get("REMOTE_ADDR") or "", forwarded)
            environ["papaours.identity"] = self.authenticator.authenticate(key, client=client)
        except Refused as refused:
            if refused.reason is Reason.MISSING_KEY and self._passes_without_key(environ):
                return self.app(environ, start_response)
            return respond(refused, environ, start_response, realm=self.gate.realm)
        return self.app(environ, _private(start_response))

    def _passes_without_key(self, environ: WSGIEnvironment) -> bool:
        return not self.gate.required or (
            self.gate.passes_preflight
            and environ["REQUEST_METHOD"] == "OPTIONS"
            and "HTTP_ORIGIN" in environ
            and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        )


def respond(
    refused: Refused, environ: WSGIEnvironment, start_response: StartResponse, *, realm: str
) -> list[bytes]:
    """Answer a refused request."""
    answer = render(refused, accept_language=environ.get("HTTP_ACCEPT_LANGUAGE", ""), realm=realm)
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


def _private(start_response: StartResponse) -> StartResponse:
    """Keep shared caches from an answer where the app said nothing (they know Authorization, not X-API-KEY)."""

    def wrapped(
        status: str, headers: list[tuple[str, str]], exc_info: _ExcInfo = None, /
    ) -> Callable[[bytes], object]:
        if all(name.lower() != "cache-control" for name, _ in headers):
            headers = [*headers, ("Cache-Control", "private")]
        return (
            start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)
        )

    return wrapped
