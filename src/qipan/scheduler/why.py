"""Why a task waits: remove one constraint at a time and decide again, on a copy.  Never from templates."""

from collections.abc import Callable
from dataclasses import replace

from qipan.leases import TaskId
from qipan.scheduler.decide import decide
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.scheduler.state import Moment, Phase, State, TaskState

Relax = Callable[[State, TaskState], None]


def why_waiting(state: State, task_id: TaskId, now_s: float, lease_s: float) -> list[dict[str, str]]:
    """For a queued task: each single change that would start it now, and what it runs into as it is.  Empty for a task
    that is not waiting."""
    task = state.tasks.get(task_id)
    if task is None or task.phase is not Phase.QUEUED:
        return []
    found = [{"constraint": "now", "text": why_waiting_text(state, task, now_s)}]
    for name, text, relax in CONSTRAINTS:
        if _starts_without(state, task_id, relax, now_s, lease_s):
            found.append({"constraint": name, "text": text})
    return found


def _starts_without(state: State, task_id: TaskId, relax: Relax, now_s: float, lease_s: float) -> bool:
    copy = decode_state(encode_state(state))
    relax(copy, copy.tasks[task_id])
    decide(copy, (), Moment(now_s, lease_s))
    after = copy.tasks.get(task_id)
    return after is not None and after.phase is not Phase.QUEUED


def _set(state: State, task: TaskState, **changes: object) -> None:
    state.tasks[task.task_id] = replace(task, order=replace(task.order, **changes))  # type: ignore[arg-type]


def _dearer(state: State, task: TaskState) -> None:
    _set(state, task, bid_micro_cny_per_device_hour=task.order.bid_micro_cny_per_device_hour * 100)


def _anywhere(state: State, task: TaskState) -> None:
    _set(state, task, regions=())


def _any_vendor(state: State, task: TaskState) -> None:
    _set(state, task, vendors=())


def _no_deadline(state: State, task: TaskState) -> None:
    _set(state, task, deadline_s=None)


def _unparked(state: State, task: TaskState) -> None:
    state.parked = False


def _asked_again(state: State, task: TaskState) -> None:
    state.tasks[task.task_id] = replace(task, refused=())


def _alone(state: State, task: TaskState) -> None:
    for other in [other for other in state.tasks if other != task.task_id]:
        del state.tasks[other]


CONSTRAINTS: tuple[tuple[str, str, Relax], ...] = (
    ("bid", "a higher limits.max_cost would start it now: dearer tasks hold what it needs", _dearer),
    ("regions", "without limits.regions it would start now", _anywhere),
    ("vendors", "without limits.vendors it would start now", _any_vendor),
    ("deadline", "without its deadline it would start now: no free point meets it", _no_deadline),
    ("parked", "the board is parked; `qipan up` takes it up again", _unparked),
    ("refusals", "engines that refused it lately are asked again in a moment", _asked_again),
    ("other tasks", "it would start now if the other tasks were not there", _alone),
)
