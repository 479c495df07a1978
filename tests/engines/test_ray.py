"""The Ray engine on a real cluster: a head and two nodes in a network namespace of this machine."""

import httpx
import pytest
from driven import CHIP, WAIT, Bench, a_gang_trains_on_two_nodes_and_goes_on_on_one
from ray_cluster import RayCluster

from qipan.curves import Need
from qipan.events import LeaseRefused, TaskExited, TaskStarted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = RayCluster(tmp_path_factory.mktemp("ray"), nodes=2)
    try:
        yield running.up()
    finally:
        running.down()


@pytest.fixture
def bench(cluster, tmp_path):
    cluster.until_idle()
    return Bench(cluster, tmp_path)


def test_a_lease_is_a_job_that_holds_its_devices(bench, cluster):
    bench.start('sleep 4; echo "task $QIPAN_TASK_ID in ${RAY_ADDRESS:+ray}"; exit 3', devices=2)
    bench.until(TaskStarted)
    bench.poll_until(lambda: cluster.used() == 2)
    exited = bench.until(TaskExited)
    assert exited.outcome == "failed"
    assert "exit code 3" in exited.why
    assert "task t in ray" in bench.log()


def test_park_resize_and_cancel(bench):
    bench.start(WAIT, devices=1)
    bench.until(TaskStarted)
    bench.resize(3)
    assert bench.until(TaskExited).outcome == "resized"
    assert bench.until(TaskStarted).needs == (Need(CHIP, 3),)
    bench.stop(park=False)
    assert bench.until(TaskExited).outcome == "cancelled"


def test_others_jobs_keep_what_they_use(cluster, tmp_path):
    cluster.until_idle()
    own = {
        "entrypoint": "sleep 60",
        "submission_id": "own",
        "entrypoint_num_cpus": 0,
        "entrypoint_resources": {"sim": 3},
    }
    httpx.post(f"{cluster.address}/api/jobs/", json=own).raise_for_status()
    bench = Bench(cluster, tmp_path)
    bench.poll_until(lambda: bench.engine._launcher.devices()[CHIP] == 5)
    bench.reserve("true", devices=6)
    assert "5 are free" in bench.until(LeaseRefused).why
    httpx.post(f"{cluster.address}/api/jobs/own/stop").raise_for_status()


def test_a_gang_over_two_nodes_runs_once_on_each(bench, cluster):
    bench.start(
        "echo node $QIPAN_NODE_RANK of $QIPAN_NUM_NODES by $MASTER_ADDR; sleep 1", devices=2, per_node=1
    )
    bench.until(TaskStarted)
    hold = bench.engine.folder / "holds" / bench.engine.journal.held["t"].hold
    assert len({(hold / f"place-{rank}").read_text() for rank in range(2)}) == 2
    assert bench.until(TaskExited).outcome == "done"
    said = sorted(line for line in bench.log().splitlines() if line.startswith("node"))
    assert said == [f"node {rank} of 2 by {cluster.net}.2" for rank in range(2)]


@pytest.mark.endurance
def test_a_gang_of_the_trainer_lies_on_two_nodes_and_goes_on_on_one(bench):
    a_gang_trains_on_two_nodes_and_goes_on_on_one(bench)


@pytest.mark.endurance
def test_an_engine_that_was_started_again_goes_on_with_its_leases(bench):
    bench.start(WAIT)
    bench.until(TaskStarted)
    bench.open()
    bench.after = 0
    bench.until(TaskStarted)
    bench.stop(park=False)
    assert bench.until(TaskExited).outcome == "cancelled"


@pytest.mark.endurance
def test_tasks_whose_driver_is_gone_are_parked_and_the_next_driver_takes_new_ones(bench, cluster):
    bench.start(WAIT)
    bench.until(TaskStarted)
    keeper = (bench.engine.folder / "ray" / "keeper").read_text()
    httpx.post(f"{cluster.address}/api/jobs/{keeper}/stop").raise_for_status()
    assert bench.until(TaskExited, limit_s=60).outcome in ("parked", "lost")
    bench.start("true", task="next")
    assert bench.until(TaskExited, task_id="next").outcome == "done"


def test_a_task_whose_node_is_lost_is_lost_once_its_lease_is_over(bench, cluster):
    """The supervisor is told when the worker that holds its devices is gone, and parks its task."""
    bench.start(WAIT, devices=1, lease_s=15)
    bench.until(TaskStarted)
    hold = bench.engine.folder / "holds" / bench.engine.journal.held["t"].hold
    index = cluster.index_of((hold / "place-0").read_text())
    cluster.kill(f"node-{index}")
    try:
        exited = bench.until(TaskExited, limit_s=60)
        assert exited.outcome in ("lost", "parked")
    finally:
        cluster.again(index)


def test_a_node_that_drains_gives_its_tasks_back_and_gets_no_others(bench, cluster):
    """The last one here: the node stays away."""
    bench.start(WAIT, devices=3)
    bench.until(TaskStarted)
    hold = bench.engine.folder / "holds" / bench.engine.journal.held["t"].hold
    cluster.drain((hold / "place-0").read_text())
    exited = bench.until(TaskExited)
    assert exited.outcome == "parked"
    assert "drains" in exited.why
    assert bench.engine._launcher.devices()[CHIP] == 4
