"""A settlement run: what was delivered and sold in a period becomes rows, each one transfer.  Pure: the same inputs give the same
rows.  The provisional run posts its rows; the final run, with what came in since, posts the differences only.
Clauses S-1 to S-8 of docs/rules/grid.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qipan.ledger.transfer import Entry, Transfer
from qipan.quantities import format_devices
from qipan.settlement.contracts import Terms, split
from qipan.settlement.meters import Counters
from qipan.settlement.service import Evidence, Service, credit_of, imbalance_of
from qipan.settlement.tariffs import TariffSheet, rate


@dataclass(frozen=True, slots=True)
class Delivery:
    """One lease's share of the period.  `measured` is the board's own count, `claimed_device_us` what the provider asks to be
    paid for: the smaller is charged.  `owner`: whose ledger the provider is in, empty for this one.  `sold_micro`: what the tenant paid
    for the same delivery in the market; credits are a share of that, too."""

    lease: str
    task: str
    tenant: str
    provider: str
    region: str
    site: str
    chip_class: str
    agreed_start_s: float
    measured: Counters
    claimed_device_us: int
    provider_saw: Evidence | None = None
    tenant_saw: Evidence | None = None
    owner: str = ""
    sold_micro: int = 0


@dataclass(frozen=True, slots=True)
class Sale:
    """What a provider sold in one slot's auction: `fills` are (tenant, devices) that it was to serve; the money lies in
    `escrow/SLOT`.  `other_micro`: what other capacity cost in that slot."""

    slot: str
    provider: str
    region: str
    price_micro: int
    fills: tuple[tuple[str, int], ...]
    delivered: int
    other_micro: int


@dataclass(frozen=True, slots=True)
class Ruling:
    """How a dispute about a delivery ended: the tenant's share of what lies in escrow."""

    lease: str
    tenant_ppm: int


@dataclass(frozen=True, slots=True)
class Period:
    """Everything a run reads.  It is stored with the run, so that a run begun again reads the same."""

    name: str
    deliveries: tuple[Delivery, ...]
    sales: tuple[Sale, ...]
    sheet: TariffSheet
    terms: Terms
    service: Service
    penalty_ppm: int = 200_000
    rulings: tuple[Ruling, ...] = ()


RowKind = Literal["charge", "credit", "dispute", "ruling", "slot", "imbalance"]


@dataclass(frozen=True, slots=True)
class Row:
    """`about`: the lease or the sale.  `tenant`, `provider`, `region` are what statements select by."""

    kind: RowKind
    about: str
    tenant: str
    provider: str
    region: str
    text: str
    entries: tuple[Entry, ...]

    @property
    def place(self) -> str:
        return f"{self.about}/{self.kind}"

    def transfer(self, run_id: str) -> Transfer:
        return Transfer(f"{run_id}/{self.place}", self.about, self.entries)


def settle(period: Period) -> tuple[Row, ...]:
    """In order of lease, then of sale.  Raises InvalidInput when something delivered has no price."""
    rulings = {ruling.lease: ruling for ruling in period.rulings}
    rows: list[Row] = []
    for delivery in sorted(period.deliveries, key=lambda delivery: delivery.lease):
        rows += _of_delivery(delivery, period, rulings.get(delivery.lease))
    for sale in sorted(period.sales, key=lambda sale: (sale.slot, sale.provider)):
        rows += _of_sale(sale, period)
    return tuple(rows)


def differences(provisional: Sequence[Row], final: Sequence[Row]) -> tuple[Row, ...]:
    """What the final run has to post so that both together are the final rows."""
    before = {row.place: row for row in provisional}
    after = {row.place: row for row in final}
    rows = []
    for place in sorted(before.keys() | after.keys()):
        old, new = before.get(place), after.get(place)
        shown_by = new or old
        assert shown_by is not None
        change: dict[tuple[str, str], int] = {}
        for row, sign in ((old, -1), (new, 1)):
            for entry in row.entries if row else ():
                account = (entry.account, entry.currency)
                change[account] = change.get(account, 0) + sign * entry.amount_micro
        entries = tuple(Entry(account, amount, currency) for (account, currency), amount in sorted(change.items()) if amount)  # fmt: skip
        if entries:
            rows.append(
                Row(
                    shown_by.kind, shown_by.about, shown_by.tenant, shown_by.provider, shown_by.region,
                    f"correction: {shown_by.text if new else 'withdrawn'}", entries,
                )
            )  # fmt: skip
    return tuple(rows)


def _of_delivery(delivery: Delivery, period: Period, ruling: Ruling | None) -> list[Row]:
    currency, tenant = period.sheet.currency, f"tenant/{delivery.tenant}"
    provider = f"mirror/{delivery.owner}" if delivery.owner else f"provider/{delivery.provider}"
    measured = delivery.measured
    counted = Counters(
        min(measured.device_us, delivery.claimed_device_us), measured.memory_byte_s, measured.stored_byte_s,
        measured.moved_bytes, measured.millijoules,
    )  # fmt: skip
    rated = rate(counted, delivery.site, delivery.chip_class, period.sheet)
    cost = sum(line.cost_micro for line in rated)
    net = period.terms.net_micro(delivery.tenant, cost)
    fee = period.terms.fee_micro(net)

    def row(kind: RowKind, text: str, *entries: tuple[str, int]) -> Row:
        kept = tuple(Entry(account, amount, currency) for account, amount in entries if amount)
        return Row(kind, delivery.lease, delivery.tenant, delivery.provider, delivery.region, text, kept)

    rows = []
    text = f"{delivery.task}: {counted.device_us / 3.6e9:.6f} device-hours of {delivery.chip_class} at tariff {period.sheet.version}"
    if delivery.claimed_device_us > measured.device_us:
        text += f" ({delivery.claimed_device_us / 3.6e9:.6f} were claimed)"
    if net:
        rows.append(row("charge", text, (tenant, -net), (provider, net - fee), ("platform/fee", fee)))
    credit = credit_of(
        period.service,
        delivery.agreed_start_s,
        net + delivery.sold_micro,
        delivery.provider_saw,
        delivery.tenant_saw,
    )
    why = "; ".join(credit.reasons)
    if credit.certain_micro:
        rows.append(
            row("credit", f"credit: {why}", (provider, -credit.certain_micro), (tenant, credit.certain_micro))
        )
    if credit.disputed_micro:
        escrow = f"escrow/dispute/{delivery.lease}"
        rows.append(
            row(
                "dispute",
                f"in dispute: {why}",
                (provider, -credit.disputed_micro),
                (escrow, credit.disputed_micro),
            )
        )
        if ruling is not None:
            to_tenant, back = split(credit.disputed_micro, [ruling.tenant_ppm, 1_000_000 - ruling.tenant_ppm])
            rows.append(row("ruling", f"ruled: {ruling.tenant_ppm / 1e4:g} % to the tenant",
                            (escrow, -credit.disputed_micro), (tenant, to_tenant), (provider, back)))  # fmt: skip
    return rows


def _of_sale(sale: Sale, period: Period) -> list[Row]:
    """The provider gets the price of what it delivered; for the rest the buyers get their money back, and from the provider what
    other capacity costs more."""
    currency, about = period.sheet.currency, f"{sale.slot}/{sale.provider}"
    provider, escrow = f"provider/{sale.provider}", f"escrow/{sale.slot}"
    sold = sum(devices for _, devices in sale.fills)
    delivered = min(sale.delivered, sold)
    paid, short = delivered * sale.price_micro, sold - delivered
    fee = period.terms.fee_micro(paid)
    rows = []

    def row(kind: RowKind, text: str, entries: Sequence[tuple[str, int]]) -> Row:
        kept = tuple(Entry(account, amount, currency) for account, amount in entries if amount)
        return Row(kind, about, "", sale.provider, sale.region, text, kept)

    if paid:
        rows.append(
            row(
                "slot",
                f"{delivered} of {format_devices(sold)} sold for {sale.slot} delivered",
                [(escrow, -paid), (provider, paid - fee), ("platform/fee", fee)],
            )
        )
    if short and sale.price_micro:
        due = imbalance_of(short, sale.price_micro, sale.other_micro, period.penalty_ppm)
        to_buyers = split(due.refund_micro + due.extra_micro, [devices for _, devices in sale.fills])
        entries = [
            (escrow, -due.refund_micro),
            (provider, -due.provider_pays_micro),
            ("reserve/imbalance", due.penalty_micro),
        ]
        entries += [
            (f"tenant/{tenant}", part) for (tenant, _), part in zip(sale.fills, to_buyers, strict=True)
        ]
        rows.append(row("imbalance", f"{short} of {format_devices(sold)} sold for {sale.slot} not delivered", entries))  # fmt: skip
    return rows
