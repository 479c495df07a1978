"""Vendor tools' JSON, CSV and reports into devices.  Pure; an entry without what a device needs gives none."""

import csv
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from qipan.probe.device import Device
from qipan.probe.tables import BUS

GAUDI_FIELDS = (
    11  # index, uuid, name, driver, memory total, used, free, power, its limit, temperature, utilisation
)
#: what a model's name looks like; garbage does not
NAME = r"(?:[\w().][\w .+()/\[\],-]*[\w.)\]])?"
#: reasons of nvidia-smi for a clock below its best that mean trouble, not a quiet or capped chip
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


def amd_smi(text: str) -> Iterable[Device]:
    """`amd-smi static --json`: an array, since ROCm 7 inside `gpu_data`."""
    value = _json(text)
    return _devices(value.get("gpu_data") if isinstance(value, dict) else value, _amd_smi)


def _amd_smi(entry: Any) -> Device:
    size = int(entry["vram"]["size"]["value"]) * 2**20  # its "MB" is MiB: 196592 on 192 GiB
    return Device(int(entry["gpu"]), str(entry["asic"]["market_name"]), str(entry["bus"]["bdf"]), size)


def neuron(text: str) -> Iterable[Device]:
    """`neuron-ls --json-output`: one entry a device; the tool names no model."""
    value = _json(text)
    return _devices(value.get("neuron_devices") if isinstance(value, dict) else value, _neuron)


def _neuron(entry: Any) -> Device:
    return Device(
        int(entry["neuron_device"]), "", str(entry["bdf"]), int(entry["memory_size"]), cores=int(entry.get("nc_count", 1))
    )  # fmt: skip


def intel(text: str) -> Iterable[Device]:
    """`xpu-smi discovery -j`."""
    value = _json(text)
    return _devices(value.get("device_list") if isinstance(value, dict) else value, _intel)


def _intel(entry: Any) -> Device:
    if "Intel" not in str(entry["vendor_name"]):
        raise ValueError("another vendor's xpu-smi")
    size = int(entry.get("memory_physical_size_byte", 0))
    return Device(int(entry["device_id"]), str(entry["device_name"]), str(entry["pci_bdf_address"]), size)


def rocm_smi(text: str, maker: str) -> Iterable[Device]:
    """`rocm-smi --json`, which AMD and Hygon both ship: {"card0": {...}}; `maker` is a word of the card's vendor."""
    value = _json(text)
    for key, entry in value.items() if isinstance(value, dict) else ():
        number = re.fullmatch(r"card(\d+)", str(key))
        if number is None or not isinstance(entry, dict) or maker not in str(entry.get("Card Vendor", "")):
            continue
        low = {str(name).lower(): str(field) for name, field in entry.items()}
        name = low.get("card series") or low.get("device name") or ""
        if not name or not re.fullmatch(NAME, name):
            continue
        size = 0
        for unit, factor in (("b", 1), ("mib", 2**20)):
            text_size = low.get(f"vram total memory ({unit})", "")
            size = size or (int(text_size) * factor if text_size.isdigit() else 0)
        bus = low.get("pci bus", "")
        yield Device(
            int(number[1]), name, bus if BUS.fullmatch(bus) else "", size, uuid=low.get("unique id", "")
        )


def rocm_smi_amd(text: str) -> Iterable[Device]:
    return rocm_smi(text, "AMD")


def rocm_smi_hygon(text: str) -> Iterable[Device]:
    return rocm_smi(text, "Haiguang")


def rocminfo_amd(text: str) -> Iterable[Device]:
    return rocminfo(text, "AMD")


def rocminfo_hygon(text: str) -> Iterable[Device]:
    return rocminfo(text, "HYGON")


def rocminfo(text: str, maker: str) -> Iterable[Device]:
    """`rocminfo`: a section per agent, CPUs too.  Its first four lines name it, in this order; a section where they do
    not, or whose type does not fit its UUID, is torn."""
    lines = [line.strip() for line in text.splitlines() if len(line) < 400]
    starts = [at for at, line in enumerate(lines) if re.fullmatch(r"Agent \d+", line)]
    sections = [lines[at + 2 : end] for at, end in zip(starts, [*starts, len(lines)][1:], strict=True)]
    heads = [_fields(section[:4]) for section in sections]
    cpus = {dict(head).get("Name") for head in heads if dict(head).get("Uuid", "").startswith("CPU")}
    index = 0
    for section, head in zip(sections, heads, strict=True):
        if [key for key, _ in head] != ["Name", "Uuid", "Marketing Name", "Vendor Name"]:
            continue
        named, rest = dict(head), _fields(section[4:])
        types = [value for key, value in rest if key == "Device Type"]
        if (
            not re.fullmatch("GPU-[0-9a-f]+", named["Uuid"]) or named["Vendor Name"] != maker or types not in (["GPU"], ["DCU"])
            or not named["Name"].startswith("gfx") or named["Marketing Name"] in cpus
        ):  # fmt: skip
            continue
        places = [int(value) for key, value in rest if key == "BDFID" and value.isdigit()]
        bus = (
            f"0000:{places[0] >> 8:02x}:{places[0] >> 3 & 31:02x}.{places[0] & 7}"
            if places and places[0]
            else ""
        )
        if not places or not any(key == "Segment" and value.startswith("GLOBAL") for key, value in rest):
            continue  # the section is cut off
        yield Device(index, named["Marketing Name"], bus, _pool_bytes(rest), uuid=named["Uuid"])
        index += 1


def _fields(lines: list[str]) -> list[tuple[str, str]]:
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return [(pair[0].strip(), pair[1].strip()) for pair in pairs]


def _pool_bytes(fields: list[tuple[str, str]]) -> int:
    """The size that the agent's GLOBAL pools agree on, else 0."""
    sizes, last = set[int](), ""
    for key, value in fields:
        if key == "Segment":
            last = value
        size = re.fullmatch(r"(\d+)\(0x[0-9a-f]+\) KB", value)
        if key == "Size" and size and last.startswith("GLOBAL"):
            sizes.add(int(size[1]) * 1024)
    return sizes.pop() if len(sizes) == 1 else 0


def query(text: str) -> Iterable[Device]:
    """`nvidia-smi --query-gpu=... --format=csv` and its likes: titles, then one row per device."""
    rows = [row for row in _rows(text) if row]
    for at, titles in enumerate(rows):
        if {"index", "name"} <= {title.split(" ")[0] for title in titles}:
            keys = [title.split(" ")[0] for title in titles]
            for row in rows[at + 1 :]:
                if len(row) == len(keys) and (device := _queried(dict(zip(keys, row, strict=True)))):
                    yield device
            return


def _queried(row: dict[str, str]) -> Device | None:
    size = re.fullmatch(r"(\d+) ?MiB", row.get("memory.total", ""))
    bus = row.get("pci.bus_id", "")
    if (
        not row["index"].isdigit()
        or not re.match(r"[A-Za-z]", row["name"])
        or not size
        or not BUS.fullmatch(bus)
    ):
        return None
    return Device(
        int(row["index"]), row["name"], bus, int(size[1]) * 2**20, tuple(_troubles(row)), uuid=row.get("uuid", "")
    )  # fmt: skip


def _troubles(row: dict[str, str]) -> Iterable[str]:
    for key, value in row.items():
        if "uncorrected" in key and value.isdigit() and int(value):
            yield f"{value} uncorrectable memory errors"
        if "retired_pages" in key and "pending" in key and value == "Yes":
            yield "memory pages wait to be retired: reset the device"
        if key.rsplit(".", 1)[-1] in SLOWDOWNS and value == "Active":
            yield f"throttled: {key.rsplit('.', 1)[-1].replace('_', ' ')}"
    now, most = row.get("pcie.link.width.current", ""), row.get("pcie.link.width.max", "")
    if now.isdigit() and most.isdigit() and int(now) < int(most):
        yield f"link at {now} of {most} lanes"


def gaudi(text: str) -> Iterable[Device]:
    """`hl-smi -Q ... -f csv,noheader`, the fields in the order of GAUDI_FIELDS."""
    for row in _rows(text):
        if len(row) != GAUDI_FIELDS or not row[0].isdigit() or not re.fullmatch(r"\d+ ?%", row[-1]):
            continue
        size = re.fullmatch(r"(\d+) ?MiB", row[4])
        if row[2].startswith("HL-") and size:
            yield Device(int(row[0]), row[2], memory_bytes=int(size[1]) * 2**20, uuid=row[1])


def own(text: str) -> Iterable[Device]:
    """What `qipan.probe.libraries` prints."""
    value = _json(text)
    return _devices(value.get("devices") if isinstance(value, dict) else None, _own)


def of_manufacturer(text: str, manufacturer: str) -> str:
    """The same with the entries of one manufacturer; a library of one vendor names none."""
    value = _json(text)
    entries = value.get("devices") if isinstance(value, dict) else None
    kept = [
        entry for entry in entries if isinstance(entry, dict) and entry.get("manufacturer", "") in ("", manufacturer)
    ] if isinstance(entries, list) else []  # fmt: skip
    return json.dumps({"devices": kept})


def _own(entry: Any) -> Device:
    return Device(
        int(entry["index"]), str(entry["name"]), str(entry["bus"]), int(entry["memory_bytes"]),
        tuple(map(str, entry["complaints"])), uuid=str(entry["uuid"]),
    )  # fmt: skip


def _rows(text: str) -> Iterable[list[str]]:
    for line in text.splitlines()[:4096]:
        if len(line) < 1000:
            yield [cell.strip() for cell in next(csv.reader([line]), [])]


def _devices(value: object, read: Callable[[Any], Device]) -> Iterable[Device]:
    for entry in value if isinstance(value, list) else ():
        try:
            device = read(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # an entry without these is no device we could name
        if (
            0 <= device.index < 4096
            and device.memory_bytes >= 0
            and (not device.bus or BUS.fullmatch(device.bus))
        ):
            yield device


def _json(text: str) -> object:
    """Some tools print a line before their document."""
    start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=0)
    try:
        return json.loads(text[start:])
    except (ValueError, RecursionError):
        return None
