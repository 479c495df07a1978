"""The measured run nearest to a plan, and how far off the model was there."""

import math
from dataclasses import dataclass

from qipan.planner.published import RUNS


@dataclass(frozen=True, slots=True)
class Run:
    """A published run.  `error`: how far off the model was there, its constants fitted without this run's table."""

    run_id: str
    source: str
    chip_class: str
    parameters: float
    devices: int
    seq: int
    measured_s: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.run_id} ({self.chip_class} x {self.devices}, {self.source}): a step {self.measured_s:.3g} s,"
            f" the model {abs(self.error):.0%} {'above' if self.error >= 0 else 'below'}"
        )


PUBLISHED = tuple(Run(*run) for run in RUNS)
CHIPS_WITH_RUNS = frozenset(run.chip_class for run in PUBLISHED)


def nearest(chip_class: str, parameters: float, devices: int, seq: int) -> Run:
    """On the same chip if there is one, then the nearest in size of model, devices and sequence (all as powers)."""

    def distance(run: Run) -> tuple[bool, float, str]:
        apart = sum(
            abs(math.log(max(1.0, here) / max(1.0, there)))
            for here, there in ((parameters, run.parameters), (devices, run.devices), (seq, run.seq))
        )
        return run.chip_class != chip_class, apart, run.run_id

    return min(PUBLISHED, key=distance)
