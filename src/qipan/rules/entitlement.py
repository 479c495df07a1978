"""What the rules of a board give and refuse, from who holds what.

A tenant's own devices are max(floor, share of the board).  Who takes more borrows: from devices that nobody owns, and from owners who
lend.  A share is lent whenever it is idle, to tasks that may be parked; a floor is lent as its loan says, to tasks that
park within its notice.  Owners come first: what they wait for within their own is taken back from borrowers.

What is lent may lie anywhere: a task that borrows nothing may take free devices of an owner as long as borrowers hold as many.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qipan.leases import Order
from qipan.quantities import format_devices
from qipan.quota import QuotaRule

#: seconds -> (tenant, chip class) -> devices of tasks that are parked for an owner within so long
Parks = Callable[[float], Mapping[tuple[str, str], int]]


def _none_parks(_within_s: float) -> Mapping[tuple[str, str], int]:
    return {}


@dataclass(frozen=True, slots=True)
class Holdings:
    """One board at a moment: chip class -> devices; (tenant, chip class) -> devices held; rule -> devices that its owner
    waits for within its own; who parks."""

    total: Mapping[str, int]
    held: Mapping[tuple[str, str], int]
    wanted: dict[QuotaRule, int]
    parks: Parks = _none_parks

    def of(self, rule: QuotaRule) -> int:
        return sum(self.held.get((rule.tenant, chip), 0) for chip in self.total if rule.covers(chip))

    def all_of(self, rule: QuotaRule) -> int:
        return sum(devices for chip, devices in self.total.items() if rule.covers(chip))

    def free(self, chips: Iterable[str]) -> int:
        wanted = set(chips)
        held = sum(devices for (_, chip), devices in self.held.items() if chip in wanted)
        return sum(self.total.get(chip, 0) for chip in wanted) - held

    def lent(self, rules: Iterable[QuotaRule], chips: Iterable[str], within_s: float) -> int:
        """Devices that borrowers of the chip classes give back within so long."""
        wanted, found, rules = set(chips), dict[str, int](), [*rules]
        for (tenant, chip), devices in self.parks(within_s).items():
            if chip in wanted:
                found[tenant] = found.get(tenant, 0) + devices
        return sum(
            min(devices, max(0, beyond_own(rules, self, tenant, wanted))) for tenant, devices in found.items()
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """`kind`: which part of which rule says no.  `short`: once others gave up so many devices it would say no longer; 0: that would not help."""

    kind: str  # "ceiling", "floor", "loan", "borrow", "preemptions", "idle"
    text: str
    short: int = 0


def entitled(rule: QuotaRule, holdings: Holdings) -> int:
    return max(rule.floor, int(rule.share * holdings.all_of(rule)))


def beyond_own(rules: Iterable[QuotaRule], holdings: Holdings, tenant: str, chips: Iterable[str]) -> int:
    """Devices of the chip classes that the tenant holds beyond its own; all where no rule is about it."""
    wanted = set(chips)
    own = [rule for rule in rules if rule.tenant == tenant and any(map(rule.covers, wanted))]
    if not own:
        return sum(holdings.held.get((tenant, chip), 0) for chip in wanted)
    return max(holdings.of(rule) - entitled(rule, holdings) for rule in own)


def shortfall(
    rules: Iterable[QuotaRule],
    holdings: Holdings,
    chips: Iterable[str],
    more: int,
    *,
    free: int,
    lent: int,
    within_s: float,
) -> int | None:
    """Devices of the chip classes that others must give up before `more` may be taken, when `free` are to stay free and `lent` beside them free
    or at borrowers that give them back within so long; None where that would not help."""
    chips = set(chips)
    left = holdings.free(chips) - free - more
    if lent > max(0, left) and lent > left + holdings.lent(rules, chips, within_s):
        return None
    return max(0, -left)


def may_borrow(order: Order, rules: Iterable[QuotaRule]) -> bool:
    """Whether the task can be parked for an owner."""
    protected = any(order.kind in rule.protect for rule in rules if rule.tenant == order.tenant)
    return order.preemptible and not protected


def kept_free(rule: QuotaRule, holdings: Holdings, now_s: float, stop_s: float, *, parks: bool) -> int:
    """Devices of the rule's owner that a task of another tenant may not take."""
    idle = max(0, entitled(rule, holdings) - holdings.of(rule))
    if not parks:
        return idle
    kept, loan = max(0, rule.floor - holdings.of(rule)), rule.loan
    if (
        loan is not None
        and loan.open_at(now_s)
        and loan.open_at(now_s + loan.notice_s)
        and stop_s <= loan.notice_s
    ):
        kept = 0
    return max(kept, min(idle, holdings.wanted.get(rule, 0)))


def refusal(
    rules: Iterable[QuotaRule],
    holdings: Holdings,
    order: Order,
    chip: str,
    more: int,
    stop_s: float,
    now_s: float,
    parked_enough: QuotaRule | None = None,
) -> Refusal | None:
    """Why the task may not take `more` devices of `chip`; None when it may.  `parked_enough`: the rule by which it was parked as often as
    it may be."""
    rules = [rule for rule in rules if rule.covers(chip)]
    own = [rule for rule in rules if rule.tenant == order.tenant]
    for rule in own:
        held = holdings.of(rule)
        if rule.ceiling is not None and held + more > rule.ceiling:
            return Refusal(
                "ceiling",
                f"{rule.name()} has a ceiling of {rule.ceiling}: {held} are held, {more} more are wanted",
            )
        mine = entitled(rule, holdings)
        if rule.borrow is not None and held + more > mine + rule.borrow:
            return Refusal(
                "borrow",
                f"{rule.name()} lets it borrow {rule.borrow} beyond its own {mine}: {held} are held, {more} more are wanted",
            )  # fmt: skip
    parks = may_borrow(order, own) and parked_enough is None
    if own and all(holdings.of(rule) + more <= entitled(rule, holdings) for rule in own):
        parks = True  # its own: only what others keep for themselves is out of reach
        stop_s = 0.0
    free, lent, chips, most, notice_s = 0, 0, {chip}, None, math.inf
    for rule in rules:
        if rule.tenant == order.tenant:
            continue
        from_it = kept_free(rule, holdings, now_s, stop_s, parks=parks)
        from_all = kept_free(rule, holdings, now_s, 0.0, parks=True)
        free, lent = free + from_all, lent + from_it - from_all
        if from_it:
            chips |= {name for name in holdings.total if rule.covers(name)}
        if from_it > from_all and rule.loan is not None:
            notice_s = min(notice_s, rule.loan.notice_s)
        if from_it and (most is None or from_it > most[0]):
            most = (from_it, rule)
    if most is None:
        return None
    found = shortfall(rules, holdings, chips, more, free=free, lent=lent, within_s=notice_s)
    if found != 0:
        short, loan = found or 0, most[1].loan
        if parked_enough is not None and may_borrow(order, own):
            rate = parked_enough.per_task
            how = f"it was parked {rate}, as often as {parked_enough.name()} allows, and borrows nothing meanwhile"
            return Refusal("preemptions", f"{most[1].name()} keeps {format_devices(most[0])}: {how}", short)
        if not parks:
            how = "it may not be parked, so it cannot borrow them"
        elif holdings.wanted.get(most[1], 0):
            how = "their owner waits for them"
        elif loan is not None and not loan.open_at(now_s):
            how = "they are not lent at this hour"
        elif loan is not None:
            how = f"they are lent to tasks that park within {loan.notice_s:g} s, it takes {stop_s:g} s, or the hours end by then"
        else:
            how = "they are not lent"
        kind = "loan" if loan is not None else "floor"
        return Refusal(kind, f"{most[1].name()} keeps {format_devices(most[0])}: {how}", short)
    return None
