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
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ._middleware import REFUSAL, vouched
from .asgi import RECORDED, REFUSED, Guard, Message, PapaoursAuthMiddleware, identity_of, outcome_of, private
from .exceptions import Refused
from .model import Identity
from .starlette import refuse, require
from .usage import Call, Recorder

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
    """The dependency. Options: see `papaours_auth.asgi.Guard`; ``usage`` records where `install` was called.

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
        # A guard further out may have found who calls. Its word counts if it has this same authenticator.
        found = vouched(scope.get("papaours"), self.authenticator)
        if found is None:
            found = await self.identify(scope)
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
        recorder = self._guard.recorder
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif recorder is None or RECORDED in scope:
            await self.app(scope, receive, _marked(scope, send))
        else:
            answer = _Recording(self._guard, recorder, scope, send)
            try:
                await self.app(scope, receive, answer.send)
            except BaseException as error:
                answer.end(error)
                raise
            answer.end()


def _marked(scope: Scope, send: Send) -> Send:
    marked = private(send)

    def send_marked(message: Message) -> Awaitable[None]:
        return (marked if identity_of(scope) is not None else send)(message)

    return send_marked


class _Recording:
    """One answer. Whom the dependency found, or refused, is known when it begins."""

    def __init__(self, guard: Guard, recorder: Recorder, scope: Scope, send: Send) -> None:
        self._guard, self._recorder, self._scope = guard, recorder, scope
        self._send, self._onward = send, send
        self._started = time.monotonic()
        self._asked = False
        self._call: Call | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message, and note what it tells."""
        if not self._asked:
            self._ask()
        return self._onward(message)

    def end(self, error: BaseException | None = None) -> None:
        """Note the end."""
        if not self._asked:
            self._ask()
        if self._call is not None:
            self._guard.ended(self._recorder, self._call, self._scope, outcome_of(self._call, error))

    def _ask(self) -> None:
        self._asked = True
        refused, caller = self._scope.get(REFUSED), identity_of(self._scope)
        if isinstance(refused, Refused):
            self._call = self._guard.refused(self._recorder, refused, self._scope)
        elif caller is not None:
            self._call = self._guard.accepted(caller, self._scope)
        if self._call is not None:
            self._call.started = self._started
            self._onward = self._guard.recorded(self._send, self._call, self._scope, self._recorder)
