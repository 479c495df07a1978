"""Task and model specs: a YAML file becomes one checked value."""

from qipan.workload.model import Model, Moe
from qipan.workload.task import (
    Checkpoint,
    Kind,
    Launch,
    Limits,
    Load,
    Objective,
    Replicas,
    Shape,
    Slo,
    Task,
    Work,
)

__all__ = [
    "Checkpoint",
    "Kind",
    "Launch",
    "Limits",
    "Load",
    "Model",
    "Moe",
    "Objective",
    "Replicas",
    "Shape",
    "Slo",
    "Task",
    "Work",
]
