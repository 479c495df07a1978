"""`jct`: the least mean completion time, for a board of elastic tasks or of tasks that share devices in time.

Elastic tasks: the weighted sum of speed-up ** P, P < 0, is minimised exactly, as in Sia (SOSP 2023).  What differs is what counts.
A task weighs more the less work it has: what is declared to be left, or, since sizes of training tasks are heavy-tailed, what it
did so far.  A first guess of its speeds is used before it ran anywhere.  A change of shape costs the share of the time left that the
restart takes when that is known.  Tasks of one shape with declared work: see `tails`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qipan.scheduler.policies.contender import Choice, Contender
from qipan.scheduler.policies.sia import LAMBDA_N, restart_factor, solve
from qipan.scheduler.policies.tails import LeastMean

#: sizes below this count alike, in seconds on one slowest device; of a task that never ran
SIZE_S_MIN, SIZE_S_UNKNOWN = 60.0, 3600.0


@dataclass(frozen=True, slots=True)
class Jct:
    """`power`: of the speed-up; `size_power`, `declared_size_power`: a task weighs its size to minus this."""

    power: float = -0.5
    size_power: float = 0.2
    declared_size_power: float = 0.3
    shared: LeastMean = field(default_factory=LeastMean)

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        if all(one.left is not None and _one_shape(one) for one in contenders):
            return self.shared.choose(contenders, capacity, now_s)
        flat: list[tuple[str, str, tuple[tuple[str, int], ...], float, bool]] = []
        for one in sorted(contenders, key=lambda one: (one.submitted_s, one.task_id)):
            rates = [option.rate for option in one.options if option.rate > 0]
            if not rates:
                continue
            size_s, weight = self._size(one, min(rates))
            factor = restart_factor(one, now_s)
            best: dict[str, float] = {}  # pool -> the lowest cost of a smaller option there
            for option in sorted(one.options, key=lambda option: (option.devices, option.point_id)):
                if option.rate <= 0:
                    continue
                stays = option.point_id == one.current
                speedup = option.rate / min(rates)
                if one.current is not None and not stays:
                    left_s = size_s / speedup
                    known = one.left is not None and one.measured
                    speedup *= left_s / (left_s + one.restart_s) if known else factor
                cost = weight * (max(speedup, 1e-9) ** self.power - LAMBDA_N)
                pool = option.needs[0][0]
                if not stays and cost >= best.get(pool, 0.0):
                    continue
                best[pool] = min(cost, best.get(pool, 0.0))
                flat.append((one.task_id, option.point_id, option.needs, cost, stays and one.pinned))
        return solve(flat, capacity)

    def _size(self, one: Contender, lowest: float) -> tuple[float, float]:
        """(seconds of work on one slowest device, weight)."""
        if not one.measured:
            size_s, power = SIZE_S_UNKNOWN, self.size_power
        elif one.left is not None:
            size_s, power = one.left / lowest, self.declared_size_power
        else:
            size_s, power = one.done / lowest, self.size_power
        size_s = max(size_s, SIZE_S_MIN)
        return size_s, float((size_s / 3600.0) ** -power)


def _one_shape(one: Contender) -> bool:
    """One option on each pool, all of as many devices, and nothing lost by moving."""
    pools = [option.needs[0][0] for option in one.options]
    return (
        one.restart_s == 0.0
        and len(set(pools)) == len(pools)
        and len({option.devices for option in one.options}) == 1
    )
