"""Pure ASGI middleware for any ASGI 3 app: http and websocket are guarded, everything else passes through.

The identity is ``scope["papaours"]``; ``scope["user"]`` and ``scope["auth"]`` are it too, so that Starlette's
``request.user``, ``request.auth`` and ``@requires`` work. A WebSocket is judged when it opens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final, TypeAlias, Unpack

from ._middleware import (
    ANONYMOUS,
    REFUSAL,
    MiddlewareOptions,
    authorized,
    known,
    needed,
    recordable,
    recorder_for,
    split_options,
    store_url,
)
from .authenticator import AsyncAuthenticator
from .exceptions import ConfigurationError, Reason, Refused, StoreUnavailable
from .http import Gate, credentials, join_headers, render
from .model import UNSET, Identity, Unset
from .stores import AsyncStore
from .usage import Call, Outcome, Recorder, begin_call

# Any: ASGI messages are dictionaries of whatever their type says (asgiref has no better type either).
Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("papaours_auth")
POLICY_VIOLATION: Final = 1008  # RFC 6455 section 7.4.1
_SWITCHING: Final = 101
# Bound once: to name a member of an enum costs 100 ns.
_COMPLETED, _FAILED, _GONE = Outcome.COMPLETED, Outcome.FAILED, Outcome.GONE
_LAST: Final = ("http.response.pathsend", "http.response.zerocopysend", "websocket.http.response.body")
RECORDED: Final = "papaours.recorded"
"""Where in a scope a middleware says that it records this call."""
REFUSED: Final = "papaours.refused"
"""Where in a scope an integration puts the `Refused` that an endpoint raised, for what is recorded."""


class Guard:
    """Finds who calls an ASGI app: what the middleware and the integrations share.

    Give ``environment`` (and ``store``, else PAPAOURS_STORE names it) with any option of `Gate` and
    `Authenticator`, or a ready ``authenticator`` with options of `Gate` alone. With either, ``throttle`` may be a
    `Throttle` or its limit, ``"30/minute"``; there is none by default. Raises `ConfigurationError` at once.
    ``usage``: where calls are recorded, a `Recorder` or a URL such as ``sqlite:///usage.db``; nowhere by default.
    """

    def __init__(
        self,
        *,
        environment: str | None = None,
        store: str | AsyncStore | None = None,
        authenticator: AsyncAuthenticator | None = None,
        usage: Recorder | str | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        gate, rest, self.throttle = split_options(options)
        if authenticator is not None and (environment is not None or store is not None or rest):
            raise ConfigurationError("authenticator is ready: environment, store and its options go into it")
        self.gate = Gate(**gate)
        # Asked once: 100 ns less a request than two properties and a call.
        self._everything, self._direct = self.gate.everything, not self.gate.believes_proxies
        self.authenticator = authenticator or AsyncAuthenticator(
            store if store is not None else store_url(), environment=needed(environment), **rest
        )
        self._owned = authenticator is None
        self._token = f"{self.authenticator.format.token}_".encode("ascii")
        self.recorder = recorder_for(usage)

    async def start(self) -> None:
        """Check peppers and store before the first call, and start the recorder.

        Raises `ConfigurationError`; an outage is logged.
        """
        try:
            await self.authenticator.start()
        except StoreUnavailable as error:
            logger.warning("starting although the key store cannot answer, so calls meet 503: %s", error)
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.acquire)

    async def aclose(self) -> None:
        """Close the authenticator, unless it was given ready, and deliver what was recorded."""
        if self._owned:
            await self.authenticator.aclose()
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.release)

    async def identify(self, scope: Scope) -> Identity | None:
        """Give who calls; None where a request may pass without a key. Raises `Refused`."""
        try:
            key, client = self._presented(scope)
            return await self.authenticator.authenticate(key, client=client)
        except Refused as refused:
            if self._passes(refused, scope):
                return None
            judged = await self._judged(refused, scope)
            try:
                if judged is refused:
                    raise
                raise judged from refused
            finally:
                del judged  # no cycle of an error and its frame

    async def _judged(self, refused: Refused, scope: Scope) -> Refused:
        if self.throttle is None:
            return refused
        return await self.throttle.ajudge(refused, self._client(scope))

    def _presented(self, scope: Scope) -> tuple[bytes, str | None]:
        """Give the key and the client's address, or raise `Refused`."""
        authorization = x_api_key = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value if authorization is None else join_headers((authorization, value))
            elif name == b"x-api-key":
                x_api_key = value if x_api_key is None else join_headers((x_api_key, value))
        return credentials(authorization, x_api_key, token=self._token), self._client(scope)

    def _client(self, scope: Scope) -> str | None:
        peer = scope.get("client")
        if self._direct:
            return peer[0] or None if peer else None
        # An app that a bridge (a2wsgi) serves from WSGI: X_Forwarded_For has become X-Forwarded-For there.
        forwarded = None if "wsgi_environ" in scope else _header(scope, b"x-forwarded-for")
        return self.gate.client(peer[0] if peer else "", forwarded)

    def _passes(self, refused: Refused, scope: Scope) -> bool:
        if refused.reason is not Reason.MISSING_KEY:
            return False
        return not self.gate.required or (
            self.gate.passes_preflight
            and scope.get("method") == "OPTIONS"
            and _header(scope, b"origin") is not None
            and _header(scope, b"access-control-request-method") is not None
        )

    # what is recorded

    def refused(self, recorder: Recorder, refused: Refused, scope: Scope) -> Call | None:
        """Give the call of a known key that is refused; count what nobody we know has sent."""
        client = self._client(scope)
        if refused.known is None:
            recorder.refused(refused.reason, client)
            return None
        return begin_call(refused.known, client, scope.get("method", "WEBSOCKET"), refused.reason.value)

    def accepted(self, identity: Identity, scope: Scope) -> Call:
        """Give the call of whom an integration let in."""
        return begin_call(identity, self._client(scope), scope.get("method", "WEBSOCKET"))

    def recorded(self, send: Send, call: Call, scope: Scope, recorder: Recorder) -> Send:
        """Give a `send` that notes how the answer goes, and does what `private` does: one wrapper, not two."""

        def wrapped(message: Message) -> Awaitable[None]:
            kind = message["type"]
            if kind == "http.response.start":
                self._describe(call, scope)
                call.status = message["status"]
                if recorder.spooled:
                    recorder.sent(call)
                return send(_marked(message))
            if kind == "http.response.body":
                if not message.get("more_body"):
                    call.outcome = _COMPLETED
            else:
                self._note(recorder, call, scope, message)
            return send(message)

        return wrapped

    def _note(self, recorder: Recorder, call: Call, scope: Scope, message: Message) -> None:
        """Note what is sent more rarely."""
        kind = message["type"]
        status = message.get("status", 0) if kind == "websocket.http.response.start" else 0
        if kind == "websocket.accept":
            status = _SWITCHING
        elif kind == "websocket.close" and not call.status:
            status = HTTPStatus.FORBIDDEN.value  # what servers answer to it
        if status:
            self._describe(call, scope)
            call.status = status
            recorder.sent(call)
        if kind == "websocket.close" or (kind in _LAST and not message.get("more_body")):
            call.outcome = _COMPLETED

    def ended(self, recorder: Recorder, call: Call, scope: Scope, outcome: Outcome) -> None:
        """Note how a call ended."""
        if not call.status:
            self._describe(call, scope)
        recorder.done(call, outcome)

    def _describe(self, call: Call, scope: Scope) -> None:
        call.route = recordable(route_of(scope), self.authenticator.format)
        if not call.reason and REFUSED in scope:
            call.reason = scope[REFUSED].reason.value
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                call.request_id = recordable(value.decode("latin-1"), self.authenticator.format)
                return


class PapaoursAuthMiddleware(Guard):
    """Lets requests with a valid key through to ``app`` and answers the others itself. Options: see `Guard`."""

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
        self.app = app
        super().__init__(
            environment=environment, store=store, authenticator=authenticator, usage=usage, **options
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one connection (ASGI 3)."""
        if scope["type"] not in ("http", "websocket"):
            await (self._lifespan if scope["type"] == "lifespan" else self.app)(scope, receive, send)
            return
        if not self._everything and not self.gate.guards(_path(scope)):
            await self._pass_anonymous(scope, receive, send)
            return
        try:
            key, client = self._presented(scope)
            identity = self.authenticator.cached(key, client)
            if identity is None:
                identity = await self.authenticator.authenticate(key, client=client)
        except Refused as refused:
            if not self.gate.everywhere:
                await self._pass_anonymous(scope, receive, send, (await self._judged(refused, scope)).copy())
            elif self._passes(refused, scope):
                await self._pass_anonymous(scope, receive, send)
            else:
                await self._refuse(await self._judged(refused, scope), scope, send)
            return
        scope["papaours"] = scope["user"] = scope["auth"] = identity
        if self.recorder is None:
            await self.app(scope, receive, private(send))
            return
        scope[RECORDED] = True
        call = begin_call(identity, client, scope.get("method", "WEBSOCKET"))
        # Not a coroutine of ours: only the frame that is here anyway sees how the app ended.
        try:
            await self.app(scope, receive, self.recorded(send, call, scope, self.recorder))
        except BaseException as error:
            self.ended(self.recorder, call, scope, outcome_of(call, error))
            raise
        if not call.status:
            self._describe(call, scope)
        self.recorder.done(call, call.outcome or _GONE)  # `ended`, had it not cost 50 ns

    async def _refuse(self, refused: Refused, scope: Scope, send: Send) -> None:
        recorder = self.recorder
        if recorder is None:
            await respond(refused, scope, send)
            return
        call = self.refused(recorder, refused, scope)
        if call is None:
            await respond(refused, scope, send)
            return
        try:
            await respond(refused, scope, self.recorded(send, call, scope, recorder))
        finally:
            self.ended(recorder, call, scope, call.outcome or _GONE)

    async def _pass_anonymous(
        self, scope: Scope, receive: Receive, send: Send, refusal: Refused | None = None
    ) -> None:
        scope["papaours"] = None
        scope[REFUSAL] = refusal  # this guard's, not one's further out
        # A user that another middleware found stays. An identity of ours would be that of a guard further out.
        for name in ("user", "auth"):
            if isinstance(scope.setdefault(name, ANONYMOUS), Identity):
                scope[name] = ANONYMOUS
        await self.app(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.start()
        except ConfigurationError as error:
            await receive()  # lifespan.startup
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return

        async def close_at_end(message: Message) -> None:
            if message["type"] != "lifespan.startup.complete":
                await self.aclose()
            await send(message)

        await self.app(scope, receive, close_at_end)


async def respond(refused: Refused, scope: Scope, send: Send) -> None:
    """Answer a refused http or websocket scope; a websocket by close 1008 where the server can do no better."""
    kind = "http"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refused.reason.value})
            return
        kind = "websocket.http"
    language = (_header(scope, b"accept-language") or b"").decode("latin-1")
    answer = render(refused, accept_language=language)
    headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in answer.headers]
    await send({"type": f"{kind}.response.start", "status": answer.status, "headers": headers})
    body = b"" if scope.get("method") == "HEAD" else answer.body
    await send({"type": f"{kind}.response.body", "body": body})


def identity_of(scope: Scope) -> Identity | None:
    """Give the identity a middleware found, or None on an anonymous request."""
    identity = scope.get("papaours")
    return identity if isinstance(identity, Identity) else None


def identity(scope: Scope) -> Identity:
    """Return who calls. Raises `Refused` if it came without a valid key; the middleware answers it."""
    return known(identity_of(scope), scope.get(REFUSAL))


def require(scope: Scope, *rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights: on this organisation's data, or on any if none is named.

    Raises `Refused`, which the middleware answers, and `InvalidInput` for no right, a right that is none, or an
    organisation that is ``None`` or empty.
    """
    return authorized(identity(scope), rights, organisation)


def outcome_of(call: Call, error: BaseException | None) -> Outcome:
    """Tell how a call ended, by what the app raised and by whether the answer was whole."""
    if error is None:
        return call.outcome or _GONE
    if isinstance(error, asyncio.CancelledError):
        return _GONE
    return (
        _GONE if call.status and isinstance(error, OSError) else _FAILED
    )  # before the answer, it is the app's own


def route_of(scope: Scope) -> str:
    """Give the route's template where the framework tells it (FastAPI, recent Starlette), else the path."""
    route = scope.get("route")
    template = None if route is None else getattr(route, "path", None)
    if not isinstance(template, str):
        path: str = scope["path"]
        return path
    if "app_root_path" not in scope:
        return template
    # In a mounted app: routes know their path below the mount, and a mount's own files have no template.
    mount: str = scope.get("root_path", "")[len(scope["app_root_path"]) :]
    return mount + template if hasattr(route, "endpoint") else mount


def _path(scope: Scope) -> str:
    """Give the application's own path: ``root_path`` is part of ``path`` (ASGI 2.4) and is taken off."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    return join_headers([value for name, value in scope["headers"] if name == wanted])


def private(send: Send) -> Send:
    """Keep shared caches from an answer where the app said nothing (they know Authorization, not X-API-KEY)."""

    # No coroutine of ours: what `send` gives is what the app awaits.
    def wrapped(message: Message) -> Awaitable[None]:
        return send(_marked(message) if message["type"] == "http.response.start" else message)

    return wrapped


def _marked(message: Message) -> Message:
    headers = list(message.get("headers", ()))
    for name, _ in headers:  # no all(): its generator costs 250 ns an answer
        if len(name) == 13 and name.lower() == b"cache-control":
            return message
    headers.append((b"cache-control", b"private"))
    return {**message, "headers": headers}
