"""Stages of a task: what starts when, what ends with what, and many of them through faults."""

from dataclasses import replace

import pytest

from qipan.clock import named_random
from qipan.controller import verify
from qipan.events import (
    CancelRequested,
    LeaseGranted,
    ParkRequested,
    Reserve,
    Start,
    Stop,
    TaskExited,
    TaskSubmitted,
)
from qipan.leases import Order, TaskId, Usage
from qipan.scheduler import Moment, Phase, decide
from qipan.scheduler.why import why_waiting
from qipan.twin import Faults, Happening, arrivals, build_world, check_end, check_world, crash, kill_task
from test_scheduler import ENGINE, commands, leaf_state, run_until_started
from worlds import FAST, SLOW, TARIFF, nation, order

pytestmark = pytest.mark.timeout(120)
STAGES = ("t.a", "t.b", "t.c")


def orders(devices: int = 1):
    gang = STAGES[:2]
    more = {"elastic": False, "counts": (devices,), "stages": STAGES}
    return [
        order("t.a", gang=gang, feeds="t.b", **more),
        order("t.b", gang=gang, **more),
        order("t.c", after=("t.b",), **more),
    ]


def submitted(state, *orders_):
    return decide(state, [TaskSubmitted(one, 0) for one in orders_], Moment(1, 1))


def exited(state, task_id: str, outcome: str, now_s: float = 5.0):
    task = state.tasks[TaskId(task_id)]
    usage = Usage(TaskId(task_id), task.attempt, "dc", ENGINE, FAST, 1, task.point_id, 1.0, now_s, 1.0, True)
    fact = TaskExited(
        TaskId(task_id), task.lease_id, ENGINE, task.generation, task.attempt, outcome, 0, 1.0, 1.0, "as it ended", usage
    )  # fmt: skip
    return decide(state, [fact], Moment(now_s, now_s))


def grant(state, task_id: str, now_s: float = 2.0):
    task = state.tasks[TaskId(task_id)]
    return decide(
        state, [LeaseGranted(task.task_id, task.lease_id, ENGINE, task.generation, task.needs)], Moment(now_s, now_s)
    )  # fmt: skip


def running():
    """a and b run, c waits for b."""
    state = leaf_state()
    submitted(state, *orders())
    grant(state, "t.a")
    run_until_started(state, "t.b", 2.0)
    state.tasks[TaskId("t.a")] = replace(state.tasks[TaskId("t.a")], phase=Phase.RUNNING)
    return state


def test_a_feeder_and_what_it_feeds_start_together_and_what_comes_after_waits():
    state = leaf_state()
    decision = submitted(state, *orders())
    assert [command.task_id for command in commands(decision, Reserve)] == ["t.a", "t.b"]
    assert commands(grant(state, "t.a"), Start) == []
    assert {command.task_id for command in commands(grant(state, "t.b"), Start)} == {"t.a", "t.b"}
    assert state.tasks[TaskId("t.c")].phase is Phase.BEHIND
    assert why_waiting(state, TaskId("t.c"), 3, 3) == [
        {"constraint": "after", "text": "starts when t.b is done"}
    ]


def test_what_comes_after_starts_on_the_fact_that_the_earlier_ended():
    state = running()
    decision = exited(state, "t.b", "done")
    assert [command.task_id for command in commands(decision, Reserve)] == ["t.c"]
    assert ("t.c", "released") in {(one.task_id, one.verdict) for one in decision.reasons}
    assert [command.task_id for command in commands(decision, Stop)] == ["t.a"], "nobody reads what it makes"


def test_a_stage_that_fails_ends_those_that_would_wait_for_it():
    state = running()
    decision = exited(state, "t.a", "failed")
    assert [command.task_id for command in commands(decision, Stop)] == ["t.b"]
    exited(state, "t.b", "cancelled", 6.0)
    assert (state.tasks, state.over) == ({}, {"t.a": "failed", "t.b": "cancelled", "t.c": "cancelled"})


def test_a_lost_feeder_is_placed_again_beside_what_runs():
    state = running()
    decision = exited(state, "t.a", "lost")
    assert [command.task_id for command in commands(decision, Reserve)] == ["t.a"]
    assert state.tasks[TaskId("t.b")].phase is Phase.RUNNING
    assert [command.task_id for command in commands(grant(state, "t.a", 6.0), Start)] == ["t.a"]


def test_a_stage_whose_earlier_one_had_failed_before_it_came_does_not_wait_for_ever():
    state = leaf_state()
    state.over[TaskId("t.b")] = "failed"
    submitted(state, orders()[2])
    assert state.over[TaskId("t.c")] == "cancelled"


def test_a_stage_that_fails_while_those_it_feeds_or_is_fed_by_are_being_parked_ends_them_too():
    for ends, other in (("t.a", "t.b"), ("t.b", "t.a")):
        state = running()
        decide(state, [ParkRequested(True, "test")], Moment(3, 3))
        exited(state, ends, "failed", 4.0)
        exited(state, other, "parked", 5.0)
        assert (state.tasks, state.over[TaskId(other)]) == ({}, "cancelled")


def test_a_parked_board_leaves_what_waits_for_an_earlier_stage_alone():
    state = running()
    decide(state, [ParkRequested(True, "test")], Moment(3, 3))
    assert state.tasks[TaskId("t.c")].phase is Phase.BEHIND
    decide(state, [CancelRequested(TaskId("t.c"), "test")], Moment(4, 4))
    assert state.over == {"t.c": "cancelled"}


# ---- many tasks with stages, on three levels, with faults ----------------------------------------------------------------


def staged_orders(seed: int, tasks: int) -> list[Order]:
    """Each a feeder, what it feeds, and what comes after; on one chip class or two."""
    rng = named_random(seed, "stages")
    found = []
    for number in range(tasks):
        ids = tuple(f"t{number:02d}.{stage}" for stage in "abc")
        at_s, work_s = rng.uniform(0, 200), rng.choice([20.0, 60.0])
        chips = rng.choice([((FAST,), (FAST,)), ((SLOW,), (FAST,)), ((FAST, SLOW), (FAST,))])
        more = {"elastic": False, "submitted_s": at_s, "stages": ids, "bid": rng.choice([2, 4, 8]) * TARIFF}
        gang = {**more, "gang": ids[:2], "counts": (rng.choice([1, 2]),)}
        found += [
            order(ids[0], chips=chips[0], work_s=work_s * 2, feeds=ids[1], **gang),
            order(ids[1], chips=chips[1], work_s=work_s, **gang),
            order(ids[2], work_s=20.0, after=(ids[1],), counts=(1,), **more),
        ]
    return found


@pytest.mark.parametrize("seed", range(2))
def test_stages_come_to_their_end_through_lost_messages_crashes_and_kills(seed):
    come_to_their_end(seed)


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_stages_come_to_their_end_for_a_hundred_seeds():
    for seed in range(2, 102):
        try:
            come_to_their_end(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def come_to_their_end(seed: int) -> None:
    rng = named_random(seed, "faults of stages")
    world = build_world(nation(devices=2), seed=seed, faults=Faults(lose=0.1, delay=0.2, repeat=0.1))
    world.after_step.append(check_world)
    orders = staged_orders(seed, 12)
    world.happenings = arrivals(orders)
    world.happenings.append(
        Happening(rng.uniform(0, 400), "crash", crash(rng.choice(["cn", "east", "dc1", "dc2"])))
    )
    world.happenings += [
        Happening(rng.uniform(0, 400), f"kill {n}", kill_task("dc1", rng.randrange(4))) for n in range(3)
    ]
    world.run(until_s=50_000)
    check_end(world, {one.task_id for one in orders})
    over = world.tree.root.state.over
    assert {over[one.task_id] for one in orders if not one.feeds} == {"done"}
    assert {over[one.task_id] for one in orders if one.feeds} <= {"done", "cancelled"}, (
        "ended with what it fed"
    )
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, controller.state.settings, top=controller.parent is None)
    began = {}
    ended = {}
    for board in world.tree.engines:
        for task_id, _, _, _, start_s, end_s in world.simulated(board).lifetimes:
            began[task_id] = min(began.get(task_id, start_s), start_s)
            ended[task_id] = max(ended.get(task_id, end_s), end_s)
    assert all(began[one.task_id] >= ended[TaskId(one.after[0])] for one in orders if one.after)
