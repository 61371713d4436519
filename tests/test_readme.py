"""The README's lines, pasted as they stand into a real shell in an empty folder; then its apps, by its own curl."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.run import bound
from support.servers import stop, wait_until

pytestmark = pytest.mark.slow

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTION = README[README.index("## Protect an app") : README.index("## What it promises")]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
SETUP, UVICORN, WAITRESS, CALLS = SHELL
NAMES = re.findall(r"as `(\w+\.py)`", SECTION)
APPS = dict(zip(NAMES, [text for kind, text in BLOCKS if kind == "python"], strict=True))
SHELLS = [shell for shell in ("bash", "sh", "zsh") if shutil.which(shell)]
FOLDERS = ["estate", "it's a «folder» with 100% of $HOME; echo no"]


class Pasted(NamedTuple):
    """What pasting the lines has left: the folder, and the shell's environment."""

    folder: Path
    environ: dict[str, str]


def environment() -> dict[str, str]:
    """A person's, with this interpreter's environment on the PATH; pip finds everything installed, or fails."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PAPAOURS_", "PIP_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **mine,
        "PATH": path,
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }


def paste(shell: str, lines: str, folder: Path) -> Pasted:
    """Type lines into a shell, and look at its environment afterwards."""
    look = "import json, os; print('ENV' + json.dumps(dict(os.environ)))"
    asked = f'{lines}\nexport KEY\n{sys.executable} -c "{look}"\n'
    done = subprocess.run(
        [shell, "-e"],
        input=asked,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return Pasted(folder, json.loads(done.stdout[done.stdout.index("ENV{") + 3 :]))


@pytest.fixture(
    scope="module",
    params=[(shell, folder) for shell in SHELLS for folder in FOLDERS],
    ids=lambda p: f"{p[0]}-{p[1][:6]}",
)
def pasted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pasted:
    shell, name = request.param
    folder = tmp_path_factory.mktemp("readme") / name
    folder.mkdir()
    return paste(shell, SETUP, folder)


def test_nothing_in_the_lines_is_lost_on_a_shell_without_comments() -> None:
    """An interactive zsh takes '# …' for arguments."""
    assert not [line for lines in SHELL for line in lines.splitlines() if "#" in line]


def test_pasting_sets_up_a_store_that_the_doctor_finds_healthy(pasted: Pasted) -> None:
    assert sorted(path.name for path in pasted.folder.iterdir()) == ["papaours.db", "papaours.pepper"]
    assert pasted.environ["KEY"].startswith("pk_prod_")
    done = subprocess.run(
        ["papaours-auth", "doctor"], env=pasted.environ, cwd="/", capture_output=True, text=True, check=False
    )
    assert (done.returncode, "warning" in done.stdout) == (0, False), done.stdout + done.stderr


def test_pasting_again_breaks_nothing(pasted: Pasted) -> None:
    again = paste("sh", SETUP.splitlines()[1], pasted.folder)
    for name in ("PAPAOURS_STORE", "PAPAOURS_PEPPER_FILE"):
        assert again.environ[name] == pasted.environ[name]


def listens(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "the server ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=[UVICORN, WAITRESS], ids=["uvicorn", "waitress"])
def port(request: pytest.FixtureRequest, pasted: Pasted, tmp_path: Path) -> Iterator[int]:
    """Save the README's apps, and start one by its own line, on another port."""
    for name, text in APPS.items():
        (tmp_path / name).write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = ["sh", "-c", f"exec {request.param.strip().replace('8000', str(port))}"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            bound(command),
            cwd=tmp_path,
            env=pasted.environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: listens(process, port), 60, what=log.read_text)
        yield port
        assert stop(process) in (0, -signal.SIGTERM), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        stop(process)


def test_the_apps_answer_the_readmes_own_calls(pasted: Pasted, port: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine, and is no Python package")
    called = subprocess.run(
        ["sh", "-e"],
        input=CALLS.replace("8000", str(port)),
        env=pasted.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert called.returncode == 0, called.stderr
    assert called.stdout == "hello, Service de facturationok"
    refused = subprocess.run(
        ["curl", "-s", "-w", " %{http_code}", f"http://127.0.0.1:{port}/contracts"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert refused.stdout.endswith(" 401")
