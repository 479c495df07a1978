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
    since_s: float = 0.0  # it goes on without a break since then, and did so many whole steps
    steps: int = 0
    received_s: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.rates[self.pool] if self.pool is not None else 0.0


class GavelSetting:
    def __init__(
        self,
        speeds: Mapping[tuple[str, int], Mapping[str, float]],
        rows: Sequence[Mapping[str, Any]],
        capacity: Mapping[str, int] = CAPACITY,
    ) -> None:
        self.capacity, self.now_s, self.within = capacity, 0.0, False
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

    def advance(self, *, to_event: bool = False) -> float:
        """Steps are whole: what is begun of one is lost at the end of a round, as in the artifact, and when the task moves.  A round
        begins with each choice."""
        running = [task for task in self.tasks if task.ended_s is None and task.pool is not None]
        if not running:
            waiting = [task.submitted_s for task in self.tasks if task.ended_s is None]
            self.now_s, self.within = max(self.now_s, min(waiting, default=0.0)), False
            return self.now_s
        until_s = self.now_s + ROUND_S
        events_s = [until_s]
        if to_event:
            events_s += [task.since_s + (task.steps + task.left) / task.rate for task in running]
            events_s += [task.submitted_s for task in self.tasks if task.submitted_s > self.now_s]
        self.within, until_s = min(events_s) < until_s, min(events_s)
        reached_s = [self._run(task, until_s) for task in running]
        self.now_s = until_s if self.within else max(reached_s)
        if not self.within:
            for task in running:
                task.since_s, task.steps = self.now_s, 0
        return self.now_s

    def _run(self, task: Steps, until_s: float) -> float:
        """Seconds at which its last whole step was done, or `until_s` when it goes on in the middle of one."""
        assert task.pool is not None
        more = min(int(task.rate * (until_s - task.since_s) + 1e-6) - task.steps, task.left)
        task.steps, task.left, task.done = task.steps + more, task.left - more, task.done + more
        ran_s = max(task.steps / task.rate - (self.now_s - task.since_s), 0.0)
        if task.left <= 0:
            task.ended_s = self.now_s + ran_s
        elif self.within:
            ran_s = until_s - self.now_s
        task.device_s += ran_s * task.devices
        task.received_s[task.pool] = task.received_s.get(task.pool, 0.0) + ran_s
        return self.now_s + ran_s

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
                if pool == task.pool:
                    continue
                task.moves += pool is not None
                task.pool, task.since_s, task.steps = pool, self.now_s, 0
