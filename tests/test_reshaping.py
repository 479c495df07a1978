"""What a change of shape costs: a stop and a start, or a standstill where processes go on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.clock import named_random
from qipan.controller import verify
from qipan.engines.simulated import Behaviour
from qipan.events import EngineOffered, Resize, Stop, TaskExited, TaskSubmitted
from qipan.hardware import BoardId
from qipan.leases import Offer, Order, TaskId, Usage
from qipan.scheduler import Moment, Settings, State, decide
from qipan.scheduler.asks import asks_of
from qipan.scheduler.movable import cheapest, hungriest
from qipan.scheduler.reshaping import change_s
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.twin import World, arrivals, build_world, check_end, check_world
from test_scheduler import ENGINE, commands, run_until_started
from test_twin import LARGE, stormy_world
from worlds import FAST, TARIFF, leaf, order

pytestmark = pytest.mark.computes

A = TaskId("a")


def allowing(made: Order, reshape_s: float | None, start_s: float = 60.0, stop_s: float = 20.0) -> Order:
    points = tuple(
        replace(point, start_s=start_s, stop_s=stop_s, reshape_s=reshape_s) for point in made.curve.points
    )
    return replace(made, curve=replace(made.curve, points=points))


def board(*, in_place: bool = True, devices: int = 2, counted: bool = True, policy: str = "revenue") -> State:
    state = State(BoardId("dc"), Settings(in_place=counted, policy=policy))
    offer = Offer(FAST, devices, (), devices, TARIFF, "dc", "east")
    decide(state, [EngineOffered(ENGINE, (offer,), chooses=False, in_place=in_place)], Moment(0, 0))
    return state


def running(state: State, made: Order) -> None:
    decide(state, [TaskSubmitted(made, 0)], Moment(1, 1))
    run_until_started(state, "a")


def given_more(state: State, devices: int = 4) -> list[Resize]:
    """What is decided once there are more devices than the task holds."""
    offer = Offer(FAST, devices, (), devices, TARIFF, "dc", "east")
    in_place = state.engines[ENGINE].in_place
    facts = [EngineOffered(ENGINE, (offer,), chooses=False, in_place=in_place)]
    return commands(decide(state, facts, Moment(50, 50)), Resize)


def test_a_task_takes_more_devices_for_its_last_minute_where_that_is_no_new_start():
    short = allowing(order("a", work_s=60.0, counts=(2, 4)), 3.0)
    grows = {}
    for in_place in (True, False):
        state = board(in_place=in_place)
        running(state, short)
        grows[in_place] = [resize.points[0].devices for resize in given_more(state)]
    assert grows == {True: [4], False: []}


def test_where_values_drift_with_time_a_change_is_weighed_as_a_new_start():
    short = allowing(order("a", work_s=60.0, counts=(2, 4)), 3.0)
    state = board(policy="deadline")
    running(state, short)
    assert not given_more(state)


def test_the_reason_says_what_the_change_costs_and_how():
    state = board()
    running(state, allowing(order("a", work_s=1000.0, counts=(2, 4)), 3.0))
    offer = Offer(FAST, 4, (), 4, TARIFF, "dc", "east")
    facts = [EngineOffered(ENGINE, (offer,), chooses=False, in_place=True)]
    decision = decide(state, facts, Moment(50, 50))
    [reason] = [reason for reason in decision.reasons if reason.verdict == "grown"]
    assert reason.text.endswith("the change costs 3.0 s in place")


@pytest.mark.parametrize(("bid", "parked_after_s"), [(2.2, 1280), (2.7, 320), (16, 40)])
def test_what_has_just_begun_is_not_undone_for_a_little_more(bid, parked_after_s):
    """A stop and a start of 80 s must pay within as long as the task has run: what bids far more has its devices at once."""
    asked_s = [40, 80, 160, 320, 640, 1280]
    parked = []
    for after_s in asked_s:
        state = board(in_place=False)
        running(state, allowing(order("a", work_s=100_000.0, counts=(2,)), None))
        dearer = allowing(order("b", bid=round(bid * TARIFF), work_s=100_000.0, counts=(2,)), None)
        moment = Moment(1 + after_s, 1 + after_s)
        parked.append(bool(commands(decide(state, [TaskSubmitted(dearer, 0)], moment), Stop)))
    assert parked == [after_s >= parked_after_s for after_s in asked_s]


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_and_hungriest_are_those_that_counting_anew_finds(seed):
    world, _ = stormy_world(seed, settings=LARGE)
    read = 0

    def same(world: World) -> None:
        nonlocal read
        moment = Moment(world.clock.now_s(), world.clock.lease_s())
        for controller in world.tree.controllers.values():
            state = controller.state
            for key in [*state.tasks.lines]:
                kept = [cheapest(state, moment, key, 99, bool), hungriest(state, moment, key, 99, bool)]
                del state.tasks.lines[key]
                assert kept == [
                    cheapest(state, moment, key, 99, bool),
                    hungriest(state, moment, key, 99, bool),
                ]
                read += bool(kept[0])

    world.after_step.append(same)
    world.run(until_s=2000.0)
    assert read > 100


def exited(state: State, **changes: object) -> TaskExited:
    task = state.tasks[A]
    usage = Usage(A, 1, "dc", ENGINE, FAST, 2, task.point_id, 1.0, 60.0, 118.0, True)
    assert task.lease_id is not None
    fact = TaskExited(
        A, task.lease_id, ENGINE, task.generation, 1, "resized", None, 30.0, 30.0, "", usage, final=False
    )
    return replace(fact, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("told", "cost_s"),
    [
        ({"in_place": True, "standstill_s": 0.4}, 0.4),
        ({"in_place": True, "standstill_s": None}, 3.0),  # as planned
        ({"in_place": False}, 80.0),  # the engine said that it can; it could not
    ],
)
def test_what_a_change_cost_is_what_the_next_is_taken_to_cost(told, cost_s):
    state = board()
    running(state, allowing(order("a", work_s=1000.0, counts=(2, 4)), 3.0))
    assert given_more(state)
    decide(state, [exited(state, **told)], Moment(60, 60))
    again = decode_state(encode_state(state)).tasks[A]
    points = again.order.curve.points
    assert change_s(state, again, points[0], points[1]) == cost_s


def test_a_task_that_was_started_again_is_not_said_to_change_in_place():
    """Its larger point takes longer to stop than the change to it cost."""
    state, made = board(), allowing(order("a", work_s=1000.0, counts=(2, 4)), 3.0)
    small, large = made.curve.points
    running(state, replace(made, curve=replace(made.curve, points=(small, replace(large, stop_s=100.0)))))
    assert given_more(state)
    decide(state, [exited(state, in_place=False)], Moment(60, 60))
    task = decode_state(encode_state(state)).tasks[A]
    small, large = task.order.curve.points
    assert change_s(state, task, large, small) == large.stop_s + small.start_s


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0, 500), st.floats(0, 500), st.none() | st.floats(0, 1000), st.booleans(), st.floats(0, 999),
    st.sampled_from([(1, 2), (2, 4), (1, 2, 4), (4,)]),
)  # fmt: skip
def test_a_change_never_costs_more_than_a_new_start_and_the_first_devices_are_asked_no_more_for(
    start_s, stop_s, reshape_s, in_place, done_s, counts
):
    state, plain = board(in_place=in_place, devices=4), board(in_place=in_place, devices=4, counted=False)
    made = allowing(order("a", work_s=1000.0, counts=counts), reshape_s, start_s, stop_s)
    asks = []
    for one in (state, plain):
        running(one, made)
        one.tasks[A] = task = replace(one.tasks[A], done_s=done_s)
        now = task.point()
        assert now is not None
        for then in made.curve.points:
            assert 0 <= change_s(one, task, now, then) <= now.stop_s + then.start_s
        [offer] = asks_of(one, Moment(60, 60))
        asks.append(offer.asks)
    assert sum(step.devices for step in asks[0]) == sum(step.devices for step in asks[1]) == 4
    prices = [[step.price_micro_cny_per_device_hour for step in steps] for steps in asks]
    assert prices[0][0] <= prices[1][0]
    assert prices == [sorted(own) for own in prices]


def test_an_engine_that_can_change_in_place_from_now_on_is_asked_about_anew():
    """What was kept of the prices before would make a board that starts again from a snapshot decide otherwise."""
    state = replace(board(in_place=False, devices=4), top=False)
    running(state, allowing(order("a", work_s=1000.0, counts=(2, 4)), 3.0))
    before = asks_of(state, Moment(60, 60))
    offer = Offer(FAST, 4, (), 4, TARIFF, "dc", "east")
    facts = [EngineOffered(ENGINE, (offer,), chooses=False, in_place=True)]
    [told] = [
        fact for fact in decide(state, facts, Moment(61, 61)).reports if isinstance(fact, EngineOffered)
    ]
    assert told.offers != before
    assert told.offers == asks_of(decode_state(encode_state(state)), Moment(61, 61))


BEHAVIOUR = Behaviour(in_place=True)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_a_storm_of_tasks_that_change_in_place(seed):
    many = Settings(look_at_all_up_to=0) if seed % 2 else Settings()
    world, submitted = stormy_world(
        seed,
        20 if seed == 0 else 40,
        many,
        change=lambda made: allowing(made, 0.5, 5.0, 1.0),
        behaviour=BEHAVIOUR,
    )
    told: list[TaskExited] = []
    world.run(until_s=50_000)
    check_end(world, submitted)
    assert set(world.tree.root.state.over.values()) == {"done"}
    for name in ("dc1", "dc2", "dc3"):
        said = world.simulated(BoardId(name)).observe(0)
        told += [fact for _, fact in said if isinstance(fact, TaskExited) and fact.in_place]
    assert told, "none of them did"
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, controller.state.settings, top=controller.parent is None)


def run_day(seed: int, *, counted: bool, policy: str = "revenue", work_s: float = 600.0) -> dict[str, float]:
    """Tasks that come and go on sixteen devices for four hours; they start in five minutes and change in three seconds.  Mean
    completion time, the same with each task weighed by its bid, and how often one was parked for others."""
    rng = named_random(seed, "orders")
    orders = []
    for i in range(24):
        made = order(
            f"t{i:03d}", bid=rng.choice([1, 2, 4]) * TARIFF, work_s=rng.expovariate(1 / work_s) + 120,
            counts=(1, 2, 4, 8), submitted_s=rng.uniform(0, 4 * 3600),
        )  # fmt: skip
        orders.append(allowing(made, 3.0, 300.0, 20.0))
    chosen = Settings(in_place=counted, policy=policy)
    world = build_world(leaf("dc1", 16), seed=seed, settings=chosen, behaviour=BEHAVIOUR)
    world.happenings = arrivals(orders)
    ended: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        for task_id in world.tree.root.state.over:
            ended.setdefault(task_id, world.clock.now_s())

    world.after_step += [check_world, watch]
    world.run(until_s=200_000)
    check_end(world, {one.task_id for one in orders})
    took = [(one.bid_micro_cny_per_device_hour, ended[one.task_id] - one.submitted_s) for one in orders]
    weighed = sum(bid * took_s for bid, took_s in took) / sum(bid for bid, _ in took)
    jct_s = sum(took_s for _, took_s in took) / len(took)
    parks = len(world.simulated(BoardId("dc1")).parks)
    return {"jct_s": jct_s, "weighed_jct_s": weighed, "parks": parks}


@pytest.mark.slow
def test_fewer_tasks_are_parked_for_others_where_a_board_knows_how_cheap_a_change_is():
    parks = {
        counted: [run_day(seed, counted=counted)["parks"] for seed in range(6)] for counted in (True, False)
    }
    print("parked for others, changes counted as what they are, and as new starts:", parks)
    assert sum(parks[True]) < 0.8 * sum(parks[False])
