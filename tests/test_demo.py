"""`make demo`'s command, run whole, and made to fail."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from papaours_auth import ConfigurationError, demo

pytestmark = pytest.mark.slow


def test_the_demonstration_finds_every_answer_right() -> None:
    command = [sys.executable, "-m", "papaours_auth", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert done.stdout.count("ms after it was disabled") == 2
    assert "pk_" not in done.stdout + done.stderr


def test_the_demonstration_fails_where_an_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = demo._cases
    monkeypatch.setattr(demo, "_cases", lambda keys: [demo._Case("a wrong guess", 418), *cases(keys)])
    assert demo.run(keep=False) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == 2  # the line, and the sentence at the end


def test_the_demonstration_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'papaours-auth\[demo\]'"):
        demo.run(keep=False)


def test_the_demonstration_stays_up_until_it_is_told_to_stop_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "papaours_auth", "demo", "--keep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while "Ctrl-C" not in "".join(lines[-1:]):
            lines.append(process.stdout.readline())
            assert lines[-1], "it ended by itself:\n" + "".join(lines)
        curls = [line for line in lines if line.startswith("curl ")]
        answers = [
            subprocess.run(["sh", "-c", f"{curl.strip()} -s"], capture_output=True, text=True, check=True)
            for curl in curls
        ]
        assert [answer.stdout.split()[1] for answer in answers] == ["200", "401"] * 2
        found = re.search(r"cat (.*)/production\.key", curls[0])
        assert found is not None
        folder = Path(found[1])
        assert (folder / "production.key").stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not folder.exists()


def test_the_demonstration_says_which_server_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_uvicorn", lambda port: ["uvicorn", "nowhere:app", f"--port={port}"])
    with pytest.raises(ConfigurationError, match=r"ASGI \(uvicorn\) server did not start(?s:.*)nowhere"):
        demo.run(keep=False)


def test_the_demonstration_says_which_of_its_commands_failed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"own command failed \(2\)(?s:.*)there is no SQLite store"):
        demo._Administrator(tmp_path).command("key", "list")


def test_the_demonstration_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "START_SECONDS", 0.0)
    with pytest.raises(ConfigurationError, match="did not answer in 0 s"):
        demo._wait_for(lambda: False)


def test_the_demonstration_needs_its_example_apps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "a" / "b" / "demo.py"))
    with pytest.raises(ConfigurationError, match="run the demonstration from a clone"):
        demo._examples()


def test_the_demonstration_kills_a_server_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(demo, "STOP_SECONDS", 0.1)
        demo._stop(process)
        assert process.returncode == -signal.SIGKILL


def caller(*answers: tuple[int, str], key: str = "", port: int = 0) -> demo._Caller:
    caller = demo._Caller(demo._Server("A server", port), key)
    for answer in answers:
        caller._count(answer)
    return caller


@pytest.mark.parametrize(
    ("answers", "late", "said"),
    [
        ([(200, "")], 0.0, "the key is still accepted"),
        ([(200, ""), (503, "store_unavailable")], 0.0, "503 store_unavailable"),
        ([(401, "key_inactive"), (200, "")], 0.0, "accepted 1 times"),
        ([(401, "key_inactive")], 60.0, "after it was disabled"),
    ],
)
def test_the_demonstration_calls_a_revocation_wrong_that_is(
    capsys: pytest.CaptureFixture[str], answers: list[tuple[int, str]], late: float, said: str
) -> None:
    assert not demo._report(caller(*answers), time.time() - late)
    out = capsys.readouterr().out
    assert said in out
    assert "WRONG" in out


def test_the_demonstration_tells_a_server_that_went_away() -> None:
    gone = caller(port=1)  # nobody listens there
    gone.run()
    assert gone.failure == "ConnectionRefusedError"
