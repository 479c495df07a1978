"""A scenario file: a site, arrivals and faults, run in the twin.

site: qipan.yaml-like tree (engine simulated) under `site:`
scenario: {hours, seed, tasks, tenants..., faults}
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qipan.clock import named_random
from qipan.curves import Curve, Need, Point
from qipan.engines.simulated import Behaviour
from qipan.errors import InvalidInput, NotFound
from qipan.hardware import ChipClassId
from qipan.leases import Order, TaskId
from qipan.quantities import parse_duration_s
from qipan.scheduler import Settings
from qipan.twin.check import check_end, check_world
from qipan.twin.world import Faults, Happening, World, arrivals, build_world, crash, kill_task
from qipan.workload.reader import Value, read_yaml
from qipan.workload.site import Site, parse_site

SCALING = 0.9  # a synthetic task's rate grows with devices to this power


@dataclass(frozen=True, slots=True)
class Scenario:
    """`speeds`: chip class -> progress of one device against the fastest class (1.0)."""

    site: Site
    hours: float
    tasks: int
    speeds: dict[str, float]
    mean_work_s: float
    kills: int
    crashes: int
    lose: float


def load_scenario(path: Path) -> Scenario:
    """Raises NotFound, InvalidInput."""
    if not path.is_file():
        raise NotFound(f"{path}: no such scenario; name one such as examples/day.yaml")
    top = read_yaml(path.read_text(encoding="utf-8"), str(path)).fields(("site", "scenario"))
    if "site" not in top or "scenario" not in top:
        raise InvalidInput("needs `site:` and `scenario:`", str(path))
    fields = top["scenario"].fields(("hours", "tasks", "speeds", "mean_work", "kills", "crashes", "lose"))
    site = parse_site(top["site"])
    speeds = (
        {key: _share(value) for key, value in fields["speeds"].mapping().items()}
        if "speeds" in fields
        else {}
    )
    for pool in site.pools():
        if pool.chip_class not in speeds:
            raise top["scenario"].error(f"`speeds` has no {pool.chip_class}; add it, 1.0 for the fastest")
    return Scenario(
        site,
        fields["hours"].whole(1, 10_000) if "hours" in fields else 24,
        fields["tasks"].whole(1, 100_000) if "tasks" in fields else 40,
        speeds,
        fields["mean_work"].parsed(parse_duration_s) if "mean_work" in fields else 3600.0,
        fields["kills"].whole(0, 10_000) if "kills" in fields else 0,
        fields["crashes"].whole(0, 1000) if "crashes" in fields else 0,
        _share(fields["lose"]) if "lose" in fields else 0.0,
    )


def _share(value: Value) -> float:
    try:
        share = float(value.text())
    except ValueError:
        raise value.error(f"{value.text()!r} is no number") from None
    if not 0 <= share <= 1:
        raise value.error(f"{share} is not between 0 and 1")
    return share


def run_scenario(path: Path, seed: int) -> dict[str, Any]:
    """Run to the end of all tasks, invariants checked after every step.  The report's figures are of the run."""
    scenario = load_scenario(path)
    world, orders = make_world(scenario, seed)
    finished: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        for task_id in world.tree.root.state.over:
            finished.setdefault(task_id, world.clock.now_s())

    world.after_step += [check_world, watch]
    world.run(until_s=scenario.hours * 3600 * 50)
    check_end(world, {order.task_id for order in orders})
    return {"scenario": str(path), "seed": seed, "figures": _figures(world, orders, finished)}


def make_world(scenario: Scenario, seed: int) -> tuple[World, list[Order]]:
    world = build_world(
        scenario.site.root,
        seed=seed,
        settings=Settings(lease_s=max(60.0, scenario.site.lease_s)),
        behaviour=Behaviour(checkpoint_s=600.0),
        faults=Faults(lose=scenario.lose),
    )
    orders = _orders(scenario, named_random(seed, "arrivals"))
    rng = named_random(seed, "faults")
    span_s = scenario.hours * 3600
    leaves = [board.board for board in scenario.site.root.walk() if board.pools]
    boards = [board.board for board in scenario.site.root.walk()]
    world.happenings = arrivals(orders)
    for i in range(scenario.kills):
        world.happenings.append(
            Happening(rng.uniform(0, span_s), f"kill {i}", kill_task(rng.choice(leaves), rng.randrange(1000)))
        )
    for i in range(scenario.crashes):
        world.happenings.append(Happening(rng.uniform(0, span_s), f"crash {i}", crash(rng.choice(boards))))
    return world, orders


def _orders(scenario: Scenario, rng: random.Random) -> list[Order]:
    """Synthetic tasks: powers of two of devices, exponential work, bids around the mean tariff, arrivals uniform over the span."""
    most: dict[ChipClassId, int] = {}
    for pool in scenario.site.pools():
        most[pool.chip_class] = max(most.get(pool.chip_class, 0), pool.devices)
    mean_tariff = sum(pool.tariff_micro_cny_per_device_hour for pool in scenario.site.pools()) / len(
        scenario.site.pools()
    )
    orders = []
    for i in range(scenario.tasks):
        counts = sorted({2**k for k in range(rng.randint(0, 2), rng.randint(2, 4) + 1)})
        chips = sorted(rng.sample(sorted(most), k=rng.randint(1, len(most))))
        curve = _curve(
            {chip: scenario.speeds[chip] for chip in chips},
            counts,
            most,
            rng.expovariate(1 / scenario.mean_work_s) + 60,
        )
        submitted_s = rng.uniform(0, scenario.hours * 3600)
        orders.append(
            Order(
                TaskId(f"task-{i:05d}"), f"tenant-{rng.randrange(5)}", f"task-{i}", curve,
                round(mean_tariff * rng.choice([1.0, 1.5, 2.0, 4.0])), submitted_s,
                submitted_s + curve.work_s * rng.uniform(2, 10) if rng.random() < 0.4 else None,
                elastic=rng.random() < 0.6, objective=rng.choice(["cost", "balanced", "time"]),
            )
        )  # fmt: skip
    return orders


def _curve(
    speeds: dict[ChipClassId, float], counts: list[int], most: dict[ChipClassId, int], work_s: float
) -> Curve:
    rates = {
        (chip, count): speed * count**SCALING
        for chip, speed in speeds.items()
        for count in counts
        if count <= most[chip]
    }
    if not rates:
        rates = {(chip, 1): speed for chip, speed in speeds.items()}
    best = max(rates.values())
    points = tuple(
        Point(
            f"{chip}:{count}",
            (Need(chip, count),),
            rate / best,
            rate / best * 0.9,
            min(1.0, rate / best * 1.1),
            60.0,
            20.0,
        )
        for (chip, count), rate in sorted(rates.items())
    )
    return Curve(points, work_s)


def _figures(world: World, orders: list[Order], finished: dict[TaskId, float]) -> dict[str, Any]:
    submitted = {order.task_id: order.submitted_s for order in orders}
    waits = sorted(finished[task_id] - submitted[task_id] for task_id in finished)
    devices = sum(pool.devices for board in world.tree.spec.walk() for pool in board.pools)
    held_s = sum(
        life[3] * (life[5] - life[4])
        for board in world.tree.engines
        for life in world.simulated(board).lifetimes
    )
    makespan_s = max(finished.values(), default=0.0) - min(submitted.values())
    on_time = [
        order
        for order in orders
        if order.deadline_s is not None and finished.get(order.task_id, 1e18) <= order.deadline_s
    ]
    with_deadline = [order for order in orders if order.deadline_s is not None]
    ticks = sum(controller.state.tick for controller in world.tree.controllers.values())
    return {
        "tasks": len(orders),
        "done": sum(how == "done" for how in world.tree.root.state.over.values()),
        "mean_jct_h": round(sum(waits) / max(1, len(waits)) / 3600, 3),
        "p95_jct_h": round(waits[int(len(waits) * 0.95)] / 3600, 3) if waits else 0.0,
        "makespan_h": round(makespan_s / 3600, 3),
        "leased_share": round(held_s / max(1.0, devices * makespan_s), 4),
        "deadlines_met": f"{len(on_time)} of {len(with_deadline)}",
        "attempts": sum(len(world.simulated(board).lifetimes) for board in world.tree.engines),
        "ticks": ticks,
    }
