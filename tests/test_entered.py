"""A task that was submitted at a board below runs there if that is good enough, else rises, region by region."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.clock import named_random
from qipan.events import CancelRequested, EngineOffered, Reserve, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import AskStep, EngineId, Offer, TaskId
from qipan.scheduler import Moment, State, decide
from qipan.scheduler.entered import HOME, NEAR
from qipan.twin import Happening, World, arrivals, build_world, check_end, check_world
from qipan.twin.world import cut_off
from test_scheduler import leaf_state
from test_twin import BOARDS, run_storm
from worlds import FAST, SLOW, TARIFF, leaf, nation, order

pytestmark = pytest.mark.computes
FULL = {"counts": (4,), "work_s": 3000.0, "elastic": False, "bid": 9 * TARIFF}


def grid(dc1: int = TARIFF, dc2: int = TARIFF, dc3: int = TARIFF) -> BoardSpec:
    """Two centres in the east, one in the west."""
    east = BoardSpec(BoardId("east"), children=(leaf("dc1", tariff=dc1), leaf("dc2", tariff=dc2)))
    west = BoardSpec(BoardId("west"), children=(leaf("dc3", region="west", tariff=dc3),))
    return BoardSpec(BoardId("cn"), children=(east, west))


def entering(spec: BoardSpec, *others: str, at: str = "dc1", until_s: float = 300.0, **more) -> World:
    """`t` enters at 50 s, when `others` are full."""
    world = build_world(spec, seed=1)
    world.after_step.append(check_world)
    full = [order(f"full-{name}", regions=(name,), **FULL) for name in others]
    task = order("t", **{"counts": (4,), "work_s": 1000.0, "submitted_s": 50.0, "objective": "cost", **more})
    world.happenings = [*arrivals(full), *arrivals([task], at=lambda _task: BoardId(at))]
    world.run(until_s=until_s)
    return world


def place(world: World, task_id: str = "t") -> str:
    return next(
        (board for board in world.tree.engines if task_id in world.simulated(BoardId(board)).running()), ""
    )


def told(world: World, board: str, verdict: str = "rose") -> list[str]:
    return [text for _, said, text in world.tree.stores[BoardId(board)].reasons_of("t") if said == verdict]


def test_it_runs_where_it_was_submitted_though_another_place_is_a_little_cheaper():
    world = entering(grid(dc3=TARIFF * 9 // 10, dc2=TARIFF * 9 // 10))
    assert place(world) == "dc1"
    assert told(world, "cn") == told(world, "east") == []
    assert place(entering(grid(dc3=TARIFF * 9 // 10), at="cn")) == "dc3", "at the top it has no home"


def test_it_rises_when_another_place_is_far_cheaper_and_the_reason_names_both_prices():
    world = entering(grid(dc1=3 * TARIFF, dc3=TARIFF // 2), bid=3 * TARIFF)
    assert place(world) == "dc3"
    [text] = told(world, "cn")
    assert text.startswith("submitted at dc1, goes to dc3, where sim/fast:4 is worth ")
    assert "dc1 asks 0.0000 CNY/h for 4 devices of sim/fast, sim/fast:4 is worth " in text


def test_it_rises_region_by_region():
    assert place(entering(grid())) == "dc1"
    near = entering(grid(dc3=TARIFF * 95 // 100), "dc1")
    assert place(near) == "dc2", "in its own region, though the other is a little cheaper"
    assert "dc1 has 0 devices of sim/fast to give" in told(near, "cn")[0]
    assert place(entering(grid(), "dc1", "dc2")) == "dc3"


def test_it_stays_within_the_owners_limits():
    kept = entering(grid(), "dc1", regions=("dc1",))
    assert place(kept) == ""
    assert kept.tree.root.state.tasks[TaskId("t")].phase == "queued"
    full = entering(grid(), "dc1", regions=("dc1",), until_s=100_000.0)
    assert full.tree.root.state.over[TaskId("t")] == "done"
    assert [life[0] for life in full.simulated(BoardId("dc1")).lifetimes] == ["full-dc1", "t"]


def test_a_board_that_cannot_run_it_at_all_hands_it_on():
    spec = BoardSpec(BoardId("cn"), children=(leaf("dc1", chip=SLOW), leaf("dc2")))
    world = entering(spec)
    assert place(world) == "dc2"
    assert told(world, "cn")[0].endswith("dc1 offers no chip class it can run on")


@pytest.mark.parametrize("later_s", [0.0, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("full", [(), ("dc1",), ("dc1", "dc2", "dc3")])
def test_a_cancelled_one_is_over_on_every_board(later_s, full):
    world = build_world(grid(), seed=2)
    world.after_step.append(check_world)
    orders = [order(f"full-{name}", regions=(name,), **FULL) for name in full]
    task = order("t", counts=(4,), submitted_s=50.0)
    cancel = CancelRequested(TaskId("t"), "alice")
    world.happenings = [
        *arrivals(orders), *arrivals([task], at=lambda _task: BoardId("dc1")),
        Happening(50.0 + later_s, "then cancel", lambda world: world.tree.root.accept(cancel)),
    ]  # fmt: skip
    world.run(until_s=50_000.0)
    check_end(world, {TaskId("t"), *(one.task_id for one in orders)})
    assert world.tree.root.state.over[TaskId("t")] == "cancelled"
    assert world.all_over()


def test_one_that_rose_while_its_board_was_cut_off_runs_once():
    world = build_world(grid(), seed=3)
    world.after_step.append(check_world)
    tasks = [
        order(f"t{i}", counts=(2,), work_s=400.0, submitted_s=50.0 + i, on_partition="restart")
        for i in range(4)
    ]
    world.happenings = [
        *arrivals(tasks, at=lambda _task: BoardId("dc1")),
        *cut_off(BoardId("dc1"), 52.5, 200.0),
    ]
    world.run(until_s=50_000.0)
    check_end(world, {one.task_id for one in tasks})
    assert set(world.tree.root.state.over.values()) == {"done"}


@pytest.mark.parametrize("seed", range(8))
def test_storms_in_which_every_task_enters_somewhere(seed):
    rng = named_random(seed, "entered")
    run_storm(seed, change=lambda order: replace(order, entered_at=rng.choice(BOARDS)))


MICRO = st.integers(0, 3 * TARIFF)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(MICRO, st.integers(TARIFF // 4, 3 * TARIFF), st.integers(0, 4)), min_size=3, max_size=3),
       st.sampled_from(["cost", "balanced", "time"]))  # fmt: skip
def test_home_is_chosen_exactly_when_no_other_place_is_worth_so_much_more(places, objective):
    """dc1 and dc2 behind `east`, dc3 beside it; asks, tariffs and free devices at random."""
    state, offers = State(BoardId("cn")), []
    for number, (ask, tariff, free) in enumerate(places, 1):
        steps = (AskStep(free, ask),) if free else ()
        offers.append(Offer(FAST, 4, steps, free, tariff, f"dc{number}", "any"))
    for name, own in (("east", offers[:2]), ("dc3", offers[2:])):
        decide(state, [EngineOffered(EngineId(name), tuple(own), chooses=True)], Moment(0, 0))
    task = replace(order("t", counts=(2,), bid=2 * TARIFF, objective=objective), entered_at="dc1")
    sent = [
        sent
        for sent in decide(state, [TaskSubmitted(task, 0)], Moment(1, 1)).commands
        if isinstance(sent.command, Reserve)
    ]
    weight = {"cost": 0.95, "balanced": 0.5, "time": 0.0}[objective]
    value = 2 * TARIFF * 2  # of an hour at its only point
    worth = [
        value - weight * min(value, 2 * tariff) - 2 * ask + share * value
        for (ask, tariff, _), share in zip(places, (HOME, NEAR, 0.0), strict=True)
    ]
    gained = [one - share * value for one, share in zip(worth, (HOME, NEAR, 0.0), strict=True)]
    can = [number for number in range(3) if places[number][2] >= 2 and gained[number] > 1e-6]
    if not can:
        assert not sent or max(abs(one) for one in gained) < 1.0
        return
    best = max(can, key=lambda number: worth[number])
    if sorted(worth[number] for number in can)[-2:][0] < worth[best] - 1.0 or len(can) == 1:
        assert [one.engine for one in sent] == ["dc3" if best == 2 else "east"]


@pytest.mark.parametrize(
    ("ask", "largest", "goes"), [(TARIFF // 10, 4, "east"), (1000 * TARIFF, 4, "engine"), (0, 0, "engine")]
)
def test_a_board_with_chips_of_its_own_keeps_what_could_not_pay_for_its_home(ask, largest, goes):
    """Its home had devices to give up for a thousand times as much: the task waited for them beside free ones."""
    state = leaf_state()
    offer = Offer(FAST, 4, (AskStep(4, ask),), largest, TARIFF, "east", "east")
    decide(state, [EngineOffered(EngineId("east"), (offer,), chooses=True)], Moment(0, 0))
    placed = decide(state, [TaskSubmitted(order("t", entered_at="east"), 0)], Moment(1, 1)).commands
    assert [(sent.engine, type(sent.command)) for sent in placed] == [(goes, Reserve)]


def test_a_board_with_chips_of_its_own_sends_it_home_first():
    spec = replace(nation(), pools=leaf("cn").pools)
    world = build_world(spec, seed=1)
    world.happenings = arrivals([order("t", counts=(4,), submitted_s=5.0)], at=lambda _task: BoardId("dc1"))
    world.run(until_s=60.0)
    assert place(world) == "dc1"
