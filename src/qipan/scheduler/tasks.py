"""The live tasks, with what a tick asks of them kept beside: a tick costs what changed, not what is there.

Everything here follows from the tasks themselves, so a state read from a snapshot answers as the one that wrote it.
Waiting tasks stand in groups: those of a group could take the same seats for the same money, so one answer
holds for all of them.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qipan.curves import Curve, Point
from qipan.leases import AskStep, EngineId, LeaseId, Offer, Order, TaskId
from qipan.scheduler.bids import steady

if TYPE_CHECKING:
    from qipan.scheduler.state import TaskState

GroupKey = tuple[Any, ...]
Item = TypeVar("Item")
#: entries of those who left, or stand there twice, that a line may hold beyond one for each member
LEFT_IN_LINE = 64


@dataclass(slots=True)
class MovableLine:
    """Kept by `movable`: `mark`, what all prices stand on; task -> (price, None where it changes with time, and gain); both in order; and the
    tasks that changed since."""

    mark: object
    entries: dict[TaskId, tuple[int | None, float]] = field(default_factory=dict)
    prices: list[tuple[int, TaskId]] = field(default_factory=list)
    drifting: set[TaskId] = field(default_factory=set)
    gains: list[tuple[float, TaskId]] = field(default_factory=list)
    ages: list[tuple[float, TaskId]] = field(
        default_factory=list
    )  # heap: when its price changes by time alone
    stale: set[TaskId] = field(default_factory=set)


@dataclass(slots=True)
class LentDevices:
    """Of one chip class, kept by `idle`: devices of woken leases, and the last of those; of the others, notice in seconds -> (devices, the
    first)."""

    woken: int = 0
    last_woken: TaskId | None = None
    asleep: dict[float, tuple[int, TaskId]] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        return self.woken + sum(devices for devices, _ in self.asleep.values())


@dataclass(slots=True)
class Group:
    """Waiting tasks alike in curve, limits, tenant and money."""

    key: GroupKey
    chips: frozenset[str]
    tenant: str
    members: set[TaskId] = field(default_factory=set)
    line: list[tuple[float, TaskId]] = field(
        default_factory=list
    )  # heap by submission; may hold who has left
    value: float | None = None  # what a steady group bids, less than zero, kept by `children`
    barren: object = None  # the ask tables in which it found no seat, kept by `children`
    said: tuple[int, str] | None = None  # (tick, why its members wait), kept by `limits`
    bid: Any = None  # what a member bids at leaves, kept by `leaves`

    def head(self) -> TaskId | None:
        """The member submitted first."""
        while self.line and self.line[0][1] not in self.members:
            heapq.heappop(self.line)
        return self.line[0][1] if self.line else None

    def heads(self, most: int) -> list[TaskId]:
        """The first `most` members in order of submission."""
        if len(self.members) <= most:
            return [task_id for _, task_id in sorted(set(self.line)) if task_id in self.members]
        taken: list[tuple[float, TaskId]] = []
        while self.line and len(taken) < most:
            entry = heapq.heappop(self.line)
            if entry[1] in self.members and (not taken or taken[-1] != entry):
                taken.append(entry)
        for entry in taken:
            heapq.heappush(self.line, entry)
        return [task_id for _, task_id in taken]


class Due(Generic[Item]):
    """When each task wants to be looked at by time alone.  `of` says when; None: never.  The heap may hold more, and
    earlier, than is true; what is read from it is true.  `note` is told of what may be due earlier than before."""

    def __init__(self, of: Callable[[Item], float | None], tasks: Mapping[TaskId, Item]) -> None:
        self._of, self._tasks = of, tasks
        self._heap: list[tuple[float, TaskId]] = []
        self._entry: dict[TaskId, float] = {}

    def note(self, task_id: TaskId, task: Item) -> None:
        at_s = self._of(task)
        if at_s is not None:
            known = self._entry.get(task_id)
            if known is None or at_s < known:
                self._entry[task_id] = at_s
                heapq.heappush(self._heap, (at_s, task_id))

    def next_s(self) -> float | None:
        while self._heap:
            at_s, task_id = self._heap[0]
            if self._entry.get(task_id) == at_s:
                task = self._tasks.get(task_id)
                true_s = self._of(task) if task is not None else None
                if true_s == at_s:
                    return at_s
                del self._entry[task_id]
                heapq.heappop(self._heap)
                if true_s is not None:
                    self._entry[task_id] = true_s
                    heapq.heappush(self._heap, (true_s, task_id))
            else:
                heapq.heappop(self._heap)
        return None

    def take(self, until_s: float) -> list[TaskId]:
        """Tasks due by then, by id.  They are asked about again when they change, or by `note`."""
        found = []
        while (at_s := self.next_s()) is not None and at_s <= until_s:
            _, task_id = heapq.heappop(self._heap)
            del self._entry[task_id]
            found.append(task_id)
        return sorted(found)


class Tasks(dict[TaskId, "TaskState"]):
    """Task -> its state, for every task not over.  `touched`: those that changed in this tick."""

    def __init__(
        self,
        tasks: "dict[TaskId, TaskState]",
        lease_due_s: "Callable[[TaskState], float | None]",
        time_due_s: "Callable[[TaskState], float | None]",
    ) -> None:
        super().__init__()
        self.groups: dict[GroupKey, Group] = {}
        self.group_of: dict[TaskId, Group] = {}
        self.at_engine: dict[EngineId, set[TaskId]] = {}
        self.at_key: dict[str, set[TaskId]] = {}  # "engine|chip class" -> those that hold some of it
        self.held: dict[str, int] = {}  # "engine|chip class" -> devices
        self.apart: dict[
            tuple[EngineId, str, str], set[TaskId]
        ] = {}  # (engine, tenant, word of `limits.apart`) -> those there
        self.held_by: dict[tuple[str, str], int] = {}  # (tenant, chip class) -> devices
        self.by_phase: dict[str, set[TaskId]] = {}  # all but waiting ones
        self.from_parent: dict[LeaseId, TaskId] = {}  # the lease from above
        self.by_lease: dict[LeaseId, TaskId] = {}  # the lease held below
        self.refusing: set[TaskId] = set()  # some engine refused it lately
        self.promised: set[TaskId] = set()  # a seat is being freed for it
        self.owed: set[TaskId] = set()  # borrowers give devices back for it
        self.idle: set[TaskId] = set()  # its devices hardly work
        self.lent: set[TaskId] = set()  # it was parked for standing idle, or by its forecast
        self.lent_of: tuple[object, dict[str, LentDevices]] | None = None  # under which rules, kept by `idle`
        self.from_parent_waiting: set[TaskId] = set()
        self.gangs: set[TaskId] = set()  # waiting tasks that are one of several in a gang
        self.lease_due = Due(lease_due_s, self)
        self.time_due = Due(time_due_s, self)
        self.touched: dict[TaskId, None] = {}
        self.freed: set[str] = set()  # keys of `held` that became less
        self.steps_down: dict[TaskId, tuple[Order, Any, tuple[AskStep, ...]]] = {}  # kept by `asks`
        self.lines: dict[str, MovableLine] = {}  # of "engine|chip class", kept by `movable`
        self.bids: dict[TaskId, Any] = {}  # what running tasks bid, kept by `leaves`
        self.asks: tuple[list[tuple[EngineId, tuple[Offer, ...]]], dict[str, Any]] | None = (
            None  # kept by `children`
        )
        self._curves: dict[tuple[Any, ...], list[tuple[Point, ...]]] = {}
        self._users: dict[int, int] = {}  # id of points -> tasks
        for task_id, task in tasks.items():
            self[task_id] = task

    def __setitem__(self, task_id: TaskId, task: "TaskState") -> None:
        before = self.get(task_id)
        super().__setitem__(task_id, task)
        self.touched[task_id] = None
        if before is None or before.order is not task.order:
            self._use(task.order.curve.points)
            if before is not None:
                self._disuse(before.order.curve.points)
        if before is None or before.parent is not task.parent:
            if before is not None and before.parent is not None:
                self.from_parent.pop(before.parent.lease_id, None)
            if task.parent is not None:
                self.from_parent[task.parent.lease_id] = task_id
        if (
            before is None or before.phase is not task.phase or before.order is not task.order
            or before.refused is not task.refused or before.parent is not task.parent
        ):  # fmt: skip
            self._place_in_line(task_id, before, task)
        if task.promised:
            self.promised.add(task_id)
        elif before is not None and before.promised:
            self.promised.discard(task_id)
        if (task.owed is not None) is not (before is not None and before.owed is not None):
            self.owed ^= {task_id}
        if (task.idle_since_s is not None) is not (before is not None and before.idle_since_s is not None):
            self.idle ^= {task_id}
        if bool(task.lent) is not (before is not None and bool(before.lent)):
            self.lent ^= {task_id}
        if task.lent or (before is not None and before.lent):
            self.lent_of = None
        if task.refused:
            self.refusing.add(task_id)
        elif before is not None and before.refused:
            self.refusing.discard(task_id)
        if before is None or before.engine != task.engine or before.needs != task.needs:
            if before is not None and before.engine is not None:
                self._give_up(task_id, before)
            if task.engine is not None:
                self._hold(task_id, task)
        if before is None or before.lease_id != task.lease_id:
            if before is not None and before.lease_id is not None:
                self.by_lease.pop(before.lease_id, None)
            if task.lease_id is not None:
                self.by_lease[task.lease_id] = task_id
        self.lease_due.note(task_id, task)
        self.time_due.note(task_id, task)
        if self.lines:
            if before is not None and before.phase == "running":
                self._note_moved(task_id, before)
            if task.phase == "running":
                self._note_moved(task_id, task)

    def __delitem__(self, task_id: TaskId) -> None:
        task = self[task_id]
        super().__delitem__(task_id)
        self.touched[task_id] = None
        self._disuse(task.order.curve.points)
        self.refusing.discard(task_id)
        self.promised.discard(task_id)
        self.owed.discard(task_id)
        self.idle.discard(task_id)
        self.lent.discard(task_id)
        self.lent_of = None
        self.steps_down.pop(task_id, None)
        self.bids.pop(task_id, None)
        self._note_moved(task_id, task)
        self._leave(task_id, task)
        if task.engine is not None:
            self._give_up(task_id, task)
        if task.parent is not None:
            self.from_parent.pop(task.parent.lease_id, None)
        if task.lease_id is not None:
            self.by_lease.pop(task.lease_id, None)

    def pop(self, task_id: TaskId, *default: Any) -> Any:
        if task_id not in self:
            if default:
                return default[0]
            raise KeyError(task_id)
        task = self[task_id]
        del self[task_id]
        return task

    # ---- reading ---------------------------------------------------------------------------------------------------

    def in_phase(self, phase: str) -> list["TaskState"]:
        """By id.  For every phase but waiting."""
        return [self[task_id] for task_id in sorted(self.by_phase.get(phase, ()))]

    def at(self, engine: EngineId) -> list["TaskState"]:
        """Those that hold or ask for something at `engine`, by id."""
        return [self[task_id] for task_id in sorted(self.at_engine.get(engine, ()))]

    def at_chip(self, key: str) -> list["TaskState"]:
        """Those that hold devices of "engine|chip class", by id."""
        return [self[task_id] for task_id in sorted(self.at_key.get(key, ()))]

    @property
    def waiting(self) -> int:
        return len(self.group_of)

    def ask_anew(self, task_ids: list[TaskId]) -> None:
        """What was found for these waiting tasks is not ordered: children are asked as if they had not been."""
        self.asks = None
        self.stay(task_ids)
        for group in self.groups.values():
            group.barren = None

    def stay(self, task_ids: list[TaskId]) -> None:
        """These waiting tasks stand in line as before.  Those that were not taken from it stand there twice, until it is made anew."""
        for task_id in task_ids:
            group = self.group_of[task_id]
            heapq.heappush(group.line, (self[task_id].order.submitted_s, task_id))
            if len(group.line) > 2 * len(group.members) + LEFT_IN_LINE:
                group.line = sorted((self[name].order.submitted_s, name) for name in group.members)

    def begin_tick(self) -> None:
        """`touched` and `freed` are of one tick: what an earlier one left was looked at then."""
        self.touched, self.freed = {}, set()

    def shared(self, order: Order) -> Order:
        """The order with its curve's points replaced by equal ones that are known: a class of tasks keeps one."""
        points = order.curve.points
        if id(points) not in self._users:
            for other in self._curves.get(_mark(points), ()):
                if other == points:
                    parts = [*_parts(order)]
                    parts[_CURVE] = Curve(other, order.curve.work_s, order.curve.source)
                    return Order(*parts)  # a third of the time that `replace` takes
        return order

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def _use(self, points: tuple[Point, ...]) -> None:
        count = self._users.get(id(points), 0)
        self._users[id(points)] = count + 1
        if count == 0:
            self._curves.setdefault(_mark(points), []).append(points)

    def _disuse(self, points: tuple[Point, ...]) -> None:
        count = self._users[id(points)] - 1
        if count:
            self._users[id(points)] = count
            return
        del self._users[id(points)]
        mark = _mark(points)
        self._curves[mark] = [other for other in self._curves[mark] if other is not points]
        if not self._curves[mark]:
            del self._curves[mark]

    def _note_moved(self, task_id: TaskId, task: "TaskState") -> None:
        for need in task.needs:
            key = f"{task.engine}|{need.chip_class}"
            line = self.lines.get(key)
            if line is not None:
                line.stale.add(task_id)
                if len(line.stale) > 2 * len(line.entries) + LEFT_IN_LINE:
                    del self.lines[key]  # nobody has asked for long

    def _place_in_line(self, task_id: TaskId, before: "TaskState | None", task: "TaskState") -> None:
        if before is not None:
            self._leave(task_id, before)
        if task.phase != "queued":
            self.by_phase.setdefault(task.phase, set()).add(task_id)
            return
        key = group_key(task)
        group = self.groups.get(key)
        if group is None:
            chips = frozenset([need.chip_class for point in task.order.curve.points for need in point.needs])
            group = self.groups[key] = Group(key, chips, task.order.tenant)
        if task.parent is not None:
            self.from_parent_waiting.add(task_id)
        elif len(task.order.gang) > 1:
            self.gangs.add(task_id)
        group.members.add(task_id)
        heapq.heappush(group.line, (task.order.submitted_s, task_id))
        self.group_of[task_id] = group

    def _leave(self, task_id: TaskId, task: "TaskState") -> None:
        if task.phase != "queued":
            self.by_phase[task.phase].discard(task_id)
            return
        self.from_parent_waiting.discard(task_id)
        self.gangs.discard(task_id)
        group = self.group_of.pop(task_id)
        group.members.discard(task_id)
        if not group.members:
            del self.groups[group.key]

    def _hold(self, task_id: TaskId, task: "TaskState") -> None:
        assert task.engine is not None
        self.at_engine.setdefault(task.engine, set()).add(task_id)
        if task.order.apart:
            self.apart.setdefault((task.engine, task.order.tenant, task.order.apart), set()).add(task_id)
        for need in task.needs:
            key = f"{task.engine}|{need.chip_class}"
            self.held[key] = self.held.get(key, 0) + need.devices
            self.at_key.setdefault(key, set()).add(task_id)
            by = (task.order.tenant, need.chip_class)
            self.held_by[by] = self.held_by.get(by, 0) + need.devices

    def _give_up(self, task_id: TaskId, task: "TaskState") -> None:
        assert task.engine is not None
        self.at_engine[task.engine].discard(task_id)
        if task.order.apart:
            there = self.apart[task.engine, task.order.tenant, task.order.apart]
            there.discard(task_id)
            if not there:
                del self.apart[task.engine, task.order.tenant, task.order.apart]
        for need in task.needs:
            key = f"{task.engine}|{need.chip_class}"
            self.held[key] -= need.devices
            self.at_key[key].discard(task_id)
            self.held_by[task.order.tenant, need.chip_class] -= need.devices
            self.freed.add(key)


def group_key(task: "TaskState") -> GroupKey:
    """What decides which seats a waiting task may take and what they are worth to it.  Tasks whose worth moves with time or
    with work done stand together as well; each is then valued for itself (`bids.steady`)."""
    order, parent = task.order, task.parent
    return (
        id(order.curve.points), order.tenant, order.kind, order.bid_micro_cny_per_device_hour, steady(order), order.objective,
        order.elastic, order.preemptible, order.regions, order.vendors, order.data_bytes_at, order.apart, order.entered_at,
        order.hours is not None, bool(task.lent),
        (order.checkpoint_at, task.place) if order.checkpoint_bytes and task.saved_s > 0 else (),
        tuple([engine for engine, _ in task.refused]) if task.refused else (),
        parent.points if parent is not None and parent.started else (), parent is not None,
    )  # fmt: skip


_parts = attrgetter(*[field.name for field in fields(Order)])
_CURVE = [field.name for field in fields(Order)].index("curve")


def _mark(points: tuple[Point, ...]) -> tuple[Any, ...]:
    """Equal for equal points, and cheap."""
    return tuple([(point.point_id, point.rate) for point in points])
