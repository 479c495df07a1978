"""The local engine with real processes: every outcome, and an engine that dies while its tasks run."""

import json
import time
from pathlib import Path

import msgspec
import pytest

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines import devices as chips
from qipan.engines.local import LocalEngine
from qipan.events import (
    EngineOffered,
    LeaseGranted,
    LeaseRefused,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskProgress,
    TaskStarted,
)
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")
STEPPER = (
    'import json,os,sys,time,signal\n'
    'stop=[]\nsignal.signal(signal.SIGTERM,lambda *_:stop.append(1))\n'
    'e=open(os.environ["QIPAN_EVENTS"],"a",buffering=1)\n'
    'for s in range(1,200):\n'
    '  time.sleep(0.02)\n'
    '  print(json.dumps({"event":"progress","step":s,"steps":200}),file=e)\n'
    '  print(json.dumps({"event":"checkpoint","step":s}),file=e)\n'
    '  if stop: print(json.dumps({"event":"parked"}),file=e); sys.exit(0)\n'
)  # fmt: skip


def points() -> tuple[Point, ...]:
    return tuple(Point(f"{CHIP}:{n}", (Need(CHIP, n),), n / 2, n / 2, n / 2) for n in (1, 2))


class Bench:
    """One engine over two devices, driven by hand."""

    def __init__(
        self, folder: Path, share: float = 0.0, quotas: bool | None = None, pool: tuple[int, int] = (2, 2)
    ) -> None:
        """`pool`: devices, and devices of a node."""
        self.sick: dict = {}
        self.quotas = quotas
        self.folder = folder
        made = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, *pool, 1, cpu_share=share)
        self.board = BoardSpec(BoardId("dc"), pools=(made,))
        self.generation = 0
        self.after = 0
        self.open()

    def open(self) -> None:
        self.engine = LocalEngine(
            EngineId("dc-local"), self.board, self.folder, SystemClock(), self.folder / "ckpt",
            sick=lambda: self.sick,
        )  # fmt: skip

    def reserve(self, run: str, devices: int = 1, duration_s: float = 60.0, task: str = "t") -> None:
        launch = msgspec.json.encode(Launch(Task("train", task, run=run, workdir=str(self.folder))))
        order = Order(TaskId(task), "alice", task, Curve(points(), 10.0), 1, 0.0, elastic=True, launch=launch)
        self.generation += 1
        need = (Need(CHIP, devices),)
        self.engine.reserve(
            Reserve(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, order, need, duration_s)
        )

    def start(self, run: str, devices: int = 1, duration_s: float = 60.0, task: str = "t") -> None:
        self.reserve(run, devices, duration_s, task)
        self.generation += 1
        self.engine.start(
            Start(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 1, (points()[devices - 1],))
        )

    def stop(self, park: bool = True, task: str = "t") -> None:
        self.generation += 1
        self.engine.stop(Stop(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, park, "test"))

    def resize(self, devices: int, task: str = "t") -> None:
        self.generation += 1
        self.engine.resize(
            Resize(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 2, (points()[devices - 1],))
        )

    def until(self, kind, limit_s: float = 10.0, **fields):
        """The next fact of a kind with these fields."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            for seq, fact in self.engine.observe(self.after):
                self.after = seq
                if isinstance(fact, kind) and all(
                    getattr(fact, name) == value for name, value in fields.items()
                ):
                    return fact
            time.sleep(0.02)
        raise AssertionError(f"no {kind.__name__} {fields} in {limit_s} s")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "engine")


def python(code: str, tmp_path: Path) -> str:
    path = tmp_path / "job.py"
    path.write_text(code)
    return f"exec python3 -S {path}"


@pytest.mark.parametrize(
    ("run", "outcome"), [("true", "done"), ("echo bad >&2; exit 3", "failed"), ("kill -9 $$", "lost")]
)
def test_how_a_script_ends_decides_the_outcome(bench, run, outcome):
    bench.start(run)
    exited = bench.until(TaskExited)
    assert exited.outcome == outcome
    assert exited.final
    if outcome == "failed":
        assert "exit code 3" in exited.why
        assert "bad" in exited.why


def test_a_lease_is_all_or_nothing_and_says_what_is_missing(bench):
    bench.start("sleep 30", devices=2)
    bench.until(TaskStarted)
    bench.reserve("true", task="u")
    assert "0 are free" in bench.until(LeaseRefused).why
    bench.stop(park=False)
    assert bench.until(TaskExited).outcome == "cancelled"


def test_progress_and_saved_work_count_in_the_curves_seconds(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path))
    progress = bench.until(TaskProgress)
    assert 0 < progress.saved_s <= progress.done_s <= 10.0
    assert json.loads(progress.detail)["event"] in ("progress", "checkpoint")
    bench.stop()
    exited = bench.until(TaskExited)
    assert exited.outcome == "parked"
    assert exited.saved_s >= progress.saved_s


def test_a_resize_ends_one_attempt_and_starts_the_next_at_the_new_point(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path), devices=1)
    bench.until(TaskProgress)
    bench.resize(2)
    exited = bench.until(TaskExited)
    assert (exited.outcome, exited.usage.devices, exited.final) == ("resized", 1, False)
    started = bench.until(TaskStarted)
    assert (started.attempt, started.point_id) == (2, f"{CHIP}:2")
    bench.stop(park=False)
    assert bench.until(TaskExited).usage.devices == 2


def test_an_engine_opened_again_takes_up_what_runs(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path))
    bench.until(TaskStarted)
    bench.open()  # the first one is simply forgotten, as after a SIGKILL
    bench.stop()
    assert bench.until(TaskExited).outcome == "parked"
    exits = [fact for _, fact in bench.engine.observe(0) if isinstance(fact, TaskExited)]
    assert len(exits) == 1


def test_a_command_that_arrives_twice_acts_once(bench):
    bench.start("sleep 1")
    bench.generation -= 2
    bench.start("sleep 1")
    bench.until(TaskExited, outcome="done")
    facts = [fact for _, fact in bench.engine.observe(0)]
    assert sum(isinstance(fact, LeaseGranted) for fact in facts) == 1
    assert sum(isinstance(fact, TaskStarted) for fact in facts) == 1


def test_an_attempt_whose_supervisor_was_never_started_is_lost_not_stuck(bench, monkeypatch):
    monkeypatch.setattr("qipan.engines.local.subprocess.Popen", lambda *_, **__: FakeShim())
    bench.start("true")
    monkeypatch.undo()
    bench.open()
    assert bench.until(TaskExited).outcome == "lost"


class FakeShim:
    """What is left of a supervisor when the engine dies just before starting it."""

    def poll(self) -> int:
        return 0


def test_an_order_to_stop_is_given_again_when_the_engine_died_before_passing_it_on(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path))
    bench.until(TaskProgress)
    bench.stop()
    next(bench.folder.glob("attempts/*/stop")).unlink()
    bench.open()
    assert bench.until(TaskExited).outcome == "parked"


def test_a_lease_that_is_not_renewed_parks_its_task(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path), duration_s=0.6)
    exited = bench.until(TaskExited)
    assert (exited.outcome, exited.why) == ("parked", "the lease ran out")


def test_a_renewed_lease_keeps_its_task(bench):
    bench.start("sleep 1.5", duration_s=0.8)
    for _ in range(10):
        bench.engine.renew(Renew((LeaseId("l-t"),), 1, 0.8))
        time.sleep(0.15)
        bench.engine.observe(bench.after)
    assert bench.until(TaskExited).outcome == "done"


def test_children_that_leave_the_process_group_are_ended_too(bench, tmp_path):
    mark = tmp_path / "orphan"
    bench.start(f"setsid bash -c 'echo $$ > {mark}; exec sleep 300' & sleep 0.3; exit 0")
    assert bench.until(TaskExited).outcome == "done"
    assert not Path(f"/proc/{mark.read_text().strip()}").exists()


def test_a_flood_of_output_is_bounded_and_junk_lines_are_passed_over(bench):
    bench.start(
        "head -c 60000000 /dev/zero; echo '{\"event\": 3}' >> $QIPAN_EVENTS; echo junk >> $QIPAN_EVENTS"
    )
    assert bench.until(TaskExited).outcome == "done"
    assert next(bench.folder.glob("attempts/*/log.txt")).stat().st_size <= 17 * 2**20


def test_usage_agrees_with_the_clock(bench):
    began_s = time.time()
    bench.start("sleep 0.7")
    usage = bench.until(TaskExited).usage
    assert abs(usage.device_s - 0.7) < 0.5
    assert began_s - 0.1 <= usage.started_s <= usage.until_s <= time.time()


@pytest.mark.slow
def test_a_chips_speed_hardly_moves_when_the_others_work(tmp_path):
    """Work done in two seconds by one chip of 0.3 core, alone and beside another: within 10 %."""
    count = (
        "import os,time\nn=0;end=time.time()+3\nwhile time.time()<end:\n  for _ in range(1000): n+=1\n"
        "open(os.environ['QIPAN_CHECKPOINT_DIR']+'/n','w').write(str(n))\n"
    )
    bench = Bench(tmp_path / "engine", share=0.3)
    run = python(count, tmp_path)

    def work(*tasks: str) -> list[int]:
        for task in tasks:
            bench.start(run, task=task)
        for _ in tasks:
            assert bench.until(TaskExited).outcome == "done"
        return [int((bench.folder / "ckpt" / task / "n").read_text()) for task in tasks]

    ratios = []
    for i in range(5):
        [alone] = work(f"alone-{i}")
        both = work(f"left-{i}", f"right-{i}")
        ratios.append(min(both) / alone)
    # Other programs of this machine only ever lower a ratio; what the chips do to each other shows in all five.
    assert sorted(ratios)[-2] > 0.9, ratios
    bench.engine.close()
    assert not chips.groups(bench.engine._prefix()), "no group is left behind"


@pytest.mark.slow
def test_without_cgroups_a_duty_cycle_holds_a_chip_to_its_share(tmp_path):
    spin = (
        "import os,time\nend=time.time()+3\nwhile time.time()<end: pass\n"
        "open(os.environ['QIPAN_CHECKPOINT_DIR']+'/cpu','w').write(str(time.process_time()))\n"
    )
    bench = Bench(tmp_path / "engine", share=0.3, quotas=False)
    bench.start(python(spin, tmp_path))
    assert bench.until(TaskExited).outcome == "done"
    used = float((bench.folder / "ckpt" / "t" / "cpu").read_text()) / 3
    assert 0.2 < used < 0.42, used


@pytest.mark.slow
def test_a_throttled_task_can_still_be_stopped(tmp_path):
    bench = Bench(tmp_path / "engine", share=0.2, quotas=False)
    bench.start(python(STEPPER, tmp_path))
    bench.until(TaskProgress)
    bench.stop()
    assert bench.until(TaskExited).outcome == "parked"


def test_a_sick_device_is_drained_before_it_fails_its_task(bench, tmp_path):
    bench.start(python(STEPPER, tmp_path), 2)
    bench.until(TaskProgress)
    bench.sick = {CHIP: {0: "3 uncorrectable memory errors"}}
    assert bench.until(EngineOffered, chooses=False).offers[0].devices == 1
    exited = bench.until(TaskExited)
    assert exited.outcome == "parked"
    assert exited.saved_s > 0
    assert exited.why == "device 0 is drained: 3 uncorrectable memory errors"
    bench.reserve("true", 2, task="two")
    bench.until(LeaseRefused)
    bench.start(python(STEPPER, tmp_path), 1, task="u")
    bench.until(TaskStarted)
    bench.stop(task="u")
    bench.until(TaskExited)
    bench.sick = {}
    assert bench.until(EngineOffered).offers[0].devices == 2
