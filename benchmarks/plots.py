"""Plots as SVG: lines, histograms and bars, without a library, readable on light and on dark pages.

What is drawn is kept in a benchmark's JSON, so that the report is made again from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final, Literal

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 36, 46, 46
BAR: Final = 26
COLORS: Final = ("#2f81c8", "#d9730d", "#2f9e5f", "#b455b8", "#c44343", "#8a8a2a", "#5f7f8f", "#a0694a")
"""Of middling lightness: each stands out from white and from black."""
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}"
    ".grid{stroke:#8884;stroke-width:1}.axis{stroke:#888}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Plot:
    """What to draw. Points are (x, y); those of ``steps`` are the left edges of a histogram's bins and their share.

    ``bars`` have one point each, of which y counts. A ``log`` axis is one whose decades are equally long.
    """

    name: str
    title: str
    kind: Literal["lines", "steps", "bars"]
    x: str = ""
    y: str = ""
    series: dict[str, list[Point]] = field(default_factory=dict)
    log: str = ""  # "x", "y" or "xy"

    @classmethod
    def of(cls, content: dict[str, Any]) -> Plot:  # Any: what `asdict` made, read from JSON
        series = {name: [(x, y) for x, y in points] for name, points in content["series"].items()}
        return cls(**{**content, "series": series})


def histogram(values: Sequence[float], *, bins_a_decade: int = 10, least: float = 0.1) -> list[Point]:
    """Count values in bins of equal length on a logarithmic axis: shares of all, by the bins' left edges.

    What is below ``least``, such as 0, is counted as that.
    """
    places = [math.floor(math.log10(max(value, least)) * bins_a_decade) for value in values]
    return [
        (10 ** (place / bins_a_decade), places.count(place) / len(places))
        for place in range(min(places), max(places) + 2)
    ]


def svg(plot: Plot) -> str:
    """Draw it."""
    draw = _bars if plot.kind == "bars" else _curves
    height = TOP + BAR * len(plot.series) + BOTTOM // 2 if plot.kind == "bars" else HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(plot.title)}"><style>{_STYLE}</style>'
    )
    return "\n".join([head, _text(LEFT, 18, plot.title, extra='class="title"'), *draw(plot), "</svg>", ""])


def _bars(plot: Plot) -> Iterator[str]:
    values = {name: points[0][1] for name, points in plot.series.items()}
    longest = max(values.values()) or 1.0
    begin = 230
    for number, (name, value) in enumerate(values.items()):
        top = TOP - 10 + number * BAR
        width = max(1.0, value / longest * (WIDTH - begin - 110))
        yield _text(begin - 8, top + 14, name, anchor="end")
        yield f'<rect x="{begin}" y="{top}" width="{width:.1f}" height="{BAR - 8}" fill="{COLORS[0]}"/>'
        yield _text(begin + width + 6, top + 14, f"{value:,.3g} {plot.x}".strip())


def _curves(plot: Plot) -> Iterator[str]:
    points = [point for series in plot.series.values() for point in series]
    across = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log="x" in plot.log)
    up = _Axis(
        [*([] if "y" in plot.log else [0.0]), *[y for _, y in points]],
        HEIGHT - BOTTOM,
        TOP,
        log="y" in plot.log,
    )
    yield from _grid(plot, across, up)
    yield from _legend(list(plot.series))
    for number, series in enumerate(plot.series.values()):
        color = _color(number)
        path = (_steps if plot.kind == "steps" else _line)(series, across.place, up.place)
        yield f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        if plot.kind == "lines" and len(series) < 20:
            yield from (
                f'<circle cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="3" fill="{color}"/>'
                for x, y in series
            )


def _legend(names: Sequence[str]) -> Iterator[str]:
    left: float = LEFT
    for number, name in enumerate(names):
        yield f'<rect x="{left:.0f}" y="30" width="10" height="10" fill="{_color(number)}"/>'
        yield _text(left + 15, 39, name)
        left += 34 + 6.5 * len(name)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _line(series: Sequence[Point], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    return "M" + " L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in series)


def _steps(series: Sequence[Point], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    path = f"M{across(series[0][0]):.1f},{up(0):.1f}"
    for (x, y), (after, _) in zip(series, [*series[1:], series[-1]], strict=True):
        path += f" L{across(x):.1f},{up(y):.1f} L{across(after):.1f},{up(y):.1f}"
    return path


class _Axis:
    """Where values lie between two places of the picture."""

    def __init__(self, values: Sequence[float], begin: float, end: float, *, log: bool) -> None:
        self._log = log
        self._begin, self._end = begin, end
        lowest, highest = min(values), max(values)
        self._step = 0.0 if log else _step((highest - lowest) / 5)
        if log:
            lowest, highest = 10 ** math.floor(math.log10(lowest)), 10 ** math.ceil(math.log10(highest))
        else:
            lowest = math.floor(lowest / self._step) * self._step
            highest = math.ceil(highest / self._step) * self._step
        self._lowest, self._highest = lowest, highest if highest > lowest else lowest + 1

    def place(self, value: float) -> float:
        scale = math.log10 if self._log else float
        low, high = scale(self._lowest), scale(self._highest)
        return self._begin + (scale(max(value, self._lowest)) - low) / (high - low) * (
            self._end - self._begin
        )

    def ticks(self) -> list[float]:
        if self._log:
            first, last = round(math.log10(self._lowest)), round(math.log10(self._highest))
            return [10.0**power for power in range(first, last + 1)]
        count = round((self._highest - self._lowest) / self._step)
        return [self._lowest + self._step * number for number in range(count + 1)]


def _step(least: float) -> float:
    """Give the next of 1, 2, 5, 10, 20…: what people count in."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * 0.999)


def _grid(plot: Plot, across: _Axis, up: _Axis) -> Iterator[str]:
    for value in up.ticks():
        at = up.place(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(LEFT - 6, at + 4, _tick(value), anchor="end")
    for value in across.ticks():
        yield _text(across.place(value), HEIGHT - BOTTOM + 16, _tick(value), anchor="middle")
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, plot.x, anchor="middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield _text(14, middle, plot.y, anchor="middle", extra=f'transform="rotate(-90 14 {middle:.0f})"')


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"


def _text(x: float, y: float, words: str, *, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(words)}</text>'
