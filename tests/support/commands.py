"""`papaours-auth` as a process of its own, many times a second, with its standard streams as a test wants them.

A process that has imported the command line already forks for each command. The child arranges its descriptors,
makes its streams as the interpreter would have at its start, runs the command and ends as any process does.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

CLOSED = "closed"
NO_READER = "no reader"
"""A pipe whose other end is closed."""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """Runs commands in a folder. A stream is a file's path, `CLOSED`, `NO_READER`, or None: kept for the answer."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def __call__(
        self,
        *words: str,
        cwd: Path,
        environ: Mapping[str, str],
        stdin: str = os.devnull,
        stdout: str | None = None,
        stderr: str | None = None,
    ) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = self._folder / "out", self._folder / "err"
        out.write_bytes(b"")
        err.write_bytes(b"")
        streams = [stdin, stdout or str(out), stderr or str(err)]
        asked = {"words": words, "cwd": str(cwd), "environ": dict(environ), "streams": streams}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Done(code, out.read_text(errors="replace"), err.read_text(errors="replace"))


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    """Start the process that forks."""
    command = [sys.executable, "-W", "error", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Commands(process, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def leaves(
    parser: argparse.ArgumentParser, words: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, ...], list[argparse.Action]]]:
    """List every command of a parser that can be run, with its arguments."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for name, child in group.choices.items():
            yield from leaves(child, (*words, name))
    if not any(group.required for group in groups):
        yield tuple(words), [action for action in parser._actions if action not in groups]


def _serve() -> None:
    from papaours_auth import cli, cli_signs, cli_usage, demo  # noqa: F401 - so that children have them
    from papaours_auth.stores import sqlite  # noqa: F401
    from papaours_auth.usage import sqlite as usage  # noqa: F401

    gc.freeze()  # else each child goes through all there is when it ends
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _begin(**json.loads(line))
            sys.exit(cli.main())
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _begin(words: Sequence[str], cwd: str, environ: Mapping[str, str], streams: Sequence[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["papaours-auth", *words]
    for number, stream in enumerate(streams):
        _place(number, stream)
    # As the interpreter does: None where the descriptor is closed.
    sys.stdin = _stream(0, "rb", streams, errors="strict")
    sys.stdout = _stream(1, "wb", streams, errors="strict", write_through="PYTHONUNBUFFERED" in environ)
    sys.stderr = _stream(2, "wb", streams, errors="backslashreplace", line_buffering=True)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def _place(number: int, stream: str) -> None:
    os.close(number)
    if stream == CLOSED:
        return
    if stream == NO_READER:
        reader, writer = os.pipe()  # both above `number`, or it is one of them
        moved = os.dup(writer)
        os.close(reader)
        os.close(writer)
        os.dup2(moved, number)
        os.close(moved)
        return
    opened = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)


def _stream(number: int, mode: str, streams: Sequence[str], **options: Any) -> Any:
    if streams[number] == CLOSED:
        return None
    buffering = 0 if options.get("write_through") else -1
    opened: Any = os.fdopen(number, mode, buffering)
    return io.TextIOWrapper(opened, encoding="utf-8", **options)


if __name__ == "__main__":
    _serve()
