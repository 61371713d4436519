"""Flask: the WSGI middleware around an app, and what views ask of it.

    auth = PapaoursAuth(environment="prod", exempt=["/healthz"])
    auth.init_app(app)

    @app.get("/contrats")
    @auth.required("contrats:lecture")
    def contrats() -> ...

Every path is guarded but the exempt ones. With ``everywhere=False`` none is: then `required` alone asks for a key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, Unpack

from flask import Flask, Response, current_app, request

from ._middleware import REFUSAL, WSGIOptions, authorized, known, vouched
from .authenticator import Authenticator
from .exceptions import Refused
from .http import render
from .model import UNSET, Identity, Unset, parse_right
from .stores import Store
from .usage import Recorder
from .wsgi import REFUSED, PapaoursAuthMiddleware, identity_of

__all__ = ["PapaoursAuth", "identity", "require"]

_EXTENSION = "papaours-auth"
_P = ParamSpec("_P")
_R = TypeVar("_R")


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
        app.extensions[_EXTENSION] = guard
        app.wsgi_app = guard  # type: ignore[method-assign]  # Flask documents this way of wrapping an app
        app.register_error_handler(Refused, _refuse)
        app.after_request(_mark_private)

    def required(
        self, *rights: str, organisation: str | Unset = UNSET
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
        """Let only callers with all these rights reach a view. Raises `InvalidInput` at once for what is none."""
        wanted = tuple(parse_right(right) for right in rights)

        def decorate(view: Callable[_P, _R]) -> Callable[_P, _R]:
            @wraps(view)
            def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                caller = identity()
                if wanted:
                    authorized(caller, wanted, organisation)
                return view(*args, **kwargs)

            return guarded

        return decorate


def require(*rights: str, organisation: str | Unset = UNSET) -> Identity:
    """Return who calls if they have all these rights. See `papaours_auth.wsgi.require`."""
    return authorized(identity(), rights, organisation)


def identity() -> Identity:
    """Return who calls in this request. Raises `Refused` where it came without a valid key."""
    guard: PapaoursAuthMiddleware = current_app.extensions[_EXTENSION]
    environ = request.environ
    # An app mounted in another one may have a guard of its own.
    found = vouched(identity_of(environ), guard.authenticator)
    if found is None and environ.get(REFUSAL) is None:
        found = guard.identify(environ)
    environ["papaours.identity"] = found
    return known(found, environ.get(REFUSAL))


def _mark_private(response: Response) -> Response:
    """Keep shared caches from it: the middleware does not see whom `required` found on a path it left open."""
    if identity_of(request.environ) is not None:
        response.headers.setdefault("Cache-Control", "private")
    return response


def _refuse(refused: Refused) -> Response:
    request.environ[REFUSED] = refused  # for the middleware, which records why
    answer = render(refused, accept_language=request.headers.get("Accept-Language", ""))
    return Response(answer.body, answer.status, list(answer.headers))
