"""Qipan for a plain torch loop: progress, checkpoints, stop and another number of ranks.

    run = qipan.trainer.attach(model, optimizer)
    for step in run.steps(1000):
        ...                       # the loop as it was
        run.report(loss)

Started again, on other ranks or under another layout, the loop goes on from the newest checkpoint. Without Qipan it runs as
well, and checkpoints into `./checkpoints`.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qipan.trainer import checkpoint
from qipan.trainer.stream import Fed

PROGRESS_S = 0.5


class Attached:
    """`model` and `optimizer` may be wrapped or sharded in any way that torch.distributed.checkpoint knows."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str = "checkpoints"
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.folder = Path(os.environ.get("QIPAN_CHECKPOINT_DIR", folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.every_s = float(os.environ.get("QIPAN_CHECKPOINT_EVERY_S", "60"))
        self._control = Path(os.environ["QIPAN_CONTROL"]) if "QIPAN_CONTROL" in os.environ else None
        self._events = os.environ.get("QIPAN_EVENTS")
        self._asked = False
        self._loss: float | None = None
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        self._streams: list[tuple[Fed, int]] = []

    def reads(self, stream: Fed, rows_per_step: int) -> None:
        """Step n takes the samples from n * rows_per_step on: what a checkpoint has behind it is dropped from the stream."""
        self._streams.append((stream, rows_per_step))

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left.  Ends the process with 0 when it was told to stop, its checkpoint written."""
        began_s = time.time()
        step = self._resume()
        self._say("ready", step=step, steps=total, start_s=round(time.time() - began_s, 3))
        saved_s = said_s = time.time()
        first = True
        while step < total:
            began_s = time.time()
            yield step
            step += 1
            now_s = time.time()
            if first:
                first = False
                self._say("first_step", step=step, step_s=round(now_s - began_s, 4))
            if now_s - said_s >= PROGRESS_S or step == total:
                said_s = now_s
                loss = {} if self._loss is None else {"loss": round(self._loss, 4)}
                self._say("progress", step=step, steps=total, **loss)
            stop, due = self._agree(now_s - saved_s >= self.every_s)
            if stop or due or step == total:
                self.save(step)
                saved_s = time.time()
            if stop and step < total:
                self._say("parked", step=step)
                raise SystemExit(0)
        self._say("done", step=total)
        signal.signal(signal.SIGTERM, self._before)

    def report(self, loss: Any) -> None:
        """The loss that the next progress line shows."""
        self._loss = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def save(self, step: int) -> None:
        began_s = time.time()
        size = checkpoint.save(self.folder, self.model, self.optimizer, step, "own script", None)
        for stream, rows_per_step in self._streams:
            stream.saved(step * rows_per_step)
        self._say("checkpoint", step=step, seconds=round(time.time() - began_s, 3), bytes=size)

    def _resume(self) -> int:
        found = checkpoint.committed(self.folder)
        if not found:
            return 0
        checkpoint.load(found[-1].path, self.model, self.optimizer)
        self._say("resumed", step=found[-1].step)
        return found[-1].step

    def _agree(self, due: bool) -> tuple[bool, bool]:
        asked = self._asked or (self._control is not None and self._control.exists())
        if not dist.is_initialized():
            return asked, due
        told = torch.tensor([float(asked), float(due and dist.get_rank() == 0)])
        if dist.get_backend() == "nccl":
            told = told.cuda()
        dist.all_reduce(told)
        return bool(told[0] > 0), bool(told[1] > 0)

    def _say(self, event: str, **values: object) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        line = json.dumps({"event": event, "at_s": round(time.time(), 3), **values})
        if self._events:
            with open(self._events, "a") as file:
                file.write(line + "\n")
        else:
            print(line, flush=True)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
