"""A wide task that waits for others to end has devices kept for it; what ends before, or may be parked, runs meanwhile."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.controller import verify
from qipan.curves import Need
from qipan.events import CancelRequested, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import TaskId
from qipan.scheduler import Settings, decide
from qipan.scheduler.backfill import Reservation, ends_of
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.state import Moment, Phase, State, TaskState
from qipan.scheduler.why import changes_that_start
from qipan.twin import Happening, World, arrivals, build_world, check_end, check_world
from test_quota import parked
from test_scheduler import leaf_state, run_until_started
from test_twin import LARGE
from worlds import FAST, TARIFF, leaf, order

pytestmark = pytest.mark.computes
DC = BoardId("dc")


def stream(
    settings: Settings = Settings(),  # noqa: B008
    *,
    elastic: bool = False,
    every_s: float = 27.0,
    until_s: float = 50_000.0,
    spec: BoardSpec | None = None,
) -> World:
    """A hundred narrow tasks of 100 s keep four devices nearly full; one of four devices that bids four times as much comes at 210 s."""
    world = build_world(spec or leaf("dc", 4), seed=1, settings=settings)
    world.after_step.append(check_world)
    narrow = [order(f"n{i:03}", counts=(1,), elastic=elastic, submitted_s=i * every_s) for i in range(100)]
    wide = order("wide", counts=(4,), work_s=300.0, elastic=False, bid=8 * TARIFF, submitted_s=210.0)
    world.happenings = arrivals([*narrow, wide])
    world.run(until_s=until_s)
    return world


def began_s(world: World, task_id: str = "wide") -> float:
    return min(life[4] for life in world.simulated(DC).lifetimes if life[0] == task_id)


@pytest.mark.parametrize("settings", [Settings(), LARGE, Settings(policy="fair")])
def test_a_wide_task_begins_when_those_that_ran_have_ended_not_when_no_narrow_one_comes_any_more(settings):
    world = stream(settings)
    assert began_s(world) < 210.0 + 350.0
    check_end(world, {TaskId("wide"), *(TaskId(f"n{i:03}") for i in range(100))})
    assert set(world.tree.root.state.over.values()) == {"done"}
    verify(world.tree.root.store, DC, settings, top=True)


def test_once_it_runs_nothing_is_kept_for_it_any_more():
    state = leaf_state(4)
    decide(state, [TaskSubmitted(order("n", counts=(3,), elastic=False), 0)], Moment(1, 1))
    run_until_started(state, "n")
    wide = TaskSubmitted(order("wide", counts=(4,), elastic=False), 0)
    assert [one.verdict for one in decide(state, [wide], Moment(2, 2)).reasons] == ["reserved"]
    assert state.first == "wide"
    decide(state, [parked(state, "n", 3.0), CancelRequested(TaskId("n"), "me")], Moment(3, 3))
    assert (state.tasks[TaskId("wide")].phase, state.first, state.first_at) == (Phase.RESERVING, "", "")


def test_without_it_the_wide_task_waits_for_the_last_narrow_one():
    assert began_s(stream(Settings(backfill=False))) > 2500.0


def test_its_reason_says_when_it_can_begin_and_why_names_it_to_those_behind():
    world = stream(until_s=280.0)
    state, now_s = world.tree.root.state, world.clock.now_s()
    [text] = [text for _, verdict, text in world.tree.root.store.reasons_of("wide") if verdict == "reserved"]
    assert text.startswith(
        "dc-engine keeps 4 devices for it: by what is left of those that run it can begin in "
    )
    behind = [task for task in state.tasks.values() if task.phase == "queued" and task.task_id != "wide"]
    assert behind
    for task in behind:
        assert why_waiting_text(state, task, now_s) == (
            "devices at dc are kept for wide, and it would end after that can begin"
        )
    moment = Moment(now_s, world.clock.lease_s())
    names = {
        change.constraint for task in behind for change in changes_that_start(state, task.task_id, moment)
    }
    assert "reservation" in names


def test_why_tells_one_behind_what_would_start_it_even_where_the_first_would_take_all():
    """What may be parked is not held up by the first; a rigid one starts only without it and without those that run."""
    world = build_world(leaf("dc", 4), seed=1)
    dear = order("wide", counts=(4,), elastic=False, bid=8 * TARIFF, submitted_s=5.0)
    behind = [order(name, counts=(4,), elastic=name == "soft", submitted_s=6.0) for name in ("soft", "stiff")]
    world.happenings = arrivals([order("runs", counts=(4,), work_s=900.0, elastic=False), dear, *behind])
    world.run(until_s=10.0)
    state, moment = world.tree.root.state, Moment(world.clock.now_s(), world.clock.lease_s())
    assert state.first == "wide"
    texts = {
        name: [one.text for one in changes_that_start(state, TaskId(name), moment)]
        for name in ("soft", "stiff")
    }
    assert any(text.startswith("when runs ends") for text in texts["soft"])
    assert "if the other tasks were not there" in texts["stiff"]


def short_and_long(**more: object) -> World:
    """Two long ones end at 400 s and at 1000 s; a wide one of four waits, and at 100 s come one that ends before and one that does not."""
    world = build_world(leaf("dc", 4), seed=1)
    rigid = {"elastic": False, **more}
    world.happenings = arrivals([
        order("a", counts=(1,), work_s=400.0, elastic=False), order("b", counts=(2,), work_s=1000.0, elastic=False),
        order("wide", counts=(3,), work_s=300.0, elastic=False, bid=8 * TARIFF, submitted_s=50.0),
        order("before", counts=(1,), work_s=200.0, submitted_s=100.0, **rigid),
        order("later", counts=(1,), work_s=5000.0, submitted_s=400.0, **rigid),
        order("over", counts=(1,), work_s=5000.0, submitted_s=450.0, **rigid),
    ])  # fmt: skip
    world.run(until_s=40_000.0)
    return world


def test_what_ends_before_or_takes_what_is_left_over_starts_and_what_does_not_waits():
    world = short_and_long()
    assert began_s(world, "before") < 110.0
    assert began_s(world, "later") < 420.0, "one device is left over beside three of four"
    assert began_s(world, "over") > began_s(world, "wide")
    assert began_s(world, "wide") < 1050.0


def test_what_may_be_parked_starts_and_makes_room():
    world = short_and_long(elastic=True)
    assert began_s(world, "over") < 520.0
    assert began_s(world, "wide") < 1060.0


def test_a_reservation_does_not_bar_who_takes_up_what_it_lent():
    state = State(DC)
    wide = TaskState(order("wide", counts=(4,), elastic=False), Phase.QUEUED, 0.0)
    endless = order("replica", counts=(1,), work_s=1e9, elastic=False, preemptible=False)
    newcomer = TaskState(endless, Phase.QUEUED, 0.0)
    owner = replace(newcomer, lent=(Need(FAST, 1),))
    kept = Reservation(wide, "dc-engine|sim/fast", 4, 100.0, 0)
    [point] = endless.curve.points
    assert kept.bars(state, newcomer, kept.key, point, 0.0)
    assert not kept.bars(state, owner, kept.key, point, 0.0)


def test_many_wide_tasks_that_wait_look_at_those_that_run_once(monkeypatch):
    """On a leaf with thousands of tasks that is most of what an event costs."""
    looked: list[str] = []

    def counted(holders, key, now_s):
        looked.append(key)
        return ends_of(holders, key, now_s)

    monkeypatch.setattr("qipan.scheduler.backfill.ends_of", counted)
    world = build_world(leaf("dc", 4), seed=1, settings=LARGE)
    dear = [order(f"n{i}", counts=(1,), work_s=900.0, bid=900 * TARIFF) for i in range(4)]
    wide = [order(f"w{i}", counts=(4,), elastic=False, submitted_s=50.0) for i in range(12)]
    world.happenings = arrivals([*dear, *wide])
    world.run(until_s=49.0)
    looked.clear()
    before = world.tree.root.state.tick
    world.run(until_s=60.0)
    assert {task.phase for name, task in world.tree.root.state.tasks.items() if name.startswith("w")} == {
        "queued"
    }
    assert 0 < len(looked) <= world.tree.root.state.tick - before


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([20.0, 100.0, 400.0]), st.floats(0, 2000)),
        min_size=1,
        max_size=25,
    ),
    st.booleans(),
)
def test_the_dearest_wide_task_begins_no_later_than_when_those_that_ran_before_it_have_ended(narrow, large):
    """All rigid, starts and speeds exact but for a few per cent: nothing that comes later may hold it up."""
    world = build_world(leaf("dc", 4), seed=3, settings=LARGE if large else Settings())
    world.after_step.append(check_world)
    orders = [
        order(f"n{i:02}", counts=(count,), work_s=work_s, elastic=False, submitted_s=at_s, bid=TARIFF)
        for i, (count, work_s, at_s) in enumerate(narrow)
    ]
    wide = order("wide", counts=(4,), work_s=50.0, elastic=False, bid=900 * TARIFF, submitted_s=500.0)
    world.happenings = arrivals([*orders, wide])
    world.run(until_s=200_000.0)
    check_end(world, {wide.task_id, *(one.task_id for one in orders)})
    lives = world.simulated(DC).lifetimes
    before = [end_s for name, _, _, _, start_s, end_s in lives if start_s <= 500.0 < end_s and name != "wide"]
    assert began_s(world) <= max(before, default=500.0) * 1.25 + 5.0


TREE = BoardSpec(BoardId("cn"), children=(leaf("dc", 4),))


def test_a_board_above_keeps_devices_of_a_child_as_a_leaf_does():
    world = stream(spec=TREE)
    assert began_s(world) < 210.0 + 350.0
    check_end(world, {TaskId("wide"), *(TaskId(f"n{i:03}") for i in range(100))})
    assert set(world.tree.root.state.over.values()) == {"done"}
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, Settings(), top=controller.parent is None)
    waiting = stream(spec=TREE, until_s=280.0)
    state, now_s = waiting.tree.root.state, waiting.clock.now_s()
    assert state.first_at == "dc|sim/fast|dc"
    behind = [task for task in state.tasks.values() if task.phase == "queued" and task.task_id != "wide"]
    moment = Moment(now_s, waiting.clock.lease_s())
    names = {
        change.constraint for task in behind for change in changes_that_start(state, task.task_id, moment)
    }
    assert "reservation" in names
    assert {why_waiting_text(state, task, now_s) for task in behind} == {
        "devices at dc are kept for wide, and it would end after that can begin"
    }


def test_one_kept_back_above_goes_to_another_child_and_the_wide_one_takes_whichever_is_free_first():
    """dc2 comes free by surprise: the wide task does not wait for the child that was kept for it."""
    spec = BoardSpec(BoardId("cn"), children=(leaf("dc", 4), leaf("dc2", 4)))
    world = build_world(spec, seed=1)
    world.after_step.append(check_world)
    world.happenings = arrivals([
        order("a", counts=(4,), work_s=500.0, elastic=False, regions=("dc",)),
        order("b", counts=(4,), work_s=5000.0, elastic=False, regions=("dc2",)),
        order("wide", counts=(4,), work_s=300.0, elastic=False, bid=8 * TARIFF, submitted_s=50.0),
    ])  # fmt: skip
    world.happenings.append(
        Happening(100.0, "b ends", lambda world: world.tree.root.accept(CancelRequested(TaskId("b"), "x")))
    )
    world.run(until_s=20_000.0)
    [life] = [life for life in world.simulated(BoardId("dc2")).lifetimes if life[0] == "wide"]
    assert life[4] < 110.0
