"""Pure ASGI middleware for any ASGI 3 app: http and websocket are guarded, lifespan passes, anything else is refused.

The identity is ``scope["papaours"]``. A WebSocket is judged when it opens.
"""

from __future__ import annotations

from typing import Unpack

from ._asgi_answer import WAITING, Answer, answer_to, answer_to_somebody, note, respond
from ._asgi_guard import AnyScope, App, Guard, Message, Receive, Scope, Send, header, identity_of
from ._asgi_lifespan import run_lifespan
from ._asgi_paths import is_exempt, own_root_of
from ._middleware import REFUSAL, MiddlewareOptions, authorized, known
from .authenticator import AsyncAuthenticator
from .exceptions import Refused
from .http import Answer as HTTPAnswer
from .http import render
from .model import UNSET, Identity, Unset
from .readiness import asgi_app
from .stores import AsyncStore
from .usage import Recorder

__all__ = [
    "App",
    "Guard",
    "Message",
    "PapaoursAuthMiddleware",
    "Receive",
    "Scope",
    "Send",
    "answer_to_refused",
    "identity",
    "identity_of",
    "readiness",
    "require",
    "respond",
]

readiness = asgi_app


class PapaoursAuthMiddleware(Guard):
    """Lets requests with a valid key through to ``app`` and answers the others itself. Options: see `Guard`.

    A `Refused` that is raised below it is answered too, as long as the answer has not begun.
    """

    _strips = False  # whether the app takes `root_path` off its paths: any app may be behind this one

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
        self.app = self._inner = app
        self._own_root = own_root_of(app)
        super().__init__(
            environment=environment, store=store, authenticator=authenticator, usage=usage, **options
        )

    # In one frame: each call of a function costs every request 50 ns.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: C901
        """Guard one connection (ASGI 3)."""
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self._other(kind, scope, receive, send)
            return
        identity = refused = client = None
        if self._everything or not is_exempt(self.gate, scope, strips=self._strips, own_root=self._own_root):
            key = b""
            try:
                key, client = self._presented(scope)
                identity = self.authenticator.cached(key, client)
                if identity is None:
                    asked = self._ask(key, client)
                    key = b""  # no frame of ours holds it while the store is asked, or the app runs
                    identity = await asked
            except Refused as error:
                refused = error.copy()  # without the frames that held the key
            key = b""
        if identity is None:
            answer = await self._without_caller(refused, scope, send)
            if answer is None:
                return
        else:
            scope["papaours"] = identity
            if self.recorder is None:
                answer = Answer()  # `answer_to`, had it not cost 50 ns
                answer.scope, answer.onward, answer.state = scope, send, WAITING
            else:
                answer = answer_to(self.recorder, self, scope, send, identity, client)
        receive = receive if kind == "http" else answer.listening(receive)
        refused = None
        # Not a coroutine of ours: only the frame that is here anyway sees how the app ended.
        try:
            running = self._inner(scope, receive, answer.send)
            del scope  # its headers hold the key
            await running
        except Refused as error:
            if not answer.is_open:
                answer.end(error)
                raise
            refused = error.copy()
        except BaseException as error:
            answer.end(error)
            raise
        if refused is not None:
            await answer.refuse(refused)
        if self.recorder is not None:
            answer.end()

    async def _without_caller(self, refused: Refused | None, scope: Scope, send: Send) -> Answer | None:
        """Refuse the request, or return the answer to somebody whom this guard does not know."""
        if refused is not None:
            if self.gate.everywhere and self._passes(refused, scope):
                refused = None
            else:
                refused = await self._judged(refused, scope)
                if self.gate.everywhere:
                    await self._refuse(refused, scope, send)
                    return None
        scope["papaours"] = None
        scope[REFUSAL] = refused  # this guard's, not one's further out
        return answer_to_somebody(self, scope, send)

    async def _refuse(self, refused: Refused, scope: Scope, send: Send) -> None:
        answer = answer_to_somebody(self, scope, send)
        try:
            await answer.refuse(refused)
        finally:
            answer.end()

    async def _other(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        if kind != "lifespan":
            raise ValueError(
                f"papaours-auth guards http and websocket, and lets no connection of type {kind!r} in"
            )
        await run_lifespan(self, self.app, scope, receive, send)


def answer_to_refused(scope: AnyScope, refused: Refused) -> HTTPAnswer:
    """Return the whole HTTP answer to a `Refused`, and note its reason for what is recorded.

    For frameworks that turn exceptions into a 500 before the middleware sees them, and so need a handler.
    """
    note(scope, refused)
    language = (header(scope, b"accept-language") or b"").decode("latin-1")
    return render(refused, accept_language=language)


def identity(scope: AnyScope) -> Identity:
    """Return who calls. Raises `Refused` if it came without a valid key; the middleware answers it."""
    try:
        return known(identity_of(scope), scope.get(REFUSAL))
    except Refused as refused:
        note(scope, refused)
        raise


def require(scope: AnyScope, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights: on this organisation's data, or on any if none is named.

    Raises `Refused`, which the middleware answers, and `InvalidInput` for no right, a right that is none, or an
    organisation that is ``None`` or empty.
    """
    caller = identity(scope)
    try:
        return authorized(caller, rights, organisation)
    except Refused as refused:
        note(scope, refused)
        raise
