"""Services by their forecasts: a replica that is not asked for is parked and what it held is lent; before it is asked for again it
stands in the queue, early enough for those that borrowed to give way and for it to start.

The board where it was submitted sees to it.  While it is lent its devices go to tasks that park within its notice (`kept_of_lent` in
`idle`), and come back by its bid, or, where that is not enough, by right (`reclaim` in `owners`).
"""

import math
from dataclasses import replace

from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState
from qipan.scheduler.transitions import lend, order_stop, to_queue


def turn(state: State, task: TaskState, draft: Draft) -> None:
    """The replica as its forecast wants it now; the next change of that is noted, so that the board is woken for it."""
    hours, now_s = task.order.hours, draft.moment.now_s
    if hours is None or task.parent is not None or (task.turns_s is not None and task.turns_s > now_s):
        return
    next_s = hours.next_change_s(now_s)
    task = state.tasks[task.task_id] = replace(task, turns_s=math.inf if next_s is None else next_s)
    if hours.wanted(now_s):
        _rise(state, task, draft)
    elif task.phase is Phase.STOPPING:
        if task.after_stop is AfterStop.QUEUE or (task.after_stop is AfterStop.KEEP and hours.over(now_s)):
            state.tasks[task.task_id] = replace(task, after_stop=AfterStop.LEND)
    elif task.engine is not None:
        why = hours.lent_text(now_s)
        draft.because(task.task_id, "lent", why)
        task = replace(task, lent=task.needs)
        order_stop(state, task, draft, park=True, why=why, after=AfterStop.LEND)
    elif hours.over(now_s) or task.phase is Phase.QUEUED:
        lend(state, task, draft)


def _rise(state: State, task: TaskState, draft: Draft) -> None:
    if task.phase is Phase.STOPPING and task.after_stop is AfterStop.LEND:
        state.tasks[task.task_id] = replace(task, after_stop=AfterStop.QUEUE)
    elif task.phase is Phase.LENT:
        hours, now_s = task.order.hours, draft.moment.now_s
        assert hours is not None
        asked_s = hours.next_asked_s(now_s)
        at = f" at {hours.clock(asked_s, now_s)}" if asked_s is not None else ""
        text = f"the forecast asks for replica {hours.replica}{at}; it is given devices from now on"
        draft.because(task.task_id, "asked", text)
        state.tasks[task.task_id] = replace(to_queue(task, draft), why_waiting="")
