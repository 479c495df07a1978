"""All of Philly 2017 through the real controllers: python -m benchmarks.philly --data DIR --json OUT

82,247 submissions of 109 days on a manual clock, at one board with three classes of chips as the trace is of one cluster (`--levels 3`: in a tree of
seven boards over four data centres), the invariants checked after every step, every fact and decision stored.  A row's duration is that on the fastest chip; its devices are its one shape, or for `--elastic SHARE` of the tasks
the halves and quarters too.  `--load`: the work offered over the span against what the devices can do in it.

philly_cpu_s           CPU seconds of the whole run, invariants included
philly_checks_cpu_s    of these, what the invariants took (of one check in TIMED: reading a process's CPU clock twice takes longer than most)
idle_ticks             ticks of the boards in `--idle` hours without any task, after the last has ended
"""

import math
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from benchmarks.form import Figure, arguments, data_folder, write
from qipan.curves import Curve, Need, Point
from qipan.engines.simulated import Behaviour
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import Order, TaskId
from qipan.scheduler import Settings
from qipan.twin import World, arrivals, build_world, check_changes, check_end

#: chip class -> (speed, tariff in micro-CNY, share of the devices)
CHIPS = {"v100": (1.0, 12_000_000, 0.25), "p100": (0.55, 6_000_000, 0.35), "k80": (0.25, 3_000_000, 0.4)}
SITES = {"east": ("dc1", "dc2"), "west": ("dc3", "dc4")}
SCALING = 0.9
TIMED = 64
LARGEST = 128  # devices of one class at a site at least: the largest gang of the trace


def main() -> None:
    given = arguments("philly", jobs=0, load=0.7, elastic=0.5, policy="revenue", idle=240.0, levels=1)
    data = data_folder(given.data, "Philly 2017 (msr-fiddle/philly-traces)")
    rows = rows_of(data / "traces/training/philly_2017.parquet", given.jobs)
    spec = tree(rows, given.load, given.levels)
    world = build_world(
        spec,
        seed=0,
        settings=Settings(lease_s=24 * 3600.0, policy=given.policy),
        behaviour=Behaviour(checkpoint_s=1800.0),
    )
    orders = orders_of(rows, given.elastic)
    checked_s = 0.0

    def check(world: World) -> None:
        nonlocal checked_s
        if world.steps % TIMED:
            check_changes(world)
            return
        began_s = time.process_time()
        check_changes(world)
        checked_s += (time.process_time() - began_s) * TIMED

    world.after_step.append(check)
    world.happenings = arrivals(orders)
    began_s = time.process_time()
    world.run(until_s=math.inf, most_steps=10**9)
    took_s = time.process_time() - began_s
    check_end(world, {order.task_id for order in orders})
    ticks = {board: controller.state.tick for board, controller in world.tree.controllers.items()}
    ended_s = world.clock.now_s()
    world.run(until_s=ended_s + given.idle * 3600)
    idle = sum(controller.state.tick for controller in world.tree.controllers.values()) - sum(ticks.values())
    done = sum(how == "done" for how in world.tree.root.state.over.values())
    ends = {life[0]: life[5] for board in world.tree.engines for life in world.simulated(board).lifetimes}
    lasted_s = [ends[order.task_id] - order.submitted_s for order in orders if order.task_id in ends]
    row: dict[str, Any] = {
        "jobs": len(orders), "done": done, "devices": sum(pool.devices for board in spec.walk() for pool in board.pools),
        "ticks": ticks, "steps": world.steps, "days": ended_s / 86400, "policy": given.policy,
        "mean_completion_h": sum(lasted_s) / len(lasted_s) / 3600,
        "attempts": sum(len(world.simulated(board).lifetimes) for board in world.tree.engines),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    print(row, f"{took_s:.0f} CPU s, {checked_s:.0f} of them checks", file=sys.stderr)
    figures = [
        Figure("philly_cpu_s", took_s, "CPU s", "<= 900"),
        Figure("philly_checks_cpu_s", checked_s, "CPU s"),
        Figure("cpu_ms_per_job", 1000 * took_s / len(orders), "CPU ms"),
        Figure("done_share", done / len(orders), "share", ">= 1"),
        Figure("idle_ticks", float(idle), "count", "<= 0"),
    ]
    write(given.json, figures, [row], load=given.load, elastic=given.elastic)


def rows_of(path: Path, most: int) -> list[dict[str, Any]]:
    table = parquet.read_table(path, columns=["vc", "submit_s", "duration_s", "num_accelerators"])
    found: list[dict[str, Any]] = table.to_pylist()
    return found[:most] if most else found


def tree(rows: list[dict[str, Any]], load: float, levels: int) -> BoardSpec:
    """Philly was one cluster: with one level it is one board; with three a nation over two regions over four data centres.  As many devices as make the offered work `load` of what they can do over the span."""
    span_s = max(row["submit_s"] for row in rows)
    work = sum(row["duration_s"] * row["num_accelerators"] for row in rows) / span_s
    speed = sum(speed * share for speed, _, share in CHIPS.values())
    devices = work / load / speed

    def leaf(site: str, region: str, of: int, least: int = 8) -> BoardSpec:
        pools = tuple(
            Pool(
                PoolId(f"{site}/{chip}"),
                BoardId(site),
                ChipClassId(f"nvidia/{chip}"),
                max(least, round(devices * share / of / 8) * 8),
                8,
                tariff,
            )
            for chip, (_, tariff, share) in CHIPS.items()
        )
        return BoardSpec(BoardId(site), pools=pools, region=region, engine="simulated")

    if levels == 1:
        return leaf("philly", "east", 1, LARGEST)
    regions = tuple(
        BoardSpec(
            BoardId(region),
            children=tuple(leaf(site, region, 4, LARGEST if site == "dc1" else 8) for site in own),
        )
        for region, own in SITES.items()
    )
    return BoardSpec(BoardId("cn"), children=regions)


def orders_of(rows: list[dict[str, Any]], elastic: float) -> list[Order]:
    rng = random.Random(1)
    curves: dict[tuple[int, bool], tuple[Point, ...]] = {}
    orders = []
    for number, row in enumerate(rows):
        devices, grows = int(row["num_accelerators"]), rng.random() < elastic
        key = (devices, grows)
        if key not in curves:
            curves[key] = points(devices, elastic=grows)
        orders.append(
            Order(
                TaskId(f"job-{number:05d}"), row["vc"], f"job-{number}", Curve(curves[key], row["duration_s"], "history"),
                rng.choice((9, 12, 15)) * 1_000_000, float(row["submit_s"]), elastic=grows, objective="balanced",
            )
        )  # fmt: skip
    return orders


def points(devices: int, *, elastic: bool) -> tuple[Point, ...]:
    counts = sorted({max(1, devices // part) for part in ((1, 2, 4) if elastic else (1,))})
    rates = {
        (chip, count): CHIPS[chip][0] * (count / devices) ** SCALING for chip in CHIPS for count in counts
    }
    return tuple(
        Point(f"{chip}:{count}", (Need(ChipClassId(f"nvidia/{chip}"), count),), rate, rate * 0.9, min(1.0, rate * 1.1), 60.0, 20.0)
        for (chip, count), rate in sorted(rates.items())
    )  # fmt: skip


if __name__ == "__main__":
    main()
