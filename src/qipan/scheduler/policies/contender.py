"""What a policy sees of a task that wants devices, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run: `needs` are (pool, devices), `rate` is progress per second in a unit of the task's own."""

    point_id: str
    needs: tuple[tuple[str, int], ...]
    rate: float

    @property
    def devices(self) -> int:
        return sum(devices for _, devices in self.needs)


@dataclass(frozen=True, slots=True)
class Contender:
    """A queued or running task.

    options      where it may run; rates are comparable within one task only
    current      the option it runs at now
    pinned       it is starting or being moved: a policy leaves it where it is
    served_s     device-seconds that it held so far
    done         progress made so far, in the unit of its rates
    left         progress left in the same unit, when its work is declared; None: not known
    received_s   pool -> seconds it ran there
    measured     its rates come from its own runs or its curve; else they are a first guess: the speed of one device, times the devices
    """

    task_id: str
    options: tuple[Option, ...]
    submitted_s: float
    current: str | None = None
    pinned: bool = False
    tenant: str = ""
    weight: float = 1.0
    served_s: float = 0.0
    done: float = 0.0
    left: float | None = None
    deadline_s: float | None = None
    bid_per_device_s: float = 1.0
    restarts: int = 0
    restart_s: float = 0.0
    received_s: tuple[tuple[str, float], ...] = ()
    measured: bool = True

    def option(self, point_id: str) -> Option:
        return next(option for option in self.options if option.point_id == point_id)


#: task -> the point it runs at in the next round; a task that is absent waits
Choice = dict[str, str]


def moves(contenders: Sequence[Contender], choice: Choice) -> bool:
    """Whether a task that runs would run elsewhere, or no more."""
    return any(one.current is not None and choice.get(one.task_id) != one.current for one in contenders)


class Policy(Protocol):
    """One round's choice.  A policy may remember between rounds; it reads no clock and draws no chance."""

    def choose(
        self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float
    ) -> Choice: ...
