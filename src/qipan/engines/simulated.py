"""The fake and peer of the real engines: it takes the same commands, keeps leases, and reports the same facts, on a
clock that the twin moves.  What it draws by chance (start times, speeds) comes from a generator handed in.

It is its own failure domain: a board's crash does not touch it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qipan.clock import Clock
from qipan.curves import Need, Point
from qipan.engines.simulated_lease import SimulatedLease, SimulatedState
from qipan.engines.topology import free_blocks, holders, seated, straddles
from qipan.events import (
    FINAL,
    CapacityChanged,
    DevicesBusy,
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
    decode,
    encode,
)
from qipan.hardware import ChipClassId
from qipan.leases import UNUSED, EngineId, Offer, Order, Room, TaskId
from qipan.network import Link
from qipan.scheduler.moves import move_to
from qipan.scheduler.tasks import Due


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How simulated attempts differ from their plan.  `start_spread` and `speed_spread` are relative standard
    deviations; `start_share`, `stop_share`, `pace_share`: of the planned seconds and rates, by the source of the task's curve (1 for others);
    `checkpoint_s` between checkpoints, times what the order says (`checkpoint_longer`); `report_s` between progress reports (0: only at the end); `in_place`: processes go on at
    another point where both allow it, after newcomers have started, and stand still for what the points say; the change counts as a
    checkpoint; `straddled`: of the rate, where devices lie over two blocks though one could hold them (with `tiers`)."""

    start_share: Mapping[str, float] = field(default_factory=dict)
    stop_share: Mapping[str, float] = field(default_factory=dict)
    pace_share: Mapping[str, float] = field(default_factory=dict)
    start_spread: float = 0.1
    speed_spread: float = 0.03
    checkpoint_s: float = 60.0
    report_s: float = 0.0
    in_place: bool = False
    straddled: float = 1.0


class SimulatedEngine:
    """`offers`: one per chip class; their `devices` are the engine's.  `tiers`: of classes whose devices stand in nodes and blocks
    (`topology`); the others' are all alike near."""

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
        tiers: Mapping[ChipClassId, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.site = site
        self._clock = clock
        self._links = links
        self._tiers = tiers
        self._offered = offers
        #: chip class -> task -> which devices it has, of classes with tiers
        self.where: dict[ChipClassId, dict[TaskId, tuple[int, ...]]] = {chip: {} for chip in tiers}
        self._rng = rng
        self._behaviour = behaviour
        self._journal: list[Fact] = [
            EngineOffered(engine, offers, chooses=False, in_place=behaviour.in_place)
        ]
        if room is not None:
            self._journal.append(StorageOffered(engine, room))
        self.room = room
        self._devices = {offer.chip_class: offer.devices for offer in offers}
        self._held: dict[TaskId, SimulatedLease] = {}
        self._free = dict(self._devices)  # chip class -> devices that nobody holds
        self._generation: dict[TaskId, tuple[int, int]] = {}
        self._checkpoints: dict[TaskId, float] = {}
        self._over: dict[TaskId, str] = {}
        self._attempts: dict[TaskId, int] = {}
        self._due = Due(self._event_s, self._held)
        #: counts whatever may have changed what is held or runs here
        self.changes = 0
        #: every task whose lease or attempt here began, ended or took other devices, in order
        self.changed: list[TaskId] = []
        self.finished: list[TaskId] = []
        #: every order to park a running attempt: (task, tenant, chip class, when, why)
        self.parks: list[tuple[TaskId, str, ChipClassId, float, str]] = []
        #: every attempt that ran: (task, attempt, chip class, devices, start, end)
        self.lifetimes: list[tuple[TaskId, int, ChipClassId, int, float, float]] = []

    # ---- commands --------------------------------------------------------------------------------------------------

    def reserve(self, command: Reserve) -> None:
        self.changes += 1
        if not self._newer(command.task_id, command.term, command.generation):
            self._refuse_stale(command)
            return
        free = self._free
        short = [need for need in command.needs if free.get(need.chip_class, 0) < need.devices]
        if command.task_id in self._held or short:
            why = f"needs {command.needs}, free is {free}" if short else "the task still holds a lease here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        now_s = self._clock.now_s()
        self._held[command.task_id] = held = SimulatedLease(
            command.lease_id,
            command.order,
            (),
            command.generation,
            now_s + command.duration_s,
            command.duration_s,
        )
        self._take(held, command.needs)
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
        free = dict(self._free)
        for need in held.needs:
            free[need.chip_class] += need.devices
        if any(free.get(need.chip_class, 0) < need.devices for need in point.needs):
            why = f"cannot grow to {point.point_id}: free is {free}"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        held.generation = command.generation
        held.resize = command
        if point.devices > held.point.devices:
            self._take(held, point.needs)
        if self._behaviour.in_place and held.standstill_s(point) is not None and held.stopping_s is None:
            held.reshape_at_s = max(held.ready_s, self._clock.now_s()) + self._imports_s(held, point)
            self._due.note(command.task_id, held)
        else:
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
            self._drop(held)
            self._say(
                LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, "released")
            )
        else:
            if command.park and held.stopping_s is None:
                need, now_s = held.needs[0], self._clock.now_s()
                self.parks.append((command.task_id, held.order.tenant, need.chip_class, now_s, command.why))
            held.stop_why = command.why
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
        if self._tiers and self._seated_as_of != self.changes:
            self._seat()
        return list(enumerate(self._journal[after:], start=after + 1))

    # ---- faults and the twin's view --------------------------------------------------------------------------------

    def kill(self, task_id: TaskId, why: str) -> None:
        """The task's processes die now."""
        self._advance()
        self.changes += 1
        held = self._held.get(task_id)
        if held is not None and held.point is not None:
            self._exit(held, "lost", why, self._clock.now_s())

    def be_busy(self, task_id: TaskId, busy_share: float, from_s: float) -> None:
        """The task's devices worked so much since `from_s`."""
        self.changes += 1
        held, now_s = self._held[task_id], self._clock.now_s()
        self._say(DevicesBusy(task_id, self.engine, held.attempt, busy_share, from_s, now_s))

    def change_devices(self, chip_class: ChipClassId, devices: int, why: str) -> None:
        """Devices fail (negative) or come back.  Tasks that no longer fit are lost, newest first."""
        self._advance()
        self.changes += 1
        self._devices[chip_class] += devices
        self._free[chip_class] += devices
        self._say(CapacityChanged(self.engine, chip_class, devices, why))
        for task_id, held in sorted(self._held.items(), key=lambda item: (-item[1].started_s, item[0])):
            if self._free[chip_class] >= 0:
                break
            if any(need.chip_class == chip_class for need in held.needs):
                if held.point is None:
                    self._drop(held)
                    self._say(LeaseRefused(task_id, held.lease_id, self.engine, held.generation, why))
                else:
                    self._exit(held, "lost", why, self._clock.now_s())

    def held(self) -> Mapping[TaskId, SimulatedLease]:
        """Every lease here, as it stands; to be read only."""
        return self._held

    def devices(self) -> dict[ChipClassId, int]:
        """Chip class -> usable devices, held or not."""
        return dict(self._devices)

    _seated_as_of = -1

    def _seat(self) -> None:
        """Give devices to who holds some and has none yet, and say what blocks are free then."""
        self._seated_as_of = self.changes
        offers = []
        for offer in self._offered:
            tiers, chip = self._tiers.get(offer.chip_class, ()), offer.chip_class
            if not tiers:
                offers.append(offer)
                continue
            holds = {
                task_id: need.devices
                for task_id, held in self._held.items()
                for need in held.needs
                if need.chip_class == chip
            }
            total = self._devices[chip]
            seats, free = seated(holds, self.where[chip], max(total, sum(holds.values())), tiers)
            self.where[chip] = seats
            offers.append(
                replace(
                    offer, devices=total, largest_gang=total, blocks=free_blocks(free, tiers, total),
                    holders=holders(free, seats, tiers, total),
                )
            )  # fmt: skip
        if tuple(offers) != self._offered:
            self._offered = tuple(offers)
            in_place = self._behaviour.in_place
            self._say(EngineOffered(self.engine, self._offered, chooses=False, in_place=in_place))

    def saved(self) -> SimulatedState:
        """What it knows by now, from which another goes on (`go_on`)."""
        self._advance()
        return SimulatedState(
            [encode(fact) for fact in self._journal], self._offered, self._devices, self._held, self._generation,
            self._checkpoints, self._over, self._attempts, self.where, self.finished, self.parks, self.lifetimes,
            self._rng.getstate(),
        )  # fmt: skip

    def go_on(self, saved: SimulatedState) -> None:
        self.changes += 1
        self._journal = []
        for held in [*self._held.values()]:
            self._drop(held)
        for body in saved.journal:
            fact = decode(body)
            assert isinstance(fact, Fact)
            self._journal.append(fact)
        self._offered, self._devices, self._free = saved.offered, saved.devices, dict(saved.devices)
        self._generation, self._checkpoints = saved.generation, saved.checkpoints
        self._over, self._attempts, self.where = saved.over, saved.attempts, saved.where
        self.finished, self.parks, self.lifetimes = saved.finished, saved.parks, saved.lifetimes
        for task_id, held in saved.held.items():
            self._held[task_id] = held
            needs, held.needs = held.needs, ()
            self._take(held, needs)
        self._rng.setstate(saved.chance)

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
        return self._due.next_s()

    def _event_s(self, held: SimulatedLease) -> float:
        if held.stopping_s is not None:
            return held.stopping_s
        due_s = held.park_at_s()
        if held.reshape_at_s is not None:
            due_s = min(due_s, held.reshape_at_s)
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
        for task_id in self._due.take(now_s):
            held = self._held[task_id]
            if held.stopping_s is not None and held.stopping_s <= now_s:
                self._stopped(held)
            elif held.point is not None and held.stopping_s is None and held.end_s() <= now_s:
                self._exit(held, "done", "finished", held.end_s())
            elif held.park_at_s() <= now_s and held.stopping_s is None:
                if held.point is None:
                    self._drop(held)
                    self._say(LeaseRefused(task_id, held.lease_id, self.engine, held.generation, UNUSED))
                else:
                    self._begin_stop(held, "parked")
                    if held.stopping_s is not None and held.stopping_s > held.until_s:
                        held.stopping_s, held.stop_outcome = held.until_s, "lost"  # too slow: killed
            elif held.reshape_at_s is not None and held.reshape_at_s <= now_s:
                self._reshape(held)
            elif self._behaviour.report_s and held.point is not None and held.next_report_s <= now_s:
                held.next_report_s = now_s + self._behaviour.report_s
                self._say(
                    TaskProgress(
                        task_id, self.engine, held.attempt, held.done_s(now_s),
                        held.saved_s(now_s, self._behaviour.checkpoint_s * held.order.checkpoint_longer), "",
                        held.usage(self.site, self.engine, now_s, ended=False),
                    )
                )  # fmt: skip
            if task_id in self._held:
                self._due.note(task_id, held)

    def _begin(
        self,
        held: SimulatedLease,
        point: Point,
        attempt: int,
        base_s: float,
        standstill_s: float | None = None,
    ) -> None:
        """`standstill_s`: of processes that go on."""
        now_s = self._clock.now_s()
        staging_s = self._staging_s(held.order) if held.attempt == 0 else 0.0  # later ones find it here
        held.point, held.attempt, held.started_s = point, attempt, now_s
        self._attempts[held.order.task_id] = attempt
        held.base_s = max(base_s, self._checkpoints.get(held.order.task_id, 0.0))
        source = held.order.curve.source
        start_s = point.start_s * self._behaviour.start_share.get(source, 1.0)
        if standstill_s is None:
            standstill_s = staging_s + start_s * max(0.2, self._rng.gauss(1.0, self._behaviour.start_spread))
        held.ready_s = now_s + standstill_s
        pace = point.rate * self._behaviour.pace_share.get(source, 1.0)
        if self._tiers and self._behaviour.straddled != 1.0:
            self._seat()
            chip = point.needs[0].chip_class
            own = self.where.get(chip, {}).get(held.order.task_id, ())
            pace *= self._behaviour.straddled ** straddles(own, self._tiers.get(chip, ()))
        held.speed = pace * max(0.2, self._rng.gauss(1.0, self._behaviour.speed_spread))
        held.next_report_s = held.ready_s + self._behaviour.report_s
        self._take(held, point.needs)
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

    def _imports_s(self, held: SimulatedLease, point: Point) -> float:
        """Newcomers start while the others go on."""
        assert held.point is not None
        if point.devices <= held.point.devices:
            return 0.0
        share = self._behaviour.start_share.get(held.order.curve.source, 1.0)
        return point.start_s * share * max(0.2, self._rng.gauss(1.0, self._behaviour.start_spread))

    def _reshape(self, held: SimulatedLease) -> None:
        """The same processes go on at the point of its `resize`."""
        assert held.resize is not None
        assert held.reshape_at_s is not None
        resize, at_s = held.resize, held.reshape_at_s
        point = resize.points[0]
        planned_s = held.standstill_s(point)
        assert planned_s is not None
        took_s = planned_s * max(0.2, self._rng.gauss(1.0, self._behaviour.start_spread))
        held.reshape_at_s, held.resize = None, None
        self._exit(
            held, "resized", f"goes on at {point.point_id} in the same processes", at_s, in_place_s=took_s
        )
        self._begin(held, point, resize.attempt, 0.0, took_s)

    def _begin_stop(self, held: SimulatedLease, outcome: Outcome) -> None:
        assert held.point is not None
        held.stop_outcome = outcome
        if held.reshape_at_s is not None:  # it is told to stop before it has changed
            held.reshape_at_s, held.resize = None, None
        if held.stopping_s is None:
            share = self._behaviour.stop_share.get(held.order.curve.source, 1.0)
            held.stopping_s = self._clock.now_s() + held.point.stop_s * share
        self._due.note(held.order.task_id, held)

    def _stopped(self, held: SimulatedLease) -> None:
        assert held.stopping_s is not None
        end_s, resize = held.stopping_s, held.resize
        held.stopping_s, held.resize = None, None
        if resize is None:
            self._exit(held, held.stop_outcome, held.stop_why or "ordered to stop", end_s)
            return
        self._exit(held, "resized", f"goes on at {resize.points[0].point_id}", end_s)
        self._begin(held, resize.points[0], resize.attempt, 0.0)

    def _exit(
        self,
        held: SimulatedLease,
        outcome: Outcome,
        why: str,
        end_s: float,
        *,
        in_place_s: float | None = None,
    ) -> None:
        """`in_place_s`: for how long its processes stand still to go on."""
        assert held.point is not None
        task_id = held.order.task_id
        done_s = held.done_s(end_s)
        saved_s = (
            done_s
            if outcome in ("done", "parked", "resized")
            else held.saved_s(end_s, self._behaviour.checkpoint_s * held.order.checkpoint_longer)
        )
        self._checkpoints[task_id] = saved_s
        usage = held.usage(self.site, self.engine, end_s, ended=True)
        self.lifetimes.append((task_id, held.attempt, usage.chip_class, usage.devices, held.started_s, end_s))
        self._say(
            TaskExited(
                task_id, held.lease_id, self.engine, held.generation, held.attempt, outcome,
                0 if outcome in ("done", "parked", "resized") else 137, done_s, saved_s, why, usage,
                final=outcome != "resized", in_place=in_place_s is not None, standstill_s=in_place_s,
            )
        )  # fmt: skip
        if outcome != "resized":
            self._drop(held)
        if outcome in FINAL:
            self._over[task_id] = outcome
        if outcome == "done":
            self.finished.append(task_id)

    # ---- small parts -----------------------------------------------------------------------------------------------

    def _take(self, held: SimulatedLease, needs: tuple[Need, ...]) -> None:
        """It holds these devices from now on; a lease that was just given or has another attempt may be due at another time, too."""
        for need in held.needs:
            self._free[need.chip_class] += need.devices
        for need in needs:
            self._free[need.chip_class] -= need.devices
        held.needs = needs
        self.changed.append(held.order.task_id)
        self._due.note(held.order.task_id, held)

    def _drop(self, held: SimulatedLease) -> None:
        del self._held[held.order.task_id]
        for need in held.needs:
            self._free[need.chip_class] += need.devices
        self.changed.append(held.order.task_id)

    def _lease(self, command: Start | Resize | Stop) -> SimulatedLease | None:
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
