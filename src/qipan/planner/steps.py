"""Closed-form step times of the built-in trainer on probed devices, and the constants that calibration steps give it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from qipan.hardware import Pool, Probe
from qipan.planner.learn import Seen, factors, observe, prior
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model, parameter_count, train_flops_per_token

BYTES = 4  # fp32 on these devices
COLLECTIVES_PER_TP_LAYER = 4  # two forward, two backward (Shoeybi et al. 2019, figure 4)
#: elementwise traffic of a token, forward and backward, in values: of a layer per hidden value (norms, rotation, residuals) and per
#: feed-forward value (gate, activation), of the loss per word; counted in this trainer's code
PASSES_HIDDEN, PASSES_FFN, PASSES_VOCAB = 34, 12, 7.5
#: work done again of forward and backward together: the whole forward pass, or attention alone
AGAIN = {"none": 1.0, "selective": 1.12, "full": 4 / 3}
#: a tensor-parallel layer against one with sharded weights, and the embedding, loss and optimiser around the layers
TENSOR_DISPATCH, AROUND_DISPATCH = 2.0, 9.0
#: collectives of a step beside those counted: the gradient's norm, the loss
AROUND_COLLECTIVES = 3
#: where calibration starts: one core of 2020s servers; 10 and 90 % of devices lie within this factor after a common one
START = Probe(
    1e11, 0.0, 2e8, 1e-3, 0.0, 0.0, launch_s=1.2e-3, product_flops_per_s=1.6e11, pass_bytes_per_s=2.7e9,
    weight_s=5e-9, dispatch_s=12e-3,
)  # fmt: skip
APART, WIRE = 1.4, 4.0


@dataclass(frozen=True, slots=True)
class Layout:
    tp: int
    dp: int
    zero: int
    pp: int = 1
    micro_batches: int = 1
    recompute: str = "none"

    @property
    def devices(self) -> int:
        return self.tp * self.dp * self.pp


def layouts(devices: int, model: Model, rows: int) -> Iterator[Layout]:
    """What the planner chooses from for the built-in trainer: data parallel, sharded (FSDP2), tensor parallel."""
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
    """Rows by largest remainder; equal devices get equal rows but for the remainder; layers evenly."""
    share, more = divmod(rows, layout.dp)
    rows_per_dp = tuple(share + (i < more) for i in range(layout.dp))
    edges = (0, *accumulate(_stages(model, layout.pp)))
    stages = tuple(
        Stage(chip_class, (edge,), tp=layout.tp, dp=layout.dp, rows_per_dp=rows_per_dp)
        for edge in pairwise(edges)
    )
    schedule = "1f1b" if layout.pp > 1 else "none"
    one = SiteStrategy(
        site, stages, layout.micro_batches, schedule, layout.zero, layout.recompute,  # type: ignore[arg-type]
    )  # fmt: skip
    return Strategy(seed, seq, rows, (one,))


def step_s(layout: Layout, model: Model, probe: Probe, rows: int, seq: int) -> float:
    return sum(parts_s(layout, model, probe, rows, seq).values())


def parts_s(layout: Layout, model: Model, probe: Probe, rows: int, seq: int) -> dict[str, float]:
    """Where the seconds of a step go, on the rank with most rows: matrix products, elementwise passes, launches, the optimiser,
    collectives by the alpha-beta model (Hockney 1994), rings of 2 (n-1)/n.  A pipeline passes its
    micro-batches one by one through its fullest stage; one turn of each other stage is the bubble (Narayanan et al. 2021, section 2.1)."""
    tokens = -(-rows // layout.dp) * seq
    weights = parameter_count(model) / layout.tp / layout.pp
    stages = _stages(model, layout.pp)
    worked = [
        _stage_s(layout, model, probe, tokens, seq, count, last=i == layout.pp - 1)
        for i, count in enumerate(stages)
    ]
    fullest = max(range(layout.pp), key=lambda i: (sum(worked[i]), -i))
    products, memory, launches = worked[fullest]
    others = sum(map(sum, worked)) - sum(worked[fullest])
    layers = stages[fullest]
    calls, sent_bytes = _transfers(layout, model, weights, tokens, layers)
    return {
        "compute": products, "memory bandwidth": memory, "launches": launches,
        "pipeline bubble": others / layout.micro_batches * probe.bubble_share,
        "optimiser": weights / (layout.dp if layout.zero == 3 else 1) * probe.weight_s,
        "sharded launches": _dispatches(layout, layers) * probe.dispatch_s,
        "collective calls": calls * probe.collective_latency_s,
        "links inside a node": sent_bytes / probe.collective_bytes_per_s,
    }  # fmt: skip


def _stages(model: Model, pp: int) -> list[int]:
    """Layers of each."""
    edges = [round(model.layers * stage / pp) for stage in range(pp + 1)]
    return [after - before for before, after in pairwise(edges)]


def _stage_s(
    layout: Layout, model: Model, probe: Probe, tokens: int, seq: int, layers: int, *, last: bool
) -> tuple[float, float, float]:
    """Matrix products, elementwise passes and launches of one stage for all its micro-batches."""
    again = AGAIN[layout.recompute]
    head = 6.0 * model.hidden * model.vocab
    layer = (train_flops_per_token(model, seq) - head) / model.layers * again
    passes = (PASSES_HIDDEN * model.hidden + PASSES_FFN * model.ffn_hidden) * again
    flops = tokens * (layers * layer + head * last) / layout.tp
    moved = BYTES * tokens * (layers * passes + PASSES_VOCAB * model.vocab * last) / layout.tp
    return (
        flops / (probe.product_flops_per_s or probe.train_flops_per_s),
        moved / probe.pass_bytes_per_s if probe.pass_bytes_per_s else 0.0,
        layers * layout.micro_batches * again * probe.launch_s,
    )


def memory_bytes(layout: Layout, model: Model) -> int:
    """Weights, gradients and two Adam moments of one rank, fp32."""
    sharded = layout.tp * layout.pp * (layout.dp if layout.zero == 3 else 1)
    return 4 * BYTES * parameter_count(model) // sharded


def _dispatches(layout: Layout, layers: int) -> float:
    sharded = layers + 1 if layout.zero == 3 and layout.dp > 1 else 0
    tensor = TENSOR_DISPATCH * layers + AROUND_DISPATCH if layout.tp > 1 else 0.0
    return sharded + tensor


def _transfers(layout: Layout, model: Model, weights: float, tokens: int, layers: int) -> tuple[float, float]:
    """Calls of collectives in a step, and the bytes that a rank sends."""
    if layout.devices == 1:
        return 0.0, 0.0
    count, size = float(AROUND_COLLECTIVES), 0.0
    if layout.dp > 1:  # ZeRO 3 gathers for both passes and scatters gradients, a call a block
        ring = (layout.dp - 1) / layout.dp * BYTES * weights
        count += 3 * (layers + 1) if layout.zero == 3 else 1
        size += (3 if layout.zero == 3 else 2) * ring
    activations = BYTES * tokens * model.hidden
    if layout.tp > 1:
        count += COLLECTIVES_PER_TP_LAYER * layers
        size += COLLECTIVES_PER_TP_LAYER * layers * 2 * (layout.tp - 1) / layout.tp * activations
    if layout.pp > 1:
        count += 2 * layout.micro_batches
        size += 2 * activations
    return count, size


@dataclass(frozen=True, slots=True)
class Timed:
    """A calibration step: what was run, and how long it took."""

    layout: Layout
    model: Model
    rows: int
    seq: int
    measured_s: float


#: which constant a part of the step is in inverse or direct proportion to
CONSTANTS = {
    "compute": "product_flops_per_s", "memory bandwidth": "pass_bytes_per_s", "launches": "launch_s",
    "optimiser": "weight_s", "sharded launches": "dispatch_s", "pipeline bubble": "bubble_share",
    "collective calls": "collective_latency_s", "links inside a node": "collective_bytes_per_s",
}  # fmt: skip

OF_THE_DEVICE = ("compute", "memory bandwidth", "launches", "optimiser", "sharded launches")


def calibrated(probe: Probe, timed: Sequence[Timed]) -> Probe:
    """`probe` with the constants under which the timed steps are likeliest: first one factor for the whole device, then each
    constant's own, lognormal around it.  Links start between what a lone collective reached and what is left of it while
    every core computes."""
    started = replace(
        START, collective_bytes_per_s=probe.collective_bytes_per_s / WIRE, collective_latency_s=probe.collective_latency_s
    )  # fmt: skip
    expected = [step_s(one.layout, one.model, started, one.rows, one.seq) for one in timed]
    apart = [math.log(one.measured_s / step) for one, step in zip(timed, expected, strict=True)]
    common = math.exp(sum(apart) / len(apart))
    started = _scaled(started, dict.fromkeys(OF_THE_DEVICE, common))
    belief = prior({**dict.fromkeys(CONSTANTS, APART), "links inside a node": WIRE})
    seen = [Seen(parts_s(one.layout, one.model, started, one.rows, one.seq), one.measured_s) for one in timed]
    found = _scaled(started, factors(observe(belief, seen)))
    return replace(probe, **{name: getattr(found, name) for name in CONSTANTS.values()})


def _scaled(probe: Probe, by_part: dict[str, float]) -> Probe:
    """Each part's seconds times its factor."""
    changes = {}
    for part, factor in by_part.items():
        name = CONSTANTS[part]
        old = getattr(probe, name)
        changes[name] = old / factor if name.endswith("per_s") else old * factor
    return replace(probe, **changes)


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
