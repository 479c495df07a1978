"""Model cards that ship: public architectures, sizes as published with the weights."""

from qipan.workload.model import Mla, Model, Moe, Tower

#: CLIP ViT-L/14 at 336 pixels: 576 patches and a class token; norms before and behind the layers
CLIP_336 = Tower(
    "clip-vit-l-336",
    24,
    1024,
    16,
    4096,
    577,
    3 * 14 * 14,
    576,
    ((4096, 1024), (4096, 4096)),
    extra=1024 + 4 * 1024,
)

CARDS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        Model("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
        Model("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
        Model("llama-65b", 80, 8192, 64, 64, 128, 22016, 32000),
        Model("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Model("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        Model("llama-3.1-405b", 126, 16384, 128, 8, 128, 53248, 128256),
        Model("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied_embeddings=True),
        Model("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied_embeddings=True, qkv_biases=True),
        Model("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, qkv_biases=True),
        Model("qwen2.5-72b", 80, 8192, 64, 8, 128, 29568, 152064, qkv_biases=True),
        Model("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
        Model("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, qk_norm=True, moe=Moe(128, 8, 768)),
        Model("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 12288, 151936, qk_norm=True, moe=Moe(128, 8, 1536)),
        Model("llava-1.5-7b", 32, 4096, 32, 32, 128, 11008, 32064, towers=(CLIP_336,)),
        Model("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000),
        Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, moe=Moe(8, 2, 14336)),
        Model("mixtral-8x22b", 56, 6144, 48, 8, 128, 16384, 32000, moe=Moe(8, 2, 16384)),
        Model("gemma-7b", 28, 3072, 16, 16, 256, 24576, 256000, tied_embeddings=True),
        Model("gemma-2-9b", 42, 3584, 16, 8, 256, 14336, 256000, tied_embeddings=True, norms=4),
        Model("phi-3-mini", 32, 3072, 32, 32, 96, 8192, 32064),
        Model(
            "phi-2", 32, 2560, 32, 32, 80, 10240, 51200, gated_mlp=False, biases=True, norm_biases=True, norms=1,
            head_bias=True,
        ),
        Model(
            "falcon-7b", 32, 4544, 71, 1, 64, 18176, 65024, gated_mlp=False, tied_embeddings=True, norm_biases=True,
            norms=1,
        ),
        Model(
            "bloom-176b", 70, 14336, 112, 112, 128, 57344, 250880, gated_mlp=False, tied_embeddings=True, biases=True,
            norm_biases=True, embedding_norm=True,
        ),
        Model("pythia-12b", 36, 5120, 40, 40, 128, 20480, 50688, gated_mlp=False, biases=True, norm_biases=True),
        Model(
            "gpt2-xl", 48, 1600, 25, 25, 64, 6400, 50257, gated_mlp=False, tied_embeddings=True, biases=True,
            norm_biases=True, learned_positions=1024, max_seq=1024,
        ),
        Model(
            "opt-6.7b", 32, 4096, 32, 32, 128, 16384, 50272, gated_mlp=False, tied_embeddings=True, biases=True,
            norm_biases=True, learned_positions=2050, max_seq=2048,
        ),
        Model(
            "gpt3-175b", 96, 12288, 96, 96, 128, 49152, 50257, gated_mlp=False, tied_embeddings=True,
            biases=True, norm_biases=True, learned_positions=2048, max_seq=2048,
        ),
        Model(
            "deepseek-v2-lite", 27, 2048, 16, 16, 192, 10944, 102400,
            moe=Moe(64, 6, 1408, shared_experts=2, dense_layers=1), mla=Mla(0, 512, 128, 64, 128),
        ),
        Model(
            "deepseek-v2", 60, 5120, 128, 128, 192, 12288, 102400,
            moe=Moe(160, 6, 1536, shared_experts=2, dense_layers=1), mla=Mla(1536, 512, 128, 64, 128),
        ),
        Model(
            "deepseek-v3", 61, 7168, 128, 128, 192, 18432, 129280,
            moe=Moe(256, 8, 2048, shared_experts=1, dense_layers=3, router_bias=True),
            mla=Mla(1536, 512, 128, 64, 128),
        ),
    )
}  # fmt: skip
