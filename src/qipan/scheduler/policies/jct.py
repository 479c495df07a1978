"""`jct`: the least mean completion time, for a board of elastic tasks or of tasks that share devices in time.

Elastic tasks: the weighted sum of speed-up ** P, P < 0, is minimised, as in Sia (SOSP 2023).  What differs is what counts and
where a task begins.  A task weighs more the less work it has: what is declared to be left, or, since sizes of training tasks are
heavy-tailed, what it did so far.  A task that never ran begins at the size that the speeds of its profile and GUESS_POWER make
likely, not on one device: every doubling on the way up would be a restart.  A change of shape costs what Sia says by a task's age, or
the share that the restart takes of the time left, or, where a task grows, of the time for which its devices will stay free (as long as no
task has come by now, or QUIET_S), whichever is most.  Tasks of one shape with declared work: see `tails`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qipan.scheduler.allocate import Bidder, Candidate, allocate
from qipan.scheduler.policies.contender import Choice, Contender
from qipan.scheduler.policies.sia import LAMBDA_N, restart_factor
from qipan.scheduler.policies.tails import LeastMean

#: sizes below this count alike, in seconds on one slowest device; of a task that never ran
SIZE_S_MIN, SIZE_S_UNKNOWN = 60.0, 3600.0
#: n devices are first taken to be so much faster than one: n to this power; more than FIRST_DEVICES are not tried at once
GUESS_POWER, FIRST_DEVICES = 0.5, 8
#: free devices stay free for so many seconds at least
QUIET_S = 240.0
#: candidates up to which a round is solved exactly
EXACT_UP_TO = 2_000


@dataclass(frozen=True, slots=True)
class Jct:
    """`power`: of the speed-up; `size_power`, `declared_size_power`: a task weighs its size to minus this; `shared`: for tasks of
    one shape that lose nothing by moving every round; None where a round is not a thing."""

    power: float = -0.5
    size_power: float = 0.2
    declared_size_power: float = 0.3
    shared: LeastMean | None = None

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        if self.shared is not None and all(one.left is not None and _one_shape(one) for one in contenders):
            return self.shared.choose(contenders, capacity, now_s)
        free = dict(capacity)
        chosen: Choice = {}
        for one in contenders:
            if one.pinned and one.current is not None:
                chosen[one.task_id] = one.current
                for pool, devices in one.option(one.current).needs:
                    free[pool] -= devices
        last_s = max((one.submitted_s for one in contenders), default=now_s)
        quiet_s = max(now_s - last_s, QUIET_S)
        bidders = [self.bidder(one, now_s, quiet_s) for one in contenders if one.task_id not in chosen]
        return {**chosen, **allocate(bidders, free, exact_up_to=EXACT_UP_TO).chosen}

    def bidder(self, one: Contender, now_s: float, quiet_s: float) -> Bidder:
        """What each of its options is worth above waiting, when free devices stay free for `quiet_s`."""
        rates = {option.point_id: _rate(one, option.rate, option.devices) for option in one.options}
        lowest = _one_slowest(one, rates)
        size_s, weight = self._size(one, lowest)
        candidates, most = [], dict[str, float]()  # pool -> the most value of a smaller option there
        for option in sorted(one.options, key=lambda option: (option.devices, option.point_id)):
            speedup = rates[option.point_id] / lowest
            if speedup <= 0:
                continue
            stays = option.point_id == one.current
            if one.current is not None and not stays:
                grows = rates[option.point_id] > rates.get(one.current, 0.0)
                kept = max(1.0 - one.restart_s / quiet_s, 0.0) if grows else 1.0
                speedup *= min(restart_factor(one, now_s), _not_lost(one, size_s / speedup), kept)
            value = weight * (LAMBDA_N - max(speedup, 1e-9) ** self.power)
            pool = option.needs[0][0]
            if stays or value > most.get(pool, 0.0):
                most[pool] = max(value, most.get(pool, 0.0))
                candidates.append(Candidate(option.point_id, option.needs, value))
        return Bidder(one.task_id, tuple(candidates), one.current)

    def _size(self, one: Contender, lowest: float) -> tuple[float, float]:
        """(seconds of work on one slowest device, weight)."""
        if one.left is not None:
            size_s, power = one.left / lowest, self.declared_size_power
        elif not one.measured:
            size_s, power = SIZE_S_UNKNOWN, self.size_power
        else:
            size_s, power = one.done / lowest, self.size_power
        size_s = max(size_s, SIZE_S_MIN)
        return size_s, float((size_s / 3600.0) ** -power)


def _rate(one: Contender, rate: float, devices: int) -> float:
    """Progress per second as far as it is known: the guess of a task that never ran supposes that n devices are n times one."""
    if one.measured:
        return rate
    return rate * float(devices) ** (GUESS_POWER - 1.0) if devices <= FIRST_DEVICES else 0.0


def _not_lost(one: Contender, left_s: float) -> float:
    """Share of the time to its end, restart included, that it works; 1 when the end is not known."""
    return 1.0 if one.left is None else left_s / (left_s + one.restart_s)


def _one_slowest(one: Contender, rates: Mapping[str, float]) -> float:
    """Progress per second on one device of the slowest pool, from its smallest shapes."""
    usable = [option for option in one.options if rates[option.point_id] > 0]
    fewest = min((option.devices for option in usable), default=1)
    smallest = [rates[option.point_id] for option in usable if option.devices == fewest]
    return float(min(smallest, default=1.0) / fewest**GUESS_POWER)


def _one_shape(one: Contender) -> bool:
    """One option on each pool, all of as many devices, and nothing lost by moving."""
    pools = [option.needs[0][0] for option in one.options]
    return (
        one.restart_s == 0.0
        and len(set(pools)) == len(pools)
        and len({option.devices for option in one.options}) == 1
    )
