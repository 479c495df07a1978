"""Where things stand in the pictures: stones on a go board, attempts on a time line.  Pure geometry."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qipan.console.charts import WIDTH, Tick, time_ticks

SIZES = (3, 5, 7, 9, 13, 19)
CELL = 24
STARS = {7: (3,), 9: (2, 4, 6), 13: (3, 6, 9), 19: (3, 9, 15)}
COLOURS = ("black", "white", "jade", "cinnabar")
COLUMNS = "ABCDEFGHJKLMNOPQRST"  # a go board has no I


@dataclass(frozen=True, slots=True)
class Stone:
    """One point of the board that stands for devices.  `task_id` empty: another tenant's, or free when `colour` is."""

    x: int
    y: int
    name: str  # such as D4
    colour: str  # one of COLOURS, or "" when free
    number: int
    task_id: str


@dataclass(frozen=True, slots=True)
class Goban:
    """`lines` x `lines` points; a stone stands for up to `devices_per_point` devices."""

    lines: int
    side: int
    devices_per_point: int
    rows: tuple[int, ...]
    letters: tuple[tuple[int, str], ...]
    stars: tuple[tuple[int, int], ...]
    stones: tuple[Stone, ...]


def goban(pool: Mapping[str, Any], numbers: Mapping[str, int], colours: Mapping[str, str]) -> Goban:
    """A pool as a go board: its devices fill points from the middle outwards, a leased one carries a stone of its
    tenant's colour with its task's number."""
    devices = int(pool["devices"])
    per_point = max(1, math.ceil(devices / SIZES[-1] ** 2))
    points = math.ceil(devices / per_point)
    lines = next(size for size in SIZES if size * size >= points)
    held = [
        (colours.get(holder["tenant"], "black"), numbers.get(holder["task_id"], 0), holder["task_id"])
        for holder in pool["holders"]
        for _ in range(math.ceil(holder["devices"] / per_point))
    ]
    stones = []
    for (column, row), (colour, number, task_id) in zip(
        outwards(lines)[:points], itertools.chain(held, itertools.repeat(("", 0, ""))), strict=False
    ):
        name = f"{COLUMNS[column]}{lines - row}"
        stones.append(Stone((column + 1) * CELL, (row + 1) * CELL, name, colour, number, task_id))
    places = tuple((number + 1) * CELL for number in range(lines))
    stars = [(places[x], places[y]) for x in STARS.get(lines, ()) for y in STARS.get(lines, ())]
    letters = tuple(zip(places, COLUMNS, strict=False))
    return Goban(lines, (lines + 1) * CELL, per_point, places, letters, tuple(stars), tuple(stones))


def outwards(lines: int) -> list[tuple[int, int]]:
    """All points, the middle first; ties clockwise from the top."""
    middle = (lines - 1) / 2

    def far(point: tuple[int, int]) -> tuple[float, float]:
        dx, dy = point[0] - middle, point[1] - middle
        return max(abs(dx), abs(dy)), math.atan2(dx, -dy) % math.tau

    return sorted(((x, y) for y in range(lines) for x in range(lines)), key=far)


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt on the time line; `lane` is its place's row."""

    attempt: int
    place: str
    devices: int
    outcome: str  # "" while it runs
    from_s: float
    until_s: float
    x: float
    width: float
    lane: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A row for each site that the task was at; the more devices, the higher its bar."""

    spans: tuple[Span, ...]
    lanes: tuple[tuple[float, str], ...]
    ticks: tuple[Tick, ...]
    height: int


LANE, LABELS = 34, 150


def timeline(events: Sequence[Mapping[str, Any]], now_s: float) -> Timeline | None:
    """The attempts of a task from its facts, from the first start to now or the end."""
    begun: dict[int, tuple[float, str, int]] = {}
    ended: dict[int, tuple[float, str]] = {}
    for event in events:
        fact = event["fact"]
        if event["kind"] == "task_started":
            devices = sum(need["devices"] for need in fact["needs"])
            begun.setdefault(fact["attempt"], (event["at_s"], site_of(fact["place"]), devices))
        elif event["kind"] == "task_exited":
            ended.setdefault(fact["attempt"], (event["at_s"], fact["outcome"]))
    if not begun:
        return None
    first = min(at_s for at_s, _, _ in begun.values())
    last = max(
        [at_s for at_s, _ in ended.values()] + ([now_s] if len(ended) < len(begun) else []) + [first + 1.0]
    )
    places = list(dict.fromkeys(place for _, (_, place, _) in sorted(begun.items())))
    most = max(devices for _, _, devices in begun.values()) or 1
    scale = (WIDTH - LABELS) / (last - first)
    spans = []
    for attempt, (from_s, place, devices) in sorted(begun.items()):
        until_s, outcome = ended.get(attempt, (max(now_s, from_s), ""))
        x, width = LABELS + (from_s - first) * scale, max(3.0, (until_s - from_s) * scale)
        lane, high = places.index(place), round(8 + 20 * devices / most, 1)
        y = lane * LANE + (LANE - high) / 2
        spans.append(
            Span(
                attempt,
                place,
                devices,
                outcome,
                from_s,
                until_s,
                round(x, 1),
                round(width, 1),
                lane,
                round(y, 1),
                high,
            )
        )
    lanes = tuple((lane * LANE + LANE / 2, place) for lane, place in enumerate(places))
    return Timeline(tuple(spans), lanes, time_ticks(first, last, LABELS, WIDTH), len(places) * LANE + 24)


def site_of(place: str) -> str:
    """`east/shanghai/shanghai-local` -> `shanghai`: the board above the engine."""
    parts = place.split("/")
    return parts[-2] if len(parts) > 1 else parts[0]
