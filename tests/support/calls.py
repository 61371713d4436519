"""Raw ASGI and WSGI calls, and the small apps they reach."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable
from typing import Any

Headers = Iterable[tuple[str, str]]


def wsgi_ok(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"ok"]


def http_scope(path: str = "/contracts", headers: Headers = (), **more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("203.0.113.9", 4711),
        "server": ("127.0.0.1", 80),
        **more,
    }


def websocket_scope(headers: Headers = (), **more: Any) -> dict[str, Any]:
    scope = http_scope("/live", headers, type="websocket", scheme="ws", subprotocols=[], **more)
    del scope["method"]
    return scope


def run_asgi(app: Any, scope: dict[str, Any], incoming: Iterable[dict[str, Any]] = ()) -> list[Any]:
    """Call an app once, and give what it sent."""
    waiting = list(incoming)
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        await app(scope, receive, send)

    asyncio.run(run())
    return sent


def lifespan(app: Any) -> list[str]:
    """Start and stop an app, and give the types of what it sent."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    return [message["type"] for message in run_asgi(app, {"type": "lifespan", "asgi": {}}, messages)]


class Recorded:
    """An ASGI app that remembers its scopes and answers 200."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.scopes: list[Any] = []
        self.start = {"type": "http.response.start", "status": 200, "headers": list(headers)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["type"] == "http":
            await send(self.start)
            await send({"type": "http.response.body", "body": b"ok"})
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})


def environ_of(path: str = "/contracts", headers: Headers = (), **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "REMOTE_ADDR": "203.0.113.9",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "gunicorn/23.0.0",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers},
        **more,
    }


def run_wsgi(app: Any, environ: dict[str, Any]) -> tuple[str, dict[str, str], bytes]:
    """Call an app once, and give status line, headers and body. As strict as PEP 3333 about a second start."""
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        if started and exc_info is None:
            raise AssertionError("a second start_response must bring exc_info")
        started.append((status, headers))
        return bytes

    result = app(environ, start_response)
    try:
        body = b"".join(result)
    finally:
        close = getattr(result, "close", None)  # PEP 3333: as servers do
        if close is not None:
            close()
    status, headers = started[-1]
    return status, {name.lower(): value for name, value in headers}, body
