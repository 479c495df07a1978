"""What an attempt costs, and the receipt of a task.  `rounded_micro` is the one rounding point."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from qipan.leases import Receipt, ReceiptLine, TaskId, Usage

DEVICE_HOUR_US = 3_600_000_000
PPM = 1_000_000  # shares are parts per million


def cost_micro_cny(usage: Usage, tariff_micro_cny_per_device_hour: int) -> int:
    """Device-seconds times tariff, rounded half up to the micro-yuan.  Device-seconds count in whole
    microseconds, so that equal usage always costs the same."""
    return rounded_micro(round(usage.device_s * 1_000_000), tariff_micro_cny_per_device_hour, DEVICE_HOUR_US)


def rounded_micro(quantity: int, price_micro: int, per: int) -> int:
    """`quantity` at `price_micro` for every `per` of it, rounded half up."""
    return (2 * quantity * price_micro + per) // (2 * per)


def make_receipt(
    task_id: TaskId,
    tenant: str,
    usages: Iterable[Usage],
    tariff_of: Callable[[Usage], tuple[int, str]],
    outcome: str,
    lost_work_s: float,
    sign: Callable[[bytes], str],
) -> Receipt:
    """One line per attempt; the cost is the sum of the lines.  `tariff_of` gives (micro-CNY per device-hour,
    version); `sign` signs the canonical JSON of everything else."""
    lines = []
    for usage in sorted(usages, key=lambda usage: (usage.attempt, usage.started_s, usage.board)):
        tariff, version = tariff_of(usage)
        lines.append(ReceiptLine(usage, version, tariff, cost_micro_cny(usage, tariff)))
    total = sum(line.cost_micro_cny for line in lines)
    receipt = Receipt(task_id, tenant, tuple(lines), total, outcome, round(lost_work_s, 3))
    return replace(receipt, signature=sign(msgspec.json.encode(receipt)))
