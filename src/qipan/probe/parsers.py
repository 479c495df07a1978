"""Which parser reads which text.  Pure; a text that is not understood gives no device."""

from collections.abc import Callable, Iterable

from qipan.probe import documents, tables
from qipan.probe.device import Device

Form = Callable[[str], Iterable[Device]]
FORMS: dict[str, Form] = {
    "table": tables.boxed, "ascend": tables.ascend, "kunlunxin": tables.kunlunxin, "ascend-map": tables.ascend_map, "dcu": tables.dcu, "matrix": tables.matrix,
    "list": tables.listing, "tpu": tables.tpu, "xilinx": tables.xilinx, "amd": documents.amd_smi,
    "neuron": documents.neuron, "intel": documents.intel, "rocm-smi-amd": documents.rocm_smi_amd,
    "rocm-smi-hygon": documents.rocm_smi_hygon, "rocminfo-amd": documents.rocminfo_amd,
    "rocminfo-hygon": documents.rocminfo_hygon, "query": documents.query, "gaudi": documents.gaudi, "own": documents.own,
}  # fmt: skip


def parse(form: str, text: str) -> tuple[Device, ...]:
    """Devices in `text`, which is of one of FORMS, each once, in the tool's order."""
    found: dict[tuple[object, ...], Device] = {}
    for device in FORMS[form](text):
        found.setdefault(device.key, device)
    return tuple(found.values())


def recognise(forms: Iterable[str], text: str) -> tuple[Device, ...]:
    """By the one of a vendor's forms that shows most devices, the earlier one when equal.  A tool's version decides
    its layout, not the command alone."""
    best: tuple[Device, ...] = ()
    for form in forms:
        found = parse(form, text)
        if len(found) > len(best):
            best = found
    return best


def joined(answers: Iterable[tuple[Device, ...]]) -> tuple[Device, ...]:
    """The answer with most devices, each filled with what the vendor's other commands said of it: of the same bus
    address, or of the same index where one of them gave no address."""
    ordered = sorted(answers, key=lambda devices: -len(devices))
    if not ordered:
        return ()
    best = list(ordered[0])
    for others in ordered[1:]:
        for other in others:
            for at, device in enumerate(best):
                same_bus = device.bus and other.bus and _place(device.bus) == _place(other.bus)
                no_bus = not (device.bus and other.bus) and device.index == other.index
                if (same_bus or no_bus) and (not device.name or not other.name or device.name == other.name):
                    best[at] = device.filled(other)
    return tuple(best)


def _place(bus: str) -> str:
    """Domains are written with four or eight digits, or not at all."""
    *domain, bus_number, rest = bus.lower().split(":")
    return f"{(domain or ['0'])[0].lstrip('0') or '0'}:{bus_number}:{rest}"


__all__ = ["FORMS", "Device", "joined", "parse", "recognise"]
