"""The chip catalogue that ships, and a site's own additions: facts with source and confidence, per schedulable device.

A *card* may show several devices (MI250X, Ascend 910C); every figure here is divided to one device.
"""

import os
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qipan.catalogue.stacks import LOADER, Stack, overridden, shipped_stacks
from qipan.errors import InvalidInput, NotFound
from qipan.files import text_in
from qipan.hardware import ChipClass, ChipClassId, Confidence, Figure

KINDS = {"cpu": "cpu", "xilinx": "fpga", "nvidia": "gpu", "amd": "gpu", "hygon": "gpu", "intel": "other"}
CONFIDENCES = ("measured", "datasheet", "third-party", "estimate")
NEEDED = ("vendor", "model", "peak_tflops", "memory_gib", "memory_bandwidth_gbs", "confidence", "source")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """`names`: (stack, what the vendor's tool prints in lower case) -> chip classes.  `detect`: a site's own vendors, as in
    the probe's vendors.yaml."""

    chips: dict[ChipClassId, ChipClass]
    names: dict[tuple[str, str], tuple[ChipClassId, ...]]
    stacks: dict[str, Stack] = field(default_factory=dict)
    detect: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> ChipClass:
        """By chip class, by a tool's name for it, or by model alone when that is unique.  Raises NotFound."""
        wanted = name.lower()
        if ChipClassId(wanted) in self.chips:
            return self.chips[ChipClassId(wanted)]
        named = {chip for (_, known), chips in self.names.items() if known == wanted for chip in chips}
        if len(named) == 1:
            return self.chips[named.pop()]
        found = [chip for chip in self.chips.values() if wanted in chip.chip_class]
        if len(found) == 1:
            return found[0]
        near = ", ".join(chip.chip_class for chip in found[:6])
        raise NotFound(
            f"no one chip class is meant by {name!r}"
            + (f"; found {near}" if near else "; see `qipan chips ls`")
        )

    def match(self, stack: str, name: str, memory_bytes: int = 0) -> str:
        """The chip class that a tool of this stack means, "" when none: by its name, and where several classes share one, by
        the nearest memory.  A memory that differs by more than a quarter is another model."""
        wanted = name.lower()
        found = self.names.get((stack, wanted), ())
        found = found or tuple(
            chip for (of, known), chips in self.names.items()
            if of == stack and wanted.startswith(known + "_") for chip in chips
        )  # fmt: skip
        if memory_bytes:
            found = tuple(chip for chip in found if abs(self._memory(chip) / memory_bytes - 1) < 0.25)
        return min(
            found, key=lambda chip: (abs(self._memory(chip) - memory_bytes), chip), default=ChipClassId("")
        )

    def _memory(self, chip: ChipClassId) -> float:
        return self.chips[chip].memory_bytes.value


def site_catalogue(*overlays: Path) -> Catalogue:
    """The shipped facts, this user's overlays (`chips/*.yaml` in the configuration folder, then the files that QIPAN_CHIPS
    names), `overlays`, and over them what was measured here and has not expired."""
    import platformdirs

    from qipan.catalogue.measured import with_measured

    kept = sorted((platformdirs.user_config_path("qipan") / "chips").glob("*.yaml"))
    named = [Path(path) for path in os.environ.get("QIPAN_CHIPS", "").split(os.pathsep) if path]
    return with_measured(load_catalogue(*kept, *named, *overlays))


def load_catalogue(*overlays: Path) -> Catalogue:
    """The shipped facts, then each overlay's entries over them (the same keys; a new model needs NEEDED, and `detect` when its
    vendor is new too), and its `stacks`.  Raises InvalidInput."""
    named = list(_shipped())
    chips = {chip.chip_class: chip for chip, _ in named}
    stacks, detect = dict(shipped_stacks()), dict[str, Any]()
    for path in overlays:
        text = text_in(path, "no such file; name a YAML file with `accelerators:`")
        document = _document(text, str(path))
        stacks = overridden(stacks, document.get("stacks", {}), str(path))
        for entry in _entries(text, str(path)):
            chip = _chip(entry, str(path), own=_id(entry) not in chips or chips[_id(entry)].on_request)
            chips[chip.chip_class] = chip
            named.append((chip, entry))
            if "detect" in entry:
                detect[chip.stack] = _detect(entry, str(path))
    names: dict[tuple[str, str], tuple[ChipClassId, ...]] = {}
    for chip, entry in named:
        for name in entry.get("device_names") or [chip.model]:
            key = (chip.stack, str(name).lower())
            if chip.chip_class not in names.get(key, ()):
                names[key] = (*names.get(key, ()), chip.chip_class)
    return Catalogue(dict(sorted(chips.items())), names, stacks, detect)


@cache
def _shipped() -> tuple[tuple[ChipClass, dict[str, Any]], ...]:
    """The chips with their entries, read once: what ships does not change while a process runs."""
    text = resources.files("qipan.catalogue").joinpath("accelerators.yaml").read_text(encoding="utf-8")
    entries = _entries(text, "the shipped catalogue")
    return tuple((_chip(entry, "catalogue"), entry) for entry in entries)


def _document(text: str, file: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, Loader=LOADER)
    except yaml.YAMLError as error:
        raise InvalidInput(f"is not YAML: {error}", file) from None
    if not isinstance(value, dict) or not {"accelerators", "stacks"} & set(value):
        raise InvalidInput("needs a list `accelerators:`, or `stacks:`", file)
    return value


def _entries(text: str, file: str) -> list[dict[str, Any]]:
    found = _document(text, file).get("accelerators", [])
    if not isinstance(found, list):
        raise InvalidInput("needs a list `accelerators:`", file)
    return [entry for entry in found if isinstance(entry, dict)]


def _id(entry: dict[str, Any]) -> ChipClassId:
    return ChipClassId(f"{entry.get('vendor')}/{entry.get('model')}".lower())


def _detect(entry: dict[str, Any], file: str) -> dict[str, Any]:
    """`detect: {command: "newco-smi", nodes: [...], pci: "0x1234", form: table}`; only the command is needed."""
    facts = entry["detect"]
    if (
        not isinstance(facts, dict)
        or not facts.get("command")
        or set(facts) - {"command", "nodes", "pci", "form"}
    ):
        raise InvalidInput(
            f"{entry.get('model')}: `detect` has command, and if need be nodes, pci, form", file
        )
    command = facts["command"]
    return {
        "pci": str(facts.get("pci", "")), "nodes": list(facts.get("nodes", [])),
        "tools": [command.split() if isinstance(command, str) else list(command)],
        "forms": [str(facts["form"])] if "form" in facts else ["table", "query", "list"],
    }  # fmt: skip


def _chip(entry: dict[str, Any], file: str, own: bool = False) -> ChipClass:
    """`own`: a site's own model, which the planner takes by itself only once it was measured."""
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
        on_request=own and confidence != "measured",
    )  # fmt: skip


def _positive(value: object, model: str, what: str, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InvalidInput(f"{model}: {what} is {value!r}; give a number above zero", file)
    return float(value)


__all__ = ["Catalogue", "Stack", "load_catalogue", "site_catalogue"]
