"""Policies: what each maximises, and the peers by their papers' own examples."""

import math

import pytest

from qipan.errors import InvalidInput
from qipan.leases import TaskId
from qipan.scheduler import Settings
from qipan.scheduler.policies import OBJECTIVES, PEERS, Contender, Option, objective_of
from qipan.scheduler.policies.gavel import OBJECTIVES as SHARES
from qipan.scheduler.policies.gavel import Gavel, Program, max_min_fairness, min_total_duration
from qipan.scheduler.policies.jct import Jct
from qipan.scheduler.policies.kueue import Kueue
from qipan.scheduler.policies.sia import Sia, restart_factor
from qipan.scheduler.policies.tails import LeastMean, least_makespan_s
from qipan.twin import build_world, check_end, check_world
from qipan.twin.rounds import check
from qipan.twin.world import arrivals
from worlds import leaf, nation, order, random_orders

np = pytest.importorskip("numpy")


def contender(
    task_id: str, rates: dict[str, float], *, devices: int = 1, left: float | None = None, **more: object
) -> Contender:
    options = tuple(Option(f"{pool}:{devices}", ((pool, devices),), rate) for pool, rate in rates.items())
    return Contender(task_id, options, 0.0, left=left, **more)  # type: ignore[arg-type]


def elastic(task_id: str, rates: dict[int, float], **more: object) -> Contender:
    options = tuple(Option(f"a:{count}", (("a", count),), rate) for count, rate in rates.items())
    return Contender(task_id, options, 0.0, **more)  # type: ignore[arg-type]


def program(rates: list[list[float]], devices: list[float], left: list[float]) -> Program:
    ones = np.ones(len(rates))
    return Program(np.array(rates), ones, np.array(devices), ones, np.array(left), ones, ones)


def test_gavel_gives_the_shares_of_its_paper():
    """OSDI 2020, section 4.1: three jobs, one device of each of two types; heterogeneity raises everybody's share."""
    given = program([[40.0, 10.0], [12.0, 4.0], [100.0, 50.0]], [1.0, 1.0], [1.0] * 3)
    shares = max_min_fairness(given)
    equal = given.rates @ np.full(2, 0.5)
    assert shares.sum(axis=0) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert ((given.rates * shares).sum(axis=1) / equal).min() > 1 / 3 * 2 * 1.03


def test_gavel_shares_what_there_is_where_a_pool_has_nothing_to_give():
    """All held by tasks that just start, or without power: the board could decide nothing any more."""
    a = Contender("a", (Option("p", (("dark", 1),), 1.0),), 0.0)
    b = Contender("b", (Option("p", (("lit", 1),), 1.0),), 0.0)
    assert PEERS["gavel"].choose([a], {"dark": 0}, 1.0) == {}
    assert PEERS["gavel"].choose([a, b], {"dark": 0, "lit": 1}, 1.0) == {"b": "p"}


def test_the_least_makespan_is_that_of_the_program():
    given = program([[2.0, 1.0], [2.0, 1.0]], [1.0, 1.0], [100.0, 100.0])
    assert least_makespan_s(given) == pytest.approx(100 / 1.5), "each half of the time on the fast device"
    shares = min_total_duration(given)
    assert (given.left / (given.rates * shares).sum(axis=1)).max() == pytest.approx(100 / 1.5, rel=1e-6)


def test_sia_splits_alike_tasks_and_leaves_a_pinned_one_where_it_is():
    rates = {1: 1.0, 2: 1.9, 4: 3.4}
    assert Sia().choose([elastic("t1", rates), elastic("t2", rates)], {"a": 4}, 1000.0) == {
        "t1": "a:2",
        "t2": "a:2",
    }
    held = elastic("t1", rates, current="a:1", pinned=True)
    assert Sia().choose([held], {"a": 4}, 1000.0) == {"t1": "a:1"}


def test_a_restart_counts_less_the_older_the_task():
    young = elastic("t", {1: 1.0}, restart_s=50.0, restarts=0)
    assert restart_factor(young, 20.0) == 1.0
    assert restart_factor(young, 100.0) < restart_factor(young, 10_000.0) < 1.0


def test_jct_gives_the_shorter_of_two_more():
    rates = {1: 1.0, 2: 1.8, 3: 2.4}
    chosen = Jct(declared_size_power=1.0).choose(
        [elastic("long", rates, left=100_000.0), elastic("short", rates, left=1_000.0)], {"a": 4}, 0.0
    )
    assert chosen == {"short": "a:3", "long": "a:1"}


def test_tasks_of_one_shape_end_the_shortest_first_within_the_makespan():
    tasks = [contender(f"t{n}", {"a": 1.0}, left=3600.0 * (n + 1)) for n in range(4)]
    assert set(LeastMean().choose(tasks, {"a": 1}, 0.0)) == {"t0"}


def test_kueue_takes_borrowed_devices_back_for_the_owner():
    borrower = contender("b", {"a": 1.0}, devices=4, tenant="x", current="a:4")
    owner = contender("o", {"a": 1.0}, devices=2, tenant="y")
    assert Kueue().choose([borrower, owner], {"a": 4}, 10.0) == {"o": "a:2"}
    assert Kueue().choose([borrower], {"a": 4}, 10.0) == {"b": "a:4"}, (
        "what nobody else wants may be borrowed"
    )


@pytest.mark.parametrize("name", sorted(SHARES))
def test_every_share_policy_keeps_to_the_capacity_round_by_round(name):
    policy = Gavel(*SHARES[name], pools=("a", "b"))
    tasks = [contender(f"t{n}", {"a": 1.0 + n, "b": 1.0}, left=1e5, devices=1 + n % 2) for n in range(7)]
    for turn in range(12):
        chosen = policy.choose(tasks, {"a": 2, "b": 3}, 360.0 * turn)
        check(tasks, chosen, {"a": 2, "b": 3})
        assert chosen


def test_an_unknown_policy_is_named():
    with pytest.raises(InvalidInput, match="jct"):
        objective_of("magic")
    assert set(PEERS) < set(OBJECTIVES)


def test_the_objectives_rank_as_they_say():
    early, late = order("early"), order("late", submitted_s=5000.0)
    short, long = order("short", work_s=100.0), order("long", work_s=10_000.0)
    pressed = order("pressed", work_s=100.0, deadline_s=200.0)
    cheap, dear = order("cheap", bid=1), order("dear", bid=1_000_000)
    assert OBJECTIVES["fifo"].value(early, 0, 6000.0) > OBJECTIVES["fifo"].value(late, 0, 6000.0)
    assert OBJECTIVES["jct"].value(short, 0, 0) > OBJECTIVES["jct"].value(long, 0, 0)
    assert OBJECTIVES["deadline"].value(pressed, 0, 90) > 10 * OBJECTIVES["deadline"].value(short, 0, 90)
    assert OBJECTIVES["revenue"].value(dear, 0, 0) > OBJECTIVES["revenue"].value(cheap, 0, 0)
    assert OBJECTIVES["jct"].value(dear, 0, 0) == OBJECTIVES["jct"].value(cheap, 0, 0)
    assert OBJECTIVES["fair"].value(early, 0, 6000.0) > OBJECTIVES["fair"].value(late, 0, 6000.0)
    assert math.isfinite(OBJECTIVES["fifo"].value(early, 0, 1e9))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_controllers_keep_the_invariants_under_every_policy(name):
    from qipan.clock import named_random

    world = build_world(nation(), seed=4, settings=Settings(policy=name))
    world.after_step.append(check_world)
    orders = random_orders(named_random(4, "orders"), 15, 300.0)
    world.happenings = arrivals(orders)
    world.run(until_s=50_000)
    check_end(world, {one.task_id for one in orders})
    assert set(world.tree.root.state.over.values()) == {"done"}


def test_under_fifo_nobody_is_moved_and_under_jct_the_short_one_gets_ahead():
    def ended(policy: str) -> list[str]:
        world = build_world(leaf("dc", 4), seed=1, settings=Settings(policy=policy))
        orders = [
            order("first", work_s=500.0, counts=(4,)),
            order("long", work_s=2000.0, counts=(4,), submitted_s=1.0),
            order("short", work_s=100.0, counts=(4,), submitted_s=2.0),
        ]
        world.happenings = arrivals(orders)
        world.run(until_s=1e6)
        assert set(world.tree.root.state.over.values()) == {"done"}
        return [str(task) for task in world.simulated("dc").finished]  # type: ignore[arg-type]

    assert ended("fifo") == ["first", "long", "short"]
    assert ended("jct").index("short") < ended("jct").index("long")
    assert TaskId("first") in ended("kueue")


def test_the_controller_under_jct_chooses_what_the_measured_policy_chooses():
    """One function: what `benchmarks.scheduling` runs is what a leaf runs."""
    world = build_world(leaf("dc", 8), seed=1, settings=Settings(policy="jct"))
    orders = [
        order(name, work_s=work_s, counts=(1, 2, 4, 8))
        for name, work_s in (("long", 2000.0), ("short", 100.0))
    ]
    world.happenings = arrivals(orders)
    world.run(until_s=1.0)
    placed = {
        task.task_id: len(task.needs) and task.needs[0].devices
        for task in world.tree.root.state.tasks.values()
    }
    contenders = [
        elastic(str(one.task_id), {p.devices: p.rate for p in one.curve.points}, left=one.curve.work_s)
        for one in orders
    ]  # fmt: skip
    chosen = Jct().choose(contenders, {"a": 8}, 0.0)
    assert {str(task): f"a:{devices}" for task, devices in placed.items()} == chosen


def test_under_jct_a_task_of_one_large_shape_does_not_wait_for_another_to_grow():
    grown = elastic("grown", {2: 1.0, 4: 1.8, 8: 3.2}, left=5000.0, current="a:8")
    rigid = elastic("rigid", {4: 1.0}, left=5000.0)
    assert Jct().choose([grown, rigid], {"a": 8}, 100.0) == {"grown": "a:4", "rigid": "a:4"}


def test_under_jct_a_task_that_never_ran_begins_on_a_node_and_under_sia_on_one_device():
    new = elastic("new", {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, measured=False)
    assert Jct().choose([new], {"a": 16}, 0.0) == {"new": "a:8"}
    assert Sia().choose([new], {"a": 16}, 0.0) == {"new": "a:1"}


def test_tasks_that_share_devices_keep_the_end_that_was_promised_in_whole_rounds():
    policy = LeastMean()
    tasks = [contender("x", {"a": 1.0}, left=36_000.0), contender("y", {"a": 1.0}, left=3_700.0)]
    policy.choose(tasks, {"a": 1}, 0.0)
    assert policy.promised_s == pytest.approx((100 + 11) * 360.0)
    policy.choose(tasks[:1], {"a": 1}, 3_600.0)
    assert policy.promised_s == pytest.approx((100 + 11) * 360.0)


def test_under_jct_a_newcomer_starts_at_once_where_nobody_moves_and_tasks_move_at_the_end_of_the_minute():
    """8 devices: `wide` takes six and `small` the two that are free; `rigid` needs four, for which `wide` makes room."""
    world = build_world(leaf("dc", 8), seed=1, settings=Settings(policy="jct"))
    orders = [
        order("wide", work_s=20_000.0, counts=(2, 6), submitted_s=61.0),
        order("small", work_s=20_000.0, counts=(2,), submitted_s=70.0),
        order("rigid", work_s=20_000.0, counts=(4,), submitted_s=80.0),
    ]
    world.happenings = arrivals(orders)
    world.run(until_s=79.0)
    tasks = world.tree.root.state.tasks
    assert [str(task.task_id) for task in tasks.values() if task.engine is not None] == ["wide", "small"]
    world.run(until_s=119.0)
    assert world.tree.root.state.moves_at_s == 120.0
    assert tasks[TaskId("wide")].needs[0].devices == 6
    world.run(until_s=200.0)
    assert world.tree.root.state.tasks[TaskId("rigid")].engine is not None
