"""`make bench-report`: writes docs/performance.md and its plots from what the benchmarks wrote into results/.

Nothing in the page is written by hand: words about a figure stand beside its benchmark's definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from .__main__ import NAMES
from .goals import ROWS, Row, answers, verdict
from .harness import RESULTS, Figure, Result, load
from .plots import svg

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
Machine = Mapping[str, str | int]

INTRODUCTION: Final = """\
# Performance

<!-- Written by `make bench-report` from benchmarks/results/*.json. Change the benchmark, not this page. -->

`make bench` measures everything below and `make bench-report` writes this page; `make bench-NAME` measures one
part. Machines are noisy, so what is compared is measured in one process, or side by side, in turns (A B A B): a
ratio is the median of neighbouring rounds, its spread their quartiles. Absolute times hold for the machine named
beside them.
A goal that is missed is printed as missed, with the reason.
"""


def main() -> int:
    found = {path.stem: load(path) for path in sorted(RESULTS.glob("*.json"))}
    write_page(PAGE, found)
    missed = [row.what for row in ROWS if verdict(row, answers(row, _results(found))) == "MISSED"]
    print(f"{PAGE.name}: {len(found)} benchmarks; goals missed: {len(missed)} of {len(ROWS)}")
    return 0


def write_page(page: Path, found: Mapping[str, tuple[Machine, Result]]) -> None:
    """Write the page, and its plots into a folder of the same name; plots of former runs go."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for _, result in found.values():
        for plot in result.plots:
            (folder / f"{plot.name}.svg").write_text(svg(plot), encoding="utf-8")
    page.write_text("\n".join(_lines(found, folder.name)), encoding="utf-8")


def _results(found: Mapping[str, tuple[Machine, Result]]) -> dict[str, Result]:
    return {name: result for name, (_, result) in found.items()}


def _lines(found: Mapping[str, tuple[Machine, Result]], folder: str) -> Iterator[str]:
    yield INTRODUCTION
    yield from _goals(_results(found))
    for name in sorted(found, key=_order):
        yield from _section(*found[name], folder)


def _order(name: str) -> tuple[int, str]:
    return (NAMES.index(name) if name in NAMES else len(NAMES), name)


def _goals(results: Mapping[str, Result]) -> Iterator[str]:
    yield "## Goals\n"
    yield from _head("what", "goal", "reached", "spread", "", "by")
    for row in ROWS:
        yield _goal(row, answers(row, results))
    yield ""


def _goal(row: Row, figures: list[Figure]) -> str:
    several = len(figures) > 1
    values = [
        f"{_label(figure, row)}{figure.value_text}" if several else figure.value_text for figure in figures
    ]
    spreads = [figure.spread_text for figure in figures]
    reasons = dict.fromkeys(
        figure.reason for figure in figures if figure.verdict == "MISSED" and figure.reason
    )
    judged = " ".join([f"**{word}**" if (word := verdict(row, figures)) == "MISSED" else word, *reasons])
    return _row(
        row.what,
        row.reach,
        "<br>".join(values),
        "<br>".join(spreads),
        judged,
        f"`{row.command}`",
    )


def _label(figure: Figure, row: Row) -> str:
    """Give what tells a figure from the others of its row: its name, less what they all begin with."""
    shared = row.figures[0] if len(row.figures) == 1 else ""
    return f"{figure.name.removeprefix(shared).strip(' ,:')}: "


def _section(machine: Machine, result: Result, folder: str) -> Iterator[str]:
    yield f"## {result.name}\n\n{result.title}.\n"
    scale = "" if result.scale == 1 else f" ARGS='--scale {result.scale:g}'"
    # One command for the table below, and how long it took here.
    yield f"```sh\nmake bench-{result.name}{scale}  # {result.seconds:.0f} s here\n```\n"
    if scale:
        yield f"A short run at scale {result.scale:g}, with more noise than a whole one.\n"
    yield f"{described(machine)}\n"
    if result.versions:
        yield (
            "Versions: " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".\n"
        )
    yield from _table(result)
    for plot in result.plots:
        yield f"![{plot.title}]({folder}/{plot.name}.svg)\n"
    for line in result.left_out:
        yield f"Not measured: {line}.\n"


def described(machine: Machine) -> str:
    """Say where and when it was measured, and whether the machine had time for it."""
    busy = float(machine["load"]) > float(machine["cores"])
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['python']}, "
        f"{machine['date']}, commit {machine['commit']}, load average {machine['load']}"
        f"{': it had others to serve, so times are too long and spreads too wide.' if busy else '.'}"
    )


def _table(result: Result) -> Iterator[str]:
    judged = any(figure.goal is not None for figure in result.figures)
    yield from _head("figure", "value", "spread", *(("goal", "", "") if judged else ("",)))
    for figure in result.figures:
        verdict_ = {"MISSED": "**MISSED**", "reached": "met"}.get(figure.verdict, "")
        cells = (figure.goal_text, verdict_, figure.remark) if judged else (figure.remark,)
        yield _row(figure.name.strip(), figure.value_text, figure.spread_text, *cells)
    yield ""


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
