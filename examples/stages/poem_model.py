"""A small model of the next character, and how text becomes its input."""

import torch

CONTEXT, VOCAB = 4, 4096


def codes(text: str) -> list[int]:
    return [ord(character) % VOCAB for character in text]


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Embedding(VOCAB, 24), torch.nn.Flatten(-2), torch.nn.Linear(24 * CONTEXT, 64), torch.nn.Tanh(),
        torch.nn.Linear(64, VOCAB),
    )  # fmt: skip


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Nat per character.  rows: (count, characters), each predicted from the CONTEXT before it."""
    seen = rows.unfold(1, CONTEXT, 1)[:, :-1]
    return torch.nn.functional.cross_entropy(model(seen).flatten(0, 1), rows[:, CONTEXT:].flatten())
