"""Curves with their axes, and money against its plan.  Pure geometry: a curve in CHART_WIDTH x HEIGHT units."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, CHART_WIDTH, HEIGHT = 960, 640, 150
LEFT, BOTTOM, TOP = 56, 22, 10
POINTS_MAX = 240
NICE = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """`points` as SVG reads them; `marks`: where something happened, from left to right."""

    points: str
    last: float
    high: float
    low: float
    x: float  # of the last point
    y: float
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    marks: tuple[Tick, ...]


def chart(
    values: Sequence[tuple[float, float]], marks: Sequence[tuple[float, str]] = (), *, from_zero: bool = False
) -> Chart | None:
    """(Unix seconds, value) in order of time; None without two finite values.  Thinned to POINTS_MAX, each the
    median of those it stands for, so that one odd value does not become the picture."""
    finite = [(at_s, value) for at_s, value in values if math.isfinite(value) and math.isfinite(at_s)]
    if len(finite) < 2:
        return None
    shown = _thin(finite)
    begin_s, end_s = finite[0][0], max(finite[-1][0], finite[0][0] + 1e-9)
    heights = [value for _, value in shown]
    low, high = (min(0.0, min(heights)) if from_zero else min(heights)), max(heights)
    rows = nice_ticks(low, high)
    low, high = min([low, *rows]), max([high, *rows])
    if low == high:
        low, high = low - 1, high + 1

    def x_of(at_s: float) -> float:
        return round(LEFT + (at_s - begin_s) / (end_s - begin_s) * (CHART_WIDTH - LEFT), 1)

    def y_of(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    return Chart(
        " ".join(f"{x_of(at_s)},{y_of(value)}" for at_s, value in shown),
        finite[-1][1], max(heights), min(heights), x_of(shown[-1][0]), y_of(shown[-1][1]),
        tuple(Tick(y_of(value), f"{value:g}") for value in rows),
        time_ticks(begin_s, end_s, LEFT, CHART_WIDTH, 6),
        tuple(Tick(x_of(at_s), label) for at_s, label in marks if begin_s <= at_s <= end_s),
    )  # fmt: skip


def _thin(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(values) / POINTS_MAX)
    found = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        found.append((part[-1][0], sorted(value for _, value in part)[len(part) // 2]))
    return found


def nice_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    rough = span / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * nice for nice in NICE if size * nice >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


STEPS_S = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86_400, 7 * 86_400)


def time_ticks(begin_s: float, end_s: float, left: float, right: float, most: int = 8) -> tuple[Tick, ...]:
    """At round times of the day."""
    span = end_s - begin_s
    step = next((step for step in STEPS_S if span / step <= most), span / most)
    form = "%m-%d %H:%M" if span > 86_400 else "%H:%M" if step >= 60 else "%H:%M:%S"
    zone_s = time.localtime(begin_s).tm_gmtoff
    first = math.ceil((begin_s + zone_s) / step) * step - zone_s
    count = max(0, math.floor((end_s - first) / step) + 1)
    return tuple(
        Tick(
            round(left + (first + number * step - begin_s) / span * (right - left), 1),
            time.strftime(form, time.localtime(first + number * step)),
        )
        for number in range(count)
        if (first + number * step - begin_s) / span < 0.97  # the label stays inside
    )


@dataclass(frozen=True, slots=True)
class Money:
    """Spent against the plan, on one line of WIDTH: where each stands."""

    spent: float
    p50: float
    p90: float
    hold: float
    over: bool  # more than planned at p90


def money(spent: int, p50: int, p90: int, hold: int) -> Money:
    most = max(spent, p90, hold, 1) * 1.02

    def at(amount: int) -> float:
        return round(amount / most * WIDTH, 1)

    return Money(at(spent), at(p50), at(p90), at(hold), over=spent > p90)
