"""Model cards that ship: public architectures, sizes as published with the weights."""

from qipan.workload.model import Model

CARDS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        Model("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
        Model("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Model("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        Model("llama-3.1-405b", 126, 16384, 128, 8, 128, 53248, 128256),
        Model("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000),
    )
}
