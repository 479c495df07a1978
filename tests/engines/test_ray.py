"""The Ray engine on a real cluster: a head and a node in a network namespace of this machine."""

import httpx
import pytest
from driven import CHIP, WAIT, Bench
from ray_cluster import RayCluster

from qipan.curves import Need
from qipan.events import LeaseRefused, TaskExited, TaskStarted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = RayCluster(tmp_path_factory.mktemp("ray"))
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
    bench.poll_until(lambda: bench.engine._launcher.devices()[CHIP] == 1)
    bench.reserve("true", devices=2)
    assert "1 are free" in bench.until(LeaseRefused).why
    httpx.post(f"{cluster.address}/api/jobs/own/stop").raise_for_status()


def test_a_task_whose_node_is_lost_is_lost_once_its_lease_is_over(bench, cluster):
    """Ray ends its own processes with the node's daemon; the task's own may live, so the lease is waited for."""
    bench.start(WAIT, devices=1, lease_s=15)
    bench.until(TaskStarted)
    cluster.kill("node-0")
    try:
        exited = bench.until(TaskExited, limit_s=60)
        assert exited.outcome in ("lost", "parked")
    finally:
        cluster.start_node(0)
        cluster._until(lambda: cluster.total() >= 4, 60, "the node")
