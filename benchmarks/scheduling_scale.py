"""How the scheduler grows: python -m benchmarks.scheduling_scale --devices N --tasks M --data DIR --json OUT

A board over 8 regions, each with data centres of 1,250 devices or less (100 in a region at a million devices), and M waiting tasks.  Tasks
are rows of Philly 2017 (tenant, devices, duration) with a model of Gavel's throughput table drawn by seed, so their
classes are (tenant, devices, model, bid, elastic).  Times are CPU seconds of this process, garbage collection included.

nation_round_s         one look at everything: the dearer of a round that orders `orders_per_tick` tasks with all devices free, and a
                       round in which every device is held and has its price
site_event_p99_s       a leaf board of 10,000 devices and 2,000 live tasks: one exit, submission or report of an engine at a time
admission_tasks_per_s  `decide` alone, 1,000 submissions a tick
durable_...            the same through the Controller: facts, decision, reasons and the holds in the ledger stored
restart_s              a new Controller over that store, snapshot and the facts after it, to its first decision
nation_round_alone_s   a round with `--alone` tasks, each a class of its own
"""

import gc
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from benchmarks.allocation_gap import throughputs
from benchmarks.form import Figure, arguments, data_folder, write
from qipan.clock import ManualClock
from qipan.controller import Controller
from qipan.curves import Curve, Need, Point
from qipan.events import (
    Command,
    EngineOffered,
    Fact,
    LeaseGranted,
    Reserve,
    Resize,
    Start,
    Stop,
    TakeCensus,
    TaskExited,
    TasksHeld,
    TaskStarted,
    TaskSubmitted,
)
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import AskStep, EngineId, Offer, Order, TaskId, Usage
from qipan.ledger import Books, Tariff
from qipan.ledger.books import hold_of_bid
from qipan.ledger.transfer import move
from qipan.scheduler import Decision, Moment, Phase, Settings, State, decide
from qipan.store import Store

CHIPS = ("v100", "p100", "k80")
TARIFF = {"v100": 12_000_000, "p100": 6_000_000, "k80": 3_000_000}
REGIONS = 8
SITE_DEVICES, SITE_TASKS, SITE_EVENTS = 10_000, 2_000, 1_500
BATCH = 1_000


# ---- the work ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """`rows`: (tenant, devices, seconds) of Philly; `speeds`: model -> (chip, devices) -> steps/s."""

    rows: list[tuple[str, int, float]]
    speeds: dict[str, dict[tuple[str, int], float]]


def source(data: Path) -> Source:
    table = parquet.read_table(
        data / "traces/training/philly_2017.parquet", columns=["vc", "num_accelerators", "duration_s"]
    ).to_pydict()
    rows = list(zip(table["vc"], map(int, table["num_accelerators"]), table["duration_s"], strict=True))
    return Source(rows, throughputs(data / "reference/throughputs/gavel_isolated.csv.gz"))


def orders(given: Source, count: int, seed: int, *, alone: bool = False) -> Iterator[Order]:
    """`alone`: every task bids its own price, so it is its own class."""
    rng = random.Random(seed)
    curves: dict[tuple[str, int, bool], tuple[Point, ...]] = {}
    models = sorted(given.speeds)
    for number in range(count):
        tenant, devices, seconds = given.rows[rng.randrange(len(given.rows))]
        model, elastic = models[rng.randrange(len(models))], rng.random() < 0.6
        key = (model, devices, elastic)
        if key not in curves:
            curves[key] = points(given.speeds[model], devices, elastic)
        bid = 15_000_000 + 3_000_000 * (sum(map(ord, tenant + model)) % 3)
        if alone:
            bid += number
        yield Order(
            TaskId(f"task-{number:07d}"), tenant, model, Curve(curves[key], max(60.0, seconds)), bid, float(number),
            elastic=elastic,
        )  # fmt: skip


def points(speeds: dict[tuple[str, int], float], devices: int, elastic: bool) -> tuple[Point, ...]:
    """A gang larger than the table's 8 runs at its rate for 8, once per 8 devices, less a tenth for every doubling."""
    counts = (
        sorted({count for count in (1, 2, 4, 8) if count <= devices} | {devices}) if elastic else [devices]
    )
    rates: dict[tuple[str, int], float] = {}
    for chip in CHIPS:
        for count in counts:
            near = max((known for name, known in speeds if name == chip and known <= count), default=0)
            if near:
                rates[chip, count] = speeds[chip, near] * (count / near) ** 0.85
    best = max(rates.values())
    return tuple(
        Point(
            f"{chip}:{count}", (Need(ChipClassId(f"nvidia/{chip}"), count),), rate / best, 0.9 * rate / best,
            min(1.0, 1.1 * rate / best), 60.0, 20.0,
        )
        for (chip, count), rate in sorted(rates.items())
        if rate > 0
    )  # fmt: skip


# ---- a board over regions ----------------------------------------------------------------------------------------------


def nation(devices: int, settings: Settings, *, full: bool) -> State:
    state = State(BoardId("nation"), settings)
    decide(state, region_offers(devices, full=full), Moment(0.0, 0.0))
    return state


def region_offers(devices: int, *, full: bool) -> list[Fact]:
    rng = random.Random(devices)
    sites = max(1, devices // 10_000)  # in each region
    each = devices // (REGIONS * sites * len(CHIPS))
    facts: list[Fact] = []
    for region in range(REGIONS):
        offers = tuple(
            offer(f"r{region}-dc{site:03d}", f"r{region}", chip, each, rng, full=full)
            for chip in sorted(CHIPS)
            for site in range(sites)
        )
        facts.append(EngineOffered(EngineId(f"r{region}"), offers, chooses=True))
    return facts


def offer(site: str, region: str, chip: str, devices: int, rng: random.Random, *, full: bool) -> Offer:
    """`full`: every device is held, and given up at a price between 1 and 4 times the tariff."""
    tariff = TARIFF[chip]
    prices = sorted(rng.randrange(tariff, 4 * tariff) for _ in range(12))
    asks = (
        tuple(AskStep(max(1, devices // 12), price) for price in prices) if full else (AskStep(devices, 0),)
    )
    return Offer(ChipClassId(f"nvidia/{chip}"), devices, asks, devices, tariff, site, region)


def fill(state: State, waiting: list[Order], parked: bool = True) -> float:
    """CPU seconds to take all orders, 1,000 a tick, the board full."""
    began_s = time.process_time()
    for first in range(0, len(waiting), BATCH):
        facts = [TaskSubmitted(order, 0) for order in waiting[first : first + BATCH]]
        decide(state, facts, Moment(1.0, 1.0))
    return time.process_time() - began_s


def rounds(devices: int, waiting: list[Order], count: int) -> dict[str, Any]:
    """Admission to a full board, rounds on it, then all devices come free."""
    state = nation(devices, Settings(), full=True)
    decide(state, region_offers(devices, full=True), Moment(0.5, 0.5))
    for engine in state.engines.values():
        assert engine.chooses
    dear = [replace_bid(order) for order in waiting]
    admitted_s = fill(state, dear)
    full_s, at_s = [], 1.0
    for _ in range(count):
        at_s += 61.0
        state.tasks.asks = None  # children have asked anew
        began_s = time.process_time()
        decide(state, region_offers(devices, full=True), Moment(at_s, at_s))
        full_s.append(time.process_time() - began_s)
    classes = len(state.tasks.groups)
    free_s, ordered = [], []
    for number in range(count):
        at_s += 61.0
        facts = region_offers(devices, full=False) if number == 0 else []
        before = state.tasks.waiting
        began_s = time.process_time()
        decide(state, facts, Moment(at_s, at_s))
        free_s.append(time.process_time() - began_s)
        ordered.append(before - state.tasks.waiting)
    floor_s = time.process_time()
    total = sum(task.since_s for task in state.tasks.values())
    floor_s = time.process_time() - floor_s
    assert total >= 0
    return {
        "devices": devices, "tasks": len(waiting), "classes": classes, "admission_s": admitted_s,
        "round_full_s": statistics.median(full_s), "round_free_s": statistics.median([took for took, sent in zip(free_s, ordered, strict=True) if sent]), "ordered": ordered,
        "floor_s": floor_s,
    }  # fmt: skip


def replace_bid(order: Order) -> Order:
    """Below every price of the full board."""
    return replace(order, bid_micro_cny_per_device_hour=order.bid_micro_cny_per_device_hour // 16)


# ---- one site ----------------------------------------------------------------------------------------------------------


class Site:
    """A leaf board, and an engine that answers every command at once."""

    def __init__(self, given: Source, seed: int) -> None:
        self.state = State(BoardId("site"), Settings(), top=False)
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.took_s: list[float] = []
        each = SITE_DEVICES // len(CHIPS)
        offers = tuple(
            Offer(ChipClassId(f"nvidia/{chip}"), each, (), each, TARIFF[chip], "site", "r0")
            for chip in sorted(CHIPS)
        )
        self.tick([EngineOffered(EngineId("engine"), offers, chooses=False)])

    def tick(self, facts: list[Fact]) -> None:
        """One tick and those that its commands' answers cause."""
        while facts:
            self.now_s += 0.1
            began_s = time.process_time()
            decision = decide(self.state, facts, Moment(self.now_s, self.now_s))
            self.took_s.append(time.process_time() - began_s)
            facts = self.answers(decision)

    def answers(self, decision: Decision) -> list[Fact]:
        return [fact for sent in decision.commands for fact in self.answer(sent.command)]

    def answer(self, command: Command) -> list[Fact]:
        engine = EngineId("engine")
        match command:
            case Reserve():
                return [
                    LeaseGranted(command.task_id, command.lease_id, engine, command.generation, command.needs)
                ]
            case Start():
                return [self.started(command)]
            case Resize():
                return [self.exited(command.task_id, "resized"), self.started(command)]
            case Stop():
                return [self.exited(command.task_id, "parked")]
        return []

    def started(self, command: Start | Resize) -> Fact:
        point = command.points[0]
        return TaskStarted(
            command.task_id, command.lease_id, EngineId("engine"), command.generation, command.attempt, point.point_id,
            point.needs, "engine",
        )  # fmt: skip

    def exited(self, task_id: TaskId, outcome: Any) -> Fact:
        task = self.state.tasks[task_id]
        assert task.lease_id is not None
        need = task.needs[0]
        usage = Usage(
            task_id, task.attempt, "site", EngineId("engine"), need.chip_class, need.devices, task.point_id, 0.0,
            self.now_s, 1.0, True,
        )  # fmt: skip
        done_s = task.order.curve.work_s if outcome == "done" else task.done_s
        return TaskExited(
            task_id, task.lease_id, EngineId("engine"), task.generation, task.attempt, outcome, 0, done_s,
            done_s, "", usage, final=outcome != "resized",
        )  # fmt: skip

    def finish_one(self) -> None:
        running = [task.task_id for task in self.state.tasks.in_phase(Phase.RUNNING)]
        self.tick([self.exited(self.rng.choice(running), "done")])


def site_events(given: Source) -> dict[str, Any]:
    """2,000 live tasks that want about twice the devices; then exits and submissions turn about."""
    waiting = orders(wide(given), 1_000_000, 5)
    site = Site(given, 6)
    for _ in range(SITE_TASKS // 100):
        site.tick([TaskSubmitted(next(waiting), 0) for _ in range(100)])
    built_s = sum(site.took_s)
    site.took_s.clear()
    while len(site.took_s) < SITE_EVENTS:
        site.finish_one()
        site.tick([TaskSubmitted(next(waiting), 0)])
    took = sorted(site.took_s)
    held = sum(site.state.tasks.held.values())
    return {
        "site_events": len(took), "site_live_tasks": len(site.state.tasks), "site_running": len(site.state.tasks.in_phase(Phase.RUNNING)),
        "site_held_devices": held, "site_event_p50_s": took[len(took) // 2], "site_event_p99_s": took[int(len(took) * 0.99)],
        "site_event_worst_s": took[-1], "site_build_s": built_s,
    }  # fmt: skip


def wide(given: Source) -> Source:
    """Philly's rows of 4 devices and more, so that 2,000 of them fill 10,000 devices."""
    return Source([row for row in given.rows if row[1] >= 4], given.speeds)


# ---- through the controller --------------------------------------------------------------------------------------------


class FullChild:
    """A child board that holds nothing for us and offers nothing free."""

    def __init__(self, name: str, offered: Fact) -> None:
        self.name = EngineId(name)
        self.journal: list[Fact] = [offered]

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        return list(enumerate(self.journal[after:], start=after + 1))

    def census(self, command: TakeCensus) -> None:
        self.journal.append(TasksHeld(self.name, 0, command.asked_lease_s, ()))

    def _never(self, command: Any) -> None:
        raise AssertionError(f"a full child got {command}")

    reserve = start = resize = stop = renew = _never


def durable(given: Source, devices: int, count: int) -> dict[str, Any]:
    """The snapshot is taken as long before the end as the controller lets it grow old: a quarter of the tasks came after it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nation.db"
        store, clock = Store(path), ManualClock(0.0)
        tenants = sorted({tenant for tenant, _, _ in given.rows})
        for tenant in tenants:
            store.post(move(f"opening/{tenant}", "opening", "bank", f"tenant/{tenant}", 10**18), 0.0)
        engines = {
            fact.engine: FullChild(fact.engine, fact)
            for fact in region_offers(devices, full=True)
            if isinstance(fact, EngineOffered)
        }
        board = Controller(
            BoardId("nation"), store, clock, engines, books=Books(Tariff("1", {})), snapshot_every=10**9  # type: ignore[arg-type]
        )  # fmt: skip
        while board.step():
            pass
        took_s, snapshot_s, made = 0.0, 0.0, orders(given, count, 9)
        for first in range(0, count, BATCH):
            batch = [replace_bid(next(made)) for _ in range(min(BATCH, count - first))]
            clock.advance_to(clock.now_s() + 1.0)
            began_s = time.process_time()
            for order in batch:
                board.accept(TaskSubmitted(order, hold_of_bid(order)))
            board.step()
            took_s += time.process_time() - began_s
            if first == count * 4 // 5 // BATCH * BATCH:
                began_s = time.process_time()
                board.snapshot()
                snapshot_s = time.process_time() - began_s
        live = len(board.state.tasks)
        assert live == count, f"{live} of {count} are live"
        size = path.stat().st_size
        store.close()
        del board, batch
        gc.collect()
        began_s, wall_s = time.process_time(), time.monotonic()
        again = Controller(BoardId("nation"), Store(path), clock, engines, books=Books(Tariff("1", {})))  # type: ignore[arg-type]
        again.step()
        restart_s = time.process_time() - began_s
        assert len(again.state.tasks) == count
        again.store.close()
        return {
            "durable_tasks": count, "durable_s": took_s, "store_bytes": size, "snapshot_s": snapshot_s, "restart_s": restart_s,
            "restart_wall_s": time.monotonic() - wall_s, "facts_after_snapshot": count - count * 4 // 5,
        }  # fmt: skip


# ---- the parts, each in a process of its own ----------------------------------------------------------------------------


def part(name: str, run: Callable[..., dict[str, Any]], *given: Any, **more: Any) -> dict[str, Any]:
    """Its row, with what it took; said on standard error when it begins and ends."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        row = pool.submit(measured, run, given, more).result()
    row = {"part": name, **row}
    print(f"{name}: {row}", file=sys.stderr, flush=True)
    return row


def measured(
    run: Callable[..., dict[str, Any]], given: tuple[Any, ...], more: dict[str, Any]
) -> dict[str, Any]:
    row = run(*given, **more)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {**row, "part_cpu_s": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}


def rounds_of(given: Source, devices: int, tasks: int, count: int, *, alone: bool = False) -> dict[str, Any]:
    return rounds(devices, list(orders(given, tasks, 1, alone=alone)), count)


def main() -> None:
    given = arguments(
        "scheduling_scale", devices=1_000_000, tasks=1_000_000, durable=0, rounds=5, alone=100_000
    )
    data = data_folder(
        given.data,
        "Philly 2017 (msr-fiddle/philly-traces) and Gavel's throughputs (stanford-futuredata/gavel)",
    )
    work = source(data)
    rows = [
        part(f"rounds {devices} devices, {tasks} tasks", rounds_of, work, devices, tasks, given.rounds)
        for devices, tasks in sizes(given.devices, given.tasks)
    ]
    small, largest = rows[-2:]
    site = part("site events", site_events, work)
    stored = part("durable", durable, work, given.devices, given.durable or given.tasks)
    round_s, small_s = (max(row["round_full_s"], row["round_free_s"]) for row in (largest, small))
    figures = [
        Figure("nation_round_s", round_s, "CPU s", "<= 5"),
        Figure("nation_round_floor_s", largest["floor_s"], "CPU s"),
        Figure("site_event_p99_s", site["site_event_p99_s"], "CPU s", "<= 0.05"),
        Figure("admission_tasks_per_s", largest["tasks"] / largest["admission_s"], "tasks/s", ">= 50000"),
        Figure(
            "durable_admission_tasks_per_s",
            stored["durable_tasks"] / stored["durable_s"],
            "tasks/s",
            ">= 3000",
        ),
        Figure("restart_s", stored["restart_s"], "CPU s", "<= 60"),
        Figure("classes", float(largest["classes"]), "count", ">= 1000"),
        Figure("growth_round_last_decade", round_s / small_s, "ratio"),
        Figure("growth_admission_last_decade", largest["admission_s"] / small["admission_s"], "ratio"),
    ]
    rows += [site, stored]
    if given.alone:
        row = part("every task its own class", rounds_of, work, given.devices, given.alone, 1, alone=True)
        rows.append(row)
        figures.append(Figure("nation_round_alone_s", max(row["round_full_s"], row["round_free_s"]), "CPU s"))
    figures.append(Figure("peak_memory_gib", max(row["peak_gib"] for row in rows), "GiB", "<= 4"))
    write(given.json, figures, rows, devices=given.devices, tasks=given.tasks, regions=REGIONS)


def sizes(devices: int, tasks: int) -> list[tuple[int, int]]:
    """A hundredth, a tenth, and the whole."""
    return [(max(REGIONS * 24, devices // part), max(1, tasks // part)) for part in (100, 10, 1)]


if __name__ == "__main__":
    main()
