"""Qipan's `jct` against its peers on their own ground: python -m benchmarks.scheduling --setting sia|gavel --json OUT

--workloads: numbers of the shipped workloads (sia: 1-8, gavel: names of traces), or a Parquet file of the same schema, each value of
`vc` one workload.  --policy: names, comma between; every policy runs every workload, so comparisons are paired.
An interval is a bootstrap over workloads (2000 draws by seed), 95 %.
"""

import os

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # seven parameters are fitted: threads cost more than they bring

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from benchmarks.form import Figure, arguments, data_folder, write
from benchmarks.settings.gavel import CAPACITY, FASTEST_FIRST, GavelSetting, load_speeds
from benchmarks.settings.sia import SiaSetting, load_tables
from qipan.scheduler.policies.contender import Policy
from qipan.scheduler.policies.fifo import Fifo
from qipan.scheduler.policies.gavel import OBJECTIVES, Gavel, program_of
from qipan.scheduler.policies.jct import Jct
from qipan.scheduler.policies.kueue import Kueue
from qipan.scheduler.policies.sia import Sia
from qipan.scheduler.policies.tails import LeastMean, least_makespan_s
from qipan.twin.rounds import Cadence, Outcome, run_rounds

#: settings of `jct` that were run on workloads 1-6 and 8, on some drawn from these, or on the two traces; docs/benchmarks.md lists them
VARIANTS_TRIED = {"sia": 151, "gavel": 34}
#: measured with the public artifacts
SIA_REFERENCE = {"mean_jct_h": 0.636, "p99_jct_h": 9.0, "makespan_h": 13.2, "device_h": 3.57}
GAVEL_REFERENCE = {
    "max_min_fairness": {"mean_jct_h": 4.06, "p99_jct_h": 9.30, "makespan_h": 17.1, "bound_h": 17.04},
    "minimize_makespan": {"mean_jct_h": 9.74, "p99_jct_h": 18.0, "makespan_h": 18.0, "bound_h": 17.70},
}
COLUMNS = ("mean_jct", "p99_jct", "makespan", "device_hours")
#: points of the front between the mean and the tails, over the least makespan split at will
SLACK_ROUNDS = (0.0, 0.5, 1.0, 1.25, 1.5)

Row = dict[str, Any]


def main() -> None:
    given = arguments("scheduling", setting="sia", workloads="", policy="")
    data = data_folder(
        given.data,
        "Sia's workloads and profiles (siasosp23/artifacts), Gavel's traces and throughputs (stanford-futuredata/gavel)",
    )
    if given.setting not in ("sia", "gavel"):
        sys.exit("--setting is sia or gavel")
    run = run_sia if given.setting == "sia" else run_gavel
    figures, rows, setting = run(data, given.workloads, [name for name in given.policy.split(",") if name])
    figures.append(Figure("variants_tried", float(VARIANTS_TRIED[given.setting]), "count"))
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
    write(given.json, figures, rows, **setting)


def workloads_of(path: Path, named: str, default: str) -> dict[str, list[Row]]:
    """Workload -> its rows, from the shipped file or from one of the same schema."""
    if named.endswith(".parquet"):
        path, wanted = Path(named), None
    else:
        wanted = set((named or default).split(","))
    found: dict[str, list[Row]] = {}
    for row in parquet.read_table(path).to_pylist():
        if wanted is None or row["vc"] in wanted:
            found.setdefault(str(row["vc"]), []).append(row)
    if not found:
        sys.exit(f"no workload {named or default} in {path}")
    return dict(sorted(found.items()))


def run_policy(
    make: Callable[[], tuple[Any, Policy]], cadence: Cadence = Cadence.ROUNDS, **names: Any
) -> tuple[Row, Sequence[Outcome]]:
    began_s = time.process_time()
    setting, policy = make()
    outcomes = run_rounds(setting, policy, cadence)
    lengths = sorted(outcome.jct_s / 3600 for outcome in outcomes)
    first_s, last_s = min(one.submitted_s for one in outcomes), max(one.ended_s for one in outcomes)
    row = {
        **names,
        "mean_jct": round(statistics.fmean(lengths), 4),
        "p99_jct": round(percentile(lengths, 0.99), 3),
        "makespan": round((last_s - first_s) / 3600, 3),
        "device_hours": round(statistics.fmean(one.device_s / 3600 for one in outcomes), 3),
        "restarts": round(statistics.fmean(one.restarts for one in outcomes), 2),
        "cpu_s": round(time.process_time() - began_s, 1),
    }
    return row, outcomes


def percentile(lengths: Sequence[float], share: float) -> float:
    """Linear between ranks."""
    at = share * (len(lengths) - 1)
    low = int(at)
    high = min(low + 1, len(lengths) - 1)
    return lengths[low] + (at - low) * (lengths[high] - lengths[low])


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(ratio of the means, low, high) of (qipan, other) pairs, one of each workload."""

    def ratio(own: Sequence[tuple[float, float]]) -> float:
        return sum(pair[0] for pair in own) / sum(pair[1] for pair in own)

    rng = random.Random(0)
    drawn = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    return ratio(pairs), drawn[50], drawn[1949]


# ---- Sia's setting -----------------------------------------------------------------------------------------------------

#: name -> (policy, told the declared work, when it is asked); Sia as published decides at the end of a minute, a board when something happens
SIA_POLICIES: Mapping[str, tuple[Callable[[], Policy], bool, Cadence]] = {
    "sia": (Sia, False, Cadence.ROUNDS),
    "sia_starts": (Sia, False, Cadence.STARTS),
    "jct": (Jct, False, Cadence.STARTS),
    "jct_declared": (Jct, True, Cadence.STARTS),
    "jct_rounds": (Jct, False, Cadence.ROUNDS),
    "jct_events": (Jct, False, Cadence.EVENTS),
    "fifo": (Fifo, False, Cadence.ROUNDS),
    "kueue": (Kueue, False, Cadence.ROUNDS),
}


def run_sia(data: Path, named: str, policies: list[str]) -> tuple[list[Figure], list[Row], Row]:
    tables = load_tables(data / "reference/throughputs")
    loads = workloads_of(data / "traces/training/sia_workloads_philly.parquet", named, "1,2,3,4")
    names = policies or ["sia", "sia_starts", "jct", "jct_declared", "jct_rounds"]
    unknown = sorted(set(names) - set(SIA_POLICIES))
    if unknown:
        sys.exit(f"no policy {unknown[0]!r} in this setting; there are {', '.join(SIA_POLICIES)}")
    rows: list[Row] = []
    pooled: dict[str, list[float]] = {}
    for workload, tasks in loads.items():
        for name in names:
            make, declared, cadence = SIA_POLICIES[name]

            def both(
                tasks: list[Row] = tasks, make: Callable[[], Policy] = make, declared: bool = declared
            ) -> Any:
                return SiaSetting(tables, tasks, declared=declared), make()

            row, outcomes = run_policy(both, cadence, workload=workload, policy=name)
            rows.append(row)
            pooled.setdefault(name, []).extend(one.jct_s / 3600 for one in outcomes)
    of = {(row["workload"], row["policy"]): row for row in rows}
    figures = []
    if "sia" in names:
        mean = statistics.fmean(pooled["sia"])
        shipped = not named.endswith(".parquet") and set(loads) == {"1", "2", "3", "4"}
        reference = (
            SIA_REFERENCE["mean_jct_h"] if shipped else 0.6
        )  # published over all workloads: 0.6 +- 0.1
        figures.append(
            Figure("sia_jct_ratio_to_reference", mean / reference, "ratio", "<= 1.05" if shipped else "")
        )
    for name in ("jct", "jct_declared", "jct_rounds", "sia_starts"):
        if name not in names or "sia" not in names:
            continue
        own = name in (
            "jct",
            "jct_declared",
        )  # the others tell what comes of the cadence and what of the policy
        prefix, suffix = ("qipan", name.removeprefix("jct")) if own else (name, "")
        for column, goal in zip(COLUMNS, ("<= 0.9", "<= 1.05", "<= 1.05", "<= 1.05"), strict=True):
            pairs = [(of[load, name][column], of[load, "sia"][column]) for load in loads]
            ratio, low, high = interval(pairs)
            if column == "p99_jct":
                ratio = percentile(sorted(pooled[name]), 0.99) / percentile(sorted(pooled["sia"]), 0.99)
            figure = f"{prefix}_to_sia_{column}{suffix}"
            figures.append(Figure(figure, ratio, "ratio", goal if own else ""))
            figures += [Figure(f"{figure}_low", low, "ratio"), Figure(f"{figure}_high", high, "ratio")]
    return figures, rows, {"setting": "sia", "reference": SIA_REFERENCE, "workloads": sorted(loads)}


# ---- Gavel's setting ---------------------------------------------------------------------------------------------------

#: Gavel decides in rounds and a board at events; with these a policy is asked the other's way
ROUNDS, EVENTS = "_rounds", "_events"


def gavel_policy(name: str) -> Policy:
    name = name.removesuffix(ROUNDS).removesuffix(EVENTS)
    if name == "jct":
        return Jct(shared=LeastMean())
    if name == "fifo":
        return Fifo()
    if name == "kueue":
        return Kueue(FASTEST_FIRST)
    return Gavel(*OBJECTIVES[name], pools=FASTEST_FIRST)


def run_gavel(data: Path, named: str, policies: list[str]) -> tuple[list[Figure], list[Row], Row]:
    speeds = load_speeds(data / "reference/throughputs")
    traces = "max_min_fairness,minimize_makespan"
    loads = workloads_of(data / "traces/training/gavel_physical.parquet", named, traces)
    asked_otherwise = [f"jct{ROUNDS}", *(f"{name}{EVENTS}" for name in OBJECTIVES)]
    known = ["jct", "fifo", "kueue", *OBJECTIVES, *asked_otherwise]
    names = policies or ["jct", *OBJECTIVES, *asked_otherwise]
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"no policy {unknown[0]!r} in this setting; there are {', '.join(known)}")
    rows: list[Row] = []
    figures: list[Figure] = []
    bounds = {}
    for workload, tasks in loads.items():
        bounds[workload] = bound_h(GavelSetting(speeds, tasks))
        own: dict[str, Row] = {}
        for name in names:

            def both(tasks: list[Row] = tasks, name: str = name) -> Any:
                return GavelSetting(speeds, tasks), gavel_policy(name)

            at_events = name == "jct" or name.endswith(EVENTS)
            cadence = Cadence.EVENTS if at_events else Cadence.ROUNDS
            own[name], _ = run_policy(both, cadence, workload=workload, policy=name)
            rows.append(own[name])
        figures += gavel_figures(workload, own, bounds[workload])
        if "jct" in names and not policies:
            for slack in SLACK_ROUNDS:
                row, _ = run_policy(
                    lambda tasks=tasks, slack=slack: (
                        GavelSetting(speeds, tasks), Jct(shared=LeastMean(slack_rounds=slack, whole=False))
                    ),
                    Cadence.EVENTS, workload=workload, policy=f"front: {slack:g} rounds of slack",
                )  # fmt: skip
                rows.append(row)
    return (
        figures,
        rows,
        {"setting": "gavel", "capacity": CAPACITY, "reference": GAVEL_REFERENCE, "bound_h": bounds},
    )


def gavel_figures(workload: str, own: Mapping[str, Row], bound: float) -> list[Figure]:
    peers = {name: row for name, row in own.items() if name in OBJECTIVES}
    figures = []
    best = {column: min((row[column] for row in peers.values()), default=0.0) for column in COLUMNS[:3]}
    reference = GAVEL_REFERENCE.get(workload)
    if reference is not None and len(peers) == len(OBJECTIVES):
        for column in COLUMNS[:3]:
            ratio = best[column] / reference[f"{column}_h"]
            figures.append(Figure(f"gavel_{column}_ratio_to_reference_{workload}", ratio, "ratio", "<= 1.05"))
    mine = own.get("jct")
    if mine is None or "max_min_fairness_perf" not in peers:
        return figures
    makespan = mine["makespan"] / bound
    to_best = [mine[column] / best[column] for column in COLUMNS[:2]]
    to_fair = mine["mean_jct"] / peers["max_min_fairness_perf"]["mean_jct"]
    held = (makespan <= 1.02) + (max(to_best) <= 1.03) + (to_fair <= 0.9)
    return [
        *figures,
        Figure(f"qipan_makespan_to_bound_{workload}", makespan, "ratio", "<= 1.02"),
        Figure(f"qipan_mean_jct_to_best_{workload}", to_best[0], "ratio", "<= 1.03"),
        Figure(f"qipan_p99_jct_to_best_{workload}", to_best[1], "ratio", "<= 1.03"),
        Figure(f"qipan_mean_jct_to_max_min_fairness_perf_{workload}", to_fair, "ratio", "<= 0.9"),
        Figure(f"qipan_goals_held_of_three_{workload}", float(held), "count", ">= 2"),
    ]


def bound_h(setting: GavelSetting) -> float:
    """No schedule ends sooner: all work from the first arrival on, split at will; each task alone at its best."""
    tasks = setting.tasks
    setting.now_s = max(task.submitted_s for task in tasks)
    program = program_of(setting.contenders(), setting.capacity, sorted(setting.capacity), setting.now_s)
    alone_s = max(task.submitted_s + task.left / max(task.rates.values()) for task in tasks)
    first_s = min(task.submitted_s for task in tasks)
    return max(alone_s - first_s, least_makespan_s(program)) / 3600


if __name__ == "__main__":
    main()
