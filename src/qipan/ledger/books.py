"""An owner's books at its topmost board: facts become transfers.

submitted   tenant -> hold of the task (a task found running after a restore is held for in the same way)
attempt ended   hold -> provider, device-seconds at the posted tariff (beyond the hold: from the tenant)
task over   what is left of the hold -> tenant
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from qipan.events import Fact, TaskExited, TasksHeld, TaskSubmitted
from qipan.leases import Order, TaskId, Usage
from qipan.ledger.receipt import cost_micro_cny
from qipan.ledger.transfer import Transfer, move


@dataclass(frozen=True, slots=True)
class Tariff:
    version: str
    micro_cny_per_device_hour: dict[str, int]  # "board|chip class" -> price

    def of(self, usage: Usage) -> tuple[int, str]:
        return self.micro_cny_per_device_hour[f"{usage.board}|{usage.chip_class}"], self.version


@dataclass(slots=True)
class _State:
    """`held`: task -> what its hold still has.  `charged`: keys of attempts that were charged."""

    held: dict[TaskId, int] = field(default_factory=dict)
    tenant: dict[TaskId, str] = field(default_factory=dict)
    charged: set[str] = field(default_factory=set)


def hold_of_bid(order: Order) -> int:
    """Micro-CNY of a task's work at its bid, at its most efficient point."""
    best = min(order.curve.points, key=lambda point: (-point.rate / point.devices, point.point_id))
    device_hours = order.curve.work_s / best.rate * best.devices / 3600
    return round(order.bid_micro_cny_per_device_hour * device_hours)


class Books:
    """Every fact may come twice; a key is posted once."""

    def __init__(self, tariff: Tariff) -> None:
        self.tariff = tariff
        self._state = _State()

    def postings(self, fact: Fact, now_s: float) -> Sequence[Transfer]:
        if isinstance(fact, TaskSubmitted):
            return self._hold(fact.order, fact.hold_micro_cny)
        if isinstance(fact, TaskExited):
            return self._charge(fact.usage)
        if isinstance(fact, TasksHeld):
            return [
                transfer for held in fact.held for transfer in self._hold(held.order, hold_of_bid(held.order))
            ]
        return ()

    def task_over(self, task_id: TaskId) -> Sequence[Transfer]:
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

    def _charge(self, usage: Usage) -> Sequence[Transfer]:
        key = f"charge/{usage.task_id}/{usage.attempt}"
        if key in self._state.charged or usage.task_id not in self._state.tenant:
            return ()
        self._state.charged.add(key)
        price, _version = self.tariff.of(usage)
        cost = cost_micro_cny(usage, price)
        held = self._state.held.get(usage.task_id, 0)
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
