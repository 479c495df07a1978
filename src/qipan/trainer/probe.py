"""Measure what a pool's devices do for training: run under torchrun on all of them, prints one JSON line.

The reference is one step (forward, backward, AdamW) of a decoder of half a million parameters on 8 rows of 64 tokens, and the
same of a smaller one; two sizes give a rate and an overhead.  FLOP are counted by `train_flops_per_token`.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer import checkpoint
from qipan.trainer.layout import build
from qipan.trainer.model import summed_loss
from qipan.workload.model import Model, train_flops_per_token

SEQ, REPEATS = 64, 5
LARGE = Model("probe", 4, 96, 6, 6, 16, 256, 2048, tied_embeddings=True)


def main() -> None:
    launched_s = float(os.environ.get("QIPAN_LAUNCHED_S", time.time()))
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    alone = Strategy(0, SEQ, 8, (SiteStrategy("probe", (Stage("probe", ((0, 4),), rows_per_dp=(8,)),)),))
    model, optimizer, step = _reference(LARGE, alone)
    step(8)
    start_s = time.time() - launched_s
    step(1)
    many, few = _times(lambda: step(8)), _times(lambda: step(1))
    # Two sizes give rate and overhead; a quota's periods are coarse, so bound the split by the large step alone.
    flops = train_flops_per_token(LARGE, SEQ) * SEQ
    large_s, small_s = statistics.mean(many), statistics.mean(few)
    rate = 7 * flops / max(large_s / 2, large_s - small_s)
    overhead_s = max(0.0, large_s - 8 * flops / rate)
    latency_s, bytes_per_s = _collective() if ranks > 1 else (0.0, 1e12)
    save_s = _save(model, optimizer)
    found = {
        "train_flops_per_s": rate,
        "start_s": start_s,
        "collective_bytes_per_s": bytes_per_s,
        "collective_latency_s": latency_s,
        "spread": statistics.stdev(many) / statistics.mean(many),
        "measured_at_s": time.time(),
        "save_s": save_s,
        "step_overhead_s": overhead_s,
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        line = json.dumps(found)
        target = os.environ.get("QIPAN_PROBE_OUT")
        if target:
            part = Path(target + ".part")
            part.write_text(line)
            part.rename(target)
        else:
            print(line, flush=True)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


def _reference(spec: Model, strategy: Strategy) -> tuple[torch.nn.Module, Optimizer, Callable[[int], None]]:
    from qipan.trainer.model import Decoder, initial_value

    if dist.is_initialized():
        model: torch.nn.Module = Decoder(spec)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(initial_value(name, parameter.shape, 0, spec.layers))
    else:
        model = build(spec, strategy, 0).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(8 * (SEQ + 1)).reshape(8, SEQ + 1) * 7 % spec.vocab

    def step(rows: int) -> None:
        optimizer.zero_grad()
        loss = summed_loss(model(tokens[:rows, :-1]), tokens[:rows, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return model, optimizer, step


def _times(act: Callable[[], None]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        act()
        times.append(time.perf_counter() - began_s)
    return times


def _collective() -> tuple[float, float]:
    """(latency, bytes/s) of an all-reduce, from a small and a large one (the alpha-beta model)."""
    small, large = torch.zeros(16), torch.zeros(700_000)
    ranks = dist.get_world_size()
    dist.all_reduce(small)
    small_s = statistics.median(_times(lambda: dist.all_reduce(small)))
    large_s = statistics.median(_times(lambda: dist.all_reduce(large)))
    moved = large.numel() * 4 * 2 * (ranks - 1) / ranks
    return small_s, moved / max(1e-6, large_s - small_s)


def _save(model: torch.nn.Module, optimizer: Optimizer) -> float:
    shared = [
        tempfile.mkdtemp(prefix="qipan-probe-") if not dist.is_initialized() or dist.get_rank() == 0 else ""
    ]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    began_s = time.perf_counter()
    checkpoint.save(Path(shared[0]), model, optimizer, 1, "probe", None)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
