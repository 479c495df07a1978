"""Why a bill is not what the plan said: parts that sum to the difference, to the micro-yuan."""

from collections.abc import Sequence
from dataclasses import dataclass

from qipan.leases import ReceiptLine
from qipan.ledger.receipt import DEVICE_HOUR_US, rounded_micro


@dataclass(frozen=True, slots=True)
class Planned:
    """The option that was chosen when the task was submitted."""

    place: str
    chip_class: str
    devices: int
    cost_p50_micro_cny: int
    cost_p90_micro_cny: int
    tariff_micro_cny_per_device_hour: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """`lost_s`: seconds of it whose work was done again later; `idle_s`: starting and parking, beyond the plan's one start."""

    line: ReceiptLine
    lost_s: float = 0.0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """What is dearer (or cheaper, negative) than the plan's p50, and why."""

    amount_micro_cny: int
    text: str


def explain(planned: Planned, attempts: Sequence[Attempt]) -> tuple[Difference, ...]:
    """The parts sum to the bill less the plan's p50.  At the planned tariff: work done again, starts and parking, then what is left of
    the time; the tariff's own part is what the same device-seconds cost more elsewhere."""
    price = planned.tariff_micro_cny_per_device_hour
    total = sum(attempt.line.cost_micro_cny for attempt in attempts)
    at_plan = sum(_cost(attempt.line.usage.device_s, price) for attempt in attempts)
    lost = sum(_cost(attempt.lost_s * attempt.line.usage.devices, price) for attempt in attempts)
    idle = sum(_cost(attempt.idle_s * attempt.line.usage.devices, price) for attempt in attempts)
    rest = at_plan - planned.cost_p50_micro_cny - lost - idle
    parts = []
    if total != at_plan:
        others = sorted(
            {
                f"{attempt.line.usage.devices} x {attempt.line.usage.chip_class} at {attempt.line.usage.board}"
                for attempt in attempts
                if attempt.line.tariff_micro_cny_per_device_hour != price
            }
        )
        parts.append(
            Difference(total - at_plan, f"it ran on {', '.join(others)}; planned was {planned.chip_class} at {planned.place}")
        )  # fmt: skip
    if lost:
        parts.append(Difference(lost, f"{sum(attempt.lost_s for attempt in attempts):.1f} s of work were lost and done again"))  # fmt: skip
    if idle:
        parts.append(Difference(idle, f"starting and parking of {len(attempts) - 1} more attempts"))
    if rest:
        word = "more" if rest > 0 else "fewer"
        device_s = abs(rest) / price * 3600 if price else 0.0
        within = "within" if total <= planned.cost_p90_micro_cny else "beyond"
        parts.append(
            Difference(rest, f"its work took {device_s:.1f} {word} device-seconds than the plan's p50; the bill is {within} the plan's p90")
        )  # fmt: skip
    assert sum(part.amount_micro_cny for part in parts) == total - planned.cost_p50_micro_cny
    return tuple(parts)


def _cost(device_s: float, price: int) -> int:
    return rounded_micro(round(device_s * 1e6), price, DEVICE_HOUR_US)
