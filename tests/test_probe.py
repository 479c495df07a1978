"""Detection: fake tools, broken drivers, mutated outputs."""

import random
import time
from pathlib import Path

import pytest

from qipan.probe import probe
from qipan.probe.parsers import parse

SAMPLES = Path(__file__).parents[2] / "shared/reference/discovery_samples"
#: npu-smi's table as its manual describes it, with values made up here
NPU = """| NPU     Name      | Health | Power |
| 4       910Z      | OK     | 71.5 38   0 / 15 |
| 0       0         | 0000:0A:00.0 | 3    1024 / 32000 |
| 5       910Z      | OK     | 70.2 37   0 / 15 |
| 0       1         | 0000:0B:00.0 | 0    1024 / 32000 |
"""
COUNTS = {
    "nvidia-nvidia-smi-excerpt.txt": ("table", 1), "cambricon-cnmon.txt": ("table", 2), "metax-mx-smi.txt": ("table", 4),
    "enflame-efsmi.txt": ("table", 2), "ascend-npu-smi-info-910A.txt": ("ascend", 1),
    "ascend-npu-smi-info-310.txt": ("ascend", 4), "ascend-npu-smi-info-6.0.RC1.txt": ("ascend", 8),
    "ascend-npu-smi-info-910C-excerpt.txt": ("ascend", 2), "ascend-npu-smi-info-950PR-excerpt.txt": ("ascend", 1),
    "ascend-npu-smi-info-24.1.RC2.txt": ("ascend", 8), "ascend-npu-smi-info.txt": ("ascend", 2), "iluvatar-ixsmi-excerpt.txt": ("table", 3),
    "intel-hl-smi-gaudi2-excerpt.txt": ("table", 3), "mthreads-mthreads-gmi.txt": ("table", 8),
    "amd-amd-smi-static-rocm6.txt": ("amd", 1), "amd-amd-smi-static-rocm7.txt": ("amd", 1), "aws-neuron-ls-json.txt": ("neuron", 1),
}  # fmt: skip


def tool(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def of(vendor: str, root: Path):
    return next(answer for answer in probe(root) if answer.vendor == vendor)


def test_a_bare_machine_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert {answer.state for answer in probe(tmp_path)} == {"absent"}


def test_a_device_node_without_tool_is_broken_with_a_next_step(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").touch()
    answer = of("huawei", tmp_path)
    assert (answer.state, answer.evidence) == ("broken", ("/dev/davinci0",))
    assert "npu-smi" in answer.next_step


def test_a_fake_tool_shows_its_devices(tmp_path, monkeypatch):
    tool(tmp_path, "npu-smi", f"cat <<'X'\n{NPU}X", monkeypatch)
    answer = of("huawei", tmp_path)
    assert answer.state == "usable"
    assert [(d.index, d.memory_bytes) for d in answer.devices] == [(4, 32000 * 2**20), (5, 32000 * 2**20)]


def test_an_unhealthy_device_is_present_but_broken(tmp_path, monkeypatch):
    sick = NPU.replace("910Z      | OK ", "910Z      | Alarm ", 1)
    tool(tmp_path, "npu-smi", f"cat <<'X'\n{sick}X", monkeypatch)
    answer = of("huawei", tmp_path)
    assert (answer.state, answer.reason) == ("broken", "not healthy: device 4")


@pytest.mark.parametrize("body", ["sleep 30", "exit 9", "yes", "echo hello"])
def test_a_tool_that_misbehaves_is_broken_within_two_seconds(body, tmp_path, monkeypatch):
    tool(tmp_path, "npu-smi", body, monkeypatch)
    start_s = time.monotonic()
    assert of("huawei", tmp_path).state == "broken"
    assert time.monotonic() - start_s < 2


def test_mutated_output_never_invents_a_device():
    known, chance = parse("ascend", NPU), random.Random(7)
    for _ in range(300):
        lines = NPU.splitlines()
        chance.shuffle(lines) if chance.random() < 0.3 else lines.extend(chance.choices(lines, k=2))
        text = "\n".join(lines)[: chance.randrange(400)] + chance.choice(["", "\x00\ufffd|||", "{["])
        assert {device.bus for device in parse("ascend", text)} <= {device.bus for device in known}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="recorded samples are not beside this checkout")
@pytest.mark.parametrize("name", COUNTS)
def test_recorded_outputs_parse_to_the_devices_they_show(name):
    form, count = COUNTS[name]
    assert len(parse(form, (SAMPLES / name).read_text())) == count
