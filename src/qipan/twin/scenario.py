"""A scenario file: a site, arrivals and faults, run in the twin.

site: qipan.yaml-like tree (engine simulated) under `site:`
scenario: {hours, tasks, speeds, mean_work, tide, policy, trace, kills, crashes, lose, outages, partitions}
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qipan.clock import named_random
from qipan.curves import Curve, Need, Point
from qipan.engines.simulated import Behaviour
from qipan.errors import InvalidInput, NotFound
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import Order, TaskId
from qipan.quantities import parse_duration_s
from qipan.scheduler import Settings
from qipan.scheduler.policies import OBJECTIVES, objective_of
from qipan.twin.check import check_end, check_world
from qipan.twin.report import report_of, why_of
from qipan.twin.trace import trace_orders
from qipan.twin.world import (
    Faults,
    Happening,
    World,
    arrivals,
    build_world,
    crash,
    cut_off,
    kill_task,
    outage,
)
from qipan.workload.reader import Value, read_yaml
from qipan.workload.site import Site, parse_site

KEYS = (
    "hours", "tasks", "speeds", "mean_work", "kills", "crashes", "lose", "policy", "tide", "trace", "outages",
    "partitions",
)  # fmt: skip
SCALING = 0.9  # a synthetic task's rate grows with devices to this power


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A data centre without power, or a board that its parent cannot reach."""

    board: BoardId
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """`speeds`: chip class -> progress of one device against the fastest class (1.0).  `tide`: how much more arrives at the
    busiest hour than on average.  `trace`: a file of submissions in place of synthetic ones."""

    site: Site
    hours: float
    tasks: int
    speeds: dict[str, float]
    mean_work_s: float
    kills: int
    crashes: int
    lose: float
    policy: str = "revenue"
    tide: float = 0.0
    trace: Path | None = None
    outages: tuple[Disturbance, ...] = ()
    partitions: tuple[Disturbance, ...] = ()


def load_scenario(path: Path) -> Scenario:
    """Raises NotFound, InvalidInput."""
    if not path.is_file():
        raise NotFound(f"{path}: no such scenario; name one such as examples/day.yaml")
    top = read_yaml(path.read_text(encoding="utf-8"), str(path)).fields(("site", "scenario"))
    if "site" not in top or "scenario" not in top:
        raise InvalidInput("needs `site:` and `scenario:`", str(path))
    fields = top["scenario"].fields(KEYS)
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
        fields["policy"].choice(sorted(OBJECTIVES)) if "policy" in fields else "revenue",
        _share(fields["tide"]) if "tide" in fields else 0.0,
        path.parent / fields["trace"].text() if "trace" in fields else None,
        _disturbances(fields["outages"], {board.board for board in site.root.walk() if board.pools})
        if "outages" in fields
        else (),
        _disturbances(fields["partitions"], {board.board for board in site.root.walk()} - {site.root.board})
        if "partitions" in fields
        else (),
    )


def _disturbances(value: Value, boards: set[BoardId]) -> tuple[Disturbance, ...]:
    found = []
    for entry in value.items():
        fields = entry.fields(("board", "at", "for"))
        for key in ("board", "at", "for"):
            if key not in fields:
                raise entry.error(f"`{key}` is missing; write {{board: NAME, at: 6h, for: 30m}}")
        board = BoardId(fields["board"].text())
        if board not in boards:
            raise fields["board"].error(f"no such board here; there are {', '.join(sorted(boards))}")
        found.append(
            Disturbance(board, fields["at"].parsed(parse_duration_s), fields["for"].parsed(parse_duration_s))
        )
    return tuple(found)


def _share(value: Value) -> float:
    try:
        share = float(value.text())
    except ValueError:
        raise value.error(f"{value.text()!r} is no number") from None
    if not 0 <= share <= 1:
        raise value.error(f"{share} is not between 0 and 1")
    return share


def run_scenario(path: Path, seed: int, policy: str | None = None) -> dict[str, Any]:
    """Run to the end of all tasks, invariants checked after every step.  The report's figures are of the run."""
    scenario = load_scenario(path)
    if policy is not None:
        objective_of(policy)
        scenario = replace(scenario, policy=policy)
    world, orders = make_world(scenario, seed)
    finished: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        over = world.tree.root.state.over
        if len(over) != len(finished):
            for task_id in over:
                finished.setdefault(task_id, world.clock.now_s())

    world.after_step += [check_world, watch]
    world.run(until_s=scenario.hours * 3600 * 50)
    check_end(world, {order.task_id for order in orders})
    told = report_of(world, orders, finished, scenario.hours)
    return {"scenario": str(path), "seed": seed, "policy": scenario.policy, **told}


def why_in_scenario(
    path: Path, seed: int, policy: str | None, task_id: str, at_s: float | None
) -> dict[str, Any]:
    """`qipan why` inside a scenario: every decision about a task until `at_s`, and what it waits for then.  Raises NotFound."""
    scenario = load_scenario(path)
    if policy is not None:
        objective_of(policy)
        scenario = replace(scenario, policy=policy)
    world, orders = make_world(scenario, seed)
    if task_id not in {order.task_id for order in orders}:
        raise NotFound(f"{path} has no task {task_id}; they are {orders[0].task_id} to {orders[-1].task_id}")
    world.run(until_s=scenario.hours * 3600 * 50 if at_s is None else at_s)
    return why_of(world, TaskId(task_id))


def make_world(scenario: Scenario, seed: int, **changes: Any) -> tuple[World, list[Order]]:
    """`changes`: of the boards' settings."""
    world = build_world(
        scenario.site.root,
        seed=seed,
        settings=replace(
            Settings(lease_s=max(60.0, scenario.site.lease_s), policy=scenario.policy), **changes
        ),
        behaviour=Behaviour(checkpoint_s=600.0),
        faults=Faults(lose=scenario.lose),
        links=scenario.site.links,
    )
    chance = named_random(seed, "arrivals")
    if scenario.trace is not None:
        orders = trace_orders(scenario.trace, scenario.site, scenario.speeds, scenario.tasks, chance)
    else:
        orders = _orders(scenario, chance)
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
    for cut in scenario.partitions:
        world.happenings += cut_off(cut.board, cut.at_s, cut.for_s)
    for dark in scenario.outages:
        world.happenings += outage(dark.board, dark.at_s, dark.for_s)
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
        submitted_s = _arrival_s(rng, scenario)
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


def _arrival_s(rng: random.Random, scenario: Scenario) -> float:
    """Uniform over the span, or by a tide with its highest water at 15 o'clock (by rejection)."""
    while True:
        at_s = rng.uniform(0, scenario.hours * 3600)
        height = 1.0 + scenario.tide * math.cos((at_s / 3600 - 15.0) / 24.0 * 2 * math.pi)
        if scenario.tide == 0.0 or rng.uniform(0, 1.0 + scenario.tide) < height:
            return at_s
