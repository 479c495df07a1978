"""What it costs to go on at another point: a stop and a start, or a standstill where the engine has the same processes go on.

The standstill is the plan's until the task was changed once under its lease, and then what that change cost.

A stop and a start must pay within as long as the task has run since it was started: what was begun just now is not undone for a little more,
and grows no sooner than it pays, since others come and go as fast as they did.  Old tasks are counted over the whole rest of their work.
"""

import math

from qipan.curves import Point
from qipan.events import TaskExited
from qipan.scheduler.bids import Worth, time_left_s
from qipan.scheduler.policies.objectives import OBJECTIVES
from qipan.scheduler.state import State, TaskState

#: a change in place must pay within this time, or the work that is left: so cheap a change is made again when others come and go
PAYS_WITHIN_S = 120.0
#: times its stop and start that a task must have run for to be old, and before it is moved elsewhere
OLD, SETTLED = 64, 20.0


def change_s(state: State, task: TaskState, now: Point, then: Point) -> float:
    """Seconds without progress if the task, which runs at `now`, goes on at `then`."""
    whole_s = now.stop_s + then.start_s
    if not state.settings.in_place:
        return whole_s
    if task.reshape_s is not None:
        return min(task.reshape_s, whole_s)
    known = state.engines.get(task.engine) if task.engine is not None else None
    planned_s = now.standstill_s(then)
    if known is None or not known.in_place or planned_s is None:
        return whole_s
    return min(planned_s, whole_s)


def cost_of(task: TaskState, fact: TaskExited) -> float | None:
    """What a change that has come about cost, as far as it is known; of a task that was started again infinite: no later one in its
    lease is taken to be in place."""
    now, then = task.point(), task.target()
    if now is None or then is None or (fact.in_place and fact.standstill_s is None):
        return task.reshape_s
    return fact.standstill_s if fact.in_place else math.inf


def start_again(task: TaskState, owner: Worth, now: Point, unsaved_s: float = 0.0) -> float:
    """Micro-CNY per second, over the time that is left, that stopping at `now` and starting again would lose."""
    left_s = min(time_left_s(task.order, now, task.done_s), ran_s(task, now, owner.now_s))
    return owner.of_change(now, unsaved_s) / left_s


def unsaved_s(task: TaskState, now: Point) -> float:
    """Work that a stop at `now` would lose: none where it writes a checkpoint first."""
    return 0.0 if now.stop_s > 0 else task.done_s - task.saved_s


def ran_s(task: TaskState, now: Point, now_s: float) -> float:
    """How long the task has run at `now`, counted in whole doublings from its stop and start on, so that prices change seldom; infinite of an
    old one."""
    span_s = unit_s = max(1.0, now.stop_s + now.start_s)
    while span_s < OLD * unit_s and now_s >= task.since_s + 2 * span_s:
        span_s *= 2
    return span_s if span_s < OLD * unit_s else math.inf


def ages_s(task: TaskState, now: Point, now_s: float) -> float | None:
    """When `ran_s` will be more; None: it is old."""
    so_far_s = ran_s(task, now, now_s)
    return task.since_s + 2 * so_far_s if so_far_s < math.inf else None


def settled(task: TaskState, point: Point, now_s: float) -> bool:
    """Whether it has run for so long that it may be moved to another place."""
    return now_s - task.since_s >= SETTLED * (point.start_s + point.stop_s)


def spared(state: State, task: TaskState, owner: Worth, now: Point, then: Point, again: float) -> float:
    """Micro-CNY per second that a change to `then` costs less than starting again (`again`); 0 where it is just that, and under policies
    whose values drift with time: there it would pay to and fro (docs/benchmarks.md)."""
    cost_s = change_s(state, task, now, then)
    if cost_s >= now.stop_s + then.start_s or OBJECTIVES[state.settings.policy].timed:
        return 0.0
    lost_s = now.rate * cost_s
    if then.devices > now.devices:  # whoever joins holds its device while it starts
        lost_s += max(0.0, then.rate - now.rate) * then.start_s
    return max(
        0.0, again - owner.value * lost_s / min(time_left_s(task.order, now, task.done_s), PAYS_WITHIN_S)
    )
