"""Rounds: the peers' own way of running a cluster, for comparing policies on their own ground.

A setting knows how its tasks progress; a policy chooses where each runs next.  Neither reads a clock.  The peers are asked at the end
of a round; a board decides when something happens, so a policy states its cadence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from qipan.scheduler.policies.contender import Choice, Contender, Policy, moves


class Cadence(Enum):
    """When a policy is asked.

    ROUNDS  at the end of each round
    STARTS  in the middle of a round too, when a task comes, or ends while others wait; a choice that then moves a running task
            is put off to the end of the round
    EVENTS  in the middle of a round too, when a task comes or ends, whatever the choice moves
    """

    ROUNDS = "rounds"
    STARTS = "starts"
    EVENTS = "events"


class Setting(Protocol):
    """Tasks of one published setting.  `advance` runs them at what they hold to the end of the round, or with `to_event` to the
    first arrival or end before it, and gives the time reached.  `within`: it stopped in the middle of a round.  What tasks measure
    is told at the ends of rounds only, so a policy that is asked more often learns no sooner."""

    capacity: Mapping[str, int]
    within: bool

    def advance(self, *, to_event: bool) -> float: ...

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


def run_rounds(
    setting: Setting, policy: Policy, cadence: Cadence = Cadence.ROUNDS, most_stops: int = 200_000
) -> Sequence[Outcome]:
    """Until every task has ended.  Capacity is checked after each choice, apart from the policy."""
    for _ in range(most_stops):
        now_s = setting.advance(to_event=cadence is not Cadence.ROUNDS)
        outcomes = setting.outcomes()
        if outcomes is not None:
            return outcomes
        contenders = setting.contenders()
        put_off = setting.within and cadence is Cadence.STARTS
        if put_off and all(one.current is not None for one in contenders):
            continue  # any choice but that of now would move a task
        choice = policy.choose(contenders, setting.capacity, now_s) if contenders else {}
        check(contenders, choice, setting.capacity)
        if not (put_off and moves(contenders, choice)):
            setting.apply(choice)
    raise AssertionError(f"tasks are left after {most_stops} stops: the policy starves them")


def check(contenders: Sequence[Contender], choice: Choice, capacity: Mapping[str, int]) -> None:
    held = dict.fromkeys(capacity, 0)
    for contender in contenders:
        if contender.task_id in choice:
            for pool, devices in contender.option(choice[contender.task_id]).needs:
                held[pool] += devices
    over = {pool: devices for pool, devices in held.items() if devices > capacity[pool]}
    assert not over, f"the policy gave more than there is: {over} of {dict(capacity)}"
