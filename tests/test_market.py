import importlib.util
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qipan.errors import InvalidInput
from qipan.market import Bid, clear
from qipan.market.auction import clear_or_tariff

spec = importlib.util.spec_from_file_location("verify_clearing", "examples/verify_clearing.py")
assert spec is not None
apart = importlib.util.module_from_spec(spec)
assert spec.loader is not None
spec.loader.exec_module(apart)


def book(seed: int, most: int = 12) -> list[Bid]:
    rng = random.Random(seed)
    return [
        Bid(f"o{i}", rng.choice(["buy", "sell"]), rng.randint(1, 8), rng.randint(0, 12), rng.randint(0, 2))
        for i in range(rng.randint(0, most))
    ]


def test_one_price_between_the_marginal_orders():
    orders = [Bid(f"b{i}", "buy", 1, limit) for i, limit in enumerate((10, 9, 4))]
    orders += [Bid(f"s{i}", "sell", 1, limit) for i, limit in enumerate((2, 5, 8))]
    clearing = clear(orders, "seed")
    assert (clearing.devices, clearing.buy_price_micro_cny, clearing.method) == (2, 6, "uniform")


def check_agreement(seeds: range) -> None:
    for seed in seeds:
        orders, tariff = book(seed, most=12 if seed % 2 else 5), seed % 11
        clearing = clear_or_tariff(orders, str(seed), tariff)
        filled = {fill.order_id: fill.devices for fill in clearing.fills}
        told = (clearing.devices, clearing.buy_price_micro_cny, clearing.sell_price_micro_cny, filled)
        assert apart.recompute([asdict(order) for order in orders], str(seed), tariff) == told, seed


def test_a_script_written_apart_agrees_on_ten_thousand_random_books():
    check_agreement(range(10_000))


def test_properties_on_ten_thousand_random_books():
    for seed in range(10_000):
        orders = book(seed)
        clearing = clear(orders, "s")
        by_id = {order.order_id: order for order in orders}
        filled = {fill.order_id: fill.devices for fill in clearing.fills}
        bought = sum(devices for name, devices in filled.items() if by_id[name].side == "buy")
        sold = sum(devices for name, devices in filled.items() if by_id[name].side == "sell")
        assert bought == sold == clearing.devices, seed
        assert clearing.surplus_micro_cny >= 0, seed
        for name, devices in filled.items():
            order = by_id[name]
            assert 0 < devices <= order.devices
            if order.side == "buy":
                assert order.limit_micro_cny >= clearing.buy_price_micro_cny, seed
            else:
                assert order.limit_micro_cny <= clearing.sell_price_micro_cny, seed
        for order in orders:  # no loser with a better limit than a winner of its side
            if order.order_id not in filled and clearing.method == "uniform":
                winners = [by_id[name].limit_micro_cny for name in filled if by_id[name].side == order.side]
                if order.side == "buy":
                    assert order.limit_micro_cny <= min(winners), seed
                else:
                    assert order.limit_micro_cny >= max(winners), seed


def test_the_order_of_ten_thousand_books_does_not_matter():
    for seed in range(10_000):
        orders = book(seed)
        shuffled = list(orders)
        random.Random(seed).shuffle(shuffled)
        assert clear(shuffled, "s") == clear(orders, "s"), seed


def test_more_supply_never_raises_the_price_in_ten_thousand_books():
    """What a buyer pays, whatever the method before and after."""
    for seed in range(10_000):
        rng = random.Random(f"more {seed}")
        orders = book(seed, most=20)
        before = clear(orders, "s")
        after = clear(
            [*orders, Bid("more", "sell", rng.randint(1, 10), rng.randint(0, 12), rng.randint(0, 9))], "s"
        )
        if before.devices and after.devices:
            assert after.buy_price_micro_cny <= before.buy_price_micro_cny, seed


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": 0},
        {"devices": -3},
        {"devices": 10**12},
        {"limit_micro_cny": -1},
        {"limit_micro_cny": 2**60},
        {"side": "hold"},
        {"order_id": "o2"},
    ],
)
def test_orders_that_mean_nothing_are_refused(wrong):
    good = [Bid("o1", "buy", 1, 5), Bid("o2", "sell", 1, 5)]
    with pytest.raises(InvalidInput):
        clear([replace(good[0], **wrong), good[1]], "s")


def test_a_published_book_is_verified_by_the_command_and_by_the_script(tmp_path):
    import json
    import subprocess
    import sys

    path = tmp_path / "book.json"
    path.write_text(json.dumps({"seed": "s", "orders": [asdict(order) for order in book(7)]}))
    cleared = subprocess.run(
        [sys.executable, "-m", "qipan.cli", "market", "clear", str(path), "--json"],
        capture_output=True,
        text=True,
    )
    path.write_text(cleared.stdout)
    for command in (
        ["-m", "qipan.cli", "market", "verify", str(path)],
        ["examples/verify_clearing.py", str(path)],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("agrees")
    assert len(Path("examples/verify_clearing.py").read_text().splitlines()) <= 40
    forged = json.loads(cleared.stdout)
    forged["clearing"]["buy_price_micro_cny"] += 1
    path.write_text(json.dumps(forged))
    done = subprocess.run(
        [sys.executable, "-m", "qipan.cli", "market", "verify", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "not what the rules give" in done.stderr
