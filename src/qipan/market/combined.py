"""One clearing of many products at once: buyers who take one of several products, gangs that take all of a bundle or nothing,
sellers' blocks that are sold whole or not at all.

Up to LP_MAX orders it is a linear program, solved by HiGHS (Huangfu and Hall 2018): the most value for buyers above the sellers'
limits, devices bought of a product at most those sold.  Gangs and blocks may be fractions at first; those that end as fractions are
refused and the rest is solved again, so that what is left is whole and the duals are prices at which nobody trades at a loss
(the rule of coupled power exchanges, Meeus et al. 2009).  Above LP_MAX orders a greedy pass takes the orders by value.  The prices
are published; a dual is the price of one device-hour more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from qipan.errors import InvalidInput
from qipan.market.clearing import DEVICES_MAX, LIMIT_MAX, tie_hash

LP_MAX = 10_000
WHOLE = 1e-6


@dataclass(frozen=True, slots=True)
class Option:
    """`parts`: (product, devices).  `limit_micro_cny`: for one device-hour of a divisible order, which has one part; for the whole
    bundle of a gang."""

    parts: tuple[tuple[str, int], ...]
    limit_micro_cny: int


@dataclass(frozen=True, slots=True)
class Want:
    """A buyer takes one of the options (a gang), or some of each up to `devices` in all (divisible)."""

    order_id: str
    options: tuple[Option, ...]
    gang: bool = False

    @property
    def devices(self) -> int:
        return max(sum(devices for _, devices in option.parts) for option in self.options)


@dataclass(frozen=True, slots=True)
class Supply:
    """`block`: sold whole or not at all."""

    order_id: str
    product: str
    devices: int
    limit_micro_cny: int
    block: bool = False


@dataclass(frozen=True, slots=True)
class PartFill:
    order_id: str
    product: str
    devices: int


@dataclass(frozen=True, slots=True)
class Combined:
    """`prices`: product -> micro-CNY a device-hour, what both sides pay and get.  `refused`: gangs and blocks that only a part of was
    wanted.  `value_micro_cny`: buyers' limits less sellers' limits of what trades."""

    method: str
    prices: tuple[tuple[str, int], ...]
    bought: tuple[PartFill, ...]
    sold: tuple[PartFill, ...]
    refused: tuple[str, ...]
    value_micro_cny: int


def clear_combined(wants: Sequence[Want], supplies: Sequence[Supply], seed: str) -> Combined:
    """The order of the book does not matter: ties go by the hash of seed and order id.  Raises InvalidInput."""
    _check(wants, supplies)
    wants = sorted(wants, key=lambda want: (tie_hash(want.order_id, seed), want.order_id))
    supplies = sorted(supplies, key=lambda supply: (tie_hash(supply.order_id, seed), supply.order_id))
    if len(wants) + len(supplies) > LP_MAX:
        return _greedy(wants, supplies)
    return _linear(wants, supplies)


def _check(wants: Sequence[Want], supplies: Sequence[Supply]) -> None:
    names: set[str] = set()
    for order_id in (*(want.order_id for want in wants), *(supply.order_id for supply in supplies)):
        if order_id in names:
            raise InvalidInput(f"order {order_id} stands twice; an order is in a book once")
        names.add(order_id)
    for want in wants:
        totals = {sum(devices for _, devices in option.parts) for option in want.options}
        if not want.options or any(not option.parts for option in want.options):
            raise InvalidInput(f"order {want.order_id} wants nothing; give options with parts")
        if not want.gang and (len(totals) > 1 or any(len(option.parts) > 1 for option in want.options)):
            raise InvalidInput(f"order {want.order_id} is divisible: its options have one part each, of as many devices; or make it a gang")  # fmt: skip
        for option in want.options:
            _in_range(want.order_id, option.limit_micro_cny, [devices for _, devices in option.parts])
    for supply in supplies:
        _in_range(supply.order_id, supply.limit_micro_cny, [supply.devices])


def _in_range(order_id: str, limit: int, devices: Sequence[int]) -> None:
    if not 0 <= limit < LIMIT_MAX or any(not 1 <= count <= DEVICES_MAX for count in devices):
        raise InvalidInput(f"order {order_id}: limit {limit}, devices {list(devices)}; give limits from 0 to {LIMIT_MAX - 1}, devices from 1 to {DEVICES_MAX}")  # fmt: skip


# ---- the linear program -------------------------------------------------------------------------------------------


def _linear(wants: Sequence[Want], supplies: Sequence[Supply]) -> Combined:
    out: set[str] = set()
    while True:
        live = [want for want in wants if want.order_id not in out]
        offered = [supply for supply in supplies if supply.order_id not in out]
        bought, sold, duals, fractions = _solve(live, offered)
        if not fractions:
            prices = {product: round(dual) for product, dual in duals.items()}
            losing = _losing(live, offered, bought, sold, prices)
            if not losing:
                return _combined("linear program", live, offered, bought, sold, prices, sorted(out))
            fractions = losing  # by the rounding of a price to the micro-yuan
        out |= fractions


def _solve(
    wants: Sequence[Want], supplies: Sequence[Supply]
) -> tuple[dict[tuple[str, int], int], dict[str, int], dict[str, float], set[str]]:
    """(order, option) -> devices or 1 of a gang; supply -> devices; product -> dual; orders that came out as fractions."""
    from scipy.sparse import coo_array

    from qipan.solver import linprog

    products = sorted(
        {part[0] for want in wants for option in want.options for part in option.parts}
        | {supply.product for supply in supplies}
    )
    row_of = {product: i for i, product in enumerate(products)}
    cost: list[float] = []
    most: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    limits: list[float] = [0.0] * len(products)
    names: list[tuple[str, int]] = []
    for want in wants:
        several = len(want.options) > 1
        for k, option in enumerate(want.options):
            column = len(cost)
            names.append((want.order_id, k))
            cost.append(-float(option.limit_micro_cny))
            most.append(1.0 if want.gang else float(option.parts[0][1]))
            for product, devices in option.parts:
                rows.append(row_of[product])
                columns.append(column)
                values.append(float(devices) if want.gang else 1.0)
            if several:
                rows.append(len(limits))
                columns.append(column)
                values.append(1.0)
        if several:
            limits.append(1.0 if want.gang else float(want.devices))
    first_supply = len(cost)
    for supply in supplies:
        rows.append(row_of[supply.product])
        columns.append(len(cost))
        values.append(-float(supply.devices) if supply.block else -1.0)
        cost.append(float(supply.limit_micro_cny) * (supply.devices if supply.block else 1))
        most.append(1.0 if supply.block else float(supply.devices))
    if not cost:
        return {}, {}, {}, set()
    matrix = coo_array((values, (rows, columns)), shape=(len(limits), len(cost))).tocsr()
    found = linprog(
        cost, A_ub=matrix, b_ub=limits, bounds=np.column_stack((np.zeros(len(most)), most)), method="highs-ds"
    )
    assert found.status == 0, f"nothing bought and nothing sold is always allowed: {found.message}"
    duals = {product: max(0.0, -float(found.ineqlin.marginals[i])) for product, i in row_of.items()}
    bought: dict[tuple[str, int], int] = {}
    sold: dict[str, int] = {}
    fractions: set[str] = set()
    gangs = {want.order_id for want in wants if want.gang}
    for (order_id, k), amount in zip(names, found.x[:first_supply].tolist(), strict=True):
        if abs(amount - round(amount)) > WHOLE and order_id in gangs:
            fractions.add(order_id)
        elif round(amount):
            bought[order_id, k] = round(amount)
    for supply, amount in zip(supplies, found.x[first_supply:].tolist(), strict=True):
        if abs(amount - round(amount)) > WHOLE and supply.block:
            fractions.add(supply.order_id)
        elif round(amount):
            sold[supply.order_id] = round(amount) * (supply.devices if supply.block else 1)
    return bought, sold, duals, fractions


def _losing(
    wants: Sequence[Want],
    supplies: Sequence[Supply],
    bought: dict[tuple[str, int], int],
    sold: dict[str, int],
    prices: dict[str, int],
) -> set[str]:
    """Who would trade at a loss at these prices, in whole micro-yuan."""
    losing = set()
    for want in wants:
        for k, option in enumerate(want.options):
            if (want.order_id, k) not in bought:
                continue
            pays = (
                sum(devices * prices[product] for product, devices in option.parts)
                if want.gang
                else prices[option.parts[0][0]]
            )
            if pays > option.limit_micro_cny:
                losing.add(want.order_id)
    for supply in supplies:
        if supply.order_id in sold and prices[supply.product] < supply.limit_micro_cny:
            losing.add(supply.order_id)
    return losing


def _combined(
    method: str,
    wants: Sequence[Want],
    supplies: Sequence[Supply],
    bought: dict[tuple[str, int], int],
    sold: dict[str, int],
    prices: dict[str, int],
    refused: Sequence[str],
) -> Combined:
    buys, value = [], 0
    for want in wants:
        for k, option in enumerate(want.options):
            amount = bought.get((want.order_id, k), 0)
            if amount:
                value += amount * option.limit_micro_cny
                buys += [
                    PartFill(want.order_id, product, devices if want.gang else amount)
                    for product, devices in option.parts
                ]
    sells = []
    for supply in supplies:
        if supply.order_id in sold:
            value -= sold[supply.order_id] * supply.limit_micro_cny
            sells.append(PartFill(supply.order_id, supply.product, sold[supply.order_id]))
    totals: dict[str, int] = {}
    for fill in buys:
        totals[fill.product] = totals.get(fill.product, 0) + fill.devices
    for fill in sells:
        totals[fill.product] = totals.get(fill.product, 0) - fill.devices
    assert all(left == 0 or (left < 0 and prices[product] == 0) for product, left in totals.items()), totals
    return Combined(method, tuple(sorted(prices.items())), tuple(buys), tuple(sells), tuple(refused), value)


# ---- greedy -------------------------------------------------------------------------------------------------------


def _greedy(wants: Sequence[Want], supplies: Sequence[Supply]) -> Combined:
    """Buyers by value a device, each at the option that leaves it most at the next cheapest supply; blocks are not taken.  A product's
    price is the dearest limit that was taken of it; whoever then loses is left out, and it is done again."""
    out: set[str] = {supply.order_id for supply in supplies if supply.block}
    ranked = sorted(wants, key=lambda want: -max(_per_device(want, option) for option in want.options))
    while True:
        live = [want for want in ranked if want.order_id not in out]
        offered = [supply for supply in supplies if not supply.block]
        bought, sold, prices = _pass(live, offered)
        losing = _losing(live, offered, bought, sold, prices)
        if not losing:
            refused = sorted(out | {want.order_id for want in live if want.gang and not any((want.order_id, k) in bought for k in range(len(want.options)))})  # fmt: skip
            return _combined("greedy", live, offered, bought, sold, prices, refused)
        out |= losing


def _per_device(want: Want, option: Option) -> float:
    return option.limit_micro_cny / (sum(devices for _, devices in option.parts) if want.gang else 1)


def _pass(
    wants: Sequence[Want], supplies: Sequence[Supply]
) -> tuple[dict[tuple[str, int], int], dict[str, int], dict[str, int]]:
    shelves: dict[
        str, list[tuple[int, int, str, int]]
    ] = {}  # product -> (limit, place in the book, order, devices left)
    for i, supply in enumerate(supplies):
        shelves.setdefault(supply.product, []).append(
            (supply.limit_micro_cny, i, supply.order_id, supply.devices)
        )
    for shelf in shelves.values():
        heapify(shelf)
    bought: dict[tuple[str, int], int] = {}
    sold: dict[str, int] = {}
    prices = {product: 0 for want in wants for option in want.options for product, _ in option.parts}
    prices |= dict.fromkeys(shelves, 0)

    def take(product: str, devices: int) -> None:
        shelf = shelves[product]
        while devices:
            limit, place, order_id, left = heappop(shelf)
            some = min(left, devices)
            sold[order_id] = sold.get(order_id, 0) + some
            prices[product] = max(prices[product], limit)
            devices -= some
            if left > some:
                heappush(shelf, (limit, place, order_id, left - some))

    def dearest(product: str, devices: int) -> int | None:
        """The limit of the last of the next devices; None when there are not so many."""
        shelf, taken, limit = shelves.get(product, []), [], None
        while devices > 0 and shelf:
            entry = heappop(shelf)
            taken.append(entry)
            devices -= entry[3]
            limit = entry[0]
        for entry in taken:
            heappush(shelf, entry)
        return limit if devices <= 0 else None

    for want in wants:
        if want.gang:
            best: tuple[int, int] | None = None
            for k, option in enumerate(want.options):
                asked = [dearest(product, devices) for product, devices in option.parts]
                if any(limit is None for limit in asked):
                    continue
                gain = option.limit_micro_cny - sum(
                    devices * max(prices[product], limit or 0)
                    for (product, devices), limit in zip(option.parts, asked, strict=True)
                )
                if gain >= 0 and (best is None or gain > best[0]):
                    best = (gain, k)
            if best is not None:
                bought[want.order_id, best[1]] = 1
                for product, devices in want.options[best[1]].parts:
                    take(product, devices)
            continue
        left = want.devices
        while left:
            choices = [
                (option.limit_micro_cny - shelves[option.parts[0][0]][0][0], -k)
                for k, option in enumerate(want.options)
                if shelves.get(option.parts[0][0])
            ]
            gain, choice = max(choices, default=(-1, 0))
            if gain < 0:
                break
            product = want.options[-choice].parts[0][0]
            some = min(left, shelves[product][0][3])
            bought[want.order_id, -choice] = bought.get((want.order_id, -choice), 0) + some
            take(product, some)
            left -= some
    return bought, sold, prices
