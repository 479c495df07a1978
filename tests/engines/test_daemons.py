"""slurmctld, slurmd, a raylet and Ray's head killed at seeded moments under 20 tasks on both clusters: nothing lost, nothing run
twice, and work begins again soon after the daemon is back."""

import itertools
import os
import random
import re
import sys
import time
from pathlib import Path

import httpx
import pytest
from ray_cluster import RayCluster
from slurm_cluster import SlurmCluster

from qipan.events import TaskStarted
from qipan.host import Host
from qipan.workload.parse import parse_task
from qipan.workload.site import load_site

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(3600)]
#: as in tests/test_storms.py: QIPAN_SEEDS=FIRST:COUNT tries others
FIRST, _, COUNT = os.environ.get("QIPAN_SEEDS", "11:1").partition(":")
SEEDS = range(int(FIRST), int(FIRST) + int(COUNT or 1))
TASKS, RECOVERY_S = 20, 30.0
SCRIPT = Path("examples/tiny.py").absolute()
TASK = """\
kind: train
name: tiny
tenant: poets
run: exec {python} -S {script}
devices: 1
limits: {{time: 40s, max_cost: 1 CNY}}
env: {{TINY_LOG: "{log}", TINY_STEPS: "80", TINY_STEP_S: "0.5"}}
"""


@pytest.fixture
def clusters(tmp_path):
    slurm = SlurmCluster(tmp_path / "slurm", "c5", nodes=1, devices=3, port=17300)
    ray = RayCluster(tmp_path / "ray", nodes=1, devices=3, net=45)
    for cluster in (slurm, ray):
        cluster.folder.mkdir()
    try:
        yield slurm.up(), ray.up()
    finally:
        slurm.down()
        ray.down()


class World:
    def __init__(self, folder: Path, slurm: SlurmCluster, ray: RayCluster) -> None:
        text = Path("examples/slurm-and-ray-site.yaml").read_text()
        text = text.replace("http://10.213.41.2:8265", ray.address).replace(
            "/tmp/qipan-nodes", str(folder / "nodes")
        )
        text = text.replace("partition: main", f"partition: main, conf: {slurm.conf}")
        text = text.replace("devices: 2, per_node: 2", "devices: 3, per_node: 3").replace("devices: 1, per_node: 1", "devices: 3, per_node: 3")  # fmt: skip
        site = folder / "site.yaml"
        site.write_text(text)
        self.host = Host(load_site(site), folder / "store")
        self.log = folder / "lives"
        self.folder = folder

    def submit(self) -> str:
        text = TASK.format(python=sys.executable, script=SCRIPT, log=self.log)
        return self.host.intake.submit(parse_task(text))[0]

    def spin(self, until, limit_s: float) -> float:
        began_s = time.monotonic()
        while not until():
            assert time.monotonic() < began_s + limit_s, [
                (t.task_id, t.state, t.place, t.waiting) for t in self.host.queries.tasks()
            ]
            self.host.step()
            time.sleep(0.1)
        return time.monotonic() - began_s

    def starts(self, board: str) -> int:
        return sum(isinstance(fact, TaskStarted) for _, fact in self.host.engines[board].observe(0))

    def waiting(self) -> int:
        return sum(task.state not in ("done", "running") for task in self.host.queries.tasks())


@pytest.mark.parametrize("seed", SEEDS)
def test_no_daemons_death_loses_or_doubles_a_task(clusters, tmp_path, seed):
    slurm, ray = clusters
    world, rng = World(tmp_path, slurm, ray), random.Random(seed)
    up = {
        "slurmctld": lambda: slurm.start_controller(),
        "slurmd-0": lambda: slurm.start_node(0),
        "node-0": lambda: ray.start_node(0),
        "head": lambda: _head_again(ray),
    }
    recoveries: dict[str, float] = {}
    try:
        tasks = [world.submit() for _ in range(TASKS)]
        world.spin(lambda: world.starts("dc-slurm") >= 3 and world.starts("dc-ray") >= 3, 180)
        for name in rng.sample(list(up), len(up)):
            ends_s = time.monotonic() + rng.uniform(1, 6)
            world.spin(lambda ends_s=ends_s: time.monotonic() > ends_s, 30)
            cluster, board = (slurm, "dc-slurm") if name.startswith("slurm") else (ray, "dc-ray")
            killed = ray.node_of(0)
            cluster.kill(name)
            ends_s = time.monotonic() + rng.uniform(2, 12)
            world.spin(lambda ends_s=ends_s: time.monotonic() > ends_s, 30)
            up[name]()
            if cluster is slurm:
                slurm._until(lambda: "down" not in slurm.run("sinfo", "-h", "-o", "%T"), 60, "the nodes")
            else:
                # the head takes a killed node for alive for a while
                ray._until(lambda killed=killed: ray.node_of(0) not in ("", killed), 90, "the node")
            recoveries[name] = world.spin(lambda board=board: _works(world, board), 120)
        world.spin(lambda: all(task.state == "done" for task in world.host.queries.tasks()), 900)
        states = {task.task_id: task.state for task in world.host.queries.tasks()}
    finally:
        world.host.close()
    doubled = overlaps(tmp_path / "store", tasks)
    print(
        f"lost {TASKS - sum(s == 'done' for s in states.values())}, twice {doubled}, recovery s {recoveries}"
    )
    assert states == dict.fromkeys(tasks, "done")
    assert doubled == []
    assert max(recoveries.values()) <= RECOVERY_S


def _works(world: World, board: str) -> bool:
    """As many tasks make steps there as it has devices, or all that is left."""
    running = [attempt for _, attempt in world.host.engines[board].running()]
    fresh = [
        one
        for one in running
        if (one / "events.jsonl").exists() and time.time() - (one / "events.jsonl").stat().st_mtime < 2
    ]
    left = sum(task.state != "done" for task in world.host.queries.tasks())
    return len(fresh) >= min(3, left)


def overlaps(store: Path, tasks: list[str]) -> list[str]:
    """Attempts of one task of which two wrote at the same time."""
    twice = []
    for task in tasks:
        lives = []
        for folder in store.glob(f"engines/*/attempts/{task}-*"):
            events = folder / "events.jsonl"
            if re.fullmatch(rf"{re.escape(task)}-[0-9]+", folder.name) and events.exists():
                pid = folder.parent.parent / "control" / folder.name / "pid.json"
                lives.append((pid.stat().st_mtime, events.stat().st_mtime, folder.name))
        lives.sort()
        twice += [later[2] for earlier, later in itertools.pairwise(lives) if later[0] < earlier[1]]
    return twice


def _head_again(ray: RayCluster) -> None:
    """Without a store of its own a head that is started anew knows no node, and nodes end without one: the site starts both.
    The node's end comes first: `ray start --head` refuses while any process of this machine names the address."""
    if ray.processes["node-0"].poll() is None:
        ray.kill("node-0")
    ray.start_head()
    ray._until(lambda: httpx.get(f"{ray.address}/api/version", timeout=5).status_code == 200, 120, "the head")
    ray.start_node(0)
