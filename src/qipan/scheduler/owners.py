"""Quota rules in placement: what a task may take, and what is taken back for an owner who waits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from qipan.curves import Point
from qipan.leases import EngineId, Offer, TaskId
from qipan.quantities import format_devices
from qipan.quota import QuotaRule
from qipan.rules import Holdings, Parks, Refusal, beyond_own, entitled, may_borrow, refusal, shortfall
from qipan.scheduler.ask_table import allows
from qipan.scheduler.asks import engine_key, offered
from qipan.scheduler.bids import progress_value
from qipan.scheduler.idle import kept_of_lent, notice_s_of, why_kept
from qipan.scheduler.moves import checkpoint_at
from qipan.scheduler.preemptions import note, parked_enough, spared_by
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState
from qipan.scheduler.transitions import order_stop

#: waiting tasks of one owner for which devices are taken back in one tick
RECLAIMED_FOR = 16


def holdings_of(state: State, draft: Draft) -> Holdings:
    """As they stand now; the totals and what owners wait for are counted once a tick."""
    if draft.holdings is None:
        draft.holdings = Holdings(offered(state), state.tasks.held_by, {}, _parks(state))
        for rule in state.rules:
            draft.holdings.wanted[rule] = sum(
                point.devices for _, point in _waiting_for(state, draft.holdings, rule)
            )
    return draft.holdings


def _parks(state: State) -> Parks:
    """As `Holdings.parks`; counted when it is first asked for."""

    @cache
    def within(within_s: float) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for engine in state.engines:
            for task in state.tasks.at(engine):
                if task.phase is Phase.STOPPING or not may_borrow(task.order, state.rules):
                    continue
                point = task.point()
                if point is not None and point.stop_s <= within_s:
                    for need in task.needs:
                        key = task.order.tenant, str(need.chip_class)
                        found[key] = found.get(key, 0) + need.devices
        return found

    return within


def own_of(state: State, draft: Draft, task: TaskState, point: Point) -> int:
    """How many devices of the point that a waiting task takes are its tenant's own, or what it lent: nobody else may have those before it."""
    if task.lent:
        return point.devices
    if not state.rules:
        return 0
    holdings, chip = holdings_of(state, draft), point.needs[0].chip_class
    own = [rule for rule in state.rules if rule.tenant == task.order.tenant and rule.covers(chip)]
    left = min((entitled(rule, holdings) - holdings.of(rule) for rule in own), default=0)
    return max(0, min(point.devices, left))


def refused_by_rule(
    state: State,
    draft: Draft,
    task: TaskState,
    point: Point,
    more: int,
    taken: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> Refusal | None:
    """Why the rules of this board keep the task from `more` devices of its point's chip class; None when they do not.  `taken`: (tenant,
    chip class) -> devices that this tick gave to others already, where they are not held yet."""
    if not state.reserves or more <= 0:
        return None
    holdings, chip, now_s = holdings_of(state, draft), point.needs[0].chip_class, draft.moment.now_s
    if taken:
        held = {**holdings.held}
        for key, devices in taken.items():
            held[key] = held.get(key, 0) + devices
        holdings = replace(holdings, held=held)
    enough = parked_enough(state, task, now_s)
    no = refusal(state.rules, holdings, task.order, chip, more, point.stop_s, now_s, enough)
    if (no is not None and not no.short) or not state.tasks.lent:
        return no
    parks = may_borrow(task.order, state.rules) and enough is None
    kept = kept_of_lent(state, task, chip, point.stop_s, parks=parks)
    if kept.of is None:
        return no
    short = shortfall(
        state.rules, holdings, {chip}, more, free=kept.woken, lent=kept.asleep, within_s=kept.notice_s
    )
    if short is not None and short <= (no.short if no is not None else 0):
        return no
    return Refusal("idle", why_kept(state, task, chip, kept.of), short or 0)


def owed_at(state: State, now_s: float, task: TaskState, key: str, offer: Offer | None = None) -> int:
    """Devices of "engine|chip class" that borrowers gave back, or do, for others than the task that wait for them; at the site of an
    `offer` when there are several."""
    owed = 0
    for name in state.tasks.owed:
        other = state.tasks[name]
        if (
            other.owed is not None
            and other.owed[0] == key
            and other.order.tenant != task.order.tenant
            and other.phase is Phase.QUEUED
            and other.owed[2] > now_s
            and (offer is None or allows(other.order, offer))
        ):
            owed += other.owed[1]
    return owed


def took(state: State, draft: Draft, task: TaskState, point: Point) -> None:
    """An owner's wish was met."""
    if state.rules and draft.holdings is not None:
        for rule, wanted in draft.holdings.wanted.items():
            if rule.tenant == task.order.tenant and rule.covers(point.needs[0].chip_class):
                draft.holdings.wanted[rule] = max(0, wanted - point.devices)


def owned(state: State, draft: Draft, tasks: Sequence[TaskState]) -> dict[TaskId, int]:
    """Devices that no other tenant's dearer bid takes from the running ones of `tasks`, since they would be taken back at once: what is their
    tenant's own by a rule of a board above, and by this board's rules all but the least valued of what their tenant holds beyond its
    own."""
    running = [task for task in tasks if task.phase is Phase.RUNNING]
    found = {task.task_id: min(task.devices, task.order.own) for task in running if task.order.own}
    if not any(rule.floor or rule.share for rule in state.rules):
        return found
    holdings, now_s, policy = holdings_of(state, draft), draft.moment.now_s, state.settings.policy
    left = {rule: holdings.of(rule) - entitled(rule, holdings) for rule in state.rules}
    running.sort(key=lambda task: (progress_value(task.order, task.done_s, now_s, policy), task.task_id))
    for task in running:
        tenant, chip, devices = task.order.tenant, task.needs[0].chip_class, task.devices
        own = [rule for rule in state.rules if rule.tenant == tenant and rule.covers(chip)]
        if any(entitled(rule, holdings) for rule in own) and any(left[rule] < devices for rule in own):
            found[task.task_id] = devices
        else:
            for rule in own:
                left[rule] -= devices
    return found


def reclaim(state: State, draft: Draft) -> None:
    """Park borrowers, the least valued first, where an owner waits for devices of its own, or where the hours of a loan end within
    its notice.  Those that already stop are counted."""
    spoken: dict[str, int] = {}  # "engine|chip classes" -> devices for those before
    served = set()
    for rule in state.rules:
        holdings = holdings_of(state, draft)
        for task, point in list(_waiting_for(state, holdings, rule)):
            if task.task_id in served:
                continue
            served.add(task.task_id)
            chip = {str(point.needs[0].chip_class)}
            loan = rule.loan
            owner = _Owner(rule.tenant, "waits for devices of its own", loan.notice_s if loan else None)
            _take_back(state, draft, owner, task, chip, point.devices, spoken)
        loan, now_s = rule.loan, draft.moment.now_s
        if loan is not None and not (loan.open_at(now_s) and loan.open_at(now_s + loan.notice_s)):
            idle = rule.floor - holdings.of(rule)
            if idle > 0:
                chips = {chip for chip in holdings.total if rule.covers(chip)}
                short = idle - holdings.free(chips) - _coming(state, chips)
                owner = _Owner(rule.tenant, "lends no longer at this hour", loan.notice_s)
                _park(state, draft, owner, chips, None, short)
    for task_id in sorted(state.tasks.lent):
        task = state.tasks[task_id]
        notice_s = notice_s_of(state, task)
        if task.phase is Phase.QUEUED and notice_s is not None:
            owner = _Owner(task.order.tenant, "takes up a lent lease again", notice_s, task_id)
            [need] = task.lent
            _take_back(state, draft, owner, task, {str(need.chip_class)}, need.devices, spoken)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who takes devices back, and why.  `task_id`: of the task whose own lease it was; a tenant's other tasks may have borrowed that."""

    tenant: str
    why: str
    notice_s: float | None
    task_id: TaskId | None = None


def next_change_s(state: State, now_s: float) -> float | None:
    """When a loan opens, closes, or begins to be called back."""
    times = []
    for rule in state.rules:
        if rule.loan is not None:
            for shift_s in (0.0, rule.loan.notice_s):
                change_s = rule.loan.next_change_s(now_s + shift_s)
                if change_s is not None:
                    times.append(change_s - shift_s)
    return min(times, default=None)


def _waiting_for(state: State, holdings: Holdings, rule: QuotaRule) -> Iterator[tuple[TaskState, Point]]:
    """The rule's tenant's waiting tasks that fit into what is its own and idle, at their smallest point there; in order
    of submission."""
    idle = entitled(rule, holdings) - holdings.of(rule)
    if rule.ceiling is not None:
        idle = min(idle, rule.ceiling - holdings.of(rule))
    if idle <= 0:
        return
    groups = [group for group in state.tasks.groups.values() if group.tenant == rule.tenant]
    waiting = [state.tasks[task_id] for group in groups for task_id in group.heads(RECLAIMED_FOR)]
    waiting.sort(key=lambda task: (task.order.submitted_s, task.task_id))
    for task in waiting[:RECLAIMED_FOR]:
        points = [
            point
            for point in task.order.curve.points
            if rule.covers(point.needs[0].chip_class)
            and point.needs[0].chip_class in holdings.total
            and (not (task.order.vendors or task.order.regions) or _may_go(state, task, point))
        ]
        smallest = min(points, key=lambda point: (point.devices, -point.rate, point.point_id), default=None)
        if smallest is not None and smallest.devices <= idle:
            idle -= smallest.devices
            yield task, smallest


def _may_go(state: State, task: TaskState, point: Point) -> bool:
    """Whether the owner's limits leave an engine that could give the point."""
    return any(
        offer.chip_class == point.needs[0].chip_class
        and offer.devices >= point.devices
        and allows(task.order, offer)
        for known in state.engines.values()
        if not known.lost
        for offer in known.offers
    )


def _take_back(
    state: State,
    draft: Draft,
    owner: _Owner,
    task: TaskState,
    chips: set[str],
    devices: int,
    spoken: dict[str, int],
) -> None:
    """At the one engine where the fewest devices are missing, of its sites those that the task may go to."""
    best: tuple[int, EngineId, int] | None = None
    sites: set[str] | None = None
    for engine, known in sorted(state.engines.items()):
        there = [offer for offer in known.offers if offer.chip_class in chips]
        open_to = [offer for offer in there if allows(task.order, offer)]
        offered = sum(offer.devices for offer in open_to)
        if known.lost or offered < devices:
            continue
        some = {offer.site for offer in open_to} if len(open_to) < len(there) else None
        holders = _holders(state, engine, chips, some)
        before = spoken.get(engine_key(engine, "+".join(sorted(chips))), 0)
        if some is None:
            held = sum(state.tasks.held.get(engine_key(engine, chip), 0) for chip in chips)
        else:
            held = sum(need.devices for one, chip in holders for need in one.needs if need.chip_class == chip)
        free = offered - held - before
        coming = sum(freeing(one) for one, _ in holders)
        if best is None or devices - free - coming < best[0]:
            best, sites = (devices - free - coming, engine, coming), some
    if best is not None:
        key = engine_key(best[1], "+".join(sorted(chips)))
        if best[0] + best[2] > 0 and not task.promised_until_s:
            state.tasks[task.task_id] = replace(
                task,
                why_waiting=f"waits for devices of {task.order.tenant} that a borrower gives back",
                promised_until_s=draft.moment.now_s + state.settings.lease_s,
                owed=(key, devices, draft.moment.now_s + state.settings.lease_s),
            )
        spoken[key] = spoken.get(key, 0) + devices
        _park(state, draft, owner, chips, best[1], best[0], sites)


def _holders(
    state: State, engine: EngineId, chips: set[str], sites: set[str] | None
) -> list[tuple[TaskState, str]]:
    """Those that hold some of the chip classes there, and of which; `sites`: of a board below only those that run there, or where none is known."""
    return [
        (task, chip)
        for chip in sorted(chips)
        for task in state.tasks.at_chip(engine_key(engine, chip))
        if sites is None or not task.place or checkpoint_at(task) in sites
    ]


def _park(
    state: State,
    draft: Draft,
    owner: _Owner,
    chips: set[str],
    engine: EngineId | None,
    short: int,
    sites: set[str] | None = None,
) -> None:
    """First those that park within the notice and may be parked once more by the rules; of them the least valued."""
    if short <= 0:
        return
    beyond, now_s = _beyond_own(state, draft), draft.moment.now_s
    victims = []
    for name in [engine] if engine is not None else sorted(state.engines):
        for task, chip in _holders(state, name, chips, sites):
            if (
                task.phase is Phase.RUNNING
                and (task.order.tenant != owner.tenant or owner.task_id is not None)
                and beyond(task.order.tenant, chip) > 0
                and may_borrow(task.order, state.rules)
            ):
                value = progress_value(task.order, task.done_s, now_s, state.settings.policy)
                point = task.point()
                slow = owner.notice_s is not None and point is not None and point.stop_s > owner.notice_s
                last = (slow, spared_by(state, task, now_s) is not None)
                victims.append((last, value, -task.since_s, task.task_id, chip))
    for _, _, _, task_id, chip in sorted(victims):
        task = state.tasks[task_id]
        if short <= 0:
            return
        if beyond(task.order.tenant, chip) <= 0:
            continue
        held = task.devices
        notice = f" within {owner.notice_s:g} s" if owner.notice_s is not None else ""
        text = f"parked with its checkpoint{notice}: {owner.tenant} {owner.why}; it had borrowed {format_devices(held)}"
        draft.because(task_id, "reclaimed", text, owner=owner.tenant)
        task = note(state, task, draft)
        after = AfterStop.RETURN if task.parent is not None else AfterStop.QUEUE
        order_stop(state, task, draft, park=True, why=f"its devices go back to {owner.tenant}", after=after)
        draft.reclaimed[task.order.tenant, chip] = draft.reclaimed.get((task.order.tenant, chip), 0) + held
        short -= held


def _beyond_own(state: State, draft: Draft) -> Callable[[str, str], int]:
    """(tenant, chip class) -> devices it holds beyond its own, those that stop not counted."""
    holdings = holdings_of(state, draft)

    def beyond(tenant: str, chip: str) -> int:
        return beyond_own(state.rules, holdings, tenant, {chip}) - draft.reclaimed.get((tenant, chip), 0)

    return beyond


def _coming(state: State, chips: set[str]) -> int:
    keys = [engine_key(engine, chip) for engine in sorted(state.engines) for chip in chips]
    return sum(freeing(task) for key in keys for task in state.tasks.at_chip(key))


def freeing(task: TaskState) -> int:
    """Devices that it is giving up."""
    if task.phase is Phase.STOPPING:
        return task.devices
    target = task.target()
    if task.phase is Phase.RESIZING and target is not None:
        return max(0, task.devices - target.devices)
    return 0
