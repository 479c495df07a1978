"""Who holds what, after a start.

A store may be older than what the engines do: a backup, or none at all, and nothing in it says so.  So a board that
started raises its term, asks every engine what it holds, and places nothing until all have answered, or until
every lease of an earlier reign has run out by itself.  What an engine holds is taken over; what it does not hold
any more waits again.  An engine that was started again is asked too, and is given nothing before it answers.
"""

from dataclasses import replace

from qipan.events import BoardStarted, EngineOffered, HeldTask, TakeCensus, TasksHeld, TaskStarted
from qipan.leases import EngineId, LeaseId
from qipan.scheduler.asks import asks_of, outs_of
from qipan.scheduler.state import Draft, ParentLease, Phase, State, TaskState, ToEngine
from qipan.scheduler.transitions import (
    after_stop,
    order_stop,
    release_stray,
    tell_granted,
    tell_over,
    to_queue,
)

#: so many ended tasks are named in a census, the newest
OVER_MAX = 10_000
#: every term of a later reign is above those of an earlier one, however often that one started again
TERMS_OF_A_REIGN = 1_000_000


def board_started(state: State, fact: BoardStarted, draft: Draft) -> None:
    lease_s = draft.moment.lease_s
    state.term = max(state.term, fact.reign * TERMS_OF_A_REIGN) + 1
    state.quarantine_until_s = lease_s + state.settings.lease_s + state.settings.margin_s
    state.uncounted.clear()
    for engine in fact.engines:
        ask(state, engine, draft)
    if not fact.same_boot:
        state.renewed_s, state.asked_s = None, lease_s  # times in the store were on another clock
    for task_id, task in state.tasks.items():
        parent = task.parent
        if parent is not None and not fact.same_boot:
            parent = replace(parent, until_lease_s=lease_s)
        elif task.engine is None:
            continue  # it holds no lease
        # whoever had the board since this store's last tick may have renewed what is below just before
        state.tasks[task_id] = replace(task, parent=parent, lease_until_s=lease_s + state.settings.lease_s)


def ask(state: State, engine: EngineId, draft: Draft) -> None:
    state.uncounted[engine] = draft.moment.lease_s
    draft.commands.append(ToEngine(engine, TakeCensus(state.term, draft.moment.lease_s)))


def quarantined(state: State) -> bool:
    return state.quarantine_until_s is not None


def end_quarantine(state: State, draft: Draft) -> None:
    """All have answered, or every lease of an earlier reign is over."""
    until_s = state.quarantine_until_s
    if until_s is not None and (not state.uncounted or draft.moment.lease_s >= until_s):
        state.quarantine_until_s = None
        draft.anew = True


def answer(state: State, draft: Draft) -> None:
    """Tell the parent what can be had and what is held for it, once it is known here."""
    if state.census_asked_s is None or quarantined(state):
        return
    held = tuple(
        HeldTask(
            task.order, task.parent.lease_id, task.generation, task.attempt, _runs(task), task.point_id, task.needs,
            task.place, task.done_s, task.saved_s, max(0.0, task.parent.until_lease_s - draft.moment.lease_s),
            task.parent.answered,
        )
        for task in state.tasks.values()
        if task.parent is not None
    )  # fmt: skip
    here, over = EngineId(state.board), tuple(state.over.items())[-OVER_MAX:]
    state.published, state.published_out = asks_of(state, draft.moment), outs_of(state)
    draft.reports.append(EngineOffered(here, state.published, chooses=True, out=state.published_out))
    draft.reports.append(TasksHeld(here, state.census_term_seen, state.census_asked_s, held, over))
    state.census_asked_s = None


def _runs(task: TaskState) -> bool:
    return task.parent is not None and task.parent.started


def count(state: State, fact: TasksHeld, draft: Draft) -> None:
    """Take over what the engine holds; queue again what it does not."""
    asked_s = state.uncounted.get(fact.engine)
    if asked_s is None or asked_s != fact.asked_lease_s:
        return  # the answer to an earlier question; the newest one's is on its way
    del state.uncounted[fact.engine]
    draft.anew = True
    state.published = ()  # the parent hears the offers anew: what was refused because nobody answered here, it may ask for again
    if fact.term_seen >= state.term:
        state.term = fact.term_seen + 1
    for task_id, how in fact.over:
        known = state.tasks.get(task_id)
        if known is not None:
            tell_over(state, known, fact.engine, how, draft)
        state.over.setdefault(task_id, how)
    held = {entry.order.task_id: entry for entry in fact.held}
    for task_id, entry in held.items():
        if _keeps(state, fact.engine, entry):
            _take_over(state, fact, entry, draft)
        else:
            release_stray(state, fact.engine, task_id, entry.lease_id, entry.generation, draft)
    for task in list(state.tasks.values()):
        if task.engine != fact.engine or task.task_id in held:
            continue
        if task.phase is Phase.STOPPING:
            after_stop(state, task, draft)
            continue
        draft.because(
            task.task_id, "lost", f"{fact.engine} no longer holds it; {task.saved_s:.1f} s of work is kept",
            engine=fact.engine,
        )  # fmt: skip
        state.tasks[task.task_id] = to_queue(task, draft)


def _keeps(state: State, engine: EngineId, held: HeldTask) -> bool:
    """Whether the engine is where the task belongs: it is unknown here, waits, is there, or went there after the
    place that is noted."""
    task_id = held.order.task_id
    if task_id in state.over:
        return False
    known = state.tasks.get(task_id)
    if known is None or known.engine is None or known.engine == engine:
        return True
    return held.generation > known.generation


def _point_of(held: HeldTask) -> str:
    """A lease that was not started names no point: the one that needs what it holds."""
    return next((point.point_id for point in held.order.curve.points if point.needs == held.needs), "")


def _take_over(state: State, fact: TasksHeld, held: HeldTask, draft: Draft) -> None:
    """The engine's word becomes this board's.  A stop that was ordered is ordered again."""
    task_id, lease_s = held.order.task_id, draft.moment.lease_s
    known = state.tasks.get(task_id)
    if known is None:
        own = held.order.own if held.order.above else 0  # else it was this board that said so
        order = replace(held.order, fence=held.order.fence[:-2], own=own)
        known = TaskState(order, Phase.QUEUED, draft.moment.now_s, preempted_s=order.preempted_s)
        if order.above:
            until_s = fact.asked_lease_s + held.lease_left_s
            known = replace(
                known,
                parent=ParentLease(
                    LeaseId(order.above),
                    0,
                    held.generation,
                    until_s,
                    answered=held.granted,
                    started=held.running,
                ),
            )
        where = f"found running at {fact.engine}" if held.running else f"found reserved at {fact.engine}"
        draft.because(task_id, "found", f"{where}; this board did not know it", engine=fact.engine)
    waits = not held.granted and not held.running
    stops = known.phase is Phase.STOPPING and known.engine == fact.engine
    task = replace(
        known,
        phase=Phase.RUNNING if held.running else Phase.RESERVING if waits else Phase.RESERVED,
        since_s=draft.moment.now_s,
        engine=fact.engine,
        lease_id=held.lease_id,
        point_id=held.point_id or _point_of(held) or known.point_id,
        target_id="",
        needs=held.needs or known.needs,
        place=f"{state.board}/{held.place}" if held.place else "",
        generation=max(known.generation, held.generation),
        attempt=held.attempt,
        done_s=held.done_s,
        saved_s=max(known.saved_s, held.saved_s),
        lease_until_s=lease_s + state.settings.lease_s,
        why_waiting="",
        promised_until_s=0.0,
        promised="",
        owed=None,
        lent=known.lent if stops else (),
        checkpoint_longer=held.order.checkpoint_longer,
    )
    # the parent may wait for an answer that was lost with a machine's numbers
    if task.parent is not None and task.phase is Phase.RESERVED:
        task = replace(task, parent=replace(task.parent, answered=True))
        tell_granted(state, task, task.needs, draft)
    elif task.parent is not None and task.phase is Phase.RUNNING and known.phase is Phase.STARTING:
        draft.reports.append(
            TaskStarted(
                task_id, task.parent.lease_id, EngineId(state.board), task.generation, task.attempt,
                task.point_id, task.needs, task.place,
            )
        )  # fmt: skip
    state.tasks[task_id] = task
    if stops:
        park = task.after_stop.value != "end"
        order_stop(state, task, draft, park=park, why=known.stop_why, after=known.after_stop)
