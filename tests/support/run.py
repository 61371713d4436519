"""A run of the tests as a whole: its folder, what is made once in it, and how its processes end with it."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

FOLDER = "PAPAOURS_TEST_RUN"
"""The environment variable that tells the workers of a run its folder."""
NO_SERVERS = "PAPAOURS_TEST_NO_SERVERS"


@cache
def folder() -> Path:
    """Return the run's folder. Whoever asks first makes it, and removes it as it ends."""
    if FOLDER not in os.environ:
        made = tempfile.mkdtemp(prefix="papaours-run-")
        Path(made).chmod(0o755)  # database servers run as another user where the tests run as root
        os.environ[FOLDER] = made
        atexit.register(_remove, made, os.getpid())
    return Path(os.environ[FOLDER])


def _remove(made: str, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child
        shutil.rmtree(made, ignore_errors=True)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` has filled once in this run, whichever worker asks for it first."""
    made = folder() / name
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = folder() / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(made)
    return made


def bound(command: Sequence[str]) -> list[str]:
    """Return a server's command, made so that the kernel kills it when the thread that starts it ends.

    So servers end with the run, even one that is killed. Start them from the test's own thread: one from a pool may
    end before the test does. (`preexec_fn` would do without `setpriv`, and runs our own fork hooks amid a test.)
    """
    if os.environ.get(NO_SERVERS):
        pytest.skip("make test-quick starts no servers")
    setpriv = shutil.which("setpriv")  # of util-linux; not on macOS
    return [*([setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []), *command]
