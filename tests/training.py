"""One rank of the training tests: many short runs in one process group, so that torch is imported once.

torchrun tests/training.py PLAN OUT: PLAN is a JSON list of cases; each case's losses go to OUT.  A case is
{strategy, model?, steps, vocab, tied, moe, folder?, save?, mutant?, walk?}; `alone` runs on rank 0 without the others.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from qipan.strategy import Strategy
from qipan.trainer.loop import LEARNING_RATE, schedule
from qipan.trainer.session import Session, adamw
from qipan.workload.model import Model, Moe

VOCAB = 51


def batch(step: int, rows: int, seq: int) -> torch.Tensor:
    """Arithmetic progressions: something to learn."""
    generator = np.random.default_rng(step)
    start, stride = generator.integers(0, VOCAB, (rows, 1)), generator.integers(1, 4, (rows, 1))
    return torch.from_numpy((start + stride * np.arange(seq + 1)) % VOCAB)


def spec(case: dict) -> Model:
    moe = Moe(4, 2, 48, 1, 2, 2) if case.get("moe") else None
    layers = case.get("layers", 8)
    return Model("test", layers, 32, 4, 4, 8, 64, VOCAB, tied_embeddings=case.get("tied", True), moe=moe)


def total_of(share: float) -> float:
    told = torch.tensor([share], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(told)
    return float(told)


def run(case: dict) -> dict:
    strategy = msgspec.convert(case["strategy"], type=Strategy)
    sgd = case.get("sgd", 0.0)  # its rate: unlike Adam, it shows a gradient of wrong size
    make = (lambda parameters: torch.optim.SGD(parameters, lr=sgd)) if sgd else adamw
    session = Session(spec(case), strategy, optimizer=make, clip=0.0 if sgd else 1.0)
    if case.get("resume"):
        session.resume(Path(case["folder"]))
    walk = {int(step): msgspec.convert(to, type=Strategy) for step, to in case.get("walk", {}).items()}
    losses, seconds = [], []
    while session.step < case["steps"]:
        if session.step in walk:
            seconds.append(session.reshape(walk[session.step], Path(case["folder"])))
        rows, seq, step = session.strategy.global_batch_rows, session.strategy.seq, session.step
        first, last = session.own_rows()
        if case.get("mutant") == "mean of means":  # each rank divides by its own rows, ranks are averaged
            own = last - first
            session.layout.loss_scale = rows / own
        if case.get("mutant") == "wrong weights":
            session.layout.loss_scale = session.layout.stage.dp * (1.0 + 0.5 * session.layout.place.d)
        rate = sgd or LEARNING_RATE * schedule(step, 100)
        share = session.train(batch(step, rows, seq)[first:last], rate)
        losses.append(total_of(share) / rows / seq)
    rows, seq = session.strategy.global_batch_rows, session.strategy.seq
    first, last = session.own_rows()
    unseen = total_of(session.layout.loss(batch(999, rows, seq)[first:last])) / rows / seq
    if case.get("save"):
        session.save(Path(case["folder"]))
    return {"losses": losses, "unseen": unseen, "reshape_s": seconds}


@contextlib.contextmanager
def alone():
    """As if no group stood: one plain rank."""
    real = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = real


def main() -> None:
    plans, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    results = []
    for case in plans:
        began_s = time.time()
        if case.get("alone"):
            with alone():
                result = run(case) if rank == 0 else {}
        else:
            result = run(case)
        results.append({**result, "seconds": round(time.time() - began_s, 2)})
        if rank == 0:
            out.with_suffix(".part").write_text(json.dumps(results))
    if rank == 0:
        out.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
