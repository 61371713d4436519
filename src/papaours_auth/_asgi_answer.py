"""One answer on its way through a guard: whether it has begun, what caches are told of it, and what is recorded."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, TypeAlias, TypeVar

from ._asgi_guard import AnyScope, Guard, Message, Receive, Scope, Send, header, identity_of
from ._middleware import recordable
from .exceptions import Refused
from .http import render, status_of
from .model import Identity
from .usage import Call, Outcome, Recorder, begin_call

if sys.version_info < (3, 12):
    from asyncio.coroutines import _is_coroutine  # type: ignore[attr-defined]  # of 3.11, and never changed there

POLICY_VIOLATION: Final = 1008  # RFC 6455 section 7.4.1
_CLOSED_NORMALLY: Final = (1000, 1001, 1005)  # likewise: done, going away, and no code given
_SWITCHING: Final = 101
_ERROR: Final = HTTPStatus.INTERNAL_SERVER_ERROR.value
_FORBIDDEN: Final = HTTPStatus.FORBIDDEN.value
# Bound once: to name a member of an enum costs 100 ns.
_COMPLETED, _FAILED, _GONE = Outcome.COMPLETED, Outcome.FAILED, Outcome.GONE
_LAST: Final = ("http.response.pathsend", "http.response.zerocopysend", "websocket.http.response.body")
WAITING, _ACCEPTED, _BEGUN, _REPLACED = range(4)
"""States of an answer: nothing of it was sent; a WebSocket is open; no other can be given; ours took its place."""
ANSWER: Final = "papaours.answer"
"""Where in a scope the `Answer` of the innermost guard is that may record."""

_F = TypeVar("_F", bound=Callable[..., Awaitable[Any]])


def _marked(function: _F) -> _F:
    """Have frameworks take a function for the coroutine function that it stands for."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    function._is_coroutine = _is_coroutine  # type: ignore[attr-defined]  # noqa: SLF001 - what asyncio looks for
    return function


class Answer:
    """The answer to a caller whom the guard knows, where nothing is recorded. The app is given its `send`.

    Made without an ``__init__``, which costs 50 ns more (see `usage.event.begin_call`). Its `repr` shows nothing of
    the scope, whose headers hold the key.
    """

    __slots__ = ("incoming", "onward", "scope", "state")

    scope: Scope
    onward: Send
    incoming: Receive  # of a WebSocket
    state: int

    # No coroutine of ours: what `onward` gives is what the app awaits.
    @_marked
    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, and note what it tells."""
        kind = message["type"]
        if kind == "http.response.start":
            if message["status"] == _ERROR and (refused := self._handled()) is not None:
                return self._answer_instead(refused)
            self.state = _BEGUN
            return self.onward(_made_private(message))
        if kind != "http.response.body":
            self._note(kind, message)
        return self.onward(message)

    def listening(self, receive: Receive) -> Receive:
        """Return what the app of a WebSocket shall receive from."""
        self.incoming = receive
        return self._receive

    @property
    def is_open(self) -> bool:
        """Whether a refusal can still be answered, or was answered already in place of the app's own answer."""
        return self.state != _BEGUN

    async def refuse(self, refused: Refused) -> None:
        """Answer what was raised below the guard."""
        if self.state == _REPLACED:
            return
        note(self.scope, refused)
        if self.state == _ACCEPTED:
            await self.send(_close(refused))
        else:
            await respond(refused, self.scope, self.send)

    def end(self, error: BaseException | None = None) -> None:
        """Note that the app has ended, and by which error."""

    async def _receive(self) -> Message:
        message = await self.incoming()
        if message["type"] == "websocket.disconnect":
            if self.state == _ACCEPTED and message.get("code", 1005) in _CLOSED_NORMALLY:
                self._completed()
            self.state = _BEGUN
        return message

    def _handled(self) -> Refused | None:
        """Return the refusal that the app is about to answer by a 500, as frameworks do with any exception.

        It is certain where the framework sends from its ``except`` block; docs/integrations.md has the others.
        """
        handled = sys.exc_info()[1]
        return handled.copy() if isinstance(handled, Refused) and self.state == WAITING else None

    async def _answer_instead(self, refused: Refused) -> None:
        await self.refuse(refused)
        self.state, self.onward = _REPLACED, _swallow

    def _note(self, kind: str, message: Message) -> None:
        """Note what is sent more rarely."""
        if kind == "websocket.accept":
            self.state = _ACCEPTED
            self._began(_SWITCHING)
        elif kind == "websocket.close":
            if self.state == WAITING:
                self._began(_FORBIDDEN)  # what servers answer to it
            self.state = _BEGUN
            self._completed()
        elif kind == "websocket.http.response.start":
            self.state = _BEGUN
            self._began(message.get("status", 0))
        elif kind in _LAST and not message.get("more_body"):
            self._completed()

    def _began(self, status: int) -> None:
        """Note that the answer begins."""

    def _completed(self) -> None:
        """Note that nothing more of it comes."""


class RecordedAnswer(Answer):
    """The answer to a caller whom the guard knows, and whose call it records."""

    __slots__ = ("call", "guard", "outer", "recorder", "refused")

    guard: Guard
    recorder: Recorder
    call: Call
    outer: Outer  # of a guard further out
    refused: Refused | None  # what something below the guard refused with

    @_marked
    def send(self, message: Message) -> Awaitable[None]:
        """See `Answer`."""
        kind = message["type"]
        if kind == "http.response.start":
            if message["status"] == _ERROR and (refused := self._handled()) is not None:
                return self._answer_instead(refused)
            self.state = _BEGUN
            self._began(message["status"])
            return self.onward(_made_private(message))
        if kind != "http.response.body":
            self._note(kind, message)
        elif not message.get("more_body"):
            call = self.call
            if not call.outcome:  # `_completed`, had it not cost 50 ns
                self.recorder.done(call, _COMPLETED)
        return self.onward(message)

    def end(self, error: BaseException | None = None) -> None:
        """See `Answer`."""
        if not self.call.outcome:
            _end(self.recorder, self.call, self.scope, self.guard, error)

    def _began(self, status: int) -> None:
        call = self.call
        _describe(call, self.scope, self.guard)
        call.status = status
        if self.refused is not None and not call.reason and _tells(self.refused, status, self.scope):
            call.reason = self.refused.reason.value
        if self.recorder.spooled:
            self.recorder.sent(call)

    def _completed(self) -> None:
        """Record the call: its duration ends here, whatever the app still does in the background."""
        if not self.call.outcome:
            self.recorder.done(self.call, _COMPLETED)


class LateAnswer(Answer):
    """The answer to somebody whom the guard does not know when the app is called, perhaps not even when it ends."""

    __slots__ = ("call", "found", "guard", "looked", "outer", "recorder", "refused", "started")

    guard: Guard
    recorder: Recorder | None
    call: Call | None  # known when the answer begins, at the latest when it ends
    outer: Outer
    refused: Refused | None
    found: bool  # whether the app finds out who calls, and that is recorded
    looked: bool
    started: float

    @_marked
    def send(self, message: Message) -> Awaitable[None]:
        """See `Answer`."""
        kind = message["type"]
        if kind == "http.response.start":
            if message["status"] == _ERROR and (refused := self._handled()) is not None:
                return self._answer_instead(refused)
            self.state = _BEGUN
            self._began(message["status"])
            if self.found and identity_of(self.scope) is not None:
                message = _made_private(message)
            return self.onward(message)
        if kind != "http.response.body":
            self._note(kind, message)
        elif not message.get("more_body"):
            self._completed()
        return self.onward(message)

    def end(self, error: BaseException | None = None) -> None:
        """See `Answer`."""
        self._look(0)
        if self.call is not None and self.recorder is not None and not self.call.outcome:
            _end(self.recorder, self.call, self.scope, self.guard, error)

    def _began(self, status: int) -> None:
        self._look(status)
        if self.call is not None and self.recorder is not None:
            _describe(self.call, self.scope, self.guard)
            self.call.status = status
            if self.recorder.spooled:
                self.recorder.sent(self.call)

    def _completed(self) -> None:
        if self.call is not None and self.recorder is not None and not self.call.outcome:
            self.recorder.done(self.call, _COMPLETED)

    def _look(self, status: int) -> None:
        """Look whom the answer is for, now that it begins or that there will be none."""
        recorder = self.recorder
        if self.looked or recorder is None:
            return
        self.looked = True
        caller = identity_of(self.scope) if self.found else None
        if self.refused is not None and _tells(self.refused, status, self.scope):
            self.call = self.guard.refused(recorder, self.refused, self.scope)
        elif caller is not None:
            self.call = self.guard.accepted(caller, self.scope)
        else:
            return
        _leave_to_inner(self.outer, recorder)
        if self.call is not None:
            self.call.started = self.started


Outer: TypeAlias = RecordedAnswer | LateAnswer | None


def answer_to(
    recorder: Recorder, guard: Guard, scope: Scope, send: Send, identity: Identity, client: str | None
) -> Answer:
    """Begin the answer to a caller whom the guard let in, and whose call it records unless one further out does."""
    outer = scope.get(ANSWER)
    if outer is not None:
        if _is_recorded(outer, recorder):
            answer = Answer()
            answer.scope, answer.onward, answer.state = scope, send, WAITING
            return answer
        _leave_to_inner(outer, recorder)
    recorded = scope[ANSWER] = RecordedAnswer()
    recorded.scope, recorded.onward, recorded.state = scope, send, WAITING
    recorded.guard, recorded.recorder, recorded.outer, recorded.refused = guard, recorder, outer, None
    recorded.call = begin_call(identity, client, scope.get("method", "WEBSOCKET"))
    return recorded


def answer_to_somebody(guard: Guard, scope: Scope, send: Send, *, found: bool = False) -> LateAnswer:
    """Begin the answer to a request that needs no key here. Something below may still refuse it.

    ``found``: the app finds out who calls, as a FastAPI dependency does.
    """
    recorder, outer = guard.recorder, scope.get(ANSWER)
    if recorder is not None and _is_recorded(outer, recorder):
        recorder = None
    answer = scope[ANSWER] = LateAnswer()
    answer.scope, answer.onward, answer.state = scope, send, WAITING
    answer.guard, answer.recorder, answer.outer, answer.refused = guard, recorder, outer, None
    answer.call, answer.found, answer.looked, answer.started = None, found, False, time.monotonic()
    return answer


def _leave_to_inner(outer: Outer, recorder: Recorder) -> None:
    """Have the guards further out record nothing into the same recorder: one event a call."""
    while outer is not None:
        if isinstance(outer, LateAnswer) and outer.recorder is recorder:
            outer.recorder = None
        outer = outer.outer


def _is_recorded(answer: Outer, recorder: Recorder) -> bool:
    """Return whether a guard further out records this call into the same recorder."""
    while answer is not None:
        if answer.recorder is recorder and answer.call is not None:
            return True
        answer = answer.outer
    return False


def note(scope: AnyScope, refused: Refused) -> None:
    """Tell the guards around an app why it refuses, for what they record."""
    answer, noted = scope.get(ANSWER), refused.copy()
    while answer is not None:
        answer.refused = noted
        answer = answer.outer


async def respond(refused: Refused, scope: Scope, send: Send) -> None:
    """Answer a refused http or websocket scope; a websocket by close 1008 where the server can do no better."""
    kind, method = "http", scope.get("method")
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send(_close(refused))
            return
        kind = "websocket.http"
    language = (header(scope, b"accept-language") or b"").decode("latin-1")
    del scope  # its headers hold a key, and `send` is not ours
    answer = render(refused, accept_language=language)
    headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in answer.headers]
    await send({"type": f"{kind}.response.start", "status": answer.status, "headers": headers})
    body = b"" if method == "HEAD" else answer.body
    await send({"type": f"{kind}.response.body", "body": body})


def _close(refused: Refused) -> Message:
    return {"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refused.reason.value}


async def _swallow(message: Message) -> None:
    """Take what a framework still sends of an answer that was replaced."""


def _tells(refused: Refused, status: int, scope: Scope) -> bool:
    """Return whether an answer of this status is the one to a refusal: an app may go on after one."""
    if scope["type"] == "websocket":
        return status != _SWITCHING
    return status in (0, status_of(refused.reason))


def _describe(call: Call, scope: Scope, guard: Guard) -> None:
    key_format = guard.authenticator.format
    call.route = recordable(route_of(scope), key_format)
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            call.request_id = recordable(value.decode("latin-1"), key_format)
            return


def _end(recorder: Recorder, call: Call, scope: Scope, guard: Guard, error: BaseException | None) -> None:
    """Record a call whose answer is not whole."""
    if not call.status:
        _describe(call, scope, guard)
    if error is None or isinstance(error, asyncio.CancelledError):
        outcome = _GONE
    else:  # before the answer, an OSError is the app's own
        outcome = _GONE if call.status and isinstance(error, OSError) else _FAILED
    recorder.done(call, outcome)


def route_of(scope: Scope) -> str:
    """Return the route's template where the framework tells it (FastAPI, recent Starlette), else the path."""
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


_PRIVATE: Final = (b"cache-control", b"private")


def _made_private(message: Message) -> Message:
    """Keep shared caches from an answer where the app said nothing (they know Authorization, not X-API-KEY)."""
    given = message.get("headers", ())
    headers = [*given]  # any iterable is allowed, and some can be read once only
    for name, _ in headers:  # no all(): its generator costs 250 ns an answer
        if len(name) == 13 and name.lower() == b"cache-control":
            return message if type(given) is list else {**message, "headers": headers}
    headers.append(_PRIVATE)
    return {**message, "headers": headers}
