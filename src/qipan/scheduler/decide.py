"""`decide`: facts come in, commands go out.  The same function for every board.

absorb    the facts, in order
lapse     leases whose time is over
place     group the tasks, price the capacity, allocate points, order what changed
renew     leases below and the lease above
publish   asks to the parent when they changed
"""

from collections.abc import Sequence
from dataclasses import replace

from qipan.events import EngineOffered, Fact, Renew, RenewalAsked
from qipan.leases import EngineId
from qipan.scheduler.absorb import absorb, give_back, order_stop, to_queue
from qipan.scheduler.asks import asks_of
from qipan.scheduler.place import place
from qipan.scheduler.state import AfterStop, Decision, Draft, Moment, Phase, State, ToEngine


def decide(state: State, facts: Sequence[Fact], moment: Moment) -> Decision:
    """One tick.  Updates `state` in place; reads nothing else, so the same state, facts and moment give the
    same decision."""
    draft = Draft(moment)
    state.tick += 1
    for fact in facts:
        absorb(state, fact, draft)
    lapse(state, draft)
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
    """A task whose lease from the parent ran out is parked.  One at an engine silent beyond its lease and the
    margin is placed anew if it asked for that (`on_partition: restart`)."""
    for task in list(state.tasks.values()):
        if task.parent is not None and draft.moment.lease_s >= task.parent.until_lease_s:
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


def renew(state: State, draft: Draft) -> None:
    """Leases at directly called engines are renewed every third of their time; those from the parent are asked
    for as often."""
    lease_s, every_s = draft.moment.lease_s, state.settings.lease_s / 3
    if lease_s >= state.renewed_s + every_s or lease_s < state.renewed_s:
        state.renewed_s = lease_s
        for engine, known in sorted(state.engines.items()):
            held = [
                task
                for task in state.tasks.values()
                if task.engine == engine and task.phase not in (Phase.RESERVING, Phase.STOPPING)
            ]
            if known.chooses or not held:
                continue
            for task in held:
                state.tasks[task.task_id] = replace(task, lease_until_s=lease_s + state.settings.lease_s)
            leases = tuple(task.lease_id for task in held if task.lease_id)
            draft.commands.append(ToEngine(engine, Renew(leases, state.term, state.settings.lease_s)))
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
    if not state.tasks:
        return None
    now_s, lease_s, every_s = draft.moment.now_s, draft.moment.lease_s, state.settings.lease_s / 3
    due = []
    if any(task.engine is not None for task in state.tasks.values()):
        due.append(state.renewed_s + every_s - lease_s)
    for task in state.tasks.values():
        if task.parent is not None:
            due += [state.asked_s + every_s - lease_s, task.parent.until_lease_s - lease_s]
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
