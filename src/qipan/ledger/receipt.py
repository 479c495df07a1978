"""What an attempt costs, and the receipt of a task."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from qipan.leases import Receipt, ReceiptLine, TaskId, Usage


def cost_micro_cny(usage: Usage, tariff_micro_cny_per_device_hour: int) -> int:
    """Device-seconds times tariff, rounded half up to the micro-yuan: the one rounding point.  Device-seconds count
    in whole microseconds, so that equal usage always costs the same."""
    device_us = round(usage.device_s * 1_000_000)
    return (device_us * tariff_micro_cny_per_device_hour + 1_800_000_000) // 3_600_000_000


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
    for usage in sorted(usages, key=lambda usage: usage.attempt):
        tariff, version = tariff_of(usage)
        lines.append(ReceiptLine(usage, version, tariff, cost_micro_cny(usage, tariff)))
    total = sum(line.cost_micro_cny for line in lines)
    receipt = Receipt(task_id, tenant, tuple(lines), total, outcome, round(lost_work_s, 3))
    return replace(receipt, signature=sign(msgspec.json.encode(receipt)))
