"""A real training of a million parameters, resumed from its checkpoint; says what it does in Qipan's events."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

folder = Path(os.environ["QIPAN_CHECKPOINT_DIR"])
steps = int(os.environ["TRAIN_STEPS"])
torch.manual_seed(1)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 256))
assert sum(weight.numel() for weight in model.parameters()) > 1_000_000
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
target = torch.nn.Linear(256, 256)
stopping = False


def stop(*_):
    global stopping
    stopping = True


def say(**event):
    with open(os.environ["QIPAN_EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\n")


signal.signal(signal.SIGTERM, stop)
saved, step = folder / "state.pt", 0
if saved.exists():
    kept = torch.load(saved)
    model.load_state_dict(kept["model"])
    step = kept["step"]
    say(event="resumed", step=step, steps=steps)
loss = torch.tensor(0.0)
while step < steps and not stopping:
    data = torch.randn(32, 256, generator=torch.Generator().manual_seed(step))
    loss = torch.nn.functional.mse_loss(model(data), target(data).detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    time.sleep(0.1)
    if step % 5 == 0 or step == steps or stopping:
        torch.save({"model": model.state_dict(), "step": step}, saved.with_suffix(".part"))
        saved.with_suffix(".part").rename(saved)
        say(event="progress", step=step, steps=steps, loss=loss.item())
        say(event="checkpoint", step=step)
say(event="parked" if step < steps else "done", step=step, loss=loss.item())
sys.exit(0)
