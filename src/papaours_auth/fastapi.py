"""FastAPI: a `Security` dependency that gives a typed `Identity`, and shows in the OpenAPI document.

    auth = PapaoursAuth(environment="prod")
    app = FastAPI()
    auth.install(app)

    @app.get("/contrats")
    def contrats(caller: Annotated[Identity, Security(auth, scopes=["contrats:lecture"])]) -> ...

Routes without it are open. To guard every path instead, add `PapaoursAuthMiddleware`; the dependency then takes
the identity that the middleware found.
"""

# No `from __future__ import annotations`: FastAPI before 0.116 cannot read such on a dependency that is an object.
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from .asgi import Guard, Message, PapaoursAuthMiddleware, identity_of, private
from .exceptions import Refused
from .model import Identity
from .starlette import refuse, require

__all__ = ["PapaoursAuth", "PapaoursAuthMiddleware"]

_WORDS: Final = "A Papaours API key, `pk_prod_…`. It is secret in spite of its `pk_`."


# For the OpenAPI document alone: `Guard` reads the headers, so that all integrations answer alike.
class _Bearer(HTTPBearer):
    async def __call__(self) -> None:  # type: ignore[override]  # FastAPI's own asks for a request, and WebSockets have none
        return None


class _Header(APIKeyHeader):
    async def __call__(self) -> None:  # type: ignore[override]  # likewise
        return None


_BEARER: Final = _Bearer(scheme_name="PapaoursBearer", description=_WORDS)
_HEADER: Final = _Header(name="X-API-KEY", scheme_name="PapaoursApiKey", description=_WORDS)


class PapaoursAuth(Guard):
    """The dependency. Options: see `papaours_auth.asgi.Guard`.

    With ``required=False`` it gives None to a request without a key, and should be annotated so.
    """

    async def __call__(
        self,
        connection: HTTPConnection,
        scopes: SecurityScopes,
        _bearer: Annotated[object, Security(_BEARER)] = None,
        _header: Annotated[object, Security(_HEADER)] = None,
    ) -> Identity | None:
        """Give who calls, if they have the rights named as scopes. Raises `Refused`."""
        scope = connection.scope
        # What the middleware found stands; but a path it left open may still need a key here.
        if scope.get("papaours") is None and ("papaours" not in scope or self.gate.required):
            scope["papaours"] = await self.identify(scope)
        if scope["papaours"] is None and not self.gate.required and not scopes.scopes:
            return None
        return require(connection, *scopes.scopes)

    def install(self, app: FastAPI) -> None:
        """Answer refusals by the one table, check at start, close at shutdown."""
        app.add_exception_handler(Refused, refuse)
        app.add_middleware(_Private)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:  # Any: Starlette's own types for app and state
            await self.start()
            try:
                async with inner(app) as state:
                    yield state
            finally:
                await self.aclose()

        app.router.lifespan_context = lifespan


class _Private:
    """Keeps shared caches from what a caller with a key was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        marked = private(send)

        def send_marked(message: Message) -> Awaitable[None]:
            return (marked if identity_of(scope) is not None else send)(message)

        await self.app(scope, receive, send_marked)
