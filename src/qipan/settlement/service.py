"""Service levels from the evidence of two parties, and the price of capacity that was sold and not delivered.
Clauses S-1 to S-6 of docs/rules/grid.md."""

from dataclasses import dataclass

from qipan.ledger.receipt import PPM, rounded_micro
from qipan.settlement.contracts import check_share


@dataclass(frozen=True, slots=True)
class Service:
    """What a delivery promises, and what a failure to keep it gives back as a share of its charge; all of them together at most
    `cap_ppm`.  Levels as shares: availability of the lease's time, delivered of measured capacity."""

    start_delay_s_max: float = 300.0
    start_credit_ppm: int = 50_000
    availability_ppm: int = 990_000
    availability_credit_ppm: int = 100_000
    delivered_ppm: int = 900_000
    delivered_credit_ppm: int = 150_000
    notice_s_min: float = 120.0
    notice_credit_ppm: int = 50_000
    cap_ppm: int = 300_000

    def __post_init__(self) -> None:
        for name in ("start_credit_ppm", "availability_credit_ppm", "delivered_credit_ppm", "notice_credit_ppm", "cap_ppm"):  # fmt: skip
            check_share(getattr(self, name), name)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one party saw of a delivery.  `notice_s`: before it was taken away, None when it was not."""

    started_s: float
    up_s: float
    length_s: float
    delivered_ppm: int = PPM
    notice_s: float | None = None


@dataclass(frozen=True, slots=True)
class Credit:
    """`certain_micro` is paid; `disputed_micro` lies in escrow until it is ruled on."""

    certain_micro: int
    disputed_micro: int
    reasons: tuple[str, ...]


def credit_of(
    service: Service, agreed_start_s: float, charge_micro: int, provider: Evidence | None, tenant: Evidence | None
) -> Credit:  # fmt: skip
    """What both see is certain, what one sees alone is disputed.  A party that says nothing in time agrees with the other."""
    told = [
        _credit_by(service, agreed_start_s, charge_micro, seen) for seen in (provider or tenant, tenant or provider) if seen
    ]  # fmt: skip
    if not told:
        return Credit(0, 0, ())
    (one, reasons), (other, more) = told
    low, high = min(one, other), max(one, other)
    return Credit(low, high - low, more if other >= one else reasons)


def _credit_by(
    service: Service, agreed_start_s: float, charge_micro: int, seen: Evidence
) -> tuple[int, tuple[str, ...]]:
    share, reasons = 0, []
    late_s = seen.started_s - agreed_start_s
    if late_s > service.start_delay_s_max:
        share += service.start_credit_ppm
        reasons.append(f"started {late_s:.0f} s late, {service.start_delay_s_max:.0f} s are allowed")
    up_ppm = round(min(seen.up_s, seen.length_s) / seen.length_s * PPM) if seen.length_s > 0 else PPM
    if up_ppm < service.availability_ppm:
        share += service.availability_credit_ppm
        reasons.append(f"up {up_ppm / 1e4:.2f} % of the time, {service.availability_ppm / 1e4:.2f} % are promised")  # fmt: skip
    if seen.delivered_ppm < service.delivered_ppm:
        share += service.delivered_credit_ppm
        reasons.append(f"delivered {seen.delivered_ppm / 1e4:.1f} % of the measured rate, {service.delivered_ppm / 1e4:.1f} % are promised")  # fmt: skip
    if seen.notice_s is not None and seen.notice_s < service.notice_s_min:
        share += service.notice_credit_ppm
        reasons.append(f"taken away with {seen.notice_s:.0f} s of notice, {service.notice_s_min:.0f} s are promised")  # fmt: skip
    return rounded_micro(charge_micro, min(share, service.cap_ppm), PPM), tuple(reasons)


@dataclass(frozen=True, slots=True)
class Imbalance:
    """For the devices that a provider sold for one slot hour and did not deliver."""

    refund_micro: int  # the buyers get back what they paid
    extra_micro: int  # the provider pays what other capacity costs more
    penalty_micro: int  # and this on top, to the reserve

    @property
    def provider_pays_micro(self) -> int:
        return self.extra_micro + self.penalty_micro


def imbalance_of(short: int, clearing_micro: int, other_micro: int, penalty_ppm: int) -> Imbalance:
    """The imbalance price is the dearer of the clearing price and what other capacity cost in that slot, and a penalty on it."""
    price = max(clearing_micro, other_micro)
    return Imbalance(
        short * clearing_micro, short * (price - clearing_micro), rounded_micro(short * price, penalty_ppm, PPM)
    )  # fmt: skip
