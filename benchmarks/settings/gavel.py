"""Gavel's setting: 8 V100, 16 P100, 24 K80, tasks of fixed size, one decision in six minutes.

Rebuilt from the paper (OSDI 2020, section 7) and from how its public artifact simulates: whole steps in a round, a round ends
when its last task does, no cost of moving, no servers.
"""

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from qipan.scheduler.policies.contender import Choice, Contender, Option
from qipan.scheduler.policies.gavel import ROUND_S
from qipan.twin.rounds import Outcome

CAPACITY = {"v100": 8, "p100": 16, "k80": 24}
FASTEST_FIRST = ("v100", "p100", "k80")


@lru_cache(maxsize=2)
def load_speeds(folder: Path) -> Mapping[tuple[str, int], Mapping[str, float]]:
    """(model with its batch size, devices) -> pool -> steps per second."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    with gzip.open(folder / "gavel_isolated.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            if (
                row["source"] == "simulation_throughputs"
                and row["consolidated"] == "True"
                and row["steps_per_s"]
            ):
                batch = f" (batch size {int(float(row['batch_size']))})" if row["batch_size"] else ""
                key = (row["model"] + batch, int(row["scale_factor"]))
                found.setdefault(key, {})[row["accelerator_type"]] = float(row["steps_per_s"])
    return found


@dataclass(slots=True)
class Steps:
    task_id: str
    submitted_s: float
    devices: int
    rates: Mapping[str, float]
    left: int
    weight: float
    pool: str | None = None
    moves: int = -1
    ended_s: float | None = None
    device_s: float = 0.0
    done: int = 0
    received_s: dict[str, float] = field(default_factory=dict)


class GavelSetting:
    def __init__(
        self,
        speeds: Mapping[tuple[str, int], Mapping[str, float]],
        rows: Sequence[Mapping[str, Any]],
        capacity: Mapping[str, int] = CAPACITY,
    ) -> None:
        self.capacity, self.now_s = capacity, 0.0
        self.tasks = [
            Steps(
                str(row["job_id"]), float(row["submit_s"]), int(row["num_accelerators"]),
                {
                    pool: rate
                    for pool, rate in speeds[row["model"], int(row["num_accelerators"])].items()
                    if rate > 0 and int(row["num_accelerators"]) <= capacity[pool]
                },
                int(row["extra_total_steps"]), float(row.get("extra_weight") or 1.0),
            )
            for row in rows
        ]  # fmt: skip
        self.tasks.sort(key=lambda task: task.submitted_s)  # stable: the order of the trace

    def advance(self) -> float:
        round_end_s = 0.0
        for task in self.tasks:
            if task.ended_s is None and task.pool is not None:
                rate = task.rates[task.pool]
                steps = min(int(rate * ROUND_S), task.left)
                ran_s = steps / rate
                task.left, task.done = task.left - steps, task.done + steps
                task.device_s += ran_s * task.devices
                task.received_s[task.pool] = task.received_s.get(task.pool, 0.0) + ran_s
                if task.left <= 0:
                    task.ended_s = self.now_s + ran_s
                round_end_s = max(round_end_s, self.now_s + ran_s)
        waiting = [task.submitted_s for task in self.tasks if task.ended_s is None]
        if round_end_s == 0.0 and waiting:
            round_end_s = min(waiting)
        self.now_s = max(self.now_s, round_end_s)
        return self.now_s

    def outcomes(self) -> Sequence[Outcome] | None:
        if any(task.ended_s is None for task in self.tasks):
            return None
        return [
            Outcome(task.task_id, task.submitted_s, task.ended_s or 0.0, task.device_s, max(task.moves, 0))
            for task in self.tasks
        ]

    def contenders(self) -> Sequence[Contender]:
        return [
            Contender(
                task.task_id,
                tuple(Option(pool, ((pool, task.devices),), rate) for pool, rate in task.rates.items()),
                task.submitted_s,
                task.pool,
                weight=task.weight,
                served_s=task.device_s,
                done=task.done,
                left=task.left,
                received_s=tuple(sorted(task.received_s.items())),
            )
            for task in self.tasks
            if task.ended_s is None and task.submitted_s <= self.now_s
        ]

    def apply(self, choice: Choice) -> None:
        for task in self.tasks:
            if task.ended_s is None and task.submitted_s <= self.now_s:
                pool = choice.get(task.task_id)
                task.moves += pool is not None and pool != task.pool
                task.pool = pool
