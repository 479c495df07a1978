"""Vendor tools' text into devices.  Pure; a row that is not understood gives no device."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

BUS = re.compile(r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9a-fA-F](?!\w)")
USED_OF_TOTAL = re.compile(r"(\d+)\s*(?:Mi?B)?\s*[/(]\s*(\d+)\s*Mi?B")
ASCEND_NAME = re.compile(r"^(\d+)\s+(310|\S*[A-Za-z]\S*)$")


@dataclass(frozen=True, slots=True)
class Device:
    """One schedulable device as its vendor's tool names it; `memory_bytes` is 0 where the tool gave none."""

    index: int
    name: str
    bus: str
    memory_bytes: int
    healthy: bool = True


def parse(form: str, text: str) -> tuple[Device, ...]:
    """Devices in `text`, which is of one of FORMS, once per bus address, in the tool's order."""
    found: dict[str, Device] = {}
    for device in FORMS[form](text):
        found.setdefault(device.bus.lower(), device)
    return tuple(found.values())


def _table(text: str) -> Iterable[Device]:
    """Boxed tables: a row with index, name and bus address; memory in that row or the next."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        bus = BUS.search(line)
        start = re.match(r"^\|?\s*(\d{1,4})\s+(?:/\s+)?([A-Za-z][^|]*?)(?:\s{2,}|\s*\|)", line)
        if bus and start and start.end() <= bus.start() + 1:
            memory = USED_OF_TOTAL.search(" ".join(lines[number : number + 2]))
            memory = memory or re.search(r"()\b(\d+)MiB", " ".join(lines[number : number + 2]))
            total_bytes = int(memory[2]) * 2**20 if memory else 0
            yield Device(int(start[1]), start[2].strip(), bus[0], total_bytes)


def _ascend(text: str) -> Iterable[Device]:
    """Two rows a chip: (NPU, name, health), then (chip, bus address, memory)."""
    head: tuple[int, str, bool] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4:  # 950PR: id and name in cells of their own
            cells = [f"{cells[0]} {cells[1]}".strip() or "0", *cells[2:]]
        name = ASCEND_NAME.match(cells[0])
        if name and len(cells) > 1:
            head = (int(name[1]), name[2], cells[1] == "OK")
        elif head and len(cells) > 2 and re.fullmatch(r"[\d\s]+", cells[0]) and BUS.fullmatch(cells[1]):
            memory = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            yield Device(head[0], head[1], cells[1], int(memory[-1][1]) * 2**20 if memory else 0, head[2])


def _amd(text: str) -> Iterable[Device]:
    """`amd-smi static --json`: an array, since ROCm 7 inside `gpu_data`."""
    value = _json(text)
    for entry in _entries(value.get("gpu_data") if isinstance(value, dict) else value):
        try:
            size = int(entry["vram"]["size"]["value"]) * 2**20  # its "MB" is MiB: 196592 on 192 GiB
            yield Device(int(entry["gpu"]), str(entry["asic"]["market_name"]), str(entry["bus"]["bdf"]), size)
        except (KeyError, TypeError, ValueError):
            continue  # an entry without these is no device we could name


def _neuron(text: str) -> Iterable[Device]:
    """`neuron-ls --json-output`: one entry a device; the tool names no model."""
    for entry in _entries(_json(text)):
        try:
            yield Device(
                int(entry["neuron_device"]), "Neuron device", str(entry["bdf"]), int(entry["memory_size"])
            )
        except (KeyError, TypeError, ValueError):
            continue  # an entry without these is no device we could name


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _entries(value: object) -> list[dict]:  # type: ignore[type-arg]
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


FORMS: dict[str, Callable[[str], Iterable[Device]]] = {
    "table": _table, "ascend": _ascend, "amd": _amd, "neuron": _neuron,
}  # fmt: skip
