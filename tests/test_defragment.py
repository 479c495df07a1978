"""Small tasks are moved out of a block for a gang that would lie over two, when that pays."""

import random
from dataclasses import replace

import pytest

from qipan.clock import named_random
from qipan.controller import verify
from qipan.engines.simulated import Behaviour
from qipan.engines.topology import free_blocks, holders, seated, straddles
from qipan.events import RulesSet
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import Holders, TaskId
from qipan.quota import QuotaRule, Rate
from qipan.scheduler import Settings
from qipan.scheduler.limits import why_waiting_text
from qipan.twin import World, arrivals, build_world, check_end, check_world
from test_twin import LARGE
from worlds import FAST, TARIFF, leaf, order

pytestmark = pytest.mark.computes
NODE = 4
DC = BoardId("dc")


def centre(devices: int = 8) -> BoardSpec:
    spec = leaf("dc", devices)
    return replace(spec, pools=(replace(spec.pools[0], devices_per_node=NODE),))


def scattered(
    *, spec: BoardSpec | None = None, gang_s: float = 5000.0, small: dict[str, object] | None = None,
    rules: tuple[QuotaRule, ...] = (), settings: Settings = Settings(), behaviour: Behaviour = Behaviour(),  # noqa: B008
    at_s: float = 500.0, until_s: float | None = None,
) -> World:  # fmt: skip
    """Two nodes: `s` holds one device of the one, `r` one of the other; those beside them end at 200 s, and a gang of four comes."""
    world = build_world(spec or centre(), seed=1, topology=True, settings=settings, behaviour=behaviour)
    world.after_step.append(check_world)
    if rules:
        for controller in world.tree.controllers.values():
            controller.accept(RulesSet(rules))
    own = {"counts": (1,), "work_s": 20_000.0, **(small or {})}
    first = [order(name, counts=(3,), work_s=200.0, elastic=False, bid=8 * TARIFF) for name in ("p", "q")]
    long = [order(name, submitted_s=1.0 + number, **own) for number, name in enumerate(("s", "r"))]
    gang = order("gang", counts=(4,), work_s=gang_s, elastic=False, bid=4 * TARIFF, submitted_s=at_s)
    world.happenings = arrivals([*first, *long, gang])
    world.run(until_s=until_s or at_s + 60.0)
    return world


def nodes(world: World, task_id: str = "gang") -> set[int]:
    return {device // NODE for device in world.simulated(DC).where[FAST].get(TaskId(task_id), ())}


def moved(world: World, *task_ids: str) -> list[str]:
    reasons = [
        (task_id, verdict)
        for task_id in task_ids or ("s", "r")
        for _, verdict, _ in world.tree.stores[DC].reasons_of(task_id)
    ]
    return [task_id for task_id, verdict in reasons if verdict == "moved aside"]


@pytest.mark.parametrize("settings", [Settings(), LARGE])
@pytest.mark.parametrize("above", [False, True])
def test_one_small_task_is_moved_and_the_gang_finds_a_whole_node(settings, above):
    spec = BoardSpec(BoardId("cn"), children=(centre(),)) if above else centre()
    world = scattered(spec=spec, settings=settings)
    assert len(nodes(world)) == 1
    [task_id] = moved(world)
    assert len(nodes(world, "s")) == len(nodes(world, "r")) == 1
    assert nodes(world, "s") == nodes(world, "r") != nodes(world)
    told = {verdict: text for _, verdict, text in world.tree.stores[DC].reasons_of("gang")}
    assert told["waits"].startswith(
        f"waits until {task_id} left a block of 4 devices at dc-engine, for over two blocks"
    )
    [text] = [
        text for _, verdict, text in world.tree.stores[DC].reasons_of(task_id) if verdict == "moved aside"
    ]
    assert text.startswith(
        "parked with its checkpoint and placed anew beside: gang needs 4 devices in one block of 4; it gains "
    )
    world.run(until_s=100_000.0)
    check_end(world, {TaskId(name) for name in ("p", "q", "s", "r", "gang")})
    assert set(world.tree.root.state.over.values()) == {"done"}
    assert len(moved(world)) == 1
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, settings, top=controller.parent is None)


def test_why_says_what_the_gang_waits_for_while_the_small_task_parks():
    world = scattered(until_s=500.5)
    state = world.tree.root.state
    task = state.tasks[TaskId("gang")]
    assert task.phase == "queued"
    text = why_waiting_text(state, task, world.clock.now_s())
    assert text.startswith("waits until ")
    assert text.endswith(" left a block of 4 devices at dc-engine")


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("a short gang gains less than the moves cost", {"gang_s": 5.0}),
        ("what may not be parked is not moved", {"small": {"elastic": False, "preemptible": False}}),
        ("a dear task loses more by its restart", {"small": {"bid": 9000 * TARIFF}}),
        ("they began only now", {"at_s": 203.0, "small": {"submitted_s": 195.0}}),
        ("the board is told not to", {"settings": Settings(defragment=False)}),
        ("under the policy nothing that runs is parked", {"settings": Settings(policy="fifo")}),
    ],
)
def test_a_gang_lies_over_two_nodes_at_once_where_moving_does_not_pay_or_is_not_allowed(why, given):
    if "submitted_s" in given.get("small", {}):
        world = build_world(centre(), seed=1, topology=True)
        first = [order(name, counts=(3,), work_s=200.0, elastic=False) for name in ("p", "q")]
        long = [order(name, counts=(1,), work_s=20_000.0, submitted_s=195.0) for name in ("s", "r")]
        gang = order("gang", counts=(4,), work_s=5000.0, elastic=False, bid=4 * TARIFF, submitted_s=210.0)
        world.happenings = arrivals([*first, *long, gang])
        world.run(until_s=225.0)
    else:
        world = scattered(**given)
    assert moved(world) == [], why
    assert len(nodes(world)) == 2 or "gang" in world.simulated(DC).finished, why


@pytest.mark.parametrize(
    ("rules", "times"), [((), 2), ((QuotaRule(BoardId("*"), "*", per_tenant=Rate(1, 86_400.0)),), 1)]
)
def test_no_task_is_moved_more_often_than_the_rules_of_preemption_say(rules, times):
    world = scattered(rules=rules, gang_s=1000.0)
    [first] = moved(world)
    assert world.tree.root.state.tasks[TaskId(first)].preempted_s, "it is counted as a preemption"
    now_s = world.clock.now_s()
    again = [
        order("p2", counts=(2,), work_s=1900.0, elastic=False, submitted_s=now_s + 1500.0, bid=8 * TARIFF),
        order("q2", counts=(3,), work_s=1800.0, elastic=False, submitted_s=now_s + 1510.0, bid=8 * TARIFF),
        order("u", counts=(1,), work_s=9000.0, submitted_s=now_s + 1520.0),
        order("gang2", counts=(4,), work_s=9000.0, elastic=False, submitted_s=now_s + 5000.0, bid=8 * TARIFF),
    ]
    world.happenings = arrivals(again)
    world.run(until_s=now_s + 5100.0)
    assert len(moved(world, "s", "r", "u")) == times
    assert len(nodes(world, "gang2")) == (1 if times == 2 else 2)


def test_a_mover_without_room_in_another_block_is_left():
    """A task of three in each of three nodes; a gang of three takes the device that each has left."""
    world = build_world(centre(12), seed=1, topology=True)
    orders = [order(name, counts=(3,), work_s=20_000.0) for name in "abc"]
    gang = order("gang", counts=(3,), work_s=20_000.0, elastic=False, submitted_s=300.0)
    world.happenings = arrivals([*orders, gang])
    world.run(until_s=250.0)
    [offer] = world.tree.root.state.engines["dc-engine"].offers
    assert offer.holders == tuple(Holders(4, 1, ((TaskId(name), 3),)) for name in "abc")
    world.run(until_s=400.0)
    assert len(nodes(world)) == 3


@pytest.mark.parametrize("seed", range(100))
def test_what_an_engine_tells_of_holders_is_what_it_gave(seed):
    rng = random.Random(seed)
    holds = {TaskId(f"t{number}"): rng.randint(1, 5) for number in range(rng.randint(0, 6))}
    seats, free = seated(holds, {}, 32, (4, 8))
    told = holders(free, seats, (4, 8), 32)
    for block in told:
        assert block.free + sum(count for _, count in block.held) == block.size
        assert block.held, "blocks that nobody holds any of are free already"
    for size, whole in ((4, 8), (8, 4)):
        own = [block for block in told if block.size == size]
        assert [block.free for block in own] == sorted((block.free for block in own), reverse=True)
        assert max((block.free for block in own), default=size) <= max(
            one.free for one in free_blocks(free, (size,), 32)
        )
        if len(own) < whole and len(own) < 8:
            held = {device // size for seat in seats.values() for device in seat}
            assert len(own) == len(held)
    assert straddles((0, 4), (4, 8)) == 1
    assert straddles((0, 8), (4, 8)) == 2
    assert straddles((0, 1, 2, 3, 4), (4, 8)) == 0, "no node could hold it"


def busy(seed: int, settings: Settings) -> World:
    """Two centres of nodes, thirty tasks of one to four devices, straddled ones at three quarters of their rate."""
    rng = named_random(seed, "busy nodes")
    centres = tuple(
        replace(spec, pools=(replace(spec.pools[0], devices_per_node=NODE),))
        for spec in (leaf("dc1", 16), leaf("dc2", 16, region="west"))
    )
    world = build_world(
        BoardSpec(BoardId("cn"), children=centres), seed=seed, topology=True, settings=settings,
        behaviour=Behaviour(straddled=0.75),
    )  # fmt: skip
    world.after_step.append(check_world)
    tasks = []
    for number in range(30):
        count = rng.choice([1, 1, 1, 2, 3, 4, 4])
        work_s = rng.choice([200.0, 1000.0, 4000.0])
        tasks.append(
            order(f"t{number:02}", counts=(count,), work_s=work_s, elastic=rng.random() < 0.8, preemptible=True,
                  submitted_s=rng.uniform(0.0, 3000.0), bid=2 * TARIFF)
        )  # fmt: skip
    world.happenings = arrivals(tasks)
    world.run(until_s=200_000.0)
    check_end(world, {one.task_id for one in tasks})
    assert set(world.tree.root.state.over.values()) == {"done"}
    return world


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [Settings(), LARGE])
def test_on_busy_nodes_every_task_ends_once_and_the_decisions_replay(seed, settings):
    world = busy(seed, settings)
    for controller in world.tree.controllers.values():
        verify(controller.store, controller.board, settings, top=controller.parent is None)
