"""Starlette: the ASGI middleware that also sets ``request.user`` and ``request.auth``, and what endpoints ask of it.

    app = Starlette(
        routes=[...],
        middleware=[Middleware(PapaoursAuthMiddleware, environment="prod")],
        exception_handlers=exception_handlers,
    )

Starlette's ``@requires("contrats:lecture")`` works too; the answer to a lacking right is then Starlette's own, while
`require` has ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Unpack

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler, Receive, Scope, Send

from . import asgi
from ._asgi_answer import note
from ._middleware import MiddlewareOptions
from .asgi import App, respond
from .authenticator import AsyncAuthenticator
from .exceptions import Refused
from .http import render, words_of
from .model import UNSET, Identity, Unset
from .readiness import Guarding, Watching, readiness_of
from .stores import AsyncStore
from .usage import Recorder

__all__ = [
    "HTTPRefused",
    "PapaoursAuthMiddleware",
    "exception_handlers",
    "identity",
    "readiness",
    "refuse",
    "require",
]


class Anonymous:
    """A caller without a key, under the names that ``request.user`` and ``request.auth`` are read by.

    One object stands for all of them, so nothing can be written to it.
    """

    __slots__ = ()

    is_authenticated = False
    display_name = ""
    identity = ""
    scopes: frozenset[str] = frozenset()


ANONYMOUS: Final = Anonymous()


class PapaoursAuthMiddleware(asgi.PapaoursAuthMiddleware):
    """The ASGI middleware for Starlette and FastAPI. The `Identity` is ``request.user`` and ``request.auth`` too.

    A user that another middleware found stays on a request without a key. Exempt paths are read as Starlette reads
    them, below the server's root path. Options: see `papaours_auth.asgi.Guard`.
    """

    _strips = True

    def __init__(
        self,
        app: App,
        *,
        environment: str | None = None,
        store: str | AsyncStore | None = None,
        authenticator: AsyncAuthenticator | None = None,
        usage: Recorder | str | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        super().__init__(
            app, environment=environment, store=store, authenticator=authenticator, usage=usage, **options
        )
        self._inner = self._with_user

    # No coroutine of ours: it gives the app's.
    def _with_user(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        caller = scope["papaours"]
        if caller is not None:
            scope["user"] = scope["auth"] = caller
        else:
            for name in ("user", "auth"):
                # An identity of ours is that of a guard further out, which says nothing here.
                if isinstance(scope.setdefault(name, ANONYMOUS), Identity):
                    scope[name] = ANONYMOUS
        return self.app(scope, receive, send)


class HTTPRefused(Refused, HTTPException):
    """What `identity` and `require` raise here: a `Refused` that Starlette answers by itself.

    An app without our `exception_handlers`, a mounted one say, gives the right status and headers with its own body.
    """

    def __init__(self, refused: Refused, accept_language: str = "") -> None:
        answer = render(refused, accept_language=accept_language)
        # The body is the app's, and so is what describes it.
        headers = {
            name: value for name, value in answer.headers if name not in ("Content-Type", "Content-Length")
        }
        HTTPException.__init__(
            self, answer.status, words_of(refused, accept_language=accept_language), headers
        )
        self.args = (refused.reason.value,)
        self.reason, self.known = refused.reason, refused.known
        self.needs, self.retry_after = refused.needs, refused.retry_after


def identity(connection: HTTPConnection) -> Identity:
    """Return who calls. Raises `HTTPRefused` on an anonymous request."""
    try:
        return asgi.identity(connection.scope)
    except Refused as refused:
        raise as_http(refused, connection) from None


def require(connection: HTTPConnection, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights. See `papaours_auth.asgi.require`."""
    try:
        return asgi.require(connection.scope, *rights, organisation=organisation)
    except Refused as refused:
        raise as_http(refused, connection) from None


def as_http(refused: Refused, connection: HTTPConnection) -> HTTPRefused:
    """Return a refusal that Starlette answers by itself, in the caller's language."""
    return HTTPRefused(refused, connection.headers.get("accept-language", ""))


async def refuse(connection: HTTPConnection, refused: Exception) -> Response:
    """Answer a `Refused` that an endpoint raised, as the middleware answers its own."""
    if not isinstance(refused, Refused):
        raise refused
    note(connection.scope, refused)  # for the middleware, which records why
    return _Refusal(refused)


class _Refusal(Response):
    def __init__(self, refused: Refused) -> None:
        super().__init__(status_code=render(refused).status)  # for those who look at it before it is sent
        self._refused = refused.copy()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(self._refused, scope, send)


exception_handlers: Final[dict[Any, ExceptionHandler]] = {Refused: refuse}
"""For ``Starlette(exception_handlers=…)``. Any: Starlette's own type for the keys."""


def readiness(subject: Watching | Guarding) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that tells the readiness of an authenticator or of a guard: 200, or 503 with the reasons.

    ``Route("/readyz", readiness(authenticator), methods=["GET"])``, on a path that needs no key.
    """

    async def ready(request: Request) -> Response:
        answer = readiness_of(subject, method=request.method)
        return Response(answer.body, answer.status, dict(answer.headers))

    return ready
