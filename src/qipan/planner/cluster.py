"""Points of a task on a pool of catalogue chips that nobody measured: the best layout for each device count."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qipan.hardware import ChipClass, ChipClassId, Pool
from qipan.planner.costs import Constants, Costs, costs, rates
from qipan.planner.space import RECOMPUTE, Space, space
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model

#: chips with published runs in `benchmarks.planner_accuracy`; any other gets twice the band
WITH_RUNS = frozenset({"nvidia/a100-sxm4-80gb", "nvidia/a100-sxm4-40gb", "nvidia/h100-sxm5-80gb"})
BAND = 0.25
USABLE_MEMORY = 0.94  # drivers and contexts keep the rest
#: no figure of the catalogue: how long a start and a checkpoint's stall take, and failures of a node where the
#: site file states none (Llama 3 report, Grattafiori et al. 2024, section 3.3: 419 in 54 days on 2,048 nodes)
START_S, SAVE_S = 300.0, 20.0
FAILURES_PER_NODE_DAY = 3.79e-3
PARTS = {
    "compute_s": "compute", "tensor_s": "links inside a node", "bubble_s": "pipeline bubble",
    "data_s": "network between nodes", "optimizer_s": "memory bandwidth", "straggler_s": "stragglers",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest layout that fits on so many devices.  `parts_s`: where each second of the step goes."""

    devices: int
    step_s: float
    memory_bytes: float
    memory_margin: float
    parts_s: dict[str, float]
    strategy: Strategy

    @property
    def limit(self) -> str:
        """What costs most beside the arithmetic itself; compute when that is nine tenths or more."""
        if self.parts_s["compute"] >= 0.9 * self.step_s:
            return "compute"
        return max((name for name in self.parts_s if name != "compute"), key=lambda name: self.parts_s[name])


def best_layouts(
    model: Model, pool: Pool, chip: ChipClass, rows: int, seq: int, seed: int, least: int, most: int
) -> Iterator[Best]:
    """One for each device count that doubles from `least`, and for `most`; counts where nothing fits give none."""
    usable = chip.memory_bytes.value * USABLE_MEMORY
    for devices in _counts(least, most):
        candidates = space(model, devices, rows, min(pool.devices_per_node, chip.devices_per_node))
        if not len(candidates):
            continue
        found = costs(candidates, model, chip, seq)
        seconds = np.where(found.memory_bytes <= usable, found.step_s, np.inf)
        first = int(np.argmin(seconds))
        if not np.isfinite(seconds[first]):
            continue
        peak = float(found.memory_bytes[first])
        yield Best(
            devices, float(seconds[first]), peak, 1 - peak / chip.memory_bytes.value, _parts(found, first),
            _strategy(candidates, first, model, pool.chip_class, chip, seq, seed, pool.site),
        )  # fmt: skip


def why_none(model: Model, chip: ChipClass, rows: int, seq: int, pool: Pool, least: int, most: int) -> str:
    """The nearest miss, for a refusal."""
    smallest = min(
        (
            float(np.min(costs(found, model, chip, seq).memory_bytes))
            for count in _counts(least, most)
            if len(found := space(model, count, rows, min(pool.devices_per_node, chip.devices_per_node)))
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
    peak, memory_rate, _, _ = rates(chip, Constants())
    return peak > 0 and memory_rate > 0 and chip.memory_bytes.value > 0


def band(chip_class: ChipClassId) -> float:
    """Half-width of the 10-90 % band of the rate."""
    return BAND if chip_class in WITH_RUNS else 2 * BAND


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
    tp, pp, dp, micro, virtual = (
        int(axis[at])
        for axis in (
            candidates.tensor_parallel, candidates.pipeline_parallel, candidates.data_parallel,
            candidates.micro_batch, candidates.virtual,
        )
    )  # fmt: skip
    share, more = divmod(model.layers, pp * virtual)
    edges = [0]
    for chunk in range(pp * virtual):
        edges.append(edges[-1] + share + (chunk < more))
    rows, rest = divmod(candidates.rows, dp)
    stages = tuple(
        Stage(
            chip_class, tuple((edges[chunk], edges[chunk + 1]) for chunk in range(stage, pp * virtual, pp)),
            tp=tp, sp=tp > 1, dp=dp, rows_per_dp=tuple(rows + (rank < rest) for rank in range(dp)),
        )
        for stage in range(pp)
    )  # fmt: skip
    schedule = "none" if pp == 1 else "1f1b" if virtual == 1 else "interleaved_1f1b"
    precision = "bf16" if "bf16" in chip.peak_flops_per_s else "fp16"
    return Strategy(
        seed, seq, candidates.rows,
        (SiteStrategy(
            site, stages, micro_batches=-(-(rows + (rest > 0)) // micro), schedule=schedule,  # type: ignore[arg-type]
            zero=int(candidates.zero[at]), recompute=RECOMPUTE[int(candidates.recompute[at])],  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
        ),),
    )  # fmt: skip
