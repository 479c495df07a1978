"""A task is a set of curves: a finite list of feasible points.  Placement uses points only."""

from dataclasses import dataclass
from typing import Literal

from qipan.hardware import ChipClassId
from qipan.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Need:
    """`devices` of one chip class, at most `devices_per_node` used on a node (0: any shape)."""

    chip_class: ChipClassId
    devices: int
    devices_per_node: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """What it needs, and how fast that is.  `rate` is useful progress normalised by the task's best point:
    seconds of work at the best point done per second, in (0, 1]; p10 and p90 bound it.
    `start_s` is from launch to useful progress, checkpoint load included; `stop_s` from the order to stop to
    the exit, checkpoint written.  `reshape_s`: how long its processes stand still to go on at another point of the
    curve, where the engine can have them do so; None: they are started again.  `point_id` is unique in its curve and sorts ties."""

    point_id: str
    needs: tuple[Need, ...]
    rate: float
    rate_p10: float
    rate_p90: float
    start_s: float = 0.0
    stop_s: float = 0.0
    strategy: Strategy | None = None
    host_memory_bytes: int = 0
    storage_bytes: int = 0
    storage_bytes_per_s: float = 0.0
    nic_bytes_per_s: float = 0.0
    memory_margin: float = 1.0  # free share of device memory at the peak
    reshape_s: float | None = None

    def standstill_s(self, then: "Point") -> float | None:
        """As planned, of processes that go on at another point of the curve; None: they are started again."""
        if self.reshape_s is None or then.reshape_s is None:
            return None
        return max(self.reshape_s, then.reshape_s)

    @property
    def devices(self) -> int:
        needs = self.needs  # nearly always one, and asked for very often
        return needs[0].devices if len(needs) == 1 else sum(need.devices for need in needs)


CurveSource = Literal["planner", "declared", "time limit", "history", "progress"]


@dataclass(frozen=True, slots=True)
class Curve:
    """`work_s` is the whole task in seconds at its best point.  `source` says where the numbers come from;
    the plan shows it."""

    points: tuple[Point, ...]
    work_s: float
    source: CurveSource = "planner"

    def point(self, point_id: str) -> Point:
        return next(point for point in self.points if point.point_id == point_id)
