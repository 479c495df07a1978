"""Measure what a pool's devices do for training: run under torchrun on all of them, prints one JSON line.

Twenty steps of small decoders that differ in what their time goes to: matrix products, elementwise work over a large
vocabulary, launches of many thin layers, weights, and with several devices sharded weights and a pipeline.  From them
`qipan.planner.steps.calibrated` has the constants of its closed form.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from qipan.hardware import Probe
from qipan.planner.steps import Layout, Timed, calibrated, strategy_of
from qipan.trainer.session import Session
from qipan.workload.model import Model, train_flops_per_token

STEPS, SEQ = 20, 64
WIDE = Model("wide", 2, 192, 6, 6, 32, 512, 512)
DEEP = Model("deep", 8, 64, 4, 4, 16, 192, 256)
WORDS = Model("words", 1, 128, 4, 4, 32, 256, 4096)
Case = tuple[Model, Layout, int, int]  # model, layout, rows, seq


def cases(ranks: int) -> list[Case]:
    alike = Layout(1, ranks, 0)
    found = [
        (WIDE, alike, 8 * ranks, SEQ), (DEEP, alike, 2 * ranks, SEQ), (WORDS, alike, 8 * ranks, SEQ),
        (WORDS, alike, ranks, SEQ),
    ]  # fmt: skip
    if ranks > 1:
        found += [(DEEP, Layout(1, ranks, 3), 2 * ranks, SEQ), (WORDS, Layout(1, ranks, 3), 2 * ranks, SEQ)]
    if ranks > 1 and ranks % 2 == 0:
        found.append((WIDE, Layout(1, ranks // 2, 0, pp=2, micro_batches=2), 4 * ranks, SEQ))
    return found


class Stepper:
    """One model under one layout, ready to train a step at a time on tokens without meaning."""

    def __init__(self, case: Case) -> None:
        model, layout, rows, seq = case
        self.case, self.times = case, list[float]()
        self.session = Session(model, strategy_of(layout, model, "probe", rows, seq, 0, "probe"))
        first, last = self.session.own_rows()
        tokens = torch.arange(rows * (seq + 1)).reshape(rows, seq + 1) * 7 % model.vocab
        self.batch = tokens[first:last]

    def step(self) -> None:
        """From when the last rank is ready until this one is done."""
        if dist.is_initialized():
            dist.barrier()
        began_s = time.perf_counter()
        self.session.train(self.batch, 1e-3)
        self.times.append(time.perf_counter() - began_s)


class Calibration:
    """Steps by turns, so that a machine that slows down does so for all of them."""

    def __init__(self, ranks: int) -> None:
        self.steppers = [Stepper(case) for case in cases(ranks)]
        self.done = 0

    def warm(self) -> None:
        """The first step of each has what is done once in it."""
        for stepper in self.steppers:
            stepper.step()
            stepper.times.clear()

    def turn(self) -> None:
        self.steppers[self.done % len(self.steppers)].step()
        self.done += 1

    def probe(self, start_s: float, save_s: float, statistic: Callable[[list[float]], float] = min) -> Probe:
        """The same on every rank: of each case the slowest rank's time counts."""
        latency_s, bytes_per_s = _collective() if dist.is_initialized() else (0.0, 1e12)
        own = torch.tensor([latency_s, 1 / bytes_per_s, *(statistic(one.times) for one in self.steppers)])
        if dist.is_initialized():
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
        latency_s, byte_s, *seconds = own.tolist()
        timed = [
            Timed(one.case[1], one.case[0], *one.case[2:], s)
            for one, s in zip(self.steppers, seconds, strict=True)
        ]
        model, layout, rows, seq = self.steppers[0].case
        rate = rows / layout.dp * seq * train_flops_per_token(model, seq) / seconds[0]
        times = self.steppers[0].times
        spread = statistics.stdev(times) / statistics.mean(times)
        measured = Probe(rate, start_s, 1 / byte_s, latency_s, spread, time.time(), save_s)
        return calibrated(measured, timed)


def main() -> None:
    launched_s = float(os.environ.get("QIPAN_LAUNCHED_S", time.time()))
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    calibration = Calibration(ranks)
    calibration.steppers[0].step()
    start_s = time.time() - launched_s
    calibration.warm()
    for _ in range(STEPS):
        calibration.turn()
    # A quota is given in periods: only the mean over some of them tells the share, the least step says nothing.
    statistic = statistics.mean if os.environ.get("QIPAN_RANK_GROUPS") else min
    found = calibration.probe(start_s, _save(calibration.steppers[0].session), statistic)
    if not dist.is_initialized() or dist.get_rank() == 0:
        line = json.dumps(asdict(found))
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


def _collective() -> tuple[float, float]:
    """(latency, bytes/s) of an all-reduce, from a small and a large one (the alpha-beta model)."""
    small, large = torch.zeros(16), torch.zeros(700_000)
    ranks = dist.get_world_size()
    dist.all_reduce(small)
    small_s, large_s = (_median_s(one) for one in (small, large))
    moved = large.numel() * 4 * 2 * (ranks - 1) / ranks
    return small_s, moved / max(large_s / 4, large_s - small_s)


def _median_s(tensor: torch.Tensor) -> float:
    times = []
    for _ in range(5):
        began_s = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _save(session: Session) -> float:
    shared = [
        tempfile.mkdtemp(prefix="qipan-probe-") if not dist.is_initialized() or dist.get_rank() == 0 else ""
    ]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    began_s = time.perf_counter()
    session.save(Path(shared[0]))
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
