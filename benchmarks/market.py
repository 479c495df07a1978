"""What a clearing costs, and what a trader gains by not saying its true limit: python -m benchmarks.market --json OUT

Absolute times are CPU seconds, median of 5; the floor is sorting the same limits twice with NumPy.  A combined clearing (substitutes,
gangs, blocks over 12 products) is beside its greedy form, in time and in value.  The gain of shading is what a buyer gets more by the best
of 19 false limits, as a share of what it gets by the true one, when everybody else says the truth; mean over buyers that trade."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.form import Figure, arguments, write
from qipan.market import Bid, clear, combined
from qipan.market.combined import Option, Supply, Want, clear_combined


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
    for name, count in (("lp_1e3_cpu_s", 1000), ("lp_1e4_cpu_s", 10_000)):
        wants, supplies = combined_book(count)
        clear_combined(wants[:5], supplies[:5], "seed")  # SciPy is loaded
        took, greedy = (
            cpu_s(partial(clear_combined, wants, supplies, "seed")),
            cpu_s(partial(combined._greedy, wants, supplies)),
        )
        exact = clear_combined(wants, supplies, "seed")
        share = combined._greedy(wants, supplies).value_micro_cny / exact.value_micro_cny
        figures.append(Figure(name, took, "CPU s"))
        rows.append(
            {
                "orders": count,
                "cpu_s": took,
                "greedy_cpu_s": greedy,
                "greedy_value_share": share,
                "left_out": len(exact.refused),
            }
        )
    for count, sample in ((20, 400), (200, 100), (2000, 30)):
        mean, worst = shading_gain(count, sample)
        figures.append(Figure(f"shading_gain_{count}", mean, "share of the truthful gain"))
        rows.append({"orders": count, "buyers": sample, "shading_gain_mean": mean, "shading_gain_p95": worst})
    write(given.json, figures, rows, prices="uniform from 0.1 to 20 CNY")


def shading_gain(count: int, sample: int) -> tuple[float, float]:
    """(mean, 95th percentile) over `sample` buyers that trade, each of a book of its own."""
    gains: list[float] = []
    seed = 0
    while len(gains) < sample:
        seed += 1
        book = make_book(count, seed)
        filled = {fill.order_id: fill.devices for fill in clear(book, "seed").fills}
        mine = next((i for i, bid in enumerate(book) if bid.side == "buy" and bid.order_id in filled), None)
        if mine is None:
            continue
        truth = book[mine]
        honest = gain_of(book, truth)
        if honest <= 0:
            continue
        best = honest
        for share in range(5, 100, 5):
            book[mine] = replace(truth, limit_micro_cny=truth.limit_micro_cny * share // 100)
            best = max(best, gain_of(book, truth))
        gains.append(best / honest - 1)
    return statistics.fmean(gains), sorted(gains)[int(len(gains) * 0.95)]


def gain_of(book: list[Bid], truth: Bid) -> int:
    clearing = clear(book, "seed")
    devices = next((fill.devices for fill in clearing.fills if fill.order_id == truth.order_id), 0)
    return devices * (truth.limit_micro_cny - clearing.buy_price_micro_cny)


def combined_book(count: int) -> tuple[list[Want], list[Supply]]:
    """Half supply (a tenth of it blocks), a third divisible wants of up to 4 substitutes, the rest gangs over up to 2 products."""
    rng = random.Random(count)
    products = [f"chip{i}@zone{j}" for i in range(4) for j in range(3)]
    wants: list[Want] = []
    supplies: list[Supply] = []
    for i in range(count):
        dice, limit = rng.random(), rng.randint(1_000_000, 20_000_000)
        if dice < 0.5:
            supplies.append(Supply(f"s{i}", rng.choice(products), rng.randint(1, 64), rng.randint(500_000, 12_000_000), rng.random() < 0.1))  # fmt: skip
        elif dice < 0.85:
            devices = rng.randint(1, 32)
            chosen = rng.sample(products, rng.randint(1, 4))
            wants.append(Want(f"w{i}", tuple(Option(((name, devices),), round(limit * rng.uniform(0.7, 1.3))) for name in chosen)))  # fmt: skip
        else:
            parts = tuple((name, rng.randint(4, 64)) for name in rng.sample(products, rng.randint(1, 2)))
            wants.append(Want(f"w{i}", (Option(parts, limit * sum(devices for _, devices in parts)),), gang=True))  # fmt: skip
    return wants, supplies


def make_book(count: int, seed: int | None = None) -> list[Bid]:
    rng = random.Random(count if seed is None else f"{count}/{seed}")
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
