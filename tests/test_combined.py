import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from combined_books import combined_book
from qipan.errors import InvalidInput
from qipan.market import combined
from qipan.market.combined import Combined, Option, Supply, Want, clear_combined


def check(wants, supplies, cleared: Combined) -> None:
    """Nobody loses, nothing is sold that is not there, gangs and blocks are whole, payments are receipts."""
    prices, by_id = dict(cleared.prices), {order.order_id: order for order in (*wants, *supplies)}
    bought: dict[str, dict[str, int]] = {}
    for fill in cleared.bought:
        bought.setdefault(fill.order_id, {})[fill.product] = bought.get(fill.order_id, {}).get(fill.product, 0) + fill.devices  # fmt: skip
    for order_id, parts in bought.items():
        want = by_id[order_id]
        pays = sum(devices * prices[product] for product, devices in parts.items())
        if want.gang:
            fitting = [option for option in want.options if _joined(option) == parts]
            assert fitting, f"{order_id} got {parts}"
            assert pays <= max(option.limit_micro_cny for option in fitting)
        else:
            assert sum(parts.values()) <= want.devices
            for product in parts:
                assert prices[product] <= max(option.limit_micro_cny for option in want.options if option.parts[0][0] == product)  # fmt: skip
    for fill in cleared.sold:
        supply = by_id[fill.order_id]
        assert fill.devices == supply.devices if supply.block else 0 < fill.devices <= supply.devices
        assert prices[fill.product] >= supply.limit_micro_cny, "no block, and nobody, sells at a loss"
    paid = sum(fill.devices * prices[fill.product] for fill in cleared.bought)
    received = sum(fill.devices * prices[fill.product] for fill in cleared.sold)
    assert paid == received


def _joined(option: Option) -> dict[str, int]:
    parts: dict[str, int] = {}
    for product, devices in option.parts:
        parts[product] = parts.get(product, 0) + devices
    return parts


@given(st.integers(0, 10**6), st.integers(0, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_one_trades_at_a_loss_and_payments_are_receipts(seed, orders, greedy):
    wants, supplies = combined_book(seed, orders)
    if greedy:
        ranked = sorted(wants, key=lambda want: want.order_id)
        check(wants, supplies, combined._greedy(ranked, supplies))
    else:
        check(wants, supplies, clear_combined(wants, supplies, "seed"))


@given(st.integers(0, 10**6), st.randoms())
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_book_does_not_matter(seed, rng):
    wants, supplies = combined_book(seed, 40)
    shuffled = list(wants), list(supplies)
    for side in shuffled:
        rng.shuffle(side)
    assert clear_combined(*shuffled, "s") == clear_combined(wants, supplies, "s")


def test_a_buyer_takes_the_product_that_leaves_it_more():
    want = Want("w", (Option((("a", 4),), 10), Option((("b", 4),), 9)))
    cleared = clear_combined([want], [Supply("sa", "a", 8, 7), Supply("sb", "b", 8, 3)], "s")
    assert [(fill.product, fill.devices) for fill in cleared.bought] == [("b", 4)]


def test_a_gang_takes_its_whole_bundle_or_nothing():
    gang = Want("g", (Option((("a", 4), ("b", 4)), 80),), gang=True)
    both = clear_combined([gang], [Supply("sa", "a", 4, 5), Supply("sb", "b", 4, 5)], "s")
    short = clear_combined([gang], [Supply("sa", "a", 4, 5), Supply("sb", "b", 3, 5)], "s")
    assert sorted(fill.product for fill in both.bought) == ["a", "b"]
    assert (short.bought, short.refused) == ((), ("g",))


def test_a_block_that_only_a_part_of_is_wanted_is_not_sold():
    cleared = clear_combined([Want("w", (Option((("a", 3),), 10),))], [Supply("b", "a", 8, 5, block=True)], "s")  # fmt: skip
    assert (cleared.sold, cleared.refused) == ((), ("b",))


def test_a_dual_is_what_one_device_more_is_worth():
    wants = [Want(f"w{i}", (Option((("a", 1),), limit),)) for i, limit in enumerate((10, 8, 6, 4))]
    before = clear_combined(wants, [Supply("s", "a", 2, 1)], "s")
    after = clear_combined(wants, [Supply("s", "a", 3, 1)], "s")
    [(_, price)] = before.prices
    gain = after.value_micro_cny - before.value_micro_cny
    assert 6 <= price <= 8
    assert gain + 1 == 6, "the next buyer's limit less the seller's is 5"


def exhaustive(wants, supplies) -> int:
    """The best value of a small book of unit orders, by trying everything."""
    best = 0
    for choice in itertools.product(*[range(-1, len(want.options)) for want in wants]):
        used: dict[str, int] = {}
        value = 0
        for want, k in zip(wants, choice, strict=True):
            if k >= 0:
                value += want.options[k].limit_micro_cny
                used[want.options[k].parts[0][0]] = used.get(want.options[k].parts[0][0], 0) + 1
        for product, devices in used.items():
            limits = sorted(supply.limit_micro_cny for supply in supplies if supply.product == product)
            if len(limits) < devices:
                break
            value -= sum(limits[:devices])
        else:
            best = max(best, value)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_value_of_small_books_is_the_best_there_is(seed):
    rng = random.Random(seed)
    products = ("a", "b", "c")
    wants = [
        Want(f"w{i}", tuple(Option(((product, 1),), rng.randint(1, 20)) for product in rng.sample(products, 2)))
        for i in range(5)
    ]  # fmt: skip
    supplies = [Supply(f"s{i}", rng.choice(products), 1, rng.randint(1, 15)) for i in range(6)]
    assert clear_combined(wants, supplies, "s").value_micro_cny == exhaustive(wants, supplies)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_comes_near_the_linear_program(seed):
    wants, supplies = combined_book(seed, 400)
    exact = clear_combined(wants, supplies, "s").value_micro_cny
    greedy = combined._greedy(wants, supplies).value_micro_cny
    assert 0.8 * exact <= greedy


def test_above_the_bound_it_is_greedy(monkeypatch):
    monkeypatch.setattr(combined, "LP_MAX", 50)
    wants, supplies = combined_book(3, 60)
    cleared = clear_combined(wants, supplies, "s")
    assert cleared.method == "greedy"
    check(wants, supplies, cleared)


@pytest.mark.parametrize(
    "wants",
    [
        [Want("w", ())],
        [Want("w", (Option((), 5),))],
        [Want("w", (Option((("a", 0),), 5),))],
        [Want("w", (Option((("a", 1),), -5),))],
        [Want("w", (Option((("a", 1),), 2**53),))],
        [Want("w", (Option((("a", 1), ("b", 1)), 5),))],
        [Want("w", (Option((("a", 1),), 5), Option((("b", 2),), 5)))],
        [Want("w", (Option((("a", 1),), 5),)), Want("w", (Option((("a", 1),), 5),))],
    ],
)
def test_orders_that_mean_nothing_are_refused(wants):
    with pytest.raises(InvalidInput):
        clear_combined(wants, [], "s")
