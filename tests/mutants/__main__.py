"""``make mutants``: what was noticed, each change that was not, and whether that is enough."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path

from .asking import collect, import_anew
from .changes import Change, changes_of
from .known import Known, read_known
from .nursery import ARGUMENTS, ROOT, SOURCES, Body, Child, Trial, Verdict, warm_up
from .record import Record, Recorder, files_to_record, read_record

CORE = [
    *(
        "verify.py",
        "model.py",
        "format.py",
        "digest.py",
        "http.py",
        "cache.py",
        "authenticator.py",
        "watcher.py",
    ),
    *("outage.py", "throttle.py", "keys.py", "asgi.py", "wsgi.py", "_middleware.py", "exceptions.py"),
    *("_asgi_guard.py", "_asgi_paths.py", "_asgi_answer.py", "_asgi_lifespan.py", "_wsgi_answer.py"),
]
ENOUGH = 0.97
MEMORY = ROOT / ".mutants.json"
TESTS = ROOT / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--module", action="append", help="this one alone, cache.py say; may be repeated")
    parser.add_argument("--only", default="", help="changes whose name has this text in it")
    parser.add_argument("--sample", type=int, default=1, help="one change of so many, drawn by its name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs have found")
    parser.add_argument("--list", action="store_true", help="list the changes and make none")
    options = parser.parse_args()
    modules = [name for name in options.module or CORE if (SOURCES / name).exists()]
    sources = {module: (SOURCES / module).read_bytes() for module in modules}
    changes = [
        change
        for module in modules
        for change in changes_of(module, sources[module])
        if options.only in change.name
        and int(sha256(change.name.encode()).hexdigest(), 16) % options.sample == 0
    ]
    if options.list:
        print(*(f"{change.module}:{change.line} {change.name}" for change in changes), sep="\n")
        return 0
    memory = {} if options.fresh or not MEMORY.exists() else json.loads(MEMORY.read_text())
    place = Path(tempfile.mkdtemp(prefix="papaours-mutants-"))
    began = time.monotonic()
    try:
        record = recorded(place, memory)
        hunt = Hunt(Asked(record), memory, place, options.jobs)
        hunt.run(changes, sources, record)
    finally:
        MEMORY.write_text(json.dumps(memory))
        shutil.rmtree(place, ignore_errors=True)
    partial = bool(options.module or options.only or options.sample > 1)
    print(f"{time.monotonic() - began:.0f} s")
    return report(changes, hunt.verdicts, read_known(), partial=partial)


def recorded(place: Path, memory: dict[str, object]) -> Record:
    """Run the tests once, or take what an earlier run learnt of the same sources and tests."""
    mark = hash_of([*SOURCES.rglob("*.*"), *TESTS.glob("*.py"), *(TESTS / "support").glob("*.py")])
    result = place / "record.json"
    if memory.get("record of") != mark:
        print("running the tests once, to see which line each runs", flush=True)

        def run() -> int:
            signal.setitimer(signal.ITIMER_REAL, 0)
            recorder = Recorder(SOURCES, CORE)  # coverage follows links
            arguments = [argument for argument in ARGUMENTS if argument != "-x"]
            return recorder.run([*files_to_record(TESTS), *arguments, f"--basetemp={place}/tests"], result)

        child = Child(place / "record", None, run)
        try:
            while (code := child.ended()) is None:
                time.sleep(0.1)
        except BaseException:
            child.end()  # it is in a group of its own, which Ctrl-C does not reach
            raise
        if not result.exists():
            sys.exit(f"the tests could not be run ({code}):\n{child.output.read_text()}")
        memory |= {"record of": mark, "record": result.read_text()}
    record = read_record(str(memory["record"]))
    if record.failed:
        print(f"left out, since they fail without any change: {', '.join(record.failed)}")
    print(f"{len(record.tests)} tests", flush=True)
    return record


class Hunt:
    """All changes whose fate is not known, tried some at a time."""

    def __init__(self, asked: Asked, memory: dict[str, object], place: Path, jobs: int) -> None:
        self._asked, self._memory, self._place, self._jobs = asked, memory, place, jobs
        self.verdicts: dict[str, Verdict] = {}

    def run(self, changes: list[Change], sources: dict[str, bytes], record: Record) -> None:
        """Try them: first those within functions."""
        within: list[Change] = []
        imported: list[Change] = []
        for change in changes:
            known = self._asked.remembered(change, self._memory)
            if known is not None:
                self.verdicts[change.name] = known
            else:
                (within if len(change.lines) else imported).append(change)
        print(f"{len(changes)} changes, {len(within) + len(imported)} of them to be tried", flush=True)
        trials = [self._trial(change, sources, record) for change in within]
        if trials:
            self._within(trials, record)
        imported += [change for change in within if change.name not in self.verdicts]
        trials = [self._trial(change, sources, record) for change in imported]
        warm_up(record.modules)
        for change, verdict in self._settled(trials, import_anew(record)):
            self._note(change, verdict)

    def _trial(self, change: Change, sources: dict[str, bytes], record: Record) -> Trial:
        rounds = self._asked.rounds(change, self._memory)
        return Trial(change, change.applied(sources[change.module]), rounds, record)

    def _within(self, trials: list[Trial], record: Record) -> None:
        """Have a child collect the tests, and fork a child of its own for each change."""
        results = self._place / "verdicts"
        by_name = {trial.change.name: trial.change for trial in trials}

        def hunt(body: Body) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            with results.open("a", encoding="utf-8") as file:
                accusers: dict[str, None] = {}
                # The module's own tests about every change first: most end there, and soon.
                later: list[Trial] = []
                for change, verdict in chain(self._settled(trials, body, later), self._settled(later, body)):
                    file.write(json.dumps([change.name, *verdict]) + "\n")
                    file.flush()
                    accusers[verdict.by] = None
                # What they noticed could be this tool: they are asked about a change that changes nothing.
                innocent = [name for name in accusers if name]
                while innocent:
                    ((_, verdict),) = self._settled([trials[0].unchanged(innocent)], body)
                    if not verdict.noticed:
                        break
                    file.write(json.dumps(["", *verdict]) + "\n")
                    innocent = [name for name in innocent if name != verdict.by]

        results.touch()
        files = files_to_record(TESTS)
        child = Child(self._place / "session", None, lambda: collect(record, files, hunt))
        try:
            with results.open(encoding="utf-8") as file:
                ended = None
                while ended is None:
                    ended = child.ended()
                    time.sleep(0.2)
                    for line in file:
                        name, *verdict = json.loads(line)
                        if name:
                            self._note(by_name[name], Verdict(*verdict))
                        else:
                            self._forget(Verdict(*verdict))
        finally:
            child.end()
        if ended:
            print(child.output.read_text()[-2000:])
            sys.exit(f"the tests could not be collected ({ended})")

    def _settled(
        self, trials: list[Trial], body: Body, later: list[Trial] | None = None
    ) -> Iterator[tuple[Change, Verdict]]:
        """Yield each verdict when it is there. Those that this body cannot make are left out.

        With ``later``, those whose first tests notice nothing are put there.
        """
        waiting, running = deque(trials), dict[Path, Trial]()
        places = [self._place / f"{os.getpid()}-{number}" for number in range(self._jobs)]
        try:
            while waiting or running:
                for free in [each for each in places if each not in running][: len(waiting)]:
                    running[free] = waiting.popleft()
                time.sleep(0.005)
                for where, trial in list(running.items()):
                    seen = trial.look()
                    if seen is True and later is not None and trial.is_done_with_the_first:
                        later.append(trial)
                        del running[where]
                        continue
                    if seen is True:
                        seen = trial.begin(where, body) or False
                    if isinstance(seen, Verdict):
                        del running[where]
                        if seen.how != "unsuitable":
                            yield trial.change, seen
        finally:
            for trial in running.values():
                trial.stop()

    def _forget(self, accuser: Verdict) -> None:
        """Believe nothing that was noticed by a test which fails without any change too."""
        print(f"  {accuser.by} fails here though nothing is changed ({accuser.how})", flush=True)
        for name, verdict in self.verdicts.items():
            if verdict.by == accuser.by:
                self.verdicts[name] = Verdict(noticed=False, how="doubtful", by=verdict.by)
                self._memory.pop(f"of {name}", None)

    def _note(self, change: Change, verdict: Verdict) -> None:
        self.verdicts[change.name] = verdict
        self._asked.remember(change, verdict, self._memory)
        if not verdict.noticed:
            print(f"  {verdict.how}: {change.module}:{change.line} {change.name}", flush=True)
        if len(self.verdicts) % 100 == 0:
            print(f"  {len(self.verdicts)} done", flush=True)
            MEMORY.write_text(json.dumps(self._memory))


class Asked:
    """Which tests are asked about a change, and what was remembered of their answers."""

    def __init__(self, record: Record) -> None:
        self._record = record
        shared = [*(TESTS / "support").glob("*.py"), *TESTS.glob("conftest.py"), ROOT / "conftest.py"]
        self._shared = hash_of(shared)
        self._files = {path.name: hash_of([path]) for path in TESTS.glob("test_*.py")}

    def rounds(self, change: Change, memory: dict[str, object]) -> list[list[str]]:
        """Return the test that noticed it last, then those of the module's own file, then the others."""
        who = self._record.who_may_notice(change.module, change.lines)
        last = str(memory.get(f"by {change.name}", ""))
        named = f"tests/test_{change.module.removeprefix('_').removesuffix('.py')}.py::"
        own = [name for name in who if name.startswith(named) and name != last]
        others = [name for name in who if not name.startswith(named) and name != last]
        return [[last, *own] if last in who else own, others]

    def _key(self, change: Change, tests: Iterable[str]) -> str:
        files = sorted({name.partition("::")[0].removeprefix("tests/") for name in tests})
        marks = [self._files.get(file, "") for file in files]
        return sha256(repr((change.source, self._shared, files, marks)).encode()).hexdigest()[:24]

    def remembered(self, change: Change, memory: dict[str, object]) -> Verdict | None:
        """Return what was found, if neither the function nor the tests in question have changed since."""
        found = memory.get(f"of {change.name}")
        if not isinstance(found, list):
            return None
        key, noticed, how, by = found
        tests = [by] if noticed and by else self._record.who_may_notice(change.module, change.lines)
        return Verdict(noticed, how, by) if self._key(change, tests) == key else None

    def remember(self, change: Change, verdict: Verdict, memory: dict[str, object]) -> None:
        """Keep a verdict for the next run."""
        tests = (
            [verdict.by]
            if verdict.noticed and verdict.by
            else self._record.who_may_notice(change.module, change.lines)
        )
        memory[f"of {change.name}"] = [self._key(change, tests), *verdict]
        if verdict.by:
            memory[f"by {change.name}"] = verdict.by


def report(changes: list[Change], verdicts: dict[str, Verdict], known: Known, *, partial: bool) -> int:
    """Print the score and what was not noticed. Returns the exit code."""
    unnoticed = [change for change in changes if not verdicts[change.name].noticed]
    equivalent = [change for change in unnoticed if known.kind(change.name) == "equivalent"]
    counted = len(changes) - len(equivalent)
    noticed = len(changes) - len(unnoticed)
    score = noticed / counted if counted else 1.0
    hung = sum(verdict.how == "hung" for verdict in verdicts.values())
    print(f"\nnoticed: {noticed} of {counted} ({score:.1%}), {hung} of them since a test hung;")
    print(f"{len(equivalent)} more make no difference (known.txt)")
    by_module = Counter(change.module for change in changes)
    missed = Counter(change.module for change in unnoticed if change not in equivalent)
    for module, total in by_module.items():
        print(f"  {module:20} {total:5} changes {missed[module]:4} not noticed")
    for change in unnoticed:
        if change not in equivalent:
            reason = known.reason(change.name) or "WHY IS NOT KNOWN"
            print(f"{change.module}:{change.line} {change.name}\n    {reason}")
    names = {change.name for change in changes}
    stale = [] if partial else [name for name in known.names if name not in names]
    stale += [name for name in known.names if name in verdicts and verdicts[name].noticed]
    for name in stale:
        print(f"known.txt: {name} is noticed now, or is no change any more: leave it out")
    if score < ENOUGH:
        print(f"less than {ENOUGH:.0%}")
    return int(score < ENOUGH or bool(stale))


def hash_of(paths: Iterable[Path]) -> str:
    """Return a hash of what files hold."""
    made = sha256()
    for path in sorted(paths):
        if path.is_file() and path.suffix != ".pyc":
            made.update(f"{path.name} ".encode() + sha256(path.read_bytes()).digest())
    return made.hexdigest()[:24]


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
