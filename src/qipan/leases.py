"""Offers, leases, orders, reasons and receipts: what boards and engines say to each other about capacity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from qipan.curves import Curve, Need
from qipan.forecast import Hours
from qipan.hardware import ChipClassId, Storage, fastest

TaskId = NewType("TaskId", str)
LeaseId = NewType("LeaseId", str)
EngineId = NewType("EngineId", str)

RAN_OUT, UNUSED, RAN_OUT_ABOVE = (
    "the lease ran out", "the lease lapsed before it was used", "the lease from the parent board ran out"
)  # fmt: skip
#: why something ended: its lease was not renewed in time
LAPSES = (RAN_OUT, UNUSED, RAN_OUT_ABOVE)
#: of a lease at most: so much is set aside at its end for parking
PARKING_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class AskStep:
    """`devices` more of the chip class can be had at this price (shadow price or bid) per device-hour."""

    devices: int
    price_micro_cny_per_device_hour: int


@dataclass(frozen=True, slots=True)
class Block:
    """`size` devices that lie near each other: a node, or what hangs on one fast switch.  `free`: the most that are free in one."""

    size: int
    free: int


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds how many devices of one block of `size`, of which `free` nobody does."""

    size: int
    free: int
    held: tuple[tuple[TaskId, int], ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine can give of one chip class.  `devices` is the usable capacity, free or not.
    `asks` is cumulative in order, cheapest first: the devices it would give to a new task, and at what price.
    `tariff` is the posted price a tenant pays.  `largest_gang` is the largest number one task can get at once.
    `blocks`: the smallest first; empty where all devices are alike near, or nobody tells.  `holders`: of the blocks that are easiest to
    clear, for the board that calls the engine; never told further up."""

    chip_class: ChipClassId
    devices: int
    asks: tuple[AskStep, ...]
    largest_gang: int
    tariff_micro_cny_per_device_hour: int
    site: str = ""
    region: str = ""
    blocks: tuple[Block, ...] = ()
    holders: tuple[Holders, ...] = ()


@dataclass(frozen=True, slots=True)
class Out:
    """Devices that an engine has and does not offer, since what they are on is to go or is to be repaired: `why`."""

    chip_class: ChipClassId
    devices: int
    why: str


@dataclass(frozen=True, slots=True)
class Room:
    """The storage where a leaf engine's tasks keep their checkpoints.  0: not counted."""

    storage_id: str
    space_bytes: int = 0
    write_bytes_per_s: float = 0.0

    def writes(self, bytes_per_s: float) -> bool:
        """Whether it can write so much: the same rates summed in another order differ in the last digit."""
        return not self.write_bytes_per_s or bytes_per_s <= self.write_bytes_per_s * (1 + 1e-9)


def room_of(storages: Sequence[Storage]) -> Room | None:
    """Of a site's storages."""
    one = fastest(storages)
    return Room(one.storage_id, one.capacity_bytes, one.write_bytes_per_s) if one is not None else None


@dataclass(frozen=True, slots=True)
class Order:
    """A task as it travels down the tree: the scheduler never sees a model, only this.
    `bid` is what the task pays for a device-hour at its most efficient point; `launch` is what a leaf engine needs
    to run it (opaque bytes here: workload.Launch encoded)."""

    task_id: TaskId
    tenant: str
    name: str
    curve: Curve
    bid_micro_cny_per_device_hour: int
    submitted_s: float
    deadline_s: float | None = None
    elastic: bool = False
    objective: str = "balanced"
    regions: tuple[str, ...] = ()  # glob patterns of regions allowed; empty: any
    vendors: tuple[str, ...] = ()  # vendors allowed; empty: any
    data_bytes_at: tuple[tuple[str, int], ...] = ()  # site -> bytes of the task's data lying there
    on_partition: str = "wait"
    launch: bytes = b""
    saved_s: float = 0.0  # work already checkpointed, in seconds at the best point
    attempt: int = 0  # attempts made so far, anywhere in the tree
    preemptible: bool = True  # an elastic task may be parked for a dearer one
    fence: tuple[
        int, ...
    ] = ()  # (term, generation) of each board's placement, from the top: grows with every one
    gang: tuple[str, ...] = ()  # tasks that start together or not at all
    above: str = ""  # the lease that the placing board holds from its own parent
    kind: str = ""  # train, finetune, batch, serve, dev; empty: not known
    checkpoint_bytes: int = 0  # of the newest one, which moves with the task; 0: not known
    checkpoint_at: str = ""  # the site where the newest one lies
    apart: str = ""  # tasks of a tenant with the same word never run at one engine at a time
    preempted_s: tuple[float, ...] = ()  # when it was parked for others, anywhere in the tree
    after: tuple[str, ...] = ()  # tasks that must be done before it starts
    feeds: str = ""  # the task that its output streams to
    stages: tuple[
        str, ...
    ] = ()  # all stages of the task that it is one of: some wait for others, none outlives what it is for
    checkpoint_longer_max: float = (
        1.0  # at most so many times as long as its points say may lie between its checkpoints
    )
    checkpoint_longer: float = 1.0  # and so many times as long lies, under the lease that it was placed with
    entered_at: str = (
        ""  # the board where it was submitted, where it runs if that is good enough; empty: the top
    )
    hours: Hours | None = None  # of a service's replica: when it is wanted
    own: int = 0  # so many devices are its tenant's own by a rule of a board above: no other tenant's dearer bid takes them

    @property
    def yields(self) -> bool:
        """Whether it may be shrunk or parked for others."""
        return self.elastic and self.preemptible


@dataclass(frozen=True, slots=True)
class Lease:
    """Devices held at one engine for a stated time.  `until_lease_s` is on the holder's monotonic clock."""

    lease_id: LeaseId
    engine: EngineId
    task_id: TaskId
    needs: tuple[Need, ...]
    until_lease_s: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was decided about a task: a computed sentence and the values it rests on."""

    task_id: TaskId
    verdict: str  # "placed", "waits", "shrunk", "grown", "preempted", "moved", "refused", "restarted", ...
    text: str
    values: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """One attempt's use at one leaf engine: the metering record.  Cumulative while running, final when `ended`."""

    task_id: TaskId
    attempt: int
    board: str
    engine: EngineId
    chip_class: ChipClassId
    devices: int
    point_id: str
    started_s: float
    until_s: float
    device_s: float
    ended: bool


@dataclass(frozen=True, slots=True)
class ReceiptLine:
    usage: Usage
    tariff_version: str
    tariff_micro_cny_per_device_hour: int
    cost_micro_cny: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """A record of what ran, where, on what, how much, at which tariff.  `signature` is over the rest."""

    task_id: TaskId
    tenant: str
    lines: tuple[ReceiptLine, ...]
    cost_micro_cny: int
    outcome: str
    lost_work_s: float
    signature: str = ""
