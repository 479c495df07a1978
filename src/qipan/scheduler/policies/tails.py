"""`jct` for tasks of one shape that share devices in time and declare their work: the least mean within the least makespan.

A program over intervals of growing length (A. S. Schulz and M. Skutella, "Scheduling unrelated machines by randomized rounding",
SIAM J. Discrete Math. 2002): y[task, pool, interval] is the share of the interval that the task runs there.  It minimises the mean of the
times at which work is done, while all work is done by the least makespan; what is later costs LATE times.  The first interval is
the coming round, and there y is whole, so nothing is lost by rounding shares to rounds.

The end is promised when tasks come: the least whole rounds in which all can be done, since a task has one pool in a round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qipan.scheduler.policies.contender import Choice, Contender, Option
from qipan.scheduler.policies.gavel import Floats, Program, linear, program_of

#: a proven gap and a number of nodes at which the search of a round stops
GAP, NODES = 1e-3, 20
#: the same for the least whole rounds
WHOLE_NODES = 200


@dataclass(slots=True)
class LeastMean:
    """`growth`: of the intervals; `slack_rounds`: how far the makespan may grow over the least whole rounds, or without `whole` over
    the least when shares are split at will; `late`: cost of work after that; `promised_s`: when all tasks seen so far shall have ended."""

    round_s: float = 360.0
    growth: float = 3.0
    slack_rounds: float = 0.0
    whole: bool = True
    late: float = 20.0
    promised_s: float = 0.0
    seen: set[str] = field(default_factory=set)

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        order = sorted(contenders, key=lambda one: (one.submitted_s, one.task_id))
        order = [one for one in order if any(option.rate > 0 for option in one.options)]
        if not order:
            return {}
        pools = sorted(capacity)
        program = program_of(order, capacity, pools, now_s)
        end_s = self._end_s({one.task_id for one in order}, program, now_s)
        first = self._first_round(program, self._edges(end_s))
        chosen: Choice = {}
        free = dict(capacity)

        def take(one: Contender, option: Option) -> None:
            ((pool, devices),) = option.needs
            if one.task_id not in chosen and devices <= free[pool]:
                free[pool] -= devices
                chosen[one.task_id] = option.point_id

        for row, one in enumerate(order):
            for option in one.options:
                if first is not None and first[row, pools.index(option.needs[0][0])] > 0.5:
                    take(one, option)
        for one, option in _by_density(order):  # what is left over goes to who is done soonest per device
            take(one, option)
        return chosen

    def _end_s(self, tasks: set[str], program: Program, now_s: float) -> float:
        """Seconds until all shall have ended: what was promised, or the least when that cannot be kept."""
        if not tasks <= self.seen:
            self.seen |= tasks
            whole_s = least_rounds(program, self.round_s) * self.round_s if self.whole else 0.0
            least_s = whole_s or least_makespan_s(program)
            self.promised_s = max(self.promised_s, now_s + least_s + self.slack_rounds * self.round_s)
        return max(self.promised_s - now_s, least_makespan_s(program))

    def _edges(self, end_s: float) -> Floats:
        """0, the round, then growing; the last but one is the makespan, the last leaves room for what is late."""
        edges, step = [0.0, self.round_s], self.round_s * self.growth
        while edges[-1] + step < end_s - 1.0:
            edges.append(edges[-1] + step)
            step *= self.growth
        if end_s > edges[-1] + 1.0:
            edges.append(end_s)
        return np.array([*edges, 1.2 * edges[-1] + self.round_s])

    def _first_round(self, program: Program, edges: Floats) -> Floats | None:
        """y of the first interval; None when the search found nothing."""
        from scipy.optimize import Bounds, LinearConstraint

        from qipan.solver import milp

        rows, most, cost, interval = _program(program, edges, self.late)
        found = milp(
            cost / cost.max(),
            integrality=(interval == 0).astype(int),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(rows, -np.inf, most),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        if found.x is None:
            return None
        shape = (*program.rates.shape, len(edges) - 1)
        return np.asarray(found.x.reshape(shape)[:, :, 0])


def least_rounds(program: Program, round_s: float) -> int:
    """Least whole rounds in which all work can be done when every task runs on one pool in a round: an integer program in R and
    rounds[task, pool].  Exact but for the order of the rounds, and for the last of each task, which counts whole."""
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import coo_matrix, hstack, vstack

    from qipan.solver import milp

    tasks, pools = program.rates.shape
    index = np.arange(tasks * pools)
    task, pool = index // pools, index % pools
    own = coo_matrix((np.ones(len(index)), (task, index)), shape=(tasks, len(index)))
    shared = coo_matrix((program.scale[task], (pool, index)), shape=(pools, len(index)))
    part = program.rates[task, pool] * round_s / program.left[task]
    done = coo_matrix((-part, (task, index)), shape=(tasks, len(index)))
    last = np.concatenate([-np.ones(tasks), -program.devices, np.zeros(tasks)])
    most = np.concatenate([np.zeros(tasks + pools), -np.ones(tasks)])
    cost = np.zeros(len(index) + 1)
    cost[-1] = 1.0
    found = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, np.append(np.where(part > 0, np.inf, 0.0), np.inf)),
        constraints=LinearConstraint(
            hstack([vstack([own, shared, done]), coo_matrix(last[:, None])]).tocsr(), -np.inf, most
        ),
        options={"mip_rel_gap": GAP, "node_limit": WHOLE_NODES},
    )
    if found.x is None:
        return int(np.ceil(least_makespan_s(program) / round_s))
    return round(float(found.x[-1]))


def least_makespan_s(program: Program) -> float:
    """Least T by which all work can be done when shares may be split at will: a linear program in T and seconds[task, pool]."""
    from scipy.sparse import coo_matrix, hstack, vstack

    tasks, pools = program.rates.shape
    index = np.arange(tasks * pools)
    task, pool = index // pools, index % pools
    own = coo_matrix((np.ones(len(index)), (task, index)), shape=(tasks, len(index)))
    shared = coo_matrix((program.scale[task], (pool, index)), shape=(pools, len(index)))
    done = coo_matrix(
        (-program.rates[task, pool] / program.left[task], (task, index)), shape=(tasks, len(index))
    )
    last = np.concatenate([-np.ones(tasks), -program.devices, np.zeros(tasks)])
    rows = hstack([vstack([own, shared, done]), coo_matrix(last[:, None])])
    most = np.concatenate([np.zeros(tasks + pools), -np.ones(tasks)])
    cost = np.zeros(len(index) + 1)
    cost[-1] = 1.0
    found = linear(cost, rows, most)
    assert found is not None, "every task has a pool it can run on"
    return float(found[-1])


def _program(program: Program, edges: Floats, late: float) -> tuple[Any, Floats, Floats, Floats]:
    """(rows, right-hand sides, cost, interval of each variable)."""
    from scipy.sparse import coo_matrix, vstack

    tasks, pools = program.rates.shape
    starts, lengths = edges[:-1], np.diff(edges)
    intervals = len(lengths)
    index = np.arange(tasks * pools * intervals)
    task, pool, interval = index // (pools * intervals), index // intervals % pools, index % intervals
    own = coo_matrix(
        (np.ones(len(index)), (task * intervals + interval, index)), shape=(tasks * intervals, len(index))
    )
    shared = coo_matrix(
        (program.scale[task], (pool * intervals + interval, index)), shape=(pools * intervals, len(index))
    )
    part = (
        program.rates[task, pool] / program.left[task] * lengths[interval]
    )  # of the task, in a whole interval
    done = coo_matrix((-part, (task, index)), shape=(tasks, len(index)))
    most = np.concatenate(
        [np.ones(tasks * intervals), np.repeat(program.devices, intervals), -np.ones(tasks)]
    )
    cost = program.weight[task] * part * ((starts + edges[1:]) / 2)[interval]
    cost[interval == intervals - 1] *= late
    return vstack([own, shared, done]).tocsr(), most, cost, interval


def _by_density(order: Sequence[Contender]) -> list[tuple[Contender, Option]]:
    """(task, option) pairs, the largest share of the work left per device-second first."""
    pairs = [
        (-option.rate / max(one.left or 1.0, 1.0) / option.devices, one.task_id, one, option)
        for one in order
        for option in one.options
        if option.rate > 0
    ]
    return [(one, option) for *_, one, option in sorted(pairs, key=lambda pair: pair[:2])]
