"""What if another policy had decided?  The causes of a store (submissions, cancellations) are played again to the real
controllers on simulated engines; what follows is simulated, for the policy as it was and for the other, alike."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qipan.controller import fact_of
from qipan.engines.simulated import Behaviour
from qipan.errors import InvalidInput, NotFound
from qipan.events import CancelRequested, TaskSubmitted
from qipan.hardware import BoardSpec
from qipan.leases import TaskId
from qipan.outcomes import Outcome, TaskOutcome, WhatIf
from qipan.scheduler import Settings
from qipan.scheduler.policies import OBJECTIVES
from qipan.store import Store
from qipan.twin.world import Happening, World, build_world

#: name -> what it changes in a board's settings
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "as-it-was": {},
    "rigid": {"elastic": False},  # nothing shrinks or grows
    "no-prices": {"asks": False},  # only free devices are offered upward
    **{name: {"policy": name} for name in sorted(OBJECTIVES)},
}
AS_IT_WAS = "as-it-was"
TASKS_MAX = 5000
SPAN = 50.0  # the twin runs on for so many times the span of the causes, and a day


def what_if(
    store: Store,
    spec: BoardSpec,
    settings: Settings,
    policy: str,
    behaviour: Behaviour = Behaviour(),  # noqa: B008  (frozen)
) -> WhatIf:
    """`store` is the topmost board's; `behaviour`: as fitted from the boards' stores.  Raises InvalidInput on an unknown policy, NotFound when nothing was submitted."""
    if policy not in POLICIES:
        raise InvalidInput(f"no policy {policy[:40]!r} to try; there are: {', '.join(POLICIES)}")
    causes = causes_of(store)
    truncated = max(0, len(causes) - TASKS_MAX)
    causes = causes[truncated:]
    if not causes:
        raise NotFound("nothing was submitted to this store yet; there is nothing to try again")
    before, before_s = _run(causes, spec, settings, AS_IT_WAS, behaviour)
    other, other_s = _run(causes, spec, replace(settings, **POLICIES[policy]), policy, behaviour)
    tasks = tuple(
        TaskOutcome(task_id, before_s.get(task_id), other_s.get(task_id))
        for task_id in dict.fromkeys(_task_of(fact) for _, fact in causes)
    )
    return WhatIf(before, other, tasks, truncated)


Cause = TaskSubmitted | CancelRequested


def causes_of(store: Store) -> list[tuple[float, Cause]]:
    """(now_s, fact), in order."""
    found: list[tuple[float, Cause]] = []
    for task_id, _ in store.submissions():
        for _, now_s, body in store.facts_of(task_id, ("task_submitted", "cancel_requested")):
            fact = fact_of(body)
            if isinstance(fact, TaskSubmitted | CancelRequested):
                found.append((now_s, fact))
    return sorted(found, key=lambda one: one[0])


def _task_of(fact: Cause) -> TaskId:
    return fact.order.task_id if isinstance(fact, TaskSubmitted) else fact.task_id


def _ending(fact: Cause, until_s: float) -> Cause:
    """A service that has no end has one in the twin."""
    if isinstance(fact, TaskSubmitted) and fact.order.hours is not None:
        hours = replace(fact.order.hours, until_s=min(until_s, fact.order.hours.until_s or until_s))
        return replace(fact, order=replace(fact.order, hours=hours))
    return fact


def _run(
    causes: Sequence[tuple[float, Cause]],
    spec: BoardSpec,
    settings: Settings,
    policy: str,
    behaviour: Behaviour,
) -> tuple[Outcome, dict[TaskId, float]]:
    first_s, last_s = causes[0][0], causes[-1][0]
    world = build_world(spec, seed=0, settings=settings, behaviour=behaviour, start_s=first_s)
    causes = [(at_s, _ending(fact, last_s + 86_400)) for at_s, fact in causes]
    world.happenings = [
        Happening(at_s, f"{number:08}", lambda world, fact=fact: world.tree.root.accept(fact))  # type: ignore[misc]
        for number, (at_s, fact) in enumerate(causes)
    ]
    ended: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        for task_id in world.tree.root.state.over:
            ended.setdefault(task_id, world.clock.now_s())

    world.after_step.append(watch)
    world.run(until_s=last_s + (last_s - first_s) * SPAN + 86_400)
    orders = [
        fact.order for _, fact in causes if isinstance(fact, TaskSubmitted) and fact.order.hours is None
    ]  # services end by their time alone
    took = {
        order.task_id: ended[order.task_id] - order.submitted_s for order in orders if order.task_id in ended
    }
    state = world.tree.root.state
    with_deadline = [order for order in orders if order.deadline_s is not None]
    late = sum(
        1
        for order in with_deadline
        if state.over.get(order.task_id) != "done" or ended[order.task_id] > (order.deadline_s or 0.0)
    )
    paid = sum(
        balance for account, _, balance in world.tree.root.store.balances() if account.startswith("provider/")
    )
    lengths = sorted(took.values())
    outcome = Outcome(
        policy, len(orders), sum(state.over.get(order.task_id) == "done" for order in orders),
        round(statistics.fmean(lengths), 1) if lengths else 0.0,
        round(lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))], 1) if lengths else 0.0,
        paid, late, len(with_deadline),
        sum(len(world.simulated(board).lifetimes) for board in world.tree.engines),
    )  # fmt: skip
    return outcome, took
