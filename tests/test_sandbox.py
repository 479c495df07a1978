"""A task in bubblewrap reaches what is its own and nothing else."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec
import pytest

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.local import LocalEngine
from qipan.engines.processes import descendants, stat_of
from qipan.errors import InvalidInput
from qipan.events import Reserve, Start, Stop, TaskExited
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")
POINT = Point("p", (Need(CHIP, 1),), 1.0, 1.0, 1.0)

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="the program bwrap is not installed")


def engine(folder: Path, sandbox: str = "bubblewrap", share: float = 0.0) -> LocalEngine:
    """`share`: of a core, kept by a duty cycle."""
    pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 2, 2, 1, cpu_share=share)
    board = BoardSpec(BoardId("dc"), pools=(pool,), engine_options={"sandbox": sandbox})
    return LocalEngine(
        EngineId("dc-local"),
        board,
        folder / "engines" / "dc",
        SystemClock(),
        folder / "checkpoints",
        quotas=False,
    )


def begin(
    here: LocalEngine,
    run: str,
    env: tuple[tuple[str, str], ...] = (),
    workdir: str = "",
    lease_s: float = 60.0,
) -> None:
    launch = msgspec.json.encode(Launch(Task("train", "t", run=run, env=env, workdir=workdir)))
    order = Order(TaskId("t-1"), "me", "t", Curve((POINT,), 10.0), 1, 0.0, launch=launch)
    here.reserve(Reserve(order.task_id, LeaseId("l"), 1, 1, order, POINT.needs, lease_s))
    here.start(Start(order.task_id, LeaseId("l"), 1, 2, 1, (POINT,)))


def exit_of(here: LocalEngine, limit_s: float = 60.0) -> TaskExited:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        for _, fact in here.observe(0):
            if isinstance(fact, TaskExited):
                return fact
        time.sleep(0.05)
    raise AssertionError("it did not end")


def until_ready(here: LocalEngine, limit_s: float = 60.0) -> None:
    """It has said so."""
    log, end_s = here.folder / "control" / "t-1-1" / "log.txt", time.monotonic() + limit_s
    while not (log.exists() and "ready" in log.read_text()):
        here.observe(0)
        assert time.monotonic() < end_s
        time.sleep(0.05)


def said_beside(here: LocalEngine, name: str, limit_s: float = 60.0) -> str:
    end_s = time.monotonic() + limit_s
    while not (piece := here.read_beside(TaskId("t-1"), name, 0)).over:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return piece.text


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
    log = (tmp_path / "engines" / "dc" / "control" / "t-1-1" / "log.txt").read_text()
    assert ended.outcome == "done", log
    assert "said" in log
    assert "secret" not in log
    assert (tmp_path / "checkpoints" / "t-1" / "state").read_text() == "kept\n"
    assert not outside.exists() or outside.read_text() == "as it was"


@pytest.mark.parametrize("name", ["QIPAN_AFTER", "QIPAN_STREAMS"])
def test_a_variable_of_the_task_opens_no_folder_of_the_board(tmp_path, name):
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "board.key").write_text("secret")
    here = engine(tmp_path)
    begin(
        here, f"cat {tmp_path}/identity/board.key && exit 11; exit 0", ((name, str(tmp_path / "identity")),)
    )
    assert exit_of(here).outcome == "done"


@pytest.mark.parametrize("place", ["identity", ".", "..", "link"])
def test_a_working_folder_that_reaches_into_the_boards_is_refused(tmp_path, place):
    store = tmp_path / "store"
    (store / "identity").mkdir(parents=True)
    (store / "identity" / "board.key").write_text("secret")
    (tmp_path / "link").symlink_to(store / "identity")
    here = engine(store)
    begin(
        here,
        "touch ran; cat */board.key board.key",
        workdir=str(tmp_path / place if place == "link" else store / place),
    )
    ended = exit_of(here)
    assert ended.outcome == "failed"
    assert "the board's own folder" in ended.why
    assert "submit the task from another folder" in ended.why
    assert not list(tmp_path.rglob("ran"))


def test_a_task_does_not_say_what_runs_as_the_sandbox(tmp_path):
    store, own = tmp_path / "store", tmp_path / "own"
    (store / "identity").mkdir(parents=True)
    own.mkdir()
    (own / "bwrap").write_text(f"#!/bin/sh\n/bin/touch {own}/escaped\n")
    (own / "bwrap").chmod(0o755)
    here = engine(store)
    env = (("PATH", f"{own}:/usr/bin:/bin"), ("LD_PRELOAD", f"{own}/none.so"))
    begin(here, 'echo "path $PATH preload $LD_PRELOAD" > seen', env, str(own))
    assert exit_of(here).outcome == "done"
    assert not (own / "escaped").exists()
    assert (own / "seen").read_text() == f"path {own}:/usr/bin:/bin preload {own}/none.so\n"


def test_a_sandboxed_task_is_stopped_as_any_other_and_leaves_no_process(tmp_path):
    here = engine(tmp_path)
    begin(here, "trap 'exit 0' TERM; sleep 1000 & wait")
    end_s = time.monotonic() + 60
    while not (tmp_path / "engines" / "dc" / "control" / "t-1-1" / "pid.json").exists():
        assert time.monotonic() < end_s
        here.observe(0)
        time.sleep(0.05)
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, True, "parked"))
    assert exit_of(here, 60).outcome == "parked"
    mark = str(tmp_path).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in path.read_bytes()]
    assert not left


def test_a_stop_before_the_sandbox_is_there_reaches_the_task(tmp_path, monkeypatch):
    """Else it would run on for its 30 s of grace, and be killed."""
    slow = tmp_path / "bin" / "bwrap"
    slow.parent.mkdir()
    goes_on = tmp_path / "goes-on"
    slow.write_text(
        f"#!{sys.executable} -S\nimport os, sys, time\nwhile not os.path.exists({str(goes_on)!r}): time.sleep(0.02)\n"
        f"os.execv({shutil.which('bwrap')!r}, sys.argv)\n"
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    here = engine(tmp_path / "store")
    begin(here, "sleep 1000")
    end_s = time.monotonic() + 20
    while not list(here.folder.glob("control/*/pid.json")):
        assert time.monotonic() < end_s
        here.observe(0)
        time.sleep(0.05)
    stopped_s = time.monotonic()
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, True, "parked"))
    time.sleep(0.5)  # its supervisor has looked
    goes_on.touch()
    assert exit_of(here, 60).outcome == "parked"
    assert time.monotonic() - stopped_s < 20


def test_an_unknown_sandbox_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there are bubblewrap and none"):
        engine(tmp_path, "jail")


@pytest.mark.parametrize("kept", ["identity", "token"])
def test_a_command_beside_a_task_is_in_its_sandbox_and_the_task_cannot_change_that(tmp_path, kept):
    """In a grid the board's keys lie in `identity`, under `qipan up` there is only the token."""
    (tmp_path / kept).mkdir() if kept == "identity" else (tmp_path / kept).write_text("secret")
    (tmp_path / "key").write_text("secret")
    here = engine(tmp_path)
    control = tmp_path / "engines" / "dc" / "control" / "t-1-1"
    begin(
        here,
        f"mkdir -p {control}; echo x > {control}/spec; echo x > $QIPAN_ATTEMPT_DIR/spec; echo ready; sleep 60",
    )
    until_ready(here)
    name = here.begin_beside(
        TaskId("t-1"), ["sh", "-c", f"cat {tmp_path}/key; ls {tmp_path}; echo x > /etc/qipan"], 20
    )
    text = said_beside(here, name)
    assert "secret" not in text
    assert "engines" in text
    assert "token" not in text
    assert "identity" not in text
    assert "Read-only" in text
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, False, "test"))
    assert exit_of(here).outcome == "cancelled"


def test_what_a_task_says_does_not_end_the_options_of_its_sandbox_early(tmp_path):
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "key").write_text("secret")
    here = engine(tmp_path)
    begin(here, "echo ready; /bin/sleep 60", (("LD_NONE", "--"),))
    until_ready(here)
    escape = ["--bind", "/", "/", "/bin/cat", str(tmp_path / "identity" / "key")]
    name = here.begin_beside(TaskId("t-1"), escape, 20)
    text = said_beside(here, name)
    assert "secret" not in text
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, False, "test"))
    assert exit_of(here).outcome == "cancelled"


MEAN = """
cd $QIPAN_ATTEMPT_DIR
printf 'cwd=\\0group=\\0grace_s=0\\0park_s=0\\0signal_on_stop=\\0word=touch\\0word={0}/joined\\0' > join-9.spec
mkfifo events.jsonl rank-0
for name in stop steps until exit.json beat pid.json log.txt reshape.json; do ln -s {0}/outside $name; done
echo ready; sleep 60
"""


def test_links_pipes_and_orders_that_a_task_leaves_lead_nowhere(tmp_path):
    """Outside its sandbox, as the board's own user, they would read and write what they like, or hold up the board."""
    (tmp_path / "identity").mkdir()
    (tmp_path / "outside").write_text("secret")
    here = engine(tmp_path)
    begin(here, MEAN.format(tmp_path))
    until_ready(here)
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, True, "test"))
    assert exit_of(here).outcome == "parked"
    assert (tmp_path / "outside").read_text() == "secret"
    assert not (tmp_path / "joined").exists()
    journal = (tmp_path / "engines" / "dc" / "journal.jsonl").read_text()
    assert "secret" not in journal


FORGE = """
now=$(date +%s)
for folder in $QIPAN_ATTEMPT_DIR {0} $QIPAN_ATTEMPT_DIR/../../control/t-1-1; do
  mkdir -p $folder; cd $folder || continue
  echo "9999999999 $(cat /proc/sys/kernel/random/boot_id) 999999 9999999999" > until
  echo "{{\\"code\\": 0, \\"started_s\\": $now, \\"ended_s\\": $now, \\"ended_by\\": \\"itself\\"}}" > exit.json
  echo "{{\\"pid\\": $$, \\"shim\\": $$, \\"started_s\\": $now}}" > pid.json
  touch beat stop
done
echo forged; sleep 60
"""


def test_a_task_that_forges_its_end_and_its_lease_is_seen_through(tmp_path):
    """It would be paid for no time at all, and have its devices beyond its lease."""
    (tmp_path / "identity").mkdir()
    here = engine(tmp_path)
    control = tmp_path / "engines" / "dc" / "control" / "t-1-1"
    began_s = time.time()
    begin(here, FORGE.format(control), lease_s=6.0)
    ended = exit_of(here)
    assert "forged" in (control / "log.txt").read_text(), "it had the time to"
    assert (tmp_path / "engines" / "dc" / "attempts" / "t-1-1" / "exit.json").exists()
    assert (ended.outcome, ended.why) == ("parked", "the lease ran out")
    assert ended.usage.device_s > 3.0
    assert time.time() - began_s < 60, "and not to the end of what it forged"


def test_a_script_in_a_sandbox_has_the_time_to_save_when_it_is_stopped(tmp_path):
    here = engine(tmp_path)
    begin(here, "trap 'echo kept > $QIPAN_CHECKPOINT_DIR/state; exit 0' TERM; echo ready; sleep 60 & wait")
    until_ready(here)
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, True, "test"))
    ended = exit_of(here)
    assert (ended.outcome, ended.exit_code) == ("parked", 0)
    assert (tmp_path / "checkpoints" / "t-1" / "state").read_text() == "kept\n"


@pytest.mark.parametrize("marks", ["echo $$ > $QIPAN_ATTEMPT_DIR/rank-0;", ""])
def test_a_task_in_a_sandbox_is_held_to_its_share_and_reaches_nobody_outside(tmp_path, marks):
    """By a duty cycle: whether its rank says which process it is, by the number that it has in there, or nobody does."""
    here = engine(tmp_path, share=0.3)
    begin(here, f"kill -0 {os.getpid()} && exit 14; {marks} echo ready; while :; do :; done")
    until_ready(here)
    shim = json.loads((here.folder / "control" / "t-1-1" / "pid.json").read_text())["shim"]
    end_s, seen = time.monotonic() + 60, ""
    while not {"T", "R"} <= set(seen):
        assert time.monotonic() < end_s, seen
        here.observe(0)
        busy = max(descendants(shim))  # the script itself
        seen += stat_of(busy)[0]
        time.sleep(0.01)
    here.stop(Stop(TaskId("t-1"), LeaseId("l"), 1, 3, False, "test"))
    assert exit_of(here).outcome == "cancelled"


@pytest.mark.parametrize(
    ("how", "outcome", "code"),
    [
        ("kill -9 $$", "lost", -9),
        ("exit 3", "failed", 3),
        ("exit 0", "done", 0),
        ("exit 137", "failed", 137),
        ("bash -c 'kill -9 $$'; exit $?", "failed", 137),
        ("trap : TERM; kill 0; exit 143", "failed", 143),
    ],
)
def test_how_a_task_in_a_sandbox_ended_is_told_as_of_any_other(tmp_path, how, outcome, code):
    here = engine(tmp_path)
    begin(here, how)
    ended = exit_of(here)
    assert (ended.outcome, ended.exit_code) == (outcome, code)
