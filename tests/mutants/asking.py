"""How a child makes its change and asks the tests: pytest's side of it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from .changes import Change
from .nursery import ARGUMENTS, START, UNSUITABLE, Body
from .record import Record


def patience(seconds: float) -> float:
    """Return how long a test may take that took so long under coverage. Beyond, it hangs."""
    return 15.0 + 10.0 * seconds


class Chosen:
    """A plugin of pytest: runs these tests alone, ends one that hangs, and tells which one failed."""

    def __init__(self, names: Iterable[str], record: Record, answer: Path) -> None:
        self._names, self._record, self._answer = set(names), record, answer
        self._functions = {name.partition("[")[0] for name in self._names}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = self._record.tests
        # A change may give a parametrized test other names: then all that have its function's.
        kept = [
            item
            for item in items
            if item.nodeid in self._names
            or (item.nodeid not in known and item.nodeid.partition("[")[0] in self._functions)
        ]
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        known = self._record.tests.get(item.nodeid)
        self._answer.write_text(item.nodeid)
        signal.setitimer(signal.ITIMER_REAL, patience(known.seconds if known else 1.0))
        result = yield
        signal.setitimer(signal.ITIMER_REAL, START)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._answer.write_text(report.nodeid)
            os.write(1, report.longreprtext.encode())
            os._exit(1)


def import_anew(record: Record) -> Body:
    """Return what asks tests in a process that has not imported the core yet: it finds the changed one."""

    def body(_: Change, names: list[str], place: Path) -> int:
        files = sorted({name.partition("::")[0] for name in names})
        chosen = Chosen(names, record, place / "answer")
        (place / "answer").unlink(missing_ok=True)
        code = pytest.main([*files, *ARGUMENTS, "-q", "-x", f"--basetemp={place}/tests"], plugins=[chosen])
        return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)

    return body


class Collected:
    """A plugin of pytest that has collected all tests, and hands them to whoever forks from here."""

    def __init__(self, record: Record, run: Callable[[Body], None]) -> None:
        self._record, self._run = record, run
        self._items: dict[str, pytest.Item] = {}
        self._functions: list[FunctionType] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        self._functions = functions_of_the_core()
        self._run(self._body)
        return True

    def _body(self, change: Change, names: list[str], place: Path) -> int:
        text = (place / "papaours_auth" / change.module).read_bytes()
        if not give_other_code(self._functions, change, text):
            return UNSUITABLE
        items = [self._items[name] for name in names if name in self._items]
        if not items:
            return 0
        config = items[0].config
        # Else all children empty one folder.
        config._tmp_path_factory._given_basetemp = place / "tests"  # type: ignore[attr-defined]
        config.pluginmanager.register(Chosen(names, self._record, place / "answer"))
        for item, following in zip(items, [*items[1:], None], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return 0


def functions_of_the_core() -> list[FunctionType]:
    """Return all functions of the core that live. Once: in a child it would copy the collector's every page."""
    gc.unfreeze()  # what is frozen is not listed
    found = [
        each
        for each in gc.get_objects()
        # Not isinstance, which asks an object of Django's for its class, and that for its settings.
        if type(each) is FunctionType and str(each.__module__).startswith("papaours_auth.")
    ]
    gc.collect()
    gc.freeze()
    return found


def give_other_code(functions: Iterable[FunctionType], change: Change, text: bytes) -> bool:
    """Give each living function that the change is in the code that it has in the changed text."""
    file = str(sys.modules[f"papaours_auth.{change.module.removesuffix('.py')}"].__file__)
    new: dict[str, list[CodeType]] = {}
    for code in _codes(compile(text, file, "exec", dont_inherit=True)):
        new.setdefault(_plain(code), []).append(code)
    living: dict[str, set[CodeType]] = {}
    functions = [
        each
        for each in functions
        if each.__code__.co_filename == file and _within(_plain(each.__code__), change.where)
    ]
    for function in functions:
        living.setdefault(_plain(function.__code__), set()).add(function.__code__)
    order = {
        code: (name, place)
        for name, codes in living.items()
        for place, code in enumerate(sorted(codes, key=lambda code: code.co_firstlineno))
    }
    for function in functions:
        name, place = order[function.__code__]
        if len(new.get(name, ())) != len(living[name]):
            return False
        try:
            function.__code__ = new[name][place]
        except ValueError:  # it closes over other names
            return False
    return bool(functions)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _plain(code: CodeType) -> str:
    return code.co_qualname.replace(".<locals>", "")


def _within(name: str, where: str) -> bool:
    return f"{where}.".startswith(f"{name}.") or name.startswith(f"{where}.")


def collect(record: Record, files: list[str], run: Callable[[Body], None]) -> int:
    """Collect all tests, and call ``run`` with what asks them in a child."""
    return int(pytest.main([*files, *ARGUMENTS, "-s", "-q"], plugins=[Collected(record, run)]))
