"""Which part of a machine room limits a task, what more of each part brings for its money, and the cheapest way to a deadline."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qipan.planner.cluster import FAILURES_PER_NODE_DAY
from qipan.planner.machine import RESOURCES, Job, Outcome, Room, run, scaled
from qipan.quantities import format_bytes, format_duration

#: as good as no limit at all
PLENTY = 256.0
STEP = 1.25
MORE = 1.1
FACTOR_MOST = 1000.0
GIB = 2**30
MONTH_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Prices:
    """Micro-CNY a month for one unit more; what a chip brings with it (its FLOP/s, memory, links) is priced as its tariff.
    Estimates of 2025 list prices over 36 months; a site's own go in with `--prices`."""

    storage_read_per_gbyte_s: int = 1_500_000_000
    storage_write_per_gbyte_s: int = 2_500_000_000
    storage_per_tib: int = 120_000_000
    nic_per_gbyte_s: int = 60_000_000  # of each device: port, optics, its share of the switches
    spare_share: float = 0.03  # of the devices' tariff: spares and checks that halve the failures met


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the room.  `limits_s`: how much sooner the task would end with plenty of it; `saved_s` and `price_micro_cny`:
    what a tenth more of it brings, and costs while the task runs; `have`: as people say it."""

    name: str
    have: str
    limits_s: float
    saved_s: float
    price_micro_cny: int

    @property
    def saved_s_per_cny(self) -> float:
        return self.saved_s / (self.price_micro_cny / 1e6) if self.price_micro_cny > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Configuration:
    devices: int
    finish_s: float
    cost_micro_cny: int


@dataclass(frozen=True, slots=True)
class Balance:
    """`limit`: the part with most to gain; `remedy`: how much more of it until another part limits (`factor` times)."""

    place: str
    chip_class: str
    devices: int
    outcome: Outcome
    limit: str
    why: str
    remedy: str
    factor: float
    then: str
    parts: tuple[Part, ...]
    cheapest: Configuration | None


def balance(job: Job, room: Room, deadline_s: float | None = None, prices: Prices | None = None) -> Balance:
    found = run(job, room)
    limit, why = limiting(job, room, found)
    factor, then = cure(job, room, limit)
    parts = tuple(_part(job, room, found, name, prices or Prices()) for name in RESOURCES)
    return Balance(
        room.pool.site, room.pool.chip_class, room.devices, found, limit, why,
        _remedy(room, limit, factor, found), factor, then, parts, cheapest(job, room, deadline_s),
    )  # fmt: skip


def limiting(job: Job, room: Room, found: Outcome | None = None) -> tuple[str, str]:
    """The part that, given in plenty, brings the end nearest; of a task that cannot run, what is missing."""
    found = found or run(job, room)
    if found.missing:
        return found.missing, found.why
    gains = [(_gain_s(job, room, found, name), name) for name in RESOURCES]
    gain, name = max(gains, key=lambda pair: (pair[0], -RESOURCES.index(pair[1])))
    return name, f"with plenty of it the task would end {format_duration(max(0.0, gain))} sooner"


def _gain_s(job: Job, room: Room, found: Outcome, name: str) -> float:
    """Failures are charged with what they destroy and restart; without any, no checkpoint would be needed either, but that
    is the storage's to answer for."""
    if name == "failures":
        return found.lost_s["failures"]
    return found.finish_s - run(job, scaled(room, name, PLENTY)).finish_s


def cure(job: Job, room: Room, limit: str) -> tuple[float, str]:
    """The least factor, in steps of a quarter, after which another part limits, and which."""
    if limit not in RESOURCES:
        return 1.0, limit
    for factor in _factors():
        more = scaled(room, limit, factor)
        found = run(job, more)
        if not math.isfinite(found.finish_s):
            continue
        then, _ = limiting(job, more, found)
        if then != limit:
            return factor, then
    return FACTOR_MOST, limit


def cheapest(job: Job, room: Room, deadline_s: float | None) -> Configuration | None:
    """The number of devices, up to the pool's, that ends in time for least money."""
    best: Configuration | None = None
    for devices in _counts(room):
        found = run(job, replace(room, devices=devices))
        if not math.isfinite(found.finish_s) or (deadline_s is not None and found.finish_s > deadline_s):
            continue
        if best is None or found.cost_micro_cny < best.cost_micro_cny:
            best = Configuration(devices, found.finish_s, found.cost_micro_cny)
    return best


def _counts(room: Room) -> list[int]:
    most, node = room.pool.devices, room.pool.devices_per_node
    counts = [node * 2**power for power in range(20) if node * 2**power < most]
    return sorted(
        {*counts, *(count * 3 // 2 for count in counts if count * 3 // 2 < most), room.devices, most}
    )


def _factors() -> Iterator[float]:
    factor = STEP
    while factor < FACTOR_MOST:
        yield factor
        factor *= STEP


def _part(job: Job, room: Room, found: Outcome, name: str, prices: Prices) -> Part:
    if not math.isfinite(found.finish_s):
        return Part(name, have(room, name), 0.0, 0.0, 0)
    plenty = _gain_s(job, room, found, name)
    saved = found.finish_s - run(job, scaled(room, name, MORE)).finish_s
    return Part(name, have(room, name), plenty, saved, _price(room, found, name, prices))


def _price(room: Room, found: Outcome, name: str, prices: Prices) -> int:
    """Micro-CNY of a tenth more of it while the task runs."""
    more, months = MORE - 1, found.finish_s / MONTH_S
    match name:
        case "storage read":
            return round(
                more * room.storage.read_bytes_per_s / 1e9 * prices.storage_read_per_gbyte_s * months
            )
        case "storage write":
            return round(
                more * room.storage.write_bytes_per_s / 1e9 * prices.storage_write_per_gbyte_s * months
            )
        case "storage capacity":
            return round(more * room.storage.capacity_bytes / 2**40 * prices.storage_per_tib * months)
        case "NIC":
            more_bytes = more * room.chip.nic_bytes_per_s.value * room.devices
            return round(more_bytes / 1e9 * prices.nic_per_gbyte_s * months)
        case "failures":
            return round(found.cost_micro_cny * prices.spare_share)
    return round(found.cost_micro_cny * more)  # of a chip: as a tenth more chips


def have(room: Room, name: str, factor: float = 1.0) -> str:
    """So much of it there is, or would be."""
    chip, storage = room.chip, room.storage
    rates = {
        "HBM": chip.memory_bytes_per_s.value, "intra-node link": chip.intra_node_bytes_per_s.value,
        "NIC": chip.nic_bytes_per_s.value, "storage read": storage.read_bytes_per_s,
        "storage write": storage.write_bytes_per_s,
    }  # fmt: skip
    sizes = {"HBM capacity": chip.memory_bytes.value, "storage capacity": float(storage.capacity_bytes)}
    if name in rates:
        return f"{format_bytes(round(rates[name] * factor))}/s" if rates[name] else "not stated"
    if name in sizes:
        return format_bytes(round(sizes[name] * factor)) if sizes[name] else "not stated"
    if name == "FLOPs":
        peak = max((figure.value for figure in chip.peak_flops_per_s.values()), default=0.0)
        kinds = [kind for kind in ("bf16", "fp16", "fp32") if kind in chip.peak_flops_per_s]
        peak = chip.peak_flops_per_s[kinds[0]].value if kinds else peak
        return f"{peak * factor / 1e12:.0f} TFLOP/s"
    per_day = room.pool.failures_per_node_day or FAILURES_PER_NODE_DAY
    return f"{per_day * 1000 / factor:.3g} per 1000 node-days"


def _remedy(room: Room, limit: str, factor: float, found: Outcome) -> str:
    if limit == "failures":
        other = (
            f", or a start and load in {format_duration(found.restart_s / factor)}" if found.restart_s else ""
        )
        return f"failures down to {have(room, limit, factor)}{other}"
    if limit == "FLOPs":
        return f"{have(room, limit, factor)} a device, or more devices"
    if limit not in RESOURCES:
        return "more devices"
    where = " a device" if limit in ("HBM", "HBM capacity", "intra-node link", "NIC") else ""
    return f"{have(room, limit, factor)}{where} of {limit}"


@dataclass(frozen=True, slots=True)
class RoomBalance:
    """A pool and its last tasks: what limited how many of their device-seconds."""

    place: str
    chip_class: str
    share_by_limit: dict[str, float]
    tasks: tuple[tuple[str, Balance], ...]
    impossible: tuple[tuple[str, str], ...] = ()


def balance_room(jobs: Sequence[tuple[str, Job]], room: Room, prices: Prices | None = None) -> RoomBalance:
    """Each task weighs as much as the device-seconds that it takes."""
    found = [(name, balance(job, room, None, prices)) for name, job in jobs]
    weights: dict[str, float] = {}
    for _, one in found:
        if math.isfinite(one.outcome.finish_s):
            weights[one.limit] = weights.get(one.limit, 0.0) + one.outcome.finish_s * one.devices
    total = sum(weights.values()) or 1.0
    shares = {
        name: weight / total for name, weight in sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))
    }
    no = tuple((name, one.outcome.why) for name, one in found if not math.isfinite(one.outcome.finish_s))
    return RoomBalance(room.pool.site, room.pool.chip_class, shares, tuple(found), no)
