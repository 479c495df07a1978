"""A model's `config.json` as Hugging Face transformers writes it becomes a `Model`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qipan.errors import InvalidInput, NotFound
from qipan.files import text_in
from qipan.workload.model import Mla, Model, Moe, Tower

SIZE_MAX = 1 << 20
COUNT_MAX = 10_000_000


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type means that its config.json does not say.  `experts`, `width`: the names of the expert count and of the
    expert's width, empty for dense models; `flags`: of `Model`."""

    experts: str = ""
    width: str = ""
    tied: bool = False  # where the file says nothing
    flags: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(flags={"qkv_biases": True}),
    "qwen3": Family(flags={"qk_norm": True}),
    "gemma": Family(tied=True),
    "gemma2": Family(tied=True, flags={"norms": 4}),
    "phi3": Family(),
    "gpt_neox": Family(flags={"gated_mlp": False, "biases": True, "norm_biases": True}),
    "mixtral": Family("num_local_experts", "intermediate_size"),
    "qwen2_moe": Family("num_experts", "moe_intermediate_size", flags={"qkv_biases": True}),
    "qwen3_moe": Family("num_experts", "moe_intermediate_size", flags={"qk_norm": True}),
    "deepseek_v2": Family("n_routed_experts", "moe_intermediate_size"),
    "deepseek_v3": Family("n_routed_experts", "moe_intermediate_size"),
}


def load_config(path: Path) -> Model:
    """The architecture in a config.json.  Raises InvalidInput for a file that is missing, no JSON object, of a family
    whose layout this version does not know (its parameter count would be wrong), or short of a field."""
    try:
        text = text_in(path, "no such config.json; give the path from the task file's folder", SIZE_MAX)
    except (NotFound, InvalidInput) as error:
        raise InvalidInput(str(error)) from None  # its place is in the task file
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{path}: must be a JSON object such as {{'model_type': 'llama', ...}}")
    return _model(config, str(path))


def _with_tower(config: dict[str, Any], path: str) -> Model:
    """LLaVA 1.5: a CLIP encoder of pictures, two matrices, and the decoder of `text_config` (whose sizes must be stated)."""
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise InvalidInput(f"{path}: a llava needs the mappings text_config and vision_config")
    if vision.get("model_type") != "clip_vision_model":
        raise InvalidInput(
            f"{path}: vision_config is a {str(vision.get('model_type'))[:40]}, known is clip_vision_model"
        )
    decoder = _model(text, path)
    hidden, patch = _count(vision, "hidden_size", path), _count(vision, "patch_size", path)
    patches = (_count(vision, "image_size", path) // patch) ** 2
    tower = Tower(
        "clip", _count(vision, "num_hidden_layers", path), hidden, _count(vision, "num_attention_heads", path),
        _count(vision, "intermediate_size", path), patches + 1, 3 * patch**2, patches,
        ((decoder.hidden, hidden), (decoder.hidden, decoder.hidden)), extra=5 * hidden,  # class token, two norms
    )  # fmt: skip
    return replace(decoder, towers=(tower,))


def _model(config: dict[str, Any], path: str) -> Model:
    family = config.get("model_type")
    if family == "llava":
        return _with_tower(config, path)
    if family not in FAMILIES:
        raise InvalidInput(
            f"{path}: model_type {str(family)[:40]!r} is not one of {', '.join([*FAMILIES, 'llava'])}; "
            "write the architecture in the task file under `model:`"
        )
    known = FAMILIES[family]
    heads = _count(config, "num_attention_heads", path)
    hidden = _count(config, "hidden_size", path)
    latent = str(family).startswith("deepseek")  # a head of latent attention is as wide as the file says
    if not config.get("head_dim") and hidden % heads and not latent:
        raise InvalidInput(
            f"{path}: num_attention_heads {heads} does not divide hidden_size {hidden}; add head_dim"
        )
    return Model(
        Path(path).parent.name or "config",
        _count(config, "num_hidden_layers", path),
        hidden,
        heads,
        _count(config, "num_key_value_heads", path, heads),
        _mla(config, path).plain_dim + _mla(config, path).rotary_dim
        if latent
        else _count(config, "head_dim", path, hidden // heads),
        _count(config, "intermediate_size", path),
        _count(config, "vocab_size", path),
        tied_embeddings=config.get("tie_word_embeddings", known.tied) is True,
        moe=_moe(config, path, known),
        sliding_window=_window(config, path),
        max_seq=_count(config, "max_position_embeddings", path, 1),
        mla=_mla(config, path) if str(family).startswith("deepseek") else None,
        **known.flags,
    )


def _moe(config: dict[str, Any], path: str, family: Family) -> Moe | None:
    if not family.experts:
        return None
    shared_width = config.get("shared_expert_intermediate_size")
    return Moe(
        _count(config, family.experts, path),
        _count(config, "num_experts_per_tok", path, 2),
        _count(config, family.width, path),
        shared_experts=_optional(config, "n_shared_experts", path) or (1 if shared_width else 0),
        dense_layers=_optional(config, "first_k_dense_replace", path),
        shared_ffn_hidden=_optional(config, "shared_expert_intermediate_size", path),
        router_bias=config.get("topk_method") == "noaux_tc",
        shared_gate=shared_width is not None,
    )


def _mla(config: dict[str, Any], path: str) -> Mla:
    return Mla(
        _optional(config, "q_lora_rank", path), _count(config, "kv_lora_rank", path),
        _count(config, "qk_nope_head_dim", path), _count(config, "qk_rope_head_dim", path),
        _count(config, "v_head_dim", path),
    )  # fmt: skip


def _optional(config: dict[str, Any], key: str, path: str) -> int:
    """0 where it is absent, null or zero."""
    return _count(config, key, path) if config.get(key) else 0


def _window(config: dict[str, Any], path: str) -> int | None:
    """Qwen writes a window and switches it off beside it."""
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return None
    return _count(config, "sliding_window", path)


def _count(config: dict[str, Any], key: str, path: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= COUNT_MAX:
        raise InvalidInput(
            f"{path}: {key} is {str(value)[:40]!r}; it must be a whole number from 1 to {COUNT_MAX}"
        )
    return value
