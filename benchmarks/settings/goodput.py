"""Pollux's model of a data-parallel task: time of a step, and statistical efficiency of its batch.

A. Qiao et al., OSDI 2021, equations 4-11; Sia (SOSP 2023) uses it for each chip class.  The seven parameters are fitted to
the points that the task has run at so far, by the root mean square error of the logarithms.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

#: (alpha_c, beta_c, alpha_n, beta_n, alpha_r, beta_r, gamma)
Parameters = tuple[float, ...]
Floats = NDArray[np.float64]
#: (nodes, replicas, local batch size, compute s, step s)
Sample = tuple[int, int, float, float, float]

TINY = 1e-8
BATCHES = 50  # batch sizes tried on a geometric grid


@cache
def fit(samples: tuple[Sample, ...]) -> Parameters:
    nodes, replicas, batch, compute_s, step_s = (
        np.array(column, dtype=float) for column in zip(*samples, strict=True)
    )
    start = [1e-1, 1e-2] * 3 + [1.0 + 1e-3]
    lower = [TINY, TINY] * 3 + [1.0]
    upper = [np.inf, np.inf] * 3 + [10.0]

    def fix(index: int, value: float) -> None:
        start[index] = lower[index] = upper[index] = value

    if len(np.unique(batch)) == 1:
        fix(0, float(np.mean(compute_s)) / 2)
    if not (nodes > 1).any():
        fix(2, TINY)
        fix(3, TINY)
    if not ((nodes == 1) & (replicas > 1)).any():
        fix(4, TINY)
        fix(5, TINY)
    if not (replicas > 2).any():
        fix(3, TINY)
        fix(5, TINY)
    log_compute, log_step = np.log(compute_s), np.log(step_s)
    many, inner = nodes > 1, (nodes <= 1) & (replicas > 1)
    more = np.maximum(replicas - 2, TINY)

    def loss(given: Floats) -> tuple[float, Floats]:
        a_c, b_c, a_n, b_n, a_r, b_r, gamma = given
        compute = a_c + b_c * batch
        network = np.where(many, a_n + b_n * more, np.where(inner, a_r + b_r * more, TINY + TINY * more))
        log_c, log_n = np.log(compute), np.log(network)
        top = np.maximum(log_c, log_n)
        weight_c, weight_n = np.exp(gamma * (log_c - top)), np.exp(gamma * (log_n - top))
        total = weight_c + weight_n
        log_sum = top * gamma + np.log(total)
        log_pred = log_sum / gamma
        off_c, off_s = log_c - log_compute, log_pred - log_step
        rms_c, rms_s = np.sqrt(np.mean(off_c**2)), np.sqrt(np.mean(off_s**2))
        value = rms_c + rms_s + 1e-3 * (gamma - 1) ** 2 + 1e-2 * ((b_n / a_n) ** 2 + (b_r / a_r) ** 2)
        to_c = off_c / (len(batch) * max(rms_c, 1e-12))
        to_s = off_s / (len(batch) * max(rms_s, 1e-12))
        by_compute = to_c / compute + to_s * weight_c / total / compute
        by_network = to_s * weight_n / total / network
        by_gamma = to_s * ((weight_c * log_c + weight_n * log_n) / total / gamma - log_pred / gamma)
        slope = np.array([
            by_compute.sum(),
            (by_compute * batch).sum(),
            by_network[many].sum() - 2e-2 * b_n**2 / a_n**3,
            (by_network * more)[many].sum() + 2e-2 * b_n / a_n**2,
            by_network[inner].sum() - 2e-2 * b_r**2 / a_r**3,
            (by_network * more)[inner].sum() + 2e-2 * b_r / a_r**2,
            by_gamma.sum() + 2e-3 * (gamma - 1),
        ])  # fmt: skip
        return float(value), slope

    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=Bounds(lower, upper, keep_feasible=True), tol=1e-5
    ).x
    if not (nodes > 1).any():  # the network between nodes is no better than inside one
        found[2] = max(found[2], found[4] * 1.1)
        found[3] = max(found[3], found[5] * 1.1)
    return tuple(float(one) for one in found)


def step_s(given: Parameters, nodes: Floats, replicas: Floats, batch: Floats, accumulated: Floats) -> Floats:
    """Seconds of one optimiser step with `accumulated` extra passes."""
    a_c, b_c, a_n, b_n, a_r, b_r, gamma = given
    more = np.maximum(replicas - 2, TINY)
    compute = a_c + b_c * batch
    network = np.where(
        nodes > 1, a_n + b_n * more, np.where(replicas > 1, a_r + b_r * more, TINY + TINY * more)
    )
    return accumulated * compute + (compute**gamma + network**gamma) ** (1 / gamma)


def efficiency(batch: Floats, first_batch: int, square: float, variance: float) -> Floats:
    """Progress of one sample at `batch` against one at `first_batch` (Pollux equation 7)."""
    scale = batch / first_batch
    below = variance / scale + square
    gain = np.where(below > 0, (variance + square) / np.where(below > 0, below, 1.0), 1.0)
    return np.asarray(gain / scale)


@lru_cache(maxsize=200_000)
def best_batches(
    given: Parameters, square: float, variance: float, first_batch: int, largest_batch: float,
    local_least: float, local_most: float, shapes: tuple[tuple[int, int], ...],
) -> tuple[tuple[float, int, int], ...]:  # fmt: skip
    """(goodput, local batch, accumulated passes) of the best batch size, for each (nodes, replicas)."""
    nodes = np.array([shape[0] for shape in shapes], dtype=float)
    replicas = np.array([shape[1] for shape in shapes], dtype=float)
    total = np.geomspace(
        np.maximum(first_batch, local_least * replicas), np.full(len(shapes), largest_batch), BATCHES
    )
    local = total / replicas
    accumulated = np.ceil(local / local_most - TINY) - 1
    accumulated = np.where(
        (replicas == 1) & (local > first_batch + TINY), np.maximum(accumulated, 1), accumulated
    )
    atomic = np.ceil(local / (accumulated + 1) - TINY)
    batch = replicas * atomic * (accumulated + 1)
    rate = batch / step_s(given, nodes, replicas, atomic, accumulated)
    goodput = rate * efficiency(batch, first_batch, square, variance)
    goodput = np.where((local_least <= atomic) & (atomic <= local_most), goodput, 0.0)
    best = np.argmax(goodput, axis=0)
    return tuple(
        (float(goodput[row, column]), int(atomic[row, column]), int(accumulated[row, column]))
        for column, row in enumerate(best)
    )


def sample_of(nodes: int, replicas: int, batch: float, step: float, sync: float) -> Sample:
    return (nodes, replicas, batch, step - sync, step)


def as_samples(points: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple(points)
