"""Policies by name: what a board maximises (`objectives`), and whole policies of peers, each from its paper.

`Settings.policy` names one.  The peers choose at the leaves of the tree; above them their objective orders the tasks."""

from collections.abc import Mapping

from qipan.errors import InvalidInput
from qipan.scheduler.policies.contender import Choice, Contender, Option, Policy
from qipan.scheduler.policies.fifo import Fifo
from qipan.scheduler.policies.gavel import MaxMinNow
from qipan.scheduler.policies.jct import Jct
from qipan.scheduler.policies.kueue import Kueue
from qipan.scheduler.policies.objectives import OBJECTIVES, RIGID, Objective
from qipan.scheduler.policies.sia import Sia

#: those that choose at a leaf by themselves
PEERS: Mapping[str, Policy] = {"fifo": Fifo(), "gavel": MaxMinNow(), "sia": Sia(), "kueue": Kueue()}
#: those by which a leaf with few live tasks chooses; the others weigh their objective
CHOOSERS: Mapping[str, Policy] = {**PEERS, "jct": Jct()}


def objective_of(name: str) -> Objective:
    """Raises InvalidInput."""
    found = OBJECTIVES.get(name)
    if found is None:
        raise InvalidInput(f"no policy {name!r}; there are {', '.join(sorted(OBJECTIVES))}")
    return found


__all__ = [
    "CHOOSERS", "OBJECTIVES", "PEERS", "RIGID", "Choice", "Contender", "Objective", "Option", "Policy", "objective_of",
]  # fmt: skip
