"""The scheduler: one pure `decide` for every board of the tree, and the state it owns."""

from qipan.scheduler.decide import decide
from qipan.scheduler.state import Decision, Moment, Phase, Settings, State, TaskState, ToEngine

__all__ = ["Decision", "Moment", "Phase", "Settings", "State", "TaskState", "ToEngine", "decide"]
