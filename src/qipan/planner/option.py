"""What a plan consists of: options, refusals, and the scene in which a task is planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Refused:
    place: str
    chip_class: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`curve` None: nothing can run it, see `refused`.  `mixed`: one pipeline, or replicas with uneven rows, over two pools of unlike chips at one site, for people
    to compare: boards give no lease over both yet, so they are no points of the curve.  `vocab_assumed`: the vocabulary comes from the data and was
    taken as this for the arithmetic (0: it was stated)."""

    task: str
    options: tuple[Option, ...]
    refused: tuple[Refused, ...]
    chosen: str
    curve: Curve | None
    vocab_assumed: int = 0
    checkpoint_every_s: float = 0.0
    mixed: tuple[Option, ...] = ()


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

    def store(self, site: str) -> Storage | None:
        return storage_at(self.root, site)

    def belief(self, pool: Pool) -> Belief | None:
        return self.learned.get((pool.site, pool.chip_class))
