"""What a plan consists of: options, refusals, and the scene in which a task is planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qipan.curves import Curve
from qipan.hardware import BoardId, BoardSpec, ChipClass, ChipClassId, Pool, Storage
from qipan.network import Link
from qipan.planner.charges import storage_at
from qipan.planner.learn import Belief
from qipan.workload import Task
from qipan.workload.model import Model


@dataclass(frozen=True, slots=True)
class Option:
    """Seconds count from the start of the task's first attempt; money in micro-CNY: of devices, and within it what lies in storage
    and what leaves a site.  `before_s`: `parts_s` as they were before tasks that ended here corrected them.  `why_not` is empty for the
    chosen option.  `on_front`: no other option is both cheaper and earlier.  `deadline_odds`: the chance to end within `limits.deadline`, None without one.  `limit`: which
    part of the machine costs most beside arithmetic; `parts_s`: where each second of a step goes (catalogue chips); `memory_parts`: where
    each byte of the fullest device, `memory_odds`: the chance that it fits; `evidence`: the nearest measured run."""

    option_id: str
    place: str
    region: str
    chip_class: str
    devices: int
    strategy: str
    step_s: float
    start_s: float
    restart_s: float
    finish_p10_s: float
    finish_p50_s: float
    finish_p90_s: float
    cost_p50_micro_cny: int
    cost_p90_micro_cny: int
    data_bytes_to_move: int
    data_move_s: float
    useful_share: float
    source: str
    point_id: str
    on_front: bool = False
    why_not: str = ""
    deadline_odds: float | None = None
    limit: str = ""
    parts_s: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    memory_parts: dict[str, float] = field(default_factory=dict)
    memory_odds: float = 1.0
    evidence: str = ""
    storage_micro_cny: int = 0
    egress_micro_cny: int = 0
    save_s: float = 0.0
    checkpoint_every_s: float = 0.0
    before_s: dict[str, float] = field(default_factory=dict)

    def lasting(self, seconds: float) -> "Option":
        """The same devices for another time."""
        factor = seconds / self.finish_p50_s
        beside = self.storage_micro_cny + self.egress_micro_cny
        return replace(
            self, finish_p10_s=self.finish_p10_s * factor, finish_p50_s=seconds, finish_p90_s=self.finish_p90_s * factor,
            cost_p50_micro_cny=round((self.cost_p50_micro_cny - beside) * factor) + beside,
            cost_p90_micro_cny=round((self.cost_p90_micro_cny - beside) * factor) + beside,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refused:
    place: str
    chip_class: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Flow:
    """A stream between two stages as planned.  `made_per_s`: samples that one worker (a device of the feeding stage) prepares;
    `taken_per_s`: samples that the fed stage takes when it never waits; 0: not known.  `workers_needed`: the least that prepare as fast as
    that; `wait_share`: of the fed stage's time with the planned `workers`; both None where a rate is not known.  `limit`: the stage that is slower; `text`: all
    of this in a sentence."""

    feeder: str
    fed: str
    made_per_s: float
    made_source: str
    taken_per_s: float
    taken_source: str
    workers: int
    workers_needed: int | None
    wait_share: float | None
    limit: str
    text: str


@dataclass(frozen=True, slots=True)
class Meetings:
    """How the sites of a task meet, as planned: at most every `every` inner steps of `inner_s` at the slowest of them; each sends
    `sent_bytes`, which takes `exchange_s`; a round that has grown takes `round_s`.  `rounds`: in all; `use_share`: of the time in
    which sites train; `extra_s`: what meeting adds to the training; `text`: all of this in a sentence."""

    every: int
    inner_s: float
    sent_bytes: int
    exchange_s: float
    round_s: float
    rounds: int
    use_share: float
    extra_s: float
    text: str


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a task, with options of its own; `begins_s` and `ends_s` (p50) count from the start of the task's first stage."""

    stage: str
    begins_s: float
    ends_s: float
    after: tuple[str, ...]
    feeds: str
    options: tuple[Option, ...]
    refused: tuple[Refused, ...]
    chosen: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`curve` None: nothing can run it, see `refused`.  `mixed`: one pipeline, or replicas with uneven rows, over two pools of unlike chips at one site, for people
    to compare: boards give no lease over both yet, so they are no points of the curve.  `vocab_assumed`: the vocabulary comes from the data and was
    taken as this for the arithmetic (0: it was stated).  Of a task in parts (several sites, stages) `options` has the chosen one of each
    part and `curve` is None: each part has its own.  `meetings`: of several sites whose links are stated."""

    task: str
    options: tuple[Option, ...]
    refused: tuple[Refused, ...]
    chosen: str
    curve: Curve | None
    vocab_assumed: int = 0
    checkpoint_every_s: float = 0.0
    mixed: tuple[Option, ...] = ()
    stages: tuple[StagePlan, ...] = ()
    flows: tuple[Flow, ...] = ()
    meetings: Meetings | None = None

    def chosen_options(self) -> tuple[Option, ...]:
        """The chosen one; of a task in parts one of each."""
        if self.curve is None:
            return self.options
        return tuple(one for one in self.options if one.option_id == self.chosen) or self.options[:1]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a task is planned in.  `learned`: (site, chip class) -> what tasks that ended there taught of the planner's constants."""

    task: Task
    model: Model | None
    root: BoardSpec
    regions: Mapping[BoardId, str]
    chips: Mapping[ChipClassId, ChipClass]
    links: Sequence[Link]
    data_bytes: int
    data_at: str
    learned: Mapping[tuple[str, str], Belief]
    samples: int = 0
    samples_per_s: Mapping[str, float] = field(default_factory=dict)

    def store(self, site: str) -> Storage | None:
        return storage_at(self.root, site)

    def belief(self, pool: Pool) -> Belief | None:
        return self.learned.get((pool.site, pool.chip_class))
