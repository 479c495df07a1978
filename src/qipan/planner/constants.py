"""The twenty numbers that measured runs fit, and what of them follows for a chip."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qipan.hardware import ChipClass

Floats = NDArray[np.float64]
Number = float | NDArray[Any]  # one chip or model, or an entry a run or candidate


@dataclass(frozen=True, slots=True)
class Constants:
    """Fitted by `python -m benchmarks.planner_accuracy --fit 1`; none is keyed by model, table or framework.  A `share` is
    the part of a published figure that is reached, `exposed` the part of a transfer that computing does not hide."""

    gemm_share: float = 0.8163
    full_clock_w_per_flops: float = 1.188e-12  # watts per FLOP/s that hold the clock of the data sheet
    fused_attention_share: float = 0.6516
    tuned_attention_share: float = 0.8845
    score_bytes: float = 14.45  # of memory traffic per attention score that is stored
    memory_share: float = 0.7543
    link_share: float = 0.8282
    nic_share: float = 0.9379
    half_wave: float = 2.304e06  # output elements of a matrix product whose time is lost at its end
    depth_per_intensity: float = 1.959  # terms of an inner product lost per FLOP/byte of the chip
    layer_passes: float = (
        7.601  # times that a layer moves its activations through memory, beside its products
    )
    layer_floor_s: float = 0.001105  # to launch one pass of one layer
    sequence_exposed: float = 0.461  # of tensor parallel traffic under sequence parallelism
    shard_exposed: float = 0.2834  # of the gathers of ZeRO 3
    pipeline_exposed: float = 0.2427
    straggler_per_doubling: float = 0.002238
    fp8_share: float = 0.79  # of the gain that the fp8 peak promises
    step_floor_s: float = 0.01258
    expert_exposed: float = 0.4777  # of the exchange between experts
    expert_passes: float = 5.573  # times that a routed token moves through memory


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device of a chip class reaches: FLOP/s of matrix products in 16 bits and fp8, bytes/s of its memory, of its
    links (to `linked` devices) and of its share of the network.  `compiled`: the whole step is one program, so that
    elementwise work is fused and nothing is launched."""

    product_flops_per_s: Number
    product_fp8_flops_per_s: Number
    peak_flops_per_s: Number
    clock: Number
    memory_bytes_per_s: Number
    raw_memory_bytes_per_s: Number
    link_bytes_per_s: Number
    nic_bytes_per_s: Number
    linked: Number
    compiled: Number


#: where a figure is not published: a fabric as PCIe 4, a network of 100 Gbit/s a device
UNKNOWN_LINK, UNKNOWN_NIC = 32e9, 12.5e9


def rates(chip: ChipClass, c: Constants) -> Rates:
    """A chip whose power is too low for its peak runs below its clock: power goes about with the square of the clock near
    the lowest voltage, so the clock with the root of watts per FLOP/s.  (Systolic chips need less power for a FLOP, and a
    power that is not published holds no clock down.)"""
    peak = peak_flops_per_s(chip)
    clock = 1.0
    if chip.power_w is not None and peak and not chip.compiled:
        clock = min(1.0, (chip.power_w.value / peak / c.full_clock_w_per_flops) ** 0.5)
    product = reached_flops_per_s(chip) or peak * c.gemm_share * clock
    fp8 = chip.peak_flops_per_s["fp8"].value if "fp8" in chip.peak_flops_per_s else peak
    return Rates(
        product, max(product, fp8 * c.gemm_share * clock * c.fp8_share), peak, clock,
        chip.memory_bytes_per_s.value * c.memory_share, chip.memory_bytes_per_s.value,
        (chip.intra_node_bytes_per_s.value or UNKNOWN_LINK) * c.link_share,
        (chip.nic_bytes_per_s.value or UNKNOWN_NIC) * c.nic_share,
        float(chip.linked_devices or chip.devices_per_node), float(chip.compiled),
    )  # fmt: skip


def reached_flops_per_s(chip: ChipClass) -> float:
    """What large products in the precision of `peak_flops_per_s` were measured to reach; 0.0: not measured."""
    kind = next((kind for kind in ("bf16", "fp16", "fp32") if kind in chip.peak_flops_per_s), "")
    return chip.measured_flops_per_s[kind].value if kind in chip.measured_flops_per_s else 0.0


def peak_flops_per_s(chip: ChipClass) -> float:
    """In 16 bits, else in 32."""
    found = (chip.peak_flops_per_s.get(kind) for kind in ("bf16", "fp16", "fp32"))
    return next((figure.value for figure in found if figure is not None), 0.0)
