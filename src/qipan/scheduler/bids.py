"""What a task's progress is worth, and what a point of its curve is worth to its owner and to the board.

A task bids for a device-hour at its most efficient point; everything else follows from its curve, so unlike tasks
compare in money per second (DESIGN section 1).
"""

from dataclasses import dataclass

from qipan.curves import Curve, Point
from qipan.leases import Order

#: share of the tariff that an owner's objective counts against a faster but less efficient point
TARIFF_WEIGHT = {"cost": 0.95, "balanced": 0.5, "time": 0.0}
#: how much a bid may rise as its deadline nears
URGENCY_MAX = 4.0
#: what progress is still worth once its deadline cannot be met
LATE = 0.25


def most_efficient(curve: Curve) -> Point:
    """The point with the most progress per device; ties by id."""
    return min(curve.points, key=lambda point: (-point.rate / point.devices, point.point_id))


def urgency(order: Order, done_s: float, now_s: float) -> float:
    """Factor >= 1 on the bid: the share of the time left that the rest needs at the best point, squared, times
    URGENCY_MAX; 1 when there is no deadline or it has passed."""
    if order.deadline_s is None or order.deadline_s <= now_s:
        return 1.0
    need_s = max(0.0, order.curve.work_s - done_s)
    share = min(1.0, need_s / (order.deadline_s - now_s))
    return 1.0 + (URGENCY_MAX - 1.0) * share * share


def progress_value(order: Order, done_s: float, now_s: float) -> float:
    """Micro-CNY that one second of work at the task's best rate is worth to its owner."""
    point = most_efficient(order.curve)
    return (
        order.bid_micro_cny_per_device_hour
        / 3600
        * point.devices
        / point.rate
        * urgency(order, done_s, now_s)
    )


def steady(order: Order) -> bool:
    """Whether what its progress is worth depends neither on the time nor on the work done."""
    return order.deadline_s is None


@dataclass(frozen=True, slots=True)
class Worth:
    """A task's progress valued at one moment: `value` micro-CNY per second of work at its best rate; `done_s` of
    it done; `now_s` the time."""

    order: Order
    value: float
    done_s: float
    now_s: float

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
        weight = TARIFF_WEIGHT.get(self.order.objective, 0.5)
        cost = point.devices * tariff_micro_cny_per_device_hour / 3600
        return gain - weight * min(cost, gain)

    def of_change(self, point: Point, unsaved_s: float) -> float:
        """Micro-CNY lost by stopping at `point` and starting again: progress not made meanwhile, and work done
        since the newest checkpoint when the stop cannot save it."""
        return self.value * (point.rate * (point.stop_s + point.start_s) + unsaved_s)


def worth_of(order: Order, done_s: float, now_s: float) -> Worth:
    return Worth(order, progress_value(order, done_s, now_s), done_s, now_s)


def time_left_s(order: Order, point: Point, done_s: float) -> float:
    """Seconds to the end at `point`, never below one."""
    return max(1.0, (order.curve.work_s - done_s) / point.rate)
