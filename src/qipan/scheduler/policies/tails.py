"""`jct` for tasks that share devices in time and declare their work: the least mean completion time within two tails.

A linear program over intervals of growing length (A. S. Schulz and M. Skutella, "Scheduling unrelated machines by randomized
rounding", SIAM J. Discrete Math. 2002): y[task, pool, interval] are seconds.  It minimises the mean of the time at which work is done, while
every task ends within (1 + slack) of the least makespan, and within (1 + slack) of the least longest completion time.  The first interval's
shares go to Gavel's mechanism.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qipan.scheduler.policies.contender import Choice, Contender, Option
from qipan.scheduler.policies.gavel import Floats, Program, linear, program_of


@dataclass(frozen=True, slots=True)
class LeastMean:
    """`slack_makespan`, `slack_longest`: how far a tail may grow over its least; None: it is free."""

    slack_makespan: float | None = 0.005
    slack_longest: float | None = None
    first_s: float = 1920.0
    growth: float = 1.6
    power: float = 0.0  # weight of a task: the inverse of its least time left to this power

    def __call__(self, program: Program) -> Floats:
        least_s = program.left / program.rates.max(axis=1)
        device_s = float((least_s * program.scale).sum() / program.devices.sum())
        free = _edges(self.first_s, self.growth, 4.0 * max(device_s, float(least_s.max())) + self.first_s)
        ends_s = np.full(len(least_s), np.inf)
        if self.slack_makespan is not None:
            ends_s = np.minimum(
                ends_s, self._tail(program, least_s, np.zeros(len(least_s)), self.slack_makespan)
            )
        if self.slack_longest is not None:
            ends_s = np.minimum(
                ends_s, self._tail(program, least_s, program.age_s, self.slack_longest) - program.age_s
            )
        weight = program.weight / least_s**self.power
        for _ in range(12):
            edges = (
                np.unique(
                    np.concatenate(
                        [
                            free[free < np.nanmax(ends_s)],
                            ends_s[np.isfinite(ends_s)].max(initial=0.0, keepdims=True),
                        ]
                    )
                )
                if np.isfinite(ends_s).all()
                else free
            )
            found = plan(program, edges[edges >= 0], ends_s, weight)
            if found is not None:
                return found[:, :, 0] / edges[edges > 0][0]
            ends_s = ends_s * 1.02
        raise AssertionError("the tails cannot be held")

    def _tail(self, program: Program, least_s: Floats, age_s: Floats, slack: float) -> float:
        """Least L such that every task can end at L - age."""
        low, high = 0.0, float((age_s + least_s).max())
        ratio = 1.0
        while not _reaches(program, least_s, high - age_s, self.first_s, self.growth):
            low, high, ratio = high, high * 1.3, 1.3
        while high - low > 0.002 * high and low > 0:
            middle = (low + high) / 2
            if _reaches(program, least_s, middle - age_s, self.first_s, self.growth):
                high = middle
            else:
                low = middle
        return high * (1 + slack)


def _edges(first_s: float, growth: float, end_s: float) -> Floats:
    edges, step = [0.0], first_s
    while edges[-1] < end_s:
        edges.append(edges[-1] + step)
        step *= growth
    return np.array(edges)


def _reaches(program: Program, least_s: Floats, ends_s: Floats, first_s: float, growth: float) -> bool:
    if (least_s > ends_s * (1 + 1e-9)).any():
        return False
    edges = np.unique(np.quantile(ends_s, np.linspace(0, 1, 8))) if np.ptp(ends_s) > 1.0 else ends_s[:1]
    edges = np.concatenate([[0.0], edges[edges > 0]])
    return plan(program, edges, ends_s, np.zeros(len(ends_s))) is not None


def plan(program: Program, edges: Floats, ends_s: Floats, weight: Floats) -> Floats | None:
    """y[task, pool, interval], or None when the ends cannot be met."""
    from scipy.sparse import coo_matrix, vstack

    tasks, pools = program.rates.shape
    starts, lengths = edges[:-1], np.diff(edges)
    intervals = len(lengths)
    open_s = np.clip(ends_s[:, None] - starts[None, :], 0.0, lengths[None, :])  # task x interval
    index = np.arange(tasks * pools * intervals)
    task, pool, interval = index // (pools * intervals), index // intervals % pools, index % intervals
    own = coo_matrix(
        (np.ones(len(index)), (task * intervals + interval, index)), shape=(tasks * intervals, len(index))
    )
    share = coo_matrix(
        (program.scale[task], (pool * intervals + interval, index)), shape=(pools * intervals, len(index))
    )
    done = coo_matrix(
        (-program.rates[task, pool] / program.left[task], (task, index)), shape=(tasks, len(index))
    )
    most = np.concatenate([
        open_s.ravel(), (program.devices[:, None] * lengths[None, :]).ravel(), -np.ones(tasks)
    ])  # fmt: skip
    middle_s = (starts + edges[1:]) / 2
    cost = weight[task] * program.rates[task, pool] / program.left[task] * middle_s[interval]
    found = linear(cost, vstack([own, share, done]), most)
    return None if found is None else found.reshape(tasks, pools, intervals)


@dataclass(slots=True)
class Planned:
    """Runs a plan's first interval round by round: who has the least time to spare goes first."""

    least_mean: LeastMean = LeastMean()
    window_s: float = 1800.0
    round_s: float = 360.0
    replan: bool = True  # also when a task came or ended
    tasks: frozenset[str] = frozenset()
    planned_at_s: float = -1e18
    needed_s: dict[tuple[str, str], float] = field(default_factory=dict)
    received_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        order = sorted(contenders, key=lambda one: (one.submitted_s, one.task_id))
        tasks = frozenset(one.task_id for one in order)
        pools = sorted(capacity)
        received = {
            (one.task_id, pool): dict(one.received_s).get(pool, 0.0) for one in order for pool in pools
        }
        if now_s - self.planned_at_s >= self.window_s - 1.0 or (self.replan and tasks != self.tasks):
            shares = self.least_mean(program_of(order, capacity, pools, now_s))
            self.planned_at_s, self.tasks, self.received_s = now_s, tasks, received
            self.needed_s = {
                (one.task_id, pool): float(shares[row, column]) * self.window_s
                for row, one in enumerate(order)
                for column, pool in enumerate(pools)
            }
        left_s = self.window_s - (now_s - self.planned_at_s)
        due = {
            key: self.needed_s.get(key, 0.0) - received[key] + self.received_s.get(key, 0.0)
            for key in received
        }
        pairs = []
        for one in order:
            total_s = sum(max(0.0, due[one.task_id, pool]) for pool in pools)
            for option in one.options:
                needed_s = due[one.task_id, option.needs[0][0]]
                if needed_s > 0.5 * min(self.round_s, left_s) or (
                    needed_s > 1.0 and left_s - total_s < self.round_s
                ):
                    pairs.append((left_s - total_s, -option.devices, -needed_s, one.task_id, option))
        free, chosen = dict(capacity), {}

        def take(task_id: str, option: Option) -> None:
            ((pool, devices),) = option.needs
            if task_id not in chosen and devices <= free[pool]:
                free[pool] -= devices
                chosen[task_id] = option.point_id

        for *_, task_id, option in sorted(pairs, key=lambda pair: (round(pair[0] / 60.0), *pair[1:4])):
            take(task_id, option)
        rest = [
            (-option.rate / max(one.left or 1.0, 1.0) / option.devices, one.task_id, option)
            for one in order
            for option in one.options
        ]
        for _, task_id, option in sorted(rest, key=lambda item: item[:2]):
            take(task_id, option)
        return chosen


@dataclass(slots=True)
class Whole:
    """Each round: the same plan with the first round's placements whole, so nothing is lost by rounding shares."""

    growth: float = 3.0
    round_s: float = 360.0
    slack: float = 0.002
    late: float = 20.0
    gap: float = 1e-3
    nodes: int = 20
    power: float = 0.0
    longest: float | None = None
    tail_growth: float = 1.6

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix, vstack

        order = sorted(contenders, key=lambda one: (one.submitted_s, one.task_id))
        pools = sorted(capacity)
        program = program_of(order, capacity, pools, now_s)
        best = program.rates.max(axis=1)
        least_s = program.left / best
        tool = LeastMean(first_s=self.round_s)
        end_s = tool._tail(program, least_s, np.zeros(len(order)), self.slack)
        edges = _edges(self.round_s, self.growth, end_s)
        edges = np.concatenate([edges[edges < end_s - 1.0], [end_s, end_s * 1.2 + self.round_s]])
        if len(edges) < 3 or edges[1] != self.round_s:
            edges = np.concatenate([[0.0, self.round_s], edges[edges > self.round_s]])
        starts, lengths = edges[:-1], np.diff(edges)
        tasks, count, intervals = len(order), len(pools), len(lengths)
        index = np.arange(tasks * count * intervals)
        task, pool, interval = index // (count * intervals), index // intervals % count, index % intervals
        own = coo_matrix(
            (np.ones(len(index)), (task * intervals + interval, index)), shape=(tasks * intervals, len(index))
        )
        share = coo_matrix(
            (program.scale[task], (pool * intervals + interval, index)), shape=(count * intervals, len(index))
        )
        part = (
            program.rates[task, pool] / program.left[task] * lengths[interval]
        )  # of the task, in the whole interval
        done = coo_matrix((-part, (task, index)), shape=(tasks, len(index)))
        most = np.concatenate(
            [np.ones(tasks * intervals), np.repeat(program.devices, intervals), -np.ones(tasks)]
        )
        at_s = (starts + edges[1:]) / 2
        weight = 1.0 / least_s**self.power
        cost = (weight / weight.mean())[task] * part * at_s[interval]
        cost[interval == intervals - 1] *= self.late
        if self.longest is not None:
            # what ends later than the longest of the tasks must counts double
            age = program.age_s
            limit = tool._tail(program, least_s, age, self.longest)
            over = (age[task] + edges[1:][interval] > limit) & (
                edges[1:][interval] > least_s[task] + self.round_s
            )
            cost = np.where(over, cost * self.late, cost)
        found = milp(
            cost / cost.max(), integrality=(interval == 0).astype(int), bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack([own, share, done]).tocsr(), -np.inf, most),
            options={"mip_rel_gap": self.gap, "node_limit": self.nodes},
        )  # fmt: skip
        chosen: Choice = {}
        free = dict(capacity)

        def take(one: Contender, option: Option) -> None:
            ((name, devices),) = option.needs
            if one.task_id not in chosen and devices <= free[name]:
                free[name] -= devices
                chosen[one.task_id] = option.point_id

        if found.x is not None:
            first = found.x.reshape(tasks, count, intervals)[:, :, 0]
            for row, column in zip(*np.nonzero(first > 0.5), strict=True):
                for option in order[row].options:
                    if option.needs[0][0] == pools[column]:
                        take(order[row], option)
        rest = [
            (-option.rate / max(one.left or 1.0, 1.0) / option.devices, one.task_id, one, option)
            for one in order
            for option in one.options
        ]
        for *_, one, option in sorted(rest, key=lambda item: item[:2]):
            take(one, option)
        return chosen
