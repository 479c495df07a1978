"""Running tasks move to a child where they are worth more, when that pays for the move."""

from dataclasses import replace

import pytest

from qipan.events import TaskSubmitted
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import TaskId
from qipan.network import Link
from qipan.scheduler import Moment, Phase, decide
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.twin import World, arrivals, build_world, check_end, check_world
from worlds import TARIFF, leaf, order

pytestmark = pytest.mark.computes

SPEC = BoardSpec(
    BoardId("cn"), children=(leaf("dear", 4, tariff=10 * TARIFF), leaf("cheap", 4, region="west"))
)


def two_sites(work_s: float, first_s: float = 500.0, links: tuple[Link, ...] = (), **more) -> World:
    """The cheap site is full until `first_s`; meanwhile `t` begins at the dear one."""
    world = build_world(SPEC, seed=1, links=links)
    world.after_step.append(check_world)
    orders = [
        order("first", counts=(4,), work_s=first_s, elastic=False, regions=("west",)),
        order("t", counts=(4,), work_s=work_s, objective="cost", bid=12 * TARIFF, submitted_s=5.0, **more),
    ]
    world.happenings = arrivals(orders)
    world.run(until_s=100_000.0)
    check_end(world, {one.task_id for one in orders})
    return world


def places(world: World, task_id: str = "t") -> list[str]:
    lives = [
        (life[4], board)
        for board in world.tree.engines
        for life in world.simulated(board).lifetimes
        if life[0] == TaskId(task_id)
    ]
    return [board for _, board in sorted(lives)]


def test_a_long_task_moves_to_the_cheap_site_once_that_is_free():
    world = two_sites(20_000.0)
    assert places(world) == ["dear", "cheap"]
    told = [text for _, verdict, text in world.tree.root.store.reasons_of("t") if verdict == "migrated"]
    assert len(told) == 1
    assert told[0].startswith("moves from dear to cheap at sim/fast:4: worth ")


def test_a_task_that_ends_soon_stays():
    assert places(two_sites(498.0)) == ["dear"]


def test_a_task_that_may_not_be_parked_stays():
    assert places(two_sites(20_000.0, preemptible=False)) == ["dear"]
    assert places(two_sites(20_000.0, elastic=False)) == ["dear"]


def test_a_checkpoint_that_is_dear_to_move_keeps_it():
    egress = Link(BoardId("dear"), BoardId("cheap"), 1e9, 0.0, 10**9)
    assert places(two_sites(20_000.0, links=(egress,), checkpoint_bytes=2**40)) == ["dear"]
    near = replace(egress, price_micro_cny_per_gib=0)
    assert places(two_sites(20_000.0, links=(near,), checkpoint_bytes=2**30)) == ["dear", "cheap"]


class Moved(Exception):
    pass


def test_a_state_read_from_a_snapshot_decides_after_a_move_as_the_one_that_wrote_it():
    world = build_world(SPEC, seed=1)
    west = {"elastic": False, "regions": ("west",), "counts": (4,)}
    long = order("t", counts=(4,), work_s=20_000.0, objective="cost", bid=12 * TARIFF, submitted_s=5.0)
    world.happenings = arrivals([order("first", work_s=500.0, **west), long])

    def look(world: World) -> None:
        if any(verdict == "migrated" for _, verdict, _ in world.tree.root.store.reasons_of("t")):
            raise Moved

    world.after_step.append(look)
    with pytest.raises(Moved):
        world.run(until_s=3000.0)
    wrote = world.tree.root.state
    read = decode_state(encode_state(wrote))
    now_s = world.clock.now_s() + 0.01
    new = TaskSubmitted(order("new", bid=12 * TARIFF, submitted_s=now_s, **west), 0)
    moment = Moment(now_s, world.clock.lease_s() + 0.01)
    assert decide(wrote, [new], moment) == decide(read, [new], moment)
    assert wrote.tasks[TaskId("new")].phase is Phase.RESERVING, "a seat that nobody was ordered to is free"
