"""How often running tasks are parked for others: counted, and held to the rules of this board (`preemptions`).

A task that was parked as often as a rule allows keeps what it holds, no more and no less, until the window has passed, and borrows nothing
that is lent meanwhile.  Owners come first all the same: what an owner takes back is counted, and taken from others before.  The
count of a task goes with it from board to board; that of a tenant is each board's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qipan.quota import REMEMBERED, REMEMBERED_S, QuotaRule
from qipan.scheduler.bids import progress_value
from qipan.scheduler.state import Draft, Phase, State, TaskState


def limited(state: State) -> bool:
    return any(rule.per_task or rule.per_tenant for rule in state.rules)


def parked_enough(state: State, task: TaskState, now_s: float) -> QuotaRule | None:
    """The rule by which the task itself was parked as often as it may be."""
    reached = (
        rule
        for rule in _about(state, task)
        if rule.per_task is not None and rule.per_task.reached(task.preempted_s, now_s)
    )
    return next(reached, None)


def spared_by(state: State, task: TaskState, now_s: float) -> QuotaRule | None:
    """The rule that keeps a running task from being parked for others now."""
    if not state.rules:
        return None
    own = parked_enough(state, task, now_s)
    if own is not None:
        return own
    return next((rule for rule in _about(state, task) if _left(state, rule, task, now_s) <= 0), None)


def within_limits(state: State, tasks: Sequence[TaskState], now_s: float) -> list[TaskState]:
    """Those of `tasks` that may be parked for others in one tick; of more than the rules leave, the least valued.  Tasks that do not run are
    all kept."""
    if not limited(state):
        return [*tasks]
    policy = state.settings.policy
    running = [
        task for task in tasks if task.phase is Phase.RUNNING and spared_by(state, task, now_s) is None
    ]
    running.sort(key=lambda task: (progress_value(task.order, task.done_s, now_s, policy), task.task_id))
    taken: dict[tuple[QuotaRule, str], int] = {}
    kept = set()
    for task in running:
        keys = [(rule, task.order.tenant) for rule in _about(state, task) if rule.per_tenant]
        if all(taken.get(key, 0) < _left(state, key[0], task, now_s) for key in keys):
            kept.add(task.task_id)
            for key in keys:
                taken[key] = taken.get(key, 0) + 1
    return [task for task in tasks if task.phase is not Phase.RUNNING or task.task_id in kept]


def note(state: State, task: TaskState, draft: Draft) -> TaskState:
    """The task with one preemption more, now."""
    now_s = draft.moment.now_s
    if any(rule.per_tenant for rule in _about(state, task)):
        key = _key(task.order.tenant, task.needs[0].chip_class)
        times = (*state.preempted_s.get(key, ()), now_s)  # two tasks may be parked in one tick
        state.preempted_s[key] = tuple(at_s for at_s in times if at_s > now_s - REMEMBERED_S)[-REMEMBERED:]
    return replace(task, preempted_s=joined(task.preempted_s, (now_s,), now_s))


def joined(known: Sequence[float], more: Sequence[float], now_s: float) -> tuple[float, ...]:
    """Of one task, as two boards know it."""
    if not more:
        return tuple(known)
    return tuple(sorted(at_s for at_s in {*known, *more} if at_s > now_s - REMEMBERED_S))[-REMEMBERED:]


def why_spared(rule: QuotaRule) -> str:
    limits = [f"a task {rule.per_task}"] if rule.per_task else []
    limits += [f"a tenant's tasks {rule.per_tenant}"] if rule.per_tenant else []
    return f"{rule.name()} lets the board park {' and '.join(limits)}"


def _about(state: State, task: TaskState) -> Iterable[QuotaRule]:
    tenant = task.order.tenant
    for rule in state.rules:
        if (rule.per_task or rule.per_tenant) and rule.about(tenant):
            chips = [need.chip_class for need in task.needs] or [
                point.needs[0].chip_class for point in task.order.curve.points
            ]
            if any(rule.covers(chip) for chip in chips):
                yield rule


def _left(state: State, rule: QuotaRule, task: TaskState, now_s: float) -> int:
    """How many tasks of the task's tenant may be parked now by a rule's `per_tenant`."""
    if rule.per_tenant is None:
        return REMEMBERED
    tenant, since_s = task.order.tenant, now_s - rule.per_tenant.window_s
    times = [
        at_s
        for key, own in state.preempted_s.items()
        if key.startswith(f"{tenant}|") and rule.covers(key.split("|", 1)[1])
        for at_s in own
    ]
    return rule.per_tenant.most - sum(1 for at_s in times if at_s > since_s)


def _key(tenant: str, chip_class: str) -> str:
    return f"{tenant}|{chip_class}"
