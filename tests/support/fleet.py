"""Processes that verify under load, as `load.py` does, and are told what to do together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from . import load, run

PROCESSES = 4
SETTLE = 0.5
"""Seconds a phase lasts, so that the processes make some thousands of calls in it."""


class Fleet:
    """Processes that verify as fast as they can."""

    def __init__(
        self, stack: ExitStack, url: str, pepper: str, target: str, others: list[str], **options: object
    ) -> None:
        self._processes = []
        for number in range(PROCESSES):
            given = {
                "url": url,
                "pepper": pepper,
                "kind": ("sync", "async")[number % 2],
                "target": target,
                "others": others[number:] + others[:number],
                # Of the other keys only a few are remembered, so that every second call asks the store.
                "options": {"max_known": len(others) // 8, **options},
            }
            process = subprocess.Popen(
                run.bound([sys.executable, load.__file__, json.dumps(given)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            self._processes.append(process)
        self._answers("ready")

    def _answers(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == word

    def begin(self, phase: str, seconds: float = SETTLE) -> None:
        """Let a phase begin in all processes, and last a while."""
        self._tell(phase)
        self._answers(phase)
        time.sleep(seconds)  # load, not synchronization: what is asserted does not hang on how long

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()

    def stop(self) -> list[dict[str, Any]]:
        self._tell("stop")
        reports = []
        for process in self._processes:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            reports.append(json.loads(out.splitlines()[-1]))
        return reports
