"""What one layer of a model costs a device for one micro-batch: products, attention, memory traffic, transfers."""

from dataclasses import dataclass

import numpy as np

from qipan.planner.constants import Constants, Floats, Number, Rates
from qipan.planner.sizes import Sizes

HALF_BYTES = 2  # bf16 and fp16
#: attention that stores its scores; one that does not, portable over chips; one written for the chip
STORED, FUSED, TUNED = 0, 1, 2
#: a portable kernel's work follows the memory more than the matrix units: the FLOP/byte at which both agree (A100)
FUSED_INTENSITY = 150.0
#: the fullest expert over the mean, with a balancing loss
IMBALANCE = 1.1
#: expert layers launch the router, two permutations and grouped products beside the dense layer's kernels
EXPERT_LAUNCHES = 3.0


@dataclass(frozen=True, slots=True)
class Split:
    """How a layer is split: counts of devices, sequences of a micro-batch, `recompute` an index into RECOMPUTE,
    `sequence_parallel` and `fp8` 0 or 1, `kernel` one of STORED, FUSED, TUNED.  `seq`: tokens of a sequence."""

    tensor_parallel: Number
    context_parallel: Number
    expert_parallel: Number
    micro_batch: Number
    sequence_parallel: Number
    recompute: Number
    seq: Number
    fp8: Number = 0.0
    kernel: Number = float(FUSED)


@dataclass(frozen=True, slots=True)
class Block:
    """Seconds of one layer, forward and backward, for one micro-batch; `head_s`: the loss and the output matrix."""

    layer_s: Floats
    transfer_s: Floats
    head_s: Floats
    forward_share: Floats  # of layer_s: the first forward pass


def block(model: Sizes, split: Split, rates: Rates, c: Constants) -> Block:
    tp, cp = split.tensor_parallel, split.context_parallel
    tokens = np.asarray(split.micro_batch * split.seq / cp, dtype=float)
    product = _Products(model, split, rates, c, tokens)
    forward, backward = product.layer()
    attention, passes = (
        _attention_s(model, split, rates, c, tokens),
        _passes_s(model, split, rates, c, tokens),
    )
    full = np.asarray(split.recompute == 2, dtype=float)
    selective = np.asarray(split.recompute == 1, dtype=float)
    stored = np.asarray(split.kernel == STORED, dtype=float)
    busy = (1 + full) * (forward + passes) + backward + (2 + 0.5 * selective * (1 - stored)) * passes
    busy = busy + (3 + full + selective * stored) * attention
    floor = c.layer_floor_s * (1 - rates.compiled) * (1 + (EXPERT_LAUNCHES - 1) * model.expert_share)
    layer = np.maximum(busy, (3 + full) * floor)
    head_forward, head_backward = product.both(model.vocab / tp, model.hidden)
    logits = 16.0 * tokens * model.vocab / tp / rates.memory_bytes_per_s
    return Block(
        layer, _transfers_s(model, split, rates, c, tokens, full), head_forward + head_backward + logits,
        np.asarray((forward + passes + attention) / busy),
    )  # fmt: skip


class _Products:
    """Matrix products of m x k with k x n: 2 (m n + half a wave of output tiles) (k + the depth lost to the epilogue's
    memory traffic) FLOP at the rate reached.  The wave: NVIDIA, Matrix Multiplication Background, section 4.2."""

    def __init__(self, model: Sizes, split: Split, rates: Rates, c: Constants, tokens: Floats) -> None:
        self.model, self.split, self.tokens = model, split, tokens
        eager = 1 - np.asarray(rates.compiled, dtype=float)
        self.wave = c.half_wave * eager
        intensity = rates.peak_flops_per_s / rates.raw_memory_bytes_per_s
        self.depth = c.depth_per_intensity * intensity * eager
        flops = np.where(split.fp8, rates.product_fp8_flops_per_s, rates.product_flops_per_s)
        self.flops_per_s = np.asarray(flops)

    def layer(self) -> tuple[Floats, Floats]:
        model, tp = self.model, self.split.tensor_parallel
        forward = backward = np.zeros(())
        for number, (outputs, inputs) in enumerate(model.projections):
            there = np.asarray(inputs > 0, dtype=float)
            wide = np.maximum(outputs / (1 if number == 1 else tp), 1)
            deep = np.maximum(
                inputs / (tp if number == 1 else 1), 1
            )  # the output matrix is split along its inputs
            one, two = self.both(wide, deep)
            forward, backward = forward + there * one, backward + there * two
        dense = 1 - model.expert_share
        for share, width in (
            (dense, model.ffn),
            (model.expert_share * (model.shared_ffn > 0), model.shared_ffn),
        ):
            if not np.any(share):
                continue
            for wide, deep in ((model.gates * width / tp, model.hidden), (model.hidden, width / tp)):
                one, two = self.both(np.maximum(wide, 1), np.maximum(deep, 1))
                forward, backward = forward + share * one, backward + share * two
        if np.any(model.expert_share):
            one, two = self._experts()
            forward, backward = forward + model.expert_share * one, backward + model.expert_share * two
        return np.asarray(forward), np.asarray(backward)

    def both(self, outputs: Number, inputs: Number) -> tuple[Floats, Floats]:
        """Forward; gradients of the input and of the weights."""
        backward = self._one(self.tokens, inputs, outputs) + self._one(outputs, inputs, self.tokens)
        return self._one(self.tokens, outputs, inputs), backward

    def _one(self, rows: Number, columns: Number, inner: Number, groups: Number = 1.0) -> Floats:
        return np.asarray(2 * (groups * rows * columns + self.wave) * (inner + self.depth) / self.flops_per_s)

    def _experts(self) -> tuple[Floats, Floats]:
        """Grouped products of the experts that lie on one device, with the tokens of its expert-parallel group."""
        model, ep = self.model, self.split.expert_parallel
        mine = model.experts / ep
        rows = IMBALANCE * self.tokens * ep * model.experts_per_token / model.experts
        width = np.maximum(model.expert_ffn, 1)
        forward = backward = np.zeros(())
        for outputs, inputs in ((model.gates * width, model.hidden), (model.hidden, width)):
            forward = forward + self._one(rows, outputs, inputs, mine)
            backward = (
                backward + self._one(rows, inputs, outputs, mine) + self._one(outputs, inputs, rows, mine)
            )
        return np.asarray(forward), np.asarray(backward)


def _attention_s(model: Sizes, split: Split, rates: Rates, c: Constants, tokens: Floats) -> Floats:
    """Scores and their product with the values, forward.  Stored scores go through memory some times (Dao et al. 2022,
    section 2); a fused kernel is bound by what is on the chip beside the matrix units."""
    keys = np.where((model.window > 0) & (model.window < split.seq), model.window, split.seq)
    flops = 4.0 * keys * model.score_width / split.tensor_parallel * tokens
    stored = flops / (0.5 * rates.peak_flops_per_s)
    stored = (
        stored
        + c.score_bytes * model.heads / split.tensor_parallel * keys * tokens / rates.raw_memory_bytes_per_s
    )
    fused = flops / (c.fused_attention_share * FUSED_INTENSITY * rates.raw_memory_bytes_per_s)
    tuned = flops / (c.tuned_attention_share * rates.clock * rates.peak_flops_per_s)
    return np.asarray(np.where(split.kernel == STORED, stored, np.where(split.kernel == TUNED, tuned, fused)))


def _passes_s(model: Sizes, split: Split, rates: Rates, c: Constants, tokens: Floats) -> Floats:
    """Norms, residuals and activations, forward: what sequence parallelism splits, and what tensor parallelism does
    (Korthikanti et al. 2022, section 4.2)."""
    tp = split.tensor_parallel
    routed = c.expert_passes * model.experts_per_token * model.hidden
    routed = routed + 3 * model.gates * (model.experts_per_token * model.expert_ffn + model.shared_ffn)
    middle = (1 - model.expert_share) * 3 * model.gates * model.ffn / tp + model.expert_share * routed
    around = c.layer_passes * model.hidden / np.where(split.sequence_parallel, tp, 1)
    moved = HALF_BYTES * tokens * (around + middle)
    return np.asarray((1 - rates.compiled) * moved / rates.memory_bytes_per_s)


def _transfers_s(
    model: Sizes, split: Split, rates: Rates, c: Constants, tokens: Floats, full: Floats
) -> Floats:
    """All-reduces of tensor parallelism, keys and values of context parallelism, tokens to their experts and back; forward,
    backward, and once more what is recomputed.  A group that spans nodes is bound by all their network together."""
    tp, cp, ep = split.tensor_parallel, split.context_parallel, split.expert_parallel
    link, nic, linked = rates.link_bytes_per_s, rates.nic_bytes_per_s, rates.linked
    size = HALF_BYTES * tokens * model.hidden
    inside = np.where(tp <= linked, link, np.minimum(link, nic * linked))
    exposed = np.where(split.sequence_parallel, c.sequence_exposed, 1.0)
    total = exposed * (4 + 2 * full) * 2 * (tp - 1) / tp * size / inside
    if np.any(np.asarray(cp) > 1):
        ring = np.where(tp * cp <= linked, link, nic)
        keys = HALF_BYTES * model.kv_width / tp * tokens * (cp - 1)
        total = total + c.sequence_exposed * (3 + full) * keys / ring
    if np.any(model.expert_share):
        nodes = np.maximum(1, ep / linked)  # a token travels once to each node that has an expert of its own
        far = nodes * (1 - (1 - 1 / nodes) ** model.experts_per_token) * (nodes - 1) / nodes / nic
        near = np.minimum(ep, linked)
        moved = np.maximum(far, model.experts_per_token * (near - 1) / near / link)
        total = total + model.expert_share * c.expert_exposed * (4 + 2 * full) * size * moved
    return np.asarray(total)
