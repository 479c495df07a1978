"""What each part of the scheduler is worth: python -m benchmarks.ablations --data DIR --json OUT

Each is the scheduler with one part taken out, against the whole one, on the same work.

prices        boards offer upward only what is free, no ask curves        60 tasks of examples/day.yaml within three hours, without
elasticity    nothing is shrunk, grown or parked for another              faults: money bid for work that ended by its deadline (within that
                                                                          time where there is none), and the mean completion time
local search  the greedy allocation stands                                the instances of `allocation_gap`: value against the optimum
classes       every waiting task is a class of its own                    the board of `scheduling_scale`: CPU seconds of a look at everything
"""

import statistics
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.allocation_gap import CHIPS, instance, philly, throughputs, worth
from benchmarks.form import Figure, arguments, data_folder, write
from benchmarks.scheduling_scale import orders, rounds, source
from qipan.leases import Order, TaskId
from qipan.scheduler.allocate import allocate
from qipan.twin import World, check_end
from qipan.twin.scenario import load_scenario, make_world

DAY = Path("examples/day.yaml")
TASKS, HOURS = 60, 3


def main() -> None:
    given = arguments("ablations", worlds=24, instances=200, devices=100_000, tasks=20_000)
    data = data_folder(
        given.data,
        "Philly 2017 (msr-fiddle/philly-traces) and Gavel's throughputs (stanford-futuredata/gavel)",
    )
    rows: list[dict[str, Any]] = []
    for seed in range(given.worlds):
        whole = day(seed)
        for part, changes in {"prices": {"asks": False}, "elasticity": {"elastic": False}}.items():
            without = day(seed, **changes)
            rows.append(
                {
                    "without": part, "seed": seed, "money_in_time_ratio": without["money"] / whole["money"],
                    "mean_jct_ratio": without["jct_s"] / whole["jct_s"],
                }
            )  # fmt: skip
    speeds = throughputs(data / "reference/throughputs/gavel_isolated.csv.gz")
    sizes = philly(data / "traces/training/philly_2017.parquet")
    for seed in range(given.instances):
        bidders = instance(Random(seed), speeds, sizes)
        best = allocate(bidders, CHIPS, exact_up_to=10**9)
        plain = allocate(bidders, CHIPS, exact_up_to=0, local_search=False)
        gap = max(0.0, 1 - worth(bidders, plain.chosen) / worth(bidders, best.chosen))
        rows.append({"without": "local search", "seed": seed, "gap": gap})
    work = source(data)
    for alone in (False, True):
        row = rounds(given.devices, list(orders(work, given.tasks, 1, alone=alone)), 1)
        rows.append({"without": "classes" if alone else "", **row})
    round_s = [max(row["round_full_s"], row["round_free_s"]) for row in rows[-2:]]
    figures = [
        *(
            Figure(
                f"without_{part}_{name}",
                statistics.fmean(row[name] for row in rows if row["without"] == part),
                "ratio",
            )
            for part in ("prices", "elasticity")
            for name in ("money_in_time_ratio", "mean_jct_ratio")
        ),
        *(
            Figure(
                f"without_local_search_gap_{name}",
                choose([row["gap"] for row in rows if "gap" in row]),
                "share",
            )
            for name, choose in (("mean", statistics.fmean), ("worst", max))
        ),
        Figure("without_classes_round_ratio", round_s[1] / round_s[0], "ratio"),
    ]
    write(given.json, figures, rows, scenario=str(DAY), tasks=TASKS, hours=HOURS)


def day(seed: int, **changes: Any) -> dict[str, float]:
    scenario = load_scenario(DAY)
    scenario = replace(scenario, tasks=TASKS, hours=HOURS, kills=0, crashes=0, lose=0.0)
    world, submitted = make_world(scenario, seed, **changes)
    ended: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        over = world.tree.root.state.over
        if len(over) != len(ended):
            for task_id in over:
                ended.setdefault(task_id, world.clock.now_s())

    world.after_step.append(watch)
    world.run(until_s=scenario.hours * 3600 * 50)
    check_end(world, {order.task_id for order in submitted})
    due_s = scenario.hours * 3600

    def in_time(order: Order) -> bool:
        return ended[order.task_id] <= (order.deadline_s if order.deadline_s is not None else due_s)

    return {
        "money": sum(
            order.bid_micro_cny_per_device_hour * order.curve.work_s for order in submitted if in_time(order)
        ),
        "jct_s": statistics.fmean(ended[order.task_id] - order.submitted_s for order in submitted),
    }


if __name__ == "__main__":
    main()
