"""`make demo`'s command, run whole, and made to fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from papaours_auth import ConfigurationError, demo


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
