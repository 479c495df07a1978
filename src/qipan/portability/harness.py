"""Runs a script until its optimizer made some steps, and notes the losses: `python -m qipan.portability.harness OUT STEPS SHIM SCRIPT
[ARGUMENT ...]`.  With SHIM 1 what the script calls cuda is the CPU: so the original runs where there is no such card, as the
reference that a rewritten script is compared with.  A loss is what backward() is called on."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode


class EnoughSteps(BaseException):
    """Not an Exception: a training loop's own `except Exception` must not catch it."""


class Losses:
    """`devices`: where the losses were."""

    def __init__(self, steps: int) -> None:
        self.steps, self.taken = steps, 0
        self.losses: list[float] = []
        self.devices: set[str] = set()
        self._tensor: Any = torch.Tensor
        self._plain: Callable[..., None] = self._tensor.backward
        self._hook = register_optimizer_step_post_hook(self._stepped)
        self._tensor.backward = self._noted()  # type: ignore[method-assign]

    def _noted(self) -> Callable[..., None]:
        plain, own, inside = self._plain, self, list[bool]()

        def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            if tensor.numel() == 1 and not inside:  # the shim's mode comes here twice
                own.losses.append(float(tensor.detach().float().cpu()))
                own.devices.add(tensor.device.type)
            inside.append(True)
            try:
                plain(tensor, *args, **kwargs)
            finally:
                inside.pop()

        return backward

    def _stepped(self, *_: Any) -> None:
        self.taken += 1
        if self.steps and self.taken >= self.steps:
            raise EnoughSteps

    def close(self) -> None:
        self._hook.remove()
        self._tensor.backward = self._plain


def run_script(script: Path, arguments: list[str], steps: int, shim: bool) -> dict[str, Any]:
    """{"losses", "steps", "devices", "error"}; a script that ends by itself, or by sys.exit(0), is fine."""
    noted, error = Losses(steps), ""
    mode = cuda_is_cpu() if shim else None
    argv, path = sys.argv, list(sys.path)
    sys.argv, sys.path[0:0] = [str(script), *arguments], [str(script.parent)]
    try:
        if mode is not None:
            with mode:
                runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_path(str(script), run_name="__main__")
    except EnoughSteps:
        pass
    except SystemExit as end:
        error = "" if end.code in (None, 0) else f"SystemExit: {end.code}"
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        error = f"{type(failure).__name__}: {str(failure)[:400]}"
    finally:
        sys.argv, sys.path[:] = argv, path
        noted.close()
    return {"losses": noted.losses, "steps": noted.taken, "devices": sorted(noted.devices), "error": error}


def on_cpu(value: Any) -> Any:
    """The same value, cuda being cpu; containers are looked into."""
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return _DEVICE("cpu")
    if isinstance(value, tuple):
        return tuple(on_cpu(item) for item in value) if type(value) is tuple else value
    return [on_cpu(item) for item in value] if type(value) is list else value


_DEVICE = torch.device


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})


def cuda_is_cpu() -> TorchFunctionMode:
    """Replaces, in this process for good, what torch has under the name of cuda."""
    import torch as whole
    import torch.distributed as distributed

    torch: Any = whole  # its attributes are replaced
    dist: Any = distributed

    def mapped(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return plain(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})

        return call

    def itself(value: Any, *_: Any, **__: Any) -> Any:
        return value

    class Device(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if (args and args[0] in ("cuda",)) or kwargs.get("type") == "cuda":
                return _DEVICE("cpu")
            return _DEVICE(*map(on_cpu, args), **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, _DEVICE)

    torch.device = Device("device", (), {})
    torch.Tensor.cuda = itself
    torch.nn.Module.cuda = itself
    torch.nn.Module.to = mapped(torch.nn.Module.to)
    torch.Tensor.is_cuda = True
    torch.load = mapped(torch.load)
    torch.set_default_device = mapped(torch.set_default_device)
    torch.get_device_module = mapped(torch.get_device_module)
    plain_default = torch.set_default_tensor_type
    torch.set_default_tensor_type = lambda kind: plain_default(_cpu_type(kind))
    torch.autocast = _with_cpu(torch.autocast)
    torch.amp.autocast = torch.autocast
    torch.amp.autocast_mode.autocast = torch.autocast
    torch.amp.GradScaler = _with_cpu(torch.amp.GradScaler)
    _functions(torch.cuda)
    init = dist.init_process_group if dist.is_available() else None
    if init is not None:
        dist.init_process_group = lambda backend=None, *args, **kwargs: init(_gloo(backend), *args, **kwargs)
        dist.is_nccl_available = lambda: True
        _distributed_data_parallel()
    return _OnCpu()


def _functions(cuda: Any) -> None:
    constants: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None, "empty_cache": None,
        "manual_seed": None, "manual_seed_all": None, "seed": None, "seed_all": None, "init": None, "ipc_collect": None,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0, "memory_cached": 0,
        "max_memory_cached": 0, "reset_peak_memory_stats": None, "reset_max_memory_allocated": None,
        "reset_max_memory_cached": None, "reset_accumulated_memory_stats": None, "memory_summary": "", "memory_stats": {},
        "mem_get_info": (0, 0), "get_device_name": "cpu", "is_bf16_supported": True, "get_rng_state_all": [],
        "set_rng_state_all": None, "set_rng_state": None, "set_per_process_memory_fraction": None,
    }  # fmt: skip
    for name, value in constants.items():
        setattr(cuda, name, _constant(value))
    from contextlib import nullcontext

    cuda.device = lambda *_: nullcontext()
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    for name in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    cuda.nvtx = ModuleType("nvtx")
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant(0))
    cuda.nvtx.range = lambda *_: nullcontext()
    cuda.amp.autocast = lambda enabled=True, dtype=None, cache_enabled=None: torch.autocast(
        "cpu", enabled=enabled, dtype=dtype
    )
    cuda.amp.GradScaler = lambda *args, **kwargs: torch.amp.GradScaler("cpu", *args, **kwargs)
    cuda.amp.custom_fwd = lambda f=None, **kw: (
        torch.amp.custom_fwd(f, device_type="cpu", **kw)
        if f
        else torch.amp.custom_fwd(device_type="cpu", **kw)
    )
    cuda.amp.custom_bwd = lambda f=None, **kw: (
        torch.amp.custom_bwd(f, device_type="cpu") if f else torch.amp.custom_bwd(device_type="cpu")
    )


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _with_cpu(kind: Any) -> Any:
    class OnCpu(kind):  # type: ignore[misc]
        def __init__(self, device: Any = "cuda", *args: Any, **kwargs: Any) -> None:
            place = kwargs.pop("device_type", None) or kwargs.pop("device", None) or device
            super().__init__(on_cpu(place), *args, **kwargs)

    return OnCpu


def _cpu_type(kind: Any) -> Any:
    return kind.replace("torch.cuda.", "torch.") if isinstance(kind, str) else kind


def _gloo(backend: Any) -> Any:
    return "gloo" if backend is not None and "nccl" in str(backend) else backend


def _distributed_data_parallel() -> None:
    kind: Any = torch.nn.parallel.DistributedDataParallel
    plain = kind.__init__

    def made(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        plain(self, module, None, None, *args, **kwargs)

    kind.__init__ = made


def main() -> None:
    out, steps, shim, script, *arguments = sys.argv[1:]
    found = run_script(Path(script), arguments, int(steps), shim == "1")
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    sys.exit(1 if found["error"] else 0)


if __name__ == "__main__":
    main()
