"""One answer of a WSGI app on its way through a guard: what of it is sent, and what is recorded.

What an app returns is handed on as it is wherever servers look at what it is: a list (they ask for its length), and
what ``wsgi.file_wrapper`` made (they send such a file themselves). Only other iterables are wrapped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from ._middleware import recordable, vouched
from ._wsgi_body import File, close, wrapped
from .exceptions import Refused
from .http import Answer as HTTPAnswer
from .http import render, status_of
from .model import Identity
from .usage import Call, Outcome, Recorder, begin_call

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from .wsgi import PapaoursAuthMiddleware

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

IDENTITY: Final = "papaours.identity"
STOOD_ASIDE: Final = "papaours.stood_aside"
"""Where in an environ a guard that refuses nobody leaves the id of its authenticator, beside its refusal."""
ASKED: Final = "papaours.asked"
"""Where in an environ an integration leaves the guard that a route of its asked who calls, for what is recorded."""
REFUSED: Final = "papaours.refused"
"""Where in an environ it is noted that a `Refused` was answered below a guard, for what the guard records."""
_RECORDERS: Final = "papaours.recorders"
"""Where in an environ the recorders are listed that have this call, with it: each has it once, whatever is nested."""
_FILE_WRAPPER: Final = "wsgi.file_wrapper"
# Bound once: to name a member of an enum costs 100 ns.
_COMPLETED, _FAILED, _GONE = Outcome.COMPLETED, Outcome.FAILED, Outcome.GONE
_monotonic: Final = time.monotonic
_ERROR: Final = str(HTTPStatus.INTERNAL_SERVER_ERROR.value)


class Answer:
    """The answer to one request. ``identity``: whom the guard found, None for an anonymous or a refused caller."""

    # Of the class until they change.
    _headers: list[tuple[str, str]] = []  # noqa: RUF012 - replaced, never written to
    _said = ""  # the status, as the app said it last before anything was sent
    _sent = False
    _call: Call | None = None
    _recorder: Recorder | None = None
    _instead: list[bytes] | None = None  # the body of a refusal that took the place of the app's answer
    _handed = False  # whether the server has a body that begins with the app's own piece
    _file: object = None  # what `wsgi.file_wrapper` made, where it is a function

    def __init__(
        self,
        guard: PapaoursAuthMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        identity: Identity | None,
    ) -> None:
        self._guard, self._environ, self._start_response = guard, environ, start_response
        self._identity = identity
        if guard.recorder is not None:
            self._record(guard.recorder)

    def _record(self, recorder: Recorder) -> None:
        environ = self._environ
        wrapper = environ.get(_FILE_WRAPPER)
        if wrapper is not None and not isinstance(wrapper, type):
            environ[_FILE_WRAPPER] = partial(self._wrap_file, wrapper)
        recorders = environ.setdefault(_RECORDERS, [])
        if recorders:
            # Of guards further out; or of a request that has ended, of whose environ this one is a copy.
            environ.pop(REFUSED, None)
            recorders[:] = [(kept, call) for kept, call in recorders if call is not None and not call.outcome]
            if _has(recorders, recorder):
                return  # a guard further out records this call there
        self._recorder = recorder
        if self._identity is None:
            self._began = _monotonic()
        else:
            self._call = begin_call(
                self._identity, self._guard.client_of(environ), environ.get("REQUEST_METHOD", "")
            )
            recorders.append((recorder, self._call))

    def run(self, app: WSGIApplication) -> Iterable[bytes]:
        """Call the app, and return what the server is to send."""
        try:
            body = app(self._environ, self.start)
        except BaseException as error:
            answered = self._caught(error)
            if answered is None:
                raise
            return answered
        if self._instead is not None:
            close(body)
            return self._instead
        if isinstance(body, (list, tuple)):
            if self._call is not None:
                if body and isinstance(body[0], str):
                    self.end(_FAILED)  # no server takes text
                else:
                    self.complete()
            return body
        return self._handed_on(body)

    def refuse(self, refused: Refused) -> Iterable[bytes]:
        """Answer a request that the guard itself refuses."""
        answer = answer_to_refused(self._environ, refused)
        self.start(answer.status_line, list(answer.headers))
        self.complete()
        return self._body_of(answer)

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Be the `start_response` of the app."""
        if status[:3] == _ERROR and self._answered_instead(exc_info):
            return _swallow
        if self._identity is not None or self._found_late(status):
            headers = _private(headers)
        if exc_info is None:
            self._write = self._start_response(status, headers)
        else:
            # This raises if the status has been sent.
            self._write = self._start_response(status, headers, exc_info)
        if not self._sent:
            self._said, self._headers = status, headers
            if self._call is not None:  # now: Flask forgets its request before the app returns
                self._call.route = self._route()
        write: object = self._write
        return self._write if write is None else self._written  # granian has none

    @property
    def recorded(self) -> bool:
        """Whether the call is recorded, and has not ended."""
        return self._call is not None

    def sending(self) -> None:
        """Note that the server is about to send the status: from now on it cannot change."""
        if self._sent:
            return
        self._sent = True
        if self._call is not None and self._recorder is not None:
            self._describe(self._call, self._said)
            self._recorder.sent(self._call)

    def end(self, outcome: Outcome) -> None:
        """Note how the call ended, unless that is known already."""
        call, self._call = self._call, None
        if call is not None and self._recorder is not None:
            if not self._sent:
                self._describe(call, "")
            self._recorder.done(call, outcome)

    def failed(self, error: BaseException) -> None:
        """Note that the app raised. An error of a connection, once the answer has begun, is the client's end."""
        if not self._said and self._identity is None:
            self._found_late("")
        self.end(_GONE if self._sent and isinstance(error, OSError) else _FAILED)

    def _written(self, data: bytes) -> object:
        """Be the `write` of the app (PEP 3333 has it for old apps)."""
        if data:
            self.sending()
        return self._write(data)

    def _caught(self, error: BaseException) -> Iterable[bytes] | None:
        """Answer a `Refused` from below while nothing is sent; None for any other error, which goes on."""
        if self._sent or not isinstance(error, Refused):
            self.failed(error)
            return None
        return self._refuse_late(error)

    def _answered_instead(self, exc_info: ExcInfo | None) -> bool:
        """Answer a `Refused` that the app is about to answer by a 500, as Bottle does with any exception."""
        error = exc_info[1] if exc_info else sys.exc_info()[1]
        if self._sent or self._handed or self._instead is not None or not isinstance(error, Refused):
            return self._instead is not None
        self._instead = self._refuse_late(error)
        return True

    def _refuse_late(self, refused: Refused) -> list[bytes]:
        answer = answer_to_refused(self._environ, refused)
        said = (Refused, refused, refused.__traceback__) if self._said and refused.__traceback__ else None
        try:
            self.start(answer.status_line, list(answer.headers), said)
        except SystemError:  # uWSGI has taken the new status, and raises all the same
            self._said = answer.status_line
        except BaseException:  # the server has sent something after all
            self.end(_FAILED)
            raise
        finally:
            del said  # no cycle of an error and its frame
        self.complete()
        return self._body_of(answer)

    def _body_of(self, answer: HTTPAnswer) -> list[bytes]:
        return [] if self._environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]

    def complete(self) -> None:
        """Note that the server has the whole answer."""
        call, self._call = self._call, None
        if call is not None and self._recorder is not None:
            if not self._sent:
                self._describe(call, self._said)
            self._recorder.done(call, _COMPLETED if self._said else _FAILED)

    def _handed_on(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Return a body that is no list: a file, another iterable, or what only the server can complain of."""
        wrapper = self._environ.get(_FILE_WRAPPER)
        if isinstance(wrapper, type) and isinstance(body, wrapper):
            return self._closing_noted(body)
        if isinstance(body, str):
            self.end(_FAILED)
            return body
        if isinstance(body, bytes):  # PEP 3333 forbids it, and uWSGI takes it
            self.complete()
            return body
        if self._recorder is None:
            if hasattr(body, "read"):  # uWSGI knows a file that it is to send by its identity
                return body
        elif body is self._file and body is not None:
            self.sending()
            return body
        return self._begun(body)

    def _begun(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Take the first step of a body, and return the whole.

        Here, and not when the server asks for it: a generator that is an app begins its answer in that step, and any
        app may refuse in it. Granian's answer has begun when the app returns; others wait for this step anyway.
        """
        try:
            pieces = iter(body)
        except TypeError:  # the server says so
            self.end(_FAILED)
            return body
        try:
            first = next(pieces)
        except StopIteration:
            if self._instead is None:
                self.complete()
                return body if pieces is body else wrapped(self, body, pieces)
            first = b""
        except BaseException as error:
            answered = self._caught(error)
            close(body)
            if answered is None:
                raise
            return answered
        if self._instead is not None:
            close(body)
            return self._instead
        self._handed = True
        if isinstance(first, str):
            self.end(_FAILED)
        elif self._call is not None and self._is_all(first):
            self.complete()
        return wrapped(self, body, chain((first,), pieces))

    def _is_all(self, first: bytes) -> bool:
        """Whether the first piece is as long as the whole: then it is with a body as with a list, read or not."""
        for name, value in self._headers:  # no any(): its generator costs 500 ns an answer
            if name.lower() == "content-length":
                return value == str(len(first))
        return False

    def _closing_noted(self, body: Any) -> Iterable[bytes]:  # Any: a server's own type
        """Return what the server's own file wrapper made, which the server knows by its type and closes."""
        self.sending()
        if self._call is not None:
            try:
                body.close = partial(self._closed, getattr(body, "close", None))
            except AttributeError:  # a type made in C
                self.complete()
        return body  # type: ignore[no-any-return]  # as above

    def _wrap_file(self, wrapper: Callable[..., object], file: Any, block_size: int = 8192) -> object:
        """Be the ``wsgi.file_wrapper`` of a server whose own one is a function (uWSGI)."""
        self._file = wrapper(File(file, partial(self._closed, getattr(file, "close", None))), block_size)
        return self._file

    def _closed(self, close: Callable[[], object] | None) -> None:
        # Only an error under way tells that a server, which sends the file itself, has not sent all of it.
        outcome = _COMPLETED if sys.exc_info()[0] is None else _GONE
        try:
            if close is not None:
                close()
        finally:
            self.end(outcome)

    def _found_late(self, status: str) -> bool:
        """Record what was found only after the guard had let the request pass, or while it refused it.

        Return whether that is a caller.
        """
        environ, recorder = self._environ, self._recorder
        refused = _told(environ, status)
        if refused is None:
            if environ.get(ASKED) is not self._guard:
                return False
            caller = self._identity = vouched(environ[IDENTITY], self._guard.authenticator)
        else:
            caller = refused.known
        found = self._identity is not None
        if recorder is None or self._call is not None or _has(environ[_RECORDERS], recorder):
            return found
        if caller is not None:
            client, reason = self._guard.client_of(environ), refused.reason.value if refused else ""
            self._call = begin_call(caller, client, environ.get("REQUEST_METHOD", ""), reason)
            self._call.started = self._began
        elif refused is not None:
            recorder.refused(refused.reason, self._guard.client_of(environ))
        else:
            return found
        environ[_RECORDERS].append((recorder, self._call))
        return found

    def _describe(self, call: Call, status: str) -> None:
        environ = self._environ
        try:
            call.status = int(status[:3])
        except (TypeError, ValueError):  # none, or what the server will complain of
            call.status = 0
        call.route = call.route or self._route()
        refused = _told(environ, status)
        if refused is not None and not call.reason:
            call.reason = refused.reason.value
        call.request_id = recordable(environ.get("HTTP_X_REQUEST_ID", ""), self._guard.authenticator.format)

    def _route(self) -> str:
        return recordable(route_of(self._environ), self._guard.authenticator.format)


def _has(recorders: list[tuple[Recorder, Call | None]], recorder: Recorder) -> bool:
    return any(kept is recorder for kept, _ in recorders)


def note(environ: WSGIEnvironment, refused: Refused) -> None:
    """Tell the guards around an app why it refuses, for what they record."""
    environ[REFUSED] = refused.copy()  # a raised one has frames that hold this environ


def _told(environ: WSGIEnvironment, status: str) -> Refused | None:
    """Return the refusal that an answer of this status is the answer to: an app may go on after one."""
    refused: Refused | None = environ.get(REFUSED)
    return refused if refused is None or status[:3] in ("", str(status_of(refused.reason))) else None


def answer_to_refused(environ: WSGIEnvironment, refused: Refused) -> HTTPAnswer:
    """Return status, headers and body of a refusal, for an error handler of a framework; the guard records why."""
    note(environ, refused)
    return render(refused, accept_language=environ.get("HTTP_ACCEPT_LANGUAGE", ""))


def respond(refused: Refused, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer a refused request."""
    answer = answer_to_refused(environ, refused)
    start_response(answer.status_line, list(answer.headers))
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]


def _swallow(data: bytes) -> None:
    """Take what an app still writes of an answer that was replaced."""


def route_of(environ: WSGIEnvironment) -> str:
    """Return the route's template where the framework tells it (Flask), else the path."""
    rule = getattr(getattr(environ.get("werkzeug.request"), "url_rule", None), "rule", None)
    return rule if isinstance(rule, str) else path_of(environ)


def path_of(environ: WSGIEnvironment) -> str:
    """Return the path that the app is asked for, decoded."""
    path: str = environ.get("PATH_INFO", "")
    return path.encode("latin-1", "replace").decode("utf-8", "replace")  # PEP 3333: bytes dressed as latin-1


def _private(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep shared caches from an answer where the app said nothing (they know Authorization, not X-API-KEY)."""
    if type(headers) is not list:  # whatever a server takes: an iterator is read once
        headers = list(headers)
    for name, _ in headers:  # no all(): its generator costs 250 ns an answer
        if name.lower() == "cache-control":
            return headers
    return [*headers, ("Cache-Control", "private")]
