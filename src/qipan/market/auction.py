"""Auctions of slots.  A product is a chip class (or a standard unit) in a zone, of a quality, for one hour.  An auction has a gate; the
seed that breaks ties is committed to before the gate opens and shown after it closed, so nobody can choose a place in the queue.
Clauses A-1 to A-7 of docs/rules/market.md."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qipan.errors import InvalidInput
from qipan.ledger.requests import Refused
from qipan.ledger.transfer import check_text, shown
from qipan.market.clearing import DEVICES_MAX, LIMIT_MAX, NOTHING, Bid, Clearing, Fill, clear, tie_hash
from qipan.quantities import format_devices

HOUR_S = 3600
DAY_S = 24 * HOUR_S
BUCKET_S = 60
#: gates close so long before the slot, or before the day of the slots begins
HOURLY_LEAD_S = 900
DAY_AHEAD_LEAD_S = 12 * HOUR_S
ORDERS_MAX_PER_TRADER = 1000
QUALITIES = ("firm", "spot")


@dataclass(frozen=True, slots=True)
class Product:
    """`hour`: hours since 1970-01-01 UTC; the slot is that hour.  `quality`: "firm" (not delivered is paid for) or "spot" (taken away
    after `notice_s`)."""

    chip_class: str
    zone: str
    quality: str
    hour: int
    notice_s: int = 0

    @property
    def product_id(self) -> str:
        return f"{self.chip_class}@{self.zone}/{self.quality}/{self.hour}"

    @property
    def start_s(self) -> int:
        return self.hour * HOUR_S


def read_product(text: str) -> Product:
    """The product of an id such as `sim/fast@east/firm/480000`.  Raises InvalidInput."""
    chip_class, _, rest = text.partition("@")
    parts = rest.split("/")
    hour = parts[-1] if parts[-1].isascii() and parts[-1].isdigit() else ""
    if not chip_class or len(parts) != 3 or parts[1] not in QUALITIES or hour != str(int(hour[:9] or 0)):
        raise InvalidInput(f"{shown(text)} is no product; write CHIP@ZONE/firm/HOUR, the hour counted from 1970 in UTC")  # fmt: skip
    return Product(chip_class, parts[0], parts[1], int(hour))


@dataclass(frozen=True, slots=True)
class Order:
    """`escrow`: the hold (a buyer's money) or the permit (a seller's devices) that stands behind it."""

    bid: Bid
    trader: str
    escrow: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Auction:
    """`commitment` is `commit(seed)`.  `tariff_micro_cny`: the posted price that a book falls back to, 0 for none."""

    product: str
    opens_s: float
    gate_s: float
    commitment: str
    tariff_micro_cny: int = 0
    orders: tuple[Order, ...] = ()


def commit(seed: str) -> str:
    return hashlib.blake2b(f"qipan auction seed {seed}".encode(), digest_size=32).hexdigest()


def day_ahead_gate_s(start_s: int) -> int:
    """Noon (UTC+8, the exchange's clock) of the day before the slot's day."""
    offset_s = 8 * HOUR_S
    day_s = (start_s + offset_s) // DAY_S * DAY_S - offset_s
    return day_s - DAY_AHEAD_LEAD_S


def hourly_gate_s(start_s: int) -> int:
    return start_s - HOURLY_LEAD_S


def enter(auction: Auction, order: Order, now_s: float) -> Auction | Refused:
    """The auction with the order in it.  Its time bucket is set here, from the board's clock."""
    bid = order.bid
    try:
        check_text(bid.order_id)
        check_text(order.trader)
    except InvalidInput as error:
        return Refused(str(bid.order_id)[:200], "A-2", str(error))
    if not auction.opens_s <= now_s < auction.gate_s:
        return Refused(
            bid.order_id, "A-1", f"the gate of {auction.product} is open from {auction.opens_s} to {auction.gate_s}; it is {now_s}"
        )  # fmt: skip
    if bid.side not in ("buy", "sell"):
        return Refused(bid.order_id, "A-2", f"side is {shown(bid.side)}; give buy or sell")
    if not (1 <= bid.devices <= DEVICES_MAX and 0 <= bid.limit_micro_cny < LIMIT_MAX):
        return Refused(bid.order_id, "A-2", f"{format_devices(bid.devices)} at {bid.limit_micro_cny}; give 1 to {DEVICES_MAX}, 0 to {LIMIT_MAX - 1}")  # fmt: skip
    if any(other.bid.order_id == bid.order_id for other in auction.orders):
        return Refused(bid.order_id, "A-3", f"order {shown(bid.order_id)} is in the book; use a new id")
    if any(other.escrow == order.escrow for other in auction.orders):
        return Refused(bid.order_id, "A-4", f"{shown(order.escrow)} stands behind another order; it can be used once")  # fmt: skip
    mine = sum(other.trader == order.trader for other in auction.orders)
    if mine >= ORDERS_MAX_PER_TRADER:
        return Refused(bid.order_id, "A-2", f"{shown(order.trader)} has {mine} orders in the book, {ORDERS_MAX_PER_TRADER} at most")  # fmt: skip
    if bid.side == "buy" and any(
        other.trader == order.trader
        and other.bid.side == "sell"
        and other.bid.limit_micro_cny <= bid.limit_micro_cny
        for other in auction.orders
    ):
        return Refused(bid.order_id, "A-5", f"{shown(order.trader)} would buy from itself; withdraw the sell order first")  # fmt: skip
    bucket = int((now_s - auction.opens_s) // BUCKET_S)
    kept = replace(order, bid=replace(bid, bucket=bucket), at_s=now_s)
    return replace(auction, orders=(*auction.orders, kept))


def close(auction: Auction, seed: str, now_s: float) -> Clearing:
    """Clear once the gate is closed.  Raises InvalidInput when the seed is not the one committed to, or the gate is open."""
    if now_s < auction.gate_s:
        raise InvalidInput(f"the gate of {auction.product} closes at {auction.gate_s}; it is {now_s}")
    if commit(seed) != auction.commitment:
        raise InvalidInput(f"the seed is not the one that {auction.product} committed to; show that one")
    return clear_or_tariff([order.bid for order in auction.orders], seed, auction.tariff_micro_cny)


def clear_or_tariff(book: Sequence[Bid], seed: str, tariff_micro_cny: int) -> Clearing:
    """The call auction; a book that it cannot clear trades at the posted tariff, for those whose limits allow it."""
    clearing = clear(book, seed)
    if clearing.devices or tariff_micro_cny <= 0:
        return clearing
    buyers = [bid for bid in book if bid.side == "buy" and bid.limit_micro_cny >= tariff_micro_cny]
    sellers = [bid for bid in book if bid.side == "sell" and bid.limit_micro_cny <= tariff_micro_cny]
    buyers.sort(key=lambda bid: (-bid.limit_micro_cny, bid.bucket, tie_hash(bid.order_id, seed), bid.order_id))  # fmt: skip
    sellers.sort(key=lambda bid: (bid.limit_micro_cny, bid.bucket, tie_hash(bid.order_id, seed), bid.order_id))  # fmt: skip
    traded = min(sum(bid.devices for bid in side) for side in (buyers, sellers))
    if traded == 0:
        return NOTHING
    fills = []
    for side in (buyers, sellers):
        left = traded
        for bid in side:
            if left:
                fills.append(Fill(bid.order_id, some := min(left, bid.devices)))
                left -= some
    return Clearing("tariff", tariff_micro_cny, tariff_micro_cny, traded, tuple(fills))
