"""What chips this machine has: PCI ids and device nodes, then each vendor's tools, then a library where one is installed;
every answer with its evidence.  Nothing here falls back to the CPU: it is one answer of its own."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources, util
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from qipan.probe.device import Device
from qipan.probe.documents import of_manufacturer
from qipan.probe.parsers import joined, recognise
from qipan.probe.tools import TOOL_S, Command, Ran, run_tools
from qipan.quantities import format_devices

CLASSES = ("0x03", "0x0b", "0x12")  # PCI base classes: display, processor, accelerator
LIBRARIES = ("pynvml", "gpustack_runtime")


class Names(Protocol):
    """The catalogue: which chip class a tool's name means, "" when none."""

    def match(self, vendor: str, name: str, memory_bytes: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """`what`: a path, a PCI device, or a command with what came of it."""

    layer: Literal["node", "pci", "tool", "library"]
    what: str
    at_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One vendor on this machine.  `reason` says why it is broken, or which of its devices are not healthy."""

    vendor: str
    state: Literal["usable", "broken", "absent"]
    devices: tuple[Device, ...]
    evidence: tuple[Evidence, ...]
    reason: str = ""
    next_step: str = ""


def shipped_vendors() -> dict[str, Any]:
    """vendor -> how it shows, of vendors.yaml."""
    text = resources.files("qipan.probe").joinpath("vendors.yaml").read_text(encoding="utf-8")
    vendors: dict[str, Any] = yaml.safe_load(text)["vendors"]
    return vendors


def probe(
    root: Path = Path("/"), names: Names | None = None, more: Mapping[str, Any] | None = None, limit_s: float = TOOL_S
) -> tuple[Answer, ...]:  # fmt: skip
    """One answer per vendor of vendors.yaml and of `more` (a site's own, of the same form), and one for the CPU; `root` stands
    for / when looking for PCI ids and device nodes; `names` gives devices their chip class."""
    vendors = {**shipped_vendors(), **(more or {})}
    libraries = [name for name in LIBRARIES if util.find_spec(name)]
    commands = {tuple(map(str, tool)) for facts in vendors.values() for tool in facts["tools"]}
    commands |= {_library(name) for name in libraries}
    ran = run_tools(commands, limit_s)
    seen = {vendor: _hardware(facts, root) for vendor, facts in vendors.items()}
    answers = [_vendor(vendor, vendors, seen, ran) for vendor in sorted(vendors)]
    answers.append(_cpu(root))
    return tuple(_named(answer, names) if names else answer for answer in answers)


def _vendor(
    vendor: str, vendors: Mapping[str, Any], seen: Mapping[str, tuple[Evidence, ...]], ran: Mapping[Command, Ran]
) -> Answer:  # fmt: skip
    facts, hardware = vendors[vendor], seen[vendor]
    mine = [tuple(map(str, tool)) for tool in facts["tools"] if tuple(map(str, tool)) in ran]
    found = [recognise(facts["forms"], ran[command].text) for command in mine]
    evidence = (*hardware, *(_told(command, ran[command], len(found[i])) for i, command in enumerate(mine)))
    if facts.get("library") in LIBRARIES and (command := _library(facts["library"])) in ran:
        whose = facts.get("manufacturer", "")
        told = recognise(["own"], of_manufacturer(ran[command].text, whose))
        if not whose or not any(found):  # it numbers devices its own way
            found.append(told)
        evidence = (*evidence, replace(_told(command, ran[command], len(told)), layer="library"))
    devices = joined(devices for devices in found if devices)
    if devices:
        return _present(vendor, devices, evidence, hardware)
    if not hardware and not mine:
        return Answer(vendor, "absent", (), ())
    if not hardware and all(_is_anothers(command, vendor, vendors, seen, ran) for command in mine):
        return Answer(vendor, "absent", (), evidence)
    tool = mine[0][0] if mine else facts["tools"][0][0]
    if not mine:
        step = f"install the vendor's driver and tools so that `{tool}` runs, then `qipan chips probe`"
        return Answer(vendor, "broken", (), evidence, f"{tool} is not on PATH", step)
    failure = next(
        (f"{c[0]} {ran[c].failure}" for c in mine if ran[c].failure), f"no device in the output of {tool}"
    )
    step = f"run `{' '.join(mine[0])}` by hand, mend the driver, then `qipan chips probe`"
    return Answer(vendor, "broken", (), evidence, failure, step)


def _present(
    vendor: str, devices: tuple[Device, ...], evidence: tuple[Evidence, ...], hardware: tuple[Evidence, ...]
) -> Answer:
    """Usable while one device is healthy.  A card on the bus that the tool does not show is said too."""
    sick = [
        f"device {device.index}: {', '.join(device.complaints)}" for device in devices if not device.healthy
    ]
    shown = {device.bus.lower()[-7:] for device in devices if device.bus}
    lost = [
        e.what for e in hardware if e.layer == "pci" and shown and e.what.split()[1][-7:].lower() not in shown
    ]
    reason = "; ".join([*sick, *(f"{what} is not shown by the tool" for what in lost)])
    state: Literal["usable", "broken"] = "broken" if len(sick) == len(devices) else "usable"
    step = "keep new tasks off what is named, and look at the vendor's log" if reason else ""
    return Answer(vendor, state, devices, evidence, reason, step)


def _is_anothers(
    command: Command, vendor: str, vendors: Mapping[str, Any], seen: Mapping[str, tuple[Evidence, ...]], ran: Mapping[Command, Ran]
) -> bool:  # fmt: skip
    """Of a tool that several vendors ship: whether it speaks for another one here."""
    sharing = [
        other for other, facts in vendors.items() if any(tool[0] == command[0] for tool in facts["tools"])
    ]
    speaks = [
        other for other in sharing if seen[other] or recognise(vendors[other]["forms"], ran[command].text)
    ]
    return (speaks or sharing)[0] != vendor


def _told(command: Command, ran: Ran, devices: int) -> Evidence:
    came = ran.failure or f"{len(ran.text)} characters, {format_devices(devices)}"
    return Evidence("tool", f"`{' '.join(command)}`: {came}", ran.at_s, round(ran.took_s, 3))


def _library(name: str) -> Command:
    return (sys.executable, "-m", "qipan.probe.libraries", name)


def _hardware(facts: Mapping[str, Any], root: Path) -> tuple[Evidence, ...]:
    dev = root / "dev"
    nodes = [node for glob in facts["nodes"] for node in sorted(dev.glob(glob))]
    if "not_with" in facts and (dev / facts["not_with"]).exists():
        nodes = []
    found = [Evidence("node", f"/dev/{node.relative_to(dev)}") for node in nodes]
    classes = tuple(facts.get("classes", CLASSES))
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if (
            facts.get("pci")
            and _word(device / "vendor") == facts["pci"]
            and _word(device / "class").startswith(classes)
        ):
            number = _word(device / "device")
            name = facts.get("pci_names", {}).get(number, "")
            text = f"PCI {device.name} vendor {facts['pci']}" + (f" device {number}" if number else "")
            found.append(Evidence("pci", text + (f" ({name})" if name else "")))
    return tuple(found)


def _cpu(root: Path) -> Answer:
    """One device per socket."""
    path = root / "proc/cpuinfo"
    if not path.is_file():
        return Answer("cpu", "absent", (), ())
    text = path.read_text(encoding="utf-8", errors="replace")
    cores = max(1, len(re.findall(r"^processor\s*:", text, re.M)))
    name = re.search(r"^(?:model name|Hardware|Processor)\s*:\s*(.+)$", text, re.M)
    sockets = max(1, len(set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.M))))
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.M)
    size = int(memory[1]) * 1024 // sockets if memory else 0
    devices = tuple(
        Device(i, name[1].strip() if name else "CPU", memory_bytes=size, cores=cores // sockets)
        for i in range(sockets)
    )
    return Answer("cpu", "usable", devices, (Evidence("node", "/proc/cpuinfo"),))


def _named(answer: Answer, names: Names) -> Answer:
    devices = tuple(
        replace(
            device,
            chip_class=names.match(
                answer.vendor, device.name, 0 if answer.vendor == "cpu" else device.memory_bytes
            ),
        )
        for device in answer.devices
    )
    return replace(answer, devices=devices)


def _word(path: Path) -> str:
    return _text(path).strip().lower()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


__all__ = ["Answer", "Device", "Evidence", "probe", "shipped_vendors"]
