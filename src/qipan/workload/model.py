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


def parameter_count(model: Model) -> int:
    """All weights of a dense or expert decoder: embeddings, attention, feed-forward, norms, head."""
    return _layer_weights(model, every_expert=True) * model.layers + _outer_weights(model)


def train_flops_per_token(model: Model, seq: int) -> float:
    """Model FLOP of forward and backward per token: 6 per weight that a token meets (embedding look-up is none, the
    head is met even when tied) and 12 * layers * heads * head_dim * seq / 2 for causal attention
    (PaLM, Chowdhery et al. 2022, appendix B, causal half)."""
    met = _layer_weights(model, every_expert=False) * model.layers + model.hidden * model.vocab
    return 6.0 * met + 6.0 * model.layers * model.heads * model.head_dim * seq


def _layer_weights(model: Model, *, every_expert: bool) -> int:
    attention = 2 * model.hidden * (model.heads + model.kv_heads) * model.head_dim
    matrices = 3 if model.gated_mlp else 2
    if model.moe is None:
        feed_forward = matrices * model.hidden * model.ffn_hidden
    else:
        experts = (
            model.moe.experts if every_expert else model.moe.experts_per_token
        ) + model.moe.shared_experts
        feed_forward = matrices * model.hidden * model.moe.expert_ffn_hidden * experts
        feed_forward += model.hidden * model.moe.experts
    return attention + feed_forward + 2 * model.hidden


def _outer_weights(model: Model) -> int:
    return model.vocab * model.hidden * (1 if model.tied_embeddings else 2) + model.hidden
