"""A strategy becomes a sharded model: which ranks hold what, and how gradients are summed.

The model is built on the meta device, sharded, and only then given memory, so no rank ever holds the whole of what
the strategy shards; starting values come one parameter at a time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qipan.errors import Infeasible
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer.model import Decoder, initial_value
from qipan.workload import Model


@dataclass(slots=True)
class Layout:
    """`rows`: [first, last) of the global batch that this rank works on.  `loss_scale` undoes the averaging that the
    gradient reduction does, so that gradients are sums over the whole batch."""

    model: nn.Module
    rows: tuple[int, int]
    micro_batches: int
    loss_scale: float
    tp: int
    dp_group: Any
    sum_by_hand: bool

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch only."""
        if last or self.sum_by_hand or not dist.is_initialized():
            yield
        elif isinstance(self.model, nn.parallel.DistributedDataParallel):
            with self.model.no_sync():
                yield
        else:
            yield  # FSDP2 reduces in each micro-batch: exact, and it never holds whole gradients

    def sum_gradients(self) -> None:
        """What the wrapper does not reduce: plain sums over the data-parallel group."""
        if not self.sum_by_hand:
            return
        for parameter in self.model.parameters():
            grad = parameter.grad
            if grad is not None:
                local = grad.to_local() if hasattr(grad, "to_local") else grad
                dist.all_reduce(local, group=self.dp_group)


def check_layout(strategy: Strategy, ranks: int) -> tuple[SiteStrategy, Stage]:
    """The one stage that this trainer runs.  Raises Infeasible by name for what it does not run yet."""
    if len(strategy.sites) != 1:
        raise Infeasible(
            f"{len(strategy.sites)} sites: this trainer runs one site; choose a strategy without `outer`"
        )
    site = strategy.sites[0]
    if len(site.stages) != 1:
        raise Infeasible(f"{len(site.stages)} pipeline stages: this trainer runs one; choose dp, fsdp or tp")
    stage = site.stages[0]
    for name, value, runs in (
        ("cp", stage.cp, 1), ("ep", stage.ep, 1), ("sp", stage.sp, False), ("offload", site.offload, False),
        ("precision", site.precision, "fp32"), ("recompute", site.recompute, "none"),
    ):  # fmt: skip
        if value != runs:
            raise Infeasible(f"{name} is {value}: this trainer runs {name} {runs}")
    if site.zero not in (0, 3):
        raise Infeasible(f"zero is {site.zero}: this trainer runs 0 (DDP) and 3 (FSDP2)")
    if strategy.devices != ranks:
        raise Infeasible(f"the strategy is for {strategy.devices} devices, {ranks} ranks were started")
    return site, stage


def build(model_spec: Model, strategy: Strategy, seed: int) -> Layout:
    """Build, shard, then allocate and fill.  Without an initialised process group: one plain rank."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    site, stage = check_layout(strategy, ranks)
    with torch.device("meta"):
        model: nn.Module = Decoder(model_spec)
    dp_rank = rank // stage.tp
    dp_group = None
    if stage.tp > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (stage.dp, stage.tp), mesh_dim_names=("dp", "tp"))
        dp_group = mesh["dp"].get_group()
        _tensor_parallel(model, mesh["tp"])
        if site.zero == 3 and stage.dp > 1:
            _fully_shard(model, mesh["dp"])
    elif ranks > 1 and site.zero == 3:
        from torch.distributed.device_mesh import init_device_mesh

        _fully_shard(model, init_device_mesh("cpu", (ranks,)))
    model.to_empty(device="cpu")
    _fill(model, seed, model_spec.layers)
    by_hand = stage.tp > 1 and site.zero == 0 and stage.dp > 1
    wrapped = ranks > 1 and stage.tp == 1 and site.zero == 0
    if wrapped:
        model = nn.parallel.DistributedDataParallel(model)
    first = sum(stage.rows_per_dp[:dp_rank])
    averaged = wrapped or (site.zero == 3 and stage.dp > 1)
    return Layout(
        model, (first, first + stage.rows_per_dp[dp_rank]), site.micro_batches, float(stage.dp) if averaged else 1.0,
        stage.tp, dp_group, by_hand,
    )  # fmt: skip


def _tensor_parallel(model: nn.Module, mesh: Any) -> None:
    """Megatron's split (Shoeybi et al. 2019, section 3): columns into a block, rows out of it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(), "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(), "mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }  # fmt: skip
    assert isinstance(model, Decoder)
    for layer in model.layers.values():
        parallelize_module(layer, mesh, plan)


def _fully_shard(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    assert isinstance(model, Decoder)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def _fill(model: nn.Module, seed: int, layers: int) -> None:
    for name, parameter in model.named_parameters():
        whole = initial_value(name, parameter.shape, seed, layers)
        local: Any = parameter
        if hasattr(local, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            shard: Any = distribute_tensor(whole, local.device_mesh, local.placements, src_data_rank=None)
            local.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(whole)
