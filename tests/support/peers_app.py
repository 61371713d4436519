"""Guards with different trusted proxies, by the first segment of the path, and the servers that have no command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import make_server

from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.authenticator import AsyncAuthenticator, Authenticator
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

PROXIES: dict[str, list[str]] = {
    "nobody": [],
    "tcp": ["127.0.0.0/8"],
    "mapped": ["::ffff:127.0.0.0/104"],
    "others": ["192.0.2.1"],
    "unix": ["unix"],
}


async def asgi_ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def wsgi_ok(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


def asgi() -> Any:
    authenticator = AsyncAuthenticator(os.environ["PAPAOURS_STORE"], environment="prod")
    guards = {
        name: ASGIMiddleware(asgi_ok, authenticator=authenticator, trusted_proxies=proxies)
        for name, proxies in PROXIES.items()
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await guards[scope["path"].split("/")[1]](scope, receive, send)

    return app


def wsgi() -> Callable[..., Iterable[bytes]]:
    authenticator = Authenticator(os.environ["PAPAOURS_STORE"], environment="prod")
    guards = {
        name: WSGIMiddleware(wsgi_ok, authenticator=authenticator, trusted_proxies=proxies)
        for name, proxies in PROXIES.items()
    }
    guards["dropping"] = WSGIMiddleware(
        wsgi_ok,
        authenticator=authenticator,
        trusted_proxies=["127.0.0.0/8", "unix"],
        proxy_drops_underscores=True,
    )

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        return guards[environ["PATH_INFO"].split("/")[1]](environ, start_response)

    return app


def starlette_bridge() -> Any:
    from starlette.middleware.wsgi import WSGIMiddleware as Bridge

    return Bridge(wsgi())


def a2wsgi_bridge() -> Any:
    from a2wsgi import WSGIMiddleware as Bridge

    return Bridge(wsgi())


def asgi_under_wsgi() -> Any:
    from a2wsgi import ASGIMiddleware as Bridge

    return Bridge(asgi())


def serve_gevent(address: str) -> None:
    from gevent import socket
    from gevent.pywsgi import WSGIServer

    listener: Any = ("127.0.0.1", int(address) if address.isdecimal() else 0)
    if not address.isdecimal():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
    WSGIServer(listener, wsgi()).serve_forever()


def main(server: str, address: str, kind: str = "wsgi") -> None:
    if server == "wsgiref":
        with make_server("127.0.0.1", int(address), asgi_under_wsgi() if kind == "asgi" else wsgi()) as made:
            made.serve_forever()
    if server == "gevent":
        serve_gevent(address)
    from werkzeug.serving import run_simple

    host, port = (address, 0) if address.startswith("unix:") else ("127.0.0.1", int(address))
    run_simple(host, port, wsgi())


if __name__ == "__main__":
    main(*sys.argv[1:])
