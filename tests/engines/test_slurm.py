"""The Slurm engine on a real cluster: slurmctld and two slurmd of this machine."""

import time

import msgspec
import pytest
from slurm_cluster import SlurmCluster

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.make import leaf_engine
from qipan.events import (
    LeaseGranted,
    LeaseRefused,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskStarted,
)
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import LeaseId, Order, TaskId
from qipan.workload import Launch, Task

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
CHIP = ChipClassId("sim/a")
WAIT = 'trap "exit 0" TERM; for i in $(seq 600); do sleep 0.1; done'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = SlurmCluster(tmp_path_factory.mktemp("slurm")).up()
    yield running
    running.down()


def points() -> tuple[Point, ...]:
    return tuple(Point(f"{CHIP}:{n}", (Need(CHIP, n),), n / 8, n / 8, n / 8, stop_s=5) for n in range(1, 9))


class Bench:
    """One engine over the cluster, driven by hand."""

    def __init__(self, cluster, folder, share="1.0", wait="20s"):
        pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 8, 4, 1, resource="gpu:sim")
        options = {"conf": str(cluster.conf), "share": share, "wait": wait, "folder": str(folder / "shared")}
        self.board = BoardSpec(BoardId("dc"), pools=(pool,), engine="slurm", engine_options=options)
        self.folder, self.generation, self.after = folder, 0, 0
        self.open()

    def open(self):
        self.engine = leaf_engine(self.board, self.folder / "engine", SystemClock(), self.folder / "ckpt")

    def order(self, run, task):
        launch = msgspec.json.encode(Launch(Task("train", task, run=run, workdir=str(self.folder))))
        return Order(TaskId(task), "alice", task, Curve(points(), 10.0), 1, 0.0, elastic=True, launch=launch)

    def reserve(self, run, devices=1, task="t", lease_s=60.0):
        self.generation += 1
        need = (Need(CHIP, devices),)
        lease = LeaseId(f"l-{task}")
        self.engine.reserve(
            Reserve(TaskId(task), lease, 1, self.generation, self.order(run, task), need, lease_s)
        )

    def start(self, run, devices=1, task="t", lease_s=60.0):
        self.reserve(run, devices, task, lease_s)
        self.until(LeaseGranted, task_id=task)
        self.generation += 1
        point = points()[devices - 1]
        self.engine.start(Start(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 1, (point,)))

    def stop(self, park=True, task="t"):
        self.generation += 1
        self.engine.stop(Stop(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, park, "test"))

    def renew(self, task="t", lease_s=60.0):
        self.engine.renew(Renew((LeaseId(f"l-{task}"),), 1, lease_s))

    def resize(self, devices, task="t"):
        self.generation += 1
        point = (points()[devices - 1],)
        self.engine.resize(Resize(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 2, point))

    def until(self, kind, limit_s=40.0, **fields):
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            for seq, fact in self.engine.observe(self.after):
                self.after = seq
                if isinstance(fact, kind) and all(
                    getattr(fact, name) == value for name, value in fields.items()
                ):
                    return fact
            time.sleep(0.02)
        seen = [fact for _, fact in self.engine.observe(0)]
        raise AssertionError(f"no {kind.__name__} {fields} in {limit_s} s; there were {seen}")

    def log(self, task="t", attempt=1):
        return (self.folder / "engine" / "attempts" / f"{task}-{attempt}" / "log.txt").read_text()


@pytest.fixture
def bench(cluster, tmp_path):
    cluster.until_idle()
    return Bench(cluster, tmp_path)


def test_a_lease_is_a_job_that_holds_its_devices(bench, cluster):
    bench.start('echo "devices $CUDA_VISIBLE_DEVICES of $QIPAN_TASK_ID"; exit 3', devices=2)
    exited = bench.until(TaskExited)
    assert exited.outcome == "failed"
    assert "exit code 3" in exited.why
    assert f"devices {'0,1'} of t" in bench.log()


def test_a_gang_over_two_nodes_runs_once_on_each(bench):
    bench.start(
        "echo node $QIPAN_NODE_RANK of $QIPAN_NUM_NODES on $SLURMD_NODENAME, master $MASTER_ADDR", devices=8
    )
    assert bench.until(TaskExited).outcome == "done"
    lines = sorted(line for line in bench.log().splitlines() if line.startswith("node"))
    assert [line.split()[1] for line in lines] == ["0", "1"]
    assert len({line.split()[5] for line in lines}) == 2


def test_park_resize_and_cancel(bench):
    bench.start(WAIT, devices=2)
    bench.until(TaskStarted)
    bench.resize(4)
    assert bench.until(TaskExited).outcome == "resized"
    assert bench.until(TaskStarted).needs == (Need(CHIP, 4),)
    bench.stop()
    assert bench.until(TaskExited).outcome == "parked"


def test_a_lease_that_the_queue_does_not_serve_is_refused_with_its_reason(cluster, tmp_path):
    cluster.until_idle()
    own = cluster.run(
        "sbatch", "--parsable", "-N2", "--gres=gpu:sim:4", "--wrap=sleep 60", "-o/dev/null"
    ).strip()
    bench = Bench(cluster, tmp_path, wait="3s")
    bench.reserve("true", devices=1)
    assert "free" in bench.until(LeaseRefused).why or "queue" in bench.until(LeaseRefused).why
    cluster.run("scancel", own)


def test_an_engine_that_was_started_again_goes_on_with_its_jobs(bench):
    bench.start(WAIT)
    bench.until(TaskStarted)
    bench.open()
    bench.after = 0
    bench.until(TaskStarted)
    bench.stop(park=False)
    assert bench.until(TaskExited).outcome == "cancelled"


def test_a_job_that_was_cancelled_by_hand_is_parked(bench, cluster):
    bench.start(WAIT)
    bench.until(TaskStarted)
    name = bench.engine._held["t"].hold
    cluster.run("scancel", f"--name={name}")
    assert bench.until(TaskExited).outcome == "parked"


def test_the_sites_own_job_gets_its_devices_back(bench, cluster):
    bench.start(WAIT, devices=8)
    bench.until(TaskStarted)
    own = cluster.run(
        "sbatch", "--parsable", "-N1", "--gres=gpu:sim:2", "--wrap=sleep 20", "-o/dev/null"
    ).strip()
    began_s = time.monotonic()
    assert bench.until(TaskExited).outcome == "parked"
    while cluster.run("squeue", "-h", "-j", own, "-o", "%T").strip() != "RUNNING":
        assert time.monotonic() < began_s + 60
        time.sleep(0.2)
    cluster.run("scancel", own)


def test_a_task_goes_on_when_slurmctld_is_gone(bench, cluster):
    bench.start("sleep 6; echo whole")
    bench.until(TaskStarted)
    cluster.kill("slurmctld")
    try:
        assert bench.until(TaskExited).outcome == "done"
        assert "whole" in bench.log()
    finally:
        cluster.start_controller()


def test_a_lease_that_is_not_renewed_ends_its_job(bench, cluster):
    bench.start(WAIT, lease_s=8)
    bench.until(TaskStarted)
    exited = bench.until(TaskExited)
    assert exited.outcome == "parked"
    assert "lease ran out" in exited.why
    cluster.until_idle()


def test_a_lost_node_loses_the_attempt_once_its_lease_is_over(bench, cluster):
    bench.start(WAIT, lease_s=12)
    bench.until(TaskStarted)
    node = cluster.run("squeue", "-h", "-o", "%N").strip()
    index = int(node[-1])
    cluster.kill(f"slurmd-{index}")
    for process in cluster.processes_of(bench.engine._held["t"].hold):
        process.kill()
    try:
        assert bench.until(TaskExited, limit_s=60).outcome == "lost"
    finally:
        cluster.start_node(index)
        cluster.until_nodes()
