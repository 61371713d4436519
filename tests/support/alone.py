"""Code in a process of its own, unmeasured: where a thread holds coverage's lock, a forked child stands still."""

from __future__ import annotations

import os
import subprocess
import sys


def run_alone(code: str, *, seconds: float = 90.0) -> None:
    """Run code, which fails by raising. A child of its that hangs fails too."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
