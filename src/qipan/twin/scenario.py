"""A scenario file: a site, arrivals and faults, run in the twin.

site: qipan.yaml-like tree (engine simulated) under `site:`
scenario: {hours, tasks, speeds, mean_work, tide, policy, trace, services, kills, crashes, lose, outages, partitions, electricity, watts, topology}
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
from qipan.files import text_in
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import Order, TaskId
from qipan.quantities import format_duration, parse_duration_s
from qipan.scheduler import Settings
from qipan.scheduler.policies import OBJECTIVES, objective_of
from qipan.store import Store
from qipan.twin import snapshot as snapshots
from qipan.twin.check import check_changes, check_end
from qipan.twin.electricity import Electricity, parse_electricity
from qipan.twin.report import add_electricity, report_of, why_of
from qipan.twin.services import Service, dearest_tariff, read_services, replicas_of, service_row
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
    "partitions", "electricity", "watts", "topology", "services",
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
    electricity: Electricity | None = None
    topology: bool = False
    services: tuple[Service, ...] = ()
    lends: bool = True  # False: services hold their peaks at all hours (for comparing)


def load_scenario(path: Path) -> Scenario:
    """Raises NotFound, InvalidInput."""
    text = text_in(path, "no such scenario; name one such as examples/day.yaml")
    top = read_yaml(text, str(path)).fields(("site", "scenario"))
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
        parse_electricity(fields["electricity"], site.root, _watts(fields.get("watts"), site))
        if "electricity" in fields
        else None,
        fields["topology"].boolean() if "topology" in fields else False,
        read_services(fields["services"], site) if "services" in fields else (),
    )


def _watts(value: Value | None, site: Site) -> dict[str, float]:
    """As the scenario says, else as the catalogue does."""
    from qipan.catalogue import site_catalogue

    known = site_catalogue()
    found = {}
    for pool in site.pools():
        chip = known.chips.get(ChipClassId(pool.chip_class.lower()))
        if chip is not None and chip.power_w is not None:
            found[str(pool.chip_class)] = chip.power_w.value
    if value is not None:
        for chip_class, watts in value.mapping().items():
            found[chip_class] = float(watts.whole(1, 1_000_000))
    return found


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


def run_scenario(
    path: Path,
    seed: int,
    policy: str | None = None,
    *,
    start_from: Path | None = None,
    snapshot_at_s: float | None = None,
    snapshot: Path | None = None,
    lends: bool = True,
) -> dict[str, Any]:
    """Run to the end of all tasks, invariants checked after every step.  The report's figures are of the run.  `start_from`: a
    snapshot, whose seed goes on; at `snapshot_at_s` one is written to `snapshot`.  `lends`: services lend what their forecasts do not ask for."""
    scenario = replace(load_scenario(path), lends=lends)
    if policy is not None:
        objective_of(policy)
        scenario = replace(scenario, policy=policy)
    begun = snapshots.load(start_from) if start_from is not None else None
    seed = begun.seed if begun is not None else seed
    world, orders = make_world(scenario, seed) if begun is None else _go_on(scenario, begun)
    finished: dict[TaskId, float] = {**begun.finished} if begun is not None else {}

    def watch(world: World) -> None:
        over = world.tree.root.state.over
        if len(over) != len(finished):
            for task_id in over:
                finished.setdefault(task_id, world.clock.now_s())

    world.after_step += [check_changes, watch]
    if snapshot is not None:
        assert snapshot_at_s is not None
        if snapshot_at_s < world.clock.now_s():
            raise InvalidInput(f"{format_duration(snapshot_at_s)} is before the snapshot that it starts from")
        world.run(until_s=snapshot_at_s)
        snapshots.save(snapshot, world, seed, snapshot_at_s, orders, finished)
    world.run(until_s=scenario.hours * 3600 * 50)
    check_end(world, {order.task_id for order in orders})
    told = report_of(world, [order for order in orders if order.hours is None], finished, scenario.hours)
    if scenario.services:
        add_services(told, world, scenario)
    if scenario.electricity is not None:
        add_electricity(told, world, scenario.electricity)
    return {"scenario": str(path), "seed": seed, "policy": scenario.policy, **told}


def add_services(report: dict[str, Any], world: World, scenario: Scenario) -> None:
    """A row for each service, and the share of the replica-hours that forecasts ask for in which the replicas stood."""
    lives = [
        (board, *life) for board in sorted(world.tree.engines) for life in world.simulated(board).lifetimes
    ]
    rows = [service_row(service, lives, scenario.hours * 3600) for service in scenario.services]
    report["services"] = rows
    asked_h = sum(row["replica_hours_asked"] for row in rows)
    report["figures"]["service_hours_served"] = round(
        sum(row["replica_hours_served"] for row in rows) / max(asked_h, 1e-9), 4
    )
    report["figures"]["device_hours_lent"] = round(sum(row["device_hours_lent"] for row in rows), 1)


def _go_on(scenario: Scenario, begun: snapshots.Snapshot) -> tuple[World, list[Order]]:
    """The world of the snapshot, with what the scenario has happen later."""
    snapshots.check_fits(begun, scenario.site.root, _orders_of(scenario, begun.seed))
    world, orders = make_world(scenario, begun.seed, begun)
    at_s = begun.at_s
    world.happenings = [happening for happening in world.happenings if happening.at_s > at_s]
    for board, saved in begun.engines.items():
        world.simulated(board).go_on(saved)
    for controller in world.tree.controllers.values():
        controller.state.settings = world.tree.settings
    for cut in scenario.partitions:
        if cut.at_s <= at_s < cut.at_s + cut.for_s:
            cut_off(cut.board, cut.at_s, cut.for_s)[0].act(world)
    return world, orders


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


def make_world(
    scenario: Scenario, seed: int, begun: snapshots.Snapshot | None = None, **changes: Any
) -> tuple[World, list[Order]]:
    """`changes`: of the boards' settings; `begun`: whose stores and time it begins with."""
    world = build_world(
        scenario.site.root,
        seed=seed,
        settings=replace(
            Settings(lease_s=max(60.0, scenario.site.lease_s), policy=scenario.policy), **changes
        ),
        behaviour=Behaviour(checkpoint_s=600.0),
        faults=Faults(lose=scenario.lose),
        links=scenario.site.links,
        topology=scenario.topology,
        start_s=begun.at_s if begun is not None else 0.0,
        make_store=lambda board: snapshots.store_in(begun, board) if begun is not None else Store(None),
    )
    orders = _orders_of(scenario, seed)
    world.services = {order.task_id: order.hours for order in orders if order.hours is not None}
    rng = named_random(seed, "faults")
    span_s = scenario.hours * 3600
    leaves = [board.board for board in scenario.site.root.walk() if board.pools]
    boards = [board.board for board in scenario.site.root.walk()]
    world.happenings = arrivals(orders)
    if scenario.electricity is not None:
        days = math.ceil(scenario.hours / 24) * 3
        world.happenings += scenario.electricity.happenings(scenario.site.root, days)
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


def _orders_of(scenario: Scenario, seed: int) -> list[Order]:
    chance, span_s = named_random(seed, "arrivals"), scenario.hours * 3600
    serving = [
        order
        for service in scenario.services
        for order in replicas_of(
            service, dearest_tariff(service, scenario.site), span_s, lends=scenario.lends
        )
    ]
    if scenario.trace is not None:
        coming = trace_orders(scenario.trace, scenario.site, scenario.speeds, scenario.tasks, chance)
    else:
        coming = _orders(scenario, chance)
    return [*coming, *serving]


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
