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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Unpack

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ._asgi_answer import answer_to_somebody, note
from ._asgi_guard import Guard
from ._middleware import REFUSAL, CallerOptions, known_only, vouched
from .authenticator import AsyncAuthenticator
from .exceptions import Refused
from .model import Identity
from .starlette import PapaoursAuthMiddleware, as_http, readiness, refuse, require
from .stores import AsyncStore
from .usage import Recorder

__all__ = ["PapaoursAuth", "PapaoursAuthMiddleware", "readiness"]

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
    """The dependency. Options: see `papaours_auth.asgi.Guard`; ``usage`` records where `install` was called.

    With ``required=False`` it gives None to a request without a key, and should be annotated so. Which paths need a
    key is told by where it stands, so ``exempt``, ``everywhere`` and ``preflight`` are the middleware's alone.
    """

    def __init__(
        self,
        *,
        environment: str | None = None,
        store: str | AsyncStore | None = None,
        authenticator: AsyncAuthenticator | None = None,
        usage: Recorder | str | None = None,
        **options: Unpack[CallerOptions],
    ) -> None:
        known_only(options, CallerOptions)
        super().__init__(
            environment=environment, store=store, authenticator=authenticator, usage=usage, **options
        )

    async def __call__(
        self,
        connection: HTTPConnection,
        scopes: SecurityScopes,
        _bearer: Annotated[object, Security(_BEARER)] = None,
        _header: Annotated[object, Security(_HEADER)] = None,
    ) -> Identity | None:
        """Return who calls, if they have the rights named as scopes. Raises `HTTPRefused`."""
        scope = connection.scope
        # A guard further out may have found who calls. Its word counts if it has this same authenticator.
        found = vouched(scope.get("papaours"), self.authenticator)
        if found is None:
            try:
                found = await self.identify(scope)
            except Refused as refused:
                note(scope, refused)
                raise as_http(refused, connection) from None
            scope[REFUSAL] = None  # not that of a guard further out
        scope["papaours"] = found
        if not scopes.scopes:
            return found
        return require(connection, *scopes.scopes)

    def install(self, app: FastAPI) -> None:
        """Answer refusals by the one table, record, check at start, close at shutdown."""
        app.add_exception_handler(Refused, refuse)
        app.add_middleware(_Answers, guard=self)
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


class _Answers:
    """Keeps shared caches from what a caller with a key was answered, and records it where the guard records."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self.app(scope, receive, send)
            return
        answer = answer_to_somebody(self._guard, scope, send, found=True)
        receive = receive if kind == "http" else answer.listening(receive)
        try:
            running = self.app(scope, receive, answer.send)
            del scope  # its headers hold the key
            await running
        except BaseException as error:
            answer.end(error)
            raise
        answer.end()
