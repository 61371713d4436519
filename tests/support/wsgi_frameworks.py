"""The same small app in every WSGI framework we know of: open routes, and one for everything else.

``/healthz`` and ``/public/…`` are meant to be open, so a guard exempts them. Whatever they do not match is
answered by the guarded route, which says so.
"""

# Frameworks are imported where they are used: each takes a while, and a test wants one.
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from papaours_auth import Reason, Refused
from papaours_auth.wsgi import PapaoursAuthMiddleware, answer_to_refused, require

OPEN, GUARDED = "open", "guarded"
EXEMPT = ["/healthz", "/public/*"]


def ask(environ: Any, path: str) -> str:
    """Do what the guarded route does: refuse where the path says so."""
    _, found, reason = path.partition("/raise/")
    if found:
        raise Refused(Reason(reason.strip("/")))
    if path.rstrip("/").endswith("/asks"):
        require(environ, "contrats:suppression")
    return GUARDED


def bare(environ: Any, start_response: Any) -> list[bytes]:
    """An app without a framework, which routes by ``PATH_INFO`` as it is."""
    path = environ["PATH_INFO"]
    text = OPEN if path == "/healthz" or path.startswith("/public/") else ask(environ, path)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [text.encode()]


def generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    """An app that is a generator: nothing of it runs before its answer is asked for."""
    yield from bare(environ, start_response)


def late(environ: Any, start_response: Any) -> Iterator[bytes]:
    """An app that has said 200 before it asks."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (ask(environ, environ["PATH_INFO"]).encode() for _ in range(1))


def flask() -> Any:
    """Without our extension."""
    from flask import Flask, request

    from papaours_auth import flask as ours

    app = Flask("papaours-tests")
    app.url_map.merge_slashes = False

    @app.get("/healthz")
    @app.get("/public/<path:rest>")
    def open_(rest: str = "") -> str:
        return OPEN

    @app.get("/")
    @app.get("/<path:rest>")
    def guarded(rest: str = "") -> str:
        if rest.rstrip("/").endswith("asks"):
            ours.require("contrats:suppression")
        return ask(request.environ, "/" + rest)

    return app


def flask_with_handler() -> Any:
    from papaours_auth.flask import refuse

    app = flask()
    app.register_error_handler(Refused, refuse)
    return app


def falcon() -> Any:
    import falcon as it

    def guarded(req: Any, resp: Any, **_: str) -> None:
        resp.text = ask(req.env, req.path)

    def open_(req: Any, resp: Any, **_: str) -> None:
        resp.text = OPEN

    app: Any = it.App()
    app.add_sink(guarded, "/")
    app.add_sink(open_, "/public/")
    app.add_sink(open_, "/healthz$")
    return app


def falcon_with_handler() -> Any:
    app = falcon()

    def pass_on(request: Any, response: Any, refused: Refused, params: Any) -> None:
        raise refused  # to the middleware

    app.add_error_handler(Refused, pass_on)
    return app


def bottle() -> Any:
    it: Any = import_module("bottle")
    app = it.Bottle()

    def open_(rest: str = "") -> str:
        return OPEN

    def guarded(rest: str = "") -> str:
        return ask(it.request.environ, it.request.path)

    app.get("/healthz", callback=open_)
    app.get("/public/<rest:path>", callback=open_)
    app.get("/", callback=guarded)
    app.get("/<rest:path>", callback=guarded)
    return app


def pyramid() -> Any:
    config_of: Any = import_module("pyramid.config").Configurator
    response: Any = import_module("pyramid.response").Response

    def open_(request: Any) -> Any:
        return response(OPEN)

    def guarded(request: Any) -> Any:
        return response(ask(request.environ, request.path_info))

    with config_of() as config:
        for name, pattern, view in (
            ("healthz", "/healthz", open_), ("public", "/public/*rest", open_), ("rest", "/*rest", guarded)
        ):  # fmt: skip
            config.add_route(name, pattern)
            config.add_view(view, route_name=name)
        return config.make_wsgi_app()


class AnswersRefused:
    """A middleware of Django's, as docs/integrations.md has it."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_exception(self, request: Any, error: Exception) -> Any:
        from django.http import HttpResponse

        if not isinstance(error, Refused):
            return None
        answer = answer_to_refused(request.META, error)
        return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))


def django_open(request: Any, rest: str = "") -> Any:
    from django.http import HttpResponse

    return HttpResponse(OPEN)


def django_guarded(request: Any, rest: str = "") -> Any:
    from django.http import HttpResponse

    return HttpResponse(ask(request.META, request.path_info))


def django() -> Any:
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIHandler
    from django.urls import re_path

    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="of the tests alone", LOGGING_CONFIG=None)
        import_module("django").setup(set_prefix=False)

    patterns = [
        re_path(r"^healthz$", django_open),
        re_path(r"^public/.*$", django_open),
        re_path(r"", django_guarded),
    ]
    settings.ROOT_URLCONF = type("Urls", (), {"urlpatterns": patterns})
    settings.MIDDLEWARE = [f"{__name__}.AnswersRefused"]
    return WSGIHandler()


APPS: dict[str, Callable[[], Any]] = {
    "bare": lambda: bare,
    "flask": flask_with_handler,
    "falcon": falcon_with_handler,
    "bottle": bottle,
    "pyramid": pyramid,
    "django": django,
}


def every() -> Any:
    """All of them, each behind a guard: the header ``X-Framework`` chooses one."""
    from papaours_auth import Authenticator
    from papaours_auth.flask import PapaoursAuth

    authenticator = Authenticator(os.environ["PAPAOURS_STORE"], environment="prod")
    guarded: dict[str, Any] = {
        name: PapaoursAuthMiddleware(made(), authenticator=authenticator, exempt=EXEMPT)
        for name, made in APPS.items()
    }
    guarded["flask extension"] = flask()
    PapaoursAuth(guarded["flask extension"], authenticator=authenticator, exempt=EXEMPT)

    def app(environ: Any, start_response: Any) -> Any:
        return guarded[environ.get("HTTP_X_FRAMEWORK", "bare")](environ, start_response)

    return app


if "WSGI_FRAMEWORKS" in os.environ:
    app = every()
