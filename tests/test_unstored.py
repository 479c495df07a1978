"""A tick that could not be stored did not happen: a board that goes on from there, after room was made, has lost no charge and made
none twice.  The full disk is SQLite's own (`max_page_count`), so that a smaller write may still find room."""

import contextlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as some

from qipan.controller import verify
from qipan.errors import DiskFull
from qipan.hardware import BoardId
from qipan.scheduler import Settings
from qipan.store import Store
from qipan.twin.check import check_end, check_world
from qipan.twin.world import Happening, World, arrivals, build_world
from worlds import nation, order

TOP = BoardId("cn")
TASKS = [order(f"t{i}", work_s=20.0 + 7 * i, counts=(1, 2), submitted_s=3.0 * i) for i in range(5)]


def world_on(path: Path) -> World:
    world = build_world(nation(), seed=1, make_store=lambda board: Store(path if board == TOP else None))
    world.after_step.append(check_world)
    world.happenings += arrivals(TASKS)
    return world


def pages(world: World, most: int | None) -> None:
    """How many the top's store may have; None: as many as it likes."""
    db = world.tree.stores[TOP].db
    have = db.row("PRAGMA page_count")
    assert have is not None
    db.rows(f"PRAGMA max_page_count = {have[0] + most if most is not None else 1 << 30}")


def take_up(world: World) -> None:
    """As `Intake.take_up`: a submission is kept before its fact is decided on."""
    for task in TASKS:
        if task.submitted_s <= world.clock.now_s() and not world.tree.root.store.facts_of(task.task_id):
            world.submit(task)


@settings(max_examples=30, deadline=None)
@given(
    at_s=some.floats(2.0, 60.0),
    left=some.integers(0, 12),
    steps=some.integers(0, 2),
    room_first=some.booleans(),
)
def test_a_board_whose_disk_was_full_charges_every_attempt_once(
    tmp_path_factory, at_s, left, steps, room_first
):
    """`left`: pages that still find room; `steps`: of people's requests before the process sees that its loop ended; `room_first`:
    room is made before the process ends its boards, which takes a snapshot of each."""
    world = world_on(tmp_path_factory.mktemp("store") / "board.db")
    world.happenings.append(Happening(at_s, "the disk is full", lambda world: pages(world, left)))
    for _ in range(2):
        try:
            world.run(5000.0)
        except DiskFull:
            controller = world.tree.root
            if room_first:
                pages(world, None)
            for _ in range(steps):
                with contextlib.suppress(DiskFull):
                    controller.step()
            with contextlib.suppress(DiskFull):
                controller.snapshot()
            pages(world, None)
            world.tree.start(TOP)
            take_up(world)
    assert world.all_over()
    check_end(world, {task.task_id for task in TASKS})
    assert verify(world.tree.root.store, TOP, Settings(), top=True) > 0
    world.tree.stores[TOP].close()
