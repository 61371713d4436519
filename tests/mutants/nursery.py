"""A process for each change, forked from one that has imported what it needs.

A change within a function is made by giving the function other code, in a child of a process that has collected the
tests: that takes milliseconds. One that an import runs (a constant, a default) needs the core to be imported anew.
Either way the child has a copy of the core on its PYTHONPATH, for the processes that its tests start.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from .changes import Change
from .record import Record

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "papaours_auth"
ARGUMENTS = ["--quick", "--assert=plain", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
"""Plain asserts: nobody reads their values, and modules that are imported already are no matter to them."""
START = 240.0
"""Seconds until the first test must have begun."""
REAL_TIME = 0.5
"""Seconds: a test that takes longer may fail on a busy machine, and is asked twice."""

UNSUITABLE = 71
"""The exit code of a child that cannot make its change so."""

Body: TypeAlias = Callable[[Change, list[str], Path], int]
"""Makes a change in a child, and asks some tests; its exit code is not 0 where one fails."""


class Verdict(NamedTuple):
    """What became of a change."""

    noticed: bool
    how: str
    """``failed``, ``hung``, ``crashed``, ``import``; else ``unnoticed``, or ``unseen`` where no test runs it."""
    by: str = ""


class Child:
    """A process of its own group, with a copy of the core in which one file may be another."""

    def __init__(self, place: Path, changed: tuple[str, bytes] | None, body: Callable[[], int]) -> None:
        self._place = place
        self.answer.unlink(missing_ok=True)
        shutil.rmtree(place / "tests", ignore_errors=True)
        package = place / "papaours_auth"
        if not package.exists():
            package.mkdir(parents=True)
            for path in SOURCES.iterdir():
                (package / path.name).symlink_to(path)  # __pycache__ too: the rest is compiled already
        for path in package.iterdir():
            if not path.is_symlink():
                path.unlink()
                path.symlink_to(SOURCES / path.name)
        if changed is not None:
            name, text = changed
            (package / name).unlink()
            (package / name).write_bytes(text)
            os.utime(package / name, (1, 1))  # older than anything that was compiled
        self.pid = os.fork()
        if self.pid == 0:
            self._live(body)

    @property
    def answer(self) -> Path:
        """Where it names the test that it runs, or that failed."""
        return self._place / "answer"

    @property
    def output(self) -> Path:
        """Where its words go."""
        return self._place / "output"

    def _live(self, body: Callable[[], int]) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, START)
            output = os.open(self.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            silence = os.open(os.devnull, os.O_RDONLY)
            for number, target in ((silence, 0), (output, 1), (output, 2)):
                os.dup2(number, target)
            os.environ |= {
                "PYTHONPATH": str(self._place),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HYPOTHESIS_STORAGE_DIRECTORY": str(self._place / "hypothesis"),
            }
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self._place))
            code = body()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def ended(self) -> int | None:
        """Return its exit code, or a signal's negative number; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what its tests have left
        return os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Trial:
    """A change, the tests that may notice it in the order in which they are asked, and how far that is."""

    def __init__(self, change: Change, text: bytes, rounds: list[list[str]], record: Record) -> None:
        self.change = change
        self._text = text
        self._rounds = [names for names in rounds if names]
        self._record = record
        self._suspect = ""
        self._child: Child | None = None
        self._rounds_begun = 0

    def unchanged(self, names: list[str]) -> Trial:
        """Return one that changes nothing, and asks these tests."""
        text = (SOURCES / self.change.module).read_bytes()
        old = text[self.change.start : self.change.end].decode()
        return Trial(self.change._replace(text=old), text, [names], self._record)

    def begin(self, place: Path, body: Body) -> Verdict | None:
        """Ask the next tests. Returns a verdict where there are none."""
        if not self._rounds:
            return Verdict(False, "unnoticed" if self._child else "unseen")
        names, change = self._rounds.pop(0), self.change
        self._rounds_begun += not self._suspect
        self._child = Child(place, (change.module, self._text), lambda: body(change, names, place))
        return None

    @property
    def is_done_with_the_first(self) -> bool:
        """Whether the first tests have noticed nothing, and others are left to be asked."""
        return self._rounds_begun == 1 and bool(self._rounds) and not self._suspect

    def look(self) -> Verdict | bool:
        """Return a verdict; True where the next tests are to be asked, False while these are under way."""
        if self._child is None:
            return True
        code = self._child.ended()
        if code is None:
            return False
        if code == 0:
            return True
        if code == UNSUITABLE:
            return Verdict(False, "unsuitable")
        by = self._child.answer.read_text() if self._child.answer.exists() else ""
        known = self._record.tests.get(by)
        if known is not None and known.seconds > REAL_TIME and self._suspect != by:
            self._suspect = by
            self._rounds.insert(0, [by])
            return True
        if code == -signal.SIGALRM:
            return Verdict(True, "hung", by)
        if code < 0:
            return Verdict(True, "crashed", by)
        return Verdict(True, "failed" if by else "import", by)

    def stop(self) -> None:
        """End what is under way."""
        if self._child is not None:
            self._child.end()


def warm_up(modules: list[str]) -> None:
    """Import what the tests need, but nothing of ours, and none of their own."""
    ours = {path.stem for path in (ROOT / "tests").iterdir()} | {"papaours_auth", "conftest", "__main__"}
    ours.add("hypothesis")  # whose plugin minds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            # Not the likes of _asyncio, which is half a module where it comes before its other half.
            if name.partition(".")[0] not in ours and not name.startswith("_"):
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
