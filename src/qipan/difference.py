"""What a board's store does not hold though boards below know it: after a restore from an old backup, or after a standby led that had not
kept up.  Each board below tells once, when it comes back; nothing is posted, the difference is listed for people to settle."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from qipan.events import CommandReceived, Reserve, TaskExited, decode
from qipan.hardware import BoardSpec
from qipan.leases import Order, Usage
from qipan.ledger.receipt import cost_micro_cny
from qipan.store import Store

#: clocks of two hosts may differ by so much, and an exit may be older than the tick that took it in
BEFORE_S = 3600.0
EXITS_MAX = 100_000


class Known(msgspec.Struct, frozen=True):
    """A task as a board below knows it."""

    tenant: str
    name: str
    submitted_s: float


class Told(msgspec.Struct, frozen=True):
    """By one board below: attempts that ended there since `since_s`, the tasks that they were of and those that it holds."""

    since_s: float
    usages: tuple[Usage, ...]
    tasks: dict[str, Known]


@dataclass(frozen=True, slots=True)
class Missing:
    """`what`: "charge" (an attempt that ran and was never charged) or "submission" (a task that people do not see here)."""

    what: str
    task_id: str
    tenant: str
    board: str = ""
    attempt: int = 0
    device_s: float = 0.0
    cost_micro_cny: int = 0


def told_by(store: Store, held: Iterable[Order], since_s: float) -> Told:
    """The answer of a board below, from its own store."""
    known = {str(order.task_id): Known(order.tenant, order.name, order.submitted_s) for order in held}
    usages: dict[tuple[str, int, str], Usage] = {}
    rows = store.db.rows(
        "SELECT task_id, body FROM facts WHERE kind = ? AND now_s >= ? ORDER BY fact_id LIMIT ?",
        (TaskExited.kind, since_s, EXITS_MAX),
    )
    for task_id, body in rows:
        fact = decode(body)
        assert isinstance(fact, TaskExited)
        usage = fact.usage
        usages[usage.task_id, usage.attempt, usage.board] = usage
        if task_id not in known and (order := _order_of(store, task_id)) is not None:
            known[task_id] = Known(order.tenant, order.name, order.submitted_s)
    return Told(since_s, tuple(usages.values()), known)


def _order_of(store: Store, task_id: str) -> Order | None:
    for _, _, body in store.facts_of(task_id, ["command_received"]):
        fact = decode(body)
        if isinstance(fact, CommandReceived) and isinstance(fact.command, Reserve):
            return fact.command.order
    return None


def difference(store: Store, told: Iterable[Told], prices: Mapping[str, int]) -> list[Missing]:
    """`prices`: "board|chip class" -> micro-CNY a device-hour."""
    rows, told = list[Missing](), list(told)
    usages = {(one.task_id, one.attempt, one.board): one for answer in told for one in answer.usages}
    tasks = {task_id: known for answer in told for task_id, known in answer.tasks.items()}
    for (task_id, attempt, board), usage in sorted(usages.items()):
        cost = cost_micro_cny(usage, prices.get(f"{board}|{usage.chip_class}", 0))
        key = f"charge/{task_id}/{attempt}/{board}"
        if cost and not store.db.rows("SELECT 1 FROM transfers WHERE key IN (?,?)", (key, f"{key}/beyond")):
            tenant = tasks[task_id].tenant if task_id in tasks else ""
            rows.append(Missing("charge", task_id, tenant, board, attempt, usage.device_s, cost))
    for name, known in sorted(tasks.items()):
        if store.submission(name) is None:
            rows.append(Missing("submission", name, known.tenant))
    return rows


def prices_of(specs: Iterable[BoardSpec]) -> dict[str, int]:
    return {
        f"{pool.site}|{pool.chip_class}": pool.tariff_micro_cny_per_device_hour
        for spec in specs
        for board in spec.walk()
        for pool in board.pools
    }


def summed(rows: Iterable[Missing], by: str) -> dict[str, int]:
    """What was not charged, by "tenant" or "board"."""
    sums: dict[str, int] = {}
    for row in rows:
        if row.what == "charge":
            name = str(getattr(row, by))
            sums[name] = sums.get(name, 0) + row.cost_micro_cny
    return sums


def encode_told(told: Told) -> bytes:
    return msgspec.msgpack.encode(told)


def decode_told(body: Any) -> Told:
    """Raises MsgspecError: what a board below said is its own."""
    return msgspec.msgpack.decode(body if isinstance(body, bytes) else b"", type=Told)
