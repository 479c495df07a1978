"""`decide`: facts come in, commands go out.  The same function for every board.

absorb    the facts, in order
census    after a start: nothing is placed until the engines have said what they hold
lapse     leases whose time is over
place     group the tasks, price the capacity, allocate points, order what changed
renew     leases below and the lease above
publish   asks to the parent when they changed
"""

from collections.abc import Sequence
from dataclasses import replace

from qipan.events import EngineOffered, Fact, Renew, RenewalAsked
from qipan.leases import EngineId, LeaseId
from qipan.scheduler import census
from qipan.scheduler.absorb import absorb
from qipan.scheduler.asks import asks_of
from qipan.scheduler.place import place
from qipan.scheduler.state import (
    RENEW_SHARE,
    AfterStop,
    Decision,
    Draft,
    Moment,
    Phase,
    State,
    TaskState,
    ToEngine,
    lease_for,
    parking_s,
)
from qipan.scheduler.transitions import give_back, order_stop, to_queue


def decide(state: State, facts: Sequence[Fact], moment: Moment) -> Decision:
    """One tick.  Updates `state` in place; reads nothing else, so the same state, facts and moment give the
    same decision."""
    draft = Draft(moment)
    state.tick += 1
    for fact in facts:
        absorb(state, fact, draft)
    census.end_quarantine(state, draft)
    census.answer(state, draft)
    lapse(state, draft)
    if not census.quarantined(state):
        place(state, draft)
    renew(state, draft)
    publish(state, draft)
    return Decision(
        state.board,
        state.term,
        state.tick,
        tuple(draft.commands),
        tuple(draft.reports),
        tuple(draft.reasons),
        tuple(draft.ended),
        wake_s(state, draft),
    )


def lapse(state: State, draft: Draft) -> None:
    """A task whose lease from the parent runs out is parked, early enough to have ended by then.  One at an engine silent beyond its lease and the
    margin is placed anew if it asked for that (`on_partition: restart`)."""
    for task in list(state.tasks.values()):
        if task.parent is not None and draft.moment.lease_s >= _park_at_s(state, task):
            why = "the lease from the parent board ran out"
            if task.phase is Phase.QUEUED:
                give_back(state, task, draft, why)
            elif task.phase is not Phase.STOPPING:
                draft.because(task.task_id, "parked", why)
                order_stop(state, task, draft, park=True, why=why, after=AfterStop.RETURN)
            continue
        if task.engine is None or not state.engines[task.engine].chooses:
            continue
        silent_s = draft.moment.lease_s - task.lease_until_s - state.settings.margin_s
        if task.phase is not Phase.RESERVING and silent_s >= 0 and task.order.on_partition == "restart":
            draft.because(
                task.task_id,
                "moved",
                f"{task.engine} was silent for the whole lease and a margin of {state.settings.margin_s:g} s;"
                f" placed anew from {task.saved_s:.1f} s of saved work",
                engine=task.engine,
            )
            again_s = draft.moment.now_s + state.settings.lease_s
            state.tasks[task.task_id] = replace(
                to_queue(task, draft),
                refused=(*task.refused, (task.engine, again_s)),
                generation=task.generation + 1,
            )


def _park_at_s(state: State, task: TaskState) -> float:
    """When a task from the parent must begin to park, on the lease clock."""
    assert task.parent is not None
    early_s = parking_s(task, state.settings.lease_s) if task.phase is not Phase.QUEUED else 0.0
    return task.parent.until_lease_s - early_s


def renew(state: State, draft: Draft) -> None:
    """Leases at directly called engines are renewed every RENEW_SHARE of their time, and when the lease above was;
    those from the parent are asked for as often."""
    lease_s, every_s = draft.moment.lease_s, state.settings.lease_s * RENEW_SHARE
    if state.renewed_s is None or not state.renewed_s <= lease_s < state.renewed_s + every_s:
        state.renewed_s = lease_s
        for engine, known in sorted(state.engines.items()):
            held = [
                task
                for task in state.tasks.values()
                if task.engine == engine and task.phase not in (Phase.RESERVING, Phase.STOPPING)
            ]
            if known.chooses or not held:
                continue
            renewed: dict[float, list[LeaseId]] = {}  # seconds -> leases
            for task in held:
                duration_s = lease_for(state, task, draft.moment)
                if duration_s > 0 and task.lease_id:
                    state.tasks[task.task_id] = replace(task, lease_until_s=lease_s + duration_s)
                    renewed.setdefault(duration_s, []).append(task.lease_id)
            for duration_s, leases in sorted(renewed.items()):
                draft.commands.append(ToEngine(engine, Renew(tuple(leases), state.term, duration_s)))
    if lease_s >= state.asked_s + every_s or lease_s < state.asked_s:
        state.asked_s = lease_s
        above = tuple(task.parent.lease_id for task in state.tasks.values() if task.parent is not None)
        if above:
            draft.reports.append(RenewalAsked(EngineId(state.board), above, lease_s))


def publish(state: State, draft: Draft) -> None:
    if state.top:
        return
    offers = asks_of(state, draft.moment)
    if offers != state.published:
        state.published = offers
        draft.reports.append(EngineOffered(EngineId(state.board), offers, chooses=True))


def wake_s(state: State, draft: Draft) -> float | None:
    """When time alone would change something: a renewal, a lease's end, an engine to be asked again.  None when
    nothing is live: an idle board is not woken."""
    if not state.tasks and state.census_asked_s is None:
        return None
    now_s, lease_s, every_s = draft.moment.now_s, draft.moment.lease_s, state.settings.lease_s * RENEW_SHARE
    due = []
    if state.quarantine_until_s is not None:
        due.append(state.quarantine_until_s - lease_s)
    if any(task.engine is not None for task in state.tasks.values()):
        due.append((state.renewed_s or 0.0) + every_s - lease_s)
    for task in state.tasks.values():
        if task.parent is not None:
            due.append(state.asked_s + every_s - lease_s)
            if task.phase is not Phase.STOPPING:
                due.append(_park_at_s(state, task) - lease_s)
        if task.phase is Phase.QUEUED:
            due += [again_s - now_s for _, again_s in task.refused if again_s > now_s]
            if task.promised_until_s > now_s:
                due.append(task.promised_until_s - now_s)
        elif (
            task.order.on_partition == "restart"
            and task.phase is not Phase.RESERVING
            and task.engine is not None
            and state.engines[task.engine].chooses
        ):
            due.append(task.lease_until_s + state.settings.margin_s - lease_s)
    return now_s + max(min(due), 0.05) if due else None
