"""Free devices that lie scattered: small tasks are moved out of a block, so that a gang that fits into one finds it free.

A gang over two blocks though one could hold it is worth STRADDLED of its progress (`asks`).  Where enough devices are free and no block has so
many, tasks that hold some of one are parked with their checkpoints and placed anew in another block that has room for them, when what the gang
gains over the rest of its work pays PAYS times for what that loses: each mover's stop, start and unsaved work, and the gang's wait.  Only
tasks that may be parked for others are moved, as often as the rules of preemption let them be, and only once they have run for a while.
The gang waits meanwhile with its devices kept for it, at most until the movers must have stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qipan.leases import EngineId, Holders, TaskId
from qipan.quantities import format_devices, format_money
from qipan.rules import may_borrow
from qipan.scheduler.asks import STRADDLED, engine_key
from qipan.scheduler.bids import worth_of
from qipan.scheduler.movable import makes_room
from qipan.scheduler.policies import RIGID
from qipan.scheduler.preemptions import note, within_limits
from qipan.scheduler.reshaping import settled, unsaved_s
from qipan.scheduler.seats import Seat
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState, named_to
from qipan.scheduler.transitions import order_stop

#: times that the gain must pay for the moves
PAYS = 4.0


def waits_for_block(state: State, draft: Draft, task: TaskState, seat: Seat) -> bool:
    """Whether a waiting task, for which enough devices are free at its seat, shall wait for a block; orders the moves where they pay."""
    count, now_s = seat.point.devices, draft.moment.now_s
    short = [block.size for block in seat.offer.blocks if block.size >= count > block.free]
    if count < 2 or not short or len(task.order.gang) > 1 or _unseated(state, seat):
        return False
    blocks = [block for block in seat.offer.holders if block.size == short[0]]
    if task.promised_until_s > now_s:
        return any(_leaves(state, block) >= count for block in blocks)
    if not state.settings.defragment or state.settings.policy in RIGID:
        return False
    ways = [(_cost(state, draft, task, seat, movers), movers) for movers in _ways(state, draft, seat, blocks)]
    if not ways:
        return False
    cost, movers = min(ways, key=lambda way: (way[0], [one.task_id for one in way[1]]))
    value = worth_of(task.order, task.done_s, now_s, state.settings.policy).value
    gain = (1 - STRADDLED) * value * (task.order.curve.work_s - task.done_s)
    if gain <= PAYS * cost:
        return False
    told = f"it gains {format_money(round(gain))}, the move costs {format_money(round(cost))}"
    for one in movers:
        why = f"{named_to(one, task)} needs {format_devices(count)} in one block of {short[0]}"
        text = f"parked with its checkpoint and placed anew beside: {why}; {told}"
        draft.because(one.task_id, "moved aside", text, point=one.point_id)
        order_stop(state, note(state, one, draft), draft, park=True, why=why, after=AfterStop.QUEUE)
    names = " and ".join(named_to(task, one) for one in movers)
    why = f"waits until {names} left a block of {format_devices(short[0])} at {seat.engine}"
    draft.because(task.task_id, "waits", f"{why}, for over two blocks it is slower: {told}")
    until_s = now_s + state.settings.lease_s + max(map(_stop_s, movers))
    state.tasks[task.task_id] = replace(task, why_waiting=why, promised_until_s=until_s, promised=seat.key)
    return True


def _unseated(state: State, seat: Seat) -> bool:
    """Whether some were ordered there since the engine told of its blocks: nobody knows in which they will be."""
    here = state.tasks.at_chip(engine_key(seat.engine, seat.point.needs[0].chip_class))
    return any(one.phase is Phase.RESERVING for one in here)


def _leaves(state: State, block: Holders) -> int:
    """Devices that are free in it once those that stop have stopped."""
    tasks = state.tasks
    return block.free + sum(
        held for name, held in block.held if name in tasks and tasks[name].phase is Phase.STOPPING
    )


def _ways(
    state: State, draft: Draft, seat: Seat, blocks: Sequence[Holders]
) -> Iterator[tuple[TaskState, ...]]:
    """One or two tasks whose going clears a block; each may be moved now, and has room in a block of its own elsewhere."""
    now_s = draft.moment.now_s
    for block in blocks:
        held = {name: count for name, count in block.held if _may_move(state, draft, seat.engine, name)}
        room = sorted((other.free for other in blocks if other is not block), reverse=True)
        for names in [(one,) for one in held] + [(a, b) for a in held for b in held if a < b]:
            movers = tuple(state.tasks[name] for name in names)
            sizes = sorted((one.devices for one in movers), reverse=True)
            fits = len(room) >= len(sizes) and all(
                free >= size for free, size in zip(room, sizes, strict=False)
            )
            clears = block.free + sum(held[name] for name in names) >= seat.point.devices
            if fits and clears and len(within_limits(state, movers, now_s)) == len(movers):
                yield movers


def _may_move(state: State, draft: Draft, engine: EngineId, name: TaskId) -> bool:
    task, now_s = state.tasks.get(name), draft.moment.now_s
    point = task.point() if task is not None else None
    if task is None or point is None or task.engine != engine or not makes_room(state, task, now_s):
        return False
    if len(task.order.gang) > 1 or not may_borrow(task.order, state.rules):
        return False
    return settled(task, point, now_s)


def _cost(state: State, draft: Draft, gang: TaskState, seat: Seat, movers: Sequence[TaskState]) -> float:
    """Micro-CNY that the moves lose, and the gang's wait with them."""
    now_s, policy = draft.moment.now_s, state.settings.policy
    wait = (
        worth_of(gang.order, gang.done_s, now_s, policy).value * seat.point.rate * max(map(_stop_s, movers))
    )
    return wait + sum(_again(one, now_s, policy) for one in movers)


def _again(task: TaskState, now_s: float, policy: str) -> float:
    point = task.point()
    assert point is not None
    return worth_of(task.order, task.done_s, now_s, policy).of_change(point, unsaved_s(task, point))


def _stop_s(task: TaskState) -> float:
    point = task.point()
    return point.stop_s if point is not None else 0.0
