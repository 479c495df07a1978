"""Model architectures as the planner and the trainer see them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moe:
    """Expert layers.  `shared_ffn_hidden` 0: as wide as an expert.  `router_bias`: one value an expert beside the router
    (DeepSeek-V3); `shared_gate`: the shared expert's output is gated (Qwen2-MoE)."""

    experts: int
    experts_per_token: int
    expert_ffn_hidden: int
    shared_experts: int = 0
    dense_layers: int = 0  # leading layers that are dense
    every: int = 1  # an expert layer every so many layers
    shared_ffn_hidden: int = 0
    router_bias: bool = False
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).  `query_rank` 0: queries are not compressed; the other
    sizes are of one head, a latent of `latent_rank` stands for all keys and values."""

    query_rank: int
    latent_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Tower:
    """An encoder of pictures or sound in front of the decoder (ViT, Dosovitskiy et al. 2021; Whisper): plain layers with
    biases, every patch meets every other.  An item is `patches` patches of `patch_values` values, and gives `tokens` tokens to
    the decoder through matrices `projector` (outputs, inputs) with biases.  `extra` weights: class embedding, norms around
    the layers.  `share`: of a sequence's tokens, those that come from here."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn_hidden: int
    patches: int
    patch_values: int
    tokens: int
    projector: tuple[tuple[int, int], ...] = ()
    extra: int = 0
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder-only transformer (Llama-like unless flags say otherwise).  `vocab` 0: taken from the data's
    tokens when training starts.  All sizes are counts.  `biases`: on every matrix, `qkv_biases`: on queries, keys and
    values alone; `norms` a layer; `learned_positions`: rows of a position table."""

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
    mla: Mla | None = None
    qkv_biases: bool = False
    qk_norm: bool = False
    norms: int = 2
    embedding_norm: bool = False
    head_bias: bool = False
    towers: tuple[Tower, ...] = ()


def parameter_count(model: Model) -> int:
    """All weights of a dense or expert decoder: embeddings, attention, feed-forward, norms, head; and of its towers."""
    experts = expert_layers(model)
    dense = model.layers - experts
    around = (attention_weights(model) + norm_weights(model)) * model.layers
    layers = around + dense * dense_weights(model) + experts * moe_weights(model)
    return layers + outer_weights(model) + tower_weights(model)


def tower_weights(model: Model) -> int:
    """Layers, patch embedding, a position each patch, projector, and what is named beside them."""
    return sum(
        one.layers * _tower_layer(one) + one.hidden * (one.patch_values + one.patches) + one.extra
        + sum(outputs * inputs + outputs for outputs, inputs in one.projector)
        for one in model.towers
    )  # fmt: skip


def _tower_layer(one: Tower) -> int:
    """Four matrices of attention, two of feed-forward, two norms, all with biases."""
    return 4 * (one.hidden + 1) * one.hidden + (2 * one.hidden + 1) * one.ffn_hidden + 5 * one.hidden


def tower_flops_per_token(model: Model) -> float:
    """Model FLOP of forward and backward of all towers, laid at each token of the decoder's sequence: 6 per weight that a patch
    meets and 12 * layers * hidden * patches of attention (no mask), for the patches behind a token, times their share."""
    total = 0.0
    for one in model.towers:
        patch = one.layers * (6.0 * _tower_layer(one) + 12.0 * one.hidden * one.patches)
        patch += 6.0 * one.hidden * one.patch_values
        projected = 6.0 * sum(outputs * inputs for outputs, inputs in one.projector)
        total += one.share * (patch * one.patches / one.tokens + projected)
    return total


def train_flops_per_token(model: Model, seq: int) -> float:
    """Model FLOP of forward and backward per token: 6 per weight that a token meets (embedding look-up is none, the
    head is met even when tied) and 12 * layers * heads * head_dim * seq / 2 for causal attention
    (PaLM, Chowdhery et al. 2022, appendix B, causal half)."""
    decoder = 6.0 * met_weights(model) + 6.0 * model.layers * score_width(model) * seq
    return decoder + tower_flops_per_token(model)


def hardware_flops_per_token(model: Model, seq: int, *, recompute: bool) -> float:
    """What a device that computes whole score matrices works: attention in full, and with full recomputation the forward
    pass of the layers once more (Narayanan et al. 2021, equation 3)."""
    layers = met_weights(model) - model.hidden * model.vocab
    attention = 12.0 * model.layers * score_width(model) * seq
    return (6.0 * layers + attention) * (4 / 3 if recompute else 1) + 6.0 * model.hidden * model.vocab


def met_weights(model: Model) -> int:
    """Weights that a token meets: those of its experts, and the head."""
    experts = expert_layers(model)
    met = (attention_weights(model) + norm_weights(model)) * model.layers
    met += dense_weights(model) * (model.layers - experts)
    return met + moe_weights(model, met=True) * experts + model.hidden * model.vocab


def score_width(model: Model) -> float:
    """Multiplications of one query with one key and value, over all heads, halved: heads * head_dim where both are
    as wide."""
    if model.mla is None:
        return model.heads * model.head_dim
    return model.heads * (model.mla.plain_dim + model.mla.rotary_dim + model.mla.value_dim) / 2


def expert_layers(model: Model) -> int:
    return 0 if model.moe is None else (model.layers - model.moe.dense_layers) // model.moe.every


def projections(model: Model) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of each matrix of attention, queries, keys and values of plain attention as one."""
    hidden, heads = model.hidden, model.heads
    if model.mla is None:
        wide = (heads + 2 * model.kv_heads) * model.head_dim
        return ((wide, hidden), (hidden, heads * model.head_dim))
    mla = model.mla
    query = heads * (mla.plain_dim + mla.rotary_dim)
    down = ((mla.query_rank, hidden), (query, mla.query_rank)) if mla.query_rank else ((query, hidden),)
    return (
        *down, (mla.latent_rank + mla.rotary_dim, hidden),
        (heads * (mla.plain_dim + mla.value_dim), mla.latent_rank), (hidden, heads * mla.value_dim),
    )  # fmt: skip


def attention_weights(model: Model) -> int:
    count = sum(outputs * inputs for outputs, inputs in projections(model))
    if model.mla is not None:
        return count + model.mla.query_rank + model.mla.latent_rank  # their norms
    if model.biases or model.qkv_biases:
        count += (model.heads + 2 * model.kv_heads) * model.head_dim
    if model.biases:
        count += model.hidden
    return count + (2 * model.head_dim if model.qk_norm else 0)


def norm_weights(model: Model) -> int:
    return model.norms * model.hidden * (2 if model.norm_biases else 1)


def dense_weights(model: Model) -> int:
    matrices = 3 if model.gated_mlp else 2
    biases = (matrices - 1) * model.ffn_hidden + model.hidden if model.biases else 0
    return matrices * model.hidden * model.ffn_hidden + biases


def moe_weights(model: Model, *, met: bool = False) -> int:
    """Of one expert layer: all experts, or those that a token meets."""
    if model.moe is None:
        return 0
    moe, matrices = model.moe, 3 if model.gated_mlp else 2
    experts = moe.experts_per_token if met else moe.experts
    width = experts * moe.expert_ffn_hidden + moe.shared_experts * (
        moe.shared_ffn_hidden or moe.expert_ffn_hidden
    )
    router = model.hidden * moe.experts + (moe.experts if moe.router_bias else 0)
    return matrices * model.hidden * width + router + (model.hidden if moe.shared_gate else 0)


def outer_weights(model: Model) -> int:
    """Embeddings, positions, head, final norm, and a norm behind the embedding."""
    norm = model.hidden * (2 if model.norm_biases else 1)
    tables = model.vocab * (1 if model.tied_embeddings else 2) + model.learned_positions
    return (
        tables * model.hidden + norm * (2 if model.embedding_norm else 1)
        + (model.vocab if model.head_bias else 0)
    )  # fmt: skip
