"""Reservations: strips of slots, bought ahead, which may be cut and sold on.  What is sold on is cut off first, so that nothing is
sold twice.  Clauses R-1 to R-3 of docs/rules/market.md."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qipan.errors import InvalidInput
from qipan.ledger.receipt import PPM, rounded_micro
from qipan.ledger.transfer import Entry, Transfer, shown
from qipan.quantities import format_devices


@dataclass(frozen=True, slots=True)
class Strip:
    """`devices` of a chip class in a zone for the hours `first_hour` to `first_hour + hours` - 1, owed by `provider` to `holder`."""

    strip_id: str
    holder: str
    provider: str
    chip_class: str
    zone: str
    first_hour: int
    hours: int
    devices: int

    @property
    def device_hours(self) -> int:
        return self.hours * self.devices

    @property
    def end_hour(self) -> int:
        return self.first_hour + self.hours


def cut_hours(strip: Strip, hour: int) -> tuple[Strip, Strip]:
    """Before `hour`, and from it on.  Raises InvalidInput."""
    if not strip.first_hour < hour < strip.end_hour:
        raise InvalidInput(f"strip {shown(strip.strip_id)} runs from hour {strip.first_hour} to {strip.end_hour}; cut it between")  # fmt: skip
    return (
        replace(strip, strip_id=f"{strip.strip_id}.a", hours=hour - strip.first_hour),
        replace(strip, strip_id=f"{strip.strip_id}.b", first_hour=hour, hours=strip.end_hour - hour),
    )


def cut_devices(strip: Strip, devices: int) -> tuple[Strip, Strip]:
    """`devices` of it, and the others.  Raises InvalidInput."""
    if not 0 < devices < strip.devices:
        raise InvalidInput(f"strip {shown(strip.strip_id)} has {format_devices(strip.devices)}; cut off 1 to {strip.devices - 1}")  # fmt: skip
    return (
        replace(strip, strip_id=f"{strip.strip_id}.a", devices=devices),
        replace(strip, strip_id=f"{strip.strip_id}.b", devices=strip.devices - devices),
    )


def resell(
    strip: Strip, seller: str, buyer: str, price_micro: int, fee_ppm: int, hour: int
) -> tuple[Strip, Transfer]:
    """The buyer's strip, and what it pays: `price_micro` for the whole.  Only its holder sells it, before it begins.
    Raises InvalidInput."""
    if strip.holder != seller or buyer == seller:
        raise InvalidInput(f"strip {shown(strip.strip_id)} is {shown(strip.holder)}'s; {shown(seller)} cannot sell it to {shown(buyer)}")  # fmt: skip
    if hour >= strip.first_hour:
        raise InvalidInput(f"strip {shown(strip.strip_id)} begins in hour {strip.first_hour}, it is hour {hour}; cut off what is to come")  # fmt: skip
    if price_micro <= 0:
        raise InvalidInput(f"strip {shown(strip.strip_id)} for {price_micro}; give a price above 0")
    fee = rounded_micro(price_micro, fee_ppm, PPM)
    new_id = f"{strip.strip_id}>{buyer}"
    entries = (Entry(f"tenant/{buyer}", -price_micro), Entry(f"tenant/{seller}", price_micro - fee), Entry("platform/fee", fee))  # fmt: skip
    transfer = Transfer(f"resell/{strip.strip_id}", new_id, tuple(entry for entry in entries if entry.amount_micro))  # fmt: skip
    return replace(strip, strip_id=new_id, holder=buyer), transfer


def owed(strips: Iterable[Strip], provider: str, chip_class: str, hour: int) -> int:
    """Devices that a provider owes in an hour."""
    return sum(
        strip.devices
        for strip in strips
        if strip.provider == provider
        and strip.chip_class == chip_class
        and strip.first_hour <= hour < strip.end_hour
    )


def check_not_oversold(strips: Iterable[Strip], devices: int, provider: str, chip_class: str) -> None:
    """Raises InvalidInput naming the first hour in which the provider owes more devices than it has."""
    mine = [strip for strip in strips if (strip.provider, strip.chip_class) == (provider, chip_class)]
    for hour in sorted({strip.first_hour for strip in mine}):
        if (sold := owed(mine, provider, chip_class, hour)) > devices:
            raise InvalidInput(f"{shown(provider)} would owe {sold} of {shown(chip_class)} in hour {hour} and has {devices}; sell fewer")  # fmt: skip
