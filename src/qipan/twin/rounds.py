"""Rounds: the peers' own way of running a cluster, for comparing policies on their own ground.

A setting knows how its tasks progress; a policy chooses where each runs in the next round.  Neither reads a clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qipan.scheduler.policies.contender import Choice, Contender, Policy


class Setting(Protocol):
    """Tasks of one published setting.  `advance` runs them for a round at what they hold and gives the time reached."""

    capacity: Mapping[str, int]

    def advance(self) -> float: ...

    def contenders(self) -> Sequence[Contender]: ...

    def apply(self, choice: Choice) -> None: ...

    def outcomes(self) -> "Sequence[Outcome] | None": ...


@dataclass(frozen=True, slots=True)
class Outcome:
    task_id: str
    submitted_s: float
    ended_s: float
    device_s: float
    restarts: int

    @property
    def jct_s(self) -> float:
        return self.ended_s - self.submitted_s


def run_rounds(setting: Setting, policy: Policy, most_rounds: int = 200_000) -> Sequence[Outcome]:
    """Until every task has ended.  Capacity is checked after each choice, apart from the policy."""
    for _ in range(most_rounds):
        now_s = setting.advance()
        outcomes = setting.outcomes()
        if outcomes is not None:
            return outcomes
        contenders = setting.contenders()
        choice = policy.choose(contenders, setting.capacity, now_s) if contenders else {}
        check(contenders, choice, setting.capacity)
        setting.apply(choice)
    raise AssertionError(f"tasks are left after {most_rounds} rounds: the policy starves them")


def check(contenders: Sequence[Contender], choice: Choice, capacity: Mapping[str, int]) -> None:
    held = dict.fromkeys(capacity, 0)
    for contender in contenders:
        if contender.task_id in choice:
            for pool, devices in contender.option(choice[contender.task_id]).needs:
                held[pool] += devices
    over = {pool: devices for pool, devices in held.items() if devices > capacity[pool]}
    assert not over, f"the policy gave more than there is: {over} of {dict(capacity)}"
