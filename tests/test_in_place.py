"""An attempt of the built-in trainer goes on at another point in the processes that run, or is started again and says why."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines import in_place
from qipan.engines.leaf import LeafEngine
from qipan.engines.local import Processes
from qipan.engines.processes import reap
from qipan.engines.shim import Joined, Log, Spec
from qipan.events import EngineOffered, Reserve, Resize, Start, TaskExited, TaskProgress, TaskStarted
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload import Launch, Model, Task, Work
from test_local_engine import CHIP, Bench

#: ranks that do as the trainer does, without training.  `how` is the fault: refuse, deaf, broken (newcomers), stays (leavers), behind (their clock)
RANKS = """
import json, os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
how, worker = sys.argv[1], int(os.environ.get("QIPAN_WORKER", "0"))
folder = os.environ["QIPAN_ATTEMPT_DIR"]
at = lambda name: os.path.join(folder, name)
def mark(): open(at("rank-" + os.environ.get("LOCAL_RANK", "0")), "w").write(str(os.getpid()))
def until(there):
    while not there():
        if os.path.exists(at("stop")): sys.exit(0)
        time.sleep(0.01)
if "QIPAN_WORKER" in os.environ:
    if how == "broken": sys.exit(3)
    mark(); open(at(f"worker-{worker}.ready"), "w")
else:
    children = int(sys.argv[2]) - 1
    for n in range(children):
        if os.fork() == 0:
            os.environ["LOCAL_RANK"] = str(n + 1); worker = n + 1; children = 0
            break
    mark()
    if worker == 0: until(lambda: all(os.path.exists(at(f"rank-{n}")) for n in range(int(sys.argv[2]))))
late_s = 600 if how == "behind" else 0
say = lambda **told: print(json.dumps({"at_s": time.time() - late_s, **told}), file=open(os.environ["QIPAN_EVENTS"], "a"))
members, done, step = set(range(int(sys.argv[2]))), 0, 0
while True:
    if os.path.exists(at("stop")): sys.exit(0)
    step += 1
    time.sleep(0.01)
    if worker == 0: say(event="progress", step=min(step, 1000), steps=2000)
    try: order = json.load(open(at("reshape.json")))
    except FileNotFoundError: continue
    if how == "deaf" or order["generation"] <= done: continue
    done = order["generation"]
    if how == "refuse":
        if worker == 0: open(at(f"refused-{done}"), "w").write("no")
        continue
    until(lambda: all(os.path.exists(at(f"worker-{one}.ready")) for one in set(order["members"]) - members))
    members = set(order["members"])
    if worker == 0: say(event="reshaped", generation=done, step=step, seconds=0.25)
    if worker not in members and how != "stays": os._exit(0)
"""


def strategy(devices: int) -> Strategy:
    stage = Stage(CHIP, ((0, 2),), dp=devices, rows_per_dp=(4 // devices,) * devices)
    return Strategy(0, 32, 4, (SiteStrategy("here", (stage,)),))


def points() -> tuple[Point, ...]:
    return tuple(
        Point(f"{CHIP}:{n}", (Need(CHIP, n),), n / 2, n / 2, n / 2, strategy=strategy(n)) for n in (1, 2)
    )


class Ranks(Processes):
    """As on this machine, but for the program of a rank."""

    def __init__(self, board, program: Path, how: str) -> None:
        super().__init__(board, quotas=False)
        self._words = [sys.executable, "-S", str(program), how]

    def command(self, hold, run):
        return [*self._words, str(len(hold.devices))]

    def rank(self, hold):
        return [*self._words, "0"]


class Training(Bench):
    how = "well"

    def open(self) -> None:
        program = self.folder.parent / "ranks.py"
        program.write_text(RANKS)
        self.engine = LeafEngine(
            EngineId("dc-local"), self.board, self.folder, SystemClock(), self.folder / "ckpt",
            Ranks(self.board, program, self.how),
        )  # fmt: skip

    def start(self, devices: int) -> None:  # type: ignore[override]
        model = Model("test", 2, 32, 4, 4, 8, 64, 0, tied_embeddings=True)
        task = Task("train", "t", model, ("fortunes:song100",), Work(12800, 128, 32))
        launch = msgspec.json.encode(Launch(task))
        order = Order(TaskId("t"), "alice", "t", Curve(points(), 10.0), 1, 0.0, elastic=True, launch=launch)
        lease = LeaseId("l-t")
        self.generation += 2
        self.engine.reserve(
            Reserve(TaskId("t"), lease, 1, self.generation - 1, order, (Need(CHIP, devices),), 60.0)
        )
        self.engine.start(Start(TaskId("t"), lease, 1, self.generation, 1, (points()[devices - 1],)))
        self.until(TaskProgress)

    def resize(self, devices: int, task: str = "t") -> None:
        self.generation += 1
        self.engine.resize(
            Resize(TaskId(task), LeaseId("l-t"), 1, self.generation, 2, (points()[devices - 1],))
        )

    def changed(self) -> tuple[TaskExited, TaskStarted]:
        return self.until(TaskExited, outcome="resized"), self.until(TaskStarted)

    def pids(self) -> list[int]:
        """By device, of the attempt that runs."""
        [(_, folder)] = self.engine.running()
        marks = sorted(folder.glob("rank-*"), key=lambda mark: int(mark.name.split("-")[1]))
        return [int(mark.read_text()) for mark in marks]


@pytest.fixture
def bench(tmp_path):
    made = Training(tmp_path / "engine")
    yield made
    made.stop(park=False)
    made.until(TaskExited)


def faulty(tmp_path: Path, how: str) -> Training:
    class Faulty(Training):
        pass

    Faulty.how = how
    return Faulty(tmp_path / "engine")


def test_ranks_leave_and_join_while_the_first_one_goes_on(bench):
    bench.start(2)
    first, second = bench.pids()
    bench.resize(1)
    exited, started = bench.changed()
    assert (exited.in_place, exited.final, exited.usage.devices) == (True, False, 2)
    assert exited.why == f"goes on at {CHIP}:1 in the same processes"
    assert exited.standstill_s == 0.25, "as the processes say"
    [offered] = [fact for _, fact in bench.engine.observe(0) if isinstance(fact, EngineOffered)]
    assert offered.in_place
    assert (started.attempt, started.point_id) == (2, f"{CHIP}:1")
    assert bench.pids() == [first]
    assert not Path(f"/proc/{second}").exists(), "a device is free once nothing of the task is on it"
    bench.resize(2)
    again, started = bench.changed()
    assert (again.in_place, again.usage.devices, again.usage.attempt) == (True, 1, 2)
    assert again.usage.started_s == exited.usage.until_s, "nothing is charged twice or left out"
    assert started.attempt == 3
    assert bench.pids()[0] == first
    assert len(bench.pids()) == 2
    assert bench.until(TaskProgress, attempt=3).usage.devices == 2


def test_processes_whose_clock_is_behind_are_billed_for_no_time_before_they_began(tmp_path):
    bench = faulty(tmp_path, "behind")
    bench.start(2)
    bench.resize(1)
    exited, started = bench.changed()
    assert exited.in_place
    assert exited.usage.device_s >= 0.0
    later = bench.until(TaskProgress, attempt=started.attempt).usage
    assert later.started_s == exited.usage.until_s
    assert later.device_s < 60.0
    bench.stop(park=False)
    bench.until(TaskExited)


@pytest.mark.parametrize(
    ("how", "devices", "why"),
    [
        ("refuse", 1, "started again: no"),
        ("deaf", 1, "started again: its processes did not answer in time"),
        ("stays", 1, "started again: who was to leave did not"),
        ("broken", 2, "started again: a process that was to join ended with exit code 3"),
    ],
)
def test_processes_that_cannot_go_on_are_started_again(tmp_path, monkeypatch, how, devices, why):
    monkeypatch.setattr(in_place, "ANSWER_S", 0.3)
    bench = faulty(tmp_path, how)
    bench.start(3 - devices)
    bench.resize(devices)
    exited, started = bench.changed()
    assert not exited.in_place
    assert why in exited.why
    assert (started.attempt, started.point_id) == (2, f"{CHIP}:{devices}")
    assert len(list(bench.folder.glob("attempts/*"))) == 2
    bench.stop(park=False)
    assert bench.until(TaskExited).usage.devices == devices


def test_an_engine_that_dies_amid_the_change_takes_it_up_again(bench):
    bench.start(2)
    bench.resize(1)
    bench.open()  # the first one is forgotten, as after a SIGKILL
    exited, started = bench.changed()
    assert (exited.in_place, started.attempt) == (True, 2)
    bench.open()
    bench.resize(2)
    assert bench.changed()[1].attempt == 3
    exits = [fact for _, fact in bench.engine.observe(0) if isinstance(fact, TaskExited)]
    assert [fact.attempt for fact in exits] == [1, 2]


def test_a_newcomer_that_dies_ends_the_attempt(tmp_path):
    bench = Training(tmp_path / "engine")
    bench.start(1)
    bench.resize(2)
    bench.changed()
    os.kill(bench.pids()[1], signal.SIGKILL)
    exited = bench.until(TaskExited)
    assert (exited.outcome, exited.why, exited.usage.devices) == ("lost", "killed by signal 9", 2)


def test_an_order_to_stop_comes_before_a_change_that_waits(tmp_path):
    bench = faulty(tmp_path, "deaf")
    bench.start(2)
    bench.resize(1)
    bench.stop()
    exited = bench.until(TaskExited)
    assert (exited.outcome, exited.usage.devices) == ("parked", 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"run": "python own.py"}, "an own script"),
        ({"curve": ()}, "no strategy for each of the points"),
        ({"seq": 64}, "the points take unlike batches"),
    ],
)
def test_what_cannot_go_on_in_the_same_processes_is_named(change, why):
    task = Task("train", "t", run=change.get("run", ""))
    curve, then = Curve(points(), 10.0), points()[0]
    if "curve" in change:
        curve = replace(curve, points=change["curve"])
    if "seq" in change:
        assert then.strategy is not None
        then = replace(then, strategy=replace(then.strategy, seq=change["seq"]))
    assert in_place.why_not(task, curve, f"{CHIP}:2", then) == why


def test_how_a_newcomer_ended_is_told_when_the_disk_has_room_again(tmp_path):
    """The supervisor, and the ranks that run under it, live on until then."""
    control, task = tmp_path / "control", tmp_path / "task"
    control.mkdir()
    task.mkdir()
    joined = Joined(str(control), str(task), dict(os.environ), Log(str(control / "log.txt")))
    Spec(["sh", "-c", "exit 3"], {}).write(str(control / "join-1.spec"))
    joined.look()
    ended: dict[int, int] = {}
    while 3 not in ended.values():
        ended = reap()
    (control / "worker-1.exit.part").mkdir()  # as good as no room
    joined.note(ended)
    joined.look()
    assert not (control / "worker-1.exit").exists()
    (control / "worker-1.exit.part").rmdir()
    joined.look()
    assert (control / "worker-1.exit").read_text() == '{"code": 3}'
    assert joined.failed == 0, "it was not ready yet: the change is given up, the attempt goes on"
