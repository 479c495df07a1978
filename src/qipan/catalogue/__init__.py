"""The chip catalogue that ships, and a site's own additions: facts with source and confidence, per schedulable device.

A *card* may show several devices (MI250X, Ascend 910C); every figure here is divided to one device.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qipan.errors import InvalidInput, NotFound
from qipan.hardware import ChipClass, ChipClassId, Confidence, Figure

KINDS = {"cpu": "cpu", "xilinx": "fpga", "nvidia": "gpu", "amd": "gpu", "hygon": "gpu", "intel": "other"}
CONFIDENCES = ("measured", "datasheet", "third-party", "estimate")
NEEDED = ("vendor", "model", "peak_tflops", "memory_gib", "memory_bandwidth_gbs", "confidence", "source")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """`names`: what a vendor's tool prints -> chip class."""

    chips: dict[ChipClassId, ChipClass]
    names: dict[str, ChipClassId]

    def find(self, name: str) -> ChipClass:
        """By chip class, by a tool's name for it, or by model alone when that is unique.  Raises NotFound."""
        wanted = name.lower()
        if ChipClassId(wanted) in self.chips:
            return self.chips[ChipClassId(wanted)]
        if name in self.names:
            return self.chips[self.names[name]]
        found = [chip for chip in self.chips.values() if wanted in chip.chip_class]
        if len(found) == 1:
            return found[0]
        near = ", ".join(chip.chip_class for chip in found[:6])
        raise NotFound(
            f"no one chip class is meant by {name!r}"
            + (f"; found {near}" if near else "; see `qipan chips ls`")
        )


def load_catalogue(*overlays: Path) -> Catalogue:
    """The shipped facts, then each overlay's entries over them (the same keys; a new model needs NEEDED).  Raises
    InvalidInput."""
    text = resources.files("qipan.catalogue").joinpath("accelerators.yaml").read_text(encoding="utf-8")
    entries = [("catalogue", entry) for entry in _entries(text, "the shipped catalogue")]
    for path in overlays:
        if not path.is_file():
            raise NotFound(f"{path}: no such file; name a YAML file with `accelerators:`")
        entries += [(str(path), entry) for entry in _entries(path.read_text(encoding="utf-8"), str(path))]
    chips: dict[ChipClassId, ChipClass] = {}
    names: dict[str, ChipClassId] = {}
    for file, entry in entries:
        chip = _chip(entry, file)
        chips[chip.chip_class] = chip
        names.update(dict.fromkeys(entry.get("device_names") or [], chip.chip_class))
    return Catalogue(dict(sorted(chips.items())), names)


def _entries(text: str, file: str) -> list[dict[str, Any]]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"is not YAML: {error}", file) from None
    if not isinstance(value, dict) or not isinstance(value.get("accelerators"), list):
        raise InvalidInput("needs a list `accelerators:`", file)
    return [entry for entry in value["accelerators"] if isinstance(entry, dict)]


def _chip(entry: dict[str, Any], file: str) -> ChipClass:
    model = str(entry.get("model", "a model without name"))
    missing = [key for key in NEEDED if key not in entry]
    if missing:
        raise InvalidInput(f"{model} has no {', '.join(missing)}", file)
    if entry["confidence"] not in CONFIDENCES:
        raise InvalidInput(
            f"{model}: confidence is {entry['confidence']!r}; give one of {', '.join(CONFIDENCES)}", file
        )
    confidence: Confidence = entry["confidence"]
    source = str(entry["source"])
    devices = _positive(entry.get("devices_visible_per_card", 1), model, "devices_visible_per_card", file)

    def figure(value: object, factor: float, *, share: float = 1.0) -> Figure:
        """Per device, in base units; an unknown value is an estimate of zero and says so."""
        if value is None:
            return Figure(0.0, "estimate", "not published")
        return Figure(
            _positive(value, model, "a figure", file) * factor * share / devices, confidence, source
        )

    link = entry.get("intra_node") or {}
    peaks = {
        precision: figure(value, 1e12)
        for precision, value in sorted(entry["peak_tflops"].items())
        if value is not None
    }
    vendor = str(entry["vendor"])
    power = entry.get("tdp_w")
    return ChipClass(
        ChipClassId(f"{vendor}/{model}".lower()), vendor, model, str(entry.get("stack", vendor)),
        KINDS.get(vendor, "npu"),  # type: ignore[arg-type]
        peaks, figure(entry["memory_gib"], 2**30), figure(entry["memory_bandwidth_gbs"], 1e9),
        figure(link.get("gbs_bidirectional"), 1e9, share=0.5), figure(entry.get("inter_node_gbit"), 1e9 / 8),
        int(_positive(entry.get("cards_per_node", 1), model, "cards_per_node", file) * devices), int(devices),
        figure(power, 1.0) if power is not None else None, entry.get("release_year"),
        int(_positive(link.get("devices", 1), model, "intra_node.devices", file)) if "devices" in link else 0,
        entry.get("compiled") is True,
    )  # fmt: skip


def _positive(value: object, model: str, what: str, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InvalidInput(f"{model}: {what} is {value!r}; give a number above zero", file)
    return float(value)


__all__ = ["Catalogue", "load_catalogue"]
