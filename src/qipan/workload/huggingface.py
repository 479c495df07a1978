"""A model's `config.json` as Hugging Face transformers writes it becomes a `Model`."""

import json
from pathlib import Path
from typing import Any

from qipan.errors import InvalidInput
from qipan.workload.model import Model, Moe

SIZE_MAX = 1 << 20
COUNT_MAX = 10_000_000
#: model_type -> (names of the expert count, the expert width), empty for dense models.
FAMILIES = {
    "llama": ("", ""),
    "mistral": ("", ""),
    "qwen2": ("", ""),
    "qwen3": ("", ""),
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}


def load_config(path: Path) -> Model:
    """The architecture in a config.json.  Raises InvalidInput for a file that is missing, no JSON object, of a family
    whose layout this version does not know (its parameter count would be wrong), or short of a field."""
    if not path.is_file():
        raise InvalidInput(f"{path}: no such config.json; give the path from the task file's folder")
    if path.stat().st_size > SIZE_MAX:
        raise InvalidInput(f"{path}: is {path.stat().st_size} bytes; a config.json may have {SIZE_MAX}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidInput(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{path}: must be a JSON object such as {{'model_type': 'llama', ...}}")
    return _model(config, str(path))


def _model(config: dict[str, Any], path: str) -> Model:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InvalidInput(
            f"{path}: model_type {str(family)[:40]!r} is not one of {', '.join(FAMILIES)}; "
            "write the architecture in the task file under `model:`"
        )
    heads = _count(config, "num_attention_heads", path)
    hidden = _count(config, "hidden_size", path)
    if not config.get("head_dim") and hidden % heads:
        raise InvalidInput(
            f"{path}: num_attention_heads {heads} does not divide hidden_size {hidden}; add head_dim"
        )
    return Model(
        Path(path).parent.name or "config",
        _count(config, "num_hidden_layers", path),
        hidden,
        heads,
        _count(config, "num_key_value_heads", path, heads),
        _count(config, "head_dim", path, hidden // heads),
        _count(config, "intermediate_size", path),
        _count(config, "vocab_size", path),
        tied_embeddings=config.get("tie_word_embeddings") is True,
        moe=_moe(config, path, *FAMILIES[family]),
        sliding_window=_window(config, path),
        max_seq=_count(config, "max_position_embeddings", path, 1),
    )


def _moe(config: dict[str, Any], path: str, experts: str, width: str) -> Moe | None:
    if not experts:
        return None
    return Moe(
        _count(config, experts, path),
        _count(config, "num_experts_per_tok", path, 2),
        _count(config, width, path),
    )


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
