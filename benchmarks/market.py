"""What a clearing costs: python -m benchmarks.market --json OUT

Absolute times are CPU seconds, median of 5; the floor is sorting the same limits twice with NumPy."""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.form import Figure, arguments, write
from qipan.market import Bid, clear


def main() -> None:
    given = arguments("market")
    figures, rows = [], []
    for name, count, goal in (
        ("clear_1e5_cpu_s", 100_000, "<= 0.1"),
        ("clear_1e6_cpu_s", 1_000_000, "<= 1.5"),
    ):
        book = make_book(count)
        limits = np.array([bid.limit_micro_cny for bid in book])
        took, floor = (cpu_s(partial(clear, book, "seed")), 2 * cpu_s(partial(np.sort, limits)))
        figures.append(Figure(name, took, "CPU s", goal))
        rows.append({"orders": count, "cpu_s": took, "floor_cpu_s": floor})
    write(given.json, figures, rows, prices="uniform from 0.1 to 20 CNY")


def make_book(count: int) -> list[Bid]:
    rng = random.Random(count)
    return [
        Bid(
            f"o{i}",
            "buy" if rng.random() < 0.5 else "sell",
            rng.randint(1, 64),
            rng.randint(100_000, 20_000_000),
            rng.randint(0, 59),
        )
        for i in range(count)
    ]


def cpu_s(act: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        began_s = time.process_time()
        act()
        times.append(time.process_time() - began_s)
    return statistics.median(times)


if __name__ == "__main__":
    main()
