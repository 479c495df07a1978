"""What a place must have beside devices: room in its storage for the task's checkpoints, and none of those that the task keeps apart from.

Both are checked where one point is given (leaf engines): a board above hears the refusal and asks the next.
"""

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
    more_rate = point.storage_bytes_per_s - (now.storage_bytes_per_s if now is not None else 0.0)
    if room.space_bytes and more > 0 and held_bytes + more > room.space_bytes:
        return Unmet(
            "storage",
            f"{room.storage_id} has {format_bytes(max(0, int(room.space_bytes - held_bytes)))} left,"
            f" its checkpoints need {format_bytes(more)}",
        )
    if room.write_bytes_per_s and more_rate > 0 and held_rate + more_rate > room.write_bytes_per_s:
        left = max(0.0, room.write_bytes_per_s - held_rate)
        return Unmet(
            "storage rate",
            f"{room.storage_id} can write {format_bytes(int(left))}/s more, its checkpoints need"
            f" {format_bytes(int(more_rate))}/s",
        )
    return None


def apart_from(state: State, draft: Draft, task: TaskState, engine: EngineId) -> TaskId | None:
    """Another task of the tenant with the same word at the engine."""
    order = task.order
    placed = draft.placed.apart.get((engine, order.tenant, order.apart))
    there = [one for one in (placed,) if one is not None]
    there += sorted(state.tasks.apart.get((engine, order.tenant, order.apart), ()))
    return next((one for one in there if one != task.task_id), None)


def set_down(state: State, draft: Draft, task: TaskState, engine: EngineId, point: Point) -> None:
    """Note that the task is placed there in this tick."""
    if task.order.apart:
        draft.placed.apart[engine, task.order.tenant, task.order.apart] = task.task_id
    if state.engines[engine].room is not None:
        held = _storage(state, draft, engine)
        held[0] += point.storage_bytes
        held[1] += point.storage_bytes_per_s


def watched(state: State) -> bool:
    """Whether a task that leaves may open a place to others of any chip class."""
    return bool(state.tasks.apart) or any(known.room is not None for known in state.engines.values())


def _storage(state: State, draft: Draft, engine: EngineId) -> list[float]:
    known = draft.placed.storage.get(engine)
    if known is None:
        points = points_at(state, engine)
        known = draft.placed.storage[engine] = [
            float(sum(point.storage_bytes for point in points)),
            sum(point.storage_bytes_per_s for point in points),
        ]
    return known


def points_at(state: State, engine: EngineId) -> list[Point]:
    """What its tasks hold, or will once they changed shape."""
    points = [task.target() or task.point() for task in state.tasks.at(engine)]
    return [point for point in points if point is not None]
