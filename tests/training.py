"""One rank of a training test: several short runs in one process group, so that torch is imported once.

torchrun tests/training.py PLAN OUT: PLAN is a JSON list of {folder, strategy, tokens, stop_at, model}; every run's
per-step losses go to OUT."""

import json
import os
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from qipan.strategy import Strategy
from qipan.trainer import checkpoint
from qipan.trainer.data import load_corpus
from qipan.trainer.layout import build
from qipan.trainer.loop import LEARNING_RATE, Run, schedule
from qipan.workload import Model, Task, Work


def run_one(plan: dict, corpus) -> list[float]:
    strategy = msgspec.convert(plan["strategy"], type=Strategy)
    model = Model("test", 2, 32, 4, 4, 8, 64, corpus.vocab, tied_embeddings=plan.get("tied", True))
    work = Work(plan["tokens"], strategy.global_batch_rows * strategy.seq, strategy.seq)
    os.environ["QIPAN_TASK"] = msgspec.json.encode(Task("train", "t", model, (plan["data"],), work)).decode()
    os.environ["QIPAN_STRATEGY"] = strategy.to_json()
    os.environ["QIPAN_CHECKPOINT_DIR"] = plan["folder"]
    os.environ["QIPAN_EVENTS"] = plan["folder"] + "/events.jsonl"
    Path(plan["folder"]).mkdir(parents=True, exist_ok=True)
    run = Run(ready=True)
    layout = build(model, strategy, strategy.seed)
    optimizer = torch.optim.AdamW(
        layout.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    step, losses = run._resume(layout, optimizer), []
    while step < plan["stop_at"]:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step, run.steps)
        if plan.get("mutant") == "mean of means":
            layout.loss_scale *= 1.0 + 0.5 * (
                run.rank % 2
            )  # a rank counts its own rows for more than they are
        loss, _, _ = run._step(layout, optimizer, corpus, step, False)
        losses.append(loss)
        step += 1
        if plan.get("mutant") == "mean of means":
            layout.loss_scale /= 1.0 + 0.5 * (run.rank % 2)
    if plan.get("save", True):
        checkpoint.save(run.folder, layout.model, optimizer, step, strategy.label(), None)
    return losses


def main() -> None:
    plans, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    corpus = load_corpus((plans[0]["data"],))
    results = [run_one(plan, corpus) for plan in plans]
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
