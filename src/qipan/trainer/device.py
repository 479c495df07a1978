"""The device a rank works on, and the backend that its collectives use."""

import os
from functools import cache

import torch
import torch.distributed as dist


@cache
def device() -> torch.device:
    """The accelerator that torch sees, numbered by the rank on its node; else the CPU."""
    if torch.accelerator.is_available() and os.environ.get("QIPAN_DEVICE") != "cpu":
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(kind.type, index)
    return torch.device("cpu")


def backend(vendors: int = 1) -> str:
    """Unlike vendors share no library: their tensors meet in host memory, over gloo."""
    return dist.get_default_backend_for_device(device()) if vendors == 1 else "gloo"
