"""Pipelines: stages of unlike numbers of layers under torch's schedules, and a forward pass of their own for evaluation.

`Stage.layers` names one range per virtual stage.  Virtual stage v stands on rank v mod P for interleaved schedules, and in a V
(0 .. P-1, P-1 .. 0) for `zbv` and `dualpipev`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qipan.errors import Infeasible
from qipan.strategy import SiteStrategy
from qipan.trainer.device import device
from qipan.trainer.model import Decoder, Part, summed_loss
from qipan.workload import Model

V_SHAPED = ("zbv", "dualpipev")
SCHEDULES = {
    "gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble", "zbv": "ScheduleZBVZeroBubble", "dualpipev": "ScheduleDualPipeV",
}  # fmt: skip


def owner(virtual: int, stages: int, schedule: str) -> int:
    """The pipeline rank of a virtual stage."""
    if schedule in V_SHAPED:
        return virtual if virtual < stages else 2 * stages - 1 - virtual
    return virtual % stages


def virtual_stages(site: SiteStrategy) -> list[tuple[int, int]]:
    """Layer ranges in the model's order."""
    stages = len(site.stages)
    taken = [0] * stages
    found = []
    for virtual in range(sum(len(stage.layers) for stage in site.stages)):
        rank = owner(virtual, stages, site.schedule)
        if rank >= stages or taken[rank] >= len(site.stages[rank].layers):
            break
        ranges = site.stages[rank].layers
        found.append(ranges[taken[rank]])
        taken[rank] += 1
    return found


def check_pipeline(site: SiteStrategy, layers: int) -> None:
    """Raises Infeasible by name."""
    stages = len(site.stages)
    if stages == 1:
        return
    if site.schedule == "none":
        raise Infeasible(f"{stages} pipeline stages without a schedule: give one of {', '.join(SCHEDULES)}")
    chunks = {len(stage.layers) for stage in site.stages}
    wanted = "1" if site.schedule in ("gpipe", "1f1b") else "2" if site.schedule in V_SHAPED else "2 or more"
    count = next(iter(chunks))
    if len(chunks) > 1 or (count != 1 if wanted == "1" else count != 2 if wanted == "2" else count < 2):
        raise Infeasible(
            f"schedule {site.schedule} needs {wanted} layer ranges in every stage, found {sorted(chunks)}"
        )
    at = 0
    for first, last in virtual_stages(site):
        if first != at or last <= first:
            raise Infeasible(
                f"layers {first} to {last} follow on layer {at}: ranges must chain from 0 to {layers}"
            )
        at = last
    if at != layers:
        raise Infeasible(f"the stages hold {at} of the model's {layers} layers")
    for rows in site.stages[0].rows_per_dp:
        if rows % site.micro_batches:
            raise Infeasible(
                f"{rows} rows do not divide into {site.micro_batches} micro-batches, as a pipeline needs"
            )
    fewest = (
        stages
        if site.schedule in ("gpipe", "1f1b")
        else 2 * stages
        if site.schedule == "dualpipev"
        else stages
    )
    if site.micro_batches < fewest and site.schedule != "gpipe":
        raise Infeasible(
            f"micro_batches is {site.micro_batches}: {site.schedule} over {stages} stages needs {fewest}"
        )
    if site.schedule.startswith("interleaved") and site.micro_batches % stages:
        raise Infeasible(
            f"micro_batches {site.micro_batches} is no multiple of {stages} stages, as {site.schedule} needs"
        )


@dataclass(slots=True)
class Pipeline:
    """This rank's parts, in the order in which they are passed.  `_ready`: rows of a micro-batch -> (count, schedule)."""

    parts: list[nn.Module]
    numbers: list[int]  # virtual stage of each part
    count: int  # virtual stages in all
    schedule: str
    stages: int
    group: Any
    hidden: tuple[int, int]  # (hidden size, parts that sequence parallelism makes of a sequence)
    scale: float = 1.0
    _ready: dict[tuple[int, int], Any] = field(default_factory=dict)

    @staticmethod
    def build(spec: Model, site: SiteStrategy, rank: int, group: Any) -> "tuple[Decoder, Pipeline]":
        ranges, stages = virtual_stages(site), len(site.stages)
        numbers = [v for v in range(len(ranges)) if owner(v, stages, site.schedule) == rank]
        own = [layer for v in numbers for layer in range(*ranges[v])]
        model = Decoder(spec, own, first=numbers[0] == 0, last=len(ranges) - 1 in numbers)
        parts: list[nn.Module] = [model]
        if len(numbers) > 1:
            parts = [
                Part(model, [str(i) for i in range(*ranges[v])], first=v == 0, last=v == len(ranges) - 1)
                for v in numbers
            ]
        stage = site.stages[0]
        sizes = (spec.hidden, stage.tp if stage.sp else 1)
        return model, Pipeline(parts, numbers, len(ranges), site.schedule, stages, group, sizes)

    @property
    def first(self) -> bool:
        return self.numbers[0] == 0

    @property
    def last(self) -> bool:
        return self.numbers[-1] == self.count - 1

    def gradients(self, inputs: Tensor, targets: Tensor, micro_batches: int, scale: float) -> float:
        """The summed loss where the last stage is, else 0.  Gradients are of the sum of losses times `scale`."""
        self.scale = scale
        schedule = self._schedule(inputs.shape[0] // micro_batches, micro_batches)
        losses: list[Tensor] = []
        given: dict[str, Any] = {"target": targets, "losses": losses} if self.last else {}
        schedule.step(*((inputs,) if self.first else ()), **given)
        return float(sum(float(loss.detach()) for loss in losses)) / scale

    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        """One batch, stage after stage."""
        x: Tensor = inputs
        total = 0.0
        for virtual in range(self.count):
            rank, before = (
                owner(virtual, self.stages, self.schedule),
                owner(virtual - 1, self.stages, self.schedule),
            )
            if virtual not in self.numbers:
                continue
            if virtual > 0 and before != rank:
                hidden, split = self.hidden
                x = torch.empty((inputs.shape[0], inputs.shape[1] // split, hidden), device=device())
                dist.recv(x, group=self.group, group_src=before)
            x = self.parts[self.numbers.index(virtual)](x)
            after = owner(virtual + 1, self.stages, self.schedule)
            if virtual == self.count - 1:
                total = float(summed_loss(x, targets))
            elif after != rank:
                dist.send(x.contiguous(), group=self.group, group_dst=after)
        return total

    def _schedule(self, rows: int, micro_batches: int) -> Any:
        """Stages learn their shapes once; other rows need other stages, which are cheap."""
        from torch.distributed import pipelining

        key = (rows, micro_batches)
        if key not in self._ready:
            stages = [
                pipelining.PipelineStage(part, number, self.count, device(), group=self.group)
                for part, number in zip(self.parts, self.numbers, strict=True)
            ]
            kind = getattr(pipelining, SCHEDULES[self.schedule])
            single = self.schedule in ("gpipe", "1f1b")
            self._ready = {
                key: kind(
                    stages[0] if single else stages,
                    micro_batches,
                    loss_fn=self._scaled_loss,
                    scale_grads=False,
                )
            }
        return self._ready[key]

    def _scaled_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(logits, targets) * self.scale
