"""Quota rules in placement: what a task may take, and what is taken back for an owner who waits."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from qipan.curves import Point
from qipan.leases import EngineId
from qipan.quota import QuotaRule
from qipan.rules import Holdings, Refusal, entitled, may_borrow, refusal
from qipan.scheduler.asks import engine_key
from qipan.scheduler.bids import progress_value
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState
from qipan.scheduler.transitions import order_stop

#: waiting tasks of one owner for which devices are taken back in one tick
RECLAIMED_FOR = 16


def holdings_of(state: State, draft: Draft) -> Holdings:
    """As they stand now; the totals and what owners wait for are counted once a tick."""
    if draft.holdings is None:
        total: dict[str, int] = {}
        for known in state.engines.values():
            if not known.lost:
                for offer in known.offers:
                    total[offer.chip_class] = total.get(offer.chip_class, 0) + offer.devices
        draft.holdings = Holdings(total, state.tasks.held_by, {})
        for rule in state.rules:
            draft.holdings.wanted[rule] = sum(
                point.devices for _, point in _waiting_for(state, draft.holdings, rule)
            )
    return draft.holdings


def refused_by_rule(state: State, draft: Draft, task: TaskState, point: Point, more: int) -> Refusal | None:
    """Why the rules of this board keep the task from `more` devices of its point's chip class; None when they do not."""
    if not state.rules or more <= 0:
        return None
    return refusal(
        state.rules,
        holdings_of(state, draft),
        task.order,
        point.needs[0].chip_class,
        more,
        point.stop_s,
        draft.moment.now_s,
    )


def took(state: State, draft: Draft, task: TaskState, point: Point) -> None:
    """An owner's wish was met."""
    if state.rules and draft.holdings is not None:
        for rule, wanted in draft.holdings.wanted.items():
            if rule.tenant == task.order.tenant and rule.covers(point.needs[0].chip_class):
                draft.holdings.wanted[rule] = max(0, wanted - point.devices)


def reclaim(state: State, draft: Draft) -> None:
    """Park borrowers, the least valued first, where an owner waits for devices of its own, or where the hours of a loan end within
    its notice.  Those that already stop are counted."""
    for rule in state.rules:
        holdings = holdings_of(state, draft)
        spoken: dict[str, int] = {}  # engine -> devices for those before
        for task, point in list(_waiting_for(state, holdings, rule)):
            chip = {str(point.needs[0].chip_class)}
            _take_back(state, draft, rule, task, chip, point.devices, "waits for devices of its own", spoken)
        loan, now_s = rule.loan, draft.moment.now_s
        if loan is not None and not (loan.open_at(now_s) and loan.open_at(now_s + loan.notice_s)):
            idle = rule.floor - holdings.of(rule)
            if idle > 0:
                chips = {chip for chip in holdings.total if rule.covers(chip)}
                short = idle - holdings.free(chips) - _coming(state, chips)
                _park(state, draft, rule, chips, None, short, "lends no longer at this hour")


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
            and (not task.order.vendors or point.needs[0].chip_class.split("/")[0] in task.order.vendors)
        ]
        smallest = min(points, key=lambda point: (point.devices, -point.rate, point.point_id), default=None)
        if smallest is not None and smallest.devices <= idle:
            idle -= smallest.devices
            yield task, smallest


def _take_back(
    state: State,
    draft: Draft,
    rule: QuotaRule,
    task: TaskState,
    chips: set[str],
    devices: int,
    why: str,
    spoken: dict[str, int],
) -> None:
    """At the one engine where the fewest devices are missing."""
    best: tuple[int, EngineId, int] | None = None
    for engine, known in sorted(state.engines.items()):
        offered = sum(offer.devices for offer in known.offers if offer.chip_class in chips)
        if known.lost or offered < devices:
            continue
        keys = [engine_key(engine, chip) for chip in chips]
        free = offered - sum(state.tasks.held.get(key, 0) for key in keys) - spoken.get(engine, 0)
        coming = sum(_freeing(task) for key in keys for task in state.tasks.at_chip(key))
        if best is None or devices - free - coming < best[0]:
            best = (devices - free - coming, engine, coming)
    if best is not None:
        if best[0] + best[2] > 0 and not task.promised_until_s:
            state.tasks[task.task_id] = replace(
                task,
                why_waiting=f"waits for devices of {task.order.tenant} that a borrower gives back",
                promised_until_s=draft.moment.now_s + state.settings.lease_s,
            )
        spoken[best[1]] = spoken.get(best[1], 0) + devices
        _park(state, draft, rule, chips, best[1], best[0], why)


def _park(
    state: State, draft: Draft, rule: QuotaRule, chips: set[str], engine: str | None, short: int, why: str
) -> None:
    if short <= 0:
        return
    beyond = _beyond_own(state, draft)
    victims = []
    for name in [engine] if engine is not None else sorted(state.engines):
        for chip in sorted(chips):
            for task in state.tasks.at_chip(f"{name}|{chip}"):
                if (
                    task.phase is Phase.RUNNING
                    and task.order.tenant != rule.tenant
                    and beyond(task.order.tenant, chip) > 0
                    and may_borrow(task.order, state.rules)
                ):
                    value = progress_value(task.order, task.done_s, draft.moment.now_s, state.settings.policy)
                    victims.append((value, -task.since_s, task.task_id, chip))
    for _, _, task_id, chip in sorted(victims):
        task = state.tasks[task_id]
        if short <= 0:
            return
        if beyond(task.order.tenant, chip) <= 0:
            continue
        held = sum(need.devices for need in task.needs)
        notice = f" within {rule.loan.notice_s:g} s" if rule.loan is not None else ""
        text = f"parked with its checkpoint{notice}: {rule.tenant} {why}; {held} devices were borrowed"
        draft.because(task_id, "reclaimed", text, owner=rule.tenant)
        after = AfterStop.RETURN if task.parent is not None else AfterStop.QUEUE
        order_stop(state, task, draft, park=True, why=f"its devices go back to {rule.tenant}", after=after)
        draft.reclaimed[task.order.tenant, chip] = draft.reclaimed.get((task.order.tenant, chip), 0) + held
        short -= held


def _beyond_own(state: State, draft: Draft) -> Callable[[str, str], int]:
    """(tenant, chip class) -> devices it holds beyond its own, those that stop not counted."""
    holdings = holdings_of(state, draft)

    def beyond(tenant: str, chip: str) -> int:
        stopping = draft.reclaimed.get((tenant, chip), 0)
        own = [rule for rule in state.rules if rule.tenant == tenant and rule.covers(chip)]
        if not own:
            return holdings.held.get((tenant, chip), 0) - stopping
        return max(holdings.of(rule) - entitled(rule, holdings) for rule in own) - stopping

    return beyond


def _coming(state: State, chips: set[str]) -> int:
    keys = [engine_key(engine, chip) for engine in sorted(state.engines) for chip in chips]
    return sum(_freeing(task) for key in keys for task in state.tasks.at_chip(key))


def _freeing(task: TaskState) -> int:
    """Devices that it is giving up."""
    if task.phase is Phase.STOPPING:
        return sum(need.devices for need in task.needs)
    target = task.target()
    if task.phase is Phase.RESIZING and target is not None:
        return max(0, sum(need.devices for need in task.needs) - target.devices)
    return 0
