"""What a what-if tells: the tasks of a store as they went, and as they would have gone under another policy, both simulated."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """`late`: ended after its deadline, or not at all, of `with_deadline`.  Seconds from submission to end."""

    policy: str
    tasks: int
    done: int
    mean_s: float
    p95_s: float
    cost_micro_cny: int
    late: int
    with_deadline: int
    attempts: int


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Seconds from submission to end, None when it did not end."""

    task_id: str
    as_it_was_s: float | None
    other_s: float | None


@dataclass(frozen=True, slots=True)
class WhatIf:
    """`truncated`: so many of the oldest causes were left out."""

    as_it_was: Outcome
    other: Outcome
    tasks: tuple[TaskOutcome, ...]
    truncated: int = 0
