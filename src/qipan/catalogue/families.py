"""What a device is worth, per kind of work: hours of the standard card.  Never one number for all: a chip that is twice
the standard card at prefill may be half of it at decode.

A kind of work is so many FLOP, bytes of memory and bytes between devices; a device takes the time of its slowest
resource (the roofline, Williams et al. 2009), links added where they are not hidden.  The work is one layer of a decoder of
hidden size 4096 (weights 12 h^2, 16 bits), per token: training 6 FLOP a weight and, with a micro-batch of 4096 tokens,
18 bytes a weight once per batch and 34 h bytes of activations thrice (Korthikanti et al. 2022, table 2).
"""

from dataclasses import dataclass, replace

from qipan.hardware import ChipClass, Figure
from qipan.planner.constants import Constants

STANDARD = "nvidia/a100-sxm4-80gb"
WEIGHTS = 12 * 4096.0**2
ACTIVATIONS = 3 * 34 * 4096.0


@dataclass(frozen=True, slots=True)
class Family:
    """Work per token.  `precisions`: the first that the chip has is used; a chip that has none cannot do it."""

    name: str
    precisions: tuple[str, ...]
    flops: float
    memory_bytes: float
    link_bytes: float = 0.0


FAMILIES = (
    Family("dense train", ("bf16", "fp16", "fp32"), 6 * WEIGHTS, 18 * WEIGHTS / 4096 + ACTIVATIONS, 4 * 2 * 4096.0),
    # 8 experts of which 2 answer: weights of all are read and updated, tokens travel there and back, both ways
    Family("moe train", ("bf16", "fp16", "fp32"), 6 * WEIGHTS / 2, 4 * 18 * WEIGHTS / 4096 + ACTIVATIONS, 8 * 2 * 4096.0 * 2),
    Family("prefill", ("fp8", "int8", "bf16", "fp16", "fp32"), 2 * WEIGHTS, 2 * WEIGHTS / 2048 + 8 * 4096.0, 0.0),
    # 16 sequences at once, each with 2048 tokens of 16-bit keys and values of 8 heads of 128
    Family("decode", ("bf16", "fp16", "int8", "fp32"), 2 * WEIGHTS, 2 * WEIGHTS / 16 + 2048 * 2 * 2 * 1024.0, 0.0),
    Family("batch", ("bf16", "fp16", "int8", "fp32"), 2 * WEIGHTS, 2 * WEIGHTS / 256 + 512 * 2 * 2 * 1024.0, 0.0),
    Family("fp64", ("fp64",), 1e9, 1e7, 0.0),
)  # fmt: skip


def seconds(chip: ChipClass, family: Family) -> float | None:
    """Of one device for the family's unit of work; None when it has no such precision, or no published figure."""
    rate = next((found for kind in family.precisions if (found := compute(chip, kind)) is not None), None)
    memory = chip.memory_bytes_per_s.value
    if rate is None or rate.value <= 0 or memory <= 0:
        return None
    link = chip.intra_node_bytes_per_s.value or 32e9  # not published: PCIe 4
    return max(family.flops / rate.value, family.memory_bytes / memory) + family.link_bytes / link


def compute(chip: ChipClass, precision: str) -> Figure | None:
    """Measured before nominal."""
    return chip.measured_flops_per_s.get(precision) or chip.peak_flops_per_s.get(precision)


def standard_hours(chip: ChipClass, standard: ChipClass) -> dict[str, float | None]:
    """Family -> standard card-hours that one device-hour of `chip` is worth.  Measured figures are held against the
    standard card's nominal ones times what the planner finds products to reach (`gemm_share`), so that measuring a chip does not lower it."""
    worth: dict[str, float | None] = {}
    for family in FAMILIES:
        mine, theirs = seconds(_reached(chip), family), seconds(_reached(standard), family)
        worth[family.name] = theirs / mine if mine and theirs else None
    return worth


def _reached(chip: ChipClass) -> ChipClass:
    share = Constants().gemm_share
    return replace(
        chip,
        measured_flops_per_s={
            kind: chip.measured_flops_per_s.get(kind) or replace(peak, value=peak.value * share)
            for kind, peak in chip.peak_flops_per_s.items()
        },
    )
