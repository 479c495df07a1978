"""The twin's checks find what is wrong, also where they look only at what changed."""

from collections.abc import Callable

import pytest

from qipan.curves import Need
from qipan.hardware import BoardId
from qipan.leases import TaskId
from qipan.twin import Violation, World, arrivals, build_world, check_changes, check_world
from qipan.twin.check import WHOLE_EVERY
from worlds import FAST, nation, order

CHECKS = pytest.mark.parametrize("check", [check_world, check_changes])
Check = Callable[[World], None]


def running_world(*names: str) -> World:
    """Tasks of two devices run at dc1, which has four."""
    world = build_world(nation(), seed=0)
    orders = [order(name, counts=(2,), work_s=1000.0, regions=("east",), apart="w") for name in names]
    world.happenings = arrivals(orders)
    world.run(until_s=50.0)
    assert len(world.simulated(BoardId("dc1")).running()) == 1
    return world


def grow(world: World, devices: int, *, told: bool = True) -> None:
    engine = world.simulated(BoardId("dc1"))
    [held] = engine.held().values()
    held.needs = (Need(FAST, devices),)
    engine.changes += 1
    if told:
        engine.changed.append(held.order.task_id)


@CHECKS
@pytest.mark.parametrize(
    ("devices", "why"), [(5, "1 device of sim/fast held twice"), (3, "no point of its curve")]
)
def test_more_held_than_there_is_or_what_is_no_point(check: Check, devices: int, why: str):
    world = running_world("a")
    check(world)
    grow(world, devices)
    with pytest.raises(Violation, match=why):
        check(world)


@CHECKS
def test_a_task_runs_twice(check: Check):
    world = running_world("a")
    check(world)
    there, again = world.simulated(BoardId("dc1")), world.simulated(BoardId("dc3"))
    again._held[TaskId("a")] = there.held()[TaskId("a")]
    again.changes += 1
    again.changed.append(TaskId("a"))
    with pytest.raises(Violation, match="a runs at dc1 and at dc3"):
        check(world)


@CHECKS
def test_two_run_that_are_kept_apart(check: Check):
    world = running_world("a", "b")
    check(world)
    engine = world.simulated(BoardId("dc1"))
    [held] = engine.held().values()
    engine._held[TaskId("c")] = held
    engine.changes += 1
    engine.changed.append(TaskId("c"))
    with pytest.raises(Violation, match="2 tasks of alice with `apart: w` run"):
        check(world)


def test_a_change_that_the_engine_does_not_tell_is_found_when_everything_is_counted():
    world = running_world("a")
    check_changes(world)
    grow(world, 5, told=False)
    world.steps = WHOLE_EVERY + 1
    check_changes(world)
    world.steps = 2 * WHOLE_EVERY
    with pytest.raises(Violation, match=r"did not tell that \['a'\] changed"):
        check_changes(world)


def test_every_whole_check_finds_a_change_that_was_not_told():
    world = running_world("a")
    check_world(world)
    grow(world, 4, told=False)
    with pytest.raises(Violation, match="did not tell"):
        check_world(world)
