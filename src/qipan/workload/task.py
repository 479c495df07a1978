"""The checked value of a task file: what a person submits."""

from dataclasses import dataclass, field
from typing import Literal

from qipan.workload.model import Model

Kind = Literal["train", "finetune", "batch", "serve", "dev"]
Objective = Literal["cost", "time", "balanced"]


@dataclass(frozen=True, slots=True)
class Work:
    """`tokens` in all, `global_batch_tokens` per optimiser step, `seq` tokens per row.
    0 means not stated (a task with its own script)."""

    tokens: int = 0
    global_batch_tokens: int = 0
    seq: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """`deadline_s` counts from submission.  Empty tuples mean any."""

    deadline_s: float | None = None
    max_cost_micro_cny: int | None = None
    vendors: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    chips: tuple[str, ...] = ()
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """`devices:` how many devices the task wants; min < max only when elastic.  0: not stated (the planner chooses;
    a script gets one)."""

    min: int = 0
    max: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`every_s` None means auto: the planner chooses (Young/Daly)."""

    to: str = ""
    every_s: float | None = None


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    requests_per_s: float
    input: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class Replicas:
    min: int = 1
    max: int = 1


@dataclass(frozen=True, slots=True)
class Task:
    kind: Kind
    name: str
    model: Model | None = None
    data: tuple[str, ...] = ()  # URIs: text, image, audio, video
    work: Work = Work()
    objective: Objective = "balanced"
    limits: Limits = Limits()
    devices: Shape = Shape()
    elastic: bool = False
    checkpoint: Checkpoint = Checkpoint()
    run: str = ""  # own script; empty: the built-in trainer
    env: tuple[tuple[str, str], ...] = ()
    on_partition: Literal["wait", "restart"] = "wait"
    profile: str = ""
    tenant: str = ""
    slo: Slo | None = None
    load: Load | None = None
    replicas: Replicas | None = None
    foreach: tuple[str, ...] = ()
    stages: tuple["Task", ...] = ()
    workdir: str = ""  # folder of the task file: where `run` starts and relative paths of `data` begin


@dataclass(frozen=True, slots=True)
class Launch:
    """What a leaf engine needs to run a task: the only part of an order that it opens.
    `command` is a shell line; the trainer's is filled in by the engine from `task` and the strategy."""

    task: Task
    attempt_env: dict[str, str] = field(default_factory=dict)
