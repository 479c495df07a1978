"""The fake and peer of the real engines: it takes the same commands, keeps leases, and reports the same facts, on a
clock that the twin moves.  What it draws by chance (start times, speeds) comes from a generator handed in.

It is its own failure domain: a board's crash does not touch it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qipan.clock import Clock
from qipan.curves import Need, Point
from qipan.events import (
    FINAL,
    CapacityChanged,
    EngineOffered,
    Fact,
    HeldTask,
    LeaseGranted,
    LeaseRefused,
    Outcome,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    StorageOffered,
    TakeCensus,
    TaskExited,
    TaskProgress,
    TasksHeld,
    TaskStarted,
)
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, LeaseId, Offer, Order, Room, TaskId, Usage
from qipan.network import Link
from qipan.scheduler.moves import move_to


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How simulated attempts differ from their plan.  `start_spread` and `speed_spread` are relative standard
    deviations; `start_share`, `stop_share`, `pace_share`: of the planned seconds and rates, by the source of the task's curve (1 for others);
    `checkpoint_s` between checkpoints; `report_s` between progress reports (0: only at the end)."""

    start_share: Mapping[str, float] = field(default_factory=dict)
    stop_share: Mapping[str, float] = field(default_factory=dict)
    pace_share: Mapping[str, float] = field(default_factory=dict)
    start_spread: float = 0.1
    speed_spread: float = 0.03
    checkpoint_s: float = 60.0
    report_s: float = 0.0


#: of a lease at most: so much is set aside at its end for parking
PARKING_SHARE = 0.25


@dataclass(slots=True)
class _Held:
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
    resize: Resize | None = None
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


class SimulatedEngine:
    """`offers`: one per chip class; their `devices` are the engine's."""

    def __init__(
        self,
        engine: EngineId,
        site: str,
        offers: tuple[Offer, ...],
        clock: Clock,
        rng: random.Random,
        behaviour: Behaviour = Behaviour(),
        room: Room | None = None,
        links: Mapping[str, Link] = MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.site = site
        self._clock = clock
        self._links = links
        self._rng = rng
        self._behaviour = behaviour
        self._journal: list[Fact] = [EngineOffered(engine, offers, chooses=False)]
        if room is not None:
            self._journal.append(StorageOffered(engine, room))
        self.room = room
        self._devices = {offer.chip_class: offer.devices for offer in offers}
        self._held: dict[TaskId, _Held] = {}
        self._generation: dict[TaskId, tuple[int, int]] = {}
        self._checkpoints: dict[TaskId, float] = {}
        self._over: dict[TaskId, str] = {}
        self._attempts: dict[TaskId, int] = {}
        self._due_s: float | None = None  # when something happens by itself, as of `_due_as_of` changes
        self._due_as_of = -1
        #: counts whatever may have changed what is held or runs here
        self.changes = 0
        self.finished: list[TaskId] = []
        #: every attempt that ran: (task, attempt, chip class, devices, start, end)
        self.lifetimes: list[tuple[TaskId, int, ChipClassId, int, float, float]] = []

    # ---- commands --------------------------------------------------------------------------------------------------

    def reserve(self, command: Reserve) -> None:
        self.changes += 1
        if not self._newer(command.task_id, command.term, command.generation):
            self._refuse_stale(command)
            return
        free = self.free()
        short = [need for need in command.needs if free.get(need.chip_class, 0) < need.devices]
        if command.task_id in self._held or short:
            why = f"needs {command.needs}, free is {free}" if short else "the task still holds a lease here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        now_s = self._clock.now_s()
        self._held[command.task_id] = _Held(
            command.lease_id,
            command.order,
            command.needs,
            command.generation,
            now_s + command.duration_s,
            command.duration_s,
        )
        self._say(
            LeaseGranted(command.task_id, command.lease_id, self.engine, command.generation, command.needs)
        )

    def start(self, command: Start) -> None:
        self.changes += 1
        if not self._newer(command.task_id, command.term, command.generation):
            return
        held = self._lease(command)
        if held is not None:
            assert len(command.points) == 1, "a leaf engine is always given exactly one point"
            held.generation = command.generation
            before = self._attempts.get(command.task_id, 0)  # a restored or cut-off board may count lower
            self._begin(held, command.points[0], max(command.attempt, before + 1), held.order.saved_s)

    def resize(self, command: Resize) -> None:
        self.changes += 1
        if not self._newer(command.task_id, command.term, command.generation):
            return
        held = self._lease(command)
        if held is None or held.point is None:
            return
        point = command.points[0]
        free = self.free()
        for need in held.needs:
            free[need.chip_class] += need.devices
        if any(free.get(need.chip_class, 0) < need.devices for need in point.needs):
            why = f"cannot grow to {point.point_id}: free is {free}"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        held.generation = command.generation
        held.resize = command
        if point.devices > held.point.devices:
            held.needs = point.needs
        self._begin_stop(held, "resized")

    def stop(self, command: Stop) -> None:
        self.changes += 1
        if not self._newer(command.task_id, command.term, command.generation):
            return
        held = self._lease(command)
        if held is None:
            return
        held.generation = command.generation
        held.resize = None
        if held.point is None:
            del self._held[command.task_id]
            self._say(
                LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, "released")
            )
        else:
            self._begin_stop(held, "parked" if command.park else "cancelled")

    def renew(self, command: Renew) -> None:
        self.changes += 1
        wanted = set(command.lease_ids)
        for held in self._held.values():
            if held.lease_id in wanted:
                held.until_s = max(held.until_s, self._clock.now_s() + command.duration_s)

    def census(self, command: TakeCensus) -> None:
        self._advance()
        now_s = self._clock.now_s()
        term_seen = max((term for term, _ in self._generation.values()), default=0)
        held = tuple(
            HeldTask(
                held.order, held.lease_id, held.generation, held.attempt or held.order.attempt, held.point is not None,
                held.point.point_id if held.point else "", held.needs, self.engine, held.done_s(now_s),
                held.base_s, max(0.0, held.until_s - now_s),
            )
            for held in self._held.values()
        )  # fmt: skip
        over = tuple((task_id, how) for task_id, how in self._over.items() if task_id not in self._held)
        self._say(TasksHeld(self.engine, term_seen, command.asked_lease_s, held, over))

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        self._advance()
        return list(enumerate(self._journal[after:], start=after + 1))

    # ---- faults and the twin's view --------------------------------------------------------------------------------

    def kill(self, task_id: TaskId, why: str) -> None:
        """The task's processes die now."""
        self._advance()
        self.changes += 1
        held = self._held.get(task_id)
        if held is not None and held.point is not None:
            self._exit(held, "lost", why, self._clock.now_s())

    def change_devices(self, chip_class: ChipClassId, devices: int, why: str) -> None:
        """Devices fail (negative) or come back.  Tasks that no longer fit are lost, newest first."""
        self._advance()
        self.changes += 1
        self._devices[chip_class] += devices
        self._say(CapacityChanged(self.engine, chip_class, devices, why))
        for task_id, held in sorted(self._held.items(), key=lambda item: (-item[1].started_s, item[0])):
            if self.free()[chip_class] >= 0:
                break
            if any(need.chip_class == chip_class for need in held.needs):
                if held.point is None:
                    del self._held[task_id]
                    self._say(LeaseRefused(task_id, held.lease_id, self.engine, held.generation, why))
                else:
                    self._exit(held, "lost", why, self._clock.now_s())

    def free(self) -> dict[ChipClassId, int]:
        free = dict(self._devices)
        for held in self._held.values():
            for need in held.needs:
                free[need.chip_class] -= need.devices
        return free

    def devices(self) -> dict[ChipClassId, int]:
        """Chip class -> usable devices, held or not."""
        return dict(self._devices)

    def order_of(self, task_id: TaskId) -> Order:
        """Of a task that holds a lease here."""
        return self._held[task_id].order

    def running(self) -> Mapping[TaskId, tuple[int, tuple[Need, ...]]]:
        """task -> (attempt, devices held), of attempts that run now."""
        return {
            task: (held.attempt, held.needs) for task, held in self._held.items() if held.point is not None
        }

    def done(self) -> dict[TaskId, float]:
        """task -> work done of it by now, here and before, in seconds at its best point; of every task that ever ran here."""
        now_s = self._clock.now_s()
        running = {task: held.done_s(now_s) for task, held in self._held.items() if held.point is not None}
        return {**self._checkpoints, **running}

    def next_event_s(self) -> float | None:
        """When something happens here by itself."""
        if self._due_as_of != self.changes:
            self._due_as_of = self.changes
            self._due_s = min((self._event_s(held) for held in self._held.values()), default=None)
        return self._due_s

    def _event_s(self, held: _Held) -> float:
        if held.stopping_s is not None:
            return held.stopping_s
        due_s = held.park_at_s()
        if held.point is not None:
            due_s = min(due_s, held.end_s())
            if self._behaviour.report_s:
                due_s = min(due_s, held.next_report_s)
        return due_s

    # ---- what happens by itself ------------------------------------------------------------------------------------

    def _advance(self) -> None:
        now_s, due_s = self._clock.now_s(), self.next_event_s()
        if due_s is None or due_s > now_s:
            return
        self.changes += 1
        for held in sorted(self._held.values(), key=lambda held: held.order.task_id):
            if held.stopping_s is not None and held.stopping_s <= now_s:
                self._stopped(held)
            elif held.point is not None and held.stopping_s is None and held.end_s() <= now_s:
                self._exit(held, "done", "finished", held.end_s())
            elif held.park_at_s() <= now_s and held.stopping_s is None:
                if held.point is None:
                    del self._held[held.order.task_id]
                    why = "the lease lapsed before it was used"
                    self._say(
                        LeaseRefused(held.order.task_id, held.lease_id, self.engine, held.generation, why)
                    )
                else:
                    self._begin_stop(held, "parked")
                    if held.stopping_s is not None and held.stopping_s > held.until_s:
                        held.stopping_s, held.stop_outcome = held.until_s, "lost"  # too slow: killed
            elif self._behaviour.report_s and held.point is not None and held.next_report_s <= now_s:
                held.next_report_s = now_s + self._behaviour.report_s
                self._say(self._progress(held, now_s))

    def _begin(self, held: _Held, point: Point, attempt: int, base_s: float) -> None:
        now_s = self._clock.now_s()
        staging_s = self._staging_s(held.order) if held.attempt == 0 else 0.0  # later ones find it here
        held.point, held.attempt, held.started_s = point, attempt, now_s
        self._attempts[held.order.task_id] = attempt
        held.needs = point.needs
        held.base_s = max(base_s, self._checkpoints.get(held.order.task_id, 0.0))
        source = held.order.curve.source
        start_s = point.start_s * self._behaviour.start_share.get(source, 1.0)
        held.ready_s = (
            now_s + staging_s + start_s * max(0.2, self._rng.gauss(1.0, self._behaviour.start_spread))
        )
        pace = point.rate * self._behaviour.pace_share.get(source, 1.0)
        held.speed = pace * max(0.2, self._rng.gauss(1.0, self._behaviour.speed_spread))
        held.next_report_s = held.ready_s + self._behaviour.report_s
        task_id = held.order.task_id
        started = TaskStarted(
            task_id,
            held.lease_id,
            self.engine,
            held.generation,
            attempt,
            point.point_id,
            point.needs,
            self.engine,
        )
        self._say(started)

    def _staging_s(self, order: Order) -> float:
        here = order.data_bytes_at
        if order.saved_s > 0 and order.checkpoint_at:
            here = (*here, (order.checkpoint_at, order.checkpoint_bytes))
        return move_to(self._links, here, self.site).s

    def _begin_stop(self, held: _Held, outcome: Outcome) -> None:
        assert held.point is not None
        held.stop_outcome = outcome
        if held.stopping_s is None:
            share = self._behaviour.stop_share.get(held.order.curve.source, 1.0)
            held.stopping_s = self._clock.now_s() + held.point.stop_s * share

    def _stopped(self, held: _Held) -> None:
        assert held.stopping_s is not None
        end_s, resize = held.stopping_s, held.resize
        held.stopping_s, held.resize = None, None
        if resize is None:
            self._exit(held, held.stop_outcome, "ordered to stop", end_s)
            return
        self._exit(held, "resized", f"goes on at {resize.points[0].point_id}", end_s, keep=True)
        self._begin(held, resize.points[0], resize.attempt, 0.0)

    def _exit(self, held: _Held, outcome: Outcome, why: str, end_s: float, *, keep: bool = False) -> None:
        assert held.point is not None
        task_id = held.order.task_id
        done_s = held.done_s(end_s)
        saved_s = done_s if outcome in ("done", "parked", "resized") else self._saved_s(held, end_s)
        self._checkpoints[task_id] = saved_s
        usage = self._usage(held, end_s, ended=True)
        self.lifetimes.append((task_id, held.attempt, usage.chip_class, usage.devices, held.started_s, end_s))
        self._say(
            TaskExited(
                task_id, held.lease_id, self.engine, held.generation, held.attempt, outcome,
                0 if outcome in ("done", "parked", "resized") else 137, done_s, saved_s, why, usage,
                final=outcome != "resized",
            )
        )  # fmt: skip
        if not keep:
            del self._held[task_id]
        if outcome in FINAL:
            self._over[task_id] = outcome
        if outcome == "done":
            self.finished.append(task_id)

    def _saved_s(self, held: _Held, now_s: float) -> float:
        """Work in the newest checkpoint: one every `checkpoint_s` of running."""
        every_s = self._behaviour.checkpoint_s
        worked_s = max(0.0, now_s - held.ready_s)
        return min(held.done_s(now_s), held.base_s + worked_s // every_s * every_s * held.speed)

    def _usage(self, held: _Held, until_s: float, *, ended: bool) -> Usage:
        assert held.point is not None
        need = held.point.needs[0]
        return Usage(
            held.order.task_id, held.attempt, self.site, self.engine, need.chip_class, need.devices,
            held.point.point_id, held.started_s, until_s, (until_s - held.started_s) * need.devices, ended,
        )  # fmt: skip

    def _progress(self, held: _Held, now_s: float) -> TaskProgress:
        return TaskProgress(
            held.order.task_id, self.engine, held.attempt, held.done_s(now_s), self._saved_s(held, now_s), "",
            self._usage(held, now_s, ended=False),
        )  # fmt: skip

    # ---- small parts -----------------------------------------------------------------------------------------------

    def _lease(self, command: Start | Resize | Stop) -> _Held | None:
        held = self._held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            why = "no such lease here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return None
        return held

    def _refuse_stale(self, command: Reserve) -> None:
        """A new lease counted lower than what was heard (the board was restored): tell it how far the count is."""
        held = self._held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            generation = self._generation[command.task_id][1]
            why = f"the task's commands have reached {generation} here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, generation, why))

    def _newer(self, task_id: TaskId, term: int, generation: int) -> bool:
        if (term, generation) <= self._generation.get(task_id, (0, 0)):
            return False
        self._generation[task_id] = (term, generation)
        return True

    def _say(self, fact: Fact) -> None:
        self._journal.append(fact)
