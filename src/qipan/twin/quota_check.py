"""Quota rules, stated again apart from the scheduler: counted from what runs at the engines, not from what boards believe.

1  a tenant never runs on more devices than its ceiling at a board
2  others never run on devices of a floor that is not lent
3  no task, and no tenant, is parked at a board for dearer tasks more often than `preemptions` allows; what an owner takes back counts for
   the task, and is never refused
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qipan.engines.simulated import SimulatedEngine
from qipan.quantities import format_devices
from qipan.quota import QuotaRule, Rate
from qipan.twin.check import Violation
from qipan.twin.world import World

#: how the reasons begin that a board gives its engine for parking a task for another
FOR_OTHERS = ("dearer tasks need its devices", "its devices go back to ")


@dataclass(slots=True)
class QuotaWatch:
    """For boards with an engine of their own.  `checked`: rules held against something that ran."""

    rules: tuple[QuotaRule, ...]
    checked: int = 0
    preempted: int = 0  # orders to park for others that were held against the rules
    _read: dict[str, int] = field(default_factory=dict)  # board -> orders read

    def check(self, world: World) -> None:
        for board in sorted(world.tree.engines):
            engine = world.simulated(board)
            self._check_parks(board, engine)
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
                        f"{board}: {rule.tenant} runs on {format_devices(own)}, its ceiling is {rule.ceiling}"
                    )
                left = sum(total[chip] for chip in chips) - rule.floor
                if rule.loan is None and others > left:
                    raise Violation(
                        f"{board}: others run on {format_devices(others)}, {rule.tenant}'s floor of {rule.floor} leaves {left}"
                    )

    def _check_parks(self, board: str, engine: SimulatedEngine) -> None:
        """Each order that came since the last check against all before it."""
        for number in range(self._read.get(board, 0), len(engine.parks)):
            task_id, tenant, chip, at_s, why = engine.parks[number]
            self.preempted += why.startswith(FOR_OTHERS)
            if why != FOR_OTHERS[0]:
                continue
            for rule in self.rules:
                if rule.board not in ("*", board) or rule.tenant not in ("*", tenant):
                    continue
                if rule.chips and not any(fnmatchcase(chip, one) for one in rule.chips):
                    continue
                before = engine.parks[: number + 1]
                own = [park[3] for park in before if park[0] == task_id and park[4].startswith(FOR_OTHERS)]
                all_ = [
                    park[3]
                    for park in before
                    if park[1] == tenant
                    and park[4] == FOR_OTHERS[0]
                    and (not rule.chips or any(fnmatchcase(park[2], one) for one in rule.chips))
                ]
                for rate, times, whose in ((rule.per_task, own, task_id), (rule.per_tenant, all_, tenant)):
                    if rate is not None and _within(rate, times, at_s) > rate.most:
                        raise Violation(
                            f"{board}: {whose} was parked for others {_within(rate, times, at_s)} times in"
                            f" {rate.window_s:g} s up to {at_s} s, {rate.most} are allowed"
                        )
        self._read[board] = len(engine.parks)


def _within(rate: Rate, times_s: list[float], at_s: float) -> int:
    return sum(1 for time_s in times_s if time_s > at_s - rate.window_s)
