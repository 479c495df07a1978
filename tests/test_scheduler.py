import ast
from dataclasses import replace
from pathlib import Path

import qipan.scheduler
from qipan.events import (
    CancelRequested,
    EngineOffered,
    LeaseGranted,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskStarted,
    TaskSubmitted,
)
from qipan.hardware import BoardId
from qipan.leases import AskStep, EngineId, Offer, TaskId, Usage
from qipan.scheduler import Moment, Phase, Settings, State, decide
from qipan.scheduler.asks import price_of
from qipan.scheduler.why import why_waiting
from worlds import FAST, SLOW, TARIFF, order

ENGINE = EngineId("engine")


def leaf_state(devices: int = 4) -> State:
    """A board with one directly called engine of `devices` fast chips."""
    state = State(BoardId("dc"), Settings())
    offer = Offer(FAST, devices, (), devices, TARIFF, "dc", "east")
    decide(state, [EngineOffered(ENGINE, (offer,), chooses=False)], Moment(0, 0))
    return state


def run_until_started(state: State, task_id: str, now_s: float = 1.0) -> None:
    """Answer the board's Reserve and Start as the engine would."""
    task = state.tasks[TaskId(task_id)]
    decide(
        state,
        [LeaseGranted(task.task_id, task.lease_id, ENGINE, task.generation, task.needs)],
        Moment(now_s, now_s),
    )
    task = state.tasks[TaskId(task_id)]
    assert task.phase is Phase.STARTING
    started = TaskStarted(
        task.task_id,
        task.lease_id,
        ENGINE,
        task.generation,
        task.attempt,
        task.point_id,
        task.needs,
        "engine",
    )
    decide(state, [started], Moment(now_s, now_s))


def commands(decision, kind):
    return [sent.command for sent in decision.commands if isinstance(sent.command, kind)]


def test_a_submitted_task_is_reserved_at_its_best_free_point():
    state = leaf_state()
    decision = decide(state, [TaskSubmitted(order("a", bid=8 * TARIFF), 0)], Moment(1, 1))
    [reserve] = commands(decision, Reserve)
    assert reserve.needs[0].devices == 4
    assert decision.reasons[0].verdict == "placed"


def test_a_granted_lease_is_started_at_exactly_one_point():
    state = leaf_state()
    [reserve] = commands(decide(state, [TaskSubmitted(order("a"), 0)], Moment(1, 1)), Reserve)
    granted = LeaseGranted(TaskId("a"), reserve.lease_id, ENGINE, reserve.generation, reserve.needs)
    [start] = commands(decide(state, [granted], Moment(2, 2)), Start)
    assert len(start.points) == 1
    assert start.generation > reserve.generation


def test_an_elastic_task_shrinks_for_a_dearer_one_that_then_waits_for_its_devices():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("cheap", work_s=500.0), 0)], Moment(1, 1))
    run_until_started(state, "cheap")
    dear = order("dear", bid=40 * TARIFF, counts=(2,), elastic=False)
    decision = decide(state, [TaskSubmitted(dear, 0)], Moment(10, 10))
    [resize] = commands(decision, Resize)
    assert resize.points[0].devices == 2
    assert not commands(decision, Reserve), "the devices are not confirmed free yet"


def test_a_task_that_is_not_elastic_is_never_taken_from():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("fixed", counts=(4,), elastic=False), 0)], Moment(1, 1))
    run_until_started(state, "fixed")
    decision = decide(state, [TaskSubmitted(order("dear", bid=100 * TARIFF), 0)], Moment(10, 10))
    assert not commands(decision, Resize)
    assert not commands(decision, Stop)


def test_a_nearly_finished_task_is_not_resized_for_a_small_gain():
    state = leaf_state(devices=6)
    decide(
        state,
        [
            TaskSubmitted(order("a", counts=(2, 4), work_s=100), 0),
            TaskSubmitted(order("b", counts=(4,), elastic=False, bid=3 * TARIFF), 0),
        ],
        Moment(1, 1),
    )
    run_until_started(state, "a")
    task = state.tasks[TaskId("a")]
    assert task.needs[0].devices == 2
    state.tasks[TaskId("a")] = replace(task, done_s=99.0)
    decision = decide(state, [CancelRequested(TaskId("b"), "test")], Moment(50, 50))
    assert not commands(decision, Resize), "one second of work is left, a change costs three"


def test_a_task_that_is_lost_again_and_again_is_failed_not_started_forever():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("a"), 0)], Moment(1, 1))
    for attempt in range(1, 6):
        assert TaskId("a") in state.tasks
        run_until_started(state, "a")
        task = state.tasks[TaskId("a")]
        usage = Usage(TaskId("a"), attempt, "dc", ENGINE, FAST, 4, "p", 0.0, 1.0, 4.0, True)
        lost = TaskExited(
            TaskId("a"),
            task.lease_id,
            ENGINE,
            task.generation,
            attempt,
            "lost",
            137,
            0.0,
            0.0,
            "killed",
            usage,
        )
        decide(state, [lost], Moment(attempt * 10, attempt * 10))
    assert state.over == {TaskId("a"): "failed"}


def test_equal_bids_are_served_in_order_of_submission_then_id():
    state = leaf_state(devices=1)
    facts = [TaskSubmitted(order(name, counts=(1,), elastic=False), 0) for name in ("b", "a")]
    decision = decide(state, facts, Moment(1, 1))
    assert [command.task_id for command in commands(decision, Reserve)] == ["a"]


def test_a_board_is_asked_at_the_child_with_the_best_net_worth():
    state = State(BoardId("top"), Settings())
    cheap = Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, "dc1", "east")
    dear = Offer(FAST, 4, (AskStep(4, 10 * TARIFF),), 4, TARIFF, "dc2", "west")
    offers = [
        EngineOffered(EngineId("west"), (dear,), chooses=True),
        EngineOffered(EngineId("east"), (cheap,), chooses=True),
    ]
    decision = decide(state, [*offers, TaskSubmitted(order("a", bid=8 * TARIFF), 0)], Moment(1, 1))
    assert [sent.engine for sent in decision.commands] == ["east"]


def test_a_task_is_kept_out_of_regions_and_vendors_that_its_owner_excludes():
    for limits in ({"regions": ("cn-*",)}, {"vendors": ("huawei",)}):
        state = leaf_state()
        decision = decide(state, [TaskSubmitted(order("a", **limits), 0)], Moment(1, 1))
        assert not commands(decision, Reserve), limits


def test_why_names_the_single_change_that_starts_a_waiting_task():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("a", regions=("west",)), 0)], Moment(1, 1))
    told = why_waiting(state, TaskId("a"), 2.0, 2.0)
    assert [entry["constraint"] for entry in told] == ["now", "regions"]


def test_asks_skip_what_was_already_ordered():
    offer = Offer(FAST, 4, (AskStep(2, 0), AskStep(2, 100)), 4, TARIFF)
    assert price_of(offer, 2, 0) == 0
    assert price_of(offer, 2, 2) == 200
    assert price_of(offer, 3, 2) is None


def test_the_same_facts_give_the_same_decision():
    def decision():
        state = leaf_state()
        facts = [TaskSubmitted(order(name, chips=(FAST, SLOW)), 0) for name in "cab"]
        return decide(state, facts, Moment(1, 1))

    assert decision() == decision()


def test_no_identifier_in_the_scheduler_names_a_level():
    levels = ("nation", "region_board", "data_centre", "datacentre", "datacenter", "province")
    for path in Path(qipan.scheduler.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                getattr(node, "id", None)
                or getattr(node, "name", None)
                or getattr(node, "attr", None)
                or getattr(node, "arg", None)
            )
            assert not any(level in str(name).lower() for level in levels), f"{path}: {name}"
