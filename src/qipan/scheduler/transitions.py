"""What several facts and placement do to a task: stop it, queue it, give it back, end it."""

from dataclasses import replace

from qipan.curves import Need
from qipan.events import LeaseGranted, LeaseRefused, Stop
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState, ToEngine


def order_stop(
    state: State, task: TaskState, draft: Draft, *, park: bool, why: str, after: AfterStop
) -> None:
    """Tell the engine to stop; asking twice only changes what follows."""
    engine, lease_id = task.engine, task.lease_id
    assert engine is not None
    assert lease_id is not None
    task = replace(
        task,
        phase=Phase.STOPPING,
        since_s=draft.moment.now_s,
        generation=task.generation + 1,
        after_stop=after,
        stop_why=why,
    )
    state.tasks[task.task_id] = task
    command = Stop(task.task_id, lease_id, state.term, task.generation, park, why)
    draft.commands.append(ToEngine(engine, command))


def tell_granted(state: State, task: TaskState, needs: tuple[Need, ...], draft: Draft) -> None:
    """To the parent that asked; said twice, it changes nothing there."""
    parent = task.parent
    assert parent is not None
    draft.reports.append(
        LeaseGranted(task.task_id, parent.lease_id, EngineId(state.board), parent.generation, needs)
    )


def after_stop(state: State, task: TaskState, draft: Draft, *, reported: bool = False) -> None:
    match task.after_stop:
        case AfterStop.QUEUE:
            state.tasks[task.task_id] = to_queue(task, draft)
        case AfterStop.KEEP:
            state.tasks[task.task_id] = replace(
                to_queue(task, draft), phase=Phase.PARKED, why_waiting=task.stop_why
            )
        case AfterStop.LEND:
            lend(state, task, draft)
        case AfterStop.RETURN:
            if reported:
                state.tasks.pop(task.task_id)
            else:
                give_back(state, task, draft, task.stop_why)
        case AfterStop.END:
            end(state, task, "cancelled", draft, why=task.stop_why, report=not reported)


def lend(state: State, task: TaskState, draft: Draft) -> None:
    """A service's replica that holds nothing and is not asked for now; it is over with its service."""
    assert task.order.hours is not None
    if task.order.hours.over(draft.moment.now_s):
        end(state, task, "done", draft)
    else:
        state.tasks[task.task_id] = replace(to_queue(task, draft), phase=Phase.LENT, why_waiting="")


def to_queue(task: TaskState, draft: Draft) -> TaskState:
    return replace(
        task,
        phase=Phase.QUEUED,
        since_s=draft.moment.now_s,
        engine=None,
        lease_id=None,
        point_id="",
        target_id="",
        needs=(),
        done_s=task.saved_s,
        checkpoint_longer=1.0,
        reshape_s=None,
    )


def give_back(state: State, task: TaskState, draft: Draft, why: str, *, cancelled: bool = False) -> None:
    """Return a task that holds nothing here to the parent."""
    assert task.parent is not None
    parent = task.parent
    state.tasks.pop(task.task_id)
    if cancelled:
        state.over[task.task_id] = "cancelled"
    refuse(state, task.task_id, parent.lease_id, max(task.generation, parent.generation), why, draft)


def refuse(state: State, task_id: TaskId, lease_id: str, generation: int, why: str, draft: Draft) -> None:
    over = state.over.get(task_id, "")
    draft.reports.append(
        LeaseRefused(task_id, LeaseId(lease_id), EngineId(state.board), generation, why, over)
    )


def end(state: State, task: TaskState, how: str, draft: Draft, *, why: str = "", report: bool = True) -> None:
    state.tasks.pop(task.task_id, None)
    state.over[task.task_id] = how
    draft.ended.append((task.task_id, how))
    if task.parent is not None and report:
        refuse(state, task.task_id, task.parent.lease_id, task.generation, why or how, draft)
    if how == "failed":
        draft.because(task.task_id, "failed", why or "the task failed")
    if task.order.stages and task.parent is None:
        _stage_ended(state, task.order, how, draft)


def tell_over(state: State, task: TaskState, engine: EngineId, how: str, draft: Draft) -> None:
    """It ended where it was placed, and the word of that was lost."""
    draft.because(task.task_id, "found", f"it ended at {engine}: {how}", engine=engine)
    end(state, task, how, draft)


def begin_behind(state: State, task: TaskState, draft: Draft) -> None:
    """Into the queue once all that it comes after is done; it ends with one of those that did not get so far."""
    ends = {name: state.over.get(TaskId(name)) for name in task.order.after}
    unfinished = [f"{name} {how}" for name, how in ends.items() if how not in (None, "done")]
    if unfinished:
        cancel(state, task, draft, f"it comes after {', '.join(unfinished)}")
    elif all(how == "done" for how in ends.values()):
        if ends:
            draft.because(task.task_id, "released", f"{', '.join(ends)} done: it may start")
        state.tasks[task.task_id] = replace(task, phase=Phase.QUEUED, since_s=draft.moment.now_s)


def _stage_ended(state: State, order: Order, how: str, draft: Draft) -> None:
    """What waited for it starts.  What feeds it has nobody to prepare for; what it fed would wait for ever if it did not finish."""
    for name in order.stages:
        other = state.tasks.get(TaskId(name))
        if other is None or (other.phase is Phase.STOPPING and other.after_stop is AfterStop.END):
            continue
        if other.phase is Phase.BEHIND and order.task_id in other.order.after:
            begin_behind(state, other, draft)
        elif other.order.feeds == order.task_id:
            cancel(state, other, draft, f"{order.task_id}, which it feeds, is {how}")
        elif order.feeds == name and how != "done":
            cancel(state, other, draft, f"{order.task_id}, which feeds it, {how}")


def cancel(state: State, task: TaskState, draft: Draft, why: str) -> None:
    draft.because(task.task_id, "cancelled", why)
    if task.phase in (Phase.QUEUED, Phase.PARKED, Phase.BEHIND, Phase.LENT):
        end(state, task, "cancelled", draft)
    else:
        order_stop(state, task, draft, park=False, why=why, after=AfterStop.END)


def release_stray(
    state: State, engine: EngineId, task_id: TaskId, lease_id: LeaseId, generation: int, draft: Draft
) -> None:
    """A lease that nobody here wants any more is given back at once."""
    why = "the board no longer wants this lease"
    command = Stop(task_id, lease_id, state.term, generation + 1, True, why)
    draft.commands.append(ToEngine(engine, command))
