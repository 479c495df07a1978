"""`jct`: the least mean completion time of elastic tasks.

The weighted sum of (speed-up) ** p, p < 0, is minimised exactly, as in Sia; what differs is what counts: a change of shape costs
the share of the work left that the restart takes, a smaller task weighs more, and a device must bring something.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qipan.scheduler.policies.contender import Choice, Contender
from qipan.scheduler.policies.sia import restart_factor, solve


@dataclass(slots=True)
class Jct:
    p: float = -0.5
    lambda_n: float = 1.1
    size_power: float = 0.0
    restart_weight: float = 1.0
    device_price: float = 0.0
    sees_ratio: bool = True
    unknown_s: float = 3600.0
    mix: float = 1.0
    gain: float = 0.0

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        flat: list[tuple[str, str, tuple[tuple[str, int], ...], float, bool]] = []
        for one in sorted(contenders, key=lambda one: (one.submitted_s, one.task_id)):
            lowest = min((option.rate for option in one.options if option.rate > 0), default=1.0)
            age_s = max(now_s - one.submitted_s, 1.0)
            declared = one.left is not None and one.measured
            size = (
                max(one.left / lowest, 60.0)
                if declared
                else self.unknown_s
                if not one.measured
                else max(one.done / lowest, 60.0)
            )
            weight = (size / 3600.0) ** -self.size_power
            best: dict[str, float] = {}
            factor = restart_factor(one, now_s) ** self.restart_weight
            for option in sorted(one.options, key=lambda option: (option.devices, option.point_id)):
                if option.rate <= 0:
                    continue
                stays = option.point_id == one.current
                speedup = option.rate / lowest
                if not one.measured and not self.sees_ratio:
                    speedup = 1.0
                if one.current is not None and not stays:
                    if declared:
                        lasts_s = size / speedup
                        speedup *= (
                            lasts_s / (lasts_s + self.restart_weight * one.restart_s)
                        ) ** self.mix * factor ** (1 - self.mix)
                    else:
                        speedup *= factor
                    speedup *= 1 - self.gain
                cost = weight * (speedup**self.p - self.lambda_n) + self.device_price * option.devices
                pool = option.needs[0][0]
                pinned = stays and one.pinned
                if not pinned and cost >= best.get(pool, 0.0) and not stays:
                    continue
                best[pool] = min(cost, best.get(pool, 0.0))
                flat.append((one.task_id, option.point_id, option.needs, cost, pinned))
        return solve(flat, capacity)
