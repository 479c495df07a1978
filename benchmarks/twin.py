"""What the twin costs: python -m benchmarks.twin --json OUT

A day of 200 tasks on four data centres, and the floor: the same number of ticks of `decide` on an empty board.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.form import Figure, arguments, write
from qipan.hardware import BoardId
from qipan.scheduler import Moment, State, decide
from qipan.twin.scenario import run_scenario


def main() -> None:
    given = arguments("twin", runs=5)
    rows: list[dict[str, Any]] = []
    for seed in range(given.runs):
        began_s = time.process_time()
        figures = run_scenario(Path("examples/day.yaml"), seed)["figures"]
        took_s = time.process_time() - began_s
        rows.append({"seed": seed, "cpu_s": took_s, "floor_cpu_s": floor_s(figures["ticks"]), **figures})
    figures_out = [
        Figure("day_cpu_s", statistics.median(row["cpu_s"] for row in rows), "CPU s"),
        Figure("day_floor_cpu_s", statistics.median(row["floor_cpu_s"] for row in rows), "CPU s"),
        Figure(
            "tick_cpu_ms", statistics.median(1000 * row["cpu_s"] / row["ticks"] for row in rows), "CPU ms"
        ),
        Figure("done_share_least", min(row["done"] / row["tasks"] for row in rows), "share", ">= 1"),
    ]
    write(given.json, figures_out, rows, scenario="examples/day.yaml")


def floor_s(ticks: int) -> float:
    state = State(BoardId("empty"))
    began_s = time.process_time()
    for i in range(ticks):
        decide(state, (), Moment(float(i), float(i)))
    return time.process_time() - began_s


if __name__ == "__main__":
    main()
