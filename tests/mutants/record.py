"""Which test runs which line of the core, and how long it takes: learnt by running all of them once."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

LEFT_OUT = {
    *("architecture", "mutants"),  # read the text of the sources
    "simulation",  # what it alone sees is one net from falling
    *("benchmarks", "cli", "cli_streams", "cli_usage", "demo", "pepper_file", "readme", "run"),
    *("redis", "redis_errors", "revocation", "sql", "sqlite", "stores"),
    *("usage_benchmark", "usage_metrics", "usage_questions", "usage_recorder", "usage_signs", "usage_sinks"),
    "usage_spool",
    # These start servers or processes.
    *("client_addresses", "faults", "forks", "gevent", "lambda", "servers", "servers_of_processes"),
    *("options", "refused_below", "refused_below_wsgi"),  # Django can be set up once in a process
    *("usage_faults", "usage_life", "usage_redis", "wsgi_bodies"),
}
"""Files of tests (without ``test_``) that run the core only by the way, or slowly."""
LONGEST = 8.0
"""Seconds: a test that takes longer (under coverage, on a busy machine) is left out."""


NEAR = [
    "authenticator",
    "outage",
    "http",
    "usage_middleware",
    "asgi",
    "wsgi",
    "keys",
    "watcher",
    "conformance",
]
"""Whose tests are asked next where those of the module's own file notice nothing."""
ENOUGH = 8.0
"""Seconds of the processor, under coverage, of tests that are asked about one change: 200 or so."""


class Test(NamedTuple):
    """A test: for how long it ran, and whether it started processes, whose lines nobody sees."""

    name: str
    seconds: float
    work: float
    """Seconds of the processor: the others it waited, or the machine was busy."""
    starts_processes: bool


class Record(NamedTuple):
    """What was learnt."""

    tests: dict[str, Test]
    lines: dict[str, dict[int, list[str]]]
    """Module -> line -> the tests that run it."""
    failed: list[str]
    modules: list[str]
    """What had been imported at the end."""

    def who_may_notice(self, module: str, lines: range) -> list[str]:
        """Return the tests that run one of these lines; all that run any of the module's where there are none."""
        known = self.lines.get(module, {})
        chosen = lines if len(lines) else known.keys()
        found = {test for line in chosen for test in known.get(line, ())}
        # What it starts runs lines too. They are sought in the modules that it runs itself, or is named after.
        namesake = f"tests/test_{module.removeprefix('_')}"
        anywhere = {test for tests in known.values() for test in tests}
        for name, test in self.tests.items():
            if test.starts_processes and (name in anywhere or name.startswith(namesake)):
                found.add(name)
        return self._nearest(module, found)

    def _nearest(self, module: str, found: set[str]) -> list[str]:
        """Leave out what is the same over another store, and what is furthest where there are too many."""
        found = {name for name in found if name.replace("sqlite", "memory") not in found - {name}}
        files = [f"tests/test_{file}.py" for file in (Path(module).stem.removeprefix("_"), *NEAR)]
        order = {file: place for place, file in enumerate(dict.fromkeys(files))}

        def distance(name: str) -> tuple[int, float, str]:
            return order.get(name.partition("::")[0], len(order)), self.tests[name].work, name

        nearest, work = [], 0.0
        for name in sorted(found, key=distance):
            work += self.tests[name].work
            if work <= ENOUGH:
                nearest.append(name)
        return nearest


class Recorder:
    """A plugin of pytest that has coverage tell tests apart."""

    def __init__(self, sources: Path, modules: list[str]) -> None:
        from coverage import Coverage

        self._coverage = Coverage(
            data_file=None,
            include=[str(sources / module) for module in modules],
            concurrency=["thread"],
            config_file=False,
        )
        self._sources, self._modules = sources, modules
        self._tests: dict[str, Test] = {}
        self._failed: set[str] = set()
        self._processes = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _: object) -> None:
        if event in ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"):
            self._processes += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        began, worked, before = time.perf_counter(), time.process_time(), self._processes
        result = yield
        self._coverage.switch_context("")
        name = item.nodeid
        self._tests[name] = Test(
            name, time.perf_counter() - began, time.process_time() - worked, self._processes > before
        )
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)

    def run(self, arguments: list[str], result: Path) -> int:
        self._coverage.start()
        code = int(pytest.main(arguments, plugins=[self]))
        self._coverage.stop()
        data = self._coverage.get_data()
        good = {
            name for name, test in self._tests.items() if name not in self._failed and test.seconds <= LONGEST
        }
        place = {name: number for number, name in enumerate(sorted(good))}
        lines: dict[str, dict[int, list[int]]] = defaultdict(dict)
        for module in self._modules:
            for line, tests in data.contexts_by_lineno(str(self._sources / module)).items():
                lines[module][line] = sorted(place[name] for name in good.intersection(tests))
        record = {
            "tests": [list(self._tests[name]) for name in sorted(good)],
            "lines": lines,
            "failed": sorted(self._failed),
            "modules": sorted(sys.modules),
        }
        result.write_text(json.dumps(record))
        return code


def read_record(text: str) -> Record:
    """Read what `Recorder.run` has written."""
    found = json.loads(text)
    names = [test[0] for test in found["tests"]]
    tests = {test[0]: Test(*test) for test in found["tests"] if not _is_left_out(test[0])}
    lines = {
        module: {
            int(line): [names[place] for place in places if names[place] in tests]
            for line, places in of_module.items()
        }
        for module, of_module in found["lines"].items()
    }
    return Record(tests, lines, found["failed"], found["modules"])


def files_to_record(tests: Path) -> list[str]:
    """Return the files whose tests may notice something."""
    return [str(path) for path in sorted(tests.glob("test_*.py")) if not _is_left_out(f"tests/{path.name}")]


def _is_left_out(name: str) -> bool:
    """Whether a test, or a file of tests, is one that is not asked."""
    return Path(name.partition("::")[0]).stem.removeprefix("test_") in LEFT_OUT
