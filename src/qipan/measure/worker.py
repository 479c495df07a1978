"""One device's side of a measurement: `python -m qipan.measure.worker DEVICE THREADS`, commands in and answers out, a line of
JSON each.  Any device that torch has; it is the only module of this part that imports torch."""

import base64
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qipan.measure.challenge import Challenge, start, weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Worker:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.prepared: dict[int, tuple[Challenge, torch.Tensor]] = {}

    def hello(self) -> dict[str, Any]:
        name = "CPU"
        if self.device.type != "cpu":
            named = getattr(getattr(torch, self.device.type, None), "get_device_name", None)
            name = str(named(self.device)) if named else self.device.type
        return {"torch": torch.__version__, "name": name}

    def prepare(self, slot: int = 0, **fields: Any) -> dict[str, Any]:
        """`slot`: a node that sells one device under two names keeps the work of both apart."""
        challenge = Challenge(**fields)
        b = torch.from_numpy(weights(challenge)).to(self.device, DTYPES[challenge.precision]) * 0.5
        self.prepared[slot] = (challenge, b)
        return {"slot": slot}

    def go(self, start_seed: int, slot: int = 0) -> dict[str, Any]:
        """The fingerprints, steps x n."""
        c, b = self.prepared[slot]
        made = Challenge(c.size, c.steps, c.precision, c.weights, start_seed)
        u, w, v = (torch.from_numpy(part).to(self.device) for part in start(made))
        x0 = torch.cos(torch.outer(u, w)).to(b.dtype)
        x, prints = x0, []
        for _ in range(c.steps):
            x = torch.tanh(x @ b + x0)
            prints.append(x.float() @ v)
        answer = torch.stack(prints).cpu().numpy()
        return {"prints": base64.b64encode(answer.astype("<f4").tobytes()).decode("ascii"), "slot": slot}

    def gemm(self, precision: str, size: int, limit_s: float) -> dict[str, Any]:
        """Median rate of products of `size`; each is checked by Freivalds' test, C x = A (B x), which a chip that computes
        wrongly fails (Freivalds 1977).  Unsupported precisions say so."""
        dtype = DTYPES[precision]
        try:
            a = torch.randn(size, size, device=self.device).to(dtype)
            b = torch.randn(size, size, device=self.device).to(dtype)
            c = a @ b
            self._wait()
        except (RuntimeError, TypeError) as error:
            return {"unsupported": str(error).splitlines()[0][:120]}
        x = torch.randint(0, 2, (size, 1), device=self.device).to(torch.float32) * 2 - 1
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        left, right = c.to(wide) @ x.to(wide), a.to(wide) @ (b.to(wide) @ x.to(wide))
        scale = float(c.to(wide).norm(dim=1).max()) or 1.0
        wrong = float((left - right).abs().max()) / scale
        times, began_s = list[float](), time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - began_s < limit_s and len(times) < 200):
            at_s = time.perf_counter()
            a @ b
            self._wait()
            times.append(time.perf_counter() - at_s)
        bound = {"fp64": 1e-10, "fp32": 5e-3, "fp16": 2e-2, "bf16": 1e-1}[
            precision
        ]  # fp32 may be made of tf32
        return {
            "flops_per_s": 2.0 * size**3 / statistics.median(times),
            "error": wrong,
            "right": wrong < bound,
        }

    def bandwidth(self, size_bytes: int) -> dict[str, Any]:
        """Copy within the device's memory: read and written bytes together."""
        source = torch.ones(size_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        times = self._times(lambda: target.copy_(source), 7)
        return {"bytes_per_s": 2.0 * source.numel() * 4 / statistics.median(times)}

    def fill(self, size_bytes: int, seed: int) -> dict[str, Any]:
        """Write `size_bytes` that follow from the seed and their place, then read all back: memory that is not there, or is
        there twice under two names, or forgets, shows.  Returns how many bytes came back right."""
        block = 2**24 // 4

        def part(number: int) -> torch.Tensor:
            return torch.arange(block, dtype=torch.int32, device=self.device) * 7 + (seed + number * 104729)

        held: list[torch.Tensor] = []
        try:
            held.extend(part(number) for number in range(max(1, size_bytes // 2**24)))
        except RuntimeError as error:
            if "memory" not in str(error).lower():
                raise
        right = 0
        for number, kept in enumerate(held):
            right += int(torch.equal(kept, part(number))) * 2**24
        return {"bytes": right, "asked_bytes": size_bytes}

    def collective(self, rank: int, ranks: int, meet: str, size_bytes: int) -> dict[str, Any]:
        """(latency, bytes/s of the ring) of an all-reduce, from a small and a large one (alpha-beta model)."""
        import torch.distributed as dist

        backend = {
            "cuda": "nccl",
            "cpu": "gloo",
            "npu": "hccl",
            "xpu": "xccl",
            "mlu": "cncl",
            "musa": "mccl",
            "hpu": "hccl",
        }
        if not dist.is_initialized():
            dist.init_process_group(
                backend.get(self.device.type, "gloo"),
                init_method=f"file://{meet}",
                rank=rank,
                world_size=ranks,
            )
        small, large = (torch.zeros(count, device=self.device) for count in (16, size_bytes // 4))
        dist.all_reduce(small)
        small_s = statistics.median(self._times(lambda: dist.all_reduce(small), 9))
        large_s = statistics.median(self._times(lambda: dist.all_reduce(large), 5))
        dist.barrier()
        moved = large.numel() * 4 * 2 * (ranks - 1) / ranks
        return {"latency_s": small_s, "bytes_per_s": moved / max(large_s / 4, large_s - small_s)}

    def storage(self, folder: str, size_bytes: int) -> dict[str, Any]:
        """Write with fsync, then read; the reading may be answered from the page cache, which is dropped for this file where the
        system allows it."""
        import os

        path, data = Path(folder) / f"qipan-measure-{os.getpid()}", np.random.default_rng(0).bytes(2**22)
        try:
            began_s = time.perf_counter()
            with path.open("wb") as file:
                for _ in range(max(1, size_bytes // 2**22)):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            wrote_s = time.perf_counter() - began_s
            began_s = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                count = sum(len(part) for part in iter(lambda: file.read(2**22), b""))
            return {
                "write_bytes_per_s": count / wrote_s,
                "read_bytes_per_s": count / (time.perf_counter() - began_s),
            }
        finally:
            path.unlink(missing_ok=True)

    def _times(self, act: Callable[[], object], count: int) -> list[float]:
        act()
        self._wait()
        times = []
        for _ in range(count):
            at_s = time.perf_counter()
            act()
            self._wait()
            times.append(time.perf_counter() - at_s)
        return times

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def main(device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    worker = Worker(device)
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("verb")
        try:
            answer = getattr(worker, verb)(**command)
        except (
            Exception
        ) as error:  # whatever a vendor's plug-in raises becomes the answer; the process goes on
            answer = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
