"""First in, first out: the oldest task takes its fastest free option and keeps it; nobody passes one that waits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qipan.scheduler.policies.contender import Choice, Contender


@dataclass(frozen=True, slots=True)
class Fifo:
    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        free, chosen = dict(capacity), {}
        running = [one for one in contenders if one.current is not None]
        waiting = [one for one in contenders if one.current is None]
        for one in running:
            assert one.current is not None
            chosen[one.task_id] = one.current
            for pool, devices in one.option(one.current).needs:
                free[pool] -= devices
        for one in sorted(waiting, key=lambda one: (one.submitted_s, one.task_id)):
            fitting = [
                option
                for option in one.options
                if option.rate > 0 and all(devices <= free[pool] for pool, devices in option.needs)
            ]
            if not fitting:
                break
            best = max(fitting, key=lambda option: (option.rate, -option.devices, option.point_id))
            chosen[one.task_id] = best.point_id
            for pool, devices in best.needs:
                free[pool] -= devices
        return chosen
