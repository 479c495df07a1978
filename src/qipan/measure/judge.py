"""What a node declared against what its devices did.  Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qipan.quantities import format_devices

#: a device at half the declared rate, or two on one, lie at 0.5; an honest one at 1: the border lies between, in logarithms,
#: nearer the honest side since what lies near it is asked again
LEAST = 0.75
#: what devices of one node may cost each other when all work at once.  Two on one take 1.5 times as long on the mean if served in
#: turn, twice as long if at the same time: the border lies between 1 and 1 / 1.5, in logarithms
TOGETHER_LEAST = 0.8
#: a ratio within this factor of its border says little: few rounds of a noisy node scatter as far
NEAR = 1.1


@dataclass(frozen=True, slots=True)
class Claim:
    """`flops_per_s` of one device; 0: none was declared, and only the devices are counted."""

    devices: int
    flops_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`holds` is False with reasons.  `flops_per_s`: of one device while all work; `spread`: relative standard deviation over
    the rounds; `real_devices`: how many devices of its best solo rate the node is worth; `near`: either ratio lies so near its
    border that more rounds should be asked for before anybody acts on this."""

    holds: bool
    reasons: tuple[str, ...]
    flops_per_s: float
    spread: float
    real_devices: float
    near: bool = False


def judge(
    claim: Claim, alone: Sequence[float], together: Sequence[Sequence[float]], wrong: Sequence[str] = ()
) -> Verdict:
    """`alone`: rates of single devices while the others idle; `together`: per device its rates with all at once, round by
    round, all in FLOP/s; `wrong`: what was wrong with answers.  One wrong answer refuses the node."""
    means = [_mean_by_time(rates) for rates in together if rates]
    if not means or len(means) < claim.devices:
        return Verdict(
            False, (f"{format_devices(claim.devices)} declared, {len(means)} answered", *wrong), 0.0, 0.0, 0.0
        )
    rate = _mean_by_time(means)
    solo = _mean_by_time(alone) if alone else rate
    reasons = [*wrong]
    if rate / solo < TOGETHER_LEAST:
        reasons.append(
            f"{format_devices(claim.devices)} declared, together they do what {claim.devices * rate / solo:.1f} do alone"
        )
    slow = [
        index for index, mean in enumerate(means) if claim.flops_per_s and mean < LEAST * claim.flops_per_s
    ]
    if claim.flops_per_s and (rate < LEAST * claim.flops_per_s or slow):
        reasons.append(
            f"{claim.flops_per_s:.3g} FLOP/s a device declared, {rate:.3g} measured"
            + (f"; slow: device {', '.join(map(str, slow))}" if 0 < len(slow) < len(means) else "")
        )
    spreads = [_spread(rates) for rates in together if len(rates) > 1]
    spread = sum(spreads) / len(spreads) if spreads else 0.0
    ratios = [(rate / solo, TOGETHER_LEAST)] if alone else []
    if claim.flops_per_s:
        ratios += [(mean / claim.flops_per_s, LEAST) for mean in means]
    near = not wrong and any(border / NEAR < ratio < border * NEAR for ratio, border in ratios)
    return Verdict(not reasons, tuple(reasons), rate, spread, claim.devices * rate / solo, near)


def _mean_by_time(rates: Sequence[float]) -> float:
    """Of equal pieces of work: what one rate all along would have taken as long (the harmonic mean)."""
    return len(rates) / sum(1 / rate for rate in rates)


def _spread(rates: Sequence[float]) -> float:
    mean = sum(rates) / len(rates)
    return math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)) / mean
