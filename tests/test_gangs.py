"""What starts together: all of it or nothing, whatever bids, quotas, storage and boards do."""

from dataclasses import replace

import pytest

from qipan.clock import named_random
from qipan.events import (
    CapacityChanged,
    EngineOffered,
    LeaseRefused,
    ParkRequested,
    Reserve,
    RulesSet,
    Start,
    Stop,
    StorageOffered,
    TaskSubmitted,
)
from qipan.hardware import BoardId
from qipan.leases import AskStep, Offer, Order, Room, TaskId
from qipan.quota import QuotaRule
from qipan.scheduler import Moment, Phase, Settings, State, decide
from qipan.scheduler.tasks import LEFT_IN_LINE
from qipan.scheduler.why import why_waiting
from qipan.twin import (
    Faults,
    Happening,
    World,
    arrivals,
    build_world,
    check_end,
    check_world,
    crash,
    kill_task,
)
from test_scheduler import ENGINE, commands, leaf_state
from test_stages import exited, grant, orders, submitted
from worlds import FAST, TARIFF, leaf, order

pytestmark = pytest.mark.timeout(120)


def two_gangs() -> list[Order]:
    first = [replace(one, task_id=TaskId(f"x{one.task_id}")) for one in orders()[:2]]
    first = [replace(one, gang=("xt.a", "xt.b"), stages=("xt.a", "xt.b"), feeds="") for one in first]
    return [*first, *orders()[:2]]


@pytest.mark.parametrize("last", ["xt.a", "t.b"])
def test_gangs_that_ran_before_and_come_back_never_hold_half_of_each_others_devices(last):
    state = leaf_state(devices=4)
    submitted(state, *two_gangs())
    for task_id in list(state.tasks):
        grant(state, task_id)
    assert {task.phase for task in state.tasks.values()} == {Phase.STARTING}
    offer = replace(state.engines[ENGINE].offers[0], devices=3, largest_gang=3)
    decide(state, [ParkRequested(True, "test"), EngineOffered(ENGINE, (offer,), False)], Moment(3, 3))
    for task_id in sorted(state.tasks, key=lambda name: name == last)[:3]:
        exited(state, task_id, "parked", 4.0)
    placed = {
        command.task_id
        for command in commands(decide(state, [ParkRequested(False, "test")], Moment(5, 5)), Reserve)
    }
    whole = [{"xt.a", "xt.b"}, {"t.a", "t.b"}]
    assert placed == next(gang for gang in whole if last not in gang)
    for task_id in sorted(placed)[:1]:
        assert commands(grant(state, task_id, 6.0), Start) == [], "its other part has no lease yet"
    assert len(commands(grant(state, max(placed), 6.0), Start)) == 2
    exited(state, last, "parked", 7.0)
    assert "it starts together with" in why_waiting(state, TaskId(last), 7, 7)[0]["text"]


@pytest.mark.parametrize("chooses", [False, True])
def test_of_two_gangs_that_take_each_others_places_the_dearer_one_is_placed(chooses):
    state = leaf_state(devices=2)
    offer = replace(state.engines[ENGINE].offers[0], asks=(AskStep(2, 0),) if chooses else ())
    decide(state, [EngineOffered(ENGINE, (offer,), chooses)], Moment(0, 0))
    bids = {"a": 8 * TARIFF, "b": 2 * TARIFF}  # the two dearest tasks are of two gangs
    orders_ = [replace(one, bid_micro_cny_per_device_hour=bids[one.task_id[-1]]) for one in two_gangs()]
    decision = submitted(state, *orders_)
    assert {command.task_id for command in commands(decision, Reserve)} == {"t.a", "t.b"}


def test_a_dearer_gang_without_room_for_all_keeps_no_place_from_one_that_has_it():
    state = leaf_state(devices=2)
    wide = order("xt.b", gang=("xt.a", "xt.b"), stages=("xt.a", "xt.b"), counts=(2,), elastic=False)
    dear, _, *others = [
        replace(one, bid_micro_cny_per_device_hour=(9 if one.task_id == "xt.a" else 4) * TARIFF)
        for one in two_gangs()
    ]
    decision = submitted(state, dear, wide, *others)
    assert {command.task_id for command in commands(decision, Reserve)} == {"t.a", "t.b"}


def test_two_gangs_that_each_fit_alone_never_hold_half_of_each_others_devices():
    state = leaf_state(devices=3)
    decision = submitted(state, *two_gangs())
    placed = {command.task_id for command in commands(decision, Reserve)}
    assert placed in ({"xt.a", "xt.b"}, {"t.a", "t.b"})
    waits = next(name for name in ("t.a", "xt.a") if name not in placed)
    assert "it starts together with" in why_waiting(state, TaskId(waits), 2, 2)[0]["text"]


def test_a_gang_that_waits_stands_in_line_once_however_often_a_board_offers():
    state = State(BoardId("cn"), Settings())
    for number in range(100):
        tariff = TARIFF + number % 2
        offer = Offer(FAST, 2, (AskStep(1, 0),), 1, tariff, "dc", "east")  # room for one of two
        decide(state, [EngineOffered(ENGINE, (offer,), chooses=True)], Moment(number, number))
        if number == 0:
            submitted(state, *orders()[:2])
    assert {task.phase for task in state.tasks.values()} == {Phase.QUEUED}
    assert sum(len(group.line) for group in state.tasks.groups.values()) <= 2 * (2 + LEFT_IN_LINE)


def gang_of(name: str, bids: tuple[int, ...] = (8, 4), devices: int = 1, **more):
    ids = tuple(f"{name}.{number}" for number in range(len(bids)))
    more = {"gang": ids, "stages": ids, "elastic": False, "counts": (devices,), "work_s": 20.0, **more}
    return [order(one, bid=bid * TARIFF, **more) for one, bid in zip(ids, bids, strict=True)]


def under(ceiling: int, devices: int = 8) -> State:
    state = leaf_state(devices)
    decide(state, [RulesSet((QuotaRule(BoardId("dc"), "alice", ceiling=ceiling),))], Moment(0.5, 0.5))
    return state


def reserved(decision) -> list[str]:
    return [command.task_id for command in commands(decision, Reserve)]


def test_a_gang_beyond_its_tenants_ceiling_reserves_nothing_and_keeps_nothing_from_others():
    state = under(ceiling=1, devices=2)
    bobs = replace(order("bob", counts=(2,), elastic=False), tenant="bob")
    assert reserved(submitted(state, *gang_of("x"), bobs)) == ["bob"]
    now, change = why_waiting(under_with_gang(), TaskId("x.0"), 2, 2)
    assert now["text"].endswith("has a ceiling of 1: 0 are held, 2 more are wanted")
    assert change["text"].startswith("with a ceiling of 2 in"), "no bid of its own starts the other"


def under_with_gang() -> State:
    state = under(ceiling=1)
    submitted(state, *gang_of("x"))
    return state


def test_a_gang_that_keeps_its_own_apart_or_has_no_storage_for_all_reserves_nothing():
    assert reserved(submitted(leaf_state(), *gang_of("x", apart="disk"))) == []
    state = leaf_state()
    decide(state, [StorageOffered(ENGINE, Room("nas", 30, 0.0))], Moment(0.5, 0.5))
    large = [with_storage(one, 20) for one in gang_of("x")]
    assert reserved(submitted(state, *large, *gang_of("y"))) == ["y.0", "y.1"]


def with_storage(one: Order, size_bytes: int) -> Order:
    points = tuple(replace(point, storage_bytes=size_bytes) for point in one.curve.points)
    return replace(one, curve=replace(one.curve, points=points))


def test_of_two_gangs_under_a_ceiling_one_is_whole():
    state = under(ceiling=2)
    assert reserved(submitted(state, *gang_of("x"), *gang_of("y"))) == ["x.0", "x.1"]


def test_one_that_waits_too_long_for_another_of_its_gang_gives_its_devices_back():
    state = leaf_state(2)
    submitted(state, *gang_of("x"))
    grant(state, "x.0")
    lost = state.tasks[TaskId("x.1")]
    facts = [
        CapacityChanged(ENGINE, FAST, -1, "a node went"),
        LeaseRefused(lost.task_id, lost.lease_id, ENGINE, lost.generation, "no devices"),
    ]
    decide(state, facts, Moment(2, 2))
    assert not commands(decide(state, [], Moment(61, 61)), Stop)
    decision = decide(state, [], Moment(62, 62))
    assert [command.task_id for command in commands(decision, Stop)] == ["x.0"]
    assert "x.1, with which it starts, found no place for 60 s" in decision.reasons[0].text
    task = state.tasks[TaskId("x.0")]
    given = LeaseRefused(task.task_id, task.lease_id, ENGINE, task.generation, "never started")
    assert reserved(decide(state, [given, *submissions(order("y", counts=(1,)))], Moment(63, 63))) == ["y"]


def submissions(*orders_: Order) -> list[TaskSubmitted]:
    return [TaskSubmitted(one, 0) for one in orders_]


@pytest.mark.parametrize("seed", range(3))
def test_no_gang_stays_partly_reserved_under_a_ceiling_with_crashes_and_kills(seed):
    rng = named_random(seed, "gangs under a ceiling")
    world = build_world(leaf("dc", 4), seed=seed, faults=Faults(lose=0.1, delay=0.2, repeat=0.1))
    rule = QuotaRule(BoardId("dc"), "alice", ceiling=3)
    found = []
    for number in range(12):
        bids = tuple(rng.choice([2, 4, 8]) for _ in range(rng.choice([2, 3])))
        found += gang_of(f"g{number:02d}", bids, submitted_s=rng.uniform(0, 30))
    world.after_step += [check_world, no_gang_partly_reserved]
    world.happenings = [
        Happening(0.0, "rules", lambda world: world.tree.root.accept(RulesSet((rule,)))),
        *arrivals(found),
        Happening(rng.uniform(10, 100), "crash", crash("dc")),
        *[Happening(rng.uniform(10, 200), f"kill {n}", kill_task("dc", n)) for n in range(2)],
    ]
    world.run(until_s=20_000)
    check_end(world, {one.task_id for one in found})
    assert set(world.tree.root.state.over.values()) == {"done"}


def no_gang_partly_reserved(world: World) -> None:
    state, now_s = world.tree.root.state, world.clock.now_s()
    for task in state.tasks.in_phase(Phase.RESERVED):
        mates = [state.tasks.get(TaskId(name)) for name in task.order.gang]
        if any(one is not None and one.phase is Phase.QUEUED for one in mates):
            held_s = now_s - task.since_s
            assert held_s <= 2 * state.settings.lease_s, (task.task_id, held_s)
