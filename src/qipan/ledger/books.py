"""An owner's books at its topmost board: facts become transfers.

submitted   tenant -> hold of the task (a task found running after a restore is held for in the same way)
attempt ended   hold -> provider, device-seconds at the posted tariff (beyond the hold: from the tenant)
task over   what is left of the hold -> tenant

A task whose owner gave it a budget is parked before it would overrun it: `due` says when.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from qipan.events import (
    BudgetRaised,
    BudgetReached,
    Fact,
    TaskExited,
    TaskProgress,
    TasksHeld,
    TaskStarted,
    TaskSubmitted,
)
from qipan.leases import Order, TaskId, Usage
from qipan.ledger.receipt import cost_micro_cny
from qipan.ledger.transfer import Transfer, move


@dataclass(frozen=True, slots=True)
class Tariff:
    version: str
    micro_cny_per_device_hour: dict[str, int]  # "board|chip class" -> price

    def of(self, usage: Usage) -> tuple[int, str]:
        return self.micro_cny_per_device_hour[f"{usage.board}|{usage.chip_class}"], self.version


#: so long before the budget's end parking begins beside the time that parking takes: the order goes down the tree
PARK_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """What an attempt costs: `spent_micro` at `since_s`, from then on `micro_per_s`.  It needs `stop_s` to park."""

    spent_micro: int
    since_s: float
    micro_per_s: float
    stop_s: float

    def spent_at(self, now_s: float) -> int:
        return self.spent_micro + round(max(0.0, now_s - self.since_s) * self.micro_per_s)

    def reaches_s(self, left_micro: int) -> float:
        """When it must begin to park to spend no more than `left_micro`."""
        left_s = (left_micro - self.spent_micro) / self.micro_per_s if self.micro_per_s > 0 else 1e18
        return self.since_s + left_s - self.stop_s - PARK_MARGIN_S


@dataclass(slots=True)
class _State:
    """`held`: task -> what its hold still has.  `charged`: keys of attempts that were charged.  Of tasks with a budget:
    `budget`, what ended attempts cost (`spent`), what runs (`running`), whether it was told to park (`told`)."""

    held: dict[TaskId, int] = field(default_factory=dict)
    tenant: dict[TaskId, str] = field(default_factory=dict)
    charged: set[str] = field(default_factory=set)
    budget: dict[TaskId, int] = field(default_factory=dict)
    spent: dict[TaskId, int] = field(default_factory=dict)
    stop_s: dict[TaskId, dict[str, float]] = field(default_factory=dict)  # -> point -> seconds to park
    running: dict[TaskId, Running] = field(default_factory=dict)
    told: set[TaskId] = field(default_factory=set)


def hold_of_bid(order: Order) -> int:
    """Micro-CNY of a task's work at its bid, at its most efficient point; of a service's replica those of a period."""
    best = min(order.curve.points, key=lambda point: (-point.rate / point.devices, point.point_id))
    work_s = order.curve.work_s if order.hours is None else order.hours.asked_s_of_period()
    device_hours = work_s / best.rate * best.devices / 3600
    return round(order.bid_micro_cny_per_device_hour * device_hours)


def _key(usage: Usage) -> str:
    """Of an attempt's charge.  Two boards parted by a cut may both count an attempt with the same number: each ran and is paid."""
    return f"charge/{usage.task_id}/{usage.attempt}/{usage.board}"


def charged_once(told: Iterable[TaskExited]) -> list[TaskExited]:
    """Of exits that may have been told twice those that the books charge: the first word on each attempt at each board."""
    first: dict[str, TaskExited] = {}
    for fact in told:
        first.setdefault(_key(fact.usage), fact)
    return list(first.values())


class Books:
    """Every fact may come twice; a key is posted once."""

    def __init__(self, tariff: Tariff) -> None:
        self.tariff = tariff
        self._state = _State()

    def postings(self, fact: Fact, now_s: float) -> Sequence[Transfer]:
        if isinstance(fact, TaskSubmitted):
            if fact.budget_micro_cny is not None and fact.order.task_id not in self._state.tenant:
                self._state.budget[fact.order.task_id] = fact.budget_micro_cny
                self._state.stop_s[fact.order.task_id] = {
                    point.point_id: point.stop_s for point in fact.order.curve.points
                }
            return self._hold(fact.order, fact.hold_micro_cny)
        if isinstance(fact, TaskExited):
            self._state.running.pop(fact.task_id, None)
            return self._charge(fact.usage)
        if isinstance(fact, TaskStarted | TaskProgress):
            if fact.task_id in self._state.budget:
                self._runs(fact, now_s)
            return ()
        if isinstance(fact, BudgetReached):
            self._state.told.add(fact.task_id)
            return ()
        if isinstance(fact, BudgetRaised):
            return self._raise(fact)
        if isinstance(fact, TasksHeld):
            return [
                transfer for held in fact.held for transfer in self._hold(held.order, hold_of_bid(held.order))
            ]
        return ()

    # ---- budgets -----------------------------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[BudgetReached]:
        """Of the tasks that must park now."""
        state = self._state
        return [
            BudgetReached(
                task_id, state.spent.get(task_id, 0) + running.spent_at(now_s), state.budget[task_id]
            )
            for task_id, running in sorted(state.running.items())
            if task_id not in state.told and self._reaches_s(task_id, running) <= now_s
        ]

    def next_due_s(self) -> float | None:
        times = [
            self._reaches_s(task_id, running)
            for task_id, running in self._state.running.items()
            if task_id not in self._state.told
        ]
        return min(times, default=None)

    def _reaches_s(self, task_id: TaskId, running: Running) -> float:
        return running.reaches_s(self._state.budget[task_id] - self._state.spent.get(task_id, 0))

    def _runs(self, fact: TaskStarted | TaskProgress, now_s: float) -> None:
        state = self._state
        known = state.running.get(fact.task_id)
        if isinstance(fact, TaskStarted):
            micro_per_s = (
                sum(need.devices * self._price_at(fact.place, need.chip_class) for need in fact.needs) / 3600
            )
            stop_s = state.stop_s[fact.task_id].get(fact.point_id, 0.0)
            state.running[fact.task_id] = Running(0, now_s, micro_per_s, stop_s)
            state.told.discard(fact.task_id)
        elif known is not None and not self._is_charged(fact.usage):
            price, _version = self.tariff.of(fact.usage)
            per_s = fact.usage.devices * price / 3600
            spent = cost_micro_cny(fact.usage, price)
            state.running[fact.task_id] = Running(spent, min(now_s, fact.usage.until_s), per_s, known.stop_s)

    def _price_at(self, place: str, chip_class: str) -> int:
        """Of the board on the leaf's path that sells the chip; where none is named (an engine of this board), the dearest."""
        prices = self.tariff.micro_cny_per_device_hour
        for board in reversed(place.split("/")):
            if (key := f"{board}|{chip_class}") in prices:
                return prices[key]
        return max((price for key, price in prices.items() if key.endswith(f"|{chip_class}")), default=0)

    def _raise(self, fact: BudgetRaised) -> Sequence[Transfer]:
        state = self._state
        before = state.budget.get(fact.task_id)
        if before is None or fact.budget_micro_cny <= before:
            return ()
        state.budget[fact.task_id] = fact.budget_micro_cny
        state.told.discard(fact.task_id)
        more = fact.budget_micro_cny - before
        state.held[fact.task_id] = state.held.get(fact.task_id, 0) + more
        key = f"hold/{fact.task_id}/{fact.budget_micro_cny}"
        return (
            move(key, fact.task_id, f"tenant/{state.tenant[fact.task_id]}", f"hold/{fact.task_id}", more),
        )

    # ---- holds and charges -------------------------------------------------------------------------------------------

    def task_over(self, task_id: TaskId) -> Sequence[Transfer]:
        for kept in (self._state.budget, self._state.spent, self._state.stop_s, self._state.running):
            kept.pop(task_id, None)
        self._state.told.discard(task_id)
        left = self._state.held.pop(task_id, 0)
        if left <= 0:
            return ()
        return (
            move(
                f"release/{task_id}",
                task_id,
                f"hold/{task_id}",
                f"tenant/{self._state.tenant[task_id]}",
                left,
            ),
        )

    def _hold(self, order: Order, hold_micro_cny: int) -> Sequence[Transfer]:
        task_id, tenant = order.task_id, order.tenant
        if task_id in self._state.tenant:
            return ()
        self._state.tenant[task_id] = tenant
        self._state.held[task_id] = hold_micro_cny
        if hold_micro_cny == 0:
            return ()
        return (move(f"hold/{task_id}", task_id, f"tenant/{tenant}", f"hold/{task_id}", hold_micro_cny),)

    def _is_charged(self, usage: Usage) -> bool:
        """Also in a store whose keys did not name the board yet."""
        return not self._state.charged.isdisjoint((_key(usage), f"charge/{usage.task_id}/{usage.attempt}"))

    def _charge(self, usage: Usage) -> Sequence[Transfer]:
        key = _key(usage)
        if self._is_charged(usage) or usage.task_id not in self._state.tenant:
            return ()
        self._state.charged.add(key)
        price, _version = self.tariff.of(usage)
        cost = cost_micro_cny(usage, price)
        held = self._state.held.get(usage.task_id, 0)
        if usage.task_id in self._state.budget:
            self._state.spent[usage.task_id] = self._state.spent.get(usage.task_id, 0) + cost
        from_hold, beyond = min(cost, held), max(0, cost - held)
        self._state.held[usage.task_id] = held - from_hold
        provider = f"provider/{usage.board}"
        transfers = []
        if from_hold:
            transfers.append(move(key, usage.task_id, f"hold/{usage.task_id}", provider, from_hold))
        if beyond:
            tenant = self._state.tenant[usage.task_id]
            transfers.append(move(f"{key}/beyond", usage.task_id, f"tenant/{tenant}", provider, beyond))
        return transfers

    def encode(self) -> bytes:
        return msgspec.json.encode(self._state)

    def restore(self, body: bytes) -> None:
        self._state = msgspec.json.decode(body, type=_State)
