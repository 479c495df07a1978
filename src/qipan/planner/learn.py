"""What a task's own progress teaches of three constants: how far compute, transfers and fixed costs are from the plan.

Each constant is a factor on one kind of seconds of a step, its logarithm normal.  The prior has the planner's band; each
observed step time is one update of an extended Kalman filter (Särkkä 2013, algorithm 5.4) on log t = log sum(parts * factor).
A factor that a layout hardly uses is hardly moved; what compute taught at one layout holds for all."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qipan.curves import Curve, Point

TENTH = 1.2816
KINDS = ("compute", "transfer", "fixed")
#: which kind the planner's parts of a step belong to
PARTS = {
    "compute": "compute", "pipeline bubble": "compute", "links inside a node": "transfer",
    "network between nodes": "transfer", "memory bandwidth": "fixed", "stragglers": "fixed",
}  # fmt: skip
#: relative spread of one report of progress (steps of a quiet task scatter by a few per cent)
REPORT_SPREAD = 0.03
#: of what no factor explains: a layout's own deviation, which stays when another layout is predicted
OWN_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class Belief:
    """Mean and covariance of the logarithms of the three factors, KINDS in order."""

    mean: tuple[float, float, float]
    covariance: tuple[tuple[float, float, float], ...]


def prior(faster: float, slower: float) -> Belief:
    """From the 10 and 90 % factors of a chip's band; transfers and fixed costs are told apart less well."""
    one = math.log(slower / faster) / (2 * TENTH)
    spread = (one, 1.5 * one, 1.5 * one)
    rows = [tuple(value**2 if i == j else 0.0 for j in range(3)) for i, value in enumerate(spread)]
    return Belief((0.0, 0.0, 0.0), (rows[0], rows[1], rows[2]))  # type: ignore[arg-type]


def observe(belief: Belief, parts_s: dict[str, float], measured_s: float, reports: int = 1) -> Belief:
    """After `reports` reports of mean `measured_s` at a layout with these parts."""
    seconds = _by_kind(parts_s)
    mean, covariance = np.array(belief.mean), np.array(belief.covariance)
    shares, expected_s = _shares(seconds, mean)
    noise = REPORT_SPREAD**2 / max(1, reports) + OWN_SPREAD**2
    gain = covariance @ shares / (shares @ covariance @ shares + noise)
    mean = mean + gain * math.log(measured_s / expected_s)
    covariance = covariance - np.outer(gain, shares @ covariance)
    covariance = (covariance + covariance.T) / 2
    rows = [tuple(float(value) for value in row) for row in covariance]
    return Belief(
        (float(mean[0]), float(mean[1]), float(mean[2])), (rows[0], rows[1], rows[2])  # type: ignore[arg-type]
    )  # fmt: skip


def corrected_s(belief: Belief, parts_s: dict[str, float]) -> tuple[float, float, float]:
    """10, 50 and 90 % points of a step's seconds."""
    shares, expected_s = _shares(_by_kind(parts_s), np.array(belief.mean))
    spread = math.sqrt(float(shares @ np.array(belief.covariance) @ shares) + OWN_SPREAD**2) * TENTH
    return expected_s * math.exp(-spread), expected_s, expected_s * math.exp(spread)


def corrected(curve: Curve, belief: Belief, parts_s: dict[str, dict[str, float]]) -> Curve:
    """The curve with the rates that the belief gives to the points whose parts are known (`parts_s` by point id); rates stay
    relative to the best point, whose own change goes into `work_s`."""
    rates: dict[str, tuple[float, float, float]] = {}
    for point in curve.points:
        if point.point_id in parts_s:
            planned_s = sum(parts_s[point.point_id].values())
            low_s, middle_s, high_s = corrected_s(belief, parts_s[point.point_id])
            rates[point.point_id] = (
                point.rate * planned_s / middle_s, point.rate * planned_s / high_s, point.rate * planned_s / low_s,
            )  # fmt: skip
        else:
            rates[point.point_id] = (point.rate, point.rate_p10, point.rate_p90)
    best = max(rate for rate, _, _ in rates.values())

    def moved(point: Point) -> Point:
        rate, low, high = (value / best for value in rates[point.point_id])
        return replace(point, rate=rate, rate_p10=low, rate_p90=high)

    return replace(
        curve,
        points=tuple(moved(point) for point in curve.points),
        work_s=curve.work_s / best,
        source="progress",
    )


def _by_kind(parts_s: dict[str, float]) -> NDArray[np.float64]:
    seconds = dict.fromkeys(KINDS, 0.0)
    for part, value in parts_s.items():
        seconds[PARTS.get(part, "fixed")] += value
    return np.array([seconds[kind] for kind in KINDS])


def _shares(seconds: NDArray[np.float64], mean: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Share of each kind in the expected seconds, the derivative of their logarithm; the seconds."""
    each = seconds * np.exp(mean)
    total = float(each.sum())
    return np.asarray(each / total), total
