"""A chip that no catalogue knows: ten lines of YAML, then detected, leased on request, and chosen once it was measured."""

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from qipan.catalogue import load_catalogue, site_catalogue
from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.local import LocalEngine
from qipan.events import LeaseGranted, Reserve
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.measure import Measurement, write_record
from qipan.planning import plan_on
from qipan.probe import probe
from qipan.workload import Launch, Task
from qipan.workload.files import read_file
from qipan.workload.site import load_site

UNSEEN = """\
accelerators:
  - vendor: newco
    model: X1
    device_names: ["NewCo X1"]
    peak_tflops: {bf16: 400}
    memory_gib: 96
    memory_bandwidth_gbs: 3000
    source: "the vendor's sheet"
    confidence: datasheet
    detect: {command: newco-smi, nodes: ["newco[0-9]*"]}
"""
TABLE = """+-------------------------------+----------------------+
| XPU  Name                     | Bus-Id               |
|===============================+======================|
|   0  NewCo X1                 | 0000:33:00.0         |
| N/A   27C   N/A    75W / 600W |   768MiB / 98304MiB  |
+-------------------------------+----------------------+
"""
SITE = """\
site:
  board:
    name: dc
    region: cn
    pools:
      - {chip: nvidia/a100-sxm4-80gb, devices: 8, per_node: 8, tariff: 20 CNY}
      - {chip: newco/x1, devices: 8, per_node: 8, tariff: 5 CNY}
"""
TASK = """\
kind: train
name: t
model: {layers: 16, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 32000}
data: file:corpus.txt
work: {tokens: 10B, global_batch: 256K, seq: 2048}
objective: cost
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    (tmp_path / "x1.yaml").write_text(UNSEEN)
    (tmp_path / "site.yaml").write_text(SITE)
    monkeypatch.setenv("QIPAN_CHIPS", str(tmp_path / "x1.yaml"))
    monkeypatch.setenv("QIPAN_MEASURED", str(tmp_path / "measured"))
    return tmp_path


def planned(folder: Path, more: str = ""):
    (folder / "task.yaml").write_text(TASK + more)
    (folder / "corpus.txt").write_text("words " * 100)
    task, _ = read_file(folder / "task.yaml")
    return plan_on(load_site(folder / "site.yaml"), task)


def test_ten_lines_are_ten_lines():
    assert len(UNSEEN.splitlines()) == 10


def test_it_is_detected(world, monkeypatch):
    (world / "newco-smi").write_text(f"#!/bin/sh\ncat <<'X'\n{TABLE}X\n")
    (world / "newco-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{world}:/usr/bin:/bin")
    catalogue = site_catalogue()
    answer = next(a for a in probe(world, catalogue, catalogue.detect) if a.vendor == "newco")
    assert answer.state == "usable"
    assert [device.chip_class for device in answer.devices] == ["newco/x1"]


def test_its_node_without_the_tool_is_broken(world, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (world / "dev").mkdir()
    (world / "dev/newco0").touch()
    catalogue = site_catalogue()
    answer = next(a for a in probe(world, catalogue, catalogue.detect) if a.vendor == "newco")
    assert answer.state == "broken"
    assert "newco-smi" in answer.next_step


def test_it_is_placed_on_request_and_chosen_once_measured(world):
    before = planned(world)
    assert {option.chip_class for option in before.options} == {"nvidia/a100-sxm4-80gb"}
    assert any("never measured" in refused.why for refused in before.refused)
    asked = planned(world, "limits: {chips: [newco/x1]}\n")
    assert {option.chip_class for option in asked.options} == {"newco/x1"}
    now_s = time.time()
    made = Measurement(
        "newco/x1", "npu", 8, "node1", now_s, now_s + 86400, {"bf16": {4096: 320e12}}, 2.6e12, 2**30
    )
    write_record(made, world / "measured")
    chosen = planned(world).options[0]
    assert chosen.chip_class == "newco/x1"  # as fast as the other, and cheaper
    write_record(replace(made, gemm_flops_per_s={"bf16": {4096: 1e12}}), world / "measured")
    assert (
        planned(world).options[0].chip_class == "nvidia/a100-sxm4-80gb"
    )  # what it does counts, not its sheet


def test_a_site_overrides_its_vendors_names(world):
    (world / "names.yaml").write_text("stacks: {huawei: {slurm_gres: npu910b, image: 'registry/ascend:8'}}\n")
    stack = load_catalogue(world / "names.yaml").stacks["huawei"]
    assert (stack.slurm_gres, stack.image, stack.torch_device) == ("npu910b", "registry/ascend:8", "npu")
    assert stack.environment([0, 2]) == {"ASCEND_RT_VISIBLE_DEVICES": "0,2"}


def test_it_is_leased_where_it_is_asked_for(world):
    chip = ChipClassId("newco/x1")
    point = Point(f"{chip}:2", (Need(chip, 2),), 1.0, 1.0, 1.0)
    pool = Pool(PoolId("dc/x"), BoardId("dc"), chip, 2, 2, 1)
    engine = LocalEngine(
        EngineId("dc-local"), BoardSpec(BoardId("dc"), pools=(pool,)), world / "engine", SystemClock(), world / "ckpt", sick=dict
    )  # fmt: skip
    launch = msgspec.json.encode(Launch(Task("train", "t", run="true", workdir=str(world))))
    order = Order(TaskId("t"), "me", "t", Curve((point,), 10.0), 1, 0.0, launch=launch)
    engine.reserve(Reserve(TaskId("t"), LeaseId("l"), 1, 1, order, point.needs, 60.0))
    assert any(isinstance(fact, LeaseGranted) for _, fact in engine.observe(0))
