"""Electricity in a scenario: what a kWh costs at each data centre by the hour of the day, and what a device draws.

A tariff covers the cheapest hour of its data centre; in dearer hours free devices ask the difference, so that work which is worth less waits
or goes where electricity is cheaper.  What was drawn is counted over the hours for which devices were leased.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qipan.events import ElectricityPriced
from qipan.hardware import BoardId, BoardSpec, ChipClassId
from qipan.leases import EngineId
from qipan.quantities import parse_money_micro_cny
from qipan.quota import DAY_S, Loan
from qipan.twin.world import Happening, World
from qipan.workload.reader import Value

HOUR_S = 3600.0
WATTS_PER_KW = 1000.0


@dataclass(frozen=True, slots=True)
class Electricity:
    """`prices`: (board, its hours of the day; None: all, micro-CNY per kWh), a later entry before an earlier one; an entry holds for all data
    centres at and below its board.  `watts`: chip class -> of one device."""

    prices: tuple[tuple[BoardId, Loan | None, int], ...]
    watts: Mapping[str, float]

    def price_at(self, above: Sequence[BoardId], at_s: float) -> int:
        """Micro-CNY per kWh at a data centre; `above`: it and the boards over it."""
        for board, hours, price in reversed(self.prices):
            if board in above and (hours is None or hours.open_at(at_s)):
                return price
        return 0

    def hourly(self, above: Sequence[BoardId]) -> list[int]:
        return [self.price_at(above, hour * HOUR_S) for hour in range(24)]

    def happenings(self, root: BoardSpec, days: int) -> list[Happening]:
        """Every hour in which a data centre's price changes, for so many days."""
        found = []
        for above, spec in leaves(root):
            hourly = self.hourly(above)
            least = min(hourly)
            for hour in range(24 * days):
                if hour and hourly[hour % 24] == hourly[(hour - 1) % 24]:
                    continue
                more = hourly[hour % 24] - least
                asked = tuple(
                    (pool.chip_class, round(more * self.watts[pool.chip_class] / WATTS_PER_KW))
                    for pool in spec.pools
                )
                found.append(
                    Happening(hour * HOUR_S, f"electricity {spec.board}", _priced(spec.board, asked))
                )
        return found

    def drawn(
        self, above: Sequence[BoardId], lives: Sequence[tuple[ChipClassId, int, float, float]]
    ) -> tuple[float, int]:
        """(kWh, micro-CNY) of leases (chip class, devices, from, until)."""
        kwh, cost, hourly = 0.0, 0.0, self.hourly(above)
        for chip, devices, from_s, until_s in lives:
            at_s, kw = from_s, devices * self.watts[chip] / WATTS_PER_KW
            while at_s < until_s:
                end_s = min(until_s, (at_s // HOUR_S + 1) * HOUR_S)
                used = kw * (end_s - at_s) / HOUR_S
                kwh, cost = kwh + used, cost + used * hourly[int(at_s % DAY_S // HOUR_S)]
                at_s = end_s
        return kwh, round(cost)


def leaves(root: BoardSpec, over: tuple[BoardId, ...] = ()) -> list[tuple[tuple[BoardId, ...], BoardSpec]]:
    """Each data centre with the boards over it, itself the last."""
    above = (*over, root.board)
    own = [(above, root)] if root.pools else []
    return own + [found for child in root.children for found in leaves(child, above)]


def parse_electricity(value: Value, root: BoardSpec, watts: Mapping[str, float]) -> Electricity:
    """`[{board: cn, price: 0.6 CNY}, {board: west, hours: "22:00-08:00", price: 0.2 CNY}]`.  Raises InvalidInput with the position."""
    boards = {spec.board for spec in root.walk()}
    prices = []
    for entry in value.items():
        fields = entry.fields(("board", "hours", "price"))
        for key in ("board", "price"):
            if key not in fields:
                raise entry.error(
                    f"`{key}` is missing; write {{board: NAME, hours: 22:00-08:00, price: 0.3 CNY}} a kWh"
                )
        board = BoardId(fields["board"].text())
        if board not in boards:
            raise fields["board"].error(f"no such board here; there are {', '.join(sorted(boards))}")
        hours = _hours(fields["hours"]) if "hours" in fields else None
        prices.append((board, hours, fields["price"].parsed(parse_money_micro_cny)))
    lacking = sorted({pool.chip_class for _, spec in leaves(root) for pool in spec.pools} - set(watts))
    if lacking:
        raise value.error(
            f"what a device of {', '.join(lacking)} draws is not known; add `watts: {{{lacking[0]}: 400}}`"
        )
    return Electricity(tuple(prices), watts)


def _hours(value: Value) -> Loan:
    """Whole hours of the scenario's day, which begins at second 0."""
    found = re.fullmatch(r"(\d{1,2}):00-(\d{1,2}):00", value.text())
    if found is None or not all(0 <= int(hour) <= 24 for hour in found.groups()):
        raise value.error(f"{value.text()[:40]!r} are no whole hours; write 22:00-08:00")
    first_s, last_s = (int(hour) % 24 * HOUR_S for hour in found.groups())
    return Loan(0.0, first_s, last_s, 0.0)


def _priced(board: BoardId, asked: tuple[tuple[ChipClassId, int], ...]) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.tree.controllers[board].accept(ElectricityPriced(EngineId(f"{board}-engine"), asked))

    return act
