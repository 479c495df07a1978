"""The Kubernetes engine against a stateful double that holds to the strict published schemas; against a real cluster
whenever KUBECONFIG is set (the docs say which ran)."""

import sys

import httpx
import pytest
from driven import CHIP, WAIT, Bench
from kubernetes_double import KubernetesDouble

from qipan.curves import Need
from qipan.events import LeaseRefused, TaskExited, TaskStarted


class Cluster(KubernetesDouble):
    engine, nodes = "kubernetes", 1
    queue = ""

    def options(self):
        named = {
            "api": self.address,
            "image": "qipan/supervisor:1",
            "claim": "qipan",
            "python": sys.executable,
        }
        return named | ({"queue": self.queue} if self.queue else {})


@pytest.fixture
def cluster():
    running = Cluster()
    yield running
    running.down()


@pytest.fixture
def bench(cluster, tmp_path):
    return Bench(cluster, tmp_path)


def test_a_lease_is_a_job_that_passes_the_strict_schema(bench, cluster):
    bench.start("echo task $QIPAN_TASK_ID; exit 3", devices=2)
    exited = bench.until(TaskExited)
    assert exited.outcome == "failed"
    assert "task t" in bench.log()
    job = next(found for key, found in cluster.objects.items() if key[0] == "Job")
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"example.com/sim": "2"}


def test_park_resize_and_cancel(bench):
    bench.start(WAIT, devices=1)
    bench.until(TaskStarted)
    bench.resize(3)
    assert bench.until(TaskExited).outcome == "resized"
    assert bench.until(TaskStarted).needs == (Need(CHIP, 3),)
    bench.stop(park=False)
    assert bench.until(TaskExited).outcome == "cancelled"


def test_kueue_admits_a_suspended_job(cluster, tmp_path):
    cluster.queue = "research"
    bench = Bench(cluster, tmp_path)
    bench.start("true")
    assert bench.until(TaskExited).outcome == "done"
    job = next(found for key, found in cluster.objects.items() if key[0] == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


def test_others_pods_keep_what_they_hold(cluster, tmp_path):
    cluster.own_pod("theirs", 3)
    bench = Bench(cluster, tmp_path)
    bench.reserve("true", devices=2)
    assert "1 are free" in bench.until(LeaseRefused).why


def test_a_watch_that_is_too_old_lists_again(bench, cluster):
    bench.start(WAIT)
    bench.until(TaskStarted)
    cluster.compact()
    before = cluster.lists
    bench.poll_until(lambda: cluster.lists > before)
    bench.stop()
    assert bench.until(TaskExited).outcome == "parked"


def test_the_list_is_asked_once_and_then_watched(bench, cluster):
    bench.poll_until(lambda: cluster.watches >= 3)
    job_lists = cluster.lists
    bench.poll_until(lambda: cluster.watches >= 6)
    assert cluster.lists - job_lists <= 4, "only nodes are listed again"


def test_a_job_that_was_deleted_by_hand_gives_its_task_back(bench, cluster):
    bench.start(WAIT)
    bench.until(TaskStarted)
    name = bench.engine._held["t"].hold
    httpx.delete(f"{cluster.address}/apis/batch/v1/namespaces/default/jobs/{name}").raise_for_status()
    assert bench.until(TaskExited, limit_s=60).outcome in ("parked", "lost")


def test_the_double_refuses_what_the_schemas_refuse(cluster):
    url = f"{cluster.address}/apis/batch/v1/namespaces/default/jobs/x?fieldManager=t"
    kind = {"Content-Type": "application/apply-patch+yaml"}
    bad = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x", "namespace": "default"},
        "spec": {"template": {}, "nope": 1},
    }
    assert httpx.patch(url, json=bad, headers=kind).status_code == 422
    assert httpx.patch(url, json=bad).status_code == 415
