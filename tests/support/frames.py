"""Who holds a text in a local variable: on the stack now, or in the frames of an error."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from starlette.requests import HTTPConnection

import papaours_auth

OURS = str(Path(papaours_auth.__file__).parent)


class Quiet:
    """A scope or an environ that does not show what is in it: the server's own object, which every frame below holds.

    Not a `Mapping`, which error reporters take apart.
    """

    def __init__(self, inside: dict[str, Any]) -> None:
        self._inside = inside

    def __repr__(self) -> str:
        return "<the server's own>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inside)

    def __getitem__(self, name: str) -> Any:
        return self._inside[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._inside[name] = value

    def __delitem__(self, name: str) -> None:
        del self._inside[name]

    def __contains__(self, name: str) -> bool:
        return name in self._inside


def held_on_the_stack(secrets: list[str]) -> list[str]:
    """Name the local variables of our frames that show a secret, from here outwards."""
    return [word for frame in _outwards() for word in _held_by(frame, secrets)]


def held_by_error(error: BaseException, secrets: list[str]) -> list[str]:
    """Name those in the tracebacks of an error, and of all that it was raised from or amid."""
    found: list[str] = []
    for each in _chain(error):
        for frame in _frames(each.__traceback__):
            found += _held_by(frame, secrets)
        # As the standard library would print it; of whose frames only ours are looked at.
        for summary in traceback.TracebackException.from_exception(each, capture_locals=True).stack:
            if summary.filename.startswith(OURS) and summary.locals is not None:
                found += _told_by(f"{summary.filename}:{summary.name}", summary.locals, secrets)
    return sorted(set(found))


def _outwards() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [other for other in (each.__cause__, each.__context__) if other is not None]
            if isinstance(each, BaseExceptionGroup):
                waiting += each.exceptions


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _held_by(frame: FrameType, secrets: list[str]) -> list[str]:
    if not frame.f_code.co_filename.startswith(OURS):
        return []
    where = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
    return _told_by(where, {name: _shown(value) for name, value in frame.f_locals.items()}, secrets)


def _shown(value: object, depth: int = 4) -> str:
    """Take apart what error reporters take apart, tuples with names included."""
    if isinstance(value, HTTPConnection):
        return repr(value)  # a request is the scope under another name
    if isinstance(value, Mapping) and depth:
        return " ".join(_shown(each, depth - 1) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return repr(value) + " ".join(_shown(each, depth - 1) for each in value)
    return repr(value)


def _told_by(where: str, shown: Mapping[str, str], secrets: list[str]) -> list[str]:
    return [
        f"{where[len(OURS) + 1 :]}: {name}"
        for name, text in shown.items()
        if any(secret in text for secret in secrets)
    ]
