"""Quota rules, stated again apart from the scheduler: counted from what runs at the engines, not from what boards believe.

1  a tenant never runs on more devices than its ceiling at a board
2  others never run on devices of a floor that is not lent
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qipan.quota import QuotaRule
from qipan.twin.check import Violation
from qipan.twin.world import World


@dataclass(slots=True)
class QuotaWatch:
    """For boards with an engine of their own.  `checked`: rules held against something that ran."""

    rules: tuple[QuotaRule, ...]
    checked: int = 0

    def check(self, world: World) -> None:
        for board in sorted(world.tree.engines):
            engine = world.simulated(board)
            runs = [
                (engine.order_of(task_id).tenant, need.chip_class, need.devices)
                for task_id, (_, needs) in engine.running().items()
                for need in needs
            ]
            total = engine.devices()
            for rule in self.rules:
                if rule.board not in ("*", board) or not runs:
                    continue
                self.checked += 1
                chips = {
                    chip
                    for chip in total
                    if not rule.chips or any(fnmatchcase(chip, one) for one in rule.chips)
                }
                own = sum(count for tenant, chip, count in runs if tenant == rule.tenant and chip in chips)
                others = sum(count for tenant, chip, count in runs if tenant != rule.tenant and chip in chips)
                if rule.ceiling is not None and own > rule.ceiling:
                    raise Violation(
                        f"{board}: {rule.tenant} runs on {own} devices, its ceiling is {rule.ceiling}"
                    )
                left = sum(total[chip] for chip in chips) - rule.floor
                if rule.loan is None and others > left:
                    raise Violation(
                        f"{board}: others run on {others} devices, {rule.tenant}'s floor of {rule.floor} leaves {left}"
                    )
