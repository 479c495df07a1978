"""One task file, unchanged, on a Slurm cluster, on a Ray cluster and on an agent, by the site files that ship."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from slurm_cluster import SlurmCluster
from up import Up

from qipan.client import Client, Task
from test_grid import free_port, until

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(1800)]
TASK = "examples/train-poems.yaml"
BELOW = """\
site:
  tariff_version: "2026-11"
  board: {name: agent-1, region: cn-east, pools: [{chip: sim/a, devices: 2, tariff: 0.40 CNY}]}
"""
ABOVE = """\
site:
  tariff_version: "2026-11"
  board: {name: cn}
  tenants: [{name: poets, balance: 1000 CNY}]
"""


def trains(up: Up, engine: str) -> None:
    up.run("submit", TASK)
    up.until(lambda: up.task()["state"] == "done", 1200)
    bill = up.run("bill", "poems-1")
    assert {line["usage"]["engine"] for line in bill["receipt"]["lines"]} == {engine}
    assert 0 < bill["charged_micro_cny"] == bill["receipt"]["cost_micro_cny"] <= 250_000
    losses = up.losses("poems-1")
    assert losses[max(losses)] < losses[min(losses)]


def test_on_slurm(tmp_path):
    cluster = SlurmCluster(tmp_path / "slurm", "c9", nodes=1, port=17200)
    cluster.folder.mkdir()
    try:
        cluster.up()
        site = (
            Path("examples/slurm-site.yaml").read_text().replace("/tmp/qipan-slurm", str(tmp_path / "nodes"))
        )
        up = Up(tmp_path, site, cluster.environment())
        try:
            trains(up, "dc-slurm-slurm")
        finally:
            up.end()
    finally:
        cluster.down()


def test_on_ray(tmp_path):
    cluster = RayCluster(tmp_path / "ray", nodes=1, net=49)
    cluster.folder.mkdir()
    try:
        cluster.up()
        site = Path("examples/ray-site.yaml").read_text().replace("http://10.213.41.2:8265", cluster.address)
        up = Up(tmp_path, site.replace("/tmp/qipan-ray-folder", str(tmp_path / "nodes")), os.environ)
        try:
            trains(up, "dc-ray-ray")
        finally:
            up.end()
    finally:
        cluster.down()


def test_on_an_agent(tmp_path):
    """Two hosts' boards in processes of their own: people at the one, the chips at the other."""
    served: list[subprocess.Popen[bytes]] = []

    def qipan(*words: str) -> list[str]:
        return [sys.executable, "-m", "qipan.cli", *words]

    def serve(name: str, site: str) -> None:
        (tmp_path / f"{name}.yaml").write_text(site)
        log = (tmp_path / f"{name}.log").open("w")
        command = qipan("board", "serve", "--store", name, "--site", f"{name}.yaml")
        served.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))
        until(lambda: "served" in Path(log.name).read_text(), 300, f"{name} is not served")

    def run(*words: str) -> str:
        return subprocess.run(qipan(*words), cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run("grid", "init", "--name", "cn", "--url", f"grid://127.0.0.1:{free_port()}", "--store", "cn")
    try:
        serve("cn", ABOVE)
        run("grid", "join", run("grid", "invite", "agent-1", "--store", "cn").strip(), "--store", "agent-1")
        serve("agent-1", BELOW)
        cn = Client(tmp_path / "cn")
        until(lambda: "sim/a" in json.dumps(cn.call("GET", "/boards")), 120, "the agent did not join")
        job = cn.submit(Task.from_yaml(TASK))
        until(lambda: cn.task(job.task_id)["state"] == "done", 1200, "it is not done")
        bill = job.bill()
        assert 0 < bill["charged_micro_cny"] == bill["receipt"]["cost_micro_cny"] <= 250_000
    finally:
        for process in served:
            process.terminate()
        for process in served:
            process.wait(30)
