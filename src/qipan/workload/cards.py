"""Model cards that ship: public architectures, sizes as published with the weights."""

from qipan.workload.model import Model, Moe

CARDS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        Model("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
        Model("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Model("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        Model("llama-3.1-405b", 126, 16384, 128, 8, 128, 53248, 128256),
        Model("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),  # its biases on q, k, v (0.002 %) are left out
        Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, moe=Moe(8, 2, 14336)),
        Model(
            "gpt3-175b", 96, 12288, 96, 96, 128, 49152, 50257, gated_mlp=False, tied_embeddings=True,
            biases=True, norm_biases=True, learned_positions=2048, max_seq=2048,
        ),
        Model("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000),
    )
}  # fmt: skip
