"""A strategy becomes a sharded model: which ranks hold what, and how gradients are summed.

The model is built on the meta device, sharded, and only then given memory, so no rank ever holds the whole of what
the strategy shards; starting values come one parameter at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qipan.errors import Infeasible
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer.collectives import sum_over
from qipan.trainer.device import device
from qipan.trainer.feedforward import Experts
from qipan.trainer.model import Decoder, Layer, initial_value, summed_loss
from qipan.trainer.pipeline import V_SHAPED, Pipeline, check_pipeline
from qipan.workload import Model


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: rank = ((stage * dp + d) * cp + c) * tp + t."""

    stage: int
    d: int
    c: int
    t: int


def place_of(rank: int, stage: Stage) -> Place:
    rest, t = divmod(rank, stage.tp)
    rest, c = divmod(rest, stage.cp)
    number, d = divmod(rest, stage.dp)
    return Place(number, d, c, t)


@dataclass(slots=True)
class Sum:
    """Gradients that no wrapper sums: over which groups, and by what they are divided afterwards."""

    parameters: list[Any]
    groups: list[Any]
    divisor: float = 1.0
    tie: bool = False  # one weight in the first and the last stage


@dataclass(slots=True)
class Layout:
    """`model` holds this rank's part under the whole model's names; `called` is what runs (wrapped, or the same).
    `rows`: [first, last) of the global batch that this rank works on.  `loss_scale` undoes the averaging that a wrapper's
    gradient reduction does, so that gradients are sums over the whole batch."""

    model: Decoder
    called: nn.Module
    site: SiteStrategy
    place: Place
    rows: tuple[int, int]
    loss_scale: float
    sums: list[Sum]
    copies: Callable[[Any], int]  # how many ranks hold the same shard of a parameter
    pipeline: Pipeline | None = None
    loss_parallel: bool = False
    sharded: list[Any] = field(default_factory=list)  # modules whose parameters are sharded by FSDP2

    @property
    def stage(self) -> Stage:
        return self.site.stages[0]

    def set_rows(self, rows_per_dp: tuple[int, ...]) -> None:
        """Other rows for each data-parallel rank; nothing else changes."""
        assert len(rows_per_dp) == self.stage.dp
        first = sum(rows_per_dp[: self.place.d])
        self.rows = (first, first + rows_per_dp[self.place.d])

    def gradients(self, batch: Tensor, tokens: int) -> float:
        """Forward and backward of this rank's rows (rows, seq + 1); gradients become those of the mean over `tokens`.
        Returns this rank's share of the summed loss: the sum over all ranks is the sum over the batch."""
        inputs, targets = self._own_sequence(batch)
        scale = self.loss_scale / tokens
        with self._mode():
            if self.pipeline is not None:
                total = self.pipeline.gradients(inputs, targets, self.site.micro_batches, scale)
            else:
                total = 0.0
                pieces = list(
                    zip(
                        inputs.tensor_split(self.site.micro_batches),
                        targets.tensor_split(self.site.micro_batches),
                        strict=True,
                    )
                )
                for i, (piece, wanted) in enumerate(pieces):
                    with self._accumulating(last=i == len(pieces) - 1):
                        loss = summed_loss(self.called(piece), wanted)
                        (loss * scale).backward()  # type: ignore[no-untyped-call]
                    total += float(loss.detach())
        for one in self.sums:
            grads = [_local_grad(parameter) for parameter in one.parameters]
            sum_over(grads, one.groups)
            if one.divisor != 1.0:
                for grad in grads:
                    grad /= one.divisor
        return total / self.stage.tp

    @torch.no_grad()
    def loss(self, batch: Tensor) -> float:
        """This rank's share of the summed loss, forward only.  All ranks call it equally often."""
        inputs, targets = self._own_sequence(batch)
        self.model.eval()
        with self._mode():
            if self.pipeline is not None:
                total = self.pipeline.loss(inputs, targets)
            else:
                total = float(summed_loss(self.called(inputs), targets))
        self.model.train()
        for module in self.sharded:
            module.reshard()
        return total / self.stage.tp

    def clip(self, norm_max: float) -> float:
        """Scale gradients so that the whole model's norm is at most so much; returns what it was.  Squares are summed on
        each rank, shared shards counted once, then one number is summed over all ranks: parameters may lie on any mesh."""
        squares = torch.zeros((), dtype=torch.float64, device=device())
        grads = []
        for parameter in self.model.parameters():
            grad = _local_grad(parameter)
            grads.append(grad)
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
            squares += norm.square() / self.copies(parameter)
        if dist.is_initialized():
            dist.all_reduce(squares)
        whole = float(squares.sqrt())
        if whole > norm_max:
            for grad in grads:
                grad *= norm_max / whole
        return whole

    def _own_sequence(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        length = (batch.shape[1] - 1) // self.stage.cp
        at = self.place.c * length
        return batch[:, at : at + length], batch[:, at + 1 : at + length + 1]

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.site.precision == "bf16":
                stack.enter_context(torch.autocast(device().type, dtype=torch.bfloat16))
            if self.loss_parallel:
                from torch.distributed.tensor.parallel import loss_parallel

                stack.enter_context(loss_parallel())
            yield

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """DDP exchanges gradients in the last micro-batch only.  FSDP2 reduces in each: exact, and it never holds
        whole gradients."""
        if not last and isinstance(self.called, nn.parallel.DistributedDataParallel):
            with self.called.no_sync():
                yield
        else:
            yield


# ---- what is refused -------------------------------------------------------------------------------------------------


def check_layout(site: SiteStrategy, seq: int, model: Model, ranks: int) -> None:
    """Raises Infeasible by name for what this trainer does not run, with the values and what would do."""
    first = site.stages[0]
    if site.devices != ranks:
        raise Infeasible(f"the strategy is for {site.devices} devices, {ranks} ranks were started")
    for stage in site.stages[1:]:
        for name in ("tp", "sp", "cp", "ep", "dp", "rows_per_dp"):
            if getattr(stage, name) != getattr(first, name):
                raise Infeasible(
                    f"{name} is {getattr(first, name)} in one pipeline stage and {getattr(stage, name)} in another: "
                    f"give all stages the same; unlike chips take unlike numbers of layers"
                )
    check_pipeline(site, model.layers)
    for name, value, runs in (
        ("offload", site.offload, (False,)), ("precision", site.precision, ("fp32", "bf16")),
        ("gated_mlp", model.gated_mlp, (True,)), ("biases", model.biases, (False,)), ("norm_biases", model.norm_biases, (False,)),
        ("learned_positions", model.learned_positions, (0,)), ("towers", model.towers, ((),)),
    ):  # fmt: skip
        if value not in runs:
            raise Infeasible(f"{name} is {value}: this trainer runs {name} {' or '.join(map(str, runs))}")
    if model.sliding_window is not None and model.sliding_window < seq:
        raise Infeasible(f"the model's attention window is {model.sliding_window}, seq is {seq}: shorten seq")
    if site.replicas > 1 and (site.zero == 0 or first.dp % site.replicas):
        raise Infeasible(f"replicas is {site.replicas}: it needs zero 1 to 3 and must divide dp={first.dp}")
    if seq % first.cp:
        raise Infeasible(f"seq {seq} does not divide by cp={first.cp}")
    if first.tp > 1:
        _check_tensor_parallel(first, seq, model)
    if first.ep > 1 and (model.moe is None or model.moe.experts % first.ep or first.dp % first.ep):
        experts = model.moe.experts if model.moe else 0
        raise Infeasible(f"ep={first.ep} must divide dp={first.dp} and the model's {experts} experts")
    zero_bubble = site.schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")
    if zero_bubble and site.recompute != "none":
        raise Infeasible(
            f"recompute {site.recompute} under schedule {site.schedule}: use 1f1b or interleaved_1f1b"
        )
    if site.zero and model.tied_embeddings and site.schedule in V_SHAPED:
        raise Infeasible(f"zero {site.zero} with tied embeddings under {site.schedule}: use zero 0 or 1f1b")


def _check_tensor_parallel(stage: Stage, seq: int, model: Model) -> None:
    if model.moe is not None:
        raise Infeasible(f"tp={stage.tp} with experts: split them with ep")
    for name, count in (
        ("kv_heads", model.kv_heads),
        ("heads", model.heads),
        ("ffn_hidden", model.ffn_hidden),
    ):
        if count % stage.tp:
            raise Infeasible(f"tp={stage.tp} does not divide the model's {name} {count}")
    if stage.sp and seq // stage.cp % stage.tp:
        raise Infeasible(f"sp splits a sequence of {seq // stage.cp} over tp={stage.tp}: it must divide")


# ---- how it is built -------------------------------------------------------------------------------------------------


def build(model_spec: Model, strategy: Strategy, seed: int, site_id: str = "") -> Layout:
    """Build, shard, then allocate and fill.  Without an initialised process group: one plain rank.  Raises Infeasible."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    site = strategy.site(site_id)
    check_layout(site, strategy.seq, model_spec, ranks)
    stage = site.stages[0]
    place = place_of(rank, stage)
    groups = Groups(site, model_spec) if ranks > 1 else None
    pipeline = None
    with torch.device("meta"):
        if len(site.stages) > 1:
            model, pipeline = Pipeline.build(
                model_spec, site, place.stage, groups.group("pp") if groups else None
            )
        else:
            model = Decoder(model_spec)
    model.recompute = site.recompute == "full"
    model.sequence_parts = stage.tp if stage.sp else 1
    model.offset_parts = place.c
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        layer.recompute_attention = site.recompute == "selective"
        if groups is not None and stage.cp > 1:
            layer.attention.context = groups.group("cp")
    sharded: list[Any] = []
    experts: list[Any] = []
    if groups is not None:
        if stage.ep > 1:
            experts = _split_experts(model, groups)
        if stage.tp > 1:
            _tensor_parallel(model, groups.mesh["tp"], sequence=stage.sp)
        if site.zero and stage.dp > 1:
            sharded = _fully_shard(model, pipeline, groups.data_mesh(), site, experts)
    model.to_empty(device=device())
    _fill(model, seed, model_spec.layers)
    called: nn.Module = model
    vendors = {one.chip_class.split("/")[0] for one in site.stages}
    wrapped = ranks > 1 and ranks == stage.dp and not site.zero and stage.ep == 1 and len(vendors) == 1
    if wrapped:
        called = nn.parallel.DistributedDataParallel(model)
    loss_scale = float(stage.dp) if wrapped or sharded else 1.0
    sums = _sums(model, site, groups, experts, loss_scale, wrapped, bool(sharded)) if groups else []
    layout = Layout(
        model, called, site, place, (0, 0), loss_scale, sums, _copies(model, site), pipeline,
        stage.tp > 1 and stage.sp, sharded,
    )  # fmt: skip
    layout.set_rows(stage.rows_per_dp)
    return layout


class Groups:
    """The device mesh of one site, and groups along its dimensions; dimensions of one rank are left out."""

    def __init__(self, site: SiteStrategy, model: Model) -> None:
        stage = site.stages[0]
        pp = len(site.stages)
        self._sizes = {
            "pp": pp, "rep": site.replicas, "shard": stage.dp // site.replicas, "cp": stage.cp, "tp": stage.tp,
        }  # fmt: skip
        self.mesh = _mesh(self._sizes)
        self._expert_sizes = {
            "pp": pp,
            "outer": stage.dp // stage.ep,
            "ep": stage.ep,
            "cp": stage.cp,
            "tp": stage.tp,
        }
        self.expert_mesh = _mesh(self._expert_sizes) if stage.ep > 1 else None
        self.tie: Any = None
        if pp > 1 and model.tied_embeddings and site.schedule not in V_SHAPED:
            self.tie = _ends(pp, stage.devices)

    def group(self, name: str) -> Any:
        return self.mesh[name].get_group() if self._sizes[name] > 1 else None

    def present(self, names: Sequence[str]) -> list[Any]:
        return [self.mesh[name].get_group() for name in names if self._sizes[name] > 1]

    def outer(self) -> list[Any]:
        assert self.expert_mesh is not None
        return [
            self.expert_mesh[name].get_group() for name in ("outer", "cp") if self._expert_sizes[name] > 1
        ]

    def data_mesh(self) -> Any:
        names = [name for name in ("rep", "shard") if self._sizes[name] > 1]
        if names == ["rep"]:
            return None  # one copy a rank: nothing to shard
        return self.mesh[tuple(names)] if len(names) > 1 else self.mesh[names[0]]


_known: dict[tuple[int, tuple[tuple[str, int], ...]], Any] = {}  # (id of the world's group, sizes) -> mesh


def _mesh(sizes: dict[str, int]) -> Any:
    """A mesh is made once for each shape and world: its groups hold sockets and threads."""
    from torch.distributed.device_mesh import init_device_mesh

    kept = tuple((name, size) for name, size in sizes.items() if size > 1)
    key = (id(dist.group.WORLD), kept)
    if key not in _known:
        names, shape = zip(*kept, strict=True)
        _known[key] = init_device_mesh(device().type, shape, mesh_dim_names=names)
    return _known[key]


def _ends(stages: int, per_stage: int) -> Any:
    """The group of this rank's column with its first and last stage; None for a rank between them."""
    key = (id(dist.group.WORLD), (("ends", stages), ("of", per_stage)))
    if key not in _known:
        mine = None
        for column in range(per_stage):
            members = [column, (stages - 1) * per_stage + column]
            group = dist.new_group(members)
            if dist.get_rank() in members:
                mine = group
        _known[key] = mine
    return _known[key]


def forget_groups() -> None:
    """The world's group is about to be made anew."""
    _known.clear()


def _tensor_parallel(model: Decoder, mesh: Any, *, sequence: bool) -> None:
    """Megatron's split (Shoeybi et al. 2019, section 3): columns into a block, rows out of it.  With sequence parallelism
    (Korthikanti et al. 2022) what lies between blocks is split along the sequence, and the vocabulary over ranks."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    between: Any = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(), "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=between), "mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=between),
    }  # fmt: skip
    whole: dict[str, Any] = {}
    if sequence:
        plan["norm_attention"] = plan["norm_mlp"] = SequenceParallel(use_local_output=True)
        plan["attention"] = PrepareModuleInput(
            input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
        )
        plan["mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        if hasattr(model, "embedding"):
            whole["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        if model.last:
            whole["norm"] = SequenceParallel(use_local_output=True)
        if model.head is not None:
            whole["head"] = ColwiseParallel(
                input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
            )
    for layer in model.layers.values():
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, whole)


def _split_experts(model: Decoder, groups: Groups) -> list[Any]:
    """Each rank keeps a slice of the experts, as a sharded tensor, so that checkpoints know the whole."""
    from torch.distributed.tensor import DTensor, Shard

    assert groups.expert_mesh is not None
    mesh = groups.expert_mesh["ep"]
    found = []
    for module in model.modules():
        if isinstance(module, Experts):
            module.group = mesh.get_group()
            for name in ("gate", "up", "down"):
                whole = getattr(module, name)
                own = whole[: whole.shape[0] // mesh.size()]
                parameter = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))
                setattr(module, name, parameter)
                found.append(parameter)
    return found


def _fully_shard(
    model: Decoder, pipeline: Pipeline | None, mesh: Any, site: SiteStrategy, ignored: list[Any]
) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        return []
    reshard = site.zero == 3 and pipeline is None
    more: dict[str, Any] = {"mesh": mesh, "ignored_params": set(ignored) or None}
    tops: list[Any] = list(pipeline.parts) if pipeline is not None else [model]
    layers = list(model.layers.values())
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard, **more)
    for top in tops:
        fully_shard(top, reshard_after_forward=reshard, **more)
    return [*layers, *tops]


def _sums(
    model: Decoder,
    site: SiteStrategy,
    groups: Groups,
    experts: list[Any],
    scale: float,
    wrapped: bool,
    sharded: bool,
) -> list[Sum]:
    special = {id(parameter) for parameter in experts}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in special]
    names = () if wrapped else ("cp",) if sharded else ("rep", "shard", "cp")
    found = [Sum(dense, groups.present(names))]
    if experts:
        found.append(Sum([p for p in model.parameters() if id(p) in special], groups.outer(), scale))
    if groups.tie is not None:
        found.append(Sum([model.embedding.weight], [groups.tie], tie=True))
    return [one for one in found if one.groups or one.divisor != 1.0]


def _copies(model: Decoder, site: SiteStrategy) -> Callable[[Any], int]:
    stage = site.stages[0]
    twice = model.tied and len(site.stages) > 1 and site.schedule not in V_SHAPED
    tied = model.embedding.weight if twice and hasattr(model, "embedding") else None

    def copies(parameter: Any) -> int:
        distinct = 1
        if hasattr(parameter, "device_mesh"):
            for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
                distinct *= 1 if placement.is_replicate() else size  # torch has shards that are no `Shard`
        ends = 2 if parameter is tied else 1
        return ends * (stage.devices // distinct)

    return copies


def _local_grad(parameter: Any) -> Any:
    """This rank's part of a gradient; zeros where nothing reached the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = parameter.grad
    if hasattr(grad, "placements") and grad.placements != parameter.placements:
        grad = parameter.grad = grad.redistribute(placements=parameter.placements)
    return grad.to_local() if hasattr(grad, "to_local") else grad


@torch.no_grad()
def _fill(model: nn.Module, seed: int, layers: int) -> None:
    for name, parameter in model.named_parameters():
        whole = initial_value(name, parameter.shape, seed, layers).to(device())
        local: Any = parameter
        if hasattr(local, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            shard: Any = distribute_tensor(whole, local.device_mesh, local.placements, src_data_rank=None)
            local.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(whole)
