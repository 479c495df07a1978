"""A sealed uniform-price call auction for one product and one slot.

Orders are sorted and crossed; all that trade pay one price, the middle between the marginal orders (a k = 1/2 double auction,
Satterthwaite and Williams 1989).  Ties go by time bucket, then by a hash of the order id with a seed that was committed before the gate
closed, so nobody can choose a place in the queue.  A thin book falls back to McAfee's trade reduction (1992), in which nobody gains by
shading, or to the posted tariff when it does not cross.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from qipan.errors import InvalidInput

#: orders on one side below which the book is thin
THIN = 3
LIMIT_MAX = 2**53
DEVICES_MAX = 10**9
Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bid:
    """`devices` for one slot hour, at most (buy) or at least (sell) `limit_micro_cny` a device-hour.  Divisible.
    `bucket` is the time bucket it came in."""

    order_id: str
    side: Literal["buy", "sell"]
    devices: int
    limit_micro_cny: int
    bucket: int = 0


class Fill(msgspec.Struct, frozen=True, gc=False):
    """A dataclass would do, at four times the cost of making a million of them."""

    order_id: str
    devices: int


@dataclass(frozen=True, slots=True)
class Clearing:
    """`method`: "uniform", "trade reduction" (a thin book: the buyers' and the sellers' prices may differ, the rest is the
    market's), or "none".  Fills stand in the order of service, buyers first; devices bought equal devices sold."""

    method: str
    buy_price_micro_cny: int
    sell_price_micro_cny: int
    devices: int
    fills: tuple[Fill, ...]

    @property
    def surplus_micro_cny(self) -> int:
        """What the market keeps."""
        return self.devices * (self.buy_price_micro_cny - self.sell_price_micro_cny)


NOTHING = Clearing("none", 0, 0, 0, ())


def tie_hash(order_id: str, seed: str) -> int:
    """The place among equals: 62 bits of BLAKE2b over seed and order id."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{order_id}".encode(), digest_size=8).digest(), "big") >> 2


def clear(book: Sequence[Bid], seed: str) -> Clearing:
    """Clear one product's slot.  Raises InvalidInput for orders that mean nothing."""
    columns = _columns(book)
    buying = columns.buying
    buys = _side(columns, np.flatnonzero(buying), -columns.limits, seed)
    sells = _side(columns, np.flatnonzero(~buying), columns.limits, seed)
    if not len(buys.devices) or not len(sells.devices):
        return NOTHING
    traded = _crossing(buys, sells)
    if traded == 0:
        return NOTHING
    if min(len(buys.devices), len(sells.devices)) < THIN:
        return _reduced(buys, sells, traded)
    low = max(sells.limit_at(traded), buys.limit_after(traded, 0))
    high = min(buys.limit_at(traded), sells.limit_after(traded, LIMIT_MAX))
    price = (low + high) // 2
    return Clearing("uniform", price, price, traded, _fills(buys, sells, traded))


@dataclass(frozen=True, slots=True)
class _Columns:
    """The book as arrays: Python objects are walked once."""

    order_ids: list[str]
    buying: npt.NDArray[np.bool_]
    limits: Array
    devices: Array
    buckets: Array


def _columns(book: Sequence[Bid]) -> _Columns:
    """Raises InvalidInput naming the first order that means nothing."""
    count = len(book)
    order_ids = [bid.order_id for bid in book]
    sides = [bid.side for bid in book]
    try:
        limits, devices, buckets = (
            np.fromiter(map(attrgetter(name), book), np.int64, count)
            for name in ("limit_micro_cny", "devices", "bucket")
        )
    except OverflowError:
        raise InvalidInput("an order has a number beyond 64 bits; give limits and devices in range") from None
    buying = np.fromiter(map("buy".__eq__, sides), np.bool_, count)
    if int(buying.sum()) + sides.count("sell") != count:
        wrong = next(bid for bid in book if bid.side not in ("buy", "sell"))
        raise InvalidInput(f"order {wrong.order_id}: side is {wrong.side!r}; give buy or sell")
    for name, values, least, most in (
        ("devices", devices, 1, DEVICES_MAX),
        ("limit", limits, 0, LIMIT_MAX - 1),
    ):
        bad = np.flatnonzero((values < least) | (values > most))
        if len(bad):
            raise InvalidInput(
                f"order {order_ids[bad[0]]}: {name} is {values[bad[0]]}; give {least} to {most}"
            )
    if len(set(order_ids)) != count:
        twice = next(name for name, times in Counter(order_ids).items() if times > 1)
        raise InvalidInput(f"order {twice} stands twice; an order is in a book once")
    return _Columns(order_ids, buying, limits, devices, buckets)


@dataclass(frozen=True, slots=True)
class _Side:
    """One side in the order it is served: `order` are places in the book, `upto` running sums of devices."""

    order_ids: list[str]
    order: Array
    limits: Array
    devices: Array
    upto: Array

    def limit_at(self, unit: int) -> int:
        """The limit of the order that holds the unit-th device (from 1)."""
        return int(self.limits[np.searchsorted(self.upto, unit, side="left")])

    def limit_after(self, unit: int, none: int) -> int:
        """The limit of the next device after `unit`; `none` when there is none."""
        return self.limit_at(unit + 1) if unit < int(self.upto[-1]) else none


def _side(columns: _Columns, mine: Array, rank: Array, seed: str) -> _Side:
    """Best limit first.  The tie hash is only computed among equals of limit and bucket."""
    order = mine[np.lexsort((columns.buckets[mine], rank[mine]))]
    order = _break_ties(order, rank, columns, seed)
    devices = columns.devices[order]
    return _Side(columns.order_ids, order, columns.limits[order], devices, np.cumsum(devices))


def _break_ties(order: Array, rank: Array, columns: _Columns, seed: str) -> Array:
    if len(order) < 2:
        return order
    same = (np.diff(rank[order]) == 0) & (np.diff(columns.buckets[order]) == 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], same.astype(np.int8), [0]))))
    for first, last in zip(edges[::2], edges[1::2] + 1, strict=True):
        order[first:last] = sorted(
            order[first:last], key=lambda i: (tie_hash(columns.order_ids[i], seed), columns.order_ids[i])
        )
    return order


def _crossing(buys: _Side, sells: _Side) -> int:
    """The most devices that trade: the largest q at which the q-th buy limit is not below the q-th sell limit."""
    units = np.unique(np.concatenate((buys.upto, sells.upto)))
    units = units[units <= min(buys.upto[-1], sells.upto[-1])]
    good = (
        buys.limits[np.searchsorted(buys.upto, units, side="left")]
        >= sells.limits[np.searchsorted(sells.upto, units, side="left")]
    )
    return int(units[np.count_nonzero(good) - 1]) if good.any() else 0


def _reduced(buys: _Side, sells: _Side, traded: int) -> Clearing:
    """Leave the marginal order of each side out; the others trade at its limit.  One order a side: no trade."""
    buyer = int(np.searchsorted(buys.upto, traded, side="left"))
    seller = int(np.searchsorted(sells.upto, traded, side="left"))
    left = min(int(buys.upto[buyer - 1]) if buyer else 0, int(sells.upto[seller - 1]) if seller else 0)
    if left == 0:
        return NOTHING
    return Clearing(
        "trade reduction", int(buys.limits[buyer]), int(sells.limits[seller]), left, _fills(buys, sells, left)
    )


def _fills(buys: _Side, sells: _Side, traded: int) -> tuple[Fill, ...]:
    fills: list[Fill] = []
    for side in (buys, sells):
        count = int(np.searchsorted(side.upto, traded, side="left")) + 1
        given = np.minimum(side.devices[:count], traded - (side.upto[:count] - side.devices[:count]))
        names = [side.order_ids[i] for i in side.order[:count].tolist()]
        fills += map(Fill, names, given.tolist())
    return tuple(fills)
