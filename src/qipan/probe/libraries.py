"""The third layer: what an installed library says, printed as JSON by a process of its own (`python -m qipan.probe.libraries
pynvml`), so that a library that hangs or crashes takes nothing with it.  Never run against a real device so far."""

import json
import sys
from typing import Any


def main(library: str) -> None:
    devices = {"pynvml": _pynvml, "gpustack_runtime": _gpustack}[library]()
    print(json.dumps({"devices": devices}))


def _pynvml() -> list[dict[str, Any]]:
    import pynvml  # type: ignore[import-not-found,unused-ignore]

    pynvml.nvmlInit()
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pci = pynvml.nvmlDeviceGetPciInfo(handle)
        found.append(_entry(
            index, pynvml.nvmlDeviceGetName(handle), pci.busId, pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            pynvml.nvmlDeviceGetUUID(handle),
        ))  # fmt: skip
    return found


def _gpustack() -> list[dict[str, Any]]:
    from gpustack_runtime.detector import detect_devices  # type: ignore[import-not-found,unused-ignore]

    return [  # `fast` would end at the first vendor; memory is in MiB
        _entry(
            device.index,
            device.name,
            (device.appendix or {}).get("bdf", ""),
            int(device.memory) * 2**20,
            device.uuid,
        )
        | {"manufacturer": str(device.manufacturer)}
        for device in detect_devices(fast=False, usage=False)
    ]


def _entry(index: int, name: Any, bus: Any, memory_bytes: int, uuid: Any) -> dict[str, Any]:
    name, bus, uuid = (
        value.decode() if isinstance(value, bytes) else str(value) for value in (name, bus, uuid)
    )
    return {
        "index": index,
        "name": name,
        "bus": bus,
        "memory_bytes": memory_bytes,
        "uuid": uuid,
        "complaints": [],
    }


if __name__ == "__main__":
    main(sys.argv[1])
