"""Running tasks move between children when the gap in price beats the cost of moving.

A task that runs at a child is valued at the present asks of all children as if it waited; where one place is worth so much more than staying,
over the rest of its work, that stopping, bringing its data and checkpoint over and starting again are paid for GAIN times, it is parked and
placed anew.  The board where it was submitted does this, once in a lease's time, a few tasks at a time.
"""

from bisect import bisect_right
from dataclasses import replace

from qipan.quantities import format_money
from qipan.scheduler.bids import time_left_s, worth_of
from qipan.scheduler.children import Children, ChildSeat
from qipan.scheduler.moves import checkpoint_at
from qipan.scheduler.policies import RIGID
from qipan.scheduler.reshaping import settled
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState
from qipan.scheduler.transitions import order_stop

#: running tasks valued in one look, and moved at most
LOOKED_AT, MOVED = 128, 8
#: times that the gain must pay for the move; and the least gain, of what staying is worth: asks change from minute to minute
GAIN, LEAST_GAIN = 8.0, 0.5


def migrate(state: State, draft: Draft, children: Children) -> None:
    """After those that wait were served: `children` has what is left.  A seat found here is only told from the others' in this tick, and
    free again until its task has parked and is placed."""
    lease_s, every_s = draft.moment.lease_s, state.settings.lease_s
    if state.settings.policy in RIGID or not state.settings.elastic:
        return
    if state.migrated_s <= lease_s < state.migrated_s + every_s:
        return
    state.migrated_s = lease_s
    running = sorted(state.tasks.by_phase.get(Phase.RUNNING, ()))
    first = bisect_right(running, state.migrated_to)
    looked = (running[first:] + running[:first])[:LOOKED_AT]
    moved = 0
    for task_id in looked:
        state.migrated_to = task_id
        task = state.tasks[task_id]
        found = _better(state, draft, children, task) if _may_move(state, task, draft) else None
        if found is None:
            continue
        seat, gain, cost = found
        seat.table.take(seat.row, seat.point.devices)
        there = seat.offer.site or seat.engine
        why = f"moves from {checkpoint_at(task) or task.engine} to {there}"
        draft.because(
            task_id,
            "migrated",
            f"{why} at {seat.point.point_id}: worth {format_money(round(gain))} more over the rest of its work,"
            f" the move costs {format_money(round(cost))}",
            engine=seat.engine,
        )
        order_stop(state, task, draft, park=True, why=why, after=AfterStop.QUEUE)
        state.tasks.asks = None  # not ordered: the next tick asks as a state read from a snapshot would
        moved += 1
        if moved == MOVED:
            return


def _may_move(state: State, task: TaskState, draft: Draft) -> bool:
    point, order = task.point(), task.order
    if task.parent is not None or point is None or task.engine is None or order.gang:
        return False
    if not (order.yields and state.engines[task.engine].chooses):
        return False
    now_s = draft.moment.now_s
    return now_s - task.since_s >= state.settings.lease_s and settled(task, point, now_s)


def _better(
    state: State, draft: Draft, children: Children, task: TaskState
) -> tuple[ChildSeat, float, float] | None:
    """The seat that pays for the move, what it gains over the rest of the work and what the move costs, in micro-CNY."""
    point, here, now_s = task.point(), checkpoint_at(task), draft.moment.now_s
    assert point is not None
    assert task.engine is not None
    tariffs = [
        offer.tariff_micro_cny_per_device_hour
        for offer in state.engines[task.engine].offers
        if offer.chip_class == point.needs[0].chip_class and offer.site == here
    ]
    if not tariffs:
        return None
    done_s = _done_s(task, now_s)
    owner = worth_of(task.order, done_s, now_s, state.settings.policy)
    stay = owner.of(point, tariffs[0], running=True)
    cost = owner.of_change(point, 0.0)
    there = replace(task.order, entered_at="")  # once it runs, where it was submitted is one place of many
    parked = replace(task, order=there, saved_s=max(task.saved_s, done_s))  # its checkpoint would come along
    seats, _ = children.seats(parked, owner, 8)
    for score, _, seat in seats:
        if seat.offer.site == here and seat.engine == task.engine:
            continue
        gain = (-score - stay) * time_left_s(task.order, seat.point, done_s)
        if gain > GAIN * cost and -score > (1 + LEAST_GAIN) * stay:
            return seat, gain, cost
        return None  # the others are worth less
    return None


def _done_s(task: TaskState, now_s: float) -> float:
    """As it was reported, or as it should be by now."""
    point = task.point()
    assert point is not None
    ran_s = max(0.0, now_s - task.since_s - point.start_s)
    return min(task.order.curve.work_s, max(task.done_s, task.saved_s + ran_s * point.rate))
