"""The strategy space on one pool as arrays, one entry per candidate, so that a whole space is costed at once."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qipan.workload.model import Model

Ints = NDArray[np.int64]
RECOMPUTE = ("none", "selective", "full")
#: shorter pieces of a sequence gain nothing from context parallelism
CONTEXT_TOKENS = 4096
ONE = np.ones(1, dtype=np.int64)
ZERO = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Axes:
    """The values that are tried; pipeline_parallel is every count from 1 to the layers, recompute all of RECOMPUTE.
    `virtual` 0: the zero-bubble schedule; `node_sharded` 1: ZeRO 3 inside a node, replicas across (hybrid shard)."""

    tensor_parallel: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    micro_batch: tuple[int, ...] = (*range(1, 17), 20, 24, 32, 48, 64)
    virtual: tuple[int, ...] = (0, *range(1, 17))
    zero: tuple[int, ...] = (0, 1, 2, 3)
    context_parallel: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    expert_parallel: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    node_sharded: tuple[int, ...] = (0, 1)
    offload: tuple[int, ...] = (0, 1)
    fp8: tuple[int, ...] = (0, 1)

    def size(self, model: Model) -> int:
        """Candidates before any is left out."""
        others = (
            self.tensor_parallel, self.micro_batch, self.virtual, self.zero, self.context_parallel,
            self.expert_parallel, self.node_sharded, self.offload, self.fp8, RECOMPUTE,
        )  # fmt: skip
        return model.layers * int(np.prod([len(axis) for axis in others]))


AXES = Axes()


@dataclass(frozen=True, slots=True)
class Space:
    """Arrays of one length (or of length 1: the same for all): candidate i is tensor_parallel[i] x pipeline_parallel[i] x
    data_parallel[i] x context_parallel[i] devices, rows of micro_batch[i] sequences, model chunks per stage virtual[i]
    (0: zero bubble), ZeRO stage zero[i], recompute[i] an index into RECOMPUTE; experts over expert_parallel[i] of the data
    and context ranks; offload[i]: optimiser states in host memory; fp8[i]: matrix products in fp8.  `rows` is the global batch in sequences."""

    tensor_parallel: Ints
    pipeline_parallel: Ints
    data_parallel: Ints
    micro_batch: Ints
    virtual: Ints
    zero: Ints
    recompute: Ints
    rows: int | Ints
    context_parallel: Ints = field(default_factory=lambda: ONE)
    expert_parallel: Ints = field(default_factory=lambda: ONE)
    node_sharded: Ints = field(default_factory=lambda: ZERO)
    offload: Ints = field(default_factory=lambda: ZERO)
    fp8: Ints = field(default_factory=lambda: ZERO)

    def __len__(self) -> int:
        return len(self.tensor_parallel)

    def only(self, at: int) -> "Space":
        """One candidate alone."""

        def one(axis: Ints) -> Ints:
            return axis if len(axis) == 1 else axis[at : at + 1]

        return Space(
            one(self.tensor_parallel), one(self.pipeline_parallel), one(self.data_parallel), one(self.micro_batch),
            one(self.virtual), one(self.zero), one(self.recompute), self.rows, one(self.context_parallel),
            one(self.expert_parallel), one(self.node_sharded), one(self.offload), one(self.fp8),
        )  # fmt: skip


def space(
    model: Model,
    devices: int,
    rows: int,
    devices_per_node: int,
    axes: Axes = AXES,
    *,
    seq: int = 0,
    offload: bool = False,
    fp8: bool = False,
) -> Space:
    """Every layout that can be: tensor parallel inside a node and over the heads, layers over stages and chunks, rows over
    ranks with the remainder to the first, pieces of a sequence not below CONTEXT_TOKENS, experts over whole ranks.
    Pipelines shard gradients at the most (ZeRO 3 gathers weights anew for each micro-batch); interleaving needs micro-batches in
    multiples of the stages (Narayanan et al. 2021, section 2.2).  `offload`: states in host memory (they are slow there:
    for when nothing else fits).  `fp8`: the same with products in fp8, which is the task's to allow."""
    context = tuple(cp for cp in axes.context_parallel if cp == 1 or seq // cp >= CONTEXT_TOKENS)
    expert = tuple(
        ep
        for ep in axes.expert_parallel
        if ep == 1 or (model.moe is not None and model.moe.experts % ep == 0)
    )
    tensor, pipeline, around, experts = _grid(
        axes.tensor_parallel, range(1, model.layers + 1), context, expert
    )
    shape = tensor * pipeline * around
    fits = (devices % shape == 0) & (tensor <= devices_per_node)
    fits &= (model.kv_heads % tensor == 0) & (model.ffn_hidden % tensor == 0)
    fits &= (devices // shape <= rows) & ((devices // (tensor * pipeline)) % experts == 0)
    tensor, pipeline, around, experts = (axis[fits] for axis in (tensor, pipeline, around, experts))
    rest = _grid(axes.micro_batch, axes.virtual, axes.zero, range(len(RECOMPUTE)))
    micro, virtual, zero, recompute = rest
    kept = []
    for tp, pp, cp, ep in zip(
        tensor.tolist(), pipeline.tolist(), around.tolist(), experts.tolist(), strict=True
    ):
        dp = devices // (tp * pp * cp)
        counts = micro_batches(rows, np.full(1, dp), micro)
        good = counts <= rows // dp
        if pp > 1:
            good &= (zero != 3) & (virtual <= -(-model.layers // pp)) & ((virtual <= 1) | (counts % pp == 0))
            good &= (virtual != 0) | (
                recompute != 2
            )  # weight gradients are put off: their inputs must be kept
        else:
            good &= virtual == 1
        if ep > 1:
            good &= zero != 3
        kept.append((tp, pp, dp, cp, ep, np.flatnonzero(good)))
    lengths = [len(which) for *_, which in kept]
    where = np.concatenate([which for *_, which in kept]) if kept else np.zeros(0, dtype=np.int64)
    tp_, pp_, dp_, cp_, ep_ = (
        np.repeat(np.array([shape[axis] for shape in kept], dtype=np.int64), lengths) for axis in range(5)
    )
    found = Space(
        tp_, pp_, dp_, micro[where], virtual[where], zero[where], recompute[where], rows,
        cp_ if len(context) > 1 else ONE, ep_ if len(expert) > 1 else ONE,
        offload=ONE if offload else ZERO, fp8=ONE if fp8 else ZERO,
    )  # fmt: skip
    return _with_node_shards(found, devices_per_node) if 1 in axes.node_sharded else found


def micro_batches(rows: int | Ints, data_parallel: Ints, micro_batch: Ints) -> Ints:
    """Micro-batches of the rank with most rows; all others wait for it."""
    most_rows = -(-rows // data_parallel)
    return np.asarray(-(-most_rows // micro_batch))


def _with_node_shards(found: Space, devices_per_node: int) -> Space:
    """Each ZeRO 3 layout that spans nodes once more, sharded inside its node."""
    more = np.flatnonzero(
        (found.zero == 3) & (found.data_parallel * found.tensor_parallel > devices_per_node)
    )
    if not len(more):
        return found

    def longer(axis: Ints) -> Ints:
        return axis if len(axis) == 1 else np.concatenate([axis, axis[more]])

    length = len(found)
    sharded = np.zeros(length + len(more), dtype=np.int64)
    sharded[length:] = 1
    return Space(
        longer(found.tensor_parallel), longer(found.pipeline_parallel), longer(found.data_parallel),
        longer(found.micro_batch), longer(found.virtual), longer(found.zero), longer(found.recompute), found.rows,
        longer(found.context_parallel), longer(found.expert_parallel), sharded, found.offload, found.fp8,
    )  # fmt: skip


def _grid(*axes: tuple[int, ...] | range) -> tuple[Ints, ...]:
    return tuple(
        axis.ravel()
        for axis in np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    )
