"""A Llama-like decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Layers stand in a ModuleDict, so that a stage may delete layers and the others keep their names.  Head counts follow
from the projections' own sizes, so that a tensor-parallel shard works unchanged.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qipan.trainer.collectives import gather_sequence
from qipan.trainer.feedforward import Experts, Mlp, is_expert_layer
from qipan.workload import Model


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.q = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.k = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.v = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.o = nn.Linear(model.heads * model.head_dim, model.hidden, bias=False)
        self.context: Any = None  # group of ranks that hold the other parts of the sequence

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x: (batch, seq, hidden); of a context-parallel rank, its own part of the sequence."""
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        mask = None
        if self.context is not None:
            k, v = gather_sequence(k, 2, self.context), gather_sequence(v, 2, self.context)
            before = dist.get_rank(self.context) * seq
            rows = torch.arange(before, before + seq, device=x.device)
            mask = rows[:, None] >= torch.arange(k.shape[2], device=x.device)[None, :]
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, model: Model, number: int) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(model.hidden, eps=1e-5)
        self.attention = Attention(model)
        self.norm_mlp = nn.RMSNorm(model.hidden, eps=1e-5)
        self.mlp: nn.Module
        if model.moe is not None and is_expert_layer(model.moe, number):
            self.mlp = Experts(model.hidden, model.moe)
        else:
            self.mlp = Mlp(model.hidden, model.ffn_hidden)
        self.recompute_attention = False

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.recompute_attention and self.training:
            x = x + checkpoint(self.attention, self.norm_attention(x), rotary, use_reentrant=False)
        else:
            x = x + self.attention(self.norm_attention(x), rotary)
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token ids (batch, seq) -> logits (batch, seq, vocab).  One that holds only `layers` of the model keeps the whole
    model's names; `first` and `last` say whether it begins with the embedding and ends with the head."""

    def __init__(
        self, model: Model, layers: Iterable[int] | None = None, *, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.tied = model.tied_embeddings
        self.first, self.last = first, last
        self.recompute = False
        self.sequence_parts = 1  # sequence parallelism: between blocks a rank holds one part of its sequence
        self.offset_parts = 0  # context parallelism: so many parts of the sequence lie before this rank's
        if first or (last and self.tied):
            self.embedding = nn.Embedding(model.vocab, model.hidden)
        numbers = range(model.layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Layer(model, i) for i in numbers})
        if last:
            self.norm = nn.RMSNorm(model.hidden, eps=1e-5)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if last and not self.tied else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, list(self.layers), first=self.first, last=self.last)

    def run(self, x: Tensor, names: Iterable[str], *, first: bool, last: bool) -> Tensor:
        """From tokens (when `first`) or hidden states, through the layers of these names, to logits (when `last`) or
        hidden states."""
        seq = x.shape[1] if first else x.shape[1] * self.sequence_parts
        rotary = rotary_tables(seq, self.head_dim, x.device, self.offset_parts * seq)
        if first:
            x = self.embedding(x)
        for name in names:
            if self.recompute and self.training:
                x = checkpoint(self.layers[name], x, rotary, use_reentrant=False)
            else:
                x = self.layers[name](x, rotary)
        if not last:
            return x
        x = self.norm(x)
        if self.head is not None:
            return self.head(x)  # type: ignore[no-any-return]
        weight: Any = self.embedding.weight
        if hasattr(weight, "device_mesh") and not hasattr(x, "device_mesh"):  # vocabulary split over ranks
            from torch.distributed.tensor import DTensor, Replicate, Shard

            x = DTensor.from_local(x, weight.device_mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        return functional.linear(x, weight)


class Part(nn.Module):
    """Some neighbouring layers of a rank that holds several such parts of a pipeline."""

    def __init__(self, holder: Decoder, names: list[str], *, first: bool, last: bool) -> None:
        super().__init__()
        self.run = partial(holder.run, names=names, first=first, last=last)
        self.names = names
        self.layers = nn.ModuleList(holder.layers[name] for name in names)
        if first or (last and holder.tied):
            self.embedding = (
                holder.embedding
            )  # zero-bubble schedules look for weights among the part's parameters
        if last:
            self.norm, self.head = holder.norm, holder.head

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over tokens, in nat: means of means would be wrong when ranks hold unlike rows."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def rotary_tables(seq: int, head_dim: int, device: torch.device, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin, each (seq, head_dim / 2), of the positions from `first` on; Su et al. 2021, eq. 34, base 10,000."""
    frequency = 1.0 / (10_000.0 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))
    angle = torch.outer(torch.arange(first, first + seq, device=device).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def initial_value(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    """The whole starting value of one parameter, a function of (seed, name) alone: norms 1, the rest normal with
    deviation 0.02, output projections of residual branches divided by sqrt(2 layers) (Radford et al. 2019)."""
    if "norm" in name:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    residual = name.endswith(("attention.o.weight", ".down.weight", ".down"))
    deviation = 0.02 / (2 * layers) ** 0.5 if residual else 0.02
    return torch.randn(shape, generator=generator) * deviation
