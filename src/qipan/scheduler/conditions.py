"""What a place must have beside devices: room in its storage for the task's checkpoints, and none of those that the task keeps apart from.

Where only the rate is short, a task that allows it is placed with longer between its checkpoints; that holds for its lease.

Both are checked where one point is given (leaf engines): a board above hears the refusal and asks the next.
"""

import math
from dataclasses import dataclass

from qipan.curves import Point
from qipan.leases import EngineId, TaskId
from qipan.quantities import format_bytes
from qipan.scheduler.state import Draft, State, TaskState


@dataclass(frozen=True, slots=True)
class Unmet:
    kind: str  # "storage", "storage rate", "apart"
    text: str


def unmet(state: State, draft: Draft, task: TaskState, engine: EngineId, point: Point) -> Unmet | None:
    """Why the task may not take this point at the engine; None when it may."""
    order = task.order
    if order.apart and task.engine != engine:
        other = apart_from(state, draft, task, engine)
        if other is not None:
            return Unmet("apart", f"{engine} has {other}, from which `limits.apart: {order.apart}` keeps it")
    room = state.engines[engine].room
    if room is None or not (point.storage_bytes or point.storage_bytes_per_s):
        return None
    held_bytes, held_rate = _storage(state, draft, engine)
    now = task.point() if task.engine == engine else None
    more = point.storage_bytes - (now.storage_bytes if now is not None else 0)
    rate = point.storage_bytes_per_s / longer_between(state, draft, task, engine, point)
    more_rate = rate - (now.storage_bytes_per_s / task.checkpoint_longer if now is not None else 0.0)
    if room.space_bytes and more > 0 and held_bytes + more > room.space_bytes:
        return Unmet(
            "storage",
            f"{room.storage_id} has {format_bytes(max(0, int(room.space_bytes - held_bytes)))} left,"
            f" its checkpoints need {format_bytes(more)}",
        )
    if more_rate > 0 and not room.writes(held_rate + more_rate):
        left = max(0.0, room.write_bytes_per_s - held_rate)
        most = task.order.checkpoint_longer_max
        allowed = f", even {most:.3g} times as far apart" if most > 1 else ""
        return Unmet(
            "storage rate",
            f"{room.storage_id} can write {format_bytes(int(left))}/s more, its checkpoints need"
            f" {format_bytes(int(more_rate))}/s{allowed}",
        )
    return None


def longer_between(state: State, draft: Draft, task: TaskState, engine: EngineId, point: Point) -> float:
    """How many times as long must lie between the task's checkpoints for the storage to keep up, in steps of a tenth and no more than
    the task allows; what it was placed with where it is."""
    room = state.engines[engine].room
    if task.engine == engine:
        return task.checkpoint_longer
    if room is None or not room.write_bytes_per_s or not point.storage_bytes_per_s:
        return 1.0
    held_rate = _storage(state, draft, engine)[1]
    if room.writes(held_rate + point.storage_bytes_per_s):
        return 1.0
    left = room.write_bytes_per_s - held_rate
    most = max(1.0, task.order.checkpoint_longer_max)
    return min(most, math.ceil(10 * point.storage_bytes_per_s / left) / 10) if left > 0 else most


def apart_from(state: State, draft: Draft, task: TaskState, engine: EngineId) -> TaskId | None:
    """Another task of the tenant with the same word at the engine."""
    order = task.order
    placed = draft.placed.apart.get((engine, order.tenant, order.apart))
    there = [one for one in (placed,) if one is not None]
    there += sorted(state.tasks.apart.get((engine, order.tenant, order.apart), ()))
    return next((one for one in there if one != task.task_id), None)


def set_down(state: State, draft: Draft, task: TaskState, engine: EngineId, point: Point) -> float:
    """Note that the task is placed there in this tick; returns how many times as long lies between its checkpoints."""
    longer = longer_between(state, draft, task, engine, point)
    if task.order.apart:
        draft.placed.apart[engine, task.order.tenant, task.order.apart] = task.task_id
    if state.engines[engine].room is not None:
        held = _storage(state, draft, engine)
        held[0] += point.storage_bytes
        held[1] += point.storage_bytes_per_s / longer
    return longer


def watched(state: State) -> bool:
    """Whether a task that leaves may open a place to others of any chip class."""
    return bool(state.tasks.apart) or any(known.room is not None for known in state.engines.values())


def _storage(state: State, draft: Draft, engine: EngineId) -> list[float]:
    known = draft.placed.storage.get(engine)
    if known is None:
        held = held_of_storage(state, engine)
        known = draft.placed.storage[engine] = [
            float(sum(space_bytes for space_bytes, _ in held)),
            sum(rate for _, rate in held),
        ]
    return known


def held_of_storage(state: State, engine: EngineId) -> list[tuple[int, float]]:
    """(bytes, bytes/s) that each of its tasks holds."""
    return [of_storage(task) for task in state.tasks.at(engine)]


def of_storage(task: TaskState) -> tuple[int, float]:
    """(bytes, bytes/s) that it holds where it is, or will once it changed shape."""
    point = task.target() or task.point()
    if point is None:
        return 0, 0.0
    return point.storage_bytes, point.storage_bytes_per_s / task.checkpoint_longer
