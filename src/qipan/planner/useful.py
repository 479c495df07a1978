"""Useful time: what checkpoints and failures leave of it."""

import math


def checkpoint_every_s(save_s: float, failures_per_s: float) -> float:
    """Young's interval sqrt(2 * save * mean time between failures) (Young 1974)."""
    return math.sqrt(2 * save_s / failures_per_s)


def useful_share(every_s: float, save_s: float, restart_s: float, failures_per_s: float) -> float:
    """Share of time that makes progress, with a checkpoint that stalls for `save_s` after every `every_s` of work,
    failures as a Poisson process, and `restart_s` after each (during which it may fail again): Daly 2006, "A higher order
    estimate of the optimum checkpoint interval", equation 13."""
    if failures_per_s <= 0:
        return every_s / (every_s + save_s)
    spent = math.exp(failures_per_s * restart_s) * math.expm1(failures_per_s * (every_s + save_s))
    return failures_per_s * every_s / spent
