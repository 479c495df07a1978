"""One training under `qipan up` on a Slurm and a Ray cluster: the Slurm site's own job takes its devices back, and the
task goes on at the Ray site from its checkpoint, on another number of workers."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
QIPAN = str(Path(sys.executable).with_name("qipan"))
SITE = Path("examples/slurm-and-ray-site.yaml").read_text()
TASK = Path("examples/train-poems.yaml").read_text()


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"), "c3", nodes=1, devices=2, port=17100)
    ray = RayCluster(tmp_path_factory.mktemp("ray"), nodes=1, devices=1, net=43)
    try:
        yield slurm.up(), ray.up()
    finally:
        slurm.down()
        ray.down()


class Up:
    """`qipan up` and its command line."""

    def __init__(self, folder: Path, slurm: SlurmCluster, ray: RayCluster) -> None:
        site = folder / "site.yaml"
        nodes = folder / "nodes"
        site.write_text(
            SITE.replace("http://10.213.41.2:8265", ray.address).replace("/tmp/qipan-nodes", str(nodes))
        )
        self.store = folder / "store"
        self.environment = {**slurm.environment(), "XDG_CACHE_HOME": str(folder / "cache")}
        self.log = folder / "up.log"
        self.process = subprocess.Popen(
            [QIPAN, "up", "--site", str(site), "--store", str(self.store), "--no-console"], env=self.environment,
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.until(lambda: "is up" in self.log.read_text(), 200)

    def run(self, *words: str):
        done = subprocess.run(
            [QIPAN, *words, "--store", str(self.store), "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)

    def events(self, task_id: str):
        words = [QIPAN, "events", task_id, "--store", str(self.store), "--json"]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def task(self):
        return self.run("ps")["tasks"][0]

    def until(self, done, limit_s: float):
        end_s = time.monotonic() + limit_s
        while not done():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end_s, f"not in {limit_s} s: {self.log.read_text()[-500:]}"
            time.sleep(0.5)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def losses(events) -> list[tuple[int, float]]:
    found = []
    for event in events:
        detail = event["fact"].get("detail")
        said = json.loads(detail) if detail else {}
        if said.get("event") == "progress":
            found.append((said["step"], said["loss"]))
    return found


def test_a_training_moves_from_slurm_to_ray(clusters, tmp_path):
    slurm, ray = clusters
    up = Up(tmp_path, slurm, ray)
    try:
        task = tmp_path / "poems.yaml"
        task.write_text(
            TASK.replace("500k", "300k")
            .replace("every: 12s", "every: 3s")
            .replace("deadline: 30m", "deadline: 2h")
            .replace("0.25 CNY", "9 CNY")
        )
        up.run("submit", str(task))
        up.until(lambda: up.task()["place"].endswith("dc-slurm-slurm") and up.task()["saved"] > 0.1, 240)
        own = slurm.run("sbatch", "--parsable", "--gres=gpu:sim:2", "--wrap=sleep 500", "-o/dev/null").strip()
        up.until(lambda: up.task()["state"] == "running" and up.task()["place"].endswith("dc-ray-ray"), 180)
        assert slurm.run("squeue", "-h", "-j", own, "-o", "%T").strip() == "RUNNING"
        up.until(lambda: up.task()["state"] == "done", 300)
        bill = up.run("bill", "poems-1")
        chips = [line["usage"]["chip_class"] for line in bill["receipt"]["lines"]]
        assert chips[0] == "sim/slurm"
        assert chips[-1] == "sim/ray"
        assert bill["receipt"]["cost_micro_cny"] == bill["charged_micro_cny"]
        curve = losses(up.events("poems-1"))
        assert curve[-1][1] < curve[0][1]
        ray_first = next(loss for step, loss in curve if step > max(s for s, _ in curve) // 2)
        assert ray_first < curve[0][1], "it went on from its checkpoint"
        metered_s = sum(
            line["usage"]["until_s"] - line["usage"]["started_s"]
            for line in bill["receipt"]["lines"]
            if line["usage"]["chip_class"] == "sim/slurm"
        )
        told_s = job_seconds((slurm.folder / "jobcomp.txt").read_text())
        assert abs(metered_s - told_s) <= max(0.02 * told_s, 2.0), (metered_s, told_s)
    finally:
        up.end()


def job_seconds(accounts: str) -> float:
    """Seconds that our jobs ran by Slurm's own record of completed jobs (a line each, whole seconds)."""
    total = 0.0
    for line in accounts.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        if fields.get("Name", "").startswith("qipan-") and "probe" not in fields["Name"]:
            ended, began = (
                time.mktime(time.strptime(fields[key], "%Y-%m-%dT%H:%M:%S"))
                for key in ("EndTime", "StartTime")
            )
            total += ended - began
    return total
