"""The digital twin: the real controllers, a manual clock, simulated engines."""

from qipan.twin.check import Violation, check_changes, check_end, check_world
from qipan.twin.world import (
    Faults,
    Happening,
    World,
    arrivals,
    back_up,
    build_world,
    crash,
    kill_task,
    restore,
)

__all__ = [
    "Faults",
    "Happening",
    "Violation",
    "World",
    "arrivals",
    "back_up",
    "build_world",
    "check_changes",
    "check_end",
    "check_world",
    "crash",
    "kill_task",
    "restore",
]
