"""The app whose calls are counted, as servers load it: it answers with the status its path names, and records.

Its sink and its disk can be made to fail: by files in the folder COUNTED that say so, for all its processes at once.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.usage import Batch, Recorder
from papaours_auth.usage.sqlite import SQLiteSink
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware

FOLDER = Path(os.environ["COUNTED"])
LOSE_REPLIES, DISK_FULL, REPLY_LOST = FOLDER / "lose-replies", FOLDER / "disk-full", FOLDER / "reply-lost"
allocate = os.posix_fallocate


class Sink:
    """SQLite, whose first reply to each batch is lost after the commit while there is a file that says so."""

    def __init__(self) -> None:
        self._inner, self._last = SQLiteSink(FOLDER / "usage.db"), ""

    def write(self, batch: Batch) -> None:
        self._inner.write(batch)
        again, self._last = self._last == batch.id, batch.id
        if not again and LOSE_REPLIES.exists():
            REPLY_LOST.touch()
            raise TimeoutError


def allocate_if_there_is_room(descriptor: int, offset: int, length: int) -> None:
    if DISK_FULL.exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    allocate(descriptor, offset, length)


def report() -> None:
    stats = recorder.stats()
    if stats.recorded:
        (FOLDER / f"{os.getpid()}.{recorder.producer}.json").write_text(json.dumps(stats._asdict()))


def status_of(path: str) -> int:
    last = path.rpartition("/")[2]
    return int(last) if last.isdecimal() else 200


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        report()  # uvicorn ends by the signal itself, so that nothing of atexit runs
        return
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": status_of(scope["path"]), "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def wsgi(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response(f"{status_of(environ['PATH_INFO'])} As Asked", [("Content-Length", "2")])
    return [b"ok"]


os.posix_fallocate = allocate_if_there_is_room
atexit.register(report)  # before the recorder's own, so that it runs after it
recorder = Recorder(
    Sink(),
    spool=os.environ["SPOOL"] or None,
    interval=float(os.environ.get("INTERVAL", "0.1")),
    segment_bytes=int(os.environ["SEGMENT"]),
)
app: Any = (ASGIMiddleware if os.environ["DOOR"] == "asgi" else WSGIMiddleware)(
    asgi if os.environ["DOOR"] == "asgi" else wsgi,  # type: ignore[arg-type]  # each with its own
    environment="prod",
    exempt=["/healthz"],
    usage=recorder,
)
