"""A model in training under a strategy, which may be replaced while the processes live.

`Session` knows nothing of tasks, clocks or files of orders: `loop` and tests drive it.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qipan.strategy import SiteStrategy, Stage, Strategy, check_strategy
from qipan.trainer import checkpoint
from qipan.trainer.device import device
from qipan.trainer.layout import Layout, build, check_layout
from qipan.workload import Model

LEARNING_RATE = 3e-3
CLIP_NORM = 1.0

Optimizer = Callable[[object], torch.optim.Optimizer]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,  # type: ignore[arg-type]
        lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=False,
    )  # fmt: skip


class Session:
    """One rank of one site.  `step` counts optimiser steps done."""

    def __init__(
        self,
        spec: Model,
        strategy: Strategy,
        site_id: str = "",
        optimizer: Optimizer = adamw,
        clip: float = CLIP_NORM,
    ) -> None:
        self.spec, self.site_id, self.clip = spec, site_id, clip
        self._make = optimizer
        self.step = 0
        self._open(strategy)

    def _open(self, strategy: Strategy) -> None:
        check_strategy(strategy)
        self.strategy = strategy
        self.site = strategy.site(self.site_id)
        self.layout: Layout = build(self.spec, strategy, strategy.seed, self.site_id)
        self.optimizer = self._make(self.layout.model.parameters())
        self.watch = Watch(self.layout)

    @property
    def base(self) -> int:
        """Where this site's rows begin in the global batch."""
        return self.strategy.rows_before(self.site)

    def own_rows(self) -> tuple[int, int]:
        first, last = self.layout.rows
        return self.base + first, self.base + last

    def train(self, batch: Tensor, lr: float) -> float:
        """One optimiser step on this rank's rows (rows, seq + 1).  Returns its share of the summed loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        total = self.layout.gradients(batch.to(device()), self.site.rows * self.strategy.seq)
        if self.clip:
            self.layout.clip(self.clip)
        self.optimizer.step()
        self.step += 1
        return total

    def set_rows(self, rows_per_dp: tuple[int, ...]) -> None:
        """Other rows for each data-parallel rank of this site: nothing moves, no time is lost."""
        stages = tuple(replace(stage, rows_per_dp=rows_per_dp) for stage in self.site.stages)
        self._adopt(replace(self.site, stages=stages))
        self.layout.set_rows(rows_per_dp)

    def _adopt(self, site: object) -> None:
        sites = tuple(site if one is self.site else one for one in self.strategy.sites)
        strategy = replace(self.strategy, sites=sites)  # type: ignore[arg-type]
        check_strategy(strategy)
        self.strategy = strategy
        self.site = self.layout.site = strategy.site(self.site_id)

    def save(self, folder: Path, validation: float | None = None) -> int:
        return checkpoint.save(
            folder, self.layout.model, self.optimizer, self.step, self.strategy.label(), validation
        )

    def resume(self, folder: Path) -> checkpoint.Commit | None:
        """Go on from the newest committed checkpoint, whatever strategy wrote it."""
        found = checkpoint.committed(folder)
        if not found:
            return None
        checkpoint.load(found[-1].path, self.layout.model, self.optimizer)
        self.step = found[-1].step
        return found[-1]

    def reshape(
        self,
        strategy: Strategy,
        folder: Path,
        regroup: Callable[[], bool] = lambda: True,
        *,
        newcomers: bool = False,
    ) -> float:
        """Take the new strategy and go on in the same processes.  `regroup` makes the world of ranks anew and says whether
        this rank is still in it; `newcomers`: processes in it that were not in the one before call `receive`.  Where each rank
        holds the whole model before and after, it stays in memory; else it is saved and loaded.  Refused strategies change
        nothing.  Returns seconds."""
        began_s = time.perf_counter()
        check_strategy(strategy)
        site = strategy.site(self.site_id)
        check_layout(site, strategy.seq, self.spec, site.devices)
        step, kept = self.step, None
        if _whole(self.site) and _whole(site):
            kept = self.layout.model.state_dict(), self.optimizer.state_dict()
        else:
            self.save(folder)
        del self.layout, self.optimizer, self.watch
        if not regroup():
            return time.perf_counter() - began_s
        self._open(strategy)
        self.step = step
        saved: Path | None = None
        if kept is not None:
            self.layout.model.load_state_dict(kept[0])
            self.optimizer.load_state_dict(kept[1])
        else:
            newest = checkpoint.committed(folder, digests=False)[-1]
            assert newest.step == step
            saved = newest.path
        if newcomers:
            self._meet(saved)
        if saved is not None:
            checkpoint.load(saved, self.layout.model, self.optimizer)
        return time.perf_counter() - began_s

    def receive(self) -> None:
        """The part of a process that is new in a world whose others `reshape`."""
        path = self._meet(None)
        if path is not None:
            checkpoint.load(path, self.layout.model, self.optimizer)

    def _meet(self, saved: Path | None) -> Path | None:
        """Rank 0 tells where the state is and at which step; when it is nowhere but in memory, it is sent to all."""
        told: list[tuple[int, Path | None]] = [(self.step, saved)]
        dist.broadcast_object_list(told)
        self.step, path = told[0]
        if path is None:
            checkpoint.spread(self.layout.model, self.optimizer)
        return path


def _whole(site: SiteStrategy) -> bool:
    """Whether each rank holds the whole model and the whole state of its optimiser."""
    first = site.stages[0]
    return len(site.stages) == 1 and not site.zero and first.tp == first.ep == 1


def warm_up() -> None:
    """What a process does once (imports, first passes) is done before others wait for it."""
    tiny = Model("warm-up", 1, 16, 1, 1, 16, 16, 16, tied_embeddings=True)
    stage = Stage("any", ((0, 1),), rows_per_dp=(1,))
    session = Session(tiny, Strategy(0, 8, 1, (SiteStrategy("here", (stage,)),)))
    session.train(torch.zeros((1, 9), dtype=torch.long), 0.0)
    checkpoint.state_of(session.layout.model, session.optimizer)


class Watch:
    """Seconds of pure computation: the forward passes of this rank's part, which wait for nobody (except where FSDP2
    gathers).  On an accelerator only every tenth step is measured, since measuring waits for the device."""

    SAMPLE = 10

    def __init__(self, layout: Layout) -> None:
        self.forward_s = 0.0
        self.rows = 0
        self._calls = 0
        self._began_s = 0.0
        parts = layout.pipeline.parts if layout.pipeline is not None else [layout.model]
        for part in parts:
            part.register_forward_pre_hook(self._begin)
            part.register_forward_hook(self._end)

    def clear(self) -> None:
        self.forward_s, self.rows = 0.0, 0

    def _begin(self, module: torch.nn.Module, _given: object) -> None:
        self._calls += module.training
        if self._measures(module):
            _settle()
            self._began_s = time.perf_counter()

    def _end(self, module: torch.nn.Module, given: tuple[Tensor, ...], _made: object) -> None:
        if self._measures(module):
            _settle()
            self.forward_s += time.perf_counter() - self._began_s
            self.rows += given[0].shape[0]

    def _measures(self, module: torch.nn.Module) -> bool:
        return module.training and (device().type == "cpu" or self._calls % self.SAMPLE == 0)


def _settle() -> None:
    if device().type != "cpu":
        torch.accelerator.synchronize()
