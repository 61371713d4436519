"""What the servers serve: each app with and without the middleware, by PAPAOURS_STORE being set or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import Depends, FastAPI

from papaours_auth.asgi import App, PapaoursAuthMiddleware, Receive, Scope, Send
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

GUARDED = "PAPAOURS_STORE" in os.environ
api = FastAPI()


def page() -> dict[str, int]:
    return {"limit": 20, "offset": 0}


@api.get("/")
async def contracts(asked: Annotated[dict[str, int], Depends(page)]) -> dict[str, Any]:
    return {"contracts": [{"id": n, "apprentice": "Ada", "school": "cfa-lyon"} for n in range(3)], **asked}


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def wsgi(environ: Any, start_response: Any) -> Iterable[bytes]:
    body = json.dumps({"contracts": [{"id": n, "apprentice": "Ada"} for n in range(3)]}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def guarded(app: App) -> App:
    return PapaoursAuthMiddleware(app, environment="prod") if GUARDED else app


fastapi_app: App = guarded(api)
bare_app: App = guarded(bare)
wsgi_app: Any = WSGIMiddleware(wsgi, environment="prod") if GUARDED else wsgi
