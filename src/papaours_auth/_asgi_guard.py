"""Who calls an ASGI app: what the middleware and FastAPI's dependency share. Nothing of the answer is here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, Final, TypeAlias, Unpack

from ._middleware import (
    MiddlewareOptions,
    needed,
    recorder_for,
    split_options,
    store_url,
)
from .authenticator import AsyncAuthenticator
from .exceptions import ConfigurationError, Reason, Refused, StoreUnavailable
from .http import Gate, credentials, join_headers
from .model import Identity
from .stores import AsyncStore
from .usage import Call, Recorder, begin_call

# Any: ASGI messages are dictionaries of whatever their type says (asgiref has no better type either).
Scope: TypeAlias = MutableMapping[str, Any]
AnyScope: TypeAlias = Mapping[str, Any]  # for what only reads: frameworks have types of their own
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("papaours_auth")
_NEEDS_ASYNCIO: Final = (
    "papaours-auth needs asyncio, and this server runs the app on another event loop (trio?): "
    "choose a worker that runs asyncio, such as hypercorn --worker-class asyncio"
)


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
        self._warned = False
        self.recorder = recorder_for(usage)

    async def start(self) -> None:
        """Check peppers and store before the first call, and start the recorder.

        Raises `ConfigurationError`, and leaves nothing running then; an outage is logged.
        """
        if not _on_asyncio():
            raise ConfigurationError(_NEEDS_ASYNCIO)
        try:
            await self.authenticator.start()
        except ConfigurationError:
            if self._owned:  # its watcher runs, whatever the store said
                await self.authenticator.aclose()
            raise
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
        """Return who calls; None where a request may pass without a key. Raises `Refused`."""
        try:
            key, client = self._presented(scope)
            asked = self._ask(key, client)
            key = b""  # no frame of ours holds it while the store is asked
            return await asked
        except Refused as error:
            if self._passes(error, scope):
                return None
            refused = error.copy()  # without the frames that held the key
        key = b""
        judged = await self._judged(refused, scope)
        try:
            raise judged
        finally:
            del judged, refused  # no cycle of an error and its frame

    def _ask(self, key: bytes, client: str | None) -> Coroutine[Any, Any, Identity]:
        """Return the coroutine that verifies a key. Raises `Refused` where it could not run."""
        if not _on_asyncio():
            if not self._warned:
                self._warned = True
                logger.error(_NEEDS_ASYNCIO)
            raise Refused(Reason.STORE_UNAVAILABLE)
        return self.authenticator.authenticate(key, client=client)

    async def _judged(self, refused: Refused, scope: Scope) -> Refused:
        if self.throttle is None:
            return refused
        return await self.throttle.ajudge(refused, self._client(scope))

    def _presented(self, scope: Scope) -> tuple[bytes, str | None]:
        """Return the key and the client's address, or raise `Refused`."""
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
        forwarded = None if "wsgi_environ" in scope else header(scope, b"x-forwarded-for")
        return self.gate.client(peer[0] if peer else "", forwarded)

    def _passes(self, refused: Refused, scope: Scope) -> bool:
        if refused.reason is not Reason.MISSING_KEY:
            return False
        return not self.gate.required or (
            self.gate.passes_preflight
            and scope.get("method") == "OPTIONS"
            and header(scope, b"origin") is not None
            and header(scope, b"access-control-request-method") is not None
        )

    # what is recorded

    def refused(self, recorder: Recorder, refused: Refused, scope: Scope) -> Call | None:
        """Return the call of a known key that is refused; count what nobody we know has sent."""
        client = self._client(scope)
        if refused.known is None:
            recorder.refused(refused.reason, client)
            return None
        return begin_call(refused.known, client, scope.get("method", "WEBSOCKET"), refused.reason.value)

    def accepted(self, identity: Identity, scope: Scope) -> Call:
        """Return the call of whom an integration let in."""
        return begin_call(identity, self._client(scope), scope.get("method", "WEBSOCKET"))


def header(scope: AnyScope, wanted: bytes) -> bytes | None:
    """Return a header's values joined as WSGI servers join them, or None."""
    return join_headers([value for name, value in scope["headers"] if name == wanted])


def identity_of(scope: AnyScope) -> Identity | None:
    """Return the identity a middleware found, or None on an anonymous request."""
    identity = scope.get("papaours")
    return identity if isinstance(identity, Identity) else None


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
