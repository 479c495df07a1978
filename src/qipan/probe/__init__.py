"""What chips this machine has: PCI ids and device nodes, then each vendor's tool; every answer with its evidence."""

import os
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from qipan.probe.parsers import Device, parse

CLASSES = ("0x03", "0x0b", "0x12")  # PCI base classes: display, processor, accelerator
TOOL_S = 1.2
TOOL_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """One vendor on this machine.  `reason` and `next_step` are empty when usable or absent."""

    vendor: str
    state: Literal["usable", "broken", "absent"]
    devices: tuple[Device, ...]
    evidence: tuple[str, ...]
    reason: str = ""
    next_step: str = ""


def probe(root: Path = Path("/")) -> tuple[Answer, ...]:
    """One answer per vendor in vendors.yaml; `root` stands for / when looking for PCI ids and device nodes."""
    text = resources.files("qipan.probe").joinpath("vendors.yaml").read_text(encoding="utf-8")
    vendors: dict[str, Any] = yaml.safe_load(text)["vendors"]
    with ThreadPoolExecutor(len(vendors)) as pool:
        return tuple(pool.map(lambda item: _vendor(item[0], item[1], root), sorted(vendors.items())))


def _vendor(vendor: str, facts: dict[str, Any], root: Path) -> Answer:
    seen = _hardware(facts, root)
    tool = facts["command"][0]
    if shutil.which(tool) is None:
        if not seen:
            return Answer(vendor, "absent", (), ())
        step = f"install the vendor's driver and tools so that `{tool}` runs, then `qipan chips probe`"
        return Answer(vendor, "broken", (), seen, f"{tool} is not on PATH", step)
    command = " ".join(facts["command"])
    step = f"run `{command}` by hand, mend the driver, then `qipan chips probe`"
    text, failure = _run(facts["command"])
    evidence = (*seen, f"`{command}`: {failure or f'{len(text)} characters'}")
    if failure:
        return Answer(vendor, "broken", (), evidence, f"{tool} {failure}", step)
    devices = parse(facts["form"], text)
    if not devices:
        return Answer(vendor, "broken", (), evidence, f"no device in the output of {tool}", step)
    sick = [str(device.index) for device in devices if not device.healthy]
    if sick:
        return Answer(vendor, "broken", devices, evidence, f"not healthy: device {', '.join(sick)}", step)
    return Answer(vendor, "usable", devices, evidence)


def _hardware(facts: dict[str, Any], root: Path) -> tuple[str, ...]:
    found = [f"/dev/{node.name}" for glob in facts["nodes"] for node in sorted((root / "dev").glob(glob))]
    found += [
        f"PCI {device.name} vendor {facts['pci']}"
        for device in sorted((root / "sys/bus/pci/devices").glob("*"))
        if _word(device / "vendor") == facts["pci"] and _word(device / "class")[:4] in CLASSES
    ]
    return tuple(found)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip().lower()
    except OSError:
        return ""


def _run(command: list[str]) -> tuple[str, str]:
    """(text, why it failed or ""): within TOOL_S seconds, at most TOOL_BYTES (its file may not grow further)."""
    limited = ["sh", "-c", f'ulimit -f {TOOL_BYTES // 512}; exec "$@"', "sh", *command]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            limited, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"}, start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(TOOL_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return "", f"gave no answer in {TOOL_S} s"
        output.seek(0)
        text = output.read(TOOL_BYTES).decode("utf-8", errors="replace")
    return (text, "") if status == 0 else ("", f"ended with status {status}")


__all__ = ["Answer", "Device", "probe"]
