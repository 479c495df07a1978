"""How long starts and stops really take, and how fast work goes on, against the plan: read from what real engines reported, so
that the twin's simulated engines do as they did.  By the curve's source, for own scripts and the built-in trainer differ by far."""

import statistics
from collections import defaultdict
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

Shares = dict[str, list[float]]


def fitted(stores: Sequence[Store], base: Behaviour = Behaviour()) -> Behaviour:  # noqa: B008  (frozen)
    """`stores`: of a tree's boards, the topmost among them; `base` where nothing was recorded.  Medians of measured over planned: start,
    launch to first useful step; stop, order to exit; pace, work done over the time from the first useful step to the last report.  Processes go on at another point if any did."""
    starts: Shares = defaultdict(list)
    stops: Shares = defaultdict(list)
    paces: Shares = defaultdict(list)
    in_place = base.in_place
    for task_id in _tasks(stores):
        curve = _curve(stores, task_id)
        if curve is None:
            continue
        exits = {attempt: fact for store in stores for attempt, fact in _exits(store, task_id).items()}
        for reports in _reports(stores, task_id).values():
            point, first, last = curve.point(reports[0].usage.point_id), reports[0], reports[-1]
            if point.start_s > 0:
                starts[curve.source].append((first.usage.until_s - first.usage.started_s) / point.start_s)
            span_s = last.usage.until_s - first.usage.until_s
            if span_s > 0 and last.done_s > first.done_s:
                paces[curve.source].append((last.done_s - first.done_s) / span_s / point.rate)
        in_place = in_place or any(fact.in_place for fact in exits.values())
        stops[curve.source] += _stops(stores, task_id, curve, exits.values())
    return replace(
        base,
        start_share={**base.start_share, **_medians(starts)},
        stop_share={**base.stop_share, **_medians(stops)},
        pace_share={**base.pace_share, **_medians(paces)},
        in_place=in_place,
    )


def _medians(shares: Shares) -> dict[str, float]:
    return {source: statistics.median(own) for source, own in sorted(shares.items()) if own}


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


def _reports(stores: Iterable[Store], task_id: TaskId) -> dict[int, list[TaskProgress]]:
    """attempt -> its reports, from the one that says that it makes progress."""
    found: dict[int, list[TaskProgress]] = {}
    for store in stores:
        facts = [fact_of(body) for _, _, body in store.facts_of(task_id, ("task_progress",))]
        own: dict[int, list[TaskProgress]] = {}
        for fact in facts:
            if isinstance(fact, TaskProgress) and (fact.attempt in own or fact.said().get("event") in READY):
                own.setdefault(fact.attempt, []).append(fact)
        found = {**own, **found}  # each board keeps the same reports
    return found


def _stops(
    stores: Iterable[Store], task_id: TaskId, curve: Curve, exits: Iterable[TaskExited]
) -> list[float]:
    """Each ordered stop with the exit that followed it."""
    ended = sorted(
        (fact.usage.until_s, fact.usage.point_id)
        for fact in exits
        if fact.outcome in ("resized", "parked") and not fact.in_place
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
