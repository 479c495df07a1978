"""The strategy space on one pool as arrays, one entry per candidate, so that a whole space is costed at once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qipan.workload.model import Model

Ints = NDArray[np.int64]
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Axes:
    """The values that are tried; pipeline_parallel is every count from 1 to the layers, recompute all of RECOMPUTE."""

    tensor_parallel: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    micro_batch: tuple[int, ...] = (*range(1, 17), 20, 24, 32, 48, 64)
    virtual: tuple[int, ...] = tuple(range(1, 17))
    zero: tuple[int, ...] = (0, 1, 2, 3)

    def size(self, model: Model) -> int:
        """Candidates before any is left out."""
        shapes = len(self.tensor_parallel) * model.layers
        return shapes * len(self.micro_batch) * len(self.virtual) * len(self.zero) * len(RECOMPUTE)


AXES = Axes()


@dataclass(frozen=True, slots=True)
class Space:
    """Arrays of one length: candidate i is tensor_parallel[i] x pipeline_parallel[i] x data_parallel[i] devices, rows
    of micro_batch[i] sequences, model chunks per stage virtual[i], ZeRO stage zero[i], recompute[i] an index into
    RECOMPUTE.  `rows` is the global batch in sequences."""

    tensor_parallel: Ints
    pipeline_parallel: Ints
    data_parallel: Ints
    micro_batch: Ints
    virtual: Ints
    zero: Ints
    recompute: Ints
    rows: int

    def __len__(self) -> int:
        return len(self.tensor_parallel)


def space(model: Model, devices: int, rows: int, devices_per_node: int, axes: Axes = AXES) -> Space:
    """Every layout that can be: tensor parallel inside a node and over the heads, layers over stages and chunks, rows over
    ranks with the remainder to the first.  Pipelines shard gradients at the most (ZeRO 3 gathers weights anew for each
    micro-batch); interleaving needs micro-batches in multiples of the stages (Narayanan et al. 2021, section 2.2)."""
    tensor, pipeline = _grid(axes.tensor_parallel, range(1, model.layers + 1))
    fits = (devices % (tensor * pipeline) == 0) & (tensor <= devices_per_node)
    fits &= (model.kv_heads % tensor == 0) & (model.ffn_hidden % tensor == 0)
    fits &= devices // (tensor * pipeline) <= rows
    tensor, pipeline = tensor[fits], pipeline[fits]
    rest = _grid(axes.micro_batch, axes.virtual, axes.zero, range(len(RECOMPUTE)))
    many = len(rest[0])
    tp, pp = np.repeat(tensor, many), np.repeat(pipeline, many)
    micro, virtual, zero, recompute = (np.tile(axis, len(tensor)) for axis in rest)
    dp = devices // (tp * pp)
    count = micro_batches(rows, dp, micro)
    piped = pp > 1
    fits = (count <= rows // dp) & ~(piped & (zero == 3))
    fits &= np.where(piped, -(-model.layers // pp) >= virtual, virtual == 1)
    fits &= (virtual == 1) | (count % pp == 0)
    return Space(tp[fits], pp[fits], dp[fits], micro[fits], virtual[fits], zero[fits], recompute[fits], rows)


def micro_batches(rows: int, data_parallel: Ints, micro_batch: Ints) -> Ints:
    """Micro-batches of the rank with most rows; all others wait for it."""
    most_rows = -(-rows // data_parallel)
    return np.asarray(-(-most_rows // micro_batch))


def _grid(*axes: tuple[int, ...] | range) -> tuple[Ints, ...]:
    return tuple(
        axis.ravel()
        for axis in np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    )
