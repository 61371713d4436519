"""WSGI middleware for any PEP 3333 app. The identity is ``environ["papaours.identity"]``.

It waits for the store in the calling thread: there is no event loop here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Unpack

from ._middleware import (
    REFUSAL,
    WSGIOptions,
    authorized,
    known,
    needed,
    recorder_for,
    split_options,
    store_url,
)
from ._wsgi_answer import IDENTITY, STOOD_ASIDE, Answer, answer_to_refused, path_of, respond, route_of
from .authenticator import Authenticator
from .exceptions import ConfigurationError, Reason, Refused, StoreUnavailable
from .http import Gate, credentials
from .model import UNSET, Identity, Unset
from .readiness import wsgi_app
from .stores import Store
from .usage import Recorder

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "Guard",
    "PapaoursAuthMiddleware",
    "answer_to_refused",
    "identity",
    "identity_of",
    "require",
    "respond",
    "route_of",
]

logger = logging.getLogger("papaours_auth")
readiness = wsgi_app
_DROPPING: Final = ("gunicorn/", "waitress", "Werkzeug/", "gevent/")
"""How servers call themselves that drop headers with underscores in their names, each held by a test."""


class Guard:
    """Finds who calls a WSGI app: what the middleware and the integrations share.

    Options as on `papaours_auth.asgi.Guard`, with a blocking ``store`` or ``authenticator``. Peppers that are not
    the store's stop the app here, at start: WSGI has no other. No thread is started: the server may fork.

    ``proxy_drops_underscores`` says that every trusted proxy drops headers with underscores in their names, as nginx
    does by default. Without it, ``trusted_proxies`` count only on servers that drop those themselves (gunicorn,
    waitress, Werkzeug, gevent); elsewhere the client is unknown.
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
        # Asked once: 100 ns less a request than two properties and a call.
        self._everything, self._direct = self.gate.everything, not self.gate.believes_proxies
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
            client = self.client_of(environ)
            key = self._presented(environ)
            try:
                identity = self.authenticator.cached(key, client)
            finally:
                del key  # no frame of ours holds it while the store is asked
            if identity is not None:
                return identity
            return self.authenticator.authenticate(self._presented(environ), client=client)
        except Refused as refused:
            found = refused.copy()  # the raised one has frames that had the key
        if self._passes(found, environ):
            return None
        judged = self._judged(found, environ)
        try:
            raise judged
        finally:
            del judged, found  # no cycle of an error and its frame

    def _presented(self, environ: WSGIEnvironment) -> bytes:
        return credentials(
            _header(environ, "HTTP_AUTHORIZATION"), _header(environ, "HTTP_X_API_KEY"), token=self._token
        )

    def _judged(self, refused: Refused, environ: WSGIEnvironment) -> Refused:
        if self.throttle is None:
            return refused
        return self.throttle.judge(refused, self.client_of(environ))

    def client_of(self, environ: WSGIEnvironment) -> str | None:
        """Return the caller's address, None where it cannot be known."""
        peer = environ.get("REMOTE_ADDR") or ""
        if self._direct:
            return peer or None
        forwarded = None
        if self._underscores_dropped or self._drops_underscores(environ):
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

    A `Refused` that is raised below it is answered too, as long as the answer has not begun.

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
        identity = refused = None
        environ[REFUSAL] = None  # not that of a guard further out
        if self._everything or self.gate.guards(path_of(environ)):
            try:
                identity = self.identify(environ)
            except Refused as error:
                refused = error.copy()
                if not self.gate.everywhere:
                    environ[REFUSAL], environ[STOOD_ASIDE] = refused, self.authenticator.id
        environ[IDENTITY] = identity
        answer = Answer(self, environ, start_response, identity)
        del environ  # its headers hold the key
        if refused is not None and self.gate.everywhere:
            return answer.refuse(refused)
        return answer.run(self.app)


def identity_of(environ: WSGIEnvironment) -> Identity | None:
    """Give the identity a middleware found, or None on an anonymous request."""
    identity = environ.get("papaours.identity")
    return identity if isinstance(identity, Identity) else None


def identity(environ: WSGIEnvironment) -> Identity:
    """Return who calls. Raises `Refused` if it came without a valid key; the middleware answers it."""
    caller, refusal = identity_of(environ), environ.get(REFUSAL)
    del environ  # its headers hold the key, and handlers of errors look into frames
    return known(caller, refusal)


def require(environ: WSGIEnvironment, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights: on this organisation's data, or on any if none is named.

    Raises `Refused`, which the middleware answers, and `InvalidInput` for no right, a right that is none, or an
    organisation that is ``None`` or empty.
    """
    caller, refusal = identity_of(environ), environ.get(REFUSAL)
    del environ
    return authorized(known(caller, refusal), rights, organisation)


def _header(environ: WSGIEnvironment, name: str) -> bytes | None:
    value: str | None = environ.get(name)
    # PEP 3333: bytes dressed as latin-1. A server that breaks that gets '?', which is in no key.
    return None if value is None else value.encode("latin-1", "replace")
