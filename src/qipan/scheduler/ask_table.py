"""The ask curves of children as arrays: what any number of devices costs at each of their sites, at once.

One table per chip class, a row per offer.  A row's price is that of the devices after those already ordered there, from the
cheapest step on; it only rises while orders are given, until the child offers anew.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from qipan.leases import EngineId, Offer, Order
from qipan.scheduler.asks import nearness, price_of

Floats = Any  # a one-dimensional array of float64
Ints = Any  # a one-dimensional array of int64


@dataclass(slots=True)
class ChipAsks:
    """Rows are in the order of (engine, offer).  `steps_devices` and `steps_price` are cumulative before each step,
    [rows, steps]; `each` is the price of one device in the step."""

    engines: list[EngineId]
    offers: list[Offer]
    sent: Ints
    total: Ints  # devices in all steps
    largest: Ints
    devices: Ints
    tariff: Ints
    steps_devices: Floats
    steps_price: Floats
    each: Floats
    _prices: dict[int, Floats] = field(default_factory=dict)
    _stale: dict[int, set[int]] = field(default_factory=dict)
    _least: dict[int, float] = field(default_factory=dict)
    blocks: bool = False  # some offer tells of blocks
    _masks: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    shares: dict[str, Floats] = field(
        default_factory=dict
    )  # board -> what a task that entered there counts each row for, kept by `children`

    def prices(self, devices: int) -> Floats:
        """Micro-CNY per hour for so many devices, per row; infinite where they cannot be had."""
        known = self._prices.get(devices)
        if known is None:
            low = self._spent(self.sent)
            known = self._spent(self.sent + devices) - low
            short = (self.sent + devices > self.total) | (self.largest < devices) | (self.devices < devices)
            known[short] = np.inf
            self._prices[devices], self._stale[devices] = known, set()
            return known
        stale = self._stale[devices]
        if stale:
            self._least.pop(devices, None)
        for row in stale:
            known[row] = self.price(row, devices)
        stale.clear()
        return known

    def least(self, devices: int) -> float:
        """The least of `prices`."""
        prices = self.prices(devices)
        known = self._least.get(devices)
        if known is None:
            known = self._least[devices] = float(prices.min()) if len(prices) else float("inf")
        return known

    def price(self, row: int, devices: int) -> float:
        offer = self.offers[row]
        if devices > offer.largest_gang or devices > offer.devices:
            return float("inf")
        price = price_of(offer, devices, int(self.sent[row]))
        return float("inf") if price is None else price

    def nearness(self, devices: int) -> Floats | None:
        """What a gang's worth is multiplied with, per row; None where no offer tells of blocks."""
        if not self.blocks:
            return None
        return np.array([self.nearness_of(row, devices) for row in range(len(self.offers))])

    def nearness_of(self, row: int, devices: int) -> float:
        return nearness(self.offers[row], devices, int(self.sent[row]))

    def take(self, row: int, devices: int) -> None:
        self.sent[row] += devices
        for stale in self._stale.values():
            stale.add(row)

    def allowed(self, regions: tuple[str, ...], refused: tuple[EngineId, ...]) -> Any:
        """Which rows the owner's limits leave; None for all."""
        if not regions and not refused:
            return None
        mask = self._masks.get((regions, refused))
        if mask is None:
            mask = np.array(
                [
                    engine not in refused and in_regions(regions, offer)
                    for engine, offer in zip(self.engines, self.offers, strict=True)
                ],
                dtype=bool,
            )
            self._masks[regions, refused] = mask
        return mask

    def _spent(self, upto: Ints) -> Floats:
        """What the first `upto` devices of each row cost together."""
        rows = np.arange(len(self.offers))
        step = (self.steps_devices <= upto[:, None]).sum(axis=1) - 1
        before = self.steps_devices[rows, step]
        return self.steps_price[rows, step] + (upto - before) * self.each[rows, step]


def in_regions(regions: tuple[str, ...], offer: Offer) -> bool:
    return not regions or any(
        fnmatchcase(offer.region, pattern) or fnmatchcase(offer.site, pattern) for pattern in regions
    )


def allows(order: Order, offer: Offer) -> bool:
    """Whether the owner's limits leave it."""
    vendor = offer.chip_class.split("/")[0]
    return in_regions(order.regions, offer) and (not order.vendors or vendor in order.vendors)


def ask_tables(
    offers: Iterable[tuple[EngineId, tuple[Offer, ...]]], sent_down: Mapping[str, int]
) -> dict[str, ChipAsks]:
    """Chip class -> its table.  `sent_down`: "engine|chip class|site" -> devices ordered since the engine's last offer."""
    rows: dict[str, list[tuple[EngineId, Offer]]] = {}
    for engine, given in offers:
        for offer in given:
            rows.setdefault(offer.chip_class, []).append((engine, offer))
    return {chip: _table(chip, found, sent_down) for chip, found in sorted(rows.items())}


def _table(chip: str, rows: list[tuple[EngineId, Offer]], sent_down: Mapping[str, int]) -> ChipAsks:
    width = max(1, max(len(offer.asks) for _, offer in rows))
    count = np.zeros((len(rows), width))
    each = np.zeros((len(rows), width))
    for row, (_, offer) in enumerate(rows):
        for step, ask in enumerate(offer.asks):
            count[row, step] = ask.devices
            each[row, step] = ask.price_micro_cny_per_device_hour
    before_devices, before_price = np.zeros_like(count), np.zeros_like(each)
    np.cumsum(count[:, :-1], axis=1, out=before_devices[:, 1:])
    np.cumsum((count * each)[:, :-1], axis=1, out=before_price[:, 1:])
    return ChipAsks(
        [engine for engine, _ in rows],
        [offer for _, offer in rows],
        np.array(
            [sent_down.get(f"{engine}|{chip}|{offer.site}", 0) if sent_down else 0 for engine, offer in rows],
            dtype=np.int64,
        ),
        count.sum(axis=1).astype(np.int64),
        np.array([offer.largest_gang for _, offer in rows], dtype=np.int64),
        np.array([offer.devices for _, offer in rows], dtype=np.int64),
        np.array([offer.tariff_micro_cny_per_device_hour for _, offer in rows], dtype=np.int64),
        before_devices,
        before_price,
        each,
        blocks=any(offer.blocks for _, offer in rows),
    )
