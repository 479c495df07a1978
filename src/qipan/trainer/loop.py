"""The training loop of one rank.  What it does is stated by the task and the strategy in the environment; what came
of it goes out as JSON lines."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from qipan.errors import QipanError
from qipan.strategy import Strategy, parse_strategy
from qipan.trainer import checkpoint
from qipan.trainer.data import Corpus, load_corpus, row_offsets, unigram_loss
from qipan.trainer.layout import Layout, build
from qipan.workload import Task

WARM_UP_STEPS = 20
LEARNING_RATE = 3e-3
PROGRESS_S = 0.5


def main() -> None:
    try:
        Run().train()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort in the interpreter's own tear-down
    except QipanError as error:
        print(f"qipan.trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


class Run:
    """One attempt on one rank.  `ready`: the process group stands already."""

    def __init__(self, *, ready: bool = False) -> None:
        self.launched_s = float(os.environ.get("QIPAN_LAUNCHED_S", time.time()))
        self.task = msgspec.json.decode(os.environ["QIPAN_TASK"], type=Task)
        self.strategy: Strategy = parse_strategy(os.environ["QIPAN_STRATEGY"])
        self.folder = Path(os.environ["QIPAN_CHECKPOINT_DIR"])
        self.every_s = float(os.environ.get("QIPAN_CHECKPOINT_EVERY_S", "20"))
        self.control = Path(os.environ["QIPAN_CONTROL"]) if "QIPAN_CONTROL" in os.environ else None
        self.events = os.environ.get("QIPAN_EVENTS")
        self.asked_to_stop = False
        signal.signal(signal.SIGTERM, self._on_signal)
        torch.set_num_threads(1)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not ready:
            dist.init_process_group("gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        work = self.task.work
        self.seq, self.rows = self.strategy.seq, self.strategy.global_batch_rows
        self.steps = work.tokens // (self.rows * self.seq)

    def train(self) -> None:
        corpus = load_corpus(self.task.data)
        assert self.task.model is not None
        spec = replace(self.task.model, vocab=self.task.model.vocab or corpus.vocab)
        layout = build(spec, self.strategy, self.strategy.seed)
        optimizer = torch.optim.AdamW(
            layout.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        step = self._resume(layout, optimizer)
        self._say("ready", start_s=round(time.time() - self.launched_s, 3), step=step, steps=self.steps)
        stopped = self._steps(layout, optimizer, corpus, step)
        if not stopped:
            self._finish(layout, corpus)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still reads from it
            dist.destroy_process_group()

    def _resume(self, layout: Layout, optimizer: torch.optim.Optimizer) -> int:
        began_s = time.time()
        found = checkpoint.committed(self.folder)
        if not found:
            return 0
        newest = found[-1]
        checkpoint.load(newest.path, layout.model, optimizer)
        self._say(
            "resumed", step=newest.step, from_strategy=newest.strategy, strategy=self.strategy.label(),
            seconds=round(time.time() - began_s, 3),
        )  # fmt: skip
        return newest.step

    def _steps(self, layout: Layout, optimizer: torch.optim.Optimizer, corpus: Corpus, step: int) -> bool:
        """Train to the end.  Returns whether it was stopped before."""
        saved_s = said_s = time.time()
        saved_step = step
        while step < self.steps:
            began_s = time.time()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, self.steps)
            loss, stop, due = self._step(layout, optimizer, corpus, step, began_s - saved_s >= self.every_s)
            step += 1
            now_s = time.time()
            if now_s - said_s >= PROGRESS_S or step == self.steps:
                said_s = now_s
                self._say(
                    "progress", step=step, steps=self.steps, tokens=step * self.rows * self.seq, loss=round(loss, 4),
                    step_s=round(now_s - began_s, 4), rows_per_s=round(self.rows / (now_s - began_s), 2),
                )  # fmt: skip
            if due or stop or step == self.steps:
                self._save(layout, optimizer, corpus, step)
                saved_s, saved_step = time.time(), step
            if stop and step < self.steps:
                self._say("parked", step=saved_step)
                return True
        return False

    def _step(
        self, layout: Layout, optimizer: torch.optim.Optimizer, corpus: Corpus, step: int, due: bool
    ) -> tuple[float, bool, bool]:
        """One optimiser step.  Returns the batch's loss in nat per token, and whether all ranks agreed to stop and
        to save."""
        offsets = row_offsets(self.strategy.seed, step, self.rows, len(corpus.train), self.seq)
        own = offsets[layout.rows[0] : layout.rows[1]]
        total, tokens = 0.0, self.rows * self.seq
        optimizer.zero_grad()
        pieces = [piece for piece in _split(own, layout.micro_batches) if len(piece)]
        for i, piece in enumerate(pieces):
            rows = torch.stack([torch.from_numpy(corpus.train[at : at + self.seq + 1]) for at in piece])
            with layout.accumulating(last=i == len(pieces) - 1):
                loss = summed_loss(layout.model(rows[:, :-1]), rows[:, 1:])
                (loss * (layout.loss_scale / tokens)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        layout.sum_gradients()
        optimizer.step()
        asked = self.asked_to_stop or (self.rank == 0 and self.control is not None and self.control.exists())
        signals = torch.tensor([total, float(asked), float(due and self.rank == 0)], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(signals)
        return float(signals[0]) / layout.tp / tokens, bool(signals[1] > 0), bool(signals[2] > 0)

    def _save(self, layout: Layout, optimizer: torch.optim.Optimizer, corpus: Corpus, step: int) -> None:
        began_s = time.time()
        validation = self._evaluate(layout, corpus.validation)
        self._say("validation", step=step, loss=round(validation, 4), seconds=round(time.time() - began_s, 3))
        began_s = time.time()
        label = self.strategy.label()
        size = checkpoint.save(self.folder, layout.model, optimizer, step, label, validation)
        self._say("checkpoint", step=step, seconds=round(time.time() - began_s, 3), bytes=size)

    def _finish(self, layout: Layout, corpus: Corpus) -> None:
        kept = checkpoint.best(self.folder)
        assert kept is not None, "a run that ended has saved and validated"
        checkpoint.load(kept.path, layout.model, None)
        test = self._evaluate(layout, corpus.test)
        self._say(
            "done", step=self.steps, test_loss=round(test, 4), unigram_loss=round(unigram_loss(corpus), 4),
            best_step=kept.step, vocab=corpus.vocab,
        )  # fmt: skip

    @torch.no_grad()
    def _evaluate(self, layout: Layout, tokens: Any) -> float:
        """Nat per token over a part, in whole rows, each data-parallel rank its share."""
        rows = (len(tokens) - 1) // self.seq
        starts = [i * self.seq for i in range(rows)]
        world = (dist.get_world_size() if dist.is_initialized() else 1) // layout.tp
        mine = starts[self.rank // layout.tp :: world]
        most = -(-rows // world)
        total = torch.zeros(1, dtype=torch.float64)
        layout.model.eval()
        for i in range(
            0, most, 16
        ):  # every rank runs the same number of batches: sharded models gather in each
            piece = mine[i : i + 16]
            batch = torch.stack(
                [torch.from_numpy(tokens[at : at + self.seq + 1]) for at in (piece or starts[:1])]
            )
            loss = summed_loss(layout.model(batch[:, :-1]), batch[:, 1:])
            if piece:
                total += loss.double()
        layout.model.train()
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total) / layout.tp / (rows * self.seq)

    def _say(self, event: str, **values: object) -> None:
        if self.rank != 0:
            return
        line = json.dumps({"event": event, "at_s": round(time.time(), 3), **values})
        if self.events:
            with open(self.events, "a") as file:
                file.write(line + "\n")
        else:
            print(line, flush=True)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked_to_stop = True


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth (Loshchilov and Hutter 2017)."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    share = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over tokens, in nat: means of means would be wrong when ranks hold unlike rows."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _split(offsets: Any, pieces: int) -> list[Any]:
    import numpy as np

    return list(np.array_split(offsets, pieces))
