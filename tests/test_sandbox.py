"""A task in bubblewrap reaches what is its own and nothing else."""

import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.local import LocalEngine
from qipan.errors import InvalidInput
from qipan.events import Reserve, Start, Stop, TaskExited
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")
POINT = Point("p", (Need(CHIP, 1),), 1.0, 1.0, 1.0)

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="the program bwrap is not installed")


def engine(folder: Path, sandbox: str = "bubblewrap") -> LocalEngine:
    pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 2, 2, 1)
    board = BoardSpec(BoardId("dc"), pools=(pool,), engine_options={"sandbox": sandbox})
    return LocalEngine(
        EngineId("dc-local"), board, folder / "engines" / "dc", SystemClock(), folder / "checkpoints"
    )


def begin(here: LocalEngine, run: str) -> None:
    launch = msgspec.json.encode(Launch(Task("train", "t", run=run)))
    order = Order(TaskId("t-1"), "me", "t", Curve((POINT,), 10.0), 1, 0.0, launch=launch)
    here.reserve(Reserve(order.task_id, LeaseId("l"), 1, 1, order, POINT.needs, 60.0))
    here.start(Start(order.task_id, LeaseId("l"), 1, 2, 1, (POINT,)))


def exit_of(here: LocalEngine, limit_s: float = 30.0) -> TaskExited:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        for _, fact in here.observe(0):
            if isinstance(fact, TaskExited):
                return fact
        time.sleep(0.05)
    raise AssertionError("it did not end")


def test_a_task_sees_its_own_folders_and_not_the_boards_keys(tmp_path):
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "board.key").write_text("secret")
    outside = tmp_path.parent / "outside"
    outside.write_text("as it was")
    here = engine(tmp_path)
    begin(
        here,
        f"cat {tmp_path}/identity/board.key && exit 11; echo x > {outside}; echo x > /etc/qipan && exit 13;"
        f" kill -0 {os.getpid()} && exit 14; echo kept > $QIPAN_CHECKPOINT_DIR/state; echo said; exit 0",
    )
    ended = exit_of(here)
    log = (tmp_path / "engines" / "dc" / "attempts" / "t-1-1" / "log.txt").read_text()
    assert ended.outcome == "done", log
    assert "said" in log
    assert "secret" not in log
    assert (tmp_path / "checkpoints" / "t-1" / "state").read_text() == "kept\n"
    assert not outside.exists() or outside.read_text() == "as it was"


def test_a_sandboxed_task_is_stopped_as_any_other_and_leaves_no_process(tmp_path):
    here = engine(tmp_path)
    begin(here, "trap 'exit 0' TERM; sleep 1000 & wait")
    end_s = time.monotonic() + 20
    while not (tmp_path / "engines" / "dc" / "attempts" / "t-1-1" / "pid.json").exists():
        assert time.monotonic() < end_s
        here.observe(0)
        time.sleep(0.05)
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, True, "parked"))
    assert exit_of(here, 60).outcome == "parked"
    mark = str(tmp_path).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in path.read_bytes()]
    assert not left


def test_an_unknown_sandbox_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there are bubblewrap and none"):
        engine(tmp_path, "jail")
