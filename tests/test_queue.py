"""The launcher over another tool's queue, whose daemon may be away or answer nonsense."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.held import Held, Places
from qipan.engines.journal import Journal
from qipan.engines.launcher import Folders, Hold, installed, supervisor
from qipan.engines.leaf import LeafEngine
from qipan.engines.queue import Job, QueueLauncher, View, gang_command
from qipan.engines.seats import Seats
from qipan.engines.shim import Spec
from qipan.engines.slurm import Slurm
from qipan.engines.slurm_control import Commands
from qipan.engines.slurm_rest import properties, user_of
from qipan.errors import InvalidInput, QipanError
from qipan.events import EngineOffered, LeaseGranted, Reserve, Start, Stop, TakeCensus, TasksHeld
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")


class Queue:
    """`fails`: what the next looks raise, one each."""

    def __init__(self, *fails, jobs=()):
        self.fails, self.jobs, self.submitted, self.cancelled, self.looks = list(fails), dict(jobs), [], [], 0
        self.usable = 4

    def look(self, prefix):
        self.looks += 1
        if self.fails:
            raise self.fails.pop(0)
        return View(dict(self.jobs), {CHIP: self.usable})

    def command(self, hold, run, granted):
        return ["bash", "-c", run]

    def environment(self, hold, granted):
        return {}

    def submit(self, hold):
        self.submitted.append(hold.name)
        self.jobs[hold.name] = Job(hold.name, "waiting")
        return hold.name

    def cancel(self, job_id):
        self.cancelled.append(job_id)


def test_a_supervisor_runs_from_modules_that_several_boards_install_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with ThreadPoolExecutor(8) as boards:
        places = set(boards.map(lambda _: installed(tmp_path), range(8)))
    assert list(tmp_path.iterdir()) == list(places), "one place, nothing half made beside it"
    control = tmp_path / "control"
    control.mkdir()
    Spec(["sh", "-c", "exit 7"], dict(os.environ), task=str(control)).write(str(control / "spec"))
    subprocess.run(supervisor(sys.executable, str(control), folder=places.pop()), cwd="/", check=True)
    assert json.loads((control / "exit.json").read_text())["code"] == 7


def hold(folder, name):
    (folder / name).mkdir()
    return Hold(name, folder / name, TaskId(name), "me", Need(CHIP, 1), (0,))


def until(done, limit_s=5.0):
    end_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_start_while_the_daemon_is_away_asks_for_nothing_and_doubts_nobody(tmp_path):
    a, b = hold(tmp_path, "q-a"), hold(tmp_path, "q-b")
    jobs = {"q-a": Job("1", "running"), "q-stranger": Job("2", "running")}
    queue = Queue(QipanError("slurmctld is away"), jobs=jobs)
    launcher = QueueLauncher(queue, poll_s=0.2)
    launcher.adopt("q-", [a, b])
    assert launcher.devices() is None
    assert launcher.lives(a, Folders(tmp_path, tmp_path)) is True
    assert "slurmctld is away" in launcher.look(a).why
    assert queue.submitted == []
    until(lambda: launcher.devices() == {CHIP: 4})
    until(lambda: queue.submitted and queue.cancelled)
    assert (queue.submitted, queue.cancelled) == (["q-b"], ["2"])
    assert launcher.look(a).why == ""


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), ValueError("int of N/A"), FileNotFoundError("x")]
)
def test_the_thread_that_speaks_to_the_queue_goes_on_whatever_fails(tmp_path, failure, caplog):
    a = hold(tmp_path, "q-a")
    queue = Queue(jobs={"q-a": Job("1", "waiting")})
    launcher = QueueLauncher(queue, poll_s=0.1)
    launcher.adopt("q-", [a])
    queue.fails = [failure, failure]
    until(lambda: str(failure) in launcher.look(a).why)
    until(lambda: launcher.look(a).why == "")
    assert caplog.text.count("Traceback") == 1, "it is said once, with where it was"
    launcher.hold(hold(tmp_path, "q-b"))
    until(lambda: queue.submitted == ["q-b"])


def test_a_queue_that_has_lost_everything_is_looked_at_soon_again(tmp_path):
    queue = Queue()
    queue.usable = 0
    launcher = QueueLauncher(queue, poll_s=60.0)
    launcher.adopt("q-", [])
    queue.usable = 4
    until(lambda: launcher.devices() == {CHIP: 4})
    assert queue.looks == 2


def test_an_order_that_fails_leaves_the_thread_alive(tmp_path):
    a = hold(tmp_path, "q-a")
    queue = Queue()
    launcher = QueueLauncher(queue, poll_s=0.1)
    launcher.adopt("q-", [])
    submit, queue.submit = queue.submit, lambda hold: 1 // 0
    launcher.hold(a)
    until(lambda: launcher.look(a).state == "gone")
    assert "division" in launcher.look(a).why
    queue.submit = submit
    launcher.hold(hold(tmp_path, "q-b"))
    until(lambda: queue.submitted == ["q-b"])


@pytest.mark.parametrize(
    ("granted", "folders"), [("{}", {"attempts"}), ('{"control": 1}', {"attempts", "control"})]
)
def test_a_supervisor_of_an_earlier_release_finds_all_in_one_folder(tmp_path, granted, folders):
    """It holds its devices over an update of its board, and a keeper on Ray starts such ones for as long as it lives."""
    queue = Queue()
    launcher = QueueLauncher(queue, poll_s=0.2)
    board = BoardSpec(BoardId("dc"), pools=(Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 4, 4, 1),))
    engine = LeafEngine(EngineId("e"), board, tmp_path / "e", SystemClock(), tmp_path / "ckpt", launcher)
    point = Point("p", (Need(CHIP, 2),), 1.0, 1.0, 1.0)
    launch = msgspec.json.encode(Launch(Task("train", "t", run="sleep 9")))
    order = Order(TaskId("t"), "me", "t", Curve((point,), 10.0), 1, 0.0, launch=launch)
    engine.reserve(Reserve(TaskId("t"), LeaseId("l"), 1, 1, order, point.needs, 60.0))
    until(lambda: queue.submitted)
    hold = tmp_path / "e" / "holds" / queue.submitted[0]
    (hold / "granted.json").write_text(granted)
    until(lambda: any(isinstance(fact, LeaseGranted) for _, fact in engine.observe(0)))
    engine.start(Start(TaskId("t"), LeaseId("l"), 1, 2, 1, (point,)))
    engine.stop(Stop(TaskId("t"), LeaseId("l"), 1, 3, True, "test"))
    assert {path.parent.name for path in (tmp_path / "e").glob("*/t-1")} == folders
    told = Path((hold / "go").read_text())
    assert {"spec", "stop", "until"} <= {path.name for path in told.iterdir()}


def test_a_board_that_starts_while_the_daemon_is_away_parks_nothing(tmp_path):
    board = BoardSpec(BoardId("dc"), pools=(Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 4, 4, 1),))
    point = Point("p", (Need(CHIP, 2),), 1.0, 1.0, 1.0)
    launch = msgspec.json.encode(Launch(Task("train", "t", run="sleep 9")))
    order = Order(TaskId("t"), "me", "t", Curve((point,), 10.0), 1, 0.0, launch=launch)

    def engine(queue):
        launcher = QueueLauncher(queue, poll_s=0.2)
        return LeafEngine(EngineId("e"), board, tmp_path / "e", SystemClock(), tmp_path / "ckpt", launcher)

    queue = Queue()
    first = engine(queue)
    first.reserve(Reserve(TaskId("t"), LeaseId("l"), 1, 1, order, point.needs, 60.0))
    until(lambda: queue.submitted)
    (tmp_path / "e" / "holds" / queue.submitted[0] / "granted.json").write_text('{"control": 1}')
    until(lambda: any(isinstance(fact, LeaseGranted) for _, fact in first.observe(0)))
    first.start(Start(TaskId("t"), LeaseId("l"), 1, 2, 1, (point,)))
    stop = tmp_path / "e" / "control" / "t-1" / "stop"

    again = Queue(QipanError("slurmctld is away"), jobs={queue.submitted[0]: Job("1", "running")})
    second = engine(again)
    assert len(second.seats.free(CHIP)) == 2
    for _ in range(100):
        offers = [fact for _, fact in second.observe(0) if isinstance(fact, EngineOffered)]
        time.sleep(0.005)
    assert again.looks > 1
    assert not stop.exists()
    assert [offer.devices for fact in offers for offer in fact.offers] == [4]


def test_a_board_that_asks_what_is_held_hears_whether_the_queue_gave_devices_yet(tmp_path):
    """A Start for a job that waits in its queue would begin an attempt without devices."""
    board = BoardSpec(BoardId("dc"), pools=(Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 4, 4, 1),))
    point = Point("p", (Need(CHIP, 2),), 1.0, 1.0, 1.0)
    order = Order(TaskId("t"), "me", "t", Curve((point,), 10.0), 1, 0.0)
    queue = Queue()
    launcher = QueueLauncher(queue, poll_s=0.2)
    engine = LeafEngine(EngineId("e"), board, tmp_path / "e", SystemClock(), tmp_path / "ckpt", launcher)
    engine.reserve(Reserve(TaskId("t"), LeaseId("l"), 1, 1, order, point.needs, 60.0))
    until(lambda: queue.submitted)
    engine.census(TakeCensus(1, 1.0))
    (tmp_path / "e" / "holds" / queue.submitted[0] / "granted.json").write_text('{"control": 1}')
    until(lambda: any(isinstance(fact, LeaseGranted) for _, fact in engine.observe(0)))
    engine.census(TakeCensus(1, 2.0))
    told = [fact.held for _, fact in engine.observe(0) if isinstance(fact, TasksHeld)]
    assert [[held.granted for held in entry] for entry in told] == [[False], [True]]


def test_a_node_that_is_to_go_makes_no_room_among_devices_of_another_class(tmp_path):
    other = ChipClassId("sim/b")
    pools = tuple(Pool(PoolId(f"dc/{chip}"), BoardId("dc"), chip, 4, 4, 1) for chip in (CHIP, other))
    below = SimpleNamespace(
        picks=True, devices=lambda: {CHIP: 2}, draining=lambda hold: "drained" if hold.name == other else ""
    )
    journal = Journal(tmp_path)
    for chip in (CHIP, other):
        order = Order(TaskId(chip), "me", "t", Curve((), 10.0), 1, 0.0)
        journal.hold(Held(LeaseId(chip), 1, 1, order, (Need(chip, 2),), (0, 1), 60.0, 60.0, hold=chip))
    board = BoardSpec(BoardId("dc"), pools=pools)
    seats = Seats(board, below, SystemClock(), journal, Places(tmp_path, tmp_path), dict)
    assert seats.free(CHIP) == [], "two can be used, and are"


def test_an_engine_remembers_the_newest_of_the_tasks_that_hold_nothing_any_more(tmp_path, monkeypatch):
    """All that it remembers of commands is written at each of them, and at each renewal; how tasks ended is told in one message."""
    monkeypatch.setattr("qipan.engines.journal.OVER_MAX", 3)
    journal = Journal(tmp_path)
    order = Order(TaskId("held"), "me", "held", Curve((), 10.0), 1, 0.0)
    held = Held(LeaseId("l"), 1, 1, order, (Need(CHIP, 1),), (0,), 60.0, 60.0)
    for number, name in enumerate(("held", "t1", "t2", "t3", "t4", "t5", "t2"), 1):
        assert journal.newer(TaskId(name), 1, number)
    journal.hold(held)
    again = Journal(tmp_path)
    assert list(again.commands) == ["held", "t4", "t5", "t2"]
    assert not again.newer(TaskId("t2"), 1, 7), "heard before"
    again.over = {TaskId(name): "done" for name in ("held", "t1", "t2", "t3", "t4")}
    assert again.ends() == (("t2", "done"), ("t3", "done"), ("t4", "done"))


def test_what_sbatch_is_asked_is_what_slurmrestd_is_asked():
    pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 16, 4, 1, resource="gpu:sim")
    given = {
        "rest": "http://ctl:6820",
        "token_file": "/t",
        "memory_per_device": "2G",
        "time": "1-0",
        "partition": "main",
    }
    slurm = Slurm(BoardSpec(BoardId("dc"), pools=(pool,), engine="slurm", engine_options=given))
    shape = slurm.shape(Hold("n", Path(), TaskId("t"), "me", Need(CHIP, 8), ()))
    assert properties(shape) == {
        "nodes": 2, "tasks": 2, "tasks_per_node": 1, "gres": "gpu:sim:4", "cpus_per_task": 1, "memory_per_node": 8192,
        "partition": "main", "time_limit": "1-0",
    }  # fmt: skip


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "a.bnVsbA.c", "SLURM_JWT"])
def test_a_token_that_is_none_is_said(token):
    with pytest.raises(QipanError, match="scontrol token"):
        user_of(token)


def test_slurmrestd_without_a_token_file_is_refused():
    board = BoardSpec(BoardId("dc"), engine="slurm", engine_options={"rest": "http://ctl:6820"})
    with pytest.raises(InvalidInput, match="token_file"):
        Slurm(board)


@pytest.mark.parametrize(("rank", "hosts"), [("0", "is_host=1"), ("1", "is_host=0")])
def test_the_first_node_of_a_trainers_gang_hosts_its_rendezvous_at_the_address_that_its_queue_gave(
    rank, hosts
):
    pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 16, 4, 1)
    of_two = Hold("n", Path(), TaskId("t"), "me", Need(CHIP, 8), ())
    command = gang_command("python", of_two, pool, "", {"host": "10.0.0.1"})
    words = command[: command.index("python")]
    env = {"PATH": os.environ["PATH"], "QIPAN_NODE_RANK": rank, "QIPAN_NODE_ADDRESS": "10.0.0.7"}
    told = subprocess.run([*words, "env"], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert {f"PET_RDZV_CONF={hosts}", "PET_LOCAL_ADDR=10.0.0.7"} <= {*told}
    assert "--nnodes=2" in command


NAMES = """#!/usr/bin/env python3
import sys
rows = [("\u8bad\u7ec3", "7", "RUNNING", "2", "c0n[0-1]"), ("\u8bd7" * 50, "8", "RUNNING", "1", "c0n2")]
for name, number, state, nodes, where in rows:
    columns = name, number, state, nodes, "4", "gres:gpu:2", "N/A", where, "None"
    for text, width in zip(columns, (120, 20, 20, 12, 12, 80, 80, 200, 80)):
        sys.stdout.buffer.write(text.encode()[:width].rjust(width))
    print(flush=True)
"""


def test_a_job_of_the_site_may_have_a_name_in_any_script(tmp_path):
    """squeue pads and cuts by bytes (seen with Slurm 22.05): by letters the columns behind the name would be others."""
    (tmp_path / "squeue").write_text(NAMES)
    (tmp_path / "squeue").chmod(0o755)
    first, second = Commands({**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}).jobs()
    assert (first.name, first.job_id, first.nodes, first.listed) == ("\u8bad\u7ec3", "7", 2, "c0n[0-1]")
    assert (second.job_id, second.nodes, second.per_node) == ("8", 1, "gres:gpu:2")
