"""Chips, pools and sites: what there is.

A *chip class* is (vendor, model, software stack); a *device* is one schedulable unit of it; a *node* is a
machine; a *pool* is the devices of one chip class in one data centre.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NewType

ChipClassId = NewType("ChipClassId", str)  # "vendor/model", lower case: "huawei/ascend-910b2"
BoardId = NewType("BoardId", str)
PoolId = NewType("PoolId", str)

Confidence = Literal["measured", "datasheet", "third-party", "estimate"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number about a chip, with where it comes from and how far to trust it."""

    value: float
    confidence: Confidence
    source: str = ""


@dataclass(frozen=True, slots=True)
class ChipClass:
    """Figures are per *device* (a card may show several).  Rates are per direction.  `linked_devices`: how many devices
    the fast links join, 0: those of a node.  `compiled`: its software turns a whole training step into one program."""

    chip_class: ChipClassId
    vendor: str
    model: str
    stack: str
    kind: Literal["gpu", "npu", "cpu", "fpga", "other"]
    peak_flops_per_s: dict[str, Figure]  # precision ("fp32", "bf16", "fp8", ...) -> dense peak
    memory_bytes: Figure
    memory_bytes_per_s: Figure
    intra_node_bytes_per_s: Figure  # one device to the others of its node
    nic_bytes_per_s: Figure  # one device's share of the node's network
    devices_per_node: int
    devices_per_card: int = 1
    power_w: Figure | None = None
    release_year: int | None = None
    linked_devices: int = 0
    compiled: bool = False
    measured_flops_per_s: dict[str, Figure] = field(
        default_factory=dict
    )  # what large products reached, per precision
    on_request: bool = False  # a site's own and never measured: placed only where a task names it


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured on a pool: the permit's content, and the input of the planner's measured overlay.
    `train_flops_per_s` is the rate one device reached on the reference decoder step (model FLOP, fp32 on CPU);
    `start_s` is from launch to the first step of a one-device task; `collective_bytes_per_s` and
    `collective_latency_s` are of an all-reduce among the pool's devices.  The rest are the constants of
    `qipan.planner.steps`, as calibration steps gave them (0: not measured, the rate above holds for the whole step)."""

    train_flops_per_s: float
    start_s: float
    collective_bytes_per_s: float
    collective_latency_s: float
    spread: float  # relative standard deviation of repeated measurements
    measured_at_s: float
    save_s: float = 1.0  # writing a small checkpoint
    launch_s: float = 0.0  # to launch the passes of one layer, whatever its size
    product_flops_per_s: float = 0.0  # of matrix products alone
    pass_bytes_per_s: float = 0.0  # of elementwise work
    weight_s: float = 0.0  # of one weight: its gradient's norm, the optimiser
    dispatch_s: float = 0.0  # to launch the passes of one layer whose weights lie in shards
    bubble_share: float = (
        1.0  # of a pipeline's bubble (cores that share units run faster while a neighbour waits)
    )


@dataclass(frozen=True, slots=True)
class Pool:
    """`cpu_share` is the part of one core that stands for one device of a local pool of simulated chips,
    0.0 for real devices.  `resource`: what the engine below calls the devices (a GRES type of Slurm, a resource of Ray
    or Kubernetes)."""

    pool_id: PoolId
    site: BoardId
    chip_class: ChipClassId
    devices: int
    devices_per_node: int
    tariff_micro_cny_per_device_hour: int
    host_memory_bytes_per_node: int = 0
    cpu_share: float = 0.0
    failures_per_node_day: float = 0.0
    probe: Probe | None = None
    resource: str = ""
    devices_per_block: int = 0  # on one fast switch; 0: not known


@dataclass(frozen=True, slots=True)
class Storage:
    """Where data and checkpoints lie, at one site."""

    storage_id: str
    site: BoardId
    capacity_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    price_micro_cny_per_gib_month: int = 0
    url: str = ""  # a folder, s3:// or http(s)://, where checkpoints are kept for other sites; "": nowhere
    options: dict[str, str] = field(default_factory=dict)
    keep_s: float = 30 * 86_400.0  # how long what was kept stays


def fastest(storages: Iterable[Storage]) -> Storage | None:
    """The one that writes fastest: where a site's checkpoints lie."""
    return max(storages, key=lambda one: (one.write_bytes_per_s, one.storage_id), default=None)


@dataclass(frozen=True, slots=True)
class BoardSpec:
    """One board of a site file.  A leaf has pools, an inner board has children; both is allowed.
    `engine` names what the board places tasks on beside its children: local, slurm, ray, kubernetes, simulated."""

    board: BoardId
    children: tuple["BoardSpec", ...] = ()
    pools: tuple[Pool, ...] = ()
    stores: tuple[Storage, ...] = ()
    engine: str = "local"
    engine_options: dict[str, str] = field(default_factory=dict)
    region: str = ""
    longitude: float | None = None
    latitude: float | None = None

    def walk(self) -> "list[BoardSpec]":
        """This board and all below it, parents first, in the file's order."""
        return [self, *(spec for child in self.children for spec in child.walk())]

    def ways(self) -> "dict[BoardId, tuple[BoardId, ...]]":
        """This board and all below it -> the boards from this one down to it."""
        below = {board: (self.board, *way) for child in self.children for board, way in child.ways().items()}
        return {self.board: (self.board,), **below}
