"""What a place must have beside devices: storage for checkpoints, and none of those that a task keeps apart from."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.clock import named_random
from qipan.controller import verify
from qipan.engines.attempt_spec import every_s as every_between_s
from qipan.engines.simulated import Behaviour
from qipan.errors import InvalidInput
from qipan.events import Reserve, Stop, StorageOffered, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Storage
from qipan.leases import Order, Room, TaskId
from qipan.planner import plan_task
from qipan.planning import longer_max
from qipan.scheduler import Moment, Phase, Settings, decide
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.why import why_waiting
from qipan.twin import Happening, World, arrivals, build_world, check_end, check_world, kill_task
from qipan.views import storages
from qipan.workload.parse import parse_task
from test_quota import parked
from test_scheduler import ENGINE, commands, leaf_state, run_until_started
from test_twin import stormy_world
from worlds import TARIFF, leaf, nation, order, random_orders

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


def test_what_leases_hold_of_a_storage_is_shown_and_others_names_are_not():
    state = leaf_state(4)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 250, 8.0))], Moment(0.5, 0.5))
    facts = [TaskSubmitted(storing(order(name, counts=(1,))), 0) for name in ("a", "b")]
    decide(state, facts, Moment(1, 1))
    (mine,) = storages(state, lambda tenant: True)
    assert (mine.storage_id, mine.space_bytes, mine.write_bytes_per_s) == ("dc/storage", 250, 8.0)
    assert [(one.task_id, one.space_bytes) for one in mine.leases] == [("a", 100), ("b", 100)]
    (others,) = storages(state, lambda tenant: False)
    assert [(one.task_id, one.space_bytes) for one in others.leases] == [("", 100), ("", 100)]


def writing(name: str, longer_max: float, rate: float = 8.0) -> TaskSubmitted:
    made = storing(order(name, counts=(1,)), 0, rate)
    return TaskSubmitted(replace(made, checkpoint_longer_max=longer_max), 0)


def test_where_the_storage_is_short_of_bytes_a_second_a_task_that_allows_it_checkpoints_less_often():
    state = leaf_state(4)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 0, 10.0))], Moment(0.5, 0.5))
    decision = decide(state, [writing("a", 4.0), writing("b", 4.0), writing("c", 4.0)], Moment(1, 1))
    found = {command.task_id: command.order.checkpoint_longer for command in commands(decision, Reserve)}
    assert found == {"a": 1.0, "b": 4.0}, "2 B/s are left for b; c would have none"
    [told] = [reason.text for reason in decision.reasons if reason.task_id == "b"]
    assert told.endswith(
        "; 4 times as long between its checkpoints as planned: more its storage cannot write"
    )
    waits = state.tasks[TaskId("c")]
    assert (
        why_waiting_text(state, waits, 1.0)
        == "dc/storage can write 0B/s more, its checkpoints need 2B/s, even 4 times as far apart"
    )
    [shown] = storages(state, lambda tenant: True)
    assert [lease.write_bytes_per_s for lease in shown.leases] == [8.0, 2.0]


def test_a_task_that_does_not_allow_it_waits_and_why_says_what_would_do():
    state = leaf_state(4)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 0, 10.0))], Moment(0.5, 0.5))
    assert placed(decide(state, [writing("a", 1.0), writing("b", 1.0)], Moment(1, 1))) == ["a"]
    run_until_started(state, "a")
    found = why_waiting(state, TaskId("b"), 2.0, 2.0)
    assert {
        "constraint": "storage rate",
        "text": "with 4 times as long between its checkpoints (`checkpoint: longest`)",
    } in found


@settings(max_examples=200, deadline=None)
@given(
    st.floats(1.0, 100.0),
    st.lists(st.tuples(st.floats(0.1, 60.0), st.sampled_from([1.0, 1.5, 4.0])), min_size=1, max_size=6),
)
def test_checkpoints_are_never_further_apart_than_allowed_and_never_overflow_the_storage(write, wanted):
    state = leaf_state(8)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 0, write))], Moment(0.5, 0.5))
    facts = [writing(f"t{number}", most, rate) for number, (rate, most) in enumerate(wanted)]
    used = 0.0
    for command in commands(decide(state, facts, Moment(1, 1)), Reserve):
        rate, most = wanted[int(command.task_id[1:])]
        assert 1.0 <= command.order.checkpoint_longer <= most
        used += rate / command.order.checkpoint_longer
    assert used <= write * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.floats(1.0, 100.0), st.floats(0.0, 0.9), st.integers(10, 40))
def test_what_just_fits_is_not_refused_for_a_last_digit(write, share, tenths):
    state = leaf_state(4)
    decide(state, [StorageOffered(ENGINE, Room("dc/storage", 0, write))], Moment(0.5, 0.5))
    facts = [writing("a", 1.0, write * share), writing("b", 4.0, (write - write * share) * tenths / 10)]
    assert placed(decide(state, facts, Moment(1, 1))) == ["a", "b"]


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
    made = replace(made, checkpoint_longer_max=(1.0, 3.0)[number % 2])
    return replace(storing(made, 100, 0.5 + number % 2), apart=("", "", "web", "db")[number % 4])


@pytest.mark.parametrize("seed", range(4))
def test_no_storage_overflows_and_nobody_meets_in_a_storm(seed):
    chosen = Settings(look_at_all_up_to=0) if seed % 2 else Settings()
    world, submitted = stormy_world(seed, 24, chosen, ("alice", "bob"), with_storage(nation()), condition)
    world.run(until_s=50_000)
    check_end(world, submitted)
    assert set(world.tree.root.state.over.values()) == {"done"}
    told = [
        text
        for store in world.tree.stores.values()
        for name in sorted(submitted)
        for _, _, text in store.reasons_of(name)
    ]
    assert any("times as long between its checkpoints" in text for text in told)
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, controller.state.settings, top=controller.parent is None)


def run_day(seed: int, longer_max: float) -> dict[str, float]:
    """Forty tasks where storages can write the checkpoints of two and a half; ten attempts are killed, and do again what was not saved."""
    rng = named_random(seed, "kills")
    world = build_world(with_storage(nation()), seed=seed, behaviour=Behaviour(checkpoint_s=20.0))
    orders = [
        replace(storing(made, 0, 0.5 + number % 2), checkpoint_longer_max=longer_max)
        for number, made in enumerate(random_orders(named_random(seed, "orders"), 40, 300.0))
    ]
    world.happenings = arrivals(orders)
    for number in range(10):
        leaf_board = BoardId(rng.choice(["dc1", "dc2", "dc3"]))
        world.happenings.append(
            Happening(rng.uniform(0, 600), f"kill {number}", kill_task(leaf_board, rng.randrange(10)))
        )
    ended: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        for task_id in world.tree.root.state.over:
            ended.setdefault(task_id, world.clock.now_s())

    world.after_step += [check_world, watch]
    world.run(until_s=50_000)
    check_end(world, {made.task_id for made in orders})
    jct_s = sum(ended[made.task_id] - made.submitted_s for made in orders) / len(orders)
    return {"jct_s": jct_s, "makespan_s": max(ended.values())}


@pytest.mark.slow
def test_tasks_end_sooner_where_they_may_checkpoint_less_often_than_wait():
    ratios = [run_day(seed, 4.0)["jct_s"] / run_day(seed, 1.0)["jct_s"] for seed in range(3)]
    print("mean completion time, up to four times as long between checkpoints against as planned:", ratios)
    assert sum(ratios) / len(ratios) < 0.95


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


@pytest.mark.parametrize(
    ("wanted", "run", "longer"),
    [
        ("every: 100s, longest: 250s", True, 2.5),
        ("every: 100s", True, 1.0),
        ("every: 100s", False, 1.0),
        ("every: auto", True, 1.0),  # a script need not follow what it is told
        ("every: auto", False, 4.0),
    ],
)
def test_what_a_task_allows_between_its_checkpoints(wanted, run, longer):
    task = parse_task(SCRIPT.format(size="10GB").replace("every: 100s", wanted))
    task = task if run else replace(task, run="")
    every_s = task.checkpoint.every_s or 30.0
    [point] = storing(order("a", counts=(1,)), 20 * 10**9, 10**10 / every_s).curve.points
    assert longer_max(task, point) == pytest.approx(longer)
    assert every_between_s(task, point) == pytest.approx(every_s), "the trainer does as planned"


@pytest.mark.parametrize(
    ("size", "said"), [("ten", "size"), ("10GB, kept: 2", "kept"), ("10GB, longest: 10s", "longest")]
)
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


def test_a_gang_on_a_large_board_takes_its_seats_together_however_little_one_of_it_bids():
    state = leaf_state(8)
    state.settings = Settings(look_at_all_up_to=0)
    gang = [
        replace(order(name, counts=(4,), bid=bid * TARIFF), gang=("p", "q"))
        for name, bid in (("p", 9), ("q", 2))
    ]
    others = [order(f"x{number:02d}", counts=(8,), bid=3 * TARIFF) for number in range(12)]
    decision = decide(state, [TaskSubmitted(one, 0) for one in [*gang, *others]], Moment(1, 1))
    assert placed(decision) == ["p", "q"]
