"""A board's exchange: auctions and their orders in the ledger's database.  An auction opens with the first order for its product,
commits to a seed, is cleared once its gate is closed and settled once its slot is over.  Every step may be interrupted
anywhere and done again: its keys are those of the product and the orders.  Clauses A-1 to A-12 of docs/rules/market.md."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from qipan.errors import InvalidInput, NotFound, OverLimit, QipanError
from qipan.journal import Journal
from qipan.journal.settling import begun, run
from qipan.ledger.requests import CaptureHold, HoldState, PlaceHold, Post, Refused, Request, VoidHold
from qipan.ledger.transfer import move, shown
from qipan.market.auction import (
    HOUR_S,
    QUALITIES,
    Auction,
    Order,
    Product,
    close,
    commit,
    enter,
    hourly_gate_s,
    read_product,
)
from qipan.market.book_file import Book
from qipan.market.clearing import NOTHING, Bid, Clearing
from qipan.settlement.contracts import Terms
from qipan.settlement.service import Service
from qipan.settlement.settle import Period, Sale
from qipan.settlement.tariffs import TariffSheet

log = logging.getLogger("qipan.market")
AHEAD_S_MAX = 30 * 86400
AGAIN_S = 60.0  # after something went wrong with a product


@dataclass(frozen=True, slots=True)
class Stock:
    """What a provider can sell: devices of a chip class in a zone, and the tariff it posts for them."""

    provider: str
    zone: str
    chip_class: str
    devices: int
    tariff_micro_cny: int


@dataclass(frozen=True, slots=True)
class Listed:
    """An auction as everyone may see it.  `state`: open, cleared, settled, void (nobody was there to clear it in time).
    `method`, `devices` and prices are of its clearing."""

    product: str
    state: str
    opens_s: float
    gate_s: float
    commitment: str
    tariff_micro_cny: int
    orders: int
    method: str
    devices: int
    buy_price_micro_cny: int
    sell_price_micro_cny: int


@dataclass(frozen=True, slots=True)
class Placed:
    """An order as its trader sees it; `filled` devices once it is cleared."""

    product: str
    state: str
    order: Order
    filled: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """The body of an auction's row."""

    opens_s: float
    commitment: str
    tariff_micro_cny: int
    clearing: Clearing | None = None


class Exchange:
    """`seed` makes a new secret; `ready(provider, chip class)`: its devices that could be used at this moment."""

    def __init__(
        self, journal: Journal, stock: Sequence[Stock], seed: Callable[[], str], ready: Callable[[str, str], int]
    ) -> None:  # fmt: skip
        self._journal, self._db = journal, journal.db
        self._stock, self._seed, self._ready = tuple(stock), seed, ready

    # ---- orders ----------------------------------------------------------------------------------------------------

    def place(self, product_id: str, bid: Bid, trader: str, now_s: float) -> Placed:
        """A buyer's money is set aside first.  The same order again changes nothing.  Raises InvalidInput, OverLimit."""
        product = read_product(product_id)
        known = self._db.row("SELECT product, body FROM market_orders WHERE order_id = ?", (bid.order_id,))
        if known is not None:
            before = msgspec.json.decode(known[1], type=Order)
            if (known[0], before.trader, replace(before.bid, bucket=0)) != (
                product_id,
                trader,
                replace(bid, bucket=0),
            ):
                raise InvalidInput(f"A-3: order {shown(bid.order_id)} is in the book with another content; use a new id")  # fmt: skip
            _, clearing, _, state = self._read(product_id)
            return Placed(product_id, state, before, _filled(clearing).get(bid.order_id, 0))
        auction, seed = self._auction_for(product, now_s)
        hold_id = f"order/{bid.order_id}"
        escrow = hold_id if bid.side == "buy" else f"permit/{bid.order_id}"
        after = enter(auction, Order(bid, trader, escrow, now_s), now_s)
        if isinstance(after, Refused):
            raise InvalidInput(f"{after.clause}: {after.why}")
        if bid.side == "sell":
            self._check_stock(product, bid.devices, trader)
        elif bid.limit_micro_cny:
            most = bid.devices * bid.limit_micro_cny
            hold = PlaceHold(
                f"{hold_id}/hold", product_id, hold_id, f"tenant/{trader}", most, float(product.start_s)
            )
            (told,) = self._journal.submit([hold], now_s)
            if isinstance(told, Refused):
                raise OverLimit(f"{told.clause}: {told.why}")
        kept = _Kept(auction.opens_s, auction.commitment, auction.tariff_micro_cny)
        with self._db.transaction():
            self._db.run(
                "INSERT INTO auctions (product, gate_s, seed, state, body) VALUES (?,?,?,?,?) ON CONFLICT (product) DO NOTHING",
                (product_id, auction.gate_s, seed, "open", msgspec.json.encode(kept).decode()),
            )
            self._db.run(
                "INSERT INTO market_orders (order_id, product, trader, sequence, body) VALUES (?,?,?,?,?)",
                (
                    bid.order_id,
                    product_id,
                    trader,
                    len(after.orders),
                    msgspec.json.encode(after.orders[-1]).decode(),
                ),
            )
        return Placed(product_id, "open", after.orders[-1], 0)

    def _auction_for(self, product: Product, now_s: float) -> tuple[Auction, str]:
        found = self._db.row("SELECT seed FROM auctions WHERE product = ?", (product.product_id,))
        if found is not None:
            return self._read(product.product_id)[0], str(found[0])
        sold = [
            one for one in self._stock if (one.chip_class, one.zone) == (product.chip_class, product.zone)
        ]
        if not sold:
            known = sorted({f"{one.chip_class}@{one.zone}" for one in self._stock if one.zone})
            raise InvalidInput(
                f"A-11: nobody here sells {shown(product.product_id)}; there are: {', '.join(known)}"
            )
        if product.start_s > now_s + AHEAD_S_MAX:
            raise InvalidInput(
                f"A-1: the slot begins in more than {AHEAD_S_MAX // 86400} days; come back later"
            )
        seed = self._seed()
        tariff = min(one.tariff_micro_cny for one in sold)
        return Auction(product.product_id, now_s, hourly_gate_s(product.start_s), commit(seed), tariff), seed

    def _check_stock(self, product: Product, devices: int, trader: str) -> None:
        """Raises InvalidInput: a provider offers what it has, once, firm or spot."""
        mine = sum(
            one.devices for one in self._stock
            if (one.provider, one.zone, one.chip_class) == (trader, product.zone, product.chip_class)
        )  # fmt: skip
        same = [replace(product, quality=quality).product_id for quality in QUALITIES]
        bodies = self._db.rows(
            f"SELECT body FROM market_orders WHERE trader = ? AND product IN ({','.join('?' * len(same))})",
            (trader, *same),
        )
        before = [msgspec.json.decode(body[0], type=Order).bid for body in bodies]
        offered = devices + sum(bid.devices for bid in before if bid.side == "sell")
        if offered > mine:
            raise InvalidInput(f"A-11: {shown(trader)} would sell {offered} of {shown(product.chip_class)} in {shown(product.zone)} and has {mine}")  # fmt: skip

    # ---- what there is ---------------------------------------------------------------------------------------------

    def auctions(self, limit: int = 200) -> list[Listed]:
        """The latest slots first."""
        counts: dict[str, int] = dict(
            self._db.rows("SELECT product, count(*) FROM market_orders GROUP BY product")
        )
        found = []
        for product, gate_s, state, body in self._db.rows(
            "SELECT product, gate_s, state, body FROM auctions ORDER BY gate_s DESC, product LIMIT ?",
            (limit,),
        ):
            kept = msgspec.json.decode(body, type=_Kept)
            told = kept.clearing or NOTHING
            found.append(
                Listed(
                    product, state, kept.opens_s, gate_s, kept.commitment, kept.tariff_micro_cny, int(counts.get(product, 0)),
                    told.method, told.devices, told.buy_price_micro_cny, told.sell_price_micro_cny,
                )
            )  # fmt: skip
        return found

    def orders(self, trader: str = "", limit: int = 1000) -> list[Placed]:
        """A trader's, or everyone's; the latest slots first."""
        found = list[Placed]()
        for one in self.auctions(limit):
            auction, clearing, _, state = self._read(one.product)
            filled = _filled(clearing)
            found += [
                Placed(one.product, state, order, filled.get(order.bid.order_id, 0))
                for order in auction.orders
                if trader in ("", order.trader)
            ]
        return found[:limit]

    def book(self, product_id: str) -> Book:
        """The published book, with its seed.  Raises NotFound; InvalidInput while it is sealed."""
        auction, clearing, seed, state = self._read(product_id)
        if state == "open":
            raise InvalidInput(
                f"A-6: the book of {shown(product_id)} is sealed until it is cleared, soon after {auction.gate_s:.0f}"
            )
        return Book(seed, tuple(one.bid for one in auction.orders), clearing, product_id, auction.tariff_micro_cny, auction.commitment)  # fmt: skip

    def _read(self, product_id: str) -> tuple[Auction, Clearing | None, str, str]:
        """With its clearing, seed and state.  Raises NotFound."""
        row = self._db.row("SELECT gate_s, seed, state, body FROM auctions WHERE product = ?", (product_id,))
        if row is None:
            raise NotFound(f"no auction of {shown(product_id)}; `qipan market book` lists them")
        kept = msgspec.json.decode(row[3], type=_Kept)
        bodies = self._db.rows(
            "SELECT body FROM market_orders WHERE product = ? ORDER BY sequence", (product_id,)
        )
        orders = tuple(msgspec.json.decode(body[0], type=Order) for body in bodies)
        auction = Auction(
            product_id, kept.opens_s, float(row[0]), kept.commitment, kept.tariff_micro_cny, orders
        )
        return auction, kept.clearing, str(row[1]), str(row[2])

    # ---- time ------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> float | None:
        """Clear and settle what is due; when there is something to do by time alone.  A product that goes wrong does not stop the
        others: it is tried again later."""
        self._journal.expire(now_s)
        times = []
        for product_id, gate_s, state in self._db.rows(
            "SELECT product, gate_s, state FROM auctions WHERE state IN ('open', 'cleared') ORDER BY gate_s, product"
        ):
            try:
                end_s = float(read_product(product_id).start_s + HOUR_S)
                if state == "open" and gate_s <= now_s:
                    state = self._clear(product_id, now_s)
                if state == "cleared" and end_s <= now_s:
                    self._settle(product_id, now_s)
                elif state != "void":
                    times.append(gate_s if state == "open" else end_s)
            except QipanError as error:
                log.warning("%s waits %.0f s: %s", product_id, AGAIN_S, error)
                times.append(now_s + AGAIN_S)
        return min(times, default=None)

    def _clear(self, product_id: str, now_s: float) -> str:
        auction, _, seed, _ = self._read(product_id)
        # the holds have run out, and so has the time to plan for it; what was paid before is cleared to its end
        late = now_s >= read_product(product_id).start_s and not self._was_paid(auction)
        clearing = NOTHING if late else close(auction, seed, now_s)
        state, filled = "void" if late else "cleared", _filled(clearing)
        requests: list[Request] = []
        for order in auction.orders if not late else ():
            bid = order.bid
            if bid.side != "buy" or not bid.limit_micro_cny:
                continue
            if due := filled.get(bid.order_id, 0) * clearing.buy_price_micro_cny:
                requests.append(CaptureHold(f"{order.escrow}/paid", product_id, order.escrow, f"escrow/{product_id}", due, close=True))  # fmt: skip
            else:
                requests.append(VoidHold(f"{order.escrow}/void", product_id, order.escrow))
        if clearing.surplus_micro_cny:
            kept = move(
                f"surplus/{product_id}",
                product_id,
                f"escrow/{product_id}",
                "platform/market",
                clearing.surplus_micro_cny,
            )
            requests.append(Post(kept))
        self._submit(requests, now_s)
        self._mark(auction, state, clearing)
        return state

    def _was_paid(self, auction: Auction) -> bool:
        """Holds are captured and voided by a clearing only, all in one transaction."""
        holds = (self._journal.hold(order.escrow) for order in auction.orders if order.bid.side == "buy")
        return any(hold is not None and hold.state in (HoldState.POSTED, HoldState.VOIDED) for hold in holds)

    def _settle(self, product_id: str, now_s: float) -> None:
        """Each provider is paid for what it had ready when the slot ended; for the rest its buyers are paid back, with the penalty."""
        auction, clearing, _, _ = self._read(product_id)
        if clearing is not None and clearing.devices and clearing.sell_price_micro_cny:
            name = f"slot/{product_id}"
            period = begun(self._journal, name, "provisional")
            if period is None:
                at_s = float(now_s)  # as it is read back
                sheet = TariffSheet("exchange", "market", at_s, at_s, at_s + HOUR_S, ())
                period = Period(name, (), self._sales(auction, clearing), sheet, Terms(), Service())
            run(self._journal, period, "provisional", now_s)
        self._mark(auction, "settled", clearing)

    def _sales(self, auction: Auction, clearing: Clearing) -> tuple[Sale, ...]:
        """Buyers are given to sellers in the order of service."""
        product, filled = read_product(auction.product), _filled(clearing)
        by_id = {one.bid.order_id: one for one in auction.orders}
        in_order = [by_id[fill.order_id] for fill in clearing.fills]
        buyers = [
            one.trader for one in in_order if one.bid.side == "buy" for _ in range(filled[one.bid.order_id])
        ]
        served: dict[str, list[str]] = {}
        for seller in (one for one in in_order if one.bid.side == "sell"):
            devices = filled[seller.bid.order_id]
            served.setdefault(seller.trader, []).extend(buyers[:devices])
            del buyers[:devices]
        return tuple(
            Sale(
                auction.product, provider, product.zone, clearing.sell_price_micro_cny,
                tuple((tenant, tenants.count(tenant)) for tenant in sorted(set(tenants))),
                min(len(tenants), self._ready(provider, product.chip_class)),
                max(clearing.sell_price_micro_cny, auction.tariff_micro_cny),
            )
            for provider, tenants in sorted(served.items())
        )  # fmt: skip

    def _submit(self, requests: Sequence[Request], now_s: float) -> None:
        for told in self._journal.submit(requests, now_s) if requests else ():
            if isinstance(told, Refused):
                raise QipanError(f"{told.key}: {told.clause}: {told.why}")

    def _mark(self, auction: Auction, state: str, clearing: Clearing | None) -> None:
        kept = _Kept(auction.opens_s, auction.commitment, auction.tariff_micro_cny, clearing)
        self._db.run(
            "UPDATE auctions SET state = ?, body = ? WHERE product = ?",
            (state, msgspec.json.encode(kept).decode(), auction.product),
        )


def _filled(clearing: Clearing | None) -> dict[str, int]:
    return {fill.order_id: fill.devices for fill in clearing.fills} if clearing is not None else {}
