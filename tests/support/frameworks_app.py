"""Every framework behind a guard of its own, in one process: the header ``X-App`` says which is called."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from papaours_auth import AsyncAuthenticator
from papaours_auth.asgi import PapaoursAuthMiddleware
from papaours_auth.starlette import PapaoursAuthMiddleware as StarletteMiddleware
from support import frameworks

authenticator = AsyncAuthenticator(frameworks.store_of_environment(), environment="prod")


def guarded(name: str) -> Any:
    front = StarletteMiddleware if name in ("starlette", "fastapi") else PapaoursAuthMiddleware
    return front(frameworks.APPS[name](), authenticator=authenticator, exempt=frameworks.EXEMPT)


apps = {name: guarded(name) for name in frameworks.APPS if importlib.util.find_spec(name) or name == "bare"}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Call the app that is meant."""
    if scope["type"] == "lifespan":
        await _lifespans(scope, receive, send)
        return
    named = [value.decode() for name, value in scope["headers"] if name.lower() == b"x-app"]
    if not named:  # the test asks whether the server answers
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"".join(name.encode() + b" " for name in apps)})
        return
    await apps[named[0]](scope, receive, send)


async def _lifespans(scope: Any, receive: Any, send: Any) -> None:
    queues = []
    for one in apps.values():
        queue: asyncio.Queue[Any] = asyncio.Queue()
        started = asyncio.Event()

        async def told(message: Any, started: asyncio.Event = started) -> None:
            started.set()

        queue.put_nowait({"type": "lifespan.startup"})
        task = asyncio.create_task(one({**scope, "state": {}}, queue.get, told))
        await started.wait()
        queues.append((queue, task))
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    for queue, task in queues:
        queue.put_nowait({"type": "lifespan.shutdown"})
        await task
    await send({"type": "lifespan.shutdown.complete"})
