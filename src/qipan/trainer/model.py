"""A Llama-like decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Layers stand in a ModuleDict, so that a stage may delete layers and the others keep their names.  Head counts follow
from the projections' own sizes, so that a tensor-parallel shard works unchanged.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from qipan.workload import Model


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.q = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.k = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.v = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.o = nn.Linear(model.heads * model.head_dim, model.hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x: (batch, seq, hidden)."""
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gate = nn.Linear(model.hidden, model.ffn_hidden, bias=False)
        self.up = nn.Linear(model.hidden, model.ffn_hidden, bias=False)
        self.down = nn.Linear(model.ffn_hidden, model.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(model.hidden, eps=1e-5)
        self.attention = Attention(model)
        self.norm_mlp = nn.RMSNorm(model.hidden, eps=1e-5)
        self.mlp = Mlp(model)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotary)
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token ids (batch, seq) -> logits (batch, seq, vocab)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.tied = model.tied_embeddings
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.layers = nn.ModuleDict({str(i): Layer(model) for i in range(model.layers)})
        self.norm = nn.RMSNorm(model.hidden, eps=1e-5)
        self.head = None if self.tied else nn.Linear(model.hidden, model.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rotary = rotary_tables(tokens.shape[1], self.head_dim, tokens.device)
        x = self.embedding(tokens)
        for layer in self.layers.values():
            x = layer(x, rotary)
        x = self.norm(x)
        if self.head is None:
            return functional.linear(x, self.embedding.weight)
        return self.head(x)  # type: ignore[no-any-return]


def rotary_tables(seq: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (seq, head_dim / 2); Su et al. 2021, eq. 34, base 10,000."""
    frequency = 1.0 / (10_000.0 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))
    angle = torch.outer(torch.arange(seq, device=device).float(), frequency)
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
    deviation = (
        0.02 / (2 * layers) ** 0.5 if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02
    )
    return torch.randn(shape, generator=generator) * deviation
