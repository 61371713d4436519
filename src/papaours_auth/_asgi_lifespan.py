"""ASGI lifespan around an app: the guard starts first and closes last, also where the app does no lifespan itself."""

from __future__ import annotations

from ._asgi_guard import App, Guard, Message, Receive, Scope, Send, logger
from .exceptions import ConfigurationError


async def run_lifespan(guard: Guard, app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Start the guard, let the app do its own lifespan, and answer the server what the app leaves unanswered.

    An app that raises, or returns, before it has answered ``lifespan.startup`` does no lifespan: so the specification
    has it. Servers then send it nothing more, and what was recorded in the last moments would be lost at the end.
    """
    try:
        await guard.start()
    except ConfigurationError as error:
        await receive()  # lifespan.startup
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        return
    life = _Life(guard, receive, send)
    try:
        try:
            await app(scope, life.receive, life.send)
        except Exception as error:
            if life.failed or "lifespan.shutdown" in life.heard:
                raise
            _log(error, life)
        if not life.failed:
            await life.finish()
    finally:
        await life.close()


class _Life:
    """One lifespan: what the app heard of it, and what it answered."""

    def __init__(self, guard: Guard, receive: Receive, send: Send) -> None:
        self._guard, self._receive, self._send = guard, receive, send
        self._open = True
        self.heard: set[str] = set()
        self.answered: set[str] = set()

    @property
    def failed(self) -> bool:
        """Whether the app said that it could not start."""
        return "lifespan.startup.failed" in self.answered

    async def receive(self) -> Message:
        """Receive, for the app."""
        message = await self._receive()
        self.heard.add(message["type"])
        return message

    async def send(self, message: Message) -> None:
        """Send, for the app."""
        kind = message["type"]
        if not kind.startswith("lifespan."):
            raise RuntimeError(f"{kind} was sent in a lifespan")  # an app that takes it for a request
        self.answered.add(kind)
        if kind != "lifespan.startup.complete":
            await self.close()
        await self._send(message)

    async def finish(self) -> None:
        """Do what the app left undone, up to the server's shutdown."""
        if "lifespan.startup.complete" not in self.answered:
            await self._hear("lifespan.startup")
            await self.send({"type": "lifespan.startup.complete"})
        if not self.answered & {"lifespan.shutdown.complete", "lifespan.shutdown.failed"}:
            await self._hear("lifespan.shutdown")
            await self.send({"type": "lifespan.shutdown.complete"})

    async def close(self) -> None:
        """Close the guard, once."""
        if self._open:
            self._open = False
            await self._guard.aclose()

    async def _hear(self, kind: str) -> None:
        while kind not in self.heard:
            await self.receive()


def _log(error: Exception, life: _Life) -> None:
    if "lifespan.startup" in life.heard:  # it may have been about to start something
        logger.warning("the app failed in its lifespan, and is served all the same", exc_info=error)
    else:
        logger.info("the app does no lifespan (%s): papaours-auth answers for it", type(error).__name__)
