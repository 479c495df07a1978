from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.errors import InvalidInput
from qipan.ledger.requests import Refused
from qipan.market.auction import (
    Auction,
    Order,
    Product,
    clear_or_tariff,
    close,
    commit,
    day_ahead_gate_s,
    enter,
    read_product,
)
from qipan.market.clearing import Bid
from qipan.market.strips import Strip, check_not_oversold, cut_devices, cut_hours, owed, resell

SLOT = Product("sim/fast", "east", "firm", 480_000)


def auction(**changes) -> Auction:
    return replace(Auction(SLOT.product_id, 0.0, 1000.0, commit("salt and seed"), 5), **changes)


def order(name: str, side: str = "buy", limit: int = 9, trader: str = "", devices: int = 1) -> Order:
    return Order(Bid(name, side, devices, limit), trader or f"trader of {name}", f"escrow of {name}", 0.0)


def entered(*orders: Order, now_s: float = 10.0) -> Auction:
    book = auction()
    for one in orders:
        book = enter(book, one, now_s)
        assert isinstance(book, Auction), book
    return book


def test_a_book_clears_with_the_seed_that_was_committed_to():
    book = entered(
        *(order(f"b{i}", "buy", 9) for i in range(4)), *(order(f"s{i}", "sell", 2) for i in range(4))
    )
    assert close(book, "salt and seed", 1000.0).devices == 4
    with pytest.raises(InvalidInput, match="not the one"):
        close(book, "a better seed", 1000.0)
    with pytest.raises(InvalidInput, match="gate"):
        close(book, "salt and seed", 999.0)


@pytest.mark.parametrize(
    ("wrong", "now_s", "clause"),
    [
        (order("late"), 1000.0, "A-1"),
        (order("early"), -1.0, "A-1"),
        (order("b0"), 10.0, "A-3"),
        (replace(order("x"), escrow="escrow of b0"), 10.0, "A-4"),
        (order("x", limit=-1), 10.0, "A-2"),
        (order("x", devices=0), 10.0, "A-2"),
        (order("x", devices=10**12), 10.0, "A-2"),
        (order("x", side="short"), 10.0, "A-2"),
        (order("x\nINFO paid"), 10.0, "A-2"),
        (order("x", trader="t\x1b[2J"), 10.0, "A-2"),
        (order("x", trader="trader of s0"), 10.0, "A-5"),
    ],
)
def test_orders_that_the_rules_forbid_are_refused(wrong, now_s, clause):
    book = entered(order("b0"), order("s0", "sell", 3))
    refused = enter(book, wrong, now_s)
    assert isinstance(refused, Refused)
    assert refused.clause == clause
    assert "\n" not in refused.why
    assert "\x1b" not in refused.why


def test_the_time_bucket_is_the_boards_and_not_the_traders():
    book = entered(replace(order("b0"), bid=Bid("b0", "buy", 1, 9, bucket=-5)), now_s=130.0)
    assert book.orders[0].bid.bucket == 2


def test_a_book_of_one_seller_trades_at_the_posted_tariff():
    clearing = clear_or_tariff([Bid("b", "buy", 4, 9), Bid("s", "sell", 3, 2)], "s", 5)
    assert (clearing.method, clearing.buy_price_micro_cny, clearing.devices) == ("tariff", 5, 3)
    assert clear_or_tariff([Bid("b", "buy", 4, 4), Bid("s", "sell", 3, 2)], "s", 5).devices == 0


def test_day_ahead_gates_close_at_noon_of_the_day_before():
    start_s = 1_764_000_000 // 86400 * 86400 + 2 * 3600  # 10:00 in UTC+8
    gate_s = day_ahead_gate_s(start_s)
    assert (gate_s + 8 * 3600) % 86400 == 12 * 3600
    assert 22 * 3600 <= start_s - gate_s + 0 <= 46 * 3600


def test_a_product_is_read_back_from_its_id():
    assert read_product(SLOT.product_id) == SLOT
    for wrong in ("", "a@b", "a@b/soft/1", "a@b/firm/x", "a@b/firm/-1", "@b/firm/1"):
        with pytest.raises(InvalidInput, match="product"):
            read_product(wrong)


STRIP = Strip("r1", "alice", "p", "sim/fast", "east", 100, 24, 8)


@given(st.integers(101, 123), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_cutting_and_selling_on_changes_nothing_of_what_a_provider_owes(hour, devices):
    early, late = cut_hours(STRIP, hour)
    one, other = cut_devices(late, devices)
    sold, _ = resell(one, "alice", "bob", 1000, 20_000, 99)
    for at in range(99, 126):
        assert owed([early, sold, other], "p", "sim/fast", at) == owed([STRIP], "p", "sim/fast", at)
    assert early.device_hours + one.device_hours + other.device_hours == STRIP.device_hours


def test_a_sale_on_pays_the_seller_less_the_fee_and_is_made_once():
    sold, transfer = resell(STRIP, "alice", "bob", 1000, 20_000, 99)
    assert [(entry.account, entry.amount_micro) for entry in transfer.entries] == [
        ("tenant/bob", -1000), ("tenant/alice", 980), ("platform/fee", 20),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="cannot sell"):
        resell(sold, "alice", "carol", 1000, 20_000, 99)
    again = resell(STRIP, "alice", "carol", 1000, 20_000, 99)[1]
    assert again.key == transfer.key, "the ledger refuses the second under the same key"


@pytest.mark.parametrize(
    "act",
    [
        lambda: resell(STRIP, "alice", "alice", 1000, 0, 99),
        lambda: resell(STRIP, "alice", "bob", 0, 0, 99),
        lambda: resell(STRIP, "alice", "bob", -5, 0, 99),
        lambda: resell(STRIP, "alice", "bob", 5, 0, 100),
        lambda: cut_hours(STRIP, 100),
        lambda: cut_devices(STRIP, 8),
        lambda: check_not_oversold(
            [STRIP, replace(STRIP, strip_id="r2", first_hour=110)], 15, "p", "sim/fast"
        ),
    ],
)
def test_strips_that_cannot_be_are_refused(act):
    with pytest.raises(InvalidInput):
        act()
