"""What a board maximises, by name: the worth of one second of a task's work at its best rate.

Every level uses the same worth, in asks, in orders to children and in the allocation at the leaves, so a policy means one thing in
the whole tree.  `revenue` counts in the owner's money; the others value progress alike whoever pays.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qipan.curves import Curve, Point
from qipan.leases import Order

#: how much a bid may rise as its deadline nears
URGENCY_MAX = 4.0
#: under `deadline`
DEADLINE_URGENCY_MAX = 100.0
#: micro-CNY that stand for one device-hour where nobody's bid counts
DEVICE_HOUR = 10_000_000.0
#: micro-CNY that finishing any one task is worth under `jct`
TASK = 20_000_000.0
#: under `fifo` a task is worth e times one that came so much later
FIFO_S, FIFO_MOST = 600.0, 200.0
#: a finish-time ratio counts to this power under `fair`, up to so much
FAIR_POWER, FAIR_MOST = 2.0, 1e6

Value = Callable[[Order, float, float], float]


@dataclass(frozen=True, slots=True)
class Objective:
    """`value`: (order, done_s, now_s) -> micro-CNY per second of work.  `timed`: it changes with time or work done, so alike
    tasks may differ.  `counts_tariff`:
    a point's tariff is taken off as the owner's objective says."""

    value: Value
    timed: bool
    counts_tariff: bool
    what: str


def most_efficient(curve: Curve) -> Point:
    """The point with the most progress per device; ties by id."""
    return min(curve.points, key=lambda point: (-point.rate / point.devices, point.point_id))


def urgency(order: Order, done_s: float, now_s: float, most: float = URGENCY_MAX) -> float:
    """Factor >= 1 on the bid: the share of the time left that the rest needs at the best point, squared, times
    `most`; 1 when there is no deadline or it has passed.  What a service's forecast asks for is always due now."""
    if order.hours is not None:
        return most
    if order.deadline_s is None or order.deadline_s <= now_s:
        return 1.0
    need_s = max(0.0, order.curve.work_s - done_s)
    share = min(1.0, need_s / (order.deadline_s - now_s))
    return 1.0 + (most - 1.0) * share * share


def device_work_s(order: Order) -> float:
    """Device-seconds that one second of its work takes at the most efficient point."""
    point = most_efficient(order.curve)
    return point.devices / point.rate


def revenue(order: Order, done_s: float, now_s: float) -> float:
    """The owner's bid for the devices that the work takes, raised as its deadline nears."""
    bid = order.bid_micro_cny_per_device_hour / 3600 * device_work_s(order)
    return bid * urgency(order, done_s, now_s)


def jct(order: Order, done_s: float, now_s: float) -> float:
    """Every task is worth the same when it ends: progress counts as the share of the work left (Smith's rule)."""
    return TASK / (60.0 if order.hours is not None else max(60.0, order.curve.work_s - done_s))


def deadline(order: Order, done_s: float, now_s: float) -> float:
    """Progress of a task counts far more as the time to its deadline runs out; the others share what is left."""
    return DEVICE_HOUR / 3600 * device_work_s(order) * urgency(order, done_s, now_s, DEADLINE_URGENCY_MAX)


def fair(order: Order, done_s: float, now_s: float) -> float:
    """Finish-time fairness (K. Mahajan et al., Themis, NSDI 2020): who is furthest behind its own isolated time counts most."""
    if order.hours is not None:
        return DEVICE_HOUR / 3600 * device_work_s(order) * FAIR_MOST
    ratio = (max(0.0, now_s - order.submitted_s) + order.curve.work_s - done_s) / max(1.0, order.curve.work_s)
    return DEVICE_HOUR / 3600 * device_work_s(order) * min(FAIR_MOST, float(ratio**FAIR_POWER))


def fifo(order: Order, done_s: float, now_s: float) -> float:
    """Who came first counts so much more that nobody later gets ahead."""
    if order.hours is not None:
        return DEVICE_HOUR / 3600 * device_work_s(order) * math.exp(FIFO_MOST)
    age = min(FIFO_MOST, max(0.0, now_s - order.submitted_s) / FIFO_S)
    return DEVICE_HOUR / 3600 * device_work_s(order) * math.exp(age)


OBJECTIVES: Mapping[str, Objective] = {
    "revenue": Objective(revenue, False, True, "the owners' bids, dearer as deadlines near (the default)"),
    "jct": Objective(jct, True, False, "the least mean completion time"),
    "fair": Objective(fair, True, False, "equal finish-time ratios against running alone"),
    "deadline": Objective(deadline, True, False, "deadlines first"),
    "fifo": Objective(fifo, True, False, "who came first; nobody is moved or resized"),
    "gavel": Objective(
        fair, True, False, "Gavel's max-min fairness at each leaf, finish-time fairness above"
    ),
    "sia": Objective(jct, True, False, "Sia's goodput program at each leaf, `jct` above"),
    "kueue": Objective(
        fifo, True, False, "our model of Kueue's admission at each leaf, first come first served above"
    ),
}

#: under these no task is shrunk, grown or parked for another
RIGID = ("fifo", "kueue")
