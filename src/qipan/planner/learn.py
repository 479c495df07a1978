"""What measured steps teach of the planner's constants: how far each kind of seconds of a step is from what was planned.

Each constant is a factor on one kind of seconds, its logarithm normal.  The prior has the planner's band; measured steps give
the likeliest factors and their covariance (Gauss-Newton on log t = log sum(parts * factor), Laplace's approximation:
the iterated form of Särkkä 2013, algorithm 5.4).  A factor that a layout hardly uses is hardly moved; what compute
taught at one layout holds for all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TENTH = 1.2816
#: which kind the planner's parts of a step belong to, where a belief does not name the part itself
PARTS = {
    "compute": "compute", "pipeline bubble": "compute", "links inside a node": "transfer",
    "network between nodes": "transfer", "collective calls": "transfer", "memory bandwidth": "fixed",
    "stragglers": "fixed", "launches": "fixed", "sharded launches": "fixed", "optimiser": "fixed",
}  # fmt: skip
#: relative spread of one report of progress (steps of a quiet task scatter by a few per cent)
REPORT_SPREAD = 0.03
#: of what no factor explains: a layout's own deviation, which stays when another layout is predicted
OWN_SPREAD = 0.05
ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Belief:
    """Mean and covariance of the logarithms of the factors, one for each of `kinds`."""

    kinds: tuple[str, ...]
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """`reports` reports of mean `measured_s` at a layout whose step has these parts."""

    parts_s: Mapping[str, float]
    measured_s: float
    reports: int = 1


def prior(within: Mapping[str, float]) -> Belief:
    """`within`: kind -> the factor up and down that holds its 10 and 90 % points."""
    spreads = [math.log(factor) / TENTH for factor in within.values()]
    rows = tuple(tuple(a * a if i == j else 0.0 for j in range(len(spreads))) for i, a in enumerate(spreads))
    return Belief(tuple(within), (0.0,) * len(spreads), rows)


def planned(faster: float, slower: float) -> Belief:
    """From the 10 and 90 % factors of a chip's band; transfers and fixed costs are told apart less well."""
    one = math.sqrt(slower / faster)
    return prior({"compute": one, "transfer": one**1.5, "fixed": one**1.5})


def observe(belief: Belief, seen: Sequence[Seen]) -> Belief:
    """The belief after all of these."""
    start = np.array(belief.mean)
    before = np.linalg.inv(np.array(belief.covariance))
    parts = np.array([_by_kind(belief, one.parts_s) for one in seen])
    measured = np.log([one.measured_s for one in seen])
    weight = 1 / (REPORT_SPREAD**2 / np.array([max(1, one.reports) for one in seen]) + OWN_SPREAD**2)
    mean = start
    for _ in range(ROUNDS):
        each = parts * np.exp(mean)
        total = each.sum(axis=1)
        shares = each / total[:, None]
        precision = before + shares.T @ (weight[:, None] * shares)
        pull = shares.T @ (weight * (measured - np.log(total))) - before @ (mean - start)
        change = np.linalg.solve(precision, pull)
        mean = mean + change * min(1.0, 1.0 / float(np.max(np.abs(change)) + 1e-12))
    spread = np.linalg.inv(precision)
    rows = tuple(tuple(float(value) for value in row) for row in (spread + spread.T) / 2)
    return Belief(belief.kinds, tuple(float(value) for value in mean), rows)


def factors(belief: Belief) -> dict[str, float]:
    """The median of each."""
    return {kind: math.exp(mean) for kind, mean in zip(belief.kinds, belief.mean, strict=True)}


def corrected_s(belief: Belief, parts_s: Mapping[str, float]) -> tuple[float, float, float]:
    """10, 50 and 90 % points of a step's seconds."""
    shares, expected_s = _shares(_by_kind(belief, parts_s), np.array(belief.mean))
    spread = math.sqrt(float(shares @ np.array(belief.covariance) @ shares) + OWN_SPREAD**2) * TENTH
    return expected_s * math.exp(-spread), expected_s, expected_s * math.exp(spread)


def scaled_parts(belief: Belief, parts_s: Mapping[str, float]) -> dict[str, float]:
    """Each part with the factor of its kind."""
    found = factors(belief)
    return {part: value * found[_kind(belief, part)] for part, value in parts_s.items()}


def _kind(belief: Belief, part: str) -> str:
    return part if part in belief.kinds else PARTS.get(part, "fixed")


def _by_kind(belief: Belief, parts_s: Mapping[str, float]) -> NDArray[np.float64]:
    seconds = dict.fromkeys(belief.kinds, 0.0)
    for part, value in parts_s.items():
        seconds[_kind(belief, part)] += value
    return np.array(list(seconds.values()))


def _shares(seconds: NDArray[np.float64], mean: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Share of each kind in the expected seconds, the derivative of their logarithm; the seconds."""
    each = seconds * np.exp(mean)
    total = float(each.sum())
    return np.asarray(each / total), total
