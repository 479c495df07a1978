"""Sia's setting: 64 unlike GPUs, 160 elastic training tasks, one decision a minute.

Rebuilt from the paper (Sia, SOSP 2023, section 4) and from how its public artifact behaves: a task's true speed is read from
measured placements (interpolated over the batch size; over nodes and replicas too where a placement was not measured), its
statistical efficiency from recorded gradients, and its scheduler knows only what the task ran at so far.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from benchmarks.settings.goodput import Parameters, Sample, best_batches, fit, sample_of
from qipan.scheduler.policies.contender import Choice, Contender, Option
from qipan.twin.rounds import Outcome

ROUND_S = 60.0
#: pool -> (nodes, devices of a node)
POOLS = {"aws": (6, 4), "dgx-ext": (2, 8), "rtx": (3, 8)}
#: epochs to the end, seconds that a start costs, what a scheduler assumes that it costs, measured slowdown of a real run
MODELS: Mapping[str, tuple[int, float, float, float]] = {
    "bert": (2, 120.0, 120.0, 1.2),
    "cifar10": (100, 50.0, 30.0, 1.8),
    "imagenet": (90, 250.0, 250.0, 1.2),
    "deepspeech2": (80, 25.0, 25.0, 1.2),
    "yolov3": (50, 80.0, 45.0, 1.2),
}
MOST_REPLICAS = 64


def shapes_of(pool: str) -> tuple[tuple[int, int], ...]:
    """(nodes, devices): powers of two inside a node, then whole nodes."""
    nodes, per_node = POOLS[pool]
    inside = [(1, 2**k) for k in range(10) if 2**k <= per_node]
    return (*inside, *((count, count * per_node) for count in range(2, nodes + 1)))


SHAPES = {pool: shapes_of(pool) for pool in POOLS}


def placement_of(pool: str, devices: int) -> tuple[int, ...]:
    per_node = POOLS[pool][1]
    full, rest = divmod(devices, per_node)
    return (per_node,) * full + ((rest,) if rest else ())


# ---- what was measured -------------------------------------------------------------------------------------------------


class Model:
    """Statistical efficiency of one model: batch size -> per epoch (gradient square, variance), and progress."""

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self.epochs, self.start_s, self.assumed_s, self.slowdown = MODELS[name]
        by_batch: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            by_batch.setdefault(int(row["batch_size"]), []).append(row)
        self.batches = sorted(by_batch)
        sorted_rows = {
            batch: sorted(own, key=lambda row: row["iteration"]) for batch, own in by_batch.items()
        }
        self.square = {batch: [row["grad_sqr"] for row in own] for batch, own in sorted_rows.items()}
        self.variance = {batch: [row["grad_var"] for row in own] for batch, own in sorted_rows.items()}
        self.first, self.most = self.batches[0], self.batches[-1]
        self.progress = [0.0] + [
            min(own[epoch]["progress"] for own in sorted_rows.values()) for epoch in range(self.epochs)
        ]
        self._known: dict[tuple[float, int], tuple[float, float]] = {}

    def gradients(self, batch: float, epoch: int) -> tuple[float, float]:
        """(square, variance) between the measured batch sizes, linear."""
        known = self._known.get((batch, epoch))
        if known is None:
            low = max(one for one in self.batches if one <= batch)
            high = min(one for one in self.batches if one >= batch)
            share = 0.0 if low == high else (batch - low) / (high - low)
            known = (
                (1 - share) * self.square[low][epoch] + share * self.square[high][epoch],
                (1 - share) * self.variance[low][epoch] + share * self.variance[high][epoch],
            )
            self._known[batch, epoch] = known
        return known


class Speed:
    """Measured step times of one model on one chip class."""

    def __init__(
        self, model: str, pool: str, placed: Sequence[Mapping[str, Any]], scaled: Sequence[Mapping[str, Any]]
    ):
        by_place: dict[int, list[tuple[float, float, float]]] = {}
        means: dict[tuple[int, int, float], list[tuple[float, float]]] = {}
        for row in placed:
            digits = str(row["placement"])
            times = (row["step_time"], row["sync_time"])
            by_place.setdefault(row["placement"], []).append((row["local_bsz"], *times))
            means.setdefault((len(digits), sum(map(int, digits)), row["local_bsz"]), []).append(times)
        self.placed = {place: np.array(sorted(own), dtype=float) for place, own in by_place.items()}
        self.points = [(*key, *np.mean(own, axis=0)) for key, own in sorted(means.items())]
        self.points += [
            (row["num_nodes"], row["num_replicas"], row["local_bsz"], row["step_time"], row["sync_time"])
            for row in scaled
        ]
        self.scaled = [(row["num_nodes"], row["num_replicas"], row["local_bsz"]) for row in scaled]
        self.least = min(row["local_bsz"] for row in placed)
        self.most = max(row["local_bsz"] for row in placed)
        if (model, pool) == ("deepspeech2", "rtx"):
            self.most = 57  # what fits its memory, as the artifact sets it
        self.most_of_replicas: dict[int, float] = {}
        for row in placed:
            replicas = sum(map(int, str(row["placement"])))
            self.most_of_replicas[replicas] = max(self.most_of_replicas.get(replicas, 0), row["local_bsz"])
        one = [row for row in placed if str(row["placement"]) == "1"]
        self.one_rate = max(row["local_bsz"] for row in one) / max(row["step_time"] for row in one)
        self._between: Any = None
        self._known: dict[tuple[tuple[int, ...], float], tuple[float, float]] = {}

    def most_local(self, placement: tuple[int, ...]) -> float:
        place = int("".join(map(str, placement)))
        if place in self.placed:
            return float(self.placed[place][-1, 0])
        nodes, replicas = len(placement), sum(placement)
        return float(max(own[2] for own in self.scaled if own[0] >= nodes and own[1] >= replicas))

    def step_s(self, placement: tuple[int, ...], batch: float) -> tuple[float, float]:
        """(step, of it synchronisation) in seconds."""
        known = self._known.get((placement, batch))
        if known is None:
            place = int("".join(map(str, placement)))
            if place in self.placed:
                rows = self.placed[place]
                known = (
                    float(np.interp(batch, rows[:, 0], rows[:, 1])),
                    float(np.interp(batch, rows[:, 0], rows[:, 2])),
                )
            else:
                if self._between is None:
                    from scipy.interpolate import LinearNDInterpolator

                    table = np.array(self.points, dtype=float)
                    self._between = LinearNDInterpolator(table[:, :3], table[:, 3:])
                found = self._between([[len(placement), sum(placement), batch]])[0]
                known = (float(found[0]), float(found[1]))
            self._known[placement, batch] = known
        return known


@dataclass(frozen=True, slots=True)
class Tables:
    models: Mapping[str, Model]
    speeds: Mapping[tuple[str, str], Speed]  # (model, pool)


@lru_cache(maxsize=4)
def load_tables(folder: Path) -> Tables:
    def rows(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = parquet.read_table(folder / f"sia_{name}.parquet").to_pylist()
        return [row for row in found if row["model"] in MODELS]

    validation, placed, scaled = rows("validation"), rows("placements"), rows("scalability")
    models = {name: Model(name, [row for row in validation if row["model"] == name]) for name in MODELS}
    speeds = {}
    for name in MODELS:
        for pool in POOLS:

            def own(table: list[dict[str, Any]], name: str = name, pool: str = pool) -> list[dict[str, Any]]:
                return [row for row in table if row["model"] == name and row["accelerator_type"] == pool]

            speeds[name, pool] = Speed(name, pool, own(placed), own(scaled))
    return Tables(models, speeds)


# ---- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Training:
    """One task of the setting while it runs.  `batch` is (local batch, accumulated passes)."""

    task_id: str
    model: Model
    submitted_s: float
    target_batch: int
    pool: str | None = None
    devices: int = 0
    batch: tuple[int, int] = (0, 0)
    starting_s: float = 0.0  # left of the start that is under way
    restarts: int | None = None
    epoch: int = 0
    progress: float = 0.0
    ended_s: float | None = None
    device_s: float = 0.0
    gradients: tuple[float, float] | None = None
    samples: dict[str, dict[tuple[int, int, int], Sample]] = field(default_factory=dict)
    fitted: dict[str, Parameters] = field(default_factory=dict)
    seen: Contender | None = None  # what a scheduler saw of it at the end of the last round

    def copied(self) -> "Training":
        samples = {pool: dict(own) for pool, own in self.samples.items()}
        return replace(self, samples=samples, fitted=dict(self.fitted))


class SiaSetting:
    """`declared`: the policy is told how much work is left."""

    def __init__(self, tables: Tables, rows: Sequence[Mapping[str, Any]], *, declared: bool = False) -> None:
        self.tables, self.declared, self.now_s = tables, declared, 0.0
        self.capacity: Mapping[str, int] = {pool: nodes * each for pool, (nodes, each) in POOLS.items()}
        self.tasks = [
            Training(
                str(row["job_id"]),
                tables.models[row["model"]],
                float(row["submit_s"]),
                int(row["batch_size"]),
            )
            for row in rows
        ]

    @property
    def within(self) -> bool:
        return self.now_s % ROUND_S != 0.0

    def advance(self, *, to_event: bool = False) -> float:
        """Times are whole seconds, so a round in parts gives what the whole gives."""
        until_s = (self.now_s // ROUND_S + 1) * ROUND_S
        running = [index for index, task in enumerate(self.tasks) if task.ended_s is None and task.devices]
        if to_event:
            until_s = min([until_s, *(one.submitted_s for one in self.tasks if one.submitted_s > self.now_s)])
            ahead = [self.tasks[index].copied() for index in running]
            for task in ahead:
                self._run(task, until_s)
            until_s = min([until_s, *(task.ended_s for task in ahead if task.ended_s is not None)])
            for index, task in zip(running, ahead, strict=True):
                if task.ended_s == until_s:
                    self.tasks[index] = task
        for index in running:
            if self.tasks[index].ended_s is None:
                self._run(self.tasks[index], until_s)
        self.now_s = until_s
        if not self.within:
            for task in self.tasks:
                task.seen = None
        return self.now_s

    def outcomes(self) -> Sequence[Outcome] | None:
        if any(task.ended_s is None for task in self.tasks):
            return None
        return [
            Outcome(task.task_id, task.submitted_s, task.ended_s or 0.0, task.device_s, task.restarts or 0)
            for task in self.tasks
        ]

    def contenders(self) -> Sequence[Contender]:
        found = []
        for task in self.tasks:
            if task.ended_s is None and task.submitted_s <= self.now_s:
                if task.seen is None:
                    task.seen = self._contender(task)
                found.append(task.seen)
        return found

    def apply(self, choice: Choice) -> None:
        for task in self.tasks:
            if task.ended_s is not None or task.submitted_s > self.now_s:
                continue
            point = choice.get(task.task_id)
            pool, devices = (None, 0) if point is None else _parse(point)
            if (pool, devices) == (task.pool, task.devices):
                continue
            task.pool, task.devices = pool, devices
            if pool is not None:
                self._set_batch(task)
                task.starting_s = task.model.start_s
                task.restarts = 0 if task.restarts is None else task.restarts + 1
            if task.seen is not None:  # of its own choice a scheduler knows at once
                task.seen = replace(
                    task.seen, current=point, pinned=pool is not None, restarts=task.restarts or 0
                )

    # -- what a scheduler sees

    def _contender(self, task: Training) -> Contender:
        done = task.progress * task.model.first  # samples at the first batch size, the unit of goodput
        left = task.model.progress[task.model.epochs] * task.model.first - done
        return Contender(
            task.task_id,
            self._options(task),
            task.submitted_s,
            None if task.pool is None else f"{task.pool}:{task.devices}",
            pinned=task.starting_s > 0 and task.pool is not None,
            served_s=task.device_s,
            done=done,
            left=left if self.declared else None,
            restarts=task.restarts or 0,
            restart_s=task.model.assumed_s,
            measured=task.gradients is not None and bool(task.fitted),
        )

    def _options(self, task: Training) -> tuple[Option, ...]:
        """Every shape up to twice the most devices it ran on.  On a chip class it never ran on, the first known
        class's goodput times the ratio of their one-device speeds; before it ran anywhere, the speed of its profile on one
        device of the class times the devices, as Sia too supposes of shapes that were not seen, inside a node."""
        if task.gradients is None or not task.fitted:
            return tuple(
                Option(f"{pool}:{devices}", ((pool, devices),), speed.one_rate * devices)
                for pool in POOLS
                for speed in (self.tables.speeds[task.model.name, pool],)
                for nodes, devices in SHAPES[pool]
                if nodes == 1 and devices * speed.least <= task.model.most
            )
        known = next(pool for pool in POOLS if pool in task.fitted)
        most = max(1, task.devices)  # moved by a guess while its first measurement was on its way
        for pool in POOLS:
            ran = max((key[1] for key in task.samples.get(pool, ())), default=0)
            fits = int(task.model.most // self.tables.speeds[task.model.name, pool].least)
            most = max(most, min(max(2 * ran, 1), MOST_REPLICAS, fits))
        options: list[Option] = []
        for pool in POOLS:
            source = pool if pool in task.fitted else known
            speed = self.tables.speeds[task.model.name, source]
            ratio = (
                self.tables.speeds[task.model.name, pool].one_rate / speed.one_rate if source != pool else 1.0
            )
            shapes = [shape for shape in SHAPES[pool] if shape[1] <= most]
            if source != pool:
                shapes = [(-(-devices // POOLS[source][1]), devices) for _, devices in shapes]
            found = best_batches(
                task.fitted[source], *task.gradients, task.model.first, float(task.target_batch),
                float(speed.least), float(speed.most), tuple(shapes),
            )  # fmt: skip
            options += [
                Option(f"{pool}:{shape[1]}", ((pool, shape[1]),), goodput * ratio)
                for shape, (goodput, _, _) in zip(shapes, found, strict=True)
            ]
        return tuple(options)

    # -- what really happens

    def _set_batch(self, task: Training) -> None:
        assert task.pool is not None
        speed = self.tables.speeds[task.model.name, task.pool]
        placement = placement_of(task.pool, task.devices)
        replicas, most_local = task.devices, speed.most_local(placement)
        if task.gradients is None or task.pool not in task.fitted:
            local = math.ceil(max(task.model.first, speed.least * replicas) / replicas - 1e-8)
            accumulated = math.ceil(local / most_local - 1e-8) - 1
            atomic = math.ceil(local / (accumulated + 1) - 1e-8)
        else:
            ((_, atomic, accumulated),) = best_batches(
                task.fitted[task.pool], *task.gradients, task.model.first, float(task.model.most),
                float(speed.least), most_local, ((len(placement), replicas),),
            )  # fmt: skip
        if replicas in speed.most_of_replicas:
            atomic = int(min(atomic, speed.most_of_replicas[replicas]))
        atomic = min(atomic, int(task.model.most / (replicas * (accumulated + 1))))
        task.batch = (atomic, accumulated)

    def _run(self, task: Training, until_s: float) -> None:
        """Batch sizes are set anew at the end of an epoch and of a round."""
        assert task.pool is not None
        model, speed, at_s = task.model, self.tables.speeds[task.model.name, task.pool], self.now_s
        seconds = until_s - at_s
        waits_s = min(task.starting_s, seconds)
        task.starting_s -= waits_s
        task.device_s += waits_s * task.devices
        at_s, seconds = at_s + waits_s, seconds - waits_s
        placement = placement_of(task.pool, task.devices)
        while seconds > 0 and task.ended_s is None:
            atomic, accumulated = task.batch
            batch = task.devices * atomic * (accumulated + 1)
            square, variance = task.gradients = model.gradients(batch, task.epoch)
            gain = (variance + square) / (variance / (batch / model.first) + square)
            step, sync = speed.step_s(placement, atomic)
            self._learn(task, (len(placement), task.devices, atomic), step, sync)
            rate = gain / (step + (step - sync) * accumulated) / model.slowdown
            end = model.progress[task.epoch + 1]
            if task.progress + rate * seconds < end:
                task.progress += rate * seconds
                ran_s, over = seconds, False
            else:
                ran_s = float(round((end - task.progress) / rate))
                task.epoch, task.progress, over = task.epoch + 1, end, True
                if task.epoch >= model.epochs:
                    task.ended_s = at_s + ran_s
            task.device_s += ran_s * task.devices
            at_s, seconds = at_s + ran_s, seconds - ran_s
            if task.ended_s is None and (over or until_s % ROUND_S == 0):
                self._set_batch(task)

    def _learn(self, task: Training, key: tuple[int, int, int], step: float, sync: float) -> None:
        assert task.pool is not None
        seen = task.samples.setdefault(task.pool, {})
        if key not in seen:
            seen[key] = sample_of(*key, step, sync)
            task.fitted[task.pool] = fit(tuple(seen.values()))


def _parse(point: str) -> tuple[str, int]:
    pool, devices = point.rsplit(":", 1)
    return pool, int(devices)
