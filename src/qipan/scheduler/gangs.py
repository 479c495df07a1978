"""Gangs: tasks that start together or not at all.

All of a gang that wait are in line for places together; they take their seats at once, and start when the leases of all are granted.  Where
seats were found for a part of one only, others find theirs without it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from qipan.leases import EngineId, TaskId
from qipan.scheduler.bids import Worth, worth_of
from qipan.scheduler.children import ChildSeat, children_of, choose, rank_of
from qipan.scheduler.conditions import set_down
from qipan.scheduler.seats import Seat, barred
from qipan.scheduler.state import RUNS, AfterStop, Draft, Phase, State, TaskState
from qipan.scheduler.tasks import Group

#: so often seats are sought again without the gangs of which only a part found one
PASSES = 16

#: waiting task of a gang -> those in line with it
Lines = dict[TaskId, list[TaskState]]


def gang_in_line(state: State, task: TaskState) -> list[TaskState]:
    """The tasks of its gang that wait for places together, itself among them, with those that come back to the queue once they have
    parked; none when it need not wait for others: it came from the parent, or joins one that runs."""
    if task.parent is not None:
        return []
    gang = [one for name in task.order.gang if (one := state.tasks.get(TaskId(name))) is not None]
    if any(one.phase in RUNS for one in gang):
        return []
    return [
        one
        for one in gang
        if one.phase is Phase.QUEUED or (one.phase is Phase.STOPPING and one.after_stop is AfterStop.QUEUE)
    ]


def gang_is_held(state: State, task: TaskState) -> bool:
    """A gang starts when the leases of all its parts are granted; until then they wait, or lapse.  A part that comes
    back later joins what runs.  One that is not here has not come yet, or, once this one has run, is over."""
    others = [state.tasks.get(TaskId(name)) for name in task.order.gang if name != task.task_id]
    if task.parent is not None or any(one is not None and one.phase in RUNS for one in others):
        return True
    waits = (Phase.QUEUED, Phase.RESERVING, Phase.STOPPING)
    return all(one.phase not in waits if one is not None else task.attempt > 0 for one in others)


def lines_of(state: State, names: Iterable[TaskId]) -> Lines:
    return {name: gang_in_line(state, state.tasks[name]) for name in sorted(names)}


def torn(lines: Lines, chosen: Collection[str]) -> set[TaskId]:
    """Those of the chosen tasks whose gang was not chosen as a whole."""
    return {
        name
        for name, line in lines.items()
        if name in chosen and any(one.task_id not in chosen for one in line)
    }


@dataclass(slots=True)
class Aside:
    """Waiting tasks that others find their seats without, since only parts of their gangs found some: for this tick, or while it is seen
    whether the dearest of such gangs finds its seats once the others leave it theirs."""

    for_tick: set[TaskId] = field(default_factory=set)
    for_now: set[TaskId] = field(default_factory=set)
    passes: int = 0

    @property
    def names(self) -> set[TaskId]:
        return self.for_tick | self.for_now

    def take(self, state: State, parts: Collection[TaskId], draft: Draft) -> set[TaskId]:
        """Puts all but the dearest of the torn gangs aside, or that one when it is alone; returns who is no longer aside."""
        if not parts:
            return set()
        self.passes += 1
        now_s, policy = draft.moment.now_s, state.settings.policy
        first = min((state.tasks[name] for name in parts), key=lambda task: rank_of(task, now_s, policy))
        others = {*parts} - {TaskId(name) for name in first.order.gang}
        if others and self.passes < PASSES // 2:
            self.for_now |= others
            return set()
        self.for_tick |= {*parts}
        back, self.for_now = self.for_now - self.for_tick, set()
        return back


def gang_fits(
    state: State, draft: Draft, line: list[TaskState], chosen: Mapping[str, Seat], free: Mapping[str, int]
) -> bool:
    """A gang takes its seats together or not at all: of two that held half of each other's, both would wait for ever."""
    needed: dict[str, int] = {}
    for one in line:
        seat = chosen.get(one.task_id)
        if seat is None:
            return False
        for key, devices in seat.needs:
            needed[key] = needed.get(key, 0) + devices
    if any(free.get(key, 0) < devices for key, devices in needed.items()):
        return False
    return _barred_of(state, draft, line, chosen) is None


def _barred_of(
    state: State, draft: Draft, line: list[TaskState], chosen: Mapping[str, Seat]
) -> TaskId | None:
    """The first of a gang that may not have its seat once those before it have theirs; None when all may."""
    taken: dict[tuple[str, str], int] = {}
    trial = replace(draft, placed=draft.placed.copy())
    for one in line:
        seat = chosen[one.task_id]
        if barred(state, trial, one, seat, taken):
            return one.task_id
        set_down(state, trial, one, seat.engine, seat.point)
        for need in seat.point.needs:
            by = (one.order.tenant, str(need.chip_class))
            taken[by] = taken.get(by, 0) + need.devices
    return None


def barred_of_gangs(state: State, draft: Draft, lines: Lines, chosen: Mapping[str, Seat]) -> dict[str, str]:
    """Task -> the seat that it may not have beside those of its gang: what such a gang bids for would only be kept from others.  Every
    gang in `chosen` is there as a whole."""
    found = {}
    for name, line in lines.items():
        if name in chosen and line and line[0].task_id == name:
            task_id = _barred_of(state, draft, line, chosen)
            if task_id is not None:
                found[str(task_id)] = chosen[task_id].key
    return found


def choose_whole_gangs(
    state: State, draft: Draft, boards: Collection[EngineId], groups: list[Group], most: int
) -> list[tuple[TaskState, ChildSeat]]:
    """As `choose`, where a gang takes its seats together or not at all; what only a part of one could have is for others."""
    tasks = state.tasks
    if not tasks.gangs:
        return choose(children_of(state, draft, boards), groups, most)
    lines = lines_of(state, tasks.gangs)
    keys = {group.key for group in groups}
    of = {
        name: [tasks.group_of[one.task_id] for one in line if one.phase is Phase.QUEUED]
        for name, line in lines.items()
    }
    looked = {
        group.key: group for name in lines if any(one.key in keys for one in of[name]) for group in of[name]
    }
    groups = [*groups, *(group for key, group in looked.items() if key not in keys)]
    children = children_of(state, draft, boards)
    seated = {key: bool(children.seats(*_first(state, group, draft), 1)[0]) for key, group in looked.items()}
    aside = Aside(
        {
            name
            for name, line in lines.items()
            if len(of[name]) < len(line) or not all(seated.get(group.key, True) for group in of[name])
        }
    )
    chosen: list[tuple[TaskState, ChildSeat]] = []

    def stand_again(names: set[TaskId]) -> None:
        for name in names:
            tasks.group_of[name].members.add(name)
        tasks.stay(sorted(names))

    for number in range(PASSES):
        for name in aside.names:
            tasks.group_of[name].members.discard(name)
        chosen = choose(children_of(state, draft, boards), [group for group in groups if group.members], most)
        found = {task.task_id for task, _ in chosen}
        parts = torn(lines, found)
        if not parts:
            break
        tasks.ask_anew(sorted(found))
        stand_again(aside.take(state, parts, draft))
        chosen = [] if number == PASSES - 1 else chosen
    stand_again(aside.names)
    return chosen


def _first(state: State, group: Group, draft: Draft) -> tuple[TaskState, Worth]:
    """A member of the group and what it is worth: its others are alike."""
    task = state.tasks[min(group.members)]
    return task, worth_of(task.order, task.done_s, draft.moment.now_s, state.settings.policy)
