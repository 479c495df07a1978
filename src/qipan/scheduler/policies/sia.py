"""Sia: heterogeneity-aware, goodput-optimised ML-cluster scheduling.

S. J. Subramanya, D. Arfeen, S. Lin, A. Qiao, Z. Jia, G. R. Ganger, SOSP 2023, section 3.4.  One binary variable for
each (task, configuration); the sum of the normalised goodputs to the power p is minimised for p < 0, with lambda_n for each
task that gets nothing.  A configuration that is not the current one is worth less by the restart factor (its equation 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qipan.scheduler.policies.contender import Choice, Contender

#: what the authors' defaults are: fairness power, penalty without an allocation, proven gap
P, LAMBDA_N, GAP = -0.5, 1.1, 1e-4
#: values are compared to two decimals, as their code does
DECIMALS = 2


@dataclass(slots=True)
class Sia:
    p: float = P
    lambda_n: float = LAMBDA_N

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        flat: list[tuple[str, str, tuple[tuple[str, int], ...], float, bool]] = []
        for contender in sorted(contenders, key=lambda one: (one.submitted_s, one.task_id)):
            rates = np.array([option.rate for option in contender.options])
            lowest = rates[rates > 0].min() if (rates > 0).any() else 1.0
            factor = restart_factor(contender, now_s)
            best: dict[str, float] = {}  # pool -> the lowest cost of a smaller option there
            for option in sorted(contender.options, key=lambda one: (one.devices, one.point_id)):
                if option.rate <= 0 or (option.devices > 1 and not contender.measured):
                    continue  # a task begins on one device (section 3.3)
                stays = option.point_id == contender.current
                speedup = option.rate / lowest if contender.measured else 1.0
                if contender.current is not None and not stays:
                    speedup *= factor
                cost = round(float(speedup**self.p), DECIMALS)
                pinned = contender.pinned and stays
                pool = option.needs[0][0]
                if not pinned and cost >= min(self.lambda_n, best.get(pool, np.inf)):
                    continue  # a smaller option there is as good, or waiting is
                best[pool] = min(cost, best.get(pool, np.inf))
                flat.append((contender.task_id, option.point_id, option.needs, cost - self.lambda_n, pinned))
        return solve(flat, capacity)


def restart_factor(contender: Contender, now_s: float) -> float:
    """Share of its age that a task would have run without one more restart (Sia section 3.4, as in Pollux)."""
    age_s = now_s - contender.submitted_s
    if age_s < contender.restart_s or contender.restart_s == 0.0:
        return 1.0
    lost_s = contender.restarts * contender.restart_s
    return max(age_s - lost_s, 0.0) / (age_s + contender.restart_s)


def solve(
    flat: Sequence[tuple[str, str, tuple[tuple[str, int], ...], float, bool]], capacity: Mapping[str, int]
) -> Choice:
    """The cheapest choice of at most one row of `flat` (task, point, needs, cost, must be taken) for each task."""
    if not flat:
        return {}
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import coo_matrix

    from qipan.solver import milp

    row = {task_id: index for index, task_id in enumerate(dict.fromkeys(one[0] for one in flat))}
    pools = {pool: len(row) + index for index, pool in enumerate(sorted(capacity))}
    rows, columns, values = [], [], []
    for column, (task_id, _, needs, _, _) in enumerate(flat):
        rows.append(row[task_id])
        columns.append(column)
        values.append(1.0)
        for pool, devices in needs:
            rows.append(pools[pool])
            columns.append(column)
            values.append(float(devices))
    matrix = coo_matrix((values, (rows, columns)), shape=(len(row) + len(pools), len(flat))).tocsr()
    most = np.array([1.0] * len(row) + [float(capacity[pool]) for pool in sorted(capacity)])
    found = milp(
        np.array([one[3] for one in flat]),
        integrality=np.ones(len(flat)),
        bounds=Bounds(np.array([1.0 if one[4] else 0.0 for one in flat]), np.ones(len(flat))),
        constraints=LinearConstraint(matrix, -np.inf, most),
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, "waiting is always feasible"
    return {one[0]: one[1] for one, taken in zip(flat, found.x, strict=True) if taken > 0.5}
