"""A WSGI app with every kind of body, bare and guarded: ``bare`` and ``app`` of this module are served."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from papaours_auth import Reason, Refused
from papaours_auth.usage import Recorder
from papaours_auth.wsgi import PapaoursAuthMiddleware

SIZE, BIG = 300_000, 200_000_000
HEADERS = [("Content-Type", "text/plain"), ("Cache-Control", "no-cache")]


class Sized:
    """Three pieces, or one, with a length, and no list."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def generator(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces


def fails(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    raise LookupError


def file_of(size: int) -> Any:
    """Return a file of zeroes. They take no room."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the server closes it
    file.truncate(size)
    return file


BODIES: dict[str, Any] = {
    "/healthz": lambda: [b"ok"],
    "/list": lambda: [b"one"],
    "/list-of-two": lambda: [b"one", b"two"],
    "/tuple": lambda: (b"one",),
    "/nothing": list,
    "/empty": lambda: [b""],
    "/generator": lambda: generator(b"one", b"two"),
    "/generator-of-none": lambda: generator(),
    "/generator-of-empties": lambda: generator(b"", b"one", b""),
    "/sized": lambda: Sized(b"one"),
    "/sized-by-three": lambda: Sized(b"one", b"two", b"three"),
    "/fails-at-once": lambda: fails(),
    "/fails-late": lambda: fails(b"one"),
    "/none": lambda: None,
    "/number": lambda: 5,
    "/text": lambda: "one",
    "/list-of-text": lambda: ["one"],
}


def refused(path: str) -> Iterator[bytes]:
    def in_the_first_step() -> Iterator[bytes]:
        yield from ()
        raise Refused(Reason.INSUFFICIENT_RIGHTS)

    if path in ("/refuses", "/refuses-after-all"):
        raise Refused(Reason.INSUFFICIENT_RIGHTS)
    return in_the_first_step()


def bare(environ: Any, start_response: Any) -> Any:
    path = environ["PATH_INFO"]
    if path in ("/refuses", "/refuses-first"):
        return refused(path)
    if path == "/raises":
        raise LookupError
    headers = [*HEADERS, ("Content-Length", "3")] if path == "/length" else [*HEADERS]  # wsgiref adds to it
    write = start_response("200 OK", headers)
    if path in ("/file", "/big-file"):
        return environ["wsgi.file_wrapper"](file_of(SIZE if path == "/file" else BIG))
    if path == "/plain-file":
        return file_of(SIZE)
    if path in ("/refuses-late", "/refuses-after-all"):
        return refused(path)
    if path == "/length":
        return generator(b"one")
    if path == "/write":
        write(b"one")
        write(b"two")
        return [b"three"]
    if path in ("/again", "/too-late"):
        if path == "/too-late":
            write(b"one")
        try:
            raise LookupError
        except LookupError:
            start_response("500 Internal Server Error", [*HEADERS], sys.exc_info())
        return [b"broken"]
    return BODIES[path]()


if "BODIES_USAGE" in os.environ:
    app = PapaoursAuthMiddleware(
        bare,
        environment="prod",
        exempt=["/healthz"],
        usage=Recorder(os.environ["BODIES_USAGE"], interval=0.1),
    )
