"""The built-in trainer: executes any `Strategy` the planner makes for it.  `python -m qipan.trainer` is one rank.
`attach` gives an own torch loop progress, checkpoints and restarts on other ranks; `feed` and `fed` are the two ends of a stream
between stages of a task.

Importing this package costs nothing; torch comes in with the modules below it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qipan.trainer.attached import Attached
    from qipan.trainer.stream import Fed, Prepare

__all__ = ["attach", "fed", "feed", "output_of"]


def attach(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", folder: str = "checkpoints"
) -> "Attached":
    """See `qipan.trainer.attached`.  `folder` is used outside Qipan only."""
    from qipan.trainer.attached import Attached

    return Attached(model, optimizer, folder)


def feed(prepare: "Prepare", samples: int = 0) -> None:
    """See `qipan.trainer.stream`.  `samples` is stated outside Qipan only."""
    from qipan.trainer.stream import feed

    feed(prepare, samples)


def fed(stage: str) -> "Fed":
    """See `qipan.trainer.stream`."""
    from qipan.trainer.stream import fed

    return fed(stage)


def output_of(number: int = 0) -> "Path":
    """See `qipan.trainer.stream`."""
    from qipan.trainer.stream import output_of

    return output_of(number)
