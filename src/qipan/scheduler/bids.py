"""What a task's progress is worth, and what a point of its curve is worth to its owner and to the board.

A task bids for a device-hour at its most efficient point; everything else follows from its curve, so unlike tasks
compare in money per second (DESIGN section 1).
"""

from dataclasses import dataclass

from qipan.curves import Point
from qipan.leases import Order
from qipan.scheduler.policies.objectives import OBJECTIVES, most_efficient

#: share of the tariff that an owner's objective counts against a faster but less efficient point
TARIFF_WEIGHT = {"cost": 0.95, "balanced": 0.5, "time": 0.0}
#: what progress is still worth once its deadline cannot be met
LATE = 0.25


def progress_value(order: Order, done_s: float, now_s: float, policy: str = "revenue") -> float:
    """Micro-CNY that one second of work at the task's best rate is worth under the board's policy."""
    return OBJECTIVES[policy].value(order, done_s, now_s)


def steady(order: Order, policy: str = "revenue") -> bool:
    """Whether what its progress is worth depends neither on the time nor, while it waits, on anything else."""
    return order.deadline_s is None and not OBJECTIVES[policy].timed


@dataclass(frozen=True, slots=True)
class Worth:
    """A task's progress valued at one moment: `value` micro-CNY per second of work at its best rate; `done_s` of
    it done; `now_s` the time; `counts_tariff`: the share of the tariff is taken off."""

    order: Order
    value: float
    done_s: float
    now_s: float
    counts_tariff: bool = True

    def of(self, point: Point, tariff_micro_cny_per_device_hour: int, *, running: bool = False) -> float:
        """Micro-CNY per second of running at `point`: what its progress is worth less the share of the tariff that
        the objective counts.  A point that ends after the deadline is worth LATE of its value."""
        gain = self.value * point.rate
        deadline_s = self.order.deadline_s
        start_s = 0.0 if running else point.start_s
        if (
            deadline_s is not None
            and self.now_s + start_s + time_left_s(self.order, point, self.done_s) > deadline_s
        ):
            gain *= LATE
        if not self.counts_tariff:
            return gain
        weight = TARIFF_WEIGHT.get(self.order.objective, 0.5)
        cost = point.devices * tariff_micro_cny_per_device_hour / 3600
        return gain - weight * min(cost, gain)

    def of_change(self, point: Point, unsaved_s: float) -> float:
        """Micro-CNY lost by stopping at `point` and starting again: progress not made meanwhile, and work done
        since the newest checkpoint when the stop cannot save it."""
        return self.value * (point.rate * (point.stop_s + point.start_s) + unsaved_s)


def worth_of(order: Order, done_s: float, now_s: float, policy: str = "revenue") -> Worth:
    objective = OBJECTIVES[policy]
    return Worth(order, objective.value(order, done_s, now_s), done_s, now_s, objective.counts_tariff)


def time_left_s(order: Order, point: Point, done_s: float) -> float:
    """Seconds to the end at `point`, never below one."""
    return max(1.0, (order.curve.work_s - done_s) / point.rate)


__all__ = ["Worth", "most_efficient", "progress_value", "steady", "time_left_s", "worth_of"]
