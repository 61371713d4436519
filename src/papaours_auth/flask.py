"""Flask: the WSGI middleware around an app, and what views ask of it.

    auth = PapaoursAuth(environment="prod", exempt=["/healthz"])
    auth.init_app(app)

    @app.get("/contrats")
    @auth.required("contrats:lecture")
    def contrats() -> ...

Every path is guarded but the exempt ones. With ``everywhere=False`` none is: then `required` alone asks for a key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar, Unpack, cast, overload

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException, default_exceptions

from . import wsgi
from ._middleware import REFUSAL, WSGIOptions, authorized, known, vouched
from ._wsgi_answer import ASKED, IDENTITY, REFUSED, STOOD_ASIDE, note
from .authenticator import Authenticator
from .exceptions import ConfigurationError, InvalidInput, Reason, Refused
from .http import render, status_of, words_of
from .model import UNSET, Identity, Unset, parse_right
from .readiness import readiness_of
from .stores import Store
from .usage import Recorder
from .wsgi import PapaoursAuthMiddleware, identity_of

__all__ = ["HTTPRefused", "PapaoursAuth", "identity", "readiness", "refuse", "require"]

_EXTENSION: Final = "papaours-auth"
_NEEDED: Final = ("WWW-Authenticate", "Retry-After", "Cache-Control")
"""Headers that HTTP, or safety, wants with a refusal, whoever words it."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


class HTTPRefused(Refused, HTTPException):
    """What `identity`, `require` and `required` raise: a `Refused` that any Flask app answers by itself.

    It is also the `werkzeug.exceptions` class of its status, so that an app's ``errorhandler(401)`` and
    ``errorhandler(403)`` get to answer. ``description`` is what the problem document says.
    """

    def __init__(self, refused: Refused, accept_language: str = "") -> None:
        super().__init__(
            refused.reason, known=refused.known, needs=refused.needs, retry_after=refused.retry_after
        )
        self.description = words_of(refused, accept_language=accept_language)
        self.response = None
        self._answer = render(refused, accept_language=accept_language)

    # Any: an environ and a scope, as Werkzeug has them.
    def get_body(self, environ: Any = None, scope: Any = None) -> str:
        """Return the problem document."""
        return self._answer.body.decode("utf-8")

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        """Return the headers of the problem document."""
        return list(self._answer.headers)

    def get_response(self, environ: Any = None, scope: Any = None) -> Response:
        """Return the whole answer."""
        return Response(self._answer.body, self._answer.status, list(self._answer.headers))


_BY_STATUS: Final = {
    status: cast(type[HTTPRefused], type("HTTPRefused", (HTTPRefused, default_exceptions[status]), {}))
    for status in {status_of(reason) for reason in Reason}
}


class PapaoursAuth:
    """The extension. Options: see `papaours_auth.wsgi.Guard`. One may serve several apps."""

    def __init__(
        self,
        app: Flask | None = None,
        *,
        environment: str | None = None,
        store: str | Store | None = None,
        authenticator: Authenticator | None = None,
        usage: Recorder | str | None = None,
        **options: Unpack[WSGIOptions],
    ) -> None:
        self._environment = environment
        self._store = store
        self._authenticator = authenticator
        self._usage = usage
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Guard an app. Raises `ConfigurationError`."""
        guard = PapaoursAuthMiddleware(
            app.wsgi_app,
            environment=self._environment,
            store=self._store,
            authenticator=self._authenticator,
            usage=self._usage,
            **self._options,
        )
        app.extensions.setdefault(_EXTENSION, {})[self] = guard
        app.wsgi_app = guard  # type: ignore[method-assign]  # Flask documents this way of wrapping an app
        app.register_error_handler(Refused, refuse)
        app.after_request(_complete)

    @overload
    def required(self, view: Callable[_P, _R], /) -> Callable[_P, _R]: ...

    @overload
    def required(
        self,
        right: str,
        /,
        *rights: str,
        organisation: str | Callable[[], str] | Unset = UNSET,
        organisation_from: str | None = None,
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]: ...

    def required(
        self,
        *asked: Any,  # a view, or rights
        organisation: str | Callable[[], str] | Unset = UNSET,
        organisation_from: str | None = None,
    ) -> Any:
        """Let only callers with all these rights reach a view; as ``@auth.required`` alone, any caller with a key.

        ``organisation`` names whose data the view is about, or is a function that finds it in the request;
        ``organisation_from`` names the view's argument that holds it. If there is none in the request, the view is
        not reached. Raises `InvalidInput` at once for a right that is none, and if none is named in parentheses.
        """
        named = organisation is not UNSET, organisation_from is not None
        if len(asked) == 1 and callable(asked[0]) and not any(named):
            return self._guarded(asked[0], None)
        if not asked or callable(asked[0]):
            raise InvalidInput("no right is named: name one, or write @auth.required without parentheses")
        wanted = tuple(parse_right(right) for right in asked)
        if organisation in (None, "") or all(named):
            raise InvalidInput(
                "organisation is a name or a function, and organisation_from stands in its place"
            )

        def check(caller: Identity) -> None:
            if organisation_from is not None:
                authorized(caller, wanted, (request.view_args or {}).get(organisation_from, ""))
            else:
                authorized(caller, wanted, organisation() if callable(organisation) else organisation)

        return lambda view: self._guarded(view, check)

    def _guarded(
        self, view: Callable[_P, Any], check: Callable[[Identity], object] | None
    ) -> Callable[_P, Any]:
        def ask() -> None:
            _asked(self._caller if check is None else lambda: check(self._caller()))

        if inspect.iscoroutinefunction(view):

            @wraps(view)
            async def waits(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                ask()
                return await view(*args, **kwargs)

            return waits

        @wraps(view)
        def calls(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            ask()
            return view(*args, **kwargs)

        return calls

    def _caller(self) -> Identity:
        guard = _guards().get(self)
        if guard is None:
            raise ConfigurationError("this app is not guarded by this PapaoursAuth: call its init_app(app)")
        return _caller(guard)


def _asked(ask: Callable[[], _R]) -> _R:
    """Return what it returns. A `Refused` that it raises is one that Flask answers by itself."""
    try:
        return ask()
    except Refused as error:
        refused = error.copy()  # the raised one has frames whose environ holds the key
    note(request.environ, refused)
    raise _as_http(refused)


def require(*rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights. See `papaours_auth.wsgi.require`. Raises `HTTPRefused`."""
    return _asked(lambda: authorized(_identity(), rights, organisation))


def identity() -> Identity:
    """Return who calls in this request. Raises `HTTPRefused` if it came without a valid key.

    In an app without an extension of ours, that is whom the guard around it found.
    """
    return _asked(_identity)


def _identity() -> Identity:
    guards = _guards()
    found = identity_of(request.environ)
    for guard in guards.values():
        if vouched(found, guard.authenticator) is not None:
            return _caller(guard)
    if not guards:
        return wsgi.identity(request.environ)
    return _caller(next(iter(guards.values())))


def refuse(refused: Refused) -> Any:  # Any: whatever a handler of the app's may return
    """Answer a `Refused`, as an error handler: ``app.register_error_handler(Refused, refuse)``.

    `init_app` registers it. The app's own handler of the status goes first.
    """
    if isinstance(refused, HTTPRefused):
        return refused.get_response()
    note(request.environ, refused)
    return current_app.handle_user_exception(_as_http(refused))


def _guards() -> dict[PapaoursAuth, PapaoursAuthMiddleware]:
    guards: dict[PapaoursAuth, PapaoursAuthMiddleware] = current_app.extensions.get(_EXTENSION, {})
    return guards


def _caller(guard: PapaoursAuthMiddleware) -> Identity:
    """Return whom this guard knows: found by it or by one of its authenticator, else judged now."""
    environ = request.environ
    environ[ASKED] = guard
    # An app mounted in another one may have a guard of its own.
    found = vouched(identity_of(environ), guard.authenticator)
    if found is None:
        if environ.get(REFUSAL) is not None and environ[STOOD_ASIDE] == guard.authenticator.id:
            return known(None, environ[REFUSAL])
        found = environ[IDENTITY] = guard.identify(environ)
    return known(found, None)


def _as_http(refused: Refused) -> HTTPRefused:
    language = request.headers.get("Accept-Language", "")
    return _BY_STATUS[status_of(refused.reason)](refused, language)


def _complete(response: Response) -> Response:
    """Add what HTTP wants with a refusal that the app's own handler has worded."""
    refused: Refused | None = request.environ.get(REFUSED)
    if refused is not None and response.status_code == status_of(refused.reason):
        for name, value in render(refused).headers:
            if name in _NEEDED:
                response.headers.setdefault(name, value)
    return response


def readiness(auth: PapaoursAuth) -> Callable[[], Response]:
    """Return a view that tells whether traffic should come here: 200, or 503 with the reasons.

    ``app.add_url_rule("/readyz", "readyz", readiness(auth))``, on a path that needs no key.
    """

    def ready() -> Response:
        answer = readiness_of(_guards()[auth], method=request.method)
        return Response(answer.body, answer.status, list(answer.headers))

    return ready
