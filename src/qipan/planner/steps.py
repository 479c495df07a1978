"""Closed-form step times of the built-in trainer on probed devices."""

from collections.abc import Iterator
from dataclasses import dataclass

from qipan.hardware import Pool, Probe
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model, parameter_count, train_flops_per_token

BYTES = 4  # fp32 on these devices
COLLECTIVES_PER_TP_LAYER = 4  # two forward, two backward (Shoeybi et al. 2019, figure 4)


@dataclass(frozen=True, slots=True)
class Layout:
    tp: int
    dp: int
    zero: int

    @property
    def devices(self) -> int:
        return self.tp * self.dp


def layouts(devices: int, model: Model, rows: int) -> Iterator[Layout]:
    """What the built-in trainer can run on so many devices: data parallel, sharded (FSDP2), tensor parallel."""
    for tp in (1, 2, 4, 8):
        dp, rest = divmod(devices, tp)
        if rest or dp < 1 or dp > rows or model.heads % tp or model.kv_heads % tp or model.ffn_hidden % tp:
            continue
        yield Layout(tp, dp, 0)
        if dp > 1:
            yield Layout(tp, dp, 3)


def strategy_of(
    layout: Layout, model: Model, chip_class: str, rows: int, seq: int, seed: int, site: str
) -> Strategy:
    """Rows by largest remainder; equal devices get equal rows but for the remainder."""
    share, more = divmod(rows, layout.dp)
    rows_per_dp = tuple(share + (i < more) for i in range(layout.dp))
    stage = Stage(chip_class, ((0, model.layers),), tp=layout.tp, dp=layout.dp, rows_per_dp=rows_per_dp)
    return Strategy(seed, seq, rows, (SiteStrategy(site, (stage,), zero=layout.zero),))  # type: ignore[arg-type]


def step_s(layout: Layout, model: Model, probe: Probe, rows: int, seq: int) -> float:
    """Compute of the slowest rank, optimiser and launch overhead (measured at half a million weights, taken as
    proportional), and collectives by the alpha-beta model (Hockney 1994), ring all-reduce 2 (n-1)/n."""
    rows_most = -(-rows // layout.dp)
    weights = parameter_count(model)
    compute = rows_most * seq * train_flops_per_token(model, seq) / probe.train_flops_per_s / layout.tp
    overhead = probe.step_overhead_s * max(0.3, weights / 641_000)
    return (
        compute
        + overhead / layout.tp
        + _data_parallel_s(layout, weights, probe)
        + _tensor_s(layout, model, probe, rows_most, seq)
    )


def memory_bytes(layout: Layout, model: Model) -> int:
    """Weights, gradients and two Adam moments of one rank, fp32."""
    sharded = layout.tp * (layout.dp if layout.zero == 3 else 1)
    return 4 * BYTES * parameter_count(model) // sharded


def _data_parallel_s(layout: Layout, weights: int, probe: Probe) -> float:
    if layout.dp == 1:
        return probe.collective_latency_s if layout.tp > 1 else 0.0
    size = BYTES * weights / layout.tp
    ring = (layout.dp - 1) / layout.dp * size / probe.collective_bytes_per_s
    if layout.zero == 3:  # gather for forward, gather for backward, scatter of gradients; one call a block
        return 3 * ring + 3 * 6 * probe.collective_latency_s
    return 2 * ring + 3 * probe.collective_latency_s


def _tensor_s(layout: Layout, model: Model, probe: Probe, rows: int, seq: int) -> float:
    if layout.tp == 1:
        return 0.0
    size = BYTES * rows * seq * model.hidden
    one = probe.collective_latency_s + 2 * (layout.tp - 1) / layout.tp * size / probe.collective_bytes_per_s
    return COLLECTIVES_PER_TP_LAYER * model.layers * one


def best_layout(devices: int, model: Model, pool: Pool, rows: int, seq: int) -> tuple[Layout, float] | None:
    """The fastest layout on so many devices of a probed pool, and its step in seconds; ties by plainness."""
    assert pool.probe is not None
    found = [
        (step_s(layout, model, pool.probe, rows, seq), layout.tp, layout.zero, layout)
        for layout in layouts(devices, model, rows)
    ]
    if not found:
        return None
    seconds, _, _, layout = min(found, key=lambda item: item[:3])
    return layout, seconds
