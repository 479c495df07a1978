"""One supply against isolated data centres: python -m benchmarks.utilisation --data DIR --json OUT

Six data centres of unlike chips in three regions, a few days of Philly 2017 (each virtual cluster a tenant with a home; runs longer than a day are cut there),
the models of Gavel's throughput table drawn by seed, and three inference services whose tide is that of ServeGen.

isolated  Each data centre is alone: its tenants' tasks run on its chips in the shapes that the trace asked for, each shape held from start to end, first come
          first served with EASY backfill on run times known exactly, without failures.  A service holds its peak day and night.  A centre has
          devices as its tenants' long-run demand (the whole trace), plus the peaks.
board     The real controllers on a manual clock: nation, regions, data centres.  A task may use any class its model was measured on; `--elastic` of
          them half or twice the devices too.  A service asks for the devices of the coming hour.  Same arrivals, work and devices.

Offered load: device-seconds that the tasks take at home in their shapes, over the devices (without the peaks) and the span.  Slowdown of a task: completion over its
run time alone at home, of at least a minute.  Useful device-seconds: work done, at the devices it takes at the task's most efficient point,
and service hours served.  Finish-time ratio of a tenant: the mean completion time of its tasks on the board over that at home.
"""

import heapq
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from benchmarks.allocation_gap import throughputs
from benchmarks.form import Figure, arguments, data_folder, write
from qipan.curves import Curve, Need, Point
from qipan.engines.simulated import Behaviour
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import Order, TaskId
from qipan.scheduler import Settings
from qipan.scheduler.bids import most_efficient
from qipan.twin import arrivals, build_world, check_changes

REGIONS = {"east": ("e1", "e2"), "west": ("w1", "w2"), "north": ("n1", "n2")}
CHIP_OF = {"e1": "v100", "e2": "p100", "w1": "p100", "w2": "k80", "n1": "v100", "n2": "k80"}
TARIFF = {"v100": 12_000_000, "p100": 6_000_000, "k80": 3_000_000}
SERVICES = {"e1": "language/m-large", "w1": "language/m-mid", "n2": "language/m-small"}
PEAK = 0.2  # of a centre's other devices
LONGEST_S, LEAST_S = 86_400.0, 60.0
START_S, STOP_S = 60.0, 20.0
BID, SERVICE_BID = 15_000_000, 300_000_000
FIRST_DAY = 40


@dataclass(frozen=True, slots=True)
class Job:
    """`run_s`: alone at home in its shape, the start included.  `order`: as the board sees it."""

    tenant: str
    home: str
    devices: int
    run_s: float
    order: Order

    @property
    def submitted_s(self) -> float:
        return self.order.submitted_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """`ended`: task -> seconds; `useful`: device-seconds until the end of the span."""

    ended: Mapping[TaskId, float]
    useful: float
    served_share: float
    cpu_s: float


def main() -> None:
    given = arguments(
        "utilisation",
        days=1.0,
        start=FIRST_DAY,
        seed=0,
        elastic=0.7,
        policy="revenue",
        loads="0.4,0.6,0.8,0.9,1.2",
        equal=0.6,
        shares="0.8,0.65,0.5,0.4",
    )
    data = data_folder(
        given.data,
        "Philly 2017, ServeGen's client rates (alibaba/ServeGen), Gavel's throughputs (stanford-futuredata/gavel)",
    )
    world = Setting.read(data, given.start, given.days, given.seed, given.elastic)
    rows, ratios = [], []
    saturation = 0.0
    for load in map(float, given.loads.split(",")):
        devices = world.devices(load)
        alone, board = world.isolated(devices), world.board(devices, given.policy)
        row = world.compare(load, devices, alone, board)
        print(row, file=sys.stderr)
        rows.append(row)
        if load <= 0.9:
            ratios += world.tenant_ratios(alone, board)
        saturation = board.useful / alone.useful
    devices = world.devices(given.equal)
    wanted = world.p95_slowdown(world.isolated(devices))
    fewer = 0.0
    for share in map(float, given.shares.split(",")):
        smaller = {site: max(1, round(count * share)) for site, count in devices.items()}
        slowdown = world.p95_slowdown(world.board(smaller, given.policy))
        rows.append({"devices_share": share, "p95_slowdown_board": slowdown, "p95_slowdown_isolated": wanted})
        print(rows[-1], file=sys.stderr)
        if slowdown > wanted:
            break
        fewer = 1 - sum(smaller.values()) / sum(devices.values())
    ratios.sort()
    figures = [
        Figure("fewer_devices_at_equal_p95_slowdown", fewer, "share", ">= 0.35"),
        Figure("useful_device_seconds_ratio_saturated", saturation, "ratio", ">= 1.5"),
        Figure("tenant_finish_time_ratio_mean", statistics.fmean(ratios), "ratio", "<= 1.0"),
        Figure(
            "tenant_finish_time_ratio_p99",
            ratios[min(len(ratios) - 1, int(0.99 * len(ratios)))],
            "ratio",
            "<= 1.1",
        ),
        Figure(
            "service_hours_served_least", min(row["served_share"] for row in rows if "load" in row), "share"
        ),
    ]
    write(
        given.json,
        figures,
        rows,
        start=given.start,
        days=given.days,
        seed=given.seed,
        elastic=given.elastic,
        policy=given.policy,
        equal_at_load=given.equal,
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """`demand`: site -> devices its tenants keep busy in the long run.  `tide`: site -> share of the peak, an hour each."""

    jobs: tuple[Job, ...]
    demand: Mapping[str, float]
    tide: Mapping[str, Sequence[float]]
    span_s: float

    @classmethod
    def read(cls, data: Path, start: int, days: float, seed: int, elastic: float) -> "Setting":
        table = parquet.read_table(
            data / "traces/training/philly_2017.parquet",
            columns=["vc", "submit_s", "duration_s", "num_accelerators"],
        )
        rows = table.to_pylist()
        speeds = {
            model: {key: rate for key, rate in own.items() if rate > 0}
            for model, own in throughputs(data / "reference/throughputs/gavel_isolated.csv.gz").items()
        }
        whole_s = max(row["submit_s"] for row in rows)
        weight: dict[str, float] = {}
        for row in rows:
            work = min(row["duration_s"], LONGEST_S) * row["num_accelerators"]
            weight[row["vc"]] = weight.get(row["vc"], 0.0) + work / whole_s
        homes, demand = settled(weight)
        rng, span_s, first_s = random.Random(seed), days * 86_400, start * 86_400.0
        jobs = [
            job(number, row, homes[row["vc"]], speeds, first_s, rng, elastic)
            for number, row in enumerate(rows)
            if first_s <= row["submit_s"] < first_s + span_s
        ]
        if not jobs:
            raise SystemExit(
                f"no job of Philly begins from day {start:g} to {start + days:g}; try --start 40"
            )
        return cls(tuple(jobs), demand, tides(data, math.ceil(days * 24)), span_s)

    def devices(self, load: float) -> dict[str, int]:
        """Site -> devices, the peaks of its service included."""
        work = sum(job.run_s * job.devices for job in self.jobs) / self.span_s
        largest = {
            site: max((job.devices for job in self.jobs if job.home == site), default=1) for site in CHIP_OF
        }
        found = {}
        for site, own in self.demand.items():
            base = max(largest[site], round(work / load * own / sum(self.demand.values())))
            found[site] = base + (round(base * PEAK) if site in SERVICES else 0)
        return found

    # ---- isolated ------------------------------------------------------------------------------------------------------

    def isolated(self, devices: Mapping[str, int]) -> Outcome:
        ended: dict[TaskId, float] = {}
        useful = 0.0
        for site, count in devices.items():
            peak = self.peak(site, count)
            own = [job for job in self.jobs if job.home == site]
            ended |= easy_backfill(own, count - peak)
            useful += sum(self.tide.get(site, ())) * peak * 3600
        for one in self.jobs:
            ran_s = max(0.0, min(1.0, (self.span_s - (ended[one.order.task_id] - one.run_s)) / one.run_s))
            useful += ran_s * efficient_device_s(one.order)
        return Outcome(ended, useful, 1.0, 0.0)

    def peak(self, site: str, count: int) -> int:
        return count - round(count / (1 + PEAK)) if site in SERVICES else 0

    # ---- on one board --------------------------------------------------------------------------------------------------

    def board(self, devices: Mapping[str, int], policy: str) -> Outcome:
        began_s = time.process_time()
        serving = [
            order for site in SERVICES for order in self.replicas(site, self.peak(site, devices[site]))
        ]
        world = build_world(
            tree(devices),
            seed=0,
            settings=Settings(lease_s=6 * 3600.0, policy=policy),
            behaviour=Behaviour(checkpoint_s=600.0),
        )
        world.after_step.append(check_changes)
        world.happenings = arrivals([*(one.order for one in self.jobs), *serving])
        world.run(until_s=self.span_s, most_steps=10**9)
        done: dict[TaskId, float] = {}
        for board in world.tree.engines:
            for task_id, work_s in world.simulated(board).done().items():
                done[task_id] = max(work_s, done.get(task_id, 0.0))
        useful = sum(
            done.get(one.order.task_id, 0.0) / one.order.curve.work_s * efficient_device_s(one.order)
            for one in self.jobs
        )
        served_s = sum(done.get(order.task_id, 0.0) for order in serving)
        wanted_s = sum(min(order.curve.work_s, self.span_s - order.submitted_s) for order in serving)
        ended: dict[TaskId, float] = {}
        for board in world.tree.engines:
            world.simulated(board).finished.clear()
        world.run(until_s=math.inf, most_steps=10**9)
        for board in world.tree.engines:
            for task_id, _, _, _, _, end_s in world.simulated(board).lifetimes:
                ended[task_id] = max(end_s, ended.get(task_id, 0.0))
        return Outcome(ended, useful + served_s, served_s / max(1.0, wanted_s), time.process_time() - began_s)

    def replicas(self, site: str, peak: int) -> list[Order]:
        """A task for each stretch of hours in which a service needs its k-th device."""
        found = []
        needed = [math.ceil(share * peak) for share in self.tide[site]]
        for k in range(1, peak + 1):
            hour = 0
            while hour < len(needed):
                if needed[hour] < k:
                    hour += 1
                    continue
                first = hour
                while hour < len(needed) and needed[hour] >= k:
                    hour += 1
                chip = CHIP_OF[site]
                need = (Need(ChipClassId(f"nvidia/{chip}"), 1),)
                point = Point(f"{chip}:1", need, 1.0, 1.0, 1.0, START_S, STOP_S)
                task_id = TaskId(f"serve-{site}-{k:03d}-{first:04d}")
                region = next(name for name, own in REGIONS.items() if site in own)
                found.append(
                    Order(
                        task_id,
                        f"service-{site}",
                        task_id,
                        Curve((point,), (hour - first) * 3600.0),
                        SERVICE_BID,
                        first * 3600.0,
                        regions=(region,),
                        preemptible=False,
                    )
                )
        return found

    # ---- compared ------------------------------------------------------------------------------------------------------

    def slowdowns(self, outcome: Outcome) -> list[float]:
        """Infinite for a gang that no centre is large enough for any more."""
        return sorted(
            (outcome.ended.get(one.order.task_id, math.inf) - one.submitted_s) / max(LEAST_S, one.run_s)
            for one in self.jobs
        )

    def p95_slowdown(self, outcome: Outcome) -> float:
        found = self.slowdowns(outcome)
        return found[int(0.95 * len(found))]

    def tenant_ratios(self, alone: Outcome, board: Outcome) -> list[float]:
        return [
            sum(board.ended[one.order.task_id] - one.submitted_s for one in own)
            / sum(alone.ended[one.order.task_id] - one.submitted_s for one in own)
            for tenant in sorted({one.tenant for one in self.jobs})
            for own in [[one for one in self.jobs if one.tenant == tenant]]
        ]

    def compare(
        self, load: float, devices: Mapping[str, int], alone: Outcome, board: Outcome
    ) -> dict[str, Any]:
        ratios = self.tenant_ratios(alone, board)
        return {
            "load": load, "jobs": len(self.jobs), "devices": sum(devices.values()),
            "p95_slowdown_isolated": round(self.p95_slowdown(alone), 2), "p95_slowdown_board": round(self.p95_slowdown(board), 2),
            "mean_jct_ratio": round(self.mean_jct(board) / self.mean_jct(alone), 3), "useful_ratio": round(board.useful / alone.useful, 3),
            "tenant_ratio_mean": round(statistics.fmean(ratios), 3), "tenant_ratio_worst": round(max(ratios), 3),
            "served_share": round(board.served_share, 4), "board_cpu_s": round(board.cpu_s, 1),
        }  # fmt: skip

    def mean_jct(self, outcome: Outcome) -> float:
        return statistics.fmean(outcome.ended[one.order.task_id] - one.submitted_s for one in self.jobs)


def settled(weight: Mapping[str, float]) -> tuple[dict[str, str], dict[str, float]]:
    """Each tenant at the site with the least demand so far, the largest tenants first."""
    homes: dict[str, str] = {}
    demand = dict.fromkeys(sorted(CHIP_OF), 0.0)
    for tenant, own in sorted(weight.items(), key=lambda item: (-item[1], item[0])):
        site = min(demand, key=lambda name: (demand[name], name))
        homes[tenant] = site
        demand[site] += own
    return homes, demand


def job(
    number: int, row: Mapping[str, Any], home: str, speeds: Mapping[str, Mapping[tuple[str, int], float]],
    first_s: float, rng: random.Random, elastic: float,
) -> Job:  # fmt: skip
    devices, chip = min(32, int(row["num_accelerators"])), CHIP_OF[home]
    grows = rng.random() < elastic
    models = [
        name
        for name in sorted(speeds)
        if any(known == chip and count <= devices for known, count in speeds[name])
    ]
    rates = rates_of(speeds[rng.choice(models)], devices, elastic=grows)
    best = max(rates.values())
    points = tuple(
        Point(f"{kind}:{count}", (Need(ChipClassId(f"nvidia/{kind}"), count),), rate / best, 0.9 * rate / best, min(1.0, 1.1 * rate / best), START_S, STOP_S)
        for (kind, count), rate in sorted(rates.items())
    )  # fmt: skip
    at_home = rates[chip, devices] / best
    duration_s = min(float(row["duration_s"]), LONGEST_S)
    order = Order(
        TaskId(f"job-{number:05d}"), row["vc"], f"job-{number}", Curve(points, duration_s * at_home, "history"), BID,
        float(row["submit_s"]) - first_s, elastic=grows, objective="balanced",
    )  # fmt: skip
    return Job(row["vc"], home, devices, duration_s + START_S, order)


def rates_of(
    speeds: Mapping[tuple[str, int], float], devices: int, *, elastic: bool
) -> dict[tuple[str, int], float]:
    """Steps/s by (class, devices); beyond the table's largest measured count by the power 0.85 of the devices."""
    counts = sorted({max(1, devices // 2), devices, min(32, devices * 2)}) if elastic else [devices]
    found = {}
    for chip in TARIFF:
        for count in counts:
            near = max((known for kind, known in speeds if kind == chip and known <= count), default=0)
            if near:
                found[chip, count] = speeds[chip, near] * (count / near) ** 0.85
    return found


def efficient_device_s(order: Order) -> float:
    point = most_efficient(order.curve)
    return order.curve.work_s / point.rate * point.devices


def tides(data: Path, hours: int) -> dict[str, list[float]]:
    """Site -> demand of its service over the peak, by the hour."""
    table = parquet.read_table(
        data / "traces/inference/servegen_client_rates.parquet", columns=["model", "t_s", "rate_rps"]
    ).to_pydict()
    sums: dict[tuple[str, int], float] = {}
    for model, t_s, rate in zip(table["model"], table["t_s"], table["rate_rps"], strict=True):
        key = (model, int(t_s // 3600))
        sums[key] = sums.get(key, 0.0) + rate
    found = {}
    for site, model in SERVICES.items():
        own = [sums.get((model, 24 + hour), 0.0) for hour in range(hours)]
        found[site] = [rate / max(own) for rate in own]
    return found


def tree(devices: Mapping[str, int]) -> BoardSpec:
    def leaf(site: str, region: str) -> BoardSpec:
        chip = CHIP_OF[site]
        pool = Pool(
            PoolId(f"{site}/{chip}"),
            BoardId(site),
            ChipClassId(f"nvidia/{chip}"),
            devices[site],
            8,
            TARIFF[chip],
        )
        return BoardSpec(BoardId(site), pools=(pool,), region=region, engine="simulated")

    regions = (
        BoardSpec(BoardId(region), children=tuple(leaf(site, region) for site in own))
        for region, own in REGIONS.items()
    )
    return BoardSpec(BoardId("cn"), children=tuple(regions))


def easy_backfill(jobs: Sequence[Job], devices: int) -> dict[TaskId, float]:
    """First come first served; a later task may pass if it does not delay the first that waits (D. Lifka, JSSPP 1995), run times known."""
    waiting: list[Job] = []
    running: list[tuple[float, str, int]] = []  # (end, task, devices)
    ended: dict[TaskId, float] = {}
    free, now_s = devices, 0.0
    coming = sorted(jobs, key=lambda one: (one.submitted_s, one.order.task_id), reverse=True)

    def start(one: Job) -> None:
        nonlocal free
        free -= one.devices
        ended[one.order.task_id] = now_s + one.run_s
        heapq.heappush(running, (now_s + one.run_s, one.order.task_id, one.devices))

    while coming or waiting or running:
        now_s = min(coming[-1].submitted_s if coming else math.inf, running[0][0] if running else math.inf)
        while running and running[0][0] <= now_s:
            free += heapq.heappop(running)[2]
        while coming and coming[-1].submitted_s <= now_s:
            waiting.append(coming.pop())
        while waiting and waiting[0].devices <= free:
            start(waiting.pop(0))
        if not waiting or free == 0:
            continue
        have, shadow_s, spare = free, math.inf, 0
        for end_s, _, count in sorted(running):
            have += count
            if have >= waiting[0].devices:
                shadow_s, spare = end_s, have - waiting[0].devices
                break
        for one in list(waiting[1:]):
            if one.devices > free:
                continue
            if now_s + one.run_s <= shadow_s or one.devices <= spare:
                spare -= one.devices if now_s + one.run_s > shadow_s else 0
                waiting.remove(one)
                start(one)
    return ended


if __name__ == "__main__":
    main()
