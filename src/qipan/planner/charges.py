"""What a task pays and waits for beside its devices: checkpoints into storage, what lies there, data that moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from qipan.hardware import BoardSpec, ChipClass, Storage, fastest
from qipan.network import Link, egress_micro_cny, transfer_s
from qipan.planner.machine import BYTES_PER_TOKEN, CHECKPOINT_BYTES, CHECKPOINTS_KEPT, modality
from qipan.workload import Task
from qipan.workload.model import Model, parameter_count

MONTH_S = 30 * 86400.0
#: a stall is not shorter: ranks meet, files are renamed
SAVE_S_LEAST = 1.0


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint's size, how long writing it stalls the task, and how long reading it takes."""

    size_bytes: int
    save_s: float
    load_s: float


def saving(model: Model, chip: ChipClass, devices: int, store: Storage | None, otherwise_s: float) -> Saving:
    """Weights in 16 bits, fp32 master and moments, to storage over the devices' network, whichever is slower.  A site that states
    no storage, or no rate of it, is taken to stall for `otherwise_s`."""
    size = CHECKPOINT_BYTES * parameter_count(model)
    if store is None or not store.write_bytes_per_s:
        return Saving(size, otherwise_s, otherwise_s)
    network = devices * chip.nic_bytes_per_s.value or store.write_bytes_per_s
    save_s = max(SAVE_S_LEAST, size / min(store.write_bytes_per_s, network))
    load_s = size / min(store.read_bytes_per_s or store.write_bytes_per_s, network)
    return Saving(size, save_s, load_s)


def storage_at(root: BoardSpec, site: str) -> Storage | None:
    """Where checkpoints lie at the site."""
    return fastest(store for board in root.walk() for store in board.stores if store.site == site)


def lies_at(addresses: Sequence[str], root: BoardSpec) -> str:
    """The site whose storage the first address names by its id (`shanghai-nvme/poems`, `shanghai-nvme://poems`); "" when
    none does: then the data is taken to be wherever the task runs."""
    stores = {store.storage_id: store.site for board in root.walk() for store in board.stores}
    for address in addresses:
        for name in sorted(stores, key=len, reverse=True):
            if address.startswith((f"{name}/", f"{name}:")):
                return stores[name]
    return ""


def usual_bytes(task: Task) -> int:
    """Of its data, as its tokens usually take."""
    return round(task.work.tokens * BYTES_PER_TOKEN[modality(task.data)])


def data_of(task: Task, root: BoardSpec) -> tuple[tuple[str, int], ...]:
    """(site, bytes) of data that lies somewhere in particular."""
    at = lies_at(task.data, root)
    return ((at, usual_bytes(task)),) if at and usual_bytes(task) else ()


def kept_micro_cny(store: Storage | None, size_bytes: float, seconds: float) -> int:
    """Of data and the checkpoints that lie at once, while the task lives."""
    if store is None:
        return 0
    return round(size_bytes / 2**30 * store.price_micro_cny_per_gib_month * seconds / MONTH_S)


def stored_bytes(data_bytes: int, one: Saving) -> int:
    return data_bytes + CHECKPOINTS_KEPT * one.size_bytes


def move(links: Sequence[Link], source: str, target: str, size: int) -> tuple[int, float, int]:
    """(bytes, seconds, egress in micro-CNY) of data that must come to where the task runs."""
    if not source or source == target or size == 0:
        return 0, 0.0, 0
    link = next((link for link in links if link.source == source and link.target == target), None)
    if link is None:
        return size, 0.0, 0
    return size, transfer_s(link, size), egress_micro_cny(link, size)
