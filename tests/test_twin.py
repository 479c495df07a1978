"""The real controllers on a manual clock: invariants under lost, late and repeated messages, crashes and kills."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qipan.clock import named_random
from qipan.controller import verify
from qipan.engines.simulated import Behaviour
from qipan.events import CancelRequested
from qipan.hardware import BoardSpec
from qipan.leases import Order, TaskId
from qipan.scheduler import Settings
from qipan.twin import (
    Faults,
    Happening,
    World,
    arrivals,
    back_up,
    build_world,
    check_end,
    check_world,
    crash,
    kill_task,
    restore,
)
from worlds import FAST, SLOW, TARIFF, curve, nation, order, random_orders

pytestmark = pytest.mark.computes

BOARDS = ["cn", "east", "west", "dc1", "dc2", "dc3"]


def stormy_world(
    seed: int,
    tasks: int = 40,
    settings: Settings = Settings(),  # noqa: B008
    tenants: tuple[str, ...] = ("alice",),
    spec: BoardSpec | None = None,
    change: Callable[[Order], Order] = lambda order: order,
    behaviour: Behaviour = Behaviour(),  # noqa: B008
) -> tuple[World, set[TaskId]]:
    """Forty tasks on three levels; a tenth of the messages lost, a fifth late, a tenth repeated; one board crashes,
    three attempts are killed."""
    rng = named_random(seed, "faults of the world")
    world = build_world(
        spec or nation(), seed=seed, settings=settings, behaviour=behaviour,
        faults=Faults(lose=0.1, delay=0.2, repeat=0.1),
    )  # fmt: skip
    world.after_step.append(check_world)
    orders = [
        change(replace(order, tenant=tenants[number % len(tenants)]))
        for number, order in enumerate(random_orders(named_random(seed, "orders"), tasks, 300.0))
    ]
    world.happenings = arrivals(orders)
    world.happenings.append(Happening(rng.uniform(0, 500), "crash", crash(rng.choice(BOARDS))))
    for i in range(3):
        leaf = rng.choice(["dc1", "dc2", "dc3"])
        world.happenings.append(
            Happening(rng.uniform(0, 500), f"kill {i}", kill_task(leaf, rng.randrange(10)))
        )
    return world, {order.task_id for order in orders}


def check_done(world: World, submitted: set[TaskId]) -> None:
    """All ended well, and every board's decisions come out the same again."""
    check_end(world, submitted)
    assert set(world.tree.root.state.over.values()) == {"done"}
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, controller.state.settings, top=controller.parent is None)


def run_storm(
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
    change: Callable[[Order], Order] = lambda order: order,
) -> World:
    try:
        world, submitted = stormy_world(seed, settings=settings, change=change)
        world.run(until_s=50_000)
        check_done(world, submitted)
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_twin.py -k 'storm and {seed}'`")
        raise
    return world


def test_a_task_submitted_at_the_top_runs_at_a_leaf_and_ends():
    world = build_world(nation(), seed=1)
    world.happenings = arrivals([order("a")])
    world.run(until_s=1000)
    assert world.tree.root.state.over == {TaskId("a"): "done"}


def test_a_killed_task_is_started_again_from_its_checkpoint():
    world = build_world(nation(), seed=1)
    world.happenings = [
        *arrivals([order("a", work_s=300.0, counts=(4,))]),
        Happening(100.0, "kill", kill_task("dc1", 0)),
    ]
    world.run(until_s=5000)
    lives = world.simulated("dc1").lifetimes
    assert [life[1] for life in lives] == [1, 2]
    assert lives[1][5] - lives[1][4] < 300.0, "the second attempt did not begin from nothing"


@pytest.mark.parametrize("later_s", [0.0, 0.2, 0.5, 1.0])
def test_a_task_that_is_cancelled_and_lost_at_once_is_over_at_every_board(later_s):
    world = build_world(nation(), seed=1)
    world.happenings = [
        *arrivals([order("a", work_s=300.0, counts=(4,))]),
        Happening(
            100.0, "cancel", lambda world: world.tree.root.accept(CancelRequested(TaskId("a"), "alice"))
        ),
        Happening(100.0 + later_s, "kill", kill_task("dc1", 0)),
    ]
    world.run(until_s=5000)
    check_end(world, {TaskId("a")})
    assert world.tree.root.state.over == {TaskId("a"): "cancelled"}
    assert not any(controller.state.tasks for controller in world.tree.controllers.values())


def test_a_task_may_enter_at_any_board():
    world = build_world(nation(), seed=1)
    world.happenings = arrivals([order("a")], at=lambda _task: "dc3")
    world.run(until_s=1000)
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    assert world.tree.controllers["dc3"].state.over == {TaskId("a"): "done"}


def test_a_cut_off_child_keeps_working_until_its_lease_ends_and_nothing_runs_twice():
    world = build_world(nation(), seed=3, settings=Settings(lease_s=60, margin_s=10))
    world.after_step.append(check_world)

    def cut(on: bool):
        def act(world: World) -> None:
            for (source, target), carrier in world.tree.carriers.items():
                if {source, target} == {"cn", "east"}:
                    carrier.cut = on

        return act

    task = order("a", work_s=400.0, counts=(4,), on_partition="restart")
    world.happenings = [
        *arrivals([task]),
        Happening(50.0, "cut", cut(True)),
        Happening(1500.0, "heal", cut(False)),
    ]
    world.run(until_s=10_000)
    lives = sorted(
        (life for board in world.tree.engines for life in world.simulated(board).lifetimes),
        key=lambda life: life[4],
    )
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    assert len(lives) == 2, lives
    assert lives[0][5] <= lives[1][4], "the second began after the first had ended"


def run_cuts(seed: int) -> World:
    """Links are cut, both ways or one way, for up to five leases, while thirty tasks of up to 20 minutes run; whoever
    is silent for a lease and the margin has its tasks placed anew, so nothing may run on there."""
    rng = named_random(seed, "cuts")
    world = build_world(
        nation(), seed=seed, settings=Settings(lease_s=60, margin_s=10), faults=Faults(delay=0.1)
    )
    world.after_step.append(check_world)
    orders = [
        replace(task, on_partition="restart", curve=curve(rng.choice([60.0, 1200.0]), (1, 2)))
        for task in random_orders(named_random(seed, "orders"), 30, 300.0)
    ]
    ends = sorted(world.tree.carriers)
    for i in range(6):
        end, at_s, lose = rng.choice(ends), rng.uniform(20, 1500), rng.random() < 0.5

        def act(world: World, on: bool, end=end, lose=lose) -> None:
            carrier = world.tree.carriers[end]
            carrier.lose, carrier.cut = (float(on), carrier.cut) if lose else (carrier.lose, on)

        world.happenings.append(Happening(at_s, f"cut {i}", lambda world, act=act: act(world, True)))
        healed_s = at_s + rng.choice([5.0, 40.0, 90.0, 300.0])
        world.happenings.append(Happening(healed_s, f"heal {i}", lambda world, act=act: act(world, False)))
    world.happenings += arrivals(orders)
    try:
        world.run(until_s=80_000)
        check_end(world, {order.task_id for order in orders})
        assert world.all_over()
        assert set(world.tree.root.state.over.values()) == {"done"}
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_twin.py -k 'cuts and {seed}'`")
        raise
    return world


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_cuts_never_make_a_task_run_twice(seed):
    run_cuts(seed)


def run_loss(seed: int) -> World:
    """A board's machine is lost while forty tasks come in: it starts again from an old copy of its store (even
    seeds) or from nothing, over bad links."""
    rng = named_random(seed, "loss")
    world = build_world(nation(), seed=seed, faults=Faults(lose=0.1, delay=0.2, repeat=0.1))
    world.after_step.append(check_world)
    orders = random_orders(named_random(seed, "orders"), 40, 300.0)
    board, lost_s = BOARDS[seed % len(BOARDS)], rng.uniform(50, 400)
    world.happenings = [*arrivals(orders), Happening(lost_s, "loss", restore(board))]
    if seed // len(BOARDS) % 2 == 0:
        world.happenings.append(Happening(rng.uniform(0, lost_s), "copy", back_up(board)))
    try:
        world.run(until_s=50_000)
        check_end(world, {order.task_id for order in orders})
        assert set(world.tree.root.state.over.values()) == {"done"}
        assert world.all_over()
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_twin.py -k 'machine and {seed}'`")
        raise
    return world


def cut_dc1(on: bool) -> Callable[[World], None]:
    """Nothing passes between east and dc1."""

    def act(world: World) -> None:
        for end in (("east", "dc1"), ("dc1", "east")):
            world.tree.carriers[end].cut = on

    return act


@pytest.mark.parametrize("lost", ["dc1", "east"])
def test_what_ended_just_before_a_machine_was_lost_is_charged(lost):
    """It ended while dc1 could not be heard; the board that starts from nothing counts its reports anew, the parent has had as
    many from the old machine."""
    world = build_world(nation(), seed=1)
    world.after_step.append(check_world)
    orders = [order(f"t{i}", work_s=60.0 + 7.0 * i, counts=(2,), submitted_s=3.0 * i) for i in range(12)]
    world.happenings = [
        *arrivals(orders),
        Happening(100.0, "cut", cut_dc1(True)),
        Happening(200.0, "loss", restore(lost)),
        Happening(210.0, "heal", cut_dc1(False)),
    ]
    world.run(until_s=5000)
    assert world.tree.root.state.over == {order.task_id: "done" for order in orders}
    check_end(world, {order.task_id for order in orders})
    ran = {
        (board, task_id, attempt)
        for board in world.tree.engines
        for task_id, attempt, *_ in world.simulated(board).lifetimes
    }
    charges = {key for key, *_ in world.tree.root.store.db.rows("SELECT key FROM transfers")}
    assert {f"charge/{task_id}/{attempt}/{board}" for board, task_id, attempt in ran} <= charges


def test_a_region_from_an_old_copy_takes_no_silent_data_centre_for_one_whose_leases_are_over():
    """The machine that was lost had renewed them since."""
    world = build_world(nation(), seed=1, settings=Settings(lease_s=60, margin_s=10))
    world.after_step.append(check_world)
    world.happenings = [
        *arrivals([order("a", work_s=400.0, counts=(4,), on_partition="restart")]),
        Happening(20.0, "copy", back_up("east")),
        Happening(195.0, "cut", cut_dc1(True)),
        Happening(200.0, "loss", restore("east")),
        Happening(230.0, "heal", cut_dc1(False)),
    ]
    world.run(until_s=5000)
    check_end(world, {TaskId("a")})
    assert world.tree.root.state.over == {TaskId("a"): "done"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_a_board_whose_machine_is_lost_finds_its_tasks_again(seed):
    run_loss(seed)


def test_a_top_board_restored_from_nothing_finds_the_running_task_and_bills_it():
    world = build_world(nation(), seed=1)
    world.after_step.append(check_world)
    world.happenings = [
        *arrivals([order("a", work_s=300.0, counts=(4,))]),
        Happening(100.0, "loss", restore("cn")),
    ]
    world.run(until_s=5000)
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    assert len(world.simulated("dc1").lifetimes) == 1, "it ran on, untouched"
    assert world.tree.root.state.term == 2, "above the term that the children had heard"
    check_end(world, {TaskId("a")})


def test_a_task_that_ended_after_the_backup_is_not_run_again():
    world = build_world(nation(), seed=1)
    world.happenings = [
        *arrivals([order("a", work_s=50.0)]),
        Happening(10.0, "copy", back_up("cn")),
        Happening(500.0, "loss", restore("cn")),
    ]
    world.run(until_s=5000)
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    assert len(world.simulated("dc1").lifetimes) == 1


def test_the_same_seed_gives_a_byte_identical_log():
    def log() -> list[bytes]:
        world, _ = stormy_world(7)
        world.run(until_s=50_000)
        return [
            body
            for controller in world.tree.controllers.values()
            for tick in controller.store.ticks()
            for body in (tick.decision, *tick.facts)
        ]

    assert log() == log()


#: every board takes itself for a large one: a tick looks at what changed only
LARGE = Settings(look_at_all_up_to=0, orders_per_tick=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_storm(seed):
    run_storm(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50, 100))
def test_storm_on_boards_that_look_at_what_changed(seed):
    run_storm(seed, LARGE)


def money_in_time(seed: int, *, asks: bool) -> float:
    """What tasks that met their deadline had bid for, in a nation short of chips."""
    rng = named_random(seed, "orders")
    orders = []
    for i in range(60):
        work_s, submitted_s = rng.choice([60.0, 120.0, 300.0]), rng.uniform(0, 300)
        orders.append(
            order(
                f"t{i:03d}", bid=rng.choice([1, 2, 4, 8, 16]) * TARIFF, work_s=work_s,
                counts=rng.choice([(1, 2), (2,), (1, 2, 4)]), elastic=rng.random() < 0.8, submitted_s=submitted_s,
                deadline_s=submitted_s + work_s * rng.uniform(1.3, 3.5), chips=rng.choice([(FAST,), (FAST, SLOW)]),
            )
        )  # fmt: skip
    world = build_world(nation(), seed=seed, settings=Settings(asks=asks))
    world.happenings = arrivals(orders)
    finished: dict[TaskId, float] = {}

    def watch(world: World) -> None:
        for task_id in world.tree.root.state.over:
            finished.setdefault(task_id, world.clock.now_s())

    world.after_step.append(watch)
    world.run(until_s=20_000)
    return sum(
        order.bid_micro_cny_per_device_hour * order.curve.work_s
        for order in orders
        if finished.get(order.task_id, 1e18) <= order.deadline_s
    )


@pytest.mark.parametrize(
    "worlds", [pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.endurance)]
)
def test_prices_are_real_without_asks_a_tenth_less_money_is_earned_in_time(worlds):
    ratios = [money_in_time(seed, asks=False) / money_in_time(seed, asks=True) for seed in range(worlds)]
    print(
        "money-weighted work by the deadlines without asks, per world:", [round(ratio, 3) for ratio in ratios]
    )
    assert sum(ratios) / len(ratios) <= 0.90
