"""The Kubernetes engine against a stateful double that holds to the strict published schemas; against a real cluster
whenever KUBECONFIG is set (the docs say which ran)."""

import sys

import httpx
import pytest
from driven import CHIP, WAIT, Bench, a_gang_trains_on_two_nodes_and_goes_on_on_one
from kubernetes_double import KubernetesDouble

from qipan.curves import Need
from qipan.events import EngineOffered, LeaseRefused, TaskExited, TaskStarted


class Cluster(KubernetesDouble):
    engine = "kubernetes"
    queue = ""

    def __init__(self, nodes: int = 1) -> None:
        self.nodes = nodes
        super().__init__(nodes=nodes)

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
    name = bench.engine.journal.held["t"].hold
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


@pytest.fixture
def two_nodes():
    running = Cluster(nodes=2)
    yield running
    running.down()


def test_a_gang_over_two_nodes_runs_once_on_each(two_nodes, tmp_path):
    bench = Bench(two_nodes, tmp_path)
    bench.start("echo node $QIPAN_NODE_RANK of $QIPAN_NUM_NODES by $MASTER_ADDR", devices=8)
    assert bench.until(TaskExited).outcome == "done"
    said = sorted(line for line in bench.log().splitlines() if line.startswith("node"))
    assert said == ["node 0 of 2 by 127.0.0.1", "node 1 of 2 by 127.0.0.1"]
    pods = [found for key, found in two_nodes.objects.items() if key[0] == "Pod"]
    assert sorted(pod["spec"]["nodeName"] for pod in pods) == ["node-0", "node-1"]


@pytest.mark.endurance
def test_a_gang_of_the_trainer_lies_on_two_nodes_and_goes_on_on_one(two_nodes, tmp_path):
    a_gang_trains_on_two_nodes_and_goes_on_on_one(Bench(two_nodes, tmp_path))


def test_devices_that_would_fit_on_one_node_lie_on_two_where_the_task_says_so(two_nodes, tmp_path):
    bench = Bench(two_nodes, tmp_path)
    bench.start("echo rank $QIPAN_NODE_RANK", devices=2, per_node=1)
    assert bench.until(TaskExited).outcome == "done"
    assert sorted(bench.log().split()) == ["0", "1", "rank", "rank"]


def test_a_node_of_a_gang_that_fails_ends_the_others_and_its_code_is_the_gangs(two_nodes, tmp_path):
    bench = Bench(two_nodes, tmp_path)
    bench.start("[ $QIPAN_NODE_RANK = 1 ] && exit 7; sleep 60", devices=8)
    exited = bench.until(TaskExited)
    assert (exited.outcome, exited.exit_code) == ("failed", 7)


def test_a_gang_that_is_stopped_parks_on_every_node(two_nodes, tmp_path):
    bench = Bench(two_nodes, tmp_path)
    mark = tmp_path / "parked"
    bench.start(
        f'trap "echo $QIPAN_NODE_RANK >> {mark}; exit 0" TERM; for i in $(seq 600); do sleep 0.1; done',
        devices=8,
    )
    bench.until(TaskStarted)
    bench.stop()
    assert bench.until(TaskExited).outcome == "parked"
    assert sorted(mark.read_text().split()) == ["0", "1"]


def test_a_cordoned_node_gives_its_tasks_back_and_gets_no_others(two_nodes, tmp_path):
    bench = Bench(two_nodes, tmp_path)
    bench.start(WAIT, devices=3, task="there")
    bench.until(TaskStarted)
    bench.start(WAIT, devices=4, task="elsewhere")
    bench.until(TaskStarted, task_id="elsewhere")
    two_nodes.cordon("node-0")
    exited = bench.until(TaskExited)
    assert (exited.task_id, exited.outcome) == ("there", "parked")
    assert "cordoned node-0" in exited.why
    bench.reserve("true", devices=1, task="next")
    assert "cordoned node-0" in bench.until(LeaseRefused, task_id="next").why
    offered = [fact for _, fact in bench.engine.observe(0) if isinstance(fact, EngineOffered)][-1]
    assert (offered.offers[0].devices, offered.out[0].devices) == (4, 4)
    bench.stop(task="elsewhere")
