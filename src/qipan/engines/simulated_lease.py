"""A lease of the simulated engine with the attempt that runs in it: how far it is at any moment, and when it ends by itself."""

from dataclasses import dataclass
from typing import Any

from qipan.curves import Need, Point
from qipan.events import Outcome, Resize
from qipan.hardware import ChipClassId
from qipan.leases import PARKING_SHARE, EngineId, LeaseId, Offer, Order, TaskId, Usage


@dataclass(slots=True)
class SimulatedLease:
    """One lease, and the attempt that runs in it.  Work counts in seconds at the task's best point."""

    lease_id: LeaseId
    order: Order
    needs: tuple[Need, ...]
    generation: int
    until_s: float
    lease_s: float  # how long it was given for
    point: Point | None = None
    attempt: int = 0
    started_s: float = 0.0
    ready_s: float = 0.0  # first useful progress
    speed: float = 0.0
    base_s: float = 0.0  # work in the checkpoint it started from
    stopping_s: float | None = None  # when the ordered stop is done
    stop_outcome: Outcome = "parked"
    stop_why: str = ""
    resize: Resize | None = None
    reshape_at_s: float | None = None  # when its processes go on at the point of `resize`
    next_report_s: float = 0.0

    def done_s(self, now_s: float) -> float:
        worked_s = max(0.0, now_s - self.ready_s) if self.point else 0.0
        return min(self.order.curve.work_s, self.base_s + worked_s * self.speed)

    def park_at_s(self) -> float:
        """When it must begin to park so that nothing runs once the lease is over."""
        return self.until_s - (min(self.point.stop_s, self.lease_s * PARKING_SHARE) if self.point else 0.0)

    def end_s(self) -> float:
        assert self.point is not None
        return self.ready_s + (self.order.curve.work_s - self.base_s) / self.speed

    def saved_s(self, now_s: float, every_s: float) -> float:
        """Work in the newest checkpoint: one every `every_s` of running."""
        worked_s = max(0.0, now_s - self.ready_s)
        return min(self.done_s(now_s), self.base_s + worked_s // every_s * every_s * self.speed)

    def standstill_s(self, then: Point) -> float | None:
        """As planned, of processes that go on at another point; None: they cannot."""
        return self.point.standstill_s(then) if self.point is not None else None

    def usage(self, site: str, engine: EngineId, until_s: float, *, ended: bool) -> Usage:
        assert self.point is not None
        need = self.point.needs[0]
        return Usage(
            self.order.task_id, self.attempt, site, engine, need.chip_class, need.devices,
            self.point.point_id, self.started_s, until_s, (until_s - self.started_s) * need.devices, ended,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SimulatedState:
    """All that a simulated engine knows; `journal` as facts are stored, `chance` as its generator gives it."""

    journal: list[bytes]
    offered: tuple[Offer, ...]
    devices: dict[ChipClassId, int]
    held: dict[TaskId, SimulatedLease]
    generation: dict[TaskId, tuple[int, int]]
    checkpoints: dict[TaskId, float]
    over: dict[TaskId, str]
    attempts: dict[TaskId, int]
    where: dict[ChipClassId, dict[TaskId, tuple[int, ...]]]
    finished: list[TaskId]
    parks: list[tuple[TaskId, str, ChipClassId, float, str]]
    lifetimes: list[tuple[TaskId, int, ChipClassId, int, float, float]]
    chance: tuple[int, tuple[int, ...], Any]
