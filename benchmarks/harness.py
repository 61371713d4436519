"""What every benchmark shares: interleaved rounds, figures with goals, a table, and a JSON file with the machine.

Machines are noisy, so nothing is compared across runs: the subjects of a comparison take turns, A B A B, and
the figure is the median of the ratios of neighbouring rounds, with the quartiles beside it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

from .plots import Plot

RESULTS: Final = Path(__file__).with_name("results")

_T = TypeVar("_T")

Loop = Callable[[int], float]
"""Does the work so many times, and gives the nanoseconds that one took."""


@dataclass(frozen=True)
class Figure:
    """One line of a table. Without a goal it is only reported.

    ``spread``: the quartiles of the rounds, unless ``note`` says otherwise. ``note`` says what the figure is;
    ``reason``, one sentence with its measurement, why it misses its goal: shown only where it does.
    """

    name: str
    value: float
    unit: str = "x"
    goal: float | None = None
    at_most: bool = True
    spread: tuple[float, float] | None = None
    note: str = ""
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        met = self.value <= self.goal if self.at_most else self.value >= self.goal
        return "reached" if met else "MISSED"

    @property
    def goal_text(self) -> str:
        return "" if self.goal is None else f"{'<=' if self.at_most else '>='} {self.goal:g}"

    @property
    def value_text(self) -> str:
        return f"{number(self.value)} {self.unit}".strip()

    @property
    def remark(self) -> str:
        reason = self.reason if self.verdict == "MISSED" else ""
        return "; ".join(part for part in (self.note, reason) if part)

    @property
    def spread_text(self) -> str:
        return "" if self.spread is None else f"{number(self.spread[0])} - {number(self.spread[1])}"


@dataclass
class Result:
    """What a benchmark found.

    ``left_out`` names what could not be measured here, and why. ``versions`` are those of what is compared with.
    ``scale`` and ``seconds`` say how it was run: at 1 the figures are those to quote.
    """

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0
    seconds: float = 0.0

    def add(
        self, name: str, value: float, unit: str = "x", **more: Any
    ) -> None:  # Any: the fields of `Figure`
        self.figures.append(Figure(name, value, unit, **more))

    def times(self, rounds: Mapping[str, Sequence[float]]) -> None:
        """Report the absolute time of each subject."""
        for name, values in rounds.items():
            self.add(name, statistics.median(values), "ns", spread=quartiles(values))

    @property
    def missed(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.verdict == "MISSED"]


def number(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def installed(package: str) -> str:
    """Give a distribution's version, or say that it is not here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def looped(call: Callable[..., object], *arguments: object) -> Loop:
    """Time a plain call."""

    def loop(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            call(*arguments)
        return (time.perf_counter_ns() - begin) / count

    return loop


def driven(call: Callable[[], Coroutine[Any, Any, object]]) -> Loop:
    """Time a coroutine that never really waits, without an event loop's own cost."""

    def loop(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            try:
                call().send(None)
            except StopIteration:
                continue
            raise RuntimeError("the coroutine waits for something, so its time would mean nothing")
        return (time.perf_counter_ns() - begin) / count

    return loop


def interleave(subjects: Mapping[str, Loop], *, rounds: int, count: int) -> dict[str, list[float]]:
    """Give the nanoseconds a call took in each round; the subjects take turns, and begin at another one each time.

    A round is best shorter than a millisecond: on a busy machine a longer one is seldom left alone, and those of the
    slower subject more seldom than those of the faster.
    """
    found: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for loop in subjects.values():
        loop(max(1, count // 10))  # caches filled, code specialised
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                found[name].append(subjects[name](count))
    finally:
        gc.enable()
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4)
    return lower, upper


def resampled(
    pairs: Sequence[_T], figure: Callable[[Sequence[_T]], float], *, times: int = 400
) -> tuple[float, float]:
    """Give the bounds that hold the figure in nine of ten resamplings of the rounds (bootstrap)."""
    draws = random.Random(0)  # the same rounds give the same bounds
    found = sorted(figure(draws.choices(pairs, k=len(pairs))) for _ in range(times))
    return found[times // 20], found[-1 - times // 20]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Give the ratio of each pair of neighbouring rounds."""
    return [a / b for a, b in zip(above, below, strict=True)]


def compared(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:  # Any: the fields of `Figure`
    """Give the median ratio and its quartiles, as arguments of `Result.add`."""
    found = ratios(above, below)
    return {"value": statistics.median(found), "spread": quartiles(found)}


@contextmanager
def on_cores(*, last: bool) -> Iterator[None]:
    """Keep this thread, and processes it starts meanwhile, on the last core or on all others.

    So a load generator and what it loads do not take turns on one core. Nothing where there is one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[-1:] if last else cores[:-1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def machine() -> dict[str, str | int]:
    """Describe where this ran: no names of hosts, no paths."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def show(result: Result) -> None:
    """Print the table."""
    print(f"\n{result.title}")
    for figure in result.figures:
        print(
            f"  {figure.name:58} {figure.value_text:>16}  {figure.spread_text:>19}  {figure.goal_text:>8}  "
            f"{figure.verdict:8}{figure.remark}".rstrip()
        )
    for line in result.left_out:
        print(f"  not measured: {line}")


def write(result: Result, folder: Path = RESULTS) -> Path:
    """Write the JSON file: summaries, rounded to what they are worth."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{result.name}.json"
    content = rounded({"machine": machine(), **asdict(result)})
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def rounded(content: Any) -> Any:  # Any: whatever JSON can hold
    """Give the same with five digits of each fraction."""
    if isinstance(content, float):
        return float(f"{content:.5g}")
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [rounded(value) for value in content]
    return content


def load(path: Path) -> tuple[dict[str, str | int], Result]:
    """Read a file that `write` made."""
    found = json.loads(path.read_text(encoding="utf-8"))
    described = found.pop("machine")
    figures = [
        Figure(**{**line, "spread": tuple(line["spread"]) if line["spread"] else None})
        for line in found.pop("figures")
    ]
    plots = [Plot.of(drawn) for drawn in found.pop("plots")]
    return described, Result(figures=figures, plots=plots, **found)
