"""Bytes of the fullest device of every candidate."""

import numpy as np

from qipan.planner.block import HALF_BYTES, STORED
from qipan.planner.constants import Floats, Number, Rates
from qipan.planner.sizes import Sizes
from qipan.planner.space import Space, micro_batches

#: contexts of the driver and of the collectives, and what the allocator cannot give out (it grows with what is used)
CONTEXT_BYTES = 1.5e9
#: relative standard deviation of the prediction: fragmentation, buffers of the collectives (no fit: few runs publish a peak)
SPREAD = 0.06
#: activations in fp8 where a product reads them
FP8_BYTES = 1.3


def memory(
    model: Sizes, space: Space, rates: Rates, seq: Number, *, sequence_parallel: Number, fp8: Number = 0.0,
    kernel: Number = 1.0,
) -> Floats:  # fmt: skip
    """The sum of `memory_parts`."""
    parts = memory_parts(
        model, space, rates, seq, sequence_parallel=sequence_parallel, fp8=fp8, kernel=kernel
    )
    total = np.zeros(())
    for part in parts.values():
        total = total + part
    return np.asarray(total)


def memory_parts(
    model: Sizes, space: Space, rates: Rates, seq: Number, *, sequence_parallel: Number, fp8: Number = 0.0,
    kernel: Number = 1.0,
) -> dict[str, Floats]:  # fmt: skip
    """Of the first stage: weights and gradients in 16 bits, 12 bytes of optimiser state and fp32 master (Rajbhandari et al.
    2020, section 3), activations (Korthikanti et al. 2022, table 2; without the attention matrix but where scores are
    stored and not recomputed), micro-batches in flight (Narayanan et al. 2021, section 2.2), logits in fp32."""
    tp, pp, dp, cp = (
        space.tensor_parallel,
        space.pipeline_parallel,
        space.data_parallel,
        space.context_parallel,
    )
    layers = np.ceil(model.layers / pp)
    near = (layers * model.near_weights + model.vocab * model.hidden + model.tower_weights) / tp
    far = layers * model.expert_weights / space.expert_parallel
    ranks = dp * cp
    shards = np.where(space.node_sharded, np.maximum(1, np.minimum(ranks, rates.linked / tp)), ranks)
    apart = np.maximum(1, ranks / space.expert_parallel)
    weights = _held(2.0, near, far, shards, apart, space.zero >= 3)
    gradients = _held(2.0, near, far, shards, apart, space.zero >= 2)
    moments = _held(12.0, near, far, shards, apart, space.zero >= 1) * np.where(space.offload, 0.0, 1.0)
    gathered = np.where(space.zero == 3, 2 * HALF_BYTES * model.near_weights / tp, 0.0)
    one = space.micro_batch * seq / cp
    whole = activation_bytes(model, tp, one, sequence_parallel, fp8, recompute=0)
    scores = np.where(np.asarray(kernel) == STORED, 5.0 * model.heads / tp * seq * one, 0.0)
    selected = activation_bytes(model, tp, one, sequence_parallel, fp8, recompute=1)
    kept_input = HALF_BYTES * one * model.hidden / np.where(sequence_parallel, tp, 1)
    recompute = space.recompute
    each = np.where(recompute == 2, kept_input, np.where(recompute == 1, selected, whole + scores))
    count = micro_batches(space.rows, dp, space.micro_batch)
    more = np.where(space.virtual > 1, (pp - 1) / (pp * np.maximum(space.virtual, 1)), 0.0)
    in_flight = np.minimum(count, pp * (1 + more))
    working = np.where(recompute == 2, whole + scores, np.where(recompute == 1, scores, 0.0))
    # Korthikanti et al. 2022, equation 1 without scores: 34 bytes a value; recomputed layer by layer where layers are
    towers = HALF_BYTES * one * model.tower_values / tp * np.where(recompute == 2, 1 / 17, 1.0) * in_flight
    logits = np.where(pp == 1, 6.0 * one * model.vocab / tp, 0.0)
    return {
        "weights": np.asarray(weights + gathered), "gradients": gradients, "optimiser": np.asarray(moments),
        "activations": np.asarray(layers * each * in_flight + working + towers), "logits": np.asarray(logits),
        "contexts": np.full(1, CONTEXT_BYTES),
    }  # fmt: skip


def activation_bytes(
    model: Sizes, tp: Number, tokens: Number, sequence_parallel: Number, fp8: Number, *, recompute: int
) -> Floats:
    """Of one layer, kept for its backward pass: inputs and outputs of the norms, queries, keys, values, the attention's
    output, both sides of the activation function.  Selective (1): norms' outputs and the function's are worked out anew."""
    width = model.score_width * 2 + model.kv_width
    expert = model.experts_per_token * model.expert_ffn + model.shared_ffn
    middle = (1 - model.expert_share) * model.ffn + model.expert_share * expert
    sides = model.gates + (1 if recompute == 0 else 0)
    routed = model.expert_share * model.experts_per_token * model.hidden
    around = (4 if recompute == 0 else 2) * model.hidden / np.where(sequence_parallel, tp, 1)
    return np.asarray(
        np.where(fp8, FP8_BYTES, HALF_BYTES) * tokens * (around + (width + sides * middle + routed) / tp)
    )


def _held(each: float, near: Number, far: Number, shards: Number, apart: Number, sharded: Number) -> Floats:
    """Bytes of the weights near and of the experts, in shards or whole."""
    return np.asarray(each * (near / np.where(sharded, shards, 1) + far / np.where(sharded, apart, 1)))
