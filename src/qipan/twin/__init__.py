"""The digital twin: the real controllers, a manual clock, simulated engines."""

from qipan.twin.check import Violation, check_end, check_world
from qipan.twin.world import Faults, Happening, World, arrivals, build_world, crash, kill_task

__all__ = [
    "Faults",
    "Happening",
    "Violation",
    "World",
    "arrivals",
    "build_world",
    "check_end",
    "check_world",
    "crash",
    "kill_task",
]
