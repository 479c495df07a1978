"""Hubs where they stand: degrees are the lines of a board, a hub is a square on it, a task a stone beside its hub."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 640
MARGIN = 80
STEPS = (1, 2, 5, 10, 20, 30)
LABEL = 60  # units between two labels of degrees
SPAN_MIN = 6.0  # degrees: one hub alone is not a world
STONES_MAX = 24


@dataclass(frozen=True, slots=True)
class Hub:
    """`leased` and `busy` as shares of its devices."""

    board: str
    region: str
    x: float
    y: float
    radius: float
    devices: int
    leased: float
    busy: float


@dataclass(frozen=True, slots=True)
class Mover:
    """A task at one of its hubs."""

    task_id: str
    number: int
    colour: str
    x: float
    y: float
    devices: int


@dataclass(frozen=True, slots=True)
class Way:
    """A link between two hubs."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Map:
    width: int
    height: int
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    ways: tuple[Way, ...]
    hubs: tuple[Hub, ...]
    movers: tuple[Mover, ...]


def world(
    boards: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, int],
    colours: Mapping[str, str],
) -> Map | None:
    """None when no board says where it stands."""
    placed = [board for board in boards if board["longitude"] is not None and board["latitude"] is not None]
    if not placed:
        return None
    west, east = _span([board["longitude"] for board in placed])
    south, north = _span([board["latitude"] for board in placed])
    narrow = math.cos(math.radians((south + north) / 2))
    scale = (WIDTH - 2 * MARGIN) / ((east - west) * narrow)
    scale = min(scale, 340 / (north - south))
    left = (WIDTH - (east - west) * narrow * scale) / 2
    height = round((north - south) * scale + 2 * MARGIN)

    def x_of(longitude: float) -> float:
        return round(left + (longitude - west) * narrow * scale, 1)

    def y_of(latitude: float) -> float:
        return round(MARGIN + (north - latitude) * scale, 1)

    step = next((step for step in STEPS if step * narrow * scale >= LABEL), STEPS[-1])
    most = max(sum(pool["devices"] for pool in board["pools"]) for board in placed) or 1
    hubs, movers = [], []
    for board in placed:
        x, y = x_of(board["longitude"]), y_of(board["latitude"])
        devices = sum(pool["devices"] for pool in board["pools"])
        free = sum(pool["free"] for pool in board["pools"])
        busy = sum(pool["busy"] for pool in board["pools"])
        radius = round(12 + 16 * math.sqrt(devices / most), 1)
        share = max(1, devices)
        hubs.append(
            Hub(
                board["board"], board["region"], x, y, radius, devices, (devices - free) / share, busy / share
            )
        )
        movers += _around(board, x, y, radius, numbers, colours)
    at = {hub.board: hub for hub in hubs}
    ways = [
        Way(
            f"{link['between'][0]}-{link['between'][1]}",
            at[link["between"][0]].x, at[link["between"][0]].y, at[link["between"][1]].x, at[link["between"][1]].y,
            link["bytes_per_s"], link["latency_s"],
        )
        for link in links
        if link["between"][0] in at and link["between"][1] in at and link["between"][0] < link["between"][1]
    ]  # fmt: skip
    columns = tuple(
        (x_of(degree), f"{abs(degree)}°{'E' if degree >= 0 else 'W'}")
        for degree in _degrees(west, east, step)
    )
    rows = tuple(
        (y_of(degree), f"{abs(degree)}°{'N' if degree >= 0 else 'S'}")
        for degree in _degrees(south, north, step)
    )
    return Map(WIDTH, height, columns, rows, tuple(ways), tuple(hubs), tuple(movers))


def _around(
    board: Mapping[str, Any],
    x: float,
    y: float,
    radius: float,
    numbers: Mapping[str, int],
    colours: Mapping[str, str],
) -> list[Mover]:
    held: dict[str, tuple[str, int]] = {}
    for pool in board["pools"]:
        for holder in pool["holders"]:
            if holder["task_id"] in numbers:
                before = held.get(holder["task_id"], ("", 0))[1]
                held[holder["task_id"]] = (holder["tenant"], before + holder["devices"])
    found = []
    for place, (task_id, (tenant, devices)) in enumerate(
        sorted(held.items(), key=lambda one: numbers[one[0]])
    ):
        if place >= STONES_MAX:
            break
        turn = math.tau * (place / max(8, min(len(held), STONES_MAX))) - math.pi / 2
        far = radius + 13
        found.append(
            Mover(
                task_id, numbers[task_id], colours.get(tenant, "black"), round(x + far * math.cos(turn), 1),
                round(y + far * math.sin(turn), 1), devices,
            )
        )  # fmt: skip
    return found


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    more = max(SPAN_MIN - (high - low), (high - low) * 0.1) / 2
    return low - more, high + more


def _degrees(low: float, high: float, step: int) -> list[int]:
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def _name(degree: int, step: int, sides: str) -> str:
    """Every second line has a name."""
    return "" if degree // step % 2 else f"{abs(degree)}°{sides[degree < 0]}"
