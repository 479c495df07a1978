"""A model's own config.json gives the published number of parameters."""

import json

import pytest

from qipan.workload.huggingface import load_config
from qipan.workload.model import parameter_count


def config(model_type, layers, hidden, heads, kv, ffn, vocab, **more):
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab, **more,
    }  # fmt: skip


DEEPSEEK = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
CONFIGS = {
    "llama-3.2-1b": (config("llama", 16, 2048, 32, 8, 8192, 128256, tie_word_embeddings=True, head_dim=64), 1_235_814_400),
    "llava-1.5-7b": (
        {
            "model_type": "llava", "text_config": config("llama", 32, 4096, 32, 32, 11008, 32064),
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            },
        },
        7_063_427_072,
    ),
    "mistral-7b": (config("mistral", 32, 4096, 32, 8, 14336, 32000, sliding_window=4096), 7_241_732_096),
    "qwen2.5-7b": (config("qwen2", 28, 3584, 28, 4, 18944, 152064, tie_word_embeddings=False), 7_615_616_512),
    "qwen3-8b": (config("qwen3", 36, 4096, 32, 8, 12288, 151936, head_dim=128), 8_190_735_360),
    "gemma-7b": (config("gemma", 28, 3072, 16, 16, 24576, 256000, head_dim=256), 8_537_680_896),
    "gemma-2-9b": (config("gemma2", 42, 3584, 16, 8, 14336, 256000, head_dim=256), 9_241_705_984),
    "phi-3-mini": (config("phi3", 32, 3072, 32, 32, 8192, 32064), 3_821_079_552),
    "pythia-12b": (config("gpt_neox", 36, 5120, 40, None, 20480, 50688), 11_846_072_320),
    "mixtral-8x7b": (
        config("mixtral", 32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    "qwen1.5-moe": (
        config(
            "qwen2_moe", 24, 2048, 16, 16, 5632, 151936, num_experts=60, num_experts_per_tok=4,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
    ),
    "qwen3-30b-a3b": (
        config(
            "qwen3_moe", 48, 2048, 32, 4, 6144, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "deepseek-v2-lite": (
        config(
            "deepseek_v2", 27, 2048, 16, 16, 10944, 102400, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1, topk_method="greedy", **DEEPSEEK,
        ),
        15_706_484_224,
    ),
    "deepseek-v3": (
        config(
            "deepseek_v3", 61, 7168, 128, 128, 18432, 129280, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1,
            num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3, topk_method="noaux_tc", **DEEPSEEK,
        ),
        671_026_419_200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_published_count(name, tmp_path):
    found, parameters = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert parameter_count(load_config(tmp_path / "config.json")) == parameters
