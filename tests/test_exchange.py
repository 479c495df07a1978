"""The boards' exchange: orders placed through the API and the commands, cleared, settled and verified; what goes wrong changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api_site import TOKEN, caller, served
from qipan.api import tenant_token
from qipan.errors import QipanError
from qipan.journal import Journal
from qipan.journal.exchange import Exchange, Stock
from qipan.ledger.requests import Post
from qipan.ledger.transfer import move
from qipan.market import Bid
from qipan.store.opening import Place, open_database

HOUR_S = 3600
CNY = 1_000_000
START_S = 480_000 * HOUR_S
SLOT = "sim/a@east/firm/480000"
GATE_S, END_S = START_S - 900, START_S + HOUR_S


def open_exchange(db, ready: int = 4) -> Exchange:
    journal = Journal(db)
    opening = [
        Post(move(f"opening/{name}", "opening", "bank", f"tenant/{name}", 100 * CNY)) for name in "abc"
    ]
    journal.submit(opening, START_S - 9000)
    stock = [
        Stock("dc1", "east", "sim/a", 4, CNY),
        Stock("dc2", "east", "sim/a", 2, CNY),
        Stock("dc3", "east", "sim/a", 2, CNY),
    ]
    return Exchange(journal, stock, lambda: "seed", lambda board, _chip: ready if board == "dc1" else 2)


@pytest.fixture(params=["sqlite", "postgresql"])
def exchange(request):
    if request.param == "sqlite":
        return open_exchange(open_database(None))
    return open_exchange(open_database(Place(request.getfixturevalue("postgres"), "exchange")))


def fill_book(exchange: Exchange) -> None:
    for name, trader, side, devices, limit in (
        ("b1", "a", "buy", 2, 5), ("b2", "b", "buy", 2, 4), ("b3", "c", "buy", 3, 1),
        ("s1", "dc1", "sell", 3, 2), ("s2", "dc2", "sell", 2, 3), ("s3", "dc3", "sell", 2, 6),
    ):  # fmt: skip
        exchange.place(SLOT, Bid(name, side, devices, limit * CNY), trader, START_S - 8000)


def money(exchange: Exchange) -> dict[str, float]:
    return {
        account: micro / CNY
        for account, _, micro in exchange._journal.balances()
        if micro and account != "bank"
    }


def test_money_is_held_paid_and_passed_on(exchange):
    fill_book(exchange)
    assert money(exchange)["tenant/a"] == 90, "held with the order"
    assert exchange.tick(START_S - 1000) == GATE_S
    assert exchange.tick(GATE_S + 1) == END_S
    (told,) = exchange.auctions()
    assert (told.state, told.devices, told.buy_price_micro_cny) == ("cleared", 4, 3 * CNY)
    assert money(exchange) == {"tenant/a": 94, "tenant/b": 94, "tenant/c": 100, f"escrow/{SLOT}": 12}
    assert exchange.tick(END_S + 1) is None
    assert money(exchange) == {
        "tenant/a": 94, "tenant/b": 94, "tenant/c": 100,
        "provider/dc1": pytest.approx(3 * 3 * 0.98), "provider/dc2": pytest.approx(3 * 0.98), "platform/fee": pytest.approx(0.24),
    }  # fmt: skip
    assert {one.order.bid.order_id: one.filled for one in exchange.orders("a")} == {"b1": 2}
    audit = exchange._journal.check()
    assert (audit.problems, audit.holds_open, audit.sums) == ((), 0, {"CNY": 0})


def test_what_a_provider_had_not_ready_is_paid_back_with_the_penalty():
    exchange = open_exchange(open_database(None), ready=1)
    fill_book(exchange)
    exchange.tick(GATE_S)
    exchange._journal.submit([Post(move("bond", "bond", "bank", "provider/dc1", 50 * CNY))], GATE_S)
    exchange.tick(END_S)
    after = money(exchange)
    assert f"escrow/{SLOT}" not in after
    assert after["tenant/a"] + after["tenant/b"] == pytest.approx(188 + 2 * 3)
    assert after["reserve/imbalance"] > 0
    assert after["provider/dc1"] < 50 + 3
    assert exchange._journal.check().problems == ()


@pytest.mark.parametrize("later_s", [0, 60])
@pytest.mark.parametrize("stop", range(1, 8))
def test_a_step_that_was_interrupted_is_done_again_once(stop, later_s):
    """The process dies before or after any write of clearing and settling, and is back at once or a minute later."""

    class Dies(Exception):
        pass

    db = open_database(None)
    exchange = open_exchange(db)
    fill_book(exchange)
    real, left = db.transaction, [stop]

    def dying():
        left[0] -= 1
        if left[0] == 0:
            raise Dies
        return real()

    db.transaction = dying
    for now_s in (GATE_S, END_S):
        try:
            exchange.tick(now_s)
        except Dies:
            exchange.tick(now_s + later_s)
    assert money(exchange)["platform/fee"] == pytest.approx(0.24)
    assert [one.state for one in exchange.auctions()] == ["settled"]
    assert exchange._journal.check().problems == ()


@pytest.mark.parametrize("limit", [5, 0.5])
def test_what_was_paid_before_the_slot_is_cleared_after_its_begin(limit, monkeypatch):
    """The process dies between the payments and the mark; at the lower limit nobody buys, and the holds are given back."""
    exchange = open_exchange(open_database(None))
    exchange.place(SLOT, Bid("b", "buy", 2, int(limit * CNY)), "a", START_S - 8000)
    exchange.place(SLOT, Bid("s", "sell", 2, CNY), "dc1", START_S - 8000)
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_mark", dies)
        with pytest.raises(KeyboardInterrupt):
            exchange.tick(GATE_S)
    assert exchange.tick(START_S + 1) == END_S
    assert exchange.tick(END_S) is None
    assert [one.state for one in exchange.auctions()] == ["settled"]
    paid = 2 if limit > 1 else 0
    assert money(exchange)["tenant/a"] == 100 - paid
    assert money(exchange).get("provider/dc1", 0) == pytest.approx(paid * 0.98)
    assert f"escrow/{SLOT}" not in money(exchange)


def dies(*_of: object) -> None:
    raise KeyboardInterrupt


def test_a_product_that_goes_wrong_does_not_stop_the_others(monkeypatch):
    exchange = open_exchange(open_database(None))
    fill_book(exchange)
    later = "sim/a@east/firm/480001"
    exchange.place(later, Bid("later", "buy", 1, CNY), "a", START_S - 8000)
    exchange.tick(GATE_S)

    def wrong(*_of: object) -> None:
        raise QipanError("its run was begun with other inputs")

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_settle", wrong)
        assert exchange.tick(END_S) == END_S + 60
    assert {one.product: one.state for one in exchange.auctions()} == {SLOT: "cleared", later: "void"}
    exchange.tick(END_S + 60)
    assert {one.product: one.state for one in exchange.auctions()} == {SLOT: "settled", later: "void"}


def test_what_nobody_cleared_in_time_is_void_and_paid_back():
    exchange = open_exchange(open_database(None))
    fill_book(exchange)
    assert exchange.tick(START_S + 1) is None
    assert [one.state for one in exchange.auctions()] == ["void"]
    assert money(exchange) == {"tenant/a": 100, "tenant/b": 100, "tenant/c": 100}


@pytest.mark.parametrize(
    ("clause", "product", "bid", "trader"),
    [
        ("A-11", "sim/none@east/firm/480000", Bid("x", "buy", 1, CNY), "a"),
        ("A-11", SLOT, Bid("x", "sell", 5, CNY), "dc1"),
        ("A-11", SLOT, Bid("x", "sell", 2, CNY), "dc1"),
        ("A-11", SLOT.replace("firm", "spot"), Bid("x", "sell", 2, CNY), "dc1"),
        ("A-11", SLOT, Bid("x", "sell", 1, CNY), "a"),
        ("A-1", "sim/a@east/firm/470000", Bid("x", "buy", 1, CNY), "a"),
        ("A-1", "sim/a@east/firm/490000", Bid("x", "buy", 1, CNY), "a"),
        ("A-2", SLOT, Bid("x", "buy", 0, CNY), "a"),
        ("A-2", SLOT, Bid("x\n", "buy", 1, CNY), "a"),
        ("A-2", SLOT, Bid("x", "buy", 1, -1), "a"),
        ("A-3", SLOT, Bid("b1", "buy", 2, 6 * CNY), "a"),
        ("A-3", SLOT, Bid("b1", "buy", 2, 5 * CNY), "b"),
        ("L-4", SLOT, Bid("x", "buy", 50, 5 * CNY), "a"),
        ("L-4", SLOT, Bid("x", "buy", 1, CNY), "nobody"),
    ],
)  # fmt: skip
def test_what_the_rules_forbid_is_refused_and_changes_nothing(clause, product, bid, trader):
    exchange = open_exchange(open_database(None))
    fill_book(exchange)
    before = money(exchange), exchange.orders(), exchange.auctions()
    with pytest.raises(QipanError, match=clause):
        exchange.place(product, bid, trader, START_S - 7000)
    assert (money(exchange), exchange.orders(), exchange.auctions()) == before


def qipan(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qipan.cli", *command], capture_output=True, text=True)


def test_an_auction_is_placed_cleared_settled_and_verified_end_to_end(tmp_path):
    with (
        served(tmp_path) as host,
        caller(host) as operator,
        caller(host, tenant_token(TOKEN, "poets")) as poets,
    ):
        hour = int(host.clock.now_s()) // HOUR_S + 2
        slot = f"sim/a@cn-east/firm/{hour}"
        order = {"product": slot, "side": "buy", "devices": 2, "limit": "1.5 CNY", "order_id": "first"}
        assert poets.post("/market/orders", params=order).status_code == 201
        assert poets.post("/market/orders", params=order).status_code == 201, "the same order is placed once"
        for wrong, status in (
            ({"side": "sell"}, 403),
            ({"trader": "editors"}, 403),
            ({"devices": "0"}, 400),
            ({"limit": "-1 CNY", "order_id": "n"}, 400),
        ):
            assert poets.post("/market/orders", params={**order, **wrong}).status_code == status, wrong
        done = qipan(
            "market",
            "orders",
            slot,
            "--sell",
            "2",
            "--limit",
            "0.8 CNY",
            "--as",
            "dc1",
            "--id",
            "sold",
            "--store",
            str(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        assert "sold" not in poets.get("/market/orders").text, "orders of others are not shown"
        sealed = qipan("market", "book", slot, "--store", str(tmp_path))
        assert sealed.returncode == 2
        assert "sealed" in sealed.stderr
        with host.lock:
            host.exchange.tick(hour * HOUR_S - 900)
        book = qipan("market", "book", slot, "--json", "--store", str(tmp_path))
        (tmp_path / "book.json").write_text(book.stdout)
        published = json.loads(book.stdout)
        assert published["clearing"]["method"] == "tariff", "one buyer, one seller: too thin for an auction"
        assert qipan("market", "verify", str(tmp_path / "book.json")).stdout.startswith("agrees")
        script = Path(__file__).parent.parent / "examples" / "verify_clearing.py"
        apart = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "book.json")], capture_output=True, text=True
        )
        assert apart.stdout.strip() == "agrees"
        with host.lock:
            host.exchange.tick((hour + 1) * HOUR_S)
        assert host.balances()["tenant/poets"] == 998 * CNY
        assert host.balances()["provider/dc1"] == 1.96 * CNY
        assert operator.get("/ledger/check").json()["problems"] == []
        assert "settled" in qipan("market", "book", "--store", str(tmp_path)).stdout
