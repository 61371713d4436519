"""What a middleware adds to a request, against what others do for the same: our cached hit, their one SHA-256.

An added time is the app's with the middleware less the app's alone, of neighbouring rounds. Calls are recorded into
memory; between rounds, outside the times, they are handed to a sink that drops them, as the flusher's thread does.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection

from papaours_auth import AsyncAuthenticator, Authenticator, open_async_store
from papaours_auth.asgi import App, Receive, Scope, Send
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.usage import CallableSink, Recorder
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

from .harness import Loop, Result, driven, installed, interleave, looped, quartiles
from .subjects import TRUST, new_peppers, one_key

GOAL: Final = 1.0
OTHER_HEADERS: Final = (0, 8, 30)


def run(scale: float = 1.0) -> Result:
    result = Result("middleware", "Time a middleware adds to a request, by number of other headers")
    peppers, store = new_peppers(), open_async_store("memory://")
    key = one_key(store.sync, peppers)[0]
    options: Any = {"environment": "prod", "peppers": peppers, "max_staleness": TRUST}
    asgi, wsgi = AsyncAuthenticator(store, **options), Authenticator(store.sync, **options)
    with wsgi, Recorder(CallableSink(lambda _: None), interval=3600.0) as recorder:
        wsgi.authenticate(key)
        for others in OTHER_HEADERS:
            _compare(result, "ASGI", "Starlette's", others, asgi_loops(asgi, key, others, recorder), scale)
        for others in OTHER_HEADERS:
            _compare(
                result, "WSGI", "hand-written guard's", others, wsgi_loops(wsgi, key, others, recorder), scale
            )
    asyncio.run(asgi.aclose())
    result.versions = {"starlette": installed("starlette")}
    return result


def _compare(result: Result, kind: str, peer: str, others: int, loops: dict[str, Loop], scale: float) -> None:
    found = interleave(loops, rounds=max(4, int(600 * scale)), count=200)
    theirs = added(found["theirs"], found["bare"])
    shares = {
        name: compared_added(added(found[name], found["bare"]), theirs) for name in VARIANTS if name in found
    }
    for name, compared in shares.items():
        judged = kind == "ASGI" and name == "recording"
        result.add(
            f"{kind}, {others} other headers{VARIANTS[name]}: added / {peer} added",
            **compared,
            goal=GOAL if judged else None,
            reason=_reason(shares) if judged else "",
        )
    for name, words in {**VARIANTS, "theirs": f", {peer}"}.items():
        if name in found:
            values = added(found[name], found["bare"])
            result.add(
                f"{kind}, {others}{words}: added", statistics.median(values), "ns", spread=quartiles(values)
            )


def _reason(shares: Mapping[str, Mapping[str, Any]]) -> str:
    bare, ours, recording = (shares[name]["value"] for name in ("without", "ours", "recording"))
    return (
        f"of the ratio, verification is {bare:.2f}, keeping shared caches off the answer {ours - bare:.2f}, and "
        f"recording the call {recording - ours:.2f}; the peer does the first of these alone"
    )


VARIANTS: Final = {"ours": "", "recording": ", recording usage", "without": ", bare verification"}


def compared_added(
    ours: Sequence[float], theirs: Sequence[float]
) -> dict[str, Any]:  # Any: fields of `Figure`
    """Give the ratio of the medians, since a difference can come near 0, with quartiles of the rounds' ratios."""
    each = [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]
    return {
        "value": statistics.median(ours) / statistics.median(theirs),
        "spread": quartiles(each) if each else None,
    }


def flushed(loop: Loop, recorder: Recorder) -> Loop:
    """Hand over what was recorded after each round, outside its time."""

    def timed(count: int) -> float:
        nanoseconds = loop(count)
        recorder.flush()
        return nanoseconds

    return timed


def added(above: Sequence[float], bare: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(above, bare, strict=True)]


# ASGI


async def asgi_app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"ok"})


class WithoutPrivate(ASGIMiddleware):
    """Ours, less what no other middleware here does: telling shared caches to keep off."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key, client = self._presented(scope)
        identity = self.authenticator.cached(key, client)
        scope["papaours"] = identity
        await self.app(scope, receive, send)


class Backend(AuthenticationBackend):
    """The least that a backend for API keys does: one SHA-256 and one look into a dictionary."""

    def __init__(self, key: str) -> None:
        self._users = {hashlib.sha256(key.encode()).digest(): (AuthCredentials(["read"]), SimpleUser("x"))}

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        return self._users.get(hashlib.sha256(conn.headers["x-api-key"].encode()).digest())


def asgi_loops(
    authenticator: AsyncAuthenticator, key: str, others: int, recorder: Recorder | None = None
) -> dict[str, Loop]:
    headers = [(f"x-header-{n}".encode(), b"some value") for n in range(others)]
    headers.append((b"x-api-key", key.encode()))
    asyncio.run(fill(authenticator, key))
    theirs: Any = AuthenticationMiddleware(asgi_app, backend=Backend(key))
    apps: dict[str, App] = {
        "bare": asgi_app,
        "ours": ASGIMiddleware(asgi_app, authenticator=authenticator),
        "without": WithoutPrivate(asgi_app, authenticator=authenticator),
        "theirs": theirs,
    }
    loops = {name: driven(_request(app, headers)) for name, app in apps.items()}
    if recorder is not None:
        recording = ASGIMiddleware(asgi_app, authenticator=authenticator, usage=recorder)
        loops["recording"] = flushed(driven(_request(recording, headers)), recorder)
    return loops


async def fill(authenticator: AsyncAuthenticator, key: str) -> None:
    await authenticator.authenticate(key)


def _request(app: App, headers: list[tuple[bytes, bytes]]) -> Callable[[], Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    def request() -> Any:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/contracts",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("203.0.113.9", 4711),
            "server": ("127.0.0.1", 80),
        }
        return app(scope, receive, send)

    return request


# WSGI


def wsgi_app(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


def hand_written(app: Any, key: str) -> Any:
    """Ten lines, as one writes them before one looks for a library."""
    users = {hashlib.sha256(key.encode()).hexdigest(): "x"}

    def guarded(environ: Any, start_response: Any) -> Iterable[bytes]:
        digest = hashlib.sha256(environ.get("HTTP_X_API_KEY", "").encode()).hexdigest()
        if digest not in users:
            start_response("401 Unauthorized", [("Content-Type", "text/plain")])
            return [b"unauthorized"]
        environ["user"] = users[digest]
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    return guarded


def wsgi_loops(authenticator: Authenticator, key: str, others: int, recorder: Recorder) -> dict[str, Loop]:
    environ = {f"HTTP_X_HEADER_{n}": "some value" for n in range(others)} | {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/contracts", "SCRIPT_NAME": "", "REMOTE_ADDR": "203.0.113.9",
        "HTTP_X_API_KEY": key,
    }  # fmt: skip

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        pass

    def request(app: Any) -> Loop:
        def answer() -> None:
            body = app(dict(environ), start_response)
            for _ in body:
                pass
            if hasattr(body, "close"):  # as PEP 3333 has servers do: a call is recorded there
                body.close()

        return looped(answer)

    recording = WSGIMiddleware(wsgi_app, authenticator=authenticator, usage=recorder)
    return {
        "bare": request(wsgi_app),
        "ours": request(WSGIMiddleware(wsgi_app, authenticator=authenticator)),
        "recording": flushed(request(recording), recorder),
        "theirs": request(hand_written(wsgi_app, key)),
    }
