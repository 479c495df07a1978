"""The checked value of a task file: what a person submits."""

from dataclasses import dataclass, field
from typing import Literal

from qipan.forecast import Forecast
from qipan.workload.model import Model

Kind = Literal["train", "finetune", "batch", "serve", "dev"]
Objective = Literal["cost", "time", "balanced"]

RESERVED = "QIPAN_"  # so begins what Qipan tells a task of itself in its environment


@dataclass(frozen=True, slots=True)
class Work:
    """`tokens` in all, `global_batch_tokens` per optimiser step, `seq` tokens per row.
    0 means not stated (a task with its own script).  `precision`: the lowest that matrix products may be made in."""

    tokens: int = 0
    global_batch_tokens: int = 0
    seq: int = 0
    seed: int = 0
    precision: Literal["bf16", "fp8"] = "bf16"


@dataclass(frozen=True, slots=True)
class Limits:
    """`deadline_s` counts from submission.  Empty tuples mean any."""

    deadline_s: float | None = None
    max_cost_micro_cny: int | None = None
    vendors: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    chips: tuple[str, ...] = ()
    apart: str = ""  # tasks with the same word never run at one site at a time
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """`devices:` how many devices the task wants; min < max only when elastic.  0: not stated (the planner chooses;
    a script gets one).  `per_node`: so many on a node and no more, the script once on each node; 0: any shape."""

    min: int = 0
    max: int = 0
    per_node: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`every_s` None means auto: the planner chooses (Young/Daly).  `size_bytes` of one, None: from the model; `keep` of them lie in
    the storage at a time.  `longest_s`: where the storage is short of bytes/s it may be so long between them."""

    to: str = ""
    every_s: float | None = None
    size_bytes: int | None = None
    keep: int = 3
    longest_s: float | None = None


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
class Replica:
    """A task that is one replica of a service: `of` its id, `number` from 1."""

    of: str
    number: int


@dataclass(frozen=True, slots=True)
class SiteChips:
    """What a task takes at one site: devices by chip class."""

    at: str
    chips: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Sites:
    """`sites:` one model at several sites, exchanged every so many steps.  See `strategy.Outer` for the meanings."""

    parts: tuple[SiteChips, ...]
    every: int = 50
    codec: Literal["fp32", "bf16", "int8"] = "int8"
    overlap: bool = True
    fragments: int = 1
    grace_s: float = 10.0
    min_sites: int = 1
    ramp: int = 10
    moments: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """A task that is one part of another: a lease at one engine.  Parts at one site are the nodes of one world of ranks;
    sites meet through the coordinator of their rounds.  `work` is the whole task's."""

    of: str  # id of the whole task
    site: str
    node_rank: int
    nodes: int
    endpoint: str  # where the nodes of the site meet, host:port
    coordinator: str  # of the rounds, host:port
    gang: tuple[str, ...]  # ids of all parts
    work: Work
    link_bytes_per_s: float = 0.0  # what goes to other sites is held to this; 0: not held


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage is to the others of its task.  It starts when all of `after` ended, and streams `samples` to the one it
    `feeds` while both run, at most `ahead_bytes` ahead of what that one has read.  `samples_per_s`: what one device prepares, or takes,
    when it never waits; 0: known from earlier runs, if at all.  `of`: id of the whole task, and `fed_by` those that feed it, once it was
    submitted."""

    after: tuple[str, ...] = ()
    feeds: str = ""
    samples: int = 0
    samples_per_s: float = 0.0
    ahead_bytes: int = 64 * 2**20
    of: str = ""
    fed_by: tuple[str, ...] = ()


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
    forecast: Forecast | None = None  # of a service with its own script
    replica: Replica | None = None
    foreach: tuple[str, ...] = ()
    stages: tuple["Task", ...] = ()
    sites: Sites | None = None
    part: Part | None = None
    stage: Stage | None = None
    workdir: str = ""  # folder of the task file: where `run` starts and relative paths of `data` begin

    @property
    def in_parts(self) -> bool:
        """Whether it becomes several tasks, each with a lease of its own."""
        return self.sites is not None or bool(self.stages) or (self.is_service and self.replica is None)

    @property
    def is_service(self) -> bool:
        """Whether it serves by its own script: replicas that a forecast asks for, none of which ends by itself."""
        return self.kind == "serve" and bool(self.run)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a leaf engine needs to run a task: the only part of an order that it opens.
    `command` is a shell line; the trainer's is filled in by the engine from `task` and the strategy."""

    task: Task
    attempt_env: dict[str, str] = field(default_factory=dict)
