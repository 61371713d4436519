"""The run of the tests itself: its servers end with it, turns are kept, and its last lines say what was skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support import hidden, run
from support.plugin import _turn
from support.servers import wait_until

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

REDIS = """
from pathlib import Path
from support.redis_servers import BINARIES, RedisServer
print(RedisServer(BINARIES["6.2"], Path.cwd() / "redis").start().process.pid, flush=True)
input()
"""
POSTGRESQL = """
from support.sql_servers import children, postgresql
with postgresql() as server:
    print(server._process.pid, *children(server._process.pid), flush=True)
    input()
"""


@pytest.mark.parametrize("code", [REDIS, POSTGRESQL], ids=["redis", "postgresql"])
def test_servers_end_with_the_run_that_started_them_even_one_that_is_killed(
    code: str, tmp_path: Path
) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environ
    )
    with started:
        assert started.stdout is not None
        servers = started.stdout.readline().split()
        assert all(lives(pid) for pid in servers)
        started.kill()
    assert servers
    wait_until(lambda: not any(lives(pid) for pid in servers), 30, what="the servers to end")


def lives(pid: bytes) -> bool:
    """Whether a process is there, and not merely unburied."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_must_be_alone_waits_for_the_others_and_goes_before_those_who_come_later(tmp_path: Path) -> None:
    order: list[str] = []

    def take(name: str, alone: bool) -> threading.Thread:
        def turn() -> None:
            with _turn(tmp_path, alone=alone):
                order.append(name)

        thread = threading.Thread(target=turn, daemon=True)
        thread.start()
        return thread

    with _turn(tmp_path, alone=False):
        take("together", alone=False).join(30)
        alone = take("alone", alone=True)
        wait_until(lambda: gate_is_held(tmp_path), 30, what="the gate to be taken")
        later = take("later", alone=False)
        assert order == ["together"]
    for thread in (alone, later):
        thread.join(30)
    assert order == ["together", "alone", "later"]


def gate_is_held(folder: Path) -> bool:
    command = ["flock", "--nonblock", str(folder / "gate"), "true"]
    return subprocess.run(command, check=False).returncode != 0


def test_a_bare_run_finds_no_server_and_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in (
        (first, ("redis-server", "tool")),
        (second, ("mysqld", "tool", "postgres", "other")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{first}:{second}:{tmp_path / 'nowhere'}")
    monkeypatch.setattr(run, "folder", lambda: tmp_path)
    monkeypatch.delenv("PAPAOURS_BARE", raising=False)
    assert hidden.which("mysqld") == str(second / "mysqld")
    monkeypatch.setenv("PAPAOURS_BARE", "1")
    hidden.hide()
    assert {name: hidden.which(name) for name in ("redis-server", "mysqld", "postgres")} == dict.fromkeys(
        ("redis-server", "mysqld", "postgres")
    )
    assert [Path(shutil.which(name) or "").resolve() for name in ("tool", "other")] == [
        first / "tool",
        second / "other",
    ]


SKIPPING = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_that_lacks_something(number):
    pytest.skip("no such server here")

def test_that_passes():
    pass
"""


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_last_lines_say_what_was_skipped_and_why(tmp_path: Path, workers: str, bare: bool) -> None:
    (tmp_path / "test_these.py").write_text(SKIPPING)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:warnings",
        "-p",
        "support.plugin",
        "-n",
        workers,
        ".",
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ["PYTHONPATH"] = str(ROOT / "tests")
    environ["PAPAOURS_BARE"] = "1" if bare else ""  # whatever the run is that this test belongs to
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, skipped, summary = [line for line in done.stdout.splitlines() if not line.startswith("BARE=1")]
    assert "    3 no such server here" in skipped
    assert "1 passed, 3 skipped" in summary
    assert ("BARE=1: servers on the PATH were hidden" in done.stdout.splitlines()[-2]) is bare
