"""`decide`: facts come in, commands go out.  The same function for every board.

absorb    the facts, in order
census    after a start: nothing is placed until the engines have said what they hold
lapse     leases whose time is over
look      at everything, or at what changed
place     group the tasks, price the capacity, allocate points, order what changed
renew     leases below and the lease above
publish   asks to the parent when they changed
"""

from collections.abc import Sequence
from dataclasses import replace

from qipan.events import EngineOffered, Fact, Renew, RenewalAsked
from qipan.leases import RAN_OUT_ABOVE, EngineId, LeaseId
from qipan.scheduler import census
from qipan.scheduler.absorb import absorb
from qipan.scheduler.asks import asks_of, outs_of
from qipan.scheduler.conditions import watched
from qipan.scheduler.idle import next_due_s
from qipan.scheduler.owners import next_change_s
from qipan.scheduler.place import place
from qipan.scheduler.state import (
    RENEW_SHARE,
    AfterStop,
    Decision,
    Draft,
    Moment,
    Phase,
    State,
    ToEngine,
    lease_for,
    park_at_s,
)
from qipan.scheduler.tides import turn
from qipan.scheduler.transitions import after_stop, give_back, order_stop, to_queue


def decide(state: State, facts: Sequence[Fact], moment: Moment) -> Decision:
    """One tick.  Updates `state` in place; reads nothing else, so the same state, facts and moment give the
    same decision."""
    draft = Draft(moment)
    state.tick += 1
    state.tasks.begin_tick()
    for fact in facts:
        absorb(state, fact, draft)
    census.end_quarantine(state, draft)
    census.answer(state, draft)
    lapse(state, draft)
    look(state, draft)
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


def look(state: State, draft: Draft) -> None:
    """Whether this tick looks at everything, or at what its facts changed: a large board does the first once in a lease's
    time.  Follows from the state and the facts alone, as everything here."""
    lease_s, settings = draft.moment.lease_s, state.settings
    overdue = not state.looked_s <= lease_s < state.looked_s + settings.lease_s
    few = len(state.tasks) <= settings.look_at_all_up_to
    # What one gave back another may take, of any chip class: rules and storage are about several.
    owed = bool(state.tasks.freed) and (bool(state.rules) or watched(state))
    if draft.anew or owed or overdue or few or state.more or census.quarantined(state):
        draft.anew, state.looked_s, state.more = True, lease_s, False
    if state.moves_at_s is not None and state.moves_at_s <= draft.moment.now_s:
        draft.together, state.moves_at_s = True, None


def lapse(state: State, draft: Draft) -> None:
    """A task whose lease from the parent runs out is parked, early enough to have ended by then.  One at an engine silent beyond its lease and the
    margin is placed anew if it asked for that (`on_partition: restart`), or is what its stop was ordered for.  An engine that refused a task may
    be asked again after a while; devices promised to one that did not come are not waited for.  Forecasts change."""
    lease_s, now_s = draft.moment.lease_s, draft.moment.now_s
    for task_id in state.tasks.lease_due.take(lease_s):
        task = state.tasks[task_id]
        if task.parent is not None and task.phase is not Phase.STOPPING and lease_s >= park_at_s(state, task):
            why = RAN_OUT_ABOVE
            if task.phase is Phase.QUEUED:
                give_back(state, task, draft, why)
            else:
                draft.because(task.task_id, "parked", why)
                order_stop(state, task, draft, park=True, why=why, after=AfterStop.RETURN)
        elif state.moves_when_silent(task):
            assert task.engine is not None
            stops = task.phase is Phase.STOPPING
            then = "it counts as stopped" if stops else f"placed anew from {task.saved_s:.1f} s of saved work"
            draft.because(
                task.task_id,
                "moved",
                f"{task.engine} was silent for the whole lease and a margin of {state.settings.margin_s:g} s; {then}",
                engine=task.engine,
            )
            again_s = now_s + state.settings.lease_s
            refused = (*task.refused, (task.engine, again_s))
            task = replace(task, refused=refused, generation=task.generation + 1)
            if stops:
                after_stop(state, task, draft)
            else:
                state.tasks[task.task_id] = to_queue(task, draft)
    for task_id in state.tasks.time_due.take(now_s):
        task = state.tasks[task_id]
        state.tasks[task_id] = replace(
            task,
            refused=tuple(entry for entry in task.refused if entry[1] > now_s),
            promised_until_s=task.promised_until_s if task.promised_until_s > now_s else 0.0,
            promised=task.promised if task.promised_until_s > now_s else "",
            owed=task.owed if task.owed is not None and task.owed[2] > now_s else None,
        )
        turn(state, state.tasks[task_id], draft)


def renew(state: State, draft: Draft) -> None:
    """Leases at directly called engines are renewed every RENEW_SHARE of their time, and when the lease above was;
    those from the parent are asked for as often."""
    lease_s, every_s = draft.moment.lease_s, state.settings.lease_s * RENEW_SHARE
    if state.renewed_s is None or not state.renewed_s <= lease_s < state.renewed_s + every_s:
        state.renewed_s = lease_s
        for engine, known in sorted(state.engines.items()):
            if known.chooses:
                continue
            held = [
                task for task in state.tasks.at(engine) if task.phase not in (Phase.RESERVING, Phase.STOPPING)
            ]
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
        above = tuple(sorted(state.tasks.from_parent))
        if above:
            draft.reports.append(RenewalAsked(EngineId(state.board), above, lease_s))


def publish(state: State, draft: Draft) -> None:
    """What changed of the offers to the parent."""
    if state.top:
        return
    chips = None if draft.anew or not state.published else changed_chips(state, draft)
    if chips is not None and not chips and not draft.outs:
        return
    out = outs_of(state) if draft.outs or draft.anew else state.published_out
    offers = asks_of(state, draft.moment, chips)
    if chips is not None:
        kept = [offer for offer in state.published if offer.chip_class not in chips]
        offers = tuple(sorted((*kept, *offers), key=lambda offer: (offer.chip_class, offer.site)))
    if (offers, out) != (state.published, state.published_out):
        state.published, state.published_out = offers, out
        draft.reports.append(EngineOffered(EngineId(state.board), offers, chooses=True, out=out))


def changed_chips(state: State, draft: Draft) -> set[str]:
    """Chip classes of which this tick may have changed what can be had, or at what price."""
    chips = draft.chips | draft.ordered | {key.split("|")[1] for key in state.tasks.freed}
    for task_id in state.tasks.touched:
        task = state.tasks.get(task_id)
        if task is not None and task.engine is not None:
            chips |= {need.chip_class for need in task.needs}
    return chips


def wake_s(state: State, draft: Draft) -> float | None:
    """When time alone would change something: a renewal, a lease's end, an engine to be asked again.  None when
    nothing is live: an idle board is not woken."""
    tasks = state.tasks
    if not tasks and state.census_asked_s is None:
        return None
    now_s, lease_s, every_s = draft.moment.now_s, draft.moment.lease_s, state.settings.lease_s * RENEW_SHARE
    due = [0.0] if state.more else []
    if state.quarantine_until_s is not None:
        due.append(state.quarantine_until_s - lease_s)
    if any(tasks.at_engine.values()):
        due.append((state.renewed_s or 0.0) + every_s - lease_s)
    if tasks.from_parent:
        due.append(state.asked_s + every_s - lease_s)
    idle_s = next_due_s(state)
    if idle_s is not None:
        due.append(idle_s - now_s)
    if state.moves_at_s is not None:
        due.append(state.moves_at_s - now_s)
    rules_s = next_change_s(state, now_s)
    if rules_s is not None:
        due.append(rules_s - now_s)
    lease_due_s, time_due_s = tasks.lease_due.next_s(), tasks.time_due.next_s()
    if lease_due_s is not None:
        due.append(lease_due_s - lease_s)
    if time_due_s is not None:
        due.append(time_due_s - now_s)
    return now_s + max(min(due), 0.05) if due else None
