"""Whole-model coordinates: every parameter, in the order of names, padded to whole blocks.

Whatever a site's layout, each of its ranks answers for some intervals of these coordinates, and all of its ranks together
for each block once.  So ranks of unlike layouts find their twins by intersecting intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qipan.strategy import SiteStrategy
from qipan.trainer.layout import Layout
from qipan.trainer.model import Decoder
from qipan.trainer.pipeline import owner, virtual_stages
from qipan.trainer.sites.codec import BLOCK
from qipan.workload import Model

Interval = tuple[int, int]  # blocks [a, b)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """`spans`: name of a parameter -> its blocks."""

    spans: dict[str, Interval]
    blocks: int

    @staticmethod
    def of(spec: Model) -> "Coordinates":
        with torch.device("meta"):
            sizes = {name: parameter.numel() for name, parameter in Decoder(spec).named_parameters()}
        spans, at = {}, 0
        for name in sorted(sizes):
            count = -(-sizes[name] // BLOCK)
            spans[name] = (at, at + count)
            at += count
        return Coordinates(spans, at)

    def fragment(self, number: int, of: int) -> Interval:
        return self.blocks * number // of, self.blocks * (number + 1) // of


def ownership(site: SiteStrategy, spec: Model, coordinates: Coordinates) -> list[list[Interval]]:
    """For each rank of a site, the blocks it answers for: a stage's parameters, split evenly over its ranks."""
    stages = len(site.stages)
    ranges = virtual_stages(site) if stages > 1 else [(0, spec.layers)]
    held: list[list[Interval]] = [[] for _ in range(stages)]
    for name in sorted(coordinates.spans):
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            virtual = next(v for v, (a, b) in enumerate(ranges) if a <= layer < b)
        else:
            virtual = 0 if name.startswith("embedding") else len(ranges) - 1
        held[owner(virtual, stages, site.schedule) if stages > 1 else 0].append(coordinates.spans[name])
    found = []
    for spans in held:
        total, ranks = sum(b - a for a, b in spans), site.stages[0].devices
        found += [_part(spans, total * j // ranks, total * (j + 1) // ranks) for j in range(ranks)]
    return found


def _part(spans: list[Interval], first: int, last: int) -> list[Interval]:
    """The positions [first, last) of the concatenation of `spans`."""
    found: list[Interval] = []
    at = 0
    for a, b in spans:
        low, high = max(first, at), min(last, at + b - a)
        if low < high:
            found.append((a + low - at, a + high - at))
        at += b - a
    return merged(found)


def merged(intervals: list[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for a, b in sorted(intervals):
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        elif a < b:
            found.append((a, b))
    return found


def common(one: list[Interval], other: list[Interval]) -> list[Interval]:
    return merged([(max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) < min(b, d)])


def size(intervals: list[Interval]) -> int:
    return sum(b - a for a, b in intervals)


def numbers(intervals: list[Interval]) -> Tensor:
    """Block numbers, in order."""
    return (
        torch.cat([torch.arange(a, b) for a, b in intervals])
        if intervals
        else torch.zeros(0, dtype=torch.long)
    )


def positions(intervals: list[Interval], within: list[Interval]) -> Tensor:
    """Where the blocks of `intervals` stand among those of `within`."""
    return torch.searchsorted(numbers(within), numbers(intervals))


def _itself(parameter: Any) -> Any:
    return parameter


class Flat:
    """The model of one rank in whole-model coordinates.  All ranks of the site call each method alike; one parameter at a
    time is whole on a rank, never the model.  `of`: what is meant, for each parameter a tensor of its shape that lies on ranks
    as it does (its optimiser's state); without it, the parameter itself."""

    def __init__(self, layout: Layout, spec: Model) -> None:
        self.layout = layout
        self.coordinates = Coordinates.of(spec)
        self.owned = ownership(layout.site, spec, self.coordinates)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.own = self.owned[rank]
        devices = layout.stage.devices
        self._first = layout.place.stage * devices
        self._group = _stage_group(len(layout.site.stages), devices, layout.place.stage)

    def _held(self, fragment: Interval) -> list[tuple[str, Any, Interval]]:
        """(name, parameter, blocks) of what this stage answers for and the fragment touches."""
        first_holds = not self.layout.model.first
        found = []
        for name, parameter in sorted(self.layout.model.named_parameters(), key=lambda item: item[0]):
            a, b = self.coordinates.spans[name]
            copy = first_holds and name.startswith(
                "embedding"
            )  # a tied head's copy: the first stage answers for it
            if not copy and max(a, fragment[0]) < min(b, fragment[1]):
                found.append((name, parameter, (a, b)))
        return found

    @torch.no_grad()
    def gather(self, fragment: Interval, of: Callable[[Any], Any] = _itself) -> Tensor:
        """(own blocks of the fragment, BLOCK) fp32 on the CPU."""
        wanted = common(self.own, [fragment])
        out = torch.zeros((size(wanted), BLOCK))
        for _, parameter, span in self._held(fragment):
            whole = of(parameter)
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            here = common(wanted, [span])
            if here:
                padded = torch.zeros((span[1] - span[0]) * BLOCK)
                padded[: whole.numel()] = whole.detach().reshape(-1).float().cpu()
                out[positions(here, wanted)] = padded.view(-1, BLOCK)[numbers(here) - span[0]]
        return out

    @torch.no_grad()
    def scatter(
        self, fragment: Interval, values: Tensor, *, add: bool, of: Callable[[Any], Any] = _itself
    ) -> None:
        """Give every rank what it holds of the fragment: set, or add to what is there."""
        mine = common(self.own, [fragment])
        for _, parameter, span in self._held(fragment):
            touched = common([span], [fragment])
            local: Any = of(parameter)
            whole = local.full_tensor() if hasattr(local, "full_tensor") else local.detach()
            padded = torch.zeros((span[1] - span[0]) * BLOCK)
            if not add and touched != [span]:
                padded[: whole.numel()] = whole.reshape(-1).float().cpu()
            blocks = padded.view(-1, BLOCK)
            for j in range(self.layout.stage.devices):
                piece = common(self.owned[self._first + j], touched)
                if not piece:
                    continue
                told = torch.empty((size(piece), BLOCK))
                if common(self.own, touched) == piece:
                    told = values[positions(piece, mine)].contiguous()
                if self._group is not None:
                    dist.broadcast(told, src=self._first + j, group=self._group)
                blocks[numbers(piece) - span[0]] = told
            fresh = padded[: whole.numel()].view(whole.shape).to(whole.device, whole.dtype)
            _write(local, fresh, add)
        self._copy_tied(of)

    def _copy_tied(self, of: Callable[[Any], Any]) -> None:
        site, model = self.layout.site, self.layout.model
        tie = next((one for one in self.layout.sums if one.tie), None)
        if tie is not None:
            local: Any = of(model.embedding.weight)
            local = local.to_local() if hasattr(local, "to_local") else local.detach()
            column = dist.get_rank() % site.stages[0].devices
            dist.broadcast(local, src=column, group=tie.groups[0])


def _write(parameter: Any, whole: Tensor, add: bool) -> None:
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        shard: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        target, value = parameter.to_local(), shard.to_local()
    else:
        target, value = parameter, whole
    target.add_(value) if add else target.copy_(value)


_groups: dict[tuple[int, int, int], Any] = {}


def _stage_group(stages: int, devices: int, own: int) -> Any:
    """The ranks of one stage; None when a stage is one rank."""
    if devices == 1 or not dist.is_initialized():
        return None
    if stages == 1:
        return dist.group.WORLD
    key = (id(dist.group.WORLD), stages, devices)
    if key not in _groups:
        made = [dist.new_group(list(range(s * devices, (s + 1) * devices))) for s in range(stages)]
        _groups[key] = made[own]
    return _groups[key]
