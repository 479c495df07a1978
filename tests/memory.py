"""One rank of the memory test: build, two steps and a save of a 200 M parameter model, sharded over four ranks."""

import importlib
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer import checkpoint
from qipan.trainer.layout import build
from qipan.trainer.model import summed_loss
from qipan.workload import Model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
stage = Stage("cpu", ((0, 12),), dp=4, rows_per_dp=(1, 1, 1, 1))
strategy = Strategy(0, 32, 4, (SiteStrategy("here", (stage,), zero=3),))
model = Model("m", 14, 1024, 16, 16, 64, 2816, 8192, tied_embeddings=True)
# What these bring is counted as imports, not as model.
for name in ("checkpoint", "checkpoint.state_dict", "fsdp", "tensor"):
    importlib.import_module(f"torch.distributed.{name}")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


base = peak = resident()
ended = False


def watch() -> None:
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.005)


watcher = threading.Thread(target=watch)
watcher.start()
layout = build(model, strategy, 0)
optimizer = torch.optim.AdamW(layout.model.parameters(), lr=1e-3)
tokens = torch.arange(33).unsqueeze(0) % model.vocab
for _ in range(2):
    optimizer.zero_grad()
    summed_loss(layout.model(tokens[:, :-1]), tokens[:, 1:]).backward()
    optimizer.step()
if sys.argv[2] == "1":
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    state = get_state_dict(layout.model, optimizer, options=StateDictOptions(full_state_dict=True))
checkpoint.save(Path(sys.argv[1] + "-ckpt"), layout.model, optimizer, 1, "fsdp4", None)
ended = True
watcher.join()
Path(sys.argv[1], str(rank)).write_text(str(peak - base))
dist.barrier()
os._exit(0)
