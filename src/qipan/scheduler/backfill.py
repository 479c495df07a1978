"""Devices kept for a wide task that waits for others to end: what may start before it behind it (EASY backfill, Lifka 1995).

Of the waiting tasks that found no seat the dearest one has a reservation at the engine where, by what is left of those that run, its devices are
free soonest.  One that is served after it and may not be parked for it starts there only if it ends before, or takes devices
that the reserved task leaves over.  Tasks that may be parked start as ever: they make room when it can begin.  Without a reservation a
gang waits for as long as narrower tasks keep coming, whatever it bids.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qipan.curves import Point
from qipan.leases import TaskId
from qipan.quantities import format_devices
from qipan.scheduler.bids import time_left_s
from qipan.scheduler.policies import PEERS, RIGID
from qipan.scheduler.seats import Seat
from qipan.scheduler.state import Draft, Phase, State, TaskState

#: one that should have ended by now is expected to run on for so much of the time it has run
OVERDUE = 0.1
#: (when it should give them up, who, devices)
End = tuple[float, TaskId, int]
#: "engine|chip class" -> (devices held when this was made, those of tasks that may be parked, the ends of the others)
Ends = dict[str, tuple[int, int, list[End]]]


@dataclass(slots=True)
class Reservation:
    """`task` can have its devices of `key` at `at_s`; `over`: what it leaves then."""

    task: TaskState
    key: str
    devices: int
    at_s: float
    over: int

    def bars(self, state: State, task: TaskState, key: str, point: Point, now_s: float) -> bool:
        """Whether a task served after it may not start there now."""
        return key == self.key and self._later(state, task, point, now_s) and point.devices > self.over

    def take(self, state: State, task: TaskState, key: str, point: Point, now_s: float) -> None:
        """One that starts takes of what is left over, if it ends later."""
        if key == self.key and self._later(state, task, point, now_s):
            self.over -= point.devices

    def _later(self, state: State, task: TaskState, point: Point, now_s: float) -> bool:
        return not goes_first(state, task) and ends_s(task, point, now_s) > self.at_s


def first_of(state: State) -> TaskState | None:
    """The waiting task that devices are kept for."""
    task = state.tasks.get(TaskId(state.first))
    return task if task is not None and task.phase is Phase.QUEUED else None


def reserves(state: State, task: TaskState) -> bool:
    """Whether devices are kept for the task if it is the first that waits: peers choose by their own rules, a gang of tasks by another."""
    policy = state.settings.policy
    if not state.settings.backfill or policy in RIGID or policy in PEERS or len(task.order.gang) > 1:
        return False
    if task.parent is not None:
        return False  # it goes back to the parent, which keeps devices for it
    return any(point.devices > 1 for point in task.order.curve.points)


def reservation_for(
    state: State, draft: Draft, task: TaskState, seats: Iterable[Seat], free: dict[str, int], ends: Ends
) -> Reservation | None:
    """Where and when a waiting task that fits nowhere can begin first; None when it fits, is not wide, or nobody's end makes room.
    `ends`: kept for the tasks of one tick, since there may be many holders."""
    found = []
    for seat in seats:
        ((key, devices),) = seat.needs
        if free.get(key, 0) < devices:
            parked, rigid = _holders(state, key, ends, draft.moment.now_s)
            one = reserved(task, key, devices, free.get(key, 0) + parked, rigid, draft.moment.now_s)
            found.append(one if one is None else replace(one, devices=seat.point.devices))
    return soonest(found)


def _holders(state: State, key: str, ends: Ends, now_s: float) -> tuple[int, list[End]]:
    """(devices of those that make room when the others have, the ends of the others)."""
    held, known = state.tasks.held.get(key, 0), ends.get(key)
    if known is None or known[0] != held:
        here = (state.tasks[name] for name in state.tasks.at_key.get(key, ()))
        rigid = [one for one in here if not parks(state, one)]  # put in order by `ends_of`
        parked = held - sum(held_of(one, key) for one in rigid)
        known = ends[key] = (held, parked, ends_of(rigid, key, now_s))
    return known[1], known[2]


def soonest(found: Iterable[Reservation | None]) -> Reservation | None:
    return min(
        (one for one in found if one is not None),
        key=lambda one: (one.at_s, one.devices, one.key),
        default=None,
    )


def held_of(task: TaskState, key: str) -> int:
    """Devices that it has of "engine|chip class"."""
    return sum(need.devices for need in task.needs if key.endswith(f"|{need.chip_class}"))


def tell_reserved(state: State, draft: Draft, kept: Reservation | None) -> None:
    """Once for each task that comes first."""
    if kept is None or state.first == kept.task.task_id:
        return
    state.first, state.first_at, wait_s = kept.task.task_id, kept.key, kept.at_s - draft.moment.now_s
    engine = kept.key.split("|")[-1] if kept.key.count("|") > 1 else kept.key.split("|")[0]
    text = f"{engine} keeps {format_devices(kept.devices)} for it: by what is left of those that run it can begin in {wait_s:.0f} s"
    draft.because(kept.task.task_id, "reserved", text, engine=engine)


def ends_of(holders: Iterable[TaskState], key: str, now_s: float) -> list[End]:
    return sorted((_end_s(one, now_s), one.task_id, held_of(one, key)) for one in holders)


def reserved(
    task: TaskState, key: str, devices: int, have: int, ends: Iterable[End], now_s: float
) -> Reservation | None:
    """When so many devices are free beside the `have`, as those that hold some end; None when never, or at once."""
    at_s = now_s
    for end_s, _, held in ends:
        if have >= devices:
            break
        have, at_s = have + held, end_s
    if devices < 2 or have < devices or not now_s < at_s < math.inf:
        return None
    return Reservation(task, key, devices, at_s, have - devices)


def goes_first(state: State, task: TaskState) -> bool:
    """Whether no reservation bars it: it makes room when its devices are wanted, or takes up those that it lent."""
    return parks(state, task) or bool(task.lent)


def parks(state: State, task: TaskState) -> bool:
    """Whether a dearer task can have its devices."""
    return task.order.yields and state.settings.elastic


def ends_s(task: TaskState, point: Point, now_s: float) -> float:
    if task.order.hours is not None:
        return math.inf  # a service ends when it is told to
    return now_s + point.start_s + time_left_s(task.order, point, task.done_s)


def _end_s(task: TaskState, now_s: float) -> float:
    """When it should give up its devices: by its newest progress, or by when it began."""
    point = task.point()
    if task.phase is Phase.STOPPING or point is None:
        return now_s
    if task.order.hours is not None:
        return math.inf
    left_s = time_left_s(task.order, point, task.done_s)
    if task.done_s > task.saved_s:
        return now_s + left_s
    return max(task.since_s + point.start_s + left_s, now_s + OVERDUE * (now_s - task.since_s))
