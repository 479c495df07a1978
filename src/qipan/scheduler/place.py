"""Placement: group, price, allocate, order.

Engines that take one point (`leaves`) are allocated together.  Engines that choose (boards) are asked one at a time, the best first.
"""

from dataclasses import replace

from qipan.events import Start
from qipan.leases import TaskId
from qipan.scheduler.asks import SECONDS_PER_HOUR, child_key
from qipan.scheduler.backfill import first_of
from qipan.scheduler.bids import worth_of
from qipan.scheduler.children import ChildSeat, children_of
from qipan.scheduler.entered import HOME, leads_to, share_at
from qipan.scheduler.gangs import choose_whole_gangs, gang_is_held
from qipan.scheduler.idle import lend_idle
from qipan.scheduler.leaves import allocate_leaves
from qipan.scheduler.limits import why_not_at, why_waiting_text
from qipan.scheduler.migration import migrate
from qipan.scheduler.moves import Moves, worth_there
from qipan.scheduler.owners import reclaim
from qipan.scheduler.seats import reserve, usable_engines, usable_points
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState, ToEngine
from qipan.scheduler.tasks import Group
from qipan.scheduler.transitions import give_back, order_stop


def place(state: State, draft: Draft) -> None:
    start_granted(state, draft)
    if not state.parked:
        lend_idle(state, draft)
        groups = groups_to_look_at(state, draft)
        allocate_leaves(state, draft, groups)
        ask_boards(state, draft, groups)
        reclaim(state, draft)
    return_unplaced(state, draft)
    return_torn(state, draft)
    if first_of(state) is None:  # it waits no more: when it does again, it is told so again
        state.first = state.first_at = ""


def groups_to_look_at(state: State, draft: Draft) -> list[Group]:
    """All that wait, or those that something may have changed for: a member came, or more of a chip class that it could use can be
    had."""
    if draft.anew:
        return list(state.tasks.groups.values())
    tasks, found = state.tasks, {}
    for task_id in tasks.touched:
        group = tasks.group_of.get(task_id)
        if group is not None:
            found[group.key] = group
    chips = draft.chips | {key.split("|")[1] for key in tasks.freed}
    if chips:
        found.update((key, group) for key, group in tasks.groups.items() if chips & group.chips)
    return list(found.values())


def start_granted(state: State, draft: Draft) -> None:
    """A granted lease is started at once, or, for a task from the parent, when its Start has come."""
    for task in state.tasks.in_phase(Phase.RESERVED):
        if task.parent is not None and not task.parent.started:
            continue
        assert task.engine is not None
        if task.engine in state.uncounted or not gang_is_held(state, task):
            continue
        assert task.lease_id is not None
        if state.engines[task.engine].chooses:
            points = tuple(usable_points(task, state.engines[task.engine].offers))
            if not task.order.elastic:
                points = tuple(point for point in points if point.point_id == task.point_id)
        else:
            points = (task.order.curve.point(task.point_id),)
        task = replace(
            task,
            phase=Phase.STARTING,
            since_s=draft.moment.now_s,
            generation=task.generation + 1,
            attempt=task.attempt + 1,
        )
        state.tasks[task.task_id] = task
        assert task.engine is not None
        assert task.lease_id is not None
        command = Start(task.task_id, task.lease_id, state.term, task.generation, task.attempt, points)
        draft.commands.append(ToEngine(task.engine, command))


def ask_boards(state: State, draft: Draft, groups: list[Group]) -> None:
    boards = usable_engines(state, chooses=True)
    if not boards or not (groups or draft.anew):
        return
    groups = [group for group in groups if group.members]
    most = state.settings.orders_per_tick
    chosen = choose_whole_gangs(state, draft, boards, groups, most)
    state.more = len(chosen) == most
    if draft.anew and not state.more:
        migrate(state, draft, children_of(state, draft, boards))
    for task, seat in chosen:
        key = child_key(seat.engine, seat.offer)
        state.sent_down[key] = state.sent_down.get(key, 0) + seat.point.devices
        draft.ordered.add(seat.offer.chip_class)
        if task.order.entered_at:
            tell_rise(state, draft, task, seat)
        reserve(state, task, seat.engine, seat.point, draft)


def tell_rise(state: State, draft: Draft, task: TaskState, seat: ChildSeat) -> None:
    """Why it is placed elsewhere than where it was submitted, at a board that has both below it."""
    board = task.order.entered_at
    way = leads_to(state, board)
    if way is None or share_at(board, way, seat.engine, seat.offer) == HOME:
        return
    there, now_s = seat.offer.site or seat.engine, draft.moment.now_s
    owner = worth_of(task.order, task.done_s, now_s, state.settings.policy)
    move = Moves(state, task).to(seat.offer.site)
    worth = (
        worth_there(owner, seat.point, seat.offer.tariff_micro_cny_per_device_hour, move) * SECONDS_PER_HOUR
    )
    draft.because(
        task.task_id,
        "rose",
        f"submitted at {board}, goes to {there}, where {seat.point.point_id} is worth {worth / 1e6:.4f} CNY/h:"
        f" {why_not_at(state, task, way, board, now_s)}",
        engine=seat.engine,
        entered_at=board,
    )


def return_unplaced(state: State, draft: Draft) -> None:
    """A task from the parent that found no place here goes back to it: the parent asks the next best.  One that
    waits for devices which a cheaper task was told to give up stays."""
    for task_id in sorted(state.tasks.from_parent_waiting):
        task = state.tasks[task_id]
        if task.promised_until_s <= draft.moment.now_s:
            give_back(state, task, draft, why_waiting_text(state, task, draft.moment.now_s))


def return_torn(state: State, draft: Draft) -> None:
    """One of a gang that has held its lease for a lease's time while another found no place, because an engine refused it, say, goes
    back to the queue: all are placed together again."""
    for task in state.tasks.in_phase(Phase.RESERVED):
        mates = [state.tasks.get(TaskId(name)) for name in task.order.gang]
        waits = [one.task_id for one in mates if one is not None and one.phase is Phase.QUEUED]
        held_s = draft.moment.now_s - task.since_s
        if (
            task.parent is None
            and waits
            and held_s >= state.settings.lease_s
            and not gang_is_held(state, task)
        ):
            why = f"{', '.join(waits)}, with which it starts, found no place for {held_s:.0f} s"
            draft.because(task.task_id, "returned", why)
            order_stop(state, task, draft, park=True, why=why, after=AfterStop.QUEUE)
