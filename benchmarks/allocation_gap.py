"""How far the allocation heuristic is from the optimum: python -m benchmarks.allocation_gap --json OUT

200 instances: tasks with the device counts of Philly 2017 and the speeds of the published Gavel throughput table (v100, p100, k80), bids drawn by seed; load at
least 1.5 times the capacity in wanted devices, gangs up to half of it.  Half of the tasks have the size of any row (93 % ask for one device), half any size
that is in the trace, so that there are gangs of 16 to 64.  The table ends at 8 devices: more run at its rate for 8 times (devices / 8) to the
power 0.85.  The optimum is the mixed-integer program to a gap of 1e-4; what is measured is the heuristic alone, and
`adjust`, which takes its place on boards of more than 64 tasks: filling an empty board at once, and when tasks come one by one and those
that run keep their chip class, at the last of them (the optimum is that of the same situation).
"""

import csv
import gzip
import random
from typing import Any

import pyarrow.parquet as parquet

from benchmarks.form import Figure, arguments, data_folder, write
from qipan.scheduler.adjust import adjust
from qipan.scheduler.allocate import Bidder, Candidate, allocate

CHIPS = {"v100": 32, "p100": 32, "k80": 64}
TABLE_ENDS, SCALING = 8, 0.85


def main() -> None:
    given = arguments("allocation_gap", instances=200)
    data = data_folder(
        given.data,
        "Philly 2017 (msr-fiddle/philly-traces) and Gavel's throughputs (stanford-futuredata/gavel)",
    )
    speeds, sizes = (
        throughputs(data / "reference/throughputs/gavel_isolated.csv.gz"),
        philly(data / "traces/training/philly_2017.parquet"),
    )
    rows: list[dict[str, Any]] = []
    for seed in range(given.instances):
        bidders = instance(random.Random(seed), speeds, sizes)
        best = allocate(bidders, CHIPS, exact_up_to=10**9)
        found = allocate(bidders, CHIPS, exact_up_to=0)
        value, optimum = worth(bidders, found.chosen), worth(bidders, best.chosen)
        rows.append(
            {
                "seed": seed, "tasks": len(bidders), "method": best.method, "gap": max(0.0, 1 - value / optimum),
                "adjust_gap": max(0.0, 1 - worth(bidders, adjust(bidders, CHIPS)) / optimum),
                "one_by_one_gap": one_by_one_gap(bidders),
                "largest_gang": max(count for one in bidders for each in one.candidates for _, count in each.needs),
            }
        )  # fmt: skip
    gaps = [row["gap"] for row in rows if row["method"] == "exact"]
    adjusted = [row["adjust_gap"] for row in rows if row["method"] == "exact"]
    one_by_one = [row["one_by_one_gap"] for row in rows]
    figures = [
        Figure("gap_mean", sum(gaps) / len(gaps), "share", "<= 0.02"),
        Figure("gap_worst", max(gaps), "share", "<= 0.06"),
        Figure("adjust_gap_mean", sum(adjusted) / len(adjusted), "share", "<= 0.02"),
        Figure("adjust_gap_worst", max(adjusted), "share", "<= 0.06"),
        Figure("adjust_one_by_one_gap_mean", sum(one_by_one) / len(one_by_one), "share", "<= 0.02"),
        Figure("adjust_one_by_one_gap_worst", max(one_by_one), "share", "<= 0.06"),
        Figure("largest_gang_share", max(row["largest_gang"] for row in rows) / sum(CHIPS.values()), "share"),
        Figure("instances", float(len(gaps)), "count", ">= 200"),
    ]
    write(given.json, figures, rows, capacity=CHIPS, load=1.5)


def throughputs(path: Any) -> dict[str, dict[tuple[str, int], float]]:
    """model -> (chip, devices) -> steps/s."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            if (
                row["accelerator_type"] in CHIPS
                and row["source"].startswith("simulation")
                and row["steps_per_s"]
            ):
                model = f"{row['model']} {row['batch_size']}"
                key = (row["accelerator_type"], int(row["scale_factor"]))
                rate = float(row["steps_per_s"])
                found.setdefault(model, {})[key] = max(rate, found.get(model, {}).get(key, 0.0))
    return {
        model: rates for model, rates in sorted(found.items()) if any(rate > 0 for rate in rates.values())
    }


def philly(path: Any) -> list[int]:
    return [
        int(count)
        for count in parquet.read_table(path, columns=["num_accelerators"])["num_accelerators"].to_pylist()
    ]


def instance(
    rng: random.Random, speeds: dict[str, dict[tuple[str, int], float]], sizes: list[int]
) -> list[Bidder]:
    kinds = sorted({size for size in sizes if size <= sum(CHIPS.values()) // 2})
    bidders: list[Bidder] = []
    wanted = 0
    while wanted < 1.5 * sum(CHIPS.values()):
        model = rng.choice(sorted(speeds))
        most = rng.choice(kinds if rng.random() < 0.5 else sizes)
        elastic = rng.random() < 0.6
        rates = {key: rate for key, rate in extended(speeds[model], kinds).items() if key[1] <= most}
        if not elastic:
            largest = max((key[1] for key in rates), default=0)
            rates = {key: rate for key, rate in rates.items() if key[1] == largest}
        if not rates or most > sum(CHIPS.values()) // 2:
            continue
        bid, best = rng.uniform(1, 10), max(rates.values())
        candidates = tuple(
            Candidate(f"{chip}:{count}", ((chip, count),), bid * most * rate / best)
            for (chip, count), rate in sorted(rates.items())
        )
        bidders.append(Bidder(f"t{len(bidders):03d}", candidates))
        wanted += max(count for _, count in rates)
    return bidders


def one_by_one_gap(bidders: list[Bidder]) -> float:
    """Of the last choice when they come in turn, each running one bidding for the chip class it holds."""
    chosen: dict[str, str] = {}
    for count in range(1, len(bidders) + 1):
        bids = [held_to_its_class(bidder, chosen.get(bidder.task_id)) for bidder in bidders[:count]]
        chosen = adjust(bids, CHIPS)
    best = allocate(bids, CHIPS, exact_up_to=10**9)
    return max(0.0, 1 - worth(bids, chosen) / worth(bids, best.chosen))


def held_to_its_class(bidder: Bidder, point_id: str | None) -> Bidder:
    own = [one.needs[0][0] for one in bidder.candidates if one.point_id == point_id]
    kept = tuple(one for one in bidder.candidates if not own or one.needs[0][0] == own[0])
    return Bidder(bidder.task_id, kept, point_id)


def extended(rates: dict[tuple[str, int], float], counts: list[int]) -> dict[tuple[str, int], float]:
    """The measured rates, and by the rule those of larger counts that fit a class."""
    found = {key: rate for key, rate in rates.items() if rate > 0}
    for chip, devices in CHIPS.items():
        last = found.get((chip, TABLE_ENDS))
        if last is not None:
            more = [count for count in counts if TABLE_ENDS < count <= devices]
            found.update({(chip, count): last * (count / TABLE_ENDS) ** SCALING for count in more})
    return found


def worth(bidders: list[Bidder], chosen: dict[str, str]) -> float:
    value = {(bidder.task_id, one.point_id): one.value for bidder in bidders for one in bidder.candidates}
    return sum(value[item] for item in chosen.items())


if __name__ == "__main__":
    main()
