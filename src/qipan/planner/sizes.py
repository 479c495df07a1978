"""A model as numbers that broadcast: scalars for one model, arrays where many runs are costed at once."""

from dataclasses import dataclass

from qipan.planner.constants import Number
from qipan.workload.model import (
    Model,
    attention_weights,
    dense_weights,
    expert_layers,
    moe_weights,
    norm_weights,
    projections,
    score_width,
    tower_flops_per_token,
    tower_weights,
)

#: most matrices of an attention block (multi-head latent attention)
PROJECTIONS = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """`projections`: PROJECTIONS pairs (outputs, inputs) of attention's matrices, zeros where there are fewer; `gates` 2 with
    a gated feed-forward; `expert_share`: the part of the layers that have experts; `near_weights` of one layer are all
    but its experts' (the mean over the layers), `expert_weights` those."""

    layers: Number
    hidden: Number
    vocab: Number
    heads: Number
    kv_width: Number
    score_width: Number
    window: Number  # keys that a query meets; 0: all
    projections: tuple[tuple[Number, Number], ...]
    gates: Number
    ffn: Number
    expert_share: Number
    experts: Number
    experts_per_token: Number
    expert_ffn: Number
    shared_ffn: Number
    near_weights: Number
    expert_weights: Number
    tower_flops: Number = 0.0  # of encoders in front, forward and backward, at each token of the decoder's
    tower_weights: Number = 0.0
    tower_values: Number = 0.0  # kept for their backward pass at each token of the decoder's


def sizes(model: Model) -> Sizes:
    moe = model.moe
    share = expert_layers(model) / model.layers
    routed = 0
    if moe is not None:
        routed = (3 if model.gated_mlp else 2) * model.hidden * moe.expert_ffn_hidden * moe.experts
    near = attention_weights(model) + norm_weights(model)
    near_mean = near + (1 - share) * dense_weights(model) + share * (moe_weights(model) - routed)
    pairs = [(float(outputs), float(inputs)) for outputs, inputs in projections(model)]
    pairs += [(0.0, 0.0)] * (PROJECTIONS - len(pairs))
    return Sizes(
        float(model.layers), float(model.hidden), float(model.vocab), float(model.heads),
        float(model.mla.latent_rank + model.mla.rotary_dim if model.mla else 2 * model.kv_heads * model.head_dim),
        score_width(model), float(model.sliding_window or 0), tuple(pairs), 2.0 if model.gated_mlp else 1.0,
        float(model.ffn_hidden), share, float(moe.experts if moe else 1), float(moe.experts_per_token if moe else 1),
        float(moe.expert_ffn_hidden if moe else 0),
        float(moe.shared_experts * (moe.shared_ffn_hidden or moe.expert_ffn_hidden) if moe else 0),
        near_mean, share * routed, tower_flops_per_token(model), float(tower_weights(model)),
        sum(17.0 * one.share * one.layers * one.hidden * one.patches / one.tokens for one in model.towers),
    )  # fmt: skip
