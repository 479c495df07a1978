"""What a place must have beside devices: storage for checkpoints, and none of those that a task keeps apart from."""

from dataclasses import replace

import pytest

from qipan.controller import verify
from qipan.errors import InvalidInput
from qipan.events import Reserve, Stop, StorageOffered, TaskSubmitted
from qipan.hardware import BoardSpec, ChipClassId, Storage
from qipan.leases import Order, Room, TaskId
from qipan.planner import plan_task
from qipan.scheduler import Moment, Phase, Settings, decide
from qipan.twin import check_end
from qipan.workload.parse import parse_task
from test_quota import parked
from test_scheduler import ENGINE, commands, leaf_state, run_until_started
from test_twin import stormy_world
from worlds import TARIFF, leaf, nation, order

pytestmark = pytest.mark.computes


def storing(made: Order, space_bytes: int = 100, rate: float = 1.0) -> Order:
    points = tuple(
        replace(point, storage_bytes=space_bytes, storage_bytes_per_s=rate) for point in made.curve.points
    )
    return replace(made, curve=replace(made.curve, points=points))


def placed(decision) -> list[str]:
    return [command.task_id for command in commands(decision, Reserve)]


def test_a_task_whose_checkpoints_do_not_fit_waits_while_devices_are_free():
    state = leaf_state(4)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 250))], Moment(0.5, 0.5))
    facts = [TaskSubmitted(storing(order(name, counts=(1,))), 0) for name in ("a", "b", "c")]
    assert placed(decide(state, facts, Moment(1, 1))) == ["a", "b"]
    assert state.tasks[TaskId("c")].phase is Phase.QUEUED
    wider = StorageOffered(ENGINE, Room("dc/storage", 300))
    assert placed(decide(state, [wider], Moment(2, 2))) == ["c"]


def test_tasks_kept_apart_go_to_unlike_sites_and_the_third_waits():
    sites = (leaf("dc1"), leaf("dc2"))
    world, submitted = stormy_world(1, 0, spec=BoardSpec(nation().board, children=sites))
    for name in ("a", "b", "c"):
        world.submit(order(name, counts=(1,), apart="web"))
    world.happenings.clear()
    world.run(until_s=60.0)
    runs = {board: [*world.simulated(board).running()] for board in ("dc1", "dc2")}  # type: ignore[arg-type]
    assert sorted(map(len, runs.values())) == [1, 1], runs
    world.run(until_s=5_000.0)
    assert set(world.tree.root.state.over) == {"a", "b", "c"} | submitted


def with_storage(spec: BoardSpec) -> BoardSpec:
    """Every data centre with room for the checkpoints of three tasks, and the rate of two and a half."""
    children = tuple(with_storage(child) for child in spec.children)
    stores = (Storage(f"{spec.board}/storage", spec.board, 300, 0.0, 2.5),) if spec.pools else ()
    return replace(spec, children=children, stores=stores)


def condition(made: Order) -> Order:
    number = int(made.task_id.split("-")[1])
    return replace(storing(made, 100, 0.5 + number % 2), apart=("", "", "web", "db")[number % 4])


@pytest.mark.parametrize("seed", range(4))
def test_no_storage_overflows_and_nobody_meets_in_a_storm(seed):
    settings = Settings(look_at_all_up_to=0) if seed % 2 else Settings()
    world, submitted = stormy_world(seed, 24, settings, ("alice", "bob"), with_storage(nation()), condition)
    world.run(until_s=50_000)
    check_end(world, submitted)
    assert set(world.tree.root.state.over.values()) == {"done"}
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, controller.state.settings, top=controller.parent is None)


SCRIPT = """kind: train
name: t
run: python t.py
devices: 2
limits: {{apart: web, time: 1h}}
checkpoint: {{every: 100s, size: {size}, keep: 2}}
"""


def test_the_task_file_says_what_its_checkpoints_take():
    task = parse_task(SCRIPT.format(size="10GB"))
    assert task.limits.apart == "web"
    curve = plan_task(task, leaf("dc", 4, ChipClassId("sim/fast"))).curve
    assert curve is not None
    [point] = curve.points
    assert (point.storage_bytes, point.storage_bytes_per_s) == (20 * 10**9, 1e8)


@pytest.mark.parametrize(("size", "said"), [("ten", "size"), ("10GB, kept: 2", "kept")])
def test_a_wrong_checkpoint_is_named(size, said):
    with pytest.raises(InvalidInput, match=said):
        parse_task(SCRIPT.format(size=size))


def test_a_seat_that_is_freed_for_a_task_goes_to_it_on_a_large_board():
    """Else those that gave it up, or whoever comes, take it back, and the task frees another, without end."""
    state = leaf_state(8)
    state.settings = Settings(look_at_all_up_to=0)
    decide(state, [TaskSubmitted(order("v", counts=(8,), bid=2 * TARIFF, work_s=9000.0), 0)], Moment(1, 1))
    run_until_started(state, "v")
    stopped = decide(state, [TaskSubmitted(order("w", counts=(8,), bid=6 * TARIFF), 0)], Moment(2, 2))
    assert [command.task_id for command in commands(stopped, Stop)] == ["v"]
    late = TaskSubmitted(order("x", counts=(8,), bid=9 * TARIFF), 0)
    assert placed(decide(state, [late, parked(state, "v", 3.0)], Moment(3, 3))) == ["w"]
