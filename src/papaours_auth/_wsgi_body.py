"""Bodies of WSGI answers that are no lists: how they are handed on, and how it is noted that they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from .usage import Outcome

if TYPE_CHECKING:
    from ._wsgi_answer import Answer

_GONE: Final = Outcome.GONE  # bound once: to name a member of an enum costs 100 ns


class Pieces:
    """A body that is neither a list nor a file, and how it ends."""

    __slots__ = ("_answer", "_body", "_pieces")

    def __init__(self, answer: Answer, body: Iterable[bytes], pieces: Iterator[bytes]) -> None:
        self._answer, self._body, self._pieces = answer, body, pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._noted() if self._answer.recorded else self._pieces

    def _noted(self) -> Iterator[bytes]:
        answer = self._answer
        try:
            for piece in self._pieces:
                if piece:  # PEP 3333: headers wait for one that is not empty
                    answer.sending()
                    yield piece
                    break
                yield piece
            yield from self._pieces
        except GeneratorExit:  # perhaps of the garbage collector, anywhere: `close` notes the end
            raise
        except BaseException as error:
            answer.failed(error)
            raise
        answer.complete()

    def close(self) -> None:
        """Close the app's own iterable (PEP 3333: servers call it whatever happens)."""
        try:
            close(self._body)
        finally:
            self._answer.end(_GONE)


class Sized(Pieces):
    """One that had a length: servers make a Content-Length of it."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]  # `wrapped` looked


def wrapped(answer: Answer, body: Iterable[bytes], pieces: Iterator[bytes]) -> Iterable[bytes]:
    """Return a body whose ``pieces`` are left to be taken, with a length if it had one."""
    return (Sized if hasattr(body, "__len__") else Pieces)(answer, body, pieces)


class File:
    """A file whose closing is noted."""

    def __init__(self, file: Any, close: Callable[[], None]) -> None:  # Any: whatever an app takes for a file
        self._file, self.close = file, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)


def close(body: Iterable[bytes]) -> None:
    """Close what an app has returned, if it can be closed."""
    method = getattr(body, "close", None)
    if method is not None:
        method()
