"""Memory and step time of every candidate of a strategy space on one chip class, from catalogue figures."""

from dataclasses import dataclass, fields

import numpy as np

from qipan.hardware import ChipClass
from qipan.planner.block import FUSED, HALF_BYTES, Block, Split, block
from qipan.planner.constants import Constants, Floats, Number, Rates, rates
from qipan.planner.memory import memory
from qipan.planner.sizes import Sizes, sizes
from qipan.planner.space import Ints, Space, micro_batches
from qipan.workload.model import Model

#: bytes/s between a device and its host's memory, half of PCIe 4 x16, where optimiser states lie there
HOST_BYTES_PER_S = 16e9
#: of the bubble that is left by the zero-bubble schedule with the memory of 1F1B (Qi et al. 2024, table 2, ZB-H1)
ZERO_BUBBLE = 1 / 3


@dataclass(frozen=True, slots=True)
class Costs:
    """Arrays, one entry per candidate: peak bytes of the fullest device; seconds of a step and what they are spent on
    (they add up to `step_s`)."""

    memory_bytes: Floats
    step_s: Floats
    compute_s: Floats
    tensor_s: Floats
    bubble_s: Floats
    data_s: Floats
    optimizer_s: Floats
    straggler_s: Floats


def costs(
    space: Space,
    model: Model,
    chip: ChipClass,
    seq: int,
    constants: Constants | None = None,
    *,
    kernel: int = FUSED,
) -> Costs:
    """The costs of one layer are worked out once per way to split it, then gathered."""
    c = constants or Constants()
    shape, rate = sizes(model), rates(chip, c)
    combos, where = _combinations(
        space.tensor_parallel,
        space.context_parallel,
        space.expert_parallel,
        space.micro_batch,
        space.recompute,
        space.fp8,
    )
    tp, cp, ep, micro, recompute, fp8 = combos
    split = Split(tp, cp, ep, micro, tp > 1, recompute, seq, fp8, float(kernel))
    table = block(shape, split, rate, c)
    gathered = Block(*(getattr(table, part.name)[where] for part in fields(Block)))
    parallel = np.asarray(space.tensor_parallel > 1)
    peak = memory(shape, space, rate, seq, sequence_parallel=parallel, fp8=space.fp8, kernel=float(kernel))
    return step(shape, space, gathered, rate, c, seq, peak, parallel)


def step(
    model: Sizes,
    space: Space,
    layer: Block,
    rate: Rates,
    c: Constants,
    seq: Number,
    memory_bytes: Floats,
    sequence_parallel: Number,
) -> Costs:
    """Micro-batches one after another; a bubble of (p - 1) / v of them (Narayanan et al. 2021, section 2.2); gathers and
    reductions of data parallel ranks where computing does not hide them; the optimiser's pass through memory; stragglers
    that grow with the logarithm of the devices."""
    tp, pp, dp, cp = (
        space.tensor_parallel,
        space.pipeline_parallel,
        space.data_parallel,
        space.context_parallel,
    )
    count = micro_batches(space.rows, dp, space.micro_batch)
    layers = model.layers / pp
    virtual = np.maximum(space.virtual, 1)
    tokens = space.micro_batch * seq / cp
    nic = rate.nic_bytes_per_s

    head = layer.head_s / np.where(virtual > 1, pp, 1)
    tower = (
        tokens * model.tower_flops / tp / rate.product_flops_per_s
    )  # on the first stage, for which the others wait
    compute = count * (layers * layer.layer_s + head + tower)
    tensor = count * layers * layer.transfer_s
    left = np.where(space.virtual == 0, ZERO_BUBBLE, 1.0)
    bubble = left * (pp - 1) / virtual * layers * (layer.layer_s + layer.transfer_s)
    boundary = 2.0 * virtual * HALF_BYTES * tokens * model.hidden / np.where(sequence_parallel, tp, 1) / nic
    bubble = bubble + np.where(pp > 1, (count + pp - 1) * c.pipeline_exposed * boundary, 0.0)

    near = (layers * model.near_weights + model.vocab * model.hidden + model.tower_weights) / tp
    far = layers * model.expert_weights / space.expert_parallel
    data = _data_s(space, near, far, count, compute, rate, c, sequence_parallel)
    shards = np.where(space.zero >= 1, dp * cp, 1)
    passed = 28.0 * (
        near / shards + far / np.where(space.zero >= 1, np.maximum(1, dp * cp / space.expert_parallel), 1)
    )
    optimizer = passed / np.where(space.offload, HOST_BYTES_PER_S, rate.memory_bytes_per_s) + c.step_floor_s
    plain = compute + tensor + bubble + data + optimizer
    straggler = plain * c.straggler_per_doubling * np.log2(tp * pp * dp * cp)
    return Costs(memory_bytes, plain + straggler, compute, tensor, bubble, data, optimizer, straggler)


def _data_s(
    space: Space, near: Floats, far: Floats, count: Ints, compute: Floats, rate: Rates, c: Constants, parallel: Number
) -> Floats:  # fmt: skip
    """Rings of data parallel ranks: (n - 1) / n of the bytes at the rate of the slowest link; a ring that has g ranks in a
    node uses the network shares of g devices (of experts: those that hold the same ones).  ZeRO 3 gathers weights for both passes and scatters gradients, in every micro-batch; else
    gradients are reduced once, half of it behind the backward pass where the framework overlaps (as it does with
    sequence parallelism)."""
    tp = space.tensor_parallel
    ranks = space.data_parallel * space.context_parallel
    inside = np.maximum(1, np.minimum(ranks, rate.linked / tp))
    link, nic = rate.link_bytes_per_s, rate.nic_bytes_per_s
    across = np.where(ranks * tp <= rate.linked, link, np.minimum(link, nic * inside))
    experts = np.maximum(1, ranks / space.expert_parallel)
    apart = np.maximum(1, np.minimum(experts, rate.linked / (tp * space.expert_parallel)))
    between = np.where(ranks * tp <= rate.linked, link, np.minimum(link, nic * apart))
    once = HALF_BYTES * ((ranks - 1) / ranks * near / across + (experts - 1) / experts * far / between)
    local = HALF_BYTES * (inside - 1) / inside * near / link
    gathers = count * np.where(space.node_sharded, 3 * local, 3 * once)
    replicas = np.where(space.node_sharded, 2 * once, 0.0)
    sharded = np.maximum(c.shard_exposed * gathers, gathers - compute) + replicas
    return np.asarray(np.where(space.zero == 3, sharded, np.where(parallel, 0.5, 1.0) * 2 * once))


def _combinations(*axes: Ints) -> tuple[list[Ints], Ints]:
    """Each combination of the values that occur on some axes, and for each candidate which one is its own."""
    present = [np.flatnonzero(np.bincount(axis)) for axis in axes]
    grid = [part.ravel() for part in np.meshgrid(*present, indexing="ij")]
    where: Ints = np.zeros(1, dtype=np.int64)
    for values, axis in zip(present, axes, strict=True):
        code = np.zeros(int(values[-1]) + 1 if len(values) else 1, dtype=np.int64)
        code[values] = np.arange(len(values))
        where = where * len(values) + code[axis]
    return grid, where
