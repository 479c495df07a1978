"""Memory and step time of every candidate of a strategy space on one chip class, from catalogue figures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qipan.hardware import ChipClass
from qipan.planner.space import Space
from qipan.workload.model import Model, parameter_count

Floats = NDArray[np.float64]
HALF_BYTES = 2  # bf16 and fp16


@dataclass(frozen=True, slots=True)
class Constants:
    """What measured runs fit (`python -m benchmarks.planner_accuracy --fit`); shares of a nominal figure but where the
    unit says otherwise.  None is keyed by model, table or framework."""

    gemm_share: float = 0.8655
    attention_share: float = 0.2347
    memory_share: float = 0.4759
    link_share: float = 0.1707
    nic_share: float = 1
    layer_floor_s: float = 2.25e-05
    width_per_intensity: float = 2.769
    tensor_exposed: float = 0.105
    data_exposed: float = 0.2948
    pipeline_exposed: float = 0.1219
    straggler_per_doubling: float = 0.0012


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


def costs(space: Space, model: Model, chip: ChipClass, seq: int, constants: Constants | None = None) -> Costs:
    """Compute by GEMM, attention, bytes through memory and a launch floor per layer; collectives by alpha-beta without
    alpha (large messages); bubble (p - 1) / (v m) (Narayanan et al. 2021, section 2.2); stragglers grow with the
    logarithm of the devices."""
    c = constants or Constants()
    tp, pp, dp = space.tensor_parallel, space.pipeline_parallel, space.data_parallel
    micro = space.micro_batch
    count = np.ceil(np.ceil(space.rows / dp) / micro)
    layers = np.ceil(model.layers / pp)
    tokens = micro * seq
    peak, memory_rate, link, nic = rates(chip, c)

    weights = layer_weights(model)
    width = model.hidden / tp
    gemm_rate = (
        peak * c.gemm_share * width / (width + c.width_per_intensity * peak / chip.memory_bytes_per_s.value)
    )
    gemm = 2.0 * active_layer_weights(model) * tokens / tp / gemm_rate
    window = min(seq, model.sliding_window or seq)
    attention = 2.0 * model.heads * model.head_dim * window * tokens / tp / (peak * c.attention_share)
    moved = 16.0 * HALF_BYTES * tokens * model.hidden / memory_rate
    again = np.array([0.0, 0.0, 1.0])[space.recompute]
    attention_again = np.array([0.0, 1.0, 1.0])[space.recompute]
    layer = np.maximum(
        (3 + again) * (gemm + moved) + (3 + attention_again) * attention, (3 + again) * c.layer_floor_s
    )
    head = 6.0 * model.hidden * model.vocab * tokens / tp / gemm_rate
    stage = layers * layer + head
    compute = count * stage

    inside = np.where(tp <= chip.devices_per_node, link, nic)
    reduce = 2.0 * (tp - 1) / tp * HALF_BYTES * tokens * model.hidden / inside
    per_layer = c.tensor_exposed * (4 + 2 * again) * reduce
    if model.moe is not None:
        per_layer = (
            per_layer + 4.0 * model.moe.experts_per_token * HALF_BYTES * tokens * model.hidden / tp / link
        )
    tensor = count * layers * per_layer
    pass_s = np.where(pp > 1, 2.0 * space.virtual * HALF_BYTES * tokens * model.hidden / nic, 0.0)
    bubble = (pp - 1) / space.virtual * (compute + tensor) / count + count * pass_s * c.pipeline_exposed

    mine = layers * weights / tp + model.vocab * model.hidden / tp
    across = np.where(dp * tp <= chip.devices_per_node, link, nic)
    ring = (dp - 1) / dp * HALF_BYTES * mine / across
    gathered = 3.0 * ring * np.where(space.zero == 3, count, 0.0)
    exchanged = np.where(space.zero == 3, gathered, 4.0 * ring)  # gradients travel in fp32
    data = np.maximum(c.data_exposed * exchanged, exchanged - compute)
    optimizer = 28.0 * mine / np.where(space.zero >= 1, dp, 1) / memory_rate
    plain = compute + tensor + bubble + data + optimizer
    straggler = plain * c.straggler_per_doubling * np.log2(tp * pp * dp)
    return Costs(
        memory(space, model, seq), plain + straggler, compute, tensor, bubble, data, optimizer, straggler
    )


def memory(space: Space, model: Model, seq: int) -> Floats:
    """Bytes of the first stage, the fullest: weights and gradients in 16 bits, 12 bytes an optimiser state and fp32
    master sharded over data parallel (Rajbhandari et al. 2020, section 3), activations with the attention matrix never
    stored (Korthikanti et al. 2022, table 2, sequence parallel), one micro-batch in flight a stage, logits in fp32."""
    tp, pp, dp = space.tensor_parallel, space.pipeline_parallel, space.data_parallel
    layers = np.ceil(model.layers / pp)
    mine = layers * layer_weights(model) / tp + model.vocab * model.hidden / tp
    weights, gradients, moments = (np.where(space.zero >= stage, dp, 1) for stage in (3, 2, 1))
    states = mine * (2.0 / weights + 2.0 / gradients + 12.0 / moments)
    gathered = np.where(space.zero == 3, 4.0 * layer_weights(model) / tp, 0.0)
    one = space.micro_batch * seq * model.hidden
    per_layer = np.array([34.0, 34.0, 2.0])[space.recompute] * one / tp
    in_flight = np.minimum(space.rows / (dp * space.micro_batch), pp) * (
        1 + np.where(space.virtual > 1, (pp - 1) / (pp * space.virtual), 0.0)
    )
    working = np.where(space.recompute == 2, 34.0 * one / tp, 0.0)
    logits = np.where(pp == 1, 6.0 * space.micro_batch * seq * model.vocab / tp, 0.0)
    return np.asarray(states + gathered + layers * per_layer * in_flight + working + logits + 1.5e9)


def rates(chip: ChipClass, constants: Constants) -> tuple[float, float, float, float]:
    """FLOP/s in 16 bits, and bytes/s of memory, the node's links and the network; a network that is not published is
    taken as 100 Gbit/s a device, a fabric as PCIe 4 (32e9)."""
    peak = next(
        (
            chip.peak_flops_per_s[kind].value
            for kind in ("bf16", "fp16", "fp32")
            if kind in chip.peak_flops_per_s
        ),
        0.0,
    )
    link = (chip.intra_node_bytes_per_s.value or 32e9) * constants.link_share
    nic = (chip.nic_bytes_per_s.value or 12.5e9) * constants.nic_share
    return peak, chip.memory_bytes_per_s.value * constants.memory_share, link, nic


def layer_weights(model: Model) -> float:
    """Weights of one layer, all experts, the mean over the layers."""
    outer = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return (parameter_count(model) - outer) / model.layers


def active_layer_weights(model: Model) -> float:
    """Weights of one layer that a token meets."""
    if model.moe is None:
        return layer_weights(model)
    matrices = 3 if model.gated_mlp else 2
    idle = model.moe.experts - model.moe.experts_per_token
    return layer_weights(model) - idle * matrices * model.hidden * model.moe.expert_ffn_hidden
