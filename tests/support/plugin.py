"""What pytest does for this suite: turns for tests that must run alone, `--quick`, and why tests were skipped.

The root `conftest.py` loads it. Marks:

- ``alone``: it measures real time, or loads all cores itself. No other worker runs a test meanwhile.
- ``slow``: it takes more than a second without any server of `support`. `make test-quick` leaves it out.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import hidden, run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="start no servers, and leave out what is slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: no other test runs meanwhile")
    config.addinivalue_line("markers", "slow: takes more than a second, and no server of ours")
    if config.getoption("--quick"):
        os.environ[run.NO_SERVERS] = "1"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's `make test &` has children ignore Ctrl-C, which the demonstration and PostgreSQL are stopped by.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run.folder()  # the workers find it in their environment
    hidden.hide()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    # Together and last: the other workers stand still once, not between each two of them.
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_xdist_auto_num_workers() -> int:
    """Return one more worker than there are cores: tests of outages wait as much as they compute."""
    return min(os.cpu_count() or 1, 4) + 1


def pytest_collection_finish() -> None:
    """What is here now stays: the collector, which many tests call, need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _turn(run.folder(), alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold the workers' lock: each of them may at once, or one alone.

    Everybody passes the gate; who waits to be alone stands in it, so that no other goes in before.
    """
    with (folder / "gate").open("w") as gate, (folder / "turn").open("w") as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the very end what was skipped, and why, a line a reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("skipped, and why")
    for reason, tests in reasons.most_common():
        terminalreporter.write_line(f"{tests:5} {reason}")
    if hidden.asked_for():
        terminalreporter.write_line("BARE=1: servers on the PATH were hidden")
