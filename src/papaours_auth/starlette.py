"""Starlette: the ASGI middleware as it is, and what endpoints ask of it.

    app = Starlette(
        routes=[...],
        middleware=[Middleware(PapaoursAuthMiddleware, environment="prod")],
        exception_handlers=exception_handlers,
    )

``request.user``, ``request.auth`` and Starlette's ``@requires("contrats:lecture")`` work too; the answer to a lacking
right is then Starlette's own, while `require` has ours.
"""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ExceptionHandler, Receive, Scope, Send

from . import asgi
from .asgi import REFUSED, PapaoursAuthMiddleware, respond
from .exceptions import Refused
from .http import render
from .model import UNSET, Identity, Unset

__all__ = ["PapaoursAuthMiddleware", "exception_handlers", "identity", "refuse", "require"]


def identity(connection: HTTPConnection) -> Identity:
    """Return who calls. Raises `Refused` on an anonymous request."""
    return asgi.identity(connection.scope)


def require(connection: HTTPConnection, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights. See `papaours_auth.asgi.require`."""
    return asgi.require(connection.scope, *rights, organisation=organisation)


async def refuse(connection: HTTPConnection, refused: Exception) -> Response:
    """Answer a `Refused` that an endpoint raised, as the middleware answers its own."""
    if not isinstance(refused, Refused):
        raise refused
    connection.scope[REFUSED] = refused  # for the middleware, which records why
    return _Refusal(refused)


class _Refusal(Response):
    def __init__(self, refused: Refused) -> None:
        super().__init__(status_code=render(refused).status)  # for those who look at it before it is sent
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(self._refused, scope, send)


exception_handlers: Final[dict[Any, ExceptionHandler]] = {Refused: refuse}
"""For ``Starlette(exception_handlers=…)``. Any: Starlette's own type for the keys."""
