"""The strategy space on one pool as arrays, one entry per candidate, so that a whole space is costed at once."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from qipan.workload.model import Model

Ints = NDArray[np.int64]
RECOMPUTE = ("none", "selective", "full")
ZERO = (1, 3)
MICRO_BATCHES = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8, 16)
VIRTUAL = (1, 2, 4)


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


def space(model: Model, devices: int, rows: int, devices_per_node: int) -> Space:
    """Every layout whose counts divide: tensor parallel inside a node and over the heads, layers over the stages and
    their chunks, rows over ranks, the remainder to the first.  Pipelines shard the optimiser only (ZeRO 3 gathers weights anew
    for each micro-batch)."""
    found = []
    for tp in TENSOR:
        if devices % tp or tp > devices_per_node or model.kv_heads % tp or model.ffn_hidden % tp:
            continue
        for pp in range(1, min(model.layers, devices // tp) + 1):
            dp, rest = divmod(devices // tp, pp)
            if rest or dp > rows:
                continue
            for micro, virtual, zero, recompute in product(MICRO_BATCHES, VIRTUAL, ZERO, range(3)):
                count = micro_batches(rows, dp, micro)
                if count > rows // dp or (pp > 1 and (zero == 3 or -(-model.layers // pp) < virtual)):
                    continue
                if virtual > 1 and (pp == 1 or count % pp):
                    continue
                found.append((tp, pp, dp, micro, virtual, zero, recompute))
    table = np.array(found, dtype=np.int64).reshape(-1, 7)
    tensor, pipeline, data, micros, virtuals, zeros, recomputes = table.T
    return Space(tensor, pipeline, data, micros, virtuals, zeros, recomputes, rows)


def micro_batches(rows: int, data_parallel: int, micro_batch: int) -> int:
    """Micro-batches of the rank with most rows; all others wait for it."""
    most_rows = -(-rows // data_parallel)
    return -(-most_rows // micro_batch)
