"""Gavel: heterogeneity-aware cluster scheduling policies for deep learning workloads.

D. Narayanan, K. Santhanam, F. Kazhamiaka, A. Phanishayee, M. Zaharia, OSDI 2020.  A policy is a linear program over shares
of time x[task, pool] (section 4); the mechanism (section 5) runs, in each round, the tasks that got the least of their share.
Names follow its artifact: `_perf` knows the speed on each pool, without it all pools count alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qipan.scheduler.policies.contender import Choice, Contender, Option

Floats = NDArray[np.float64]

#: seconds between new computations of the shares, and of a round (the artifact's defaults)
RESET_S, ROUND_S = 1920.0, 360.0
#: bisection steps of the finish-time policy
STEPS = 24


@dataclass(frozen=True, slots=True)
class Program:
    """rates[task, pool]: steps per second; scale[task]: devices; devices[pool]; left[task]: steps; age_s and isolated_s[task]:
    since submission, and what it would have taken in all on 1/n of the cluster."""

    rates: Floats
    scale: Floats
    devices: Floats
    weight: Floats
    left: Floats
    age_s: Floats
    isolated_s: Floats


Objective = Callable[[Program], Floats]


def max_min_fairness(program: Program) -> Floats:
    """Least normalised throughput as large as can be (section 4.1)."""
    share = program.devices / program.devices.sum()
    equal = program.rates @ share
    norm = program.rates * (program.scale / (program.weight * equal))[:, None]
    return _largest(program, norm)


def min_total_duration(program: Program) -> Floats:
    """Makespan of the tasks there are (section 4.2)."""
    return _largest(program, program.rates / program.left[:, None])


def max_sum_throughput(program: Program) -> Floats:
    """Total throughput (section 4.2)."""
    tasks, pools = program.rates.shape
    matrix, most = pool_rows(program)
    return _solve(-program.rates.ravel(), matrix, most, tasks, pools)


def finish_time_fairness(program: Program) -> Floats:
    """Largest ratio of finish time here to that on 1/n of the cluster (section 4.2; Themis, NSDI 2020)."""
    low, high, found = 0.0, 1.0, None
    while found is None:
        found = _reaching(program, high)
        low, high = (low, high) if found is not None else (high, 2 * high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        better = _reaching(program, middle)
        if better is None:
            low = middle
        else:
            high, found = middle, better
        if high - low < 0.01 * high:
            break
    return found


def _reaching(program: Program, ratio: float) -> Floats | None:
    """Shares under which every task ends within `ratio` of its isolated time."""
    spare_s = ratio * program.isolated_s - program.age_s
    if (spare_s <= 0).any():
        return None
    needed = program.left / spare_s
    if (needed > program.rates.max(axis=1)).any():
        return None
    share, reached = largest_and_value(program, program.rates / np.maximum(needed, 1e-12)[:, None])
    return share if reached >= 1.0 else None


def _largest(program: Program, value: Floats) -> Floats:
    return largest_and_value(program, value)[0]


def largest_and_value(program: Program, value: Floats) -> tuple[Floats, float]:
    """Maximise the least row sum of value * x."""
    from scipy.sparse import coo_matrix, hstack, vstack

    tasks, pools = value.shape
    matrix, most = pool_rows(program)
    rows = np.repeat(np.arange(tasks), pools)
    gains = coo_matrix((-value.ravel(), (rows, np.arange(tasks * pools))), shape=(tasks, tasks * pools))
    full = vstack([
        hstack([matrix, coo_matrix((tasks + pools, 1))]),
        hstack([gains, coo_matrix(np.ones((tasks, 1)))]),
    ])  # fmt: skip
    cost = np.zeros(tasks * pools + 1)
    cost[-1] = -1.0
    found = linear(cost, full, np.concatenate([most, np.zeros(tasks)]))
    assert found is not None, "waiting is always feasible"
    return found[:-1].reshape(tasks, pools), float(found[-1])


def pool_rows(program: Program) -> tuple[object, Floats]:
    """A task's shares sum to one at most; a pool's devices are not exceeded."""
    from scipy.sparse import coo_matrix

    tasks, pools = program.rates.shape
    variables = np.arange(tasks * pools)
    rows = np.concatenate([variables // pools, tasks + variables % pools])
    values = np.concatenate([np.ones(tasks * pools), np.repeat(program.scale, pools)])
    matrix = coo_matrix((values, (rows, np.tile(variables, 2))), shape=(tasks + pools, tasks * pools))
    return matrix, np.concatenate([np.ones(tasks), program.devices])


def _solve(cost: Floats, matrix: object, most: Floats, tasks: int, pools: int) -> Floats:
    found = linear(cost, matrix, most)
    assert found is not None, "waiting is always feasible"
    return found.reshape(tasks, pools)


def linear(cost: Floats, matrix: object, most: Floats) -> Floats | None:
    """The cheapest x >= 0 with matrix @ x <= most; None when there is none."""
    from qipan.solver import linprog

    found = linprog(cost, A_ub=matrix, b_ub=most, method="highs")
    return None if found.x is None else np.clip(found.x, 0.0, None)


OBJECTIVES: Mapping[str, tuple[Objective, bool]] = {  # name -> (objective, knows speeds)
    "max_min_fairness": (max_min_fairness, False),
    "max_min_fairness_perf": (max_min_fairness, True),
    "finish_time_fairness": (finish_time_fairness, False),
    "finish_time_fairness_perf": (finish_time_fairness, True),
    "min_total_duration": (min_total_duration, False),
    "min_total_duration_perf": (min_total_duration, True),
    "max_sum_throughput_perf": (max_sum_throughput, True),
}


@dataclass(slots=True)
class Gavel:
    """The mechanism around one objective.  `ran_s` and `pool_s`: seconds since the shares were last computed."""

    objective: Objective = max_min_fairness
    aware: bool = True  # knows the speed on each pool
    reset_s: float = RESET_S
    pools: tuple[str, ...] = ()  # fastest first; tasks are taken pool by pool in this order
    share: dict[tuple[str, str], float] = field(default_factory=dict)
    ran_s: dict[tuple[str, str], float] = field(default_factory=dict)
    pool_s: dict[str, float] = field(default_factory=dict)
    deficit_s: dict[tuple[str, str], float] = field(default_factory=dict)
    seen: dict[tuple[str, str], float] = field(default_factory=dict)  # received so far, as last told
    tasks: frozenset[str] = frozenset()
    stale: bool = False
    reset_at_s: float = 0.0
    isolated_s: dict[str, float] = field(
        default_factory=dict
    )  # task -> isolated time of the work done so far
    isolated_before: dict[str, tuple[float, float]] = field(default_factory=dict)  # task -> (rate, left)

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        pools = self.pools or tuple(sorted(capacity))
        self._account(contenders, pools)
        if (self.stale or self.reset_s == 0) and (
            now_s - self.reset_at_s >= self.reset_s or self.reset_at_s == 0
        ):
            self._reset(contenders, capacity, pools, now_s)
        free, chosen = dict(capacity), {}
        for pool in pools:
            queue = []
            for one in contenders:
                option = next((own for own in one.options if own.needs[0][0] == pool and own.rate > 0), None)
                if option is not None:
                    key = (one.task_id, pool)
                    queue.append(
                        (
                            self._priority(key),
                            self.deficit_s.get(key, 0.0),
                            self.share.get(key, 0.0),
                            one,
                            option,
                        )
                    )
            queue.sort(key=lambda item: item[:3], reverse=True)
            for *_, one, option in queue:
                if one.task_id not in chosen and option.devices <= free[pool]:
                    free[pool] -= option.devices
                    chosen[one.task_id] = option.point_id
        return chosen

    def _priority(self, key: tuple[str, str]) -> float:
        """Share due over the share received since the last reset."""
        share = self.share.get(key, 0.0)
        if share == 0.0:
            return 0.0
        total_s = self.pool_s.get(key[1], 0.0)
        fraction = self.ran_s.get(key, 0.0) / total_s if total_s > 0 else 0.0
        return share / fraction if fraction > 0 else share * 1e9

    def _account(self, contenders: Sequence[Contender], pools: Sequence[str]) -> None:
        """What ran since the last round; a new task begins with half a round everywhere."""
        tasks = frozenset(one.task_id for one in contenders)
        self.stale = self.stale or tasks != self.tasks
        for one in contenders:
            received = dict(one.received_s)
            for pool in pools:
                key = (one.task_id, pool)
                if one.task_id not in self.tasks:
                    self.ran_s[key], self.deficit_s[key], self.seen[key] = ROUND_S / 2, 0.0, 0.0
                more_s = received.get(pool, 0.0) - self.seen[key]
                self.seen[key] += more_s
                self.ran_s[key] += more_s
                self.pool_s[pool] = self.pool_s.get(pool, 0.0) + more_s
        for task_id in self.tasks - tasks:
            for pool in pools:
                del self.ran_s[task_id, pool], self.deficit_s[task_id, pool], self.seen[task_id, pool]
        self.tasks = tasks

    def _reset(
        self, contenders: Sequence[Contender], capacity: Mapping[str, int], pools: Sequence[str], now_s: float
    ) -> None:
        elapsed_s = now_s - self.reset_at_s
        for key in self.ran_s:
            self.deficit_s[key] += self.share.get(key, 0.0) * elapsed_s - (self.ran_s[key] - ROUND_S / 2)
            self.ran_s[key] = ROUND_S / 2
        self.pool_s = {pool: len(self.tasks) * ROUND_S / 2 for pool in pools}
        self.reset_at_s, self.stale = now_s, False
        order = sorted(contenders, key=lambda one: (one.submitted_s, one.task_id))
        shares = self.objective(self._program(order, capacity, sorted(pools), now_s))
        self.share = {
            (one.task_id, pool): float(shares[row, column])
            for row, one in enumerate(order)
            for column, pool in enumerate(sorted(pools))
        }

    def _program(
        self, order: Sequence[Contender], capacity: Mapping[str, int], pools: Sequence[str], now_s: float
    ) -> Program:
        by_pool = [{option.needs[0][0]: option for option in one.options} for one in order]
        true = np.array([[own[pool].rate if pool in own else 0.0 for pool in pools] for own in by_pool])
        rates = true if self.aware else np.where(true > 0, true.max(axis=1, keepdims=True), 0.0)
        scale = np.array([float(one.options[0].devices) for one in order])
        devices = np.array([float(capacity[pool]) for pool in pools])
        left = np.array([max(one.left if one.left is not None else 1.0, 1.0) for one in order])
        own = np.tile(devices / len(order), (len(order), 1)) / scale[:, None]
        own /= np.maximum(own.sum(axis=1, keepdims=True), 1.0)
        alone = (rates * own).sum(axis=1)
        for index, one in enumerate(order):
            rate, before = self.isolated_before.get(one.task_id, (1.0, left[index]))
            self.isolated_s[one.task_id] = (
                self.isolated_s.get(one.task_id, 0.0) + (before - left[index]) / rate
            )
            self.isolated_before[one.task_id] = (float(alone[index]), float(left[index]))
        isolated_s = np.array([self.isolated_s[one.task_id] for one in order]) + left / alone
        age_s = np.array([now_s - one.submitted_s for one in order])
        weight = np.array([one.weight for one in order])
        return Program(rates, scale, devices, weight, left, age_s, isolated_s)


@dataclass(frozen=True, slots=True)
class MaxMinNow:
    """Max-min fairness without rounds, for a board that decides whenever something happens: the shares are computed from what
    there is now, and who has had the least of its share since it came goes first.  It remembers nothing."""

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        pools = [pool for pool in sorted(capacity) if capacity[pool] > 0]
        shapes = [
            one
            for one in contenders
            if any(option.rate > 0 and option.needs[0][0] in pools for option in one.options)
        ]
        if not shapes:
            return {}
        best = {one.task_id: _largest_shapes(one) for one in shapes}
        order = sorted(shapes, key=lambda one: (one.submitted_s, one.task_id))
        rates = np.array(
            [[best[o.task_id][p].rate if p in best[o.task_id] else 0.0 for p in pools] for o in order]
        )
        scale = np.array(
            [float(max(option.devices for option in best[one.task_id].values())) for one in order]
        )
        ones = np.ones(len(order))
        weight = np.array([one.weight for one in order])
        devices = np.array([float(capacity[pool]) for pool in pools])
        shares = max_min_fairness(Program(rates, scale, devices, weight, ones, ones, ones))
        queue = []
        for row, one in enumerate(order):
            had = one.served_s / max(now_s - one.submitted_s, 1.0) / scale[row]
            due = float(shares[row].sum())
            for column, pool in enumerate(pools):
                if pool in best[one.task_id]:
                    stays = best[one.task_id][pool].point_id == one.current
                    first = due / max(had, 1e-3) * (1.2 if stays else 1.0)
                    queue.append(
                        (-first, -float(shares[row, column]), row, best[one.task_id][pool], one.task_id)
                    )
        free, chosen = dict(capacity), {}
        for *_, option, task_id in sorted(queue, key=lambda item: item[:3]):
            if task_id not in chosen and all(devices <= free[pool] for pool, devices in option.needs):
                chosen[task_id] = option.point_id
                for pool, taken in option.needs:
                    free[pool] -= taken
        return chosen


def _largest_shapes(one: Contender) -> dict[str, Option]:
    """pool -> its option of the most devices there, as Gavel's tasks have one shape."""
    found: dict[str, Option] = {}
    for option in sorted(one.options, key=lambda option: (option.devices, option.point_id)):
        if option.rate > 0:
            found[option.needs[0][0]] = option
    return found


def program_of(
    order: Sequence[Contender], capacity: Mapping[str, int], pools: Sequence[str], now_s: float
) -> Program:
    """The program of tasks whose speeds and work left are known; isolated times are not filled."""
    by_pool = [{option.needs[0][0]: option for option in one.options} for one in order]
    return Program(
        np.array([[own[pool].rate if pool in own else 0.0 for pool in pools] for own in by_pool]),
        np.array([float(one.options[0].devices) for one in order]),
        np.array([float(capacity[pool]) for pool in pools]),
        np.array([one.weight for one in order]),
        np.array([max(one.left if one.left is not None else 1.0, 1.0) for one in order]),
        np.array([now_s - one.submitted_s for one in order]),
        np.zeros(len(order)),
    )
