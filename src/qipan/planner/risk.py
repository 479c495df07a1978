"""When a task ends and what it costs, as a distribution: the model's error, the start, and failures drawn together."""

import zlib
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
#: deviations between the median and the 10 or 90 % point of a normal distribution
TENTH = 1.2816


@dataclass(frozen=True, slots=True)
class Spread:
    p10_s: float
    p50_s: float
    p90_s: float
    odds: float | None  # of the deadline


def finish(
    seed: int, name: str, work_s: float, factors: tuple[float, float], start_s: float, start_spread: float,
    every_s: float, save_s: float, restart_s: float, failures_per_s: float, deadline_s: float | None,
) -> Spread:  # fmt: skip
    """Monte-Carlo, the same for the same `seed` and `name`.  `work_s`: the steps alone; `factors`: the 10 and 90 % points of
    measured over predicted seconds (a lognormal on each side of 1); every failure costs a restart and what was done since
    the last checkpoint (uniform between two)."""
    chance = np.random.default_rng([seed, zlib.crc32(name.encode())])
    sides = np.log(np.array(factors)) / TENTH
    normal = chance.standard_normal(DRAWS)
    work = work_s * np.exp(np.where(normal < 0, -sides[0], sides[1]) * normal)
    start = start_s * np.exp(start_spread / TENTH * chance.standard_normal(DRAWS))
    running = work * (1 + save_s / every_s)
    count = chance.poisson(np.minimum(failures_per_s * running, 1e9))
    each = restart_s + (every_s + save_s) / 2
    noise = np.sqrt(count / 12) * (every_s + save_s) * chance.standard_normal(DRAWS)
    again = chance.poisson(np.minimum(failures_per_s * count * each, 1e9))  # failures while making good
    ends = start + running + np.maximum(0.0, (count + again) * each + noise)
    p10, p50, p90 = (float(point) for point in np.quantile(ends, (0.1, 0.5, 0.9)))
    odds = None if deadline_s is None else float(np.mean(ends <= deadline_s))
    return Spread(p10, p50, p90, odds)
