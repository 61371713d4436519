"""Whether traffic should come to this process, as HTTP: 200, or 503 with the reasons. For probes of a load balancer.

It asks nobody, and names no host, key or pepper. Looking starts the watcher where it does not run, so that a process
to which no traffic is let finds out by itself when its store is back.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from .exceptions import Overloaded
from .http import Answer
from .outage import Health, Unready

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

RETRY_AFTER: Final = 1  # seconds
_WORDS: Final[Mapping[Unready, str]] = {
    "not_checked": "The key store has not been found in order yet.",
    "store_unavailable": "The key store does not answer.",
    "peppers_contradict": "The peppers of this app are not those of its key store.",
    "no_recent_reading": "The key store could not be read for longer than max_staleness.",
}


class Watching(Protocol):
    """What is asked of an authenticator, sync or async."""

    def watch(self) -> None:
        """Start the watcher, unless it runs. Asks nobody in this thread."""

    def health(self) -> Health:
        """Tell how it is."""


class Guarding(Protocol):
    """A guard or a middleware, which has an authenticator."""

    @property
    def authenticator(self) -> Watching:
        """Its authenticator."""


def readiness_of(subject: Watching | Guarding, *, method: str = "GET") -> Answer:
    """Return the answer to a readiness probe, without a body to a HEAD request."""
    authenticator = cast("Watching", getattr(subject, "authenticator", subject))
    with suppress(Overloaded):  # no thread is to be had: then the health tells that nothing was read
        authenticator.watch()
    return _render(authenticator.health(), method)


def _render(health: Health, method: str) -> Answer:
    reasons = [{"code": reason, "detail": _WORDS[reason]} for reason in health.reasons]
    body = json.dumps({"ready": health.ready, "reasons": reasons}).encode("ascii")
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ]
    if not health.ready:
        headers.append(("Retry-After", str(RETRY_AFTER)))
    return Answer(200 if health.ready else 503, tuple(headers), b"" if method == "HEAD" else body)


def asgi_app(
    subject: Watching | Guarding,
) -> Callable[[MutableMapping[str, Any], object, Callable[[Any], Awaitable[None]]], Awaitable[None]]:
    """Return an ASGI app that answers every request with the readiness of an authenticator or of what has one."""

    async def ready(
        scope: MutableMapping[str, Any], receive: object, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        answer = readiness_of(subject, method=scope.get("method", "GET"))
        headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    return ready


def wsgi_app(subject: Watching | Guarding) -> WSGIApplication:
    """Return the same as a WSGI app. No thread is started before the first request: the server may fork."""

    def ready(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        answer = readiness_of(subject, method=environ["REQUEST_METHOD"])
        start_response(answer.status_line, list(answer.headers))
        return [answer.body]

    return ready
