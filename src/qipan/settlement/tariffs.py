"""Tariff sheets and rating.  A sheet has a version, a source, a time and a signature; a price of zero must be declared free.
Clauses T-1 to T-4 of docs/rules/grid.md."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from qipan.errors import InvalidInput
from qipan.ledger.receipt import DEVICE_HOUR_US, rounded_micro
from qipan.ledger.transfer import check_currency, shown
from qipan.settlement.meters import Counters

PRICE_MICRO_MAX = 10**13
AGE_S_MAX = 400 * 86400.0
#: meter -> (the counter it reads, units of it in one priced unit, the priced unit's name)
METERS = {
    "device-hour": ("device_us", DEVICE_HOUR_US, "device-hour"),
    "memory": ("memory_byte_s", 2**30 * 3600, "GiB-hour"),
    "storage": ("stored_byte_s", 2**30 * 86400 * 30, "GiB-month"),
    "transfer": ("moved_bytes", 2**30, "GiB"),
    "energy": ("millijoules", 3_600_000_000, "kWh"),
}


@dataclass(frozen=True, slots=True)
class Price:
    """`price_micro` for one priced unit of the meter (see METERS) at a site; `chip_class` for device-hours only."""

    meter: str
    site: str
    price_micro: int
    chip_class: str = ""
    free: bool = False


@dataclass(frozen=True, slots=True)
class TariffSheet:
    version: str
    source: str
    issued_s: float
    valid_from_s: float
    valid_until_s: float
    prices: tuple[Price, ...]
    currency: str = "CNY"
    signature: str = ""

    def body(self) -> bytes:
        return msgspec.json.encode(replace(self, signature=""))


@dataclass(frozen=True, slots=True)
class Rated:
    """One meter of one delivery at its price."""

    meter: str
    quantity: int
    price_micro: int
    per: int
    cost_micro: int


def sign_sheet(sheet: TariffSheet, sign: Callable[[bytes], str]) -> TariffSheet:
    return replace(sheet, signature=sign(sheet.body()))


def check_sheet(sheet: TariffSheet, verify: Callable[[bytes, str], bool], now_s: float) -> None:
    """Raises InvalidInput."""
    name = f"tariff {shown(sheet.version)} of {shown(sheet.source)}"
    if not verify(sheet.body(), sheet.signature):
        raise InvalidInput(f"{name} is not signed by its source, or was changed; ask for it again")
    if not sheet.valid_from_s <= now_s < sheet.valid_until_s or now_s - sheet.issued_s > AGE_S_MAX:
        raise InvalidInput(
            f"{name} holds from {sheet.valid_from_s} to {sheet.valid_until_s}, issued {sheet.issued_s}; it is {now_s};"
            " publish a new version"
        )
    if sheet.issued_s > now_s:
        raise InvalidInput(f"{name} was issued at {sheet.issued_s}, it is {now_s}; set the clock")
    check_currency(sheet.currency)
    seen = set()
    for price in sheet.prices:
        if price.meter not in METERS:
            raise InvalidInput(f"{name}: {shown(price.meter)} is no meter; the meters: {', '.join(METERS)}")
        if not 0 <= price.price_micro <= PRICE_MICRO_MAX:
            raise InvalidInput(f"{name}: {price.meter} at {price.price_micro}; give 0 to {PRICE_MICRO_MAX}")
        if (price.price_micro == 0) != price.free:
            raise InvalidInput(f"{name}: {price.meter} costs {price.price_micro} and free is {price.free}; a price of 0 is declared free")  # fmt: skip
        place = (price.meter, price.site, price.chip_class)
        if place in seen:
            raise InvalidInput(f"{name}: {place} has two prices; keep one")
        seen.add(place)


def rate(counters: Counters, site: str, chip_class: str, sheet: TariffSheet) -> tuple[Rated, ...]:
    """Every counter that is not zero must have a price.  Raises InvalidInput."""
    prices = {(price.meter, price.site, price.chip_class): price for price in sheet.prices}
    rated = []
    for meter, (counter, per, _) in METERS.items():
        quantity = getattr(counters, counter)
        if quantity == 0:
            continue
        price = prices.get((meter, site, chip_class if meter == "device-hour" else ""))
        if price is None:
            if meter == "device-hour":
                raise InvalidInput(f"tariff {shown(sheet.version)} has no price of {shown(chip_class)} at {shown(site)}; add one")  # fmt: skip
            continue  # metered, not sold here
        rated.append(Rated(meter, quantity, price.price_micro, per, rounded_micro(quantity, price.price_micro, per)))  # fmt: skip
    return tuple(rated)
