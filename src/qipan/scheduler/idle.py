"""Leases that are held but stand idle, as the rules of this board say (`idle`).

A lease whose devices were busy for less than `below` of the time `for` so long is lent: its holder is told; if the devices stay idle for
the `notice`, the task is parked with its checkpoint, and tasks that park within the notice may borrow what it held.  `qipan wake` takes
it up again: borrowers give the devices back within the notice, and nobody else gets them meanwhile.
"""

import math
from dataclasses import dataclass, replace

from qipan.events import DevicesBusy, TaskWoken
from qipan.leases import EngineId, TaskId
from qipan.quantities import format_devices, format_duration
from qipan.quota import Idle, QuotaRule
from qipan.rules import Holdings, may_borrow
from qipan.scheduler.asks import offered
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState, named_to
from qipan.scheduler.tasks import LentDevices
from qipan.scheduler.transitions import order_stop, to_queue


def idle_rule(state: State, task: TaskState) -> tuple[QuotaRule, Idle] | None:
    """The first that is about what the task holds, or held when it was lent; None for a task that is not parked for standing idle: it
    came from the parent board, which sees for itself, may not be parked, or its kind is protected."""
    if task.parent is not None or not may_borrow(task.order, state.rules):
        return None
    for rule in state.rules:
        covers = any(rule.covers(need.chip_class) for need in task.needs or task.lent)
        if rule.idle is not None and covers and rule.about(task.order.tenant):
            return rule, rule.idle
    return None


def notice_s_of(state: State, task: TaskState) -> float | None:
    """How long before devices that it lent are back their borrowers are told; None: none are kept for it."""
    if task.order.hours is not None:
        return task.order.hours.notice_s
    found = idle_rule(state, task)
    return found[1].notice_s if found is not None else None


def devices_busy(state: State, fact: DevicesBusy, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None or task.engine != fact.engine or fact.attempt < task.attempt:
        return
    found = idle_rule(state, task)
    if found is not None and fact.busy_share < found[1].below:
        since_s = fact.from_s if task.idle_since_s is None else task.idle_since_s
        state.tasks[task.task_id] = replace(task, idle_since_s=since_s)
    elif task.idle_since_s is not None:
        if task.noticed_s is not None:
            draft.because(task.task_id, "notice", "its devices work again; its lease is not lent")
        state.tasks[task.task_id] = replace(task, idle_since_s=None, noticed_s=None)
    if task.parent is not None:
        draft.reports.append(replace(fact, engine=EngineId(state.board)))


def woken(state: State, fact: TaskWoken, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None:
        return
    now_s = draft.moment.now_s
    if task.phase is Phase.PARKED and task.lent:
        draft.because(
            task.task_id, "woken", f"{fact.by} needs it: its devices come back from who borrowed them"
        )
        state.tasks[task.task_id] = replace(to_queue(task, draft), why_waiting="")
    elif task.phase is Phase.STOPPING and task.lent and task.after_stop is AfterStop.KEEP:
        draft.because(task.task_id, "woken", f"{fact.by} needs it: it goes on once it has parked")
        state.tasks[task.task_id] = replace(task, after_stop=AfterStop.QUEUE)
    elif task.idle_since_s is not None:
        draft.because(task.task_id, "woken", f"{fact.by} needs it: its lease is not lent")
        state.tasks[task.task_id] = replace(task, idle_since_s=now_s, noticed_s=None)


def lend_idle(state: State, draft: Draft) -> None:
    now_s = draft.moment.now_s
    for task_id in sorted(state.tasks.idle):
        task = state.tasks[task_id]
        due_s = _due_s(state, task)
        if due_s is None or now_s < due_s:
            continue
        found = idle_rule(state, task)
        assert found is not None, "else it is never due"
        rule, idle = found
        held = format_devices(task.devices)
        notice = format_duration(idle.notice_s)
        if task.noticed_s is None:
            draft.because(
                task_id, "notice",
                f"it kept its {held} busy for less than {idle.below:.0%} of {format_duration(idle.for_s)}; in {notice} it is parked and"
                f" its lease is lent ({rule.name()}), unless it works or is woken (`qipan wake {task_id}`)",
            )  # fmt: skip
            state.tasks[task_id] = replace(task, noticed_s=now_s)
        else:
            why = f"its lease of {held} stood idle and is lent; `qipan wake {task_id}` has them back within {notice}"
            draft.because(task_id, "lent", f"parked with its checkpoint: {why}")
            asleep = replace(task, lent=task.needs, idle_since_s=None, noticed_s=None)
            order_stop(state, asleep, draft, park=True, why=why, after=AfterStop.KEEP)


def next_due_s(state: State) -> float | None:
    times = (_due_s(state, state.tasks[task_id]) for task_id in state.tasks.idle)
    return min((due_s for due_s in times if due_s is not None), default=None)


def _due_s(state: State, task: TaskState) -> float | None:
    """When its holder is told, or its lease is lent."""
    found = idle_rule(state, task)
    if found is None or task.phase is not Phase.RUNNING or task.idle_since_s is None:
        return None
    if _stands_on_lent(state, task):
        return None  # what it borrowed is not lent once more: its owner would share a claim to it
    if task.noticed_s is not None:
        return task.noticed_s + found[1].notice_s
    return task.idle_since_s + found[1].for_s


def _stands_on_lent(state: State, task: TaskState) -> bool:
    chip = task.needs[0].chip_class
    lent = lent_of(state).get(chip)
    return lent is not None and lent.devices > Holdings(offered(state), state.tasks.held_by, {}).free({chip})


@dataclass(frozen=True, slots=True)
class KeptOfLent:
    """Devices of lent leases that a task may not take, of those that were woken and of the others, which may be at borrowers that park within
    `notice_s`; `of`: one such lease."""

    woken: int = 0
    asleep: int = 0
    notice_s: float = math.inf
    of: TaskId | None = None


def kept_of_lent(state: State, task: TaskState, chip: str, stop_s: float, *, parks: bool) -> KeptOfLent:
    """All that were woken are kept; of the others those that the task does not park within the notice of.  Who takes up a lent lease itself is kept
    from none: those that do share them by their bids."""
    lent = lent_of(state).get(chip)
    if lent is None or (task.lent and task.phase is Phase.QUEUED):
        return KeptOfLent()
    asleep = {notice_s: one for notice_s, one in lent.asleep.items() if not parks or stop_s > notice_s}
    first = lent.last_woken or min((first for _, first in asleep.values()), default=None)
    devices = sum(devices for devices, _ in asleep.values())
    return KeptOfLent(woken=lent.woken, asleep=devices, notice_s=min(asleep, default=math.inf), of=first)


def lent_of(state: State) -> dict[str, LentDevices]:
    """Chip class -> what is lent of it.  Of a task that still parks nothing is: it holds its devices."""
    tasks = state.tasks
    if tasks.lent_of is None or tasks.lent_of[0] is not state.rules:
        found: dict[str, LentDevices] = {}
        for task_id in sorted(tasks.lent):
            task = tasks[task_id]
            notice_s = notice_s_of(state, task)
            if notice_s is not None and task.engine is None:
                for need in task.lent:
                    lent = found.setdefault(need.chip_class, LentDevices())
                    if task.phase is Phase.QUEUED:
                        lent.woken, lent.last_woken = lent.woken + need.devices, task_id
                    else:
                        devices, first = lent.asleep.get(notice_s, (0, task_id))
                        lent.asleep[notice_s] = (devices + need.devices, first)
        tasks.lent_of = (state.rules, found)
    return tasks.lent_of[1]


def why_kept(state: State, task: TaskState, chip: str, lent: TaskId) -> str:
    """To the owner of `task`, which may not take the devices of that lease."""
    other = state.tasks[lent]
    devices, name = sum(need.devices for need in other.lent if need.chip_class == chip), named_to(task, other)
    if other.phase is Phase.QUEUED:
        return f"{name} takes up its lease of {format_devices(devices)} again"
    idle = "idle" if other.order.hours is None else "not asked for by its forecast now"
    notice = format_duration(notice_s_of(state, other) or 0.0)
    return f"{format_devices(devices)} of {name}: {idle}, lent to tasks that park within {notice}"


__all__ = [
    "devices_busy", "idle_rule", "kept_of_lent", "lend_idle", "next_due_s", "notice_s_of", "why_kept", "woken",
]  # fmt: skip
