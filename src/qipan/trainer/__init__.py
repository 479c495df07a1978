"""The built-in trainer: executes any `Strategy` the planner makes for it.  `python -m qipan.trainer` is one rank.
`attach` gives an own torch loop progress, checkpoints and restarts on other ranks.

Importing this package costs nothing; torch comes in with the modules below it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qipan.trainer.attached import Attached

__all__ = ["attach"]


def attach(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", folder: str = "checkpoints"
) -> "Attached":
    """See `qipan.trainer.attached`.  `folder` is used outside Qipan only."""
    from qipan.trainer.attached import Attached

    return Attached(model, optimizer, folder)
