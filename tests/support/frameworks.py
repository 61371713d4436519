"""The same small app in every ASGI framework we know of: open routes, and one for everything else.

``/healthz`` and ``/public/…`` are meant to be open, so a guard exempts them. Whatever they do not match is
answered by the guarded route, which says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from papaours_auth import Reason, Refused
from papaours_auth.asgi import answer_to_refused, require

OPEN, GUARDED = "open", "guarded"
EXEMPT = ["/healthz", "/public/*"]


def store_of_environment() -> str:
    """Return the store's URL, for a server's process."""
    return os.environ["PAPAOURS_STORE"]


def ask(scope: Any) -> str:
    """Do what the guarded route does: refuse where the path says so."""
    path = scope["path"]
    _, found, reason = path.partition("/raise/")
    if found:
        raise Refused(Reason(reason.strip("/")))
    if path.rstrip("/").endswith("/asks"):
        require(scope, "contrats:suppression")
    return GUARDED


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """An app without a framework, which routes by ``path`` as it is and has never heard of ``root_path``."""
    text = OPEN if scope["path"] == "/healthz" or scope["path"].startswith("/public/") else ask(scope)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def open_(request: Any) -> Any:
        return PlainTextResponse(OPEN)

    def guarded(request: Any) -> Any:
        return PlainTextResponse(ask(request.scope))

    return Starlette(
        routes=[Route("/healthz", open_), Route("/public/{rest:path}", open_), Route("/{rest:path}", guarded)]
    )


def fastapi() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse
    from starlette.requests import Request

    app = FastAPI(openapi_url=None)

    def open_() -> Any:
        return PlainTextResponse(OPEN)

    def guarded(request: Request) -> Any:
        return PlainTextResponse(ask(request.scope))

    guarded.__annotations__["request"] = Request  # the import is local, so its name cannot be looked up
    for path, endpoint in (("/healthz", open_), ("/public/{rest:path}", open_), ("/{rest:path}", guarded)):
        app.add_api_route(path, endpoint, response_class=PlainTextResponse)
    return app


def litestar() -> Any:
    import litestar as it

    @it.get(["/healthz", "/public/{rest:path}"], sync_to_thread=False, media_type="text/plain")
    def open_() -> str:
        return OPEN

    @it.get(["/", "/{rest:path}"], sync_to_thread=False, media_type="text/plain")
    def guarded(request: it.Request[Any, Any, Any]) -> str:
        return ask(request.scope)

    guarded.fn.__annotations__["request"] = it.Request
    return it.Litestar([open_, guarded], openapi_config=None, logging_config=None)


def quart() -> Any:
    from quart import Quart, request

    app = Quart("papaours-tests")
    app.url_map.merge_slashes = False

    @app.get("/healthz")
    @app.get("/public/<path:rest>")
    async def open_(rest: str = "") -> str:
        return OPEN

    @app.get("/")
    @app.get("/<path:rest>")
    async def guarded(rest: str = "") -> str:
        return ask(request.scope)

    return app


def quart_with_handler() -> Any:
    from quart import request

    app = quart()

    async def refuse(refused: Refused) -> Any:
        answer = answer_to_refused(request.scope, refused)
        return answer.body, answer.status, dict(answer.headers)

    app.register_error_handler(Refused, refuse)
    return app


def falcon() -> Any:
    import falcon.asgi

    class Open:
        async def on_get(self, request: Any, response: Any) -> None:
            response.text = OPEN

    async def guarded(req: Any, resp: Any, **_: str) -> None:
        resp.text = ask(req.scope)

    async def open_(req: Any, resp: Any, **_: str) -> None:
        resp.text = OPEN

    app = falcon.asgi.App()
    app.add_route("/healthz", Open())
    app.add_sink(guarded, "/")
    app.add_sink(open_, "/public/")
    return app


def falcon_with_handler() -> Any:
    app = falcon()

    async def pass_on(request: Any, response: Any, refused: Refused, params: Any) -> None:
        raise refused  # to the middleware

    app.add_error_handler(Refused, pass_on)
    return app


def django() -> Any:
    return _django([])


def django_with_handler() -> Any:
    return _django([f"{__name__}.AnswersRefused"])


class AnswersRefused:
    """Django's middleware for refusals, as docs/integrations.md has it."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_exception(self, request: Any, error: Exception) -> Any:
        from django.http import HttpResponse

        if not isinstance(error, Refused):
            return None
        answer = answer_to_refused(request.scope, error)
        return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))


def _django(middleware: list[str]) -> Any:
    import django as it
    from django.conf import settings
    from django.core.asgi import get_asgi_application

    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=__name__,
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="of tests alone, and long enough for what Django checks",
            LOGGING_CONFIG=None,
        )
        it.setup()
    settings.MIDDLEWARE = middleware
    return get_asgi_application()


def _django_open(request: Any, rest: str = "") -> Any:
    from django.http import HttpResponse

    return HttpResponse(OPEN)


def _django_guarded(request: Any, rest: str = "") -> Any:
    from django.http import HttpResponse

    return HttpResponse(ask(request.scope))


def __getattr__(name: str) -> Any:
    """Django asks this module for its URLs; they can be made once Django is set up."""
    if name != "urlpatterns":
        raise AttributeError(name)
    from django.urls import re_path

    return [
        re_path(r"^healthz\Z", _django_open),
        re_path(r"^public/(?P<rest>.*)\Z", _django_open),
        re_path(r"^(?P<rest>.*)\Z", _django_guarded),
    ]


def blacksheep() -> Any:
    import blacksheep as it

    app = it.Application()

    async def open_(request: it.Request) -> it.Response:
        return it.text(OPEN)

    async def guarded(request: it.Request) -> it.Response:
        return it.text(ask(request.scope))

    for function in (open_, guarded):
        function.__annotations__.update({"request": it.Request, "return": it.Response})
    app.router.add_get("/healthz", open_)
    app.router.add_get("/public/*", open_)
    app.router.add_get("/*", guarded)
    return app


def blacksheep_with_handler() -> Any:
    import blacksheep as it

    app = blacksheep()

    async def refuse(self: Any, request: it.Request, refused: Refused) -> it.Response:
        answer = answer_to_refused(request.scope, refused)
        headers = [(name.encode(), value.encode()) for name, value in answer.headers]
        of_content = {b"Content-Type", b"Content-Length"}  # which it sets itself
        headers = [pair for pair in headers if pair[0] not in of_content]
        return it.Response(answer.status, headers, it.Content(b"application/problem+json", answer.body))

    app.exceptions_handlers[Refused] = refuse
    return app


def sanic() -> Any:
    import sanic as it
    from sanic.response import text

    app = it.Sanic(f"papaours-tests-{os.urandom(4).hex()}", configure_logging=False)

    async def open_(request: Any, rest: str = "") -> Any:
        return text(OPEN)

    async def guarded(request: Any, rest: str = "") -> Any:
        return text(ask({**request.scope, "path": request.path}))

    app.add_route(open_, "/healthz", name="healthz")
    app.add_route(open_, "/public/<rest:path>", name="public")
    app.add_route(guarded, "/", name="root")
    app.add_route(guarded, "/<rest:path>", name="rest")
    return app


APPS: dict[str, Callable[[], Any]] = {
    "bare": lambda: bare,
    "starlette": starlette,
    "fastapi": fastapi,
    "litestar": litestar,
    "quart": quart,
    "falcon": falcon,
    "django": django,
    "blacksheep": blacksheep,
    "sanic": sanic,
}
