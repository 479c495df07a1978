"""One training under `qipan up` on a Slurm and a Ray cluster: the Slurm site's own job takes its devices back, and the
task goes on at the Ray site, on another number of workers, from its checkpoint, which is copied: the sites share no folder."""

import json
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from slurm_cluster import SlurmCluster
from up import Up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SITE = Path("examples/slurm-and-ray-site.yaml").read_text()
TASK = Path("examples/train-poems.yaml").read_text()
#: it holds the Ray site until the training runs at Slurm, whichever of the two was measured to be the faster
BEFORE = """kind: train
name: before
tenant: poets
run: exec sleep 900
devices: 1
elastic: false
limits: {time: 900s, max_cost: 9 CNY, regions: [cn-west]}
"""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    slurm = SlurmCluster(
        tmp_path_factory.mktemp("slurm"), "c3", nodes=1, devices=2, port=17100, accounting=True
    )
    ray = RayCluster(tmp_path_factory.mktemp("ray"), nodes=1, devices=1, net=43)
    try:
        yield slurm.up(), ray.up()
    finally:
        slurm.down()
        ray.down()


def started(folder: Path, slurm: SlurmCluster, ray: RayCluster) -> Up:
    site = SITE.replace("http://10.213.41.2:8265", ray.address)
    return Up(folder, site.replace("/tmp/qipan-nodes", str(folder / "nodes")), slurm.environment())


def submit(up: Up, folder: Path, name: str, tokens: str, **limits: str) -> None:
    task = folder / f"{name}.yaml"
    text = (
        TASK.replace("500k", tokens)
        .replace("every: 12s", "every: 3s")
        .replace("deadline: 30m", "deadline: 4h")
    )
    text = text.replace("name: poems", f"name: {name}").replace("0.25 CNY", "9 CNY")
    for old, new in limits.items():
        text = text.replace(f"{old}: [cn-*]", f"{old}: [{new}]")
    task.write_text(text)
    up.run("submit", str(task))


def moved(up: Up, slurm: SlurmCluster, folder: Path, tokens: str) -> dict:
    """Runs `poems-1` until it is done at the Ray site; returns its bill."""
    (folder / "before.yaml").write_text(BEFORE)
    up.run("submit", str(folder / "before.yaml"))
    up.until(lambda: up.task("before-1")["state"] == "running", 120)
    submit(up, folder, "poems", tokens)
    up.until(lambda: up.task()["place"].endswith("dc-slurm-slurm") and up.task()["saved"] > 0.1, 400)
    own = slurm.run("sbatch", "--parsable", "--gres=gpu:sim:2", "--wrap=sleep 2000", "-o/dev/null").strip()
    up.run("cancel", "before-1")
    up.until(lambda: up.task()["state"] == "running" and up.task()["place"].endswith("dc-ray-ray"), 300)
    assert slurm.run("squeue", "-h", "-j", own, "-o", "%T").strip() == "RUNNING"
    up.until(lambda: up.task()["state"] == "done", 900)
    slurm.run("scancel", own)
    bill = up.run("bill", "poems-1")
    chips = [line["usage"]["chip_class"] for line in bill["receipt"]["lines"]]
    assert chips[0] == "sim/slurm"
    assert chips[-1] == "sim/ray"
    assert bill["receipt"]["cost_micro_cny"] == bill["charged_micro_cny"]
    return bill


def metered_and_told(bill: dict, slurm: SlurmCluster) -> tuple[float, float]:
    """Seconds on Slurm by the receipt, and by sacct (whole seconds)."""
    metered_s = sum(
        line["usage"]["until_s"] - line["usage"]["started_s"]
        for line in bill["receipt"]["lines"]
        if line["usage"]["chip_class"] == "sim/slurm"
    )
    told = slurm.run("sacct", "-n", "-P", "-X", "-S", "now-1day", "--format=JobName,ElapsedRaw").splitlines()
    jobs = [line.split("|") for line in told if line.startswith("qipan-") and "probe" not in line]
    return metered_s, float(sum(int(elapsed) for _, elapsed in jobs))


def test_a_training_moves_from_slurm_to_ray_with_its_checkpoint(clusters, tmp_path):
    slurm, ray = clusters
    up = started(tmp_path, slurm, ray)
    try:
        bill = moved(up, slurm, tmp_path, "200k")
        curve = up.losses("poems-1")
        steps = sorted(curve)
        [parked], [resumed] = up.said("poems-1-1", "parked"), up.said("poems-1-2", "resumed")
        assert resumed["step"] == parked["step"], "it went on where it was"
        assert curve[steps[-1]] < curve[steps[0]]
        kept = tmp_path / "nodes" / "slurm-storage" / "manifests"
        assert len(list(kept.iterdir())) == 1, "the checkpoint came from the other site's storage"
        metered_s, told_s = metered_and_told(bill, slurm)
        assert abs(metered_s - told_s) <= max(0.02 * told_s, 2.0), (metered_s, told_s)
    finally:
        up.end()


@pytest.mark.endurance
@pytest.mark.timeout(2400)
def test_the_moves_loss_is_that_of_a_run_that_stays_and_its_metering_that_of_sacct(clusters, tmp_path):
    """Each loss of the 50 steps after the move within 1e-3 of the uninterrupted run's, as when a checkpoint of 4 workers goes on
    with 2."""
    slurm, ray = clusters
    up = started(tmp_path, slurm, ray)
    try:
        bill = moved(up, slurm, tmp_path, "300k")
        submit(up, tmp_path, "whole", "300k", regions="cn-west")
        up.until(lambda: up.task("whole-1")["state"] == "done", 900)
        curve, whole = up.losses("poems-1"), up.losses("whole-1")
        at_ray = up.store / "engines" / "dc-ray" / "attempts" / "poems-1-2" / "events.jsonl"
        first = next(
            json.loads(line)["step"] for line in at_ray.read_text().splitlines() if '"progress"' in line
        )
        apart = {step: abs(loss - whole[step]) / whole[step] for step, loss in curve.items() if step in whole}
        after = [apart[step] for step in apart if first <= step < first + 50]
        metered_s, told_s = metered_and_told(bill, slurm)
        print(f"moved at step {first} of {max(whole)}: 50 steps after it within {max(after):.1e}, all {max(apart.values()):.1e};"
              f" metered {metered_s:.2f} s, sacct {told_s:.0f} s")  # fmt: skip
        assert len(after) >= 5, "a step's progress is said twice a second"
        assert max(after) <= 1e-3
        assert max(apart.values()) <= 5e-3
        assert abs(metered_s - told_s) <= 0.02 * told_s + 1.0, (
            metered_s,
            told_s,
        )  # sacct counts whole seconds
    finally:
        up.end()
