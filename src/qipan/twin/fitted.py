"""How long starts and stops really take, read from what real engines reported: so the twin's do, too."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qipan.controller import fact_of
from qipan.curves import Curve
from qipan.engines.simulated import Behaviour
from qipan.events import TaskExited, TaskProgress, TaskSubmitted
from qipan.leases import TaskId
from qipan.store import Store

#: what an attempt says when its first useful step begins
READY = ("ready", "resumed")
#: verdicts after which a board has an attempt stopped
STOPS = ("shrunk", "grown", "reshaped", "preempted", "parked")
NEWEST = 500  # tasks looked at


def fitted(stores: Sequence[Store], base: Behaviour = Behaviour()) -> Behaviour:  # noqa: B008  (frozen)
    """`stores`: of a tree's boards, the topmost among them; `base` where nothing was recorded.  The medians of measured over planned
    seconds, start: launch to first useful step; stop: order to exit."""
    starts: list[float] = []
    stops: list[float] = []
    for task_id in _tasks(stores):
        curve = _curve(stores, task_id)
        if curve is None:
            continue
        exits = {attempt: fact for store in stores for attempt, fact in _exits(store, task_id).items()}
        for attempt, ready_s in _ready(stores, task_id).items():
            if attempt in exits and (planned_s := curve.point(exits[attempt].usage.point_id).start_s) > 0:
                starts.append((ready_s - exits[attempt].usage.started_s) / planned_s)
        stops += _stops(stores, task_id, curve, exits.values())
    return replace(
        base,
        start_share=statistics.median(starts) if starts else base.start_share,
        stop_share=statistics.median(stops) if stops else base.stop_share,
    )


def _tasks(stores: Iterable[Store]) -> list[TaskId]:
    return [TaskId(task_id) for store in stores for task_id, _ in store.submissions()][-NEWEST:]


def _curve(stores: Iterable[Store], task_id: TaskId) -> Curve | None:
    for store in stores:
        for _, _, body in store.facts_of(task_id, ("task_submitted",)):
            fact = fact_of(body)
            if isinstance(fact, TaskSubmitted):
                return fact.order.curve
    return None


def _exits(store: Store, task_id: TaskId) -> dict[int, TaskExited]:
    facts = [fact_of(body) for _, _, body in store.facts_of(task_id, ("task_exited",))]
    return {fact.attempt: fact for fact in facts if isinstance(fact, TaskExited)}


def _ready(stores: Iterable[Store], task_id: TaskId) -> dict[int, float]:
    """attempt -> when it first said that it makes progress."""
    found: dict[int, float] = {}
    for store in stores:
        for _, _, body in store.facts_of(task_id, ("task_progress",)):
            fact = fact_of(body)
            if isinstance(fact, TaskProgress) and _event(fact.detail) in READY:
                found[fact.attempt] = min(fact.usage.until_s, found.get(fact.attempt, fact.usage.until_s))
    return found


def _event(detail: str) -> str:
    try:
        told = json.loads(detail)
    except ValueError:
        return ""
    return str(told.get("event", "")) if isinstance(told, dict) else ""


def _stops(
    stores: Iterable[Store], task_id: TaskId, curve: Curve, exits: Iterable[TaskExited]
) -> list[float]:
    """Each ordered stop with the exit that followed it."""
    ended = sorted(
        (fact.usage.until_s, fact.usage.point_id) for fact in exits if fact.outcome in ("resized", "parked")
    )
    shares = []
    for store in stores:
        ordered = [now_s for now_s, verdict, _ in store.reasons_of(task_id) if verdict in STOPS]
        for end_s, point_id in ended:
            before = [now_s for now_s in ordered if now_s <= end_s]
            planned_s = curve.point(point_id).stop_s
            if before and planned_s > 0 and end_s - before[-1] <= 10 * planned_s:
                shares.append((end_s - before[-1]) / planned_s)
    return shares


__all__ = ["fitted"]
