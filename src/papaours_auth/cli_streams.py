"""The standard streams of ``papaours-auth``: an answer on standard output, words for people on standard error.

An answer that cannot be written is an error that the exit code tells. Words for people never stop a command.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TextIO

from .exceptions import ConfigurationError, InvalidInput

_LONGEST_INPUT: Final = 10_000


class Unwritten(Exception):
    """The answer could not be written to standard output."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or type(error).__name__)
        self.reader_gone = error.errno == errno.EPIPE


def prepare() -> None:
    """Make the standard streams safe to use, whatever this process was started with.

    A descriptor that is closed is taken by /dev/null, so that no file opened later gets its number and other
    people's words. Writing to standard output then fails as it would have, instead of being lost in silence.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we live
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no "…" must not cost anybody a key
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Tell a person something."""
    try:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - a command line prints
    except OSError:
        _abandon(sys.stderr)


def out(text: str) -> None:
    """Write a line of the answer. Raises `Unwritten`, here or in `flush`."""
    _writing(lambda: print(text))  # noqa: T201


def out_raw(text: str) -> None:
    """Write a line that a shell reads: a path in it keeps the bytes that it has for the system."""
    flush()
    buffer = sys.stdout.buffer
    _writing(lambda: buffer.write(os.fsencode(text) + b"\n"))


def flush() -> None:
    """Write what waits. Raises `Unwritten`."""
    _writing(sys.stdout.flush)


def finish() -> None:
    """Leave nothing to be written while the interpreter ends: that would change the exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def _writing(write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        _abandon(sys.stdout)
        raise Unwritten(error) from None


def _abandon(stream: TextIO) -> None:
    """Let what could not be written go nowhere, now and when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def check_reader() -> None:
    """Refuse to begin where standard output is seen to lead nowhere. Raises `ConfigurationError`.

    A full disk is not seen: a command whose answer must not be lost catches `Unwritten` as well.
    """
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no descriptor behind it: a test's, or a program's own
        return
    watch = select.poll()
    watch.register(number, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in watch.poll(0))
    if gone or fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise ConfigurationError(
            "standard output is closed or nobody reads it, so the key could not be shown: nothing was done"
        )


def as_json(value: object, default: Callable[[object], object] | None = None) -> str:
    """Return a value as one line of JSON, in ASCII where standard output cannot show more."""
    unicode = (sys.stdout.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")
    return json.dumps(value, ensure_ascii=not unicode, default=default)


def read_input() -> str:
    """Return what is on standard input. Raises `InvalidInput` where it cannot be read."""
    try:
        if sys.stdin is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sys.stdin.buffer.read(_LONGEST_INPUT).decode("utf-8", "replace").strip()
    except OSError as error:
        raise InvalidInput(
            f"the key is read from standard input, which cannot be read ({error.strerror}): "
            "give it by '< FILE' or a pipe"
        ) from None
