"""A task on one machine room: what a step needs of chips, links, network, storage and luck, and when the task would end."""

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from qipan.hardware import ChipClass, Figure, Pool, Storage
from qipan.planner.cluster import START_S, USABLE_MEMORY, failures_per_s
from qipan.planner.constants import UNKNOWN_LINK, UNKNOWN_NIC
from qipan.planner.costs import Costs, costs
from qipan.planner.space import Space, space
from qipan.planner.useful import checkpoint_every_s, useful_share
from qipan.quantities import format_bytes, format_devices
from qipan.workload.model import Model, parameter_count

#: bytes of a weight in a checkpoint: 16 bits, fp32 master, two moments
CHECKPOINT_BYTES = 14
#: checkpoints that lie in storage at once
CHECKPOINTS_KEPT = 3
#: bytes read for a token: text as UTF-8 or as token ids; the others from usual encoders: a 100 kB picture in 256 tokens, 16 kHz of 16
#: bits in 25 tokens a second, 8 Mbit/s of video in 256 tokens a second
BYTES_PER_TOKEN = {"text": 4.0, "image": 400.0, "audio": 1280.0, "video": 3900.0}
#: words of an address that tell what lies there
MODALITIES = (
    ("video", "video"),
    ("image", "image"),
    ("laion", "image"),
    ("audio", "audio"),
    ("speech", "audio"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What a task asks of a machine room."""

    model: Model
    tokens: int
    rows: int  # sequences of a step
    seq: int
    bytes_per_token: float = BYTES_PER_TOKEN["text"]

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.rows * self.seq))

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * parameter_count(self.model)


@dataclass(frozen=True, slots=True)
class Room:
    """Devices of one chip class with their storage.  Rates of 0 in `storage`: not stated, taken as enough."""

    chip: ChipClass
    pool: Pool
    storage: Storage
    devices: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """`finish_s` infinite: it cannot run, `missing` names the part that there is too little of, and `why` how much.  `parts_s`: where the seconds of a step go; `lost_s`:
    seconds of the whole task that go elsewhere."""

    finish_s: float
    step_s: float
    parts_s: dict[str, float]
    lost_s: dict[str, float]
    useful_share: float
    cost_micro_cny: int
    memory_bytes: float
    save_s: float
    restart_s: float
    missing: str = ""
    why: str = ""


def room_of(chip: ChipClass, pool: Pool, storage: Storage | None, devices: int = 0) -> Room:
    """Figures that nobody published are taken as the planner takes them, so that more of them can be asked for."""

    def known(figure: Figure, otherwise: float) -> Figure:
        return figure if figure.value else Figure(otherwise, "estimate", "not published")

    chip = replace(
        chip,
        intra_node_bytes_per_s=known(chip.intra_node_bytes_per_s, UNKNOWN_LINK),
        nic_bytes_per_s=known(chip.nic_bytes_per_s, UNKNOWN_NIC),
    )
    return Room(chip, pool, storage or Storage("none", pool.site, 0, 0.0, 0.0), devices or pool.devices)


def modality(addresses: tuple[str, ...]) -> str:
    """By the words in the addresses; text when none tells."""
    found = [kind for word, kind in MODALITIES for address in addresses if word in address.lower()]
    return found[0] if found else "text"


def run(job: Job, room: Room) -> Outcome:
    """The fastest layout that fits, its input read while it computes, a checkpoint at Daly's interval written to storage
    over the nodes' network, failures of that many nodes, each costing a start and a load."""
    need = job.checkpoint_bytes * CHECKPOINTS_KEPT + job.tokens * job.bytes_per_token
    if room.storage.capacity_bytes and need > room.storage.capacity_bytes:
        return _impossible(
            "storage capacity",
            f"storage holds {format_bytes(room.storage.capacity_bytes)}, data and {CHECKPOINTS_KEPT} checkpoints are"
            f" {format_bytes(round(need))}",
        )
    per_node = min(room.pool.devices_per_node, room.chip.devices_per_node)
    found, at, least = _best(job, _ByValue(room.chip), room.devices, per_node)
    if found is None and math.isfinite(least):
        return _impossible(
            "HBM capacity",
            f"needs {least / 2**30:.0f} GiB of memory a device, this chip has {room.chip.memory_bytes.value / 2**30:.0f}",
        )
    if found is None:
        return _impossible(
            "devices",
            f"no layout divides {job.rows} rows and {job.model.layers} layers over {format_devices(room.devices)}",
        )
    step = float(found.step_s[at])
    read_s = _seconds(job.rows * job.seq * job.bytes_per_token, room.storage.read_bytes_per_s)
    waits = max(0.0, read_s - step)
    network = room.devices * room.chip.nic_bytes_per_s.value or math.inf
    save_s = _seconds(job.checkpoint_bytes, min(room.storage.write_bytes_per_s or math.inf, network))
    load_s = _seconds(job.checkpoint_bytes, min(room.storage.read_bytes_per_s or math.inf, network))
    save_s, restart_s = max(1.0, save_s), START_S + load_s
    rate = failures_per_s(room.pool, room.devices)
    every = checkpoint_every_s(save_s, rate)
    useful = useful_share(every, save_s, restart_s + step, rate)
    work = job.steps * (step + waits)
    finish = START_S + (work / useful if useful > 0 else math.inf)
    price = room.pool.tariff_micro_cny_per_device_hour * room.devices / 3600
    saving = work * save_s / every
    lost = {
        "storage read": job.steps * waits,
        "storage write": saving,
        "failures": max(0.0, finish - work - saving),
    }
    parts = {
        "FLOPs": float(found.compute_s[at]), "HBM": float(found.optimizer_s[at]),
        "intra-node link": float(found.tensor_s[at]), "NIC": float(found.data_s[at]),
        "pipeline bubble": float(found.bubble_s[at]), "stragglers": float(found.straggler_s[at]),
    }  # fmt: skip
    cost = round(finish * price) if math.isfinite(finish) else 0
    missing = "" if math.isfinite(finish) else "failures"
    why = missing and f"a node fails every {1 / rate:.0f} s, a restart takes {restart_s:.0f} s"
    peak = float(found.memory_bytes[at])
    return Outcome(finish, step, parts, lost, useful, cost, peak, save_s, restart_s, missing, why)


def _seconds(size: float, bytes_per_s: float) -> float:
    return size / bytes_per_s if bytes_per_s else 0.0


def _impossible(missing: str, why: str) -> Outcome:
    return Outcome(math.inf, math.inf, {}, {}, 0.0, 0, 0.0, 0.0, 0.0, missing, why)


class _ByValue:
    """A chip that may be a key: two with the same figures are one."""

    def __init__(self, chip: ChipClass) -> None:
        self.chip = chip
        peaks = tuple(sorted((kind, figure.value) for kind, figure in chip.peak_flops_per_s.items()))
        figures = (
            chip.memory_bytes,
            chip.memory_bytes_per_s,
            chip.intra_node_bytes_per_s,
            chip.nic_bytes_per_s,
        )
        power = chip.power_w.value if chip.power_w else 0.0
        self.key = (chip.chip_class, peaks, power, *(figure.value for figure in figures))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and self.key == other.key


@lru_cache(maxsize=1024)  # storage and failures change no layout
def _best(job: Job, of: _ByValue, devices: int, per_node: int) -> tuple[Costs | None, int, float]:
    """Costs of the fastest layout that fits, alone; the least memory of any."""
    candidates = _space(job.model, devices, job.rows, per_node, job.seq)
    if not len(candidates):
        return None, 0, math.inf
    found = costs(candidates, job.model, of.chip, job.seq)
    fits = found.memory_bytes <= of.chip.memory_bytes.value * USABLE_MEMORY
    seconds = np.where(fits, found.step_s, np.inf)
    at = int(np.argmin(seconds))
    least = float(np.min(found.memory_bytes))
    one = Costs(*(np.broadcast_to(getattr(found, part.name), seconds.shape)[[at]] for part in fields(Costs)))
    return (one if fits[at] else None), 0, least


@lru_cache(maxsize=64)
def _space(model: Model, devices: int, rows: int, per_node: int, seq: int) -> Space:
    return space(model, devices, rows, per_node, seq=seq)


#: what can be had more of, in the words of the issue
RESOURCES = (
    "FLOPs", "HBM", "HBM capacity", "intra-node link", "NIC", "storage read", "storage write", "storage capacity",
    "failures",
)  # fmt: skip


def scaled(room: Room, resource: str, factor: float) -> Room:
    """The room with `factor` times as much of one thing (of failures: as many times fewer)."""
    chip, storage, pool = room.chip, room.storage, room.pool

    def more(figure: Figure) -> Figure:
        return replace(figure, value=figure.value * factor)

    match resource:
        case "FLOPs":
            peaks = {kind: more(figure) for kind, figure in chip.peak_flops_per_s.items()}
            power = None if chip.power_w is None else more(chip.power_w)
            return replace(room, chip=replace(chip, peak_flops_per_s=peaks, power_w=power))
        case "HBM":
            return replace(room, chip=replace(chip, memory_bytes_per_s=more(chip.memory_bytes_per_s)))
        case "HBM capacity":
            return replace(room, chip=replace(chip, memory_bytes=more(chip.memory_bytes)))
        case "intra-node link":
            return replace(room, chip=replace(chip, intra_node_bytes_per_s=more(chip.intra_node_bytes_per_s)))
        case "NIC":
            return replace(room, chip=replace(chip, nic_bytes_per_s=more(chip.nic_bytes_per_s)))
        case "storage read":
            return replace(room, storage=replace(storage, read_bytes_per_s=storage.read_bytes_per_s * factor))
        case "storage write":
            return replace(
                room, storage=replace(storage, write_bytes_per_s=storage.write_bytes_per_s * factor)
            )
        case "storage capacity":
            return replace(
                room, storage=replace(storage, capacity_bytes=round(storage.capacity_bytes * factor))
            )
    fewer = failures_per_s(pool, pool.devices_per_node) * 86400 / factor
    return replace(room, pool=replace(pool, failures_per_node_day=fewer))
