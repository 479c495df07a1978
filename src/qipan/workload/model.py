"""Model architectures as the planner and the trainer see them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moe:
    experts: int
    experts_per_token: int
    expert_ffn_hidden: int
    shared_experts: int = 0
    dense_layers: int = 0  # leading layers that are dense
    every: int = 1  # an expert layer every so many layers


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder-only transformer (Llama-like unless flags say otherwise).  `vocab` 0: taken from the data's
    tokens when training starts.  All sizes are counts."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    moe: Moe | None = None
    sliding_window: int | None = None
    biases: bool = False
    norm_biases: bool = False
    learned_positions: int = 0
    max_seq: int = 0
