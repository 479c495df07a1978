"""Points of a task on a pool of catalogue chips that nobody measured: the best layout for each device count."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qipan.hardware import ChipClass, ChipClassId, Pool
from qipan.planner.constants import Constants, peak_flops_per_s, rates
from qipan.planner.costs import Costs, costs
from qipan.planner.evidence import CHIPS_WITH_RUNS
from qipan.planner.memory import SPREAD as MEMORY_SPREAD
from qipan.planner.memory import memory_parts
from qipan.planner.sizes import sizes
from qipan.planner.space import RECOMPUTE, Space, space
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model

#: 10 and 90 % of measured over predicted seconds where the constants were fitted without the run's table, over rows that leave
#: fields open (`python -m benchmarks.planner_accuracy`): what software a task will run with is as open.  A chip that no run was
#: published of has twice the width, in logarithms
FASTER, SLOWER = 0.75, 1.29
UNMEASURED = 2.0
#: the same where products are in fp8: published runs scatter from half faster (new software) to a third slower (that of 2023)
FP8_FASTER, FP8_SLOWER = 0.62, 1.4
#: how much wider a figure of the catalogue makes it
CONFIDENCE_WIDENS = {"measured": 1.0, "datasheet": 1.0, "third-party": 1.15, "estimate": 1.4}
USABLE_MEMORY = 0.94  # drivers and contexts keep the rest
#: no figure of the catalogue: how long a start and a checkpoint's stall take, and failures of a node where the
#: site file states none (Llama 3 report, Grattafiori et al. 2024, section 3.3: 419 in 54 days on 2,048 nodes)
START_S, SAVE_S = 300.0, 20.0
FAILURES_PER_NODE_DAY = 3.79e-3
#: of a space's `virtual`
SCHEDULES = ("interleaved_zero_bubble", "1f1b")
PARTS = {
    "compute_s": "compute", "tensor_s": "links inside a node", "bubble_s": "pipeline bubble",
    "data_s": "network between nodes", "optimizer_s": "memory bandwidth", "straggler_s": "stragglers",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest layout that fits on so many devices.  `parts_s`: where each second of the step goes; `memory_parts`: where
    each byte of the fullest device; `memory_odds`: the chance that it fits, the prediction's spread taken as normal."""

    devices: int
    step_s: float
    memory_bytes: float
    memory_margin: float
    parts_s: dict[str, float]
    strategy: Strategy
    memory_parts: dict[str, float] = field(default_factory=dict)
    memory_odds: float = 1.0
    before_s: dict[str, float] = field(default_factory=dict)  # `parts_s` before they were corrected

    @property
    def limit(self) -> str:
        """What costs most beside the arithmetic itself; compute when that is nine tenths or more."""
        if self.parts_s["compute"] >= 0.9 * self.step_s:
            return "compute"
        return max((name for name in self.parts_s if name != "compute"), key=lambda name: self.parts_s[name])


def best_layouts(
    model: Model, pool: Pool, chip: ChipClass, rows: int, seq: int, seed: int, least: int, most: int, *,
    fp8: bool = False,
) -> Iterator[Best]:  # fmt: skip
    """One for each device count that doubles from `least`, and for `most`; counts where nothing fits give none.  `fp8`: layouts
    in fp8 are tried too, on chips that have it."""
    allowed = (False, True) if fp8 and "fp8" in chip.peak_flops_per_s else (False,)
    per_node = min(pool.devices_per_node, chip.devices_per_node)
    for devices in _counts(least, most):
        tried = []
        for offload in (False, True):  # optimiser states in host memory, when nothing else fits
            for low in allowed:
                candidates = space(model, devices, rows, per_node, seq=seq, offload=offload, fp8=low)
                found, first = _fastest(candidates, model, chip, seq)
                if found is not None:
                    tried.append((float(found.step_s[first]), low, candidates, found, first))
            if tried:
                break
        if not tried:
            continue
        _, _, candidates, found, first = min(tried, key=lambda one: one[:2])
        peak = float(found.memory_bytes[first])
        yield Best(
            devices, float(found.step_s[first]), peak, 1 - peak / chip.memory_bytes.value, _parts(found, first),
            _strategy(candidates, first, model, pool.chip_class, chip, seq, seed, pool.site),
            _memory_parts(candidates, first, model, chip, seq),
            normal_share((chip.memory_bytes.value - peak) / (MEMORY_SPREAD * peak)),
        )  # fmt: skip


def _memory_parts(candidates: Space, at: int, model: Model, chip: ChipClass, seq: int) -> dict[str, float]:
    one = candidates.only(at)
    found = memory_parts(
        sizes(model),
        one,
        rates(chip, Constants()),
        seq,
        sequence_parallel=one.tensor_parallel > 1,
        fp8=one.fp8,
    )
    return {name: float(part.ravel()[0]) for name, part in found.items()}


def normal_share(deviations: float) -> float:
    """Share of a normal distribution below so many deviations above its mean."""
    return 0.5 * math.erfc(-deviations / math.sqrt(2))


def _fastest(candidates: Space, model: Model, chip: ChipClass, seq: int) -> tuple[Costs | None, int]:
    if not len(candidates):
        return None, 0
    found = costs(candidates, model, chip, seq)
    seconds = np.where(found.memory_bytes <= chip.memory_bytes.value * USABLE_MEMORY, found.step_s, np.inf)
    first = int(np.argmin(seconds))
    return (found if np.isfinite(seconds[first]) else None), first


def why_none(model: Model, chip: ChipClass, rows: int, seq: int, pool: Pool, least: int, most: int) -> str:
    """The nearest miss, for a refusal."""
    per_node = min(pool.devices_per_node, chip.devices_per_node)
    smallest = min(
        (
            float(np.min(costs(found, model, chip, seq).memory_bytes))
            for count in _counts(least, most)
            if len(found := space(model, count, rows, per_node, seq=seq, offload=True))
        ),
        default=None,
    )
    if smallest is None:
        return (
            f"no layout divides {rows} rows and {model.layers} layers over {least} to {most} devices; "
            "choose a global_batch with more factors of two"
        )
    return (
        f"needs {smallest / 2**30:.0f} GiB a device at the least on {least} to {most} devices, this chip has "
        f"{chip.memory_bytes.value / 2**30:.0f}; use more devices, or a shorter seq"
    )


def known(chip: ChipClass) -> bool:
    """Whether the catalogue says enough of the chip to cost a step."""
    return min(peak_flops_per_s(chip), chip.memory_bytes_per_s.value, chip.memory_bytes.value) > 0


def band(chip: ChipClass, *, fp8: bool = False) -> tuple[float, float]:
    """Factors of the 10 and 90 % bounds on the seconds of a step."""
    figures = (*chip.peak_flops_per_s.values(), chip.memory_bytes_per_s)
    width = max(CONFIDENCE_WIDENS[figure.confidence] for figure in figures)
    if chip.chip_class not in CHIPS_WITH_RUNS:
        width *= UNMEASURED
    faster, slower = (FP8_FASTER, FP8_SLOWER) if fp8 else (FASTER, SLOWER)
    return float(faster**width), float(slower**width)


def failures_per_s(pool: Pool, devices: int) -> float:
    nodes = -(-devices // pool.devices_per_node)
    return (pool.failures_per_node_day or FAILURES_PER_NODE_DAY) * nodes / 86400


def _counts(least: int, most: int) -> list[int]:
    counts = []
    count = max(1, least)
    while count < most:
        counts.append(count)
        count *= 2
    return [*counts, most] if most >= least else []


def _parts(found: Costs, at: int) -> dict[str, float]:
    return {name: float(getattr(found, field)[at]) for field, name in PARTS.items()}


def _strategy(
    candidates: Space, at: int, model: Model, chip_class: ChipClassId, chip: ChipClass, seq: int, seed: int, site: str
) -> Strategy:  # fmt: skip
    """Layers in contiguous chunks, the remainder to the first; stage i holds chunks i, i + p, i + 2p ..."""
    tp, pp, dp, micro, virtual, cp, ep, offload = (
        int(axis[at if len(axis) > 1 else 0])
        for axis in (
            candidates.tensor_parallel, candidates.pipeline_parallel, candidates.data_parallel,
            candidates.micro_batch, candidates.virtual, candidates.context_parallel, candidates.expert_parallel,
            candidates.offload,
        )
    )  # fmt: skip
    schedule = SCHEDULES[virtual] if virtual < 2 else "interleaved_1f1b"
    virtual = max(1, virtual)
    share, more = divmod(model.layers, pp * virtual)
    edges = [0]
    for chunk in range(pp * virtual):
        edges.append(edges[-1] + share + (chunk < more))
    rows, rest = divmod(int(candidates.rows), dp)
    stages = tuple(
        Stage(
            chip_class, tuple((edges[chunk], edges[chunk + 1]) for chunk in range(stage, pp * virtual, pp)),
            tp=tp, sp=tp > 1, cp=cp, ep=ep, dp=dp, rows_per_dp=tuple(rows + (rank < rest) for rank in range(dp)),
        )
        for stage in range(pp)
    )  # fmt: skip
    if pp == 1:
        schedule = "none"
    precision = "fp8" if candidates.fp8[0] else "bf16" if "bf16" in chip.peak_flops_per_s else "fp16"
    return Strategy(
        seed, seq, int(candidates.rows),
        (SiteStrategy(
            site, stages, micro_batches=-(-(rows + (rest > 0)) // micro), schedule=schedule,  # type: ignore[arg-type]
            zero=int(candidates.zero[at]), recompute=RECOMPUTE[int(candidates.recompute[at])],  # type: ignore[arg-type]
            precision=precision, offload=bool(offload),  # type: ignore[arg-type]
        ),),
    )  # fmt: skip
