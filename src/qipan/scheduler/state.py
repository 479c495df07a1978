"""What a board knows: its engines and its live tasks.  Owned by `decide`, which updates it in place; the values
in it are frozen (`tasks` keeps the live ones with what a tick asks of them).  Nothing here knows where in the tree the board stands."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from qipan.curves import Need, Point
from qipan.events import Command, Fact
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import PARKING_SHARE, AskStep, EngineId, LeaseId, Offer, Order, Out, Reason, Room, TaskId
from qipan.network import Link
from qipan.quota import QuotaRule
from qipan.rules.entitlement import Holdings
from qipan.scheduler.tasks import Tasks

#: renewal is asked for every sixth of a lease.  A lease ends no later than the one above it, so on the third level at
#: least half is left between renewals: less than that may be set aside for parking (`PARKING_SHARE`)
RENEW_SHARE = 1 / 6


class Phase(StrEnum):
    QUEUED = "queued"  # no lease below
    PARKED = "parked"  # no lease below, and not in the queue: its budget is spent
    BEHIND = "behind"  # no lease below, and not in the queue: what it comes after has not ended
    LENT = "lent"  # no lease below, and not in the queue: its forecast does not ask for it now
    RESERVING = "reserving"  # Reserve is on its way
    RESERVED = "reserved"  # granted below; waits for the parent's Start
    STARTING = "starting"  # Start is on its way
    RUNNING = "running"
    RESIZING = "resizing"  # running, ordered to go on at another point
    STOPPING = "stopping"  # ordered to stop; what follows is in `after_stop`


#: it was told to start, and not to stop
RUNS = (Phase.STARTING, Phase.RUNNING, Phase.RESIZING)


class AfterStop(StrEnum):
    QUEUE = "queue"  # goes back into this board's queue
    RETURN = "return"  # goes back to the parent
    END = "end"  # is over (cancelled)
    KEEP = "keep"  # stays parked until its budget is raised
    LEND = "lend"  # is lent until its forecast asks for it


@dataclass(frozen=True, slots=True)
class ParentLease:
    """This task came from the parent, within this lease.  `points` are those it may use; empty until Start."""

    lease_id: LeaseId
    term: int
    generation: int
    until_lease_s: float
    answered: bool = False  # LeaseGranted was sent up
    started: bool = False  # Start came down
    points: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskState:
    """One live task.  `needs` is what it holds (or asks for) at `engine`; `generation` counts every command on the
    task anywhere in the tree that this board heard of.  `refused` maps engine -> the time until which it is not
    asked again."""

    order: Order
    phase: Phase
    since_s: float
    parent: ParentLease | None = None
    engine: EngineId | None = None
    lease_id: LeaseId | None = None
    point_id: str = ""
    target_id: str = ""  # while resizing: the point it goes to
    needs: tuple[Need, ...] = ()
    place: str = ""
    generation: int = 0
    attempt: int = 0
    done_s: float = 0.0
    saved_s: float = 0.0
    lost_s: float = 0.0
    losses: int = 0  # attempts lost in a row without a new checkpoint
    after_stop: AfterStop = AfterStop.QUEUE
    stop_why: str = ""
    lease_until_s: float = 0.0  # on this board's lease clock, margin not included
    refused: tuple[tuple[EngineId, float], ...] = ()
    promised_until_s: float = 0.0  # devices are being freed for it; until then it waits here
    why_waiting: str = ""
    promised: str = ""  # "engine|point" that is being freed for it; nobody else takes those devices
    preempted_s: tuple[float, ...] = ()  # when it was parked for others, kept by `preemptions`
    idle_since_s: float | None = None  # its devices hardly worked since; kept by `idle`, as the next two
    noticed_s: float | None = None  # when its holder was told that the lease is lent
    lent: tuple[
        Need, ...
    ] = ()  # what it held when it was parked for standing idle, or by its forecast, until it has devices again
    checkpoint_longer: float = 1.0  # of its order, under the lease that it holds
    turns_s: float | None = (
        None  # when its forecast next asks for it, or no longer; None: to be looked up; kept by `tides`
    )
    reshape_s: float | None = (
        None  # what its last change of shape under this lease cost; None: there was none
    )
    owed: tuple[str, int, float] | None = (
        None  # ("engine|chip class", devices) that borrowers give back for it, and until when others leave it so many
    )

    @property
    def task_id(self) -> TaskId:
        return self.order.task_id

    @property
    def devices(self) -> int:
        return sum(need.devices for need in self.needs)

    def point(self) -> Point | None:
        return self.order.curve.point(self.point_id) if self.point_id else None

    def target(self) -> Point | None:
        return self.order.curve.point(self.target_id) if self.target_id else None


@dataclass(frozen=True, slots=True)
class EngineState:
    """`chooses`: it picks among a task's points and gives devices up at its asks by itself; `in_place`: it can have processes go on at
    another point."""

    offers: tuple[Offer, ...]
    chooses: bool
    lost: bool = False
    room: Room | None = None  # where its tasks' checkpoints lie; None: not counted
    out: tuple[Out, ...] = ()  # what it has and does not offer now
    electricity: tuple[
        tuple[ChipClassId, int], ...
    ] = ()  # chip class -> micro-CNY per device-hour beyond what the tariff covers
    in_place: bool = False

    def electricity_of(self, chip_class: str) -> int:
        return next((price for chip, price in self.electricity if chip == chip_class), 0)

    def with_more(self, chip_class: str, devices: int) -> "EngineState":
        """It offers so many devices more of a chip class, or fewer; never fewer than none.  A board's are free ones."""
        free = (AskStep(devices, 0),) if self.chooses and devices > 0 else ()
        offers = tuple(
            replace(
                offer,
                devices=max(0, offer.devices + devices),
                largest_gang=max(0, offer.largest_gang + devices),
                asks=(*free, *offer.asks),
            )
            if offer.chip_class == chip_class
            else offer
            for offer in self.offers
        )
        return replace(self, offers=offers)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a board behaves.  Durations in seconds."""

    lease_s: float = 60.0
    margin_s: float = 10.0  # waited beyond a lease before its task is placed elsewhere
    retry_s: float = 5.0  # an engine that refused a task is asked again after this
    asks: bool = True  # False: only free devices are offered upward (for measuring what prices are worth)
    elastic: bool = True
    in_place: bool = True  # False: every change of shape is counted as a new start (for measuring)
    backfill: bool = True  # False: nothing is kept for a wide task that waits (for measuring)
    defragment: bool = True  # False: no task is moved to clear a block for a gang (for measuring)
    policy: str = "revenue"  # what is maximised: a name of `policies.OBJECTIVES`
    ask_steps: int = 12
    look_at_all_up_to: int = (
        64  # live tasks; beyond, a tick looks at what changed, and at all once a lease's time
    )
    orders_per_tick: int = 50_000  # so many tasks at most are ordered to children in one tick


@dataclass(slots=True)
class State:
    """`tasks`: every task not over.  `over`: task -> how it ended.  `sent_down`: engine -> (chip class, site) ->
    devices ordered since its last offer.  `uncounted`: engines that have not said yet what they hold; nothing is
    placed there.  `quarantine_until_s`: until then nothing is placed anywhere (see `census`)."""

    board: BoardId
    settings: Settings = Settings()
    top: bool = True  # no parent is attached
    term: int = 0
    tick: int = 0
    parent_term: int = 0  # the highest that was heard from above
    uncounted: dict[EngineId, float] = field(default_factory=dict)  # -> when it was asked, on the lease clock
    quarantine_until_s: float | None = None  # on the lease clock
    census_asked_s: float | None = None  # the parent's question that waits for an answer: its stamp
    census_term_seen: int = 0
    engines: dict[EngineId, EngineState] = field(default_factory=dict)
    tasks: Tasks = field(default_factory=dict)  # type: ignore[assignment]  # made one in __post_init__
    over: dict[TaskId, str] = field(default_factory=dict)
    sent_down: dict[str, int] = field(default_factory=dict)
    parked: bool = False
    published: tuple[Offer, ...] = ()
    published_out: tuple[Out, ...] = ()
    renewed_s: float | None = (
        None  # when leases at directly called engines were last renewed; None: do so now
    )
    asked_s: float = 0.0  # when renewal was last asked from the parent
    lease_sequence: int = 0
    rules: tuple[QuotaRule, ...] = ()  # those of this board
    links: dict[str, Link] = field(default_factory=dict)  # "site|site" -> the link from the one to the other
    looked_s: float = 0.0  # when everything was last looked at, on the lease clock
    more: bool = False  # the last tick stopped at orders_per_tick
    preempted_s: dict[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # "tenant|chip class" -> when this board parked one of its tasks for others; kept by `preemptions`
    first: str = ""  # the waiting task that devices are kept for, by `backfill`
    first_at: str = ""  # where: "engine|chip class", for a board below with "|site"
    migrated_to: str = ""  # the running task that `migration` looked at last
    migrated_s: float = 0.0  # when it looked, on the lease clock
    moves_at_s: float | None = None  # when a choice that moves running tasks is carried out; kept by `leaves`

    def __post_init__(self) -> None:
        self.tasks = Tasks(self.tasks, self.lease_due_s, self.time_due_s)

    @property
    def reserves(self) -> bool:
        """Whether devices may be kept from some for others: by rules, or since they are lent."""
        return bool(self.rules or self.tasks.lent)

    def lease_due_s(self, task: TaskState) -> float | None:
        """When the task must park because the lease above ends, or be placed anew because its engine is silent, on
        the lease clock."""
        due_s = None
        if task.parent is not None and task.phase is not Phase.STOPPING:
            due_s = park_at_s(self, task)
        if task.order.on_partition == "restart" and self.moves_when_silent(task):
            silent_s = task.lease_until_s + self.settings.margin_s
            due_s = silent_s if due_s is None else min(due_s, silent_s)
        return due_s

    def moves_when_silent(self, task: TaskState) -> bool:
        known = self.engines.get(task.engine) if task.engine is not None else None
        return known is not None and known.chooses and task.phase is not Phase.RESERVING

    def time_due_s(self, task: TaskState) -> float | None:
        """When a waiting task may be placed where it was refused, or is promised devices no longer; when a forecast changes."""
        times = []
        if task.phase is Phase.QUEUED and (task.refused or task.promised_until_s):
            times = [again_s for _, again_s in task.refused]
            if task.promised_until_s:
                times.append(task.promised_until_s)
        if task.order.hours is not None and task.parent is None and task.turns_s != math.inf:
            times.append(task.turns_s or 0.0)
        return min(times, default=None)


@dataclass(frozen=True, slots=True)
class Moment:
    """The time of a tick: `now_s` for deadlines, `lease_s` for leases."""

    now_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class ToEngine:
    engine: EngineId
    command: Command


@dataclass(frozen=True, slots=True)
class Decision:
    """What one tick decided.  It names the state it was made from (`board`, `term`, `tick`), makes no choices
    when applied, and applying it twice is the same as once.  `wake_s`: when to decide again if nothing comes in."""

    board: BoardId
    term: int
    tick: int
    commands: tuple[ToEngine, ...] = ()
    reports: tuple[Fact, ...] = ()  # to the parent
    reasons: tuple[Reason, ...] = ()
    ended: tuple[tuple[TaskId, str], ...] = ()
    wake_s: float | None = None


def lease_for(state: State, task: TaskState, moment: Moment) -> float:
    """Seconds that a lease given now for the task may last: never beyond the one it is held under from above."""
    if task.parent is None:
        return state.settings.lease_s
    return max(0.0, min(state.settings.lease_s, task.parent.until_lease_s - moment.lease_s))


def named_to(reader: TaskState, other: TaskState) -> str:
    """What the owner of `reader` is told of another task that is in its way: its id, if it is of the same tenant."""
    return other.task_id if other.order.tenant == reader.order.tenant else "another tenant's task"


def parking_s(task: TaskState, lease_s: float) -> float:
    """How long before its lease's end a task is told to park, so that it has ended by then."""
    point = task.point()
    return min(point.stop_s, lease_s * PARKING_SHARE) if point is not None else 0.0


def park_at_s(state: State, task: TaskState) -> float:
    """When a task from the parent must begin to park, on the lease clock."""
    assert task.parent is not None
    early_s = parking_s(task, state.settings.lease_s) if task.phase is not Phase.QUEUED else 0.0
    return task.parent.until_lease_s - early_s


@dataclass(slots=True)
class Placed:
    """What this tick has placed at each engine already, or found held there when first asked: engine -> [bytes, bytes/s] of its
    storage; (engine, tenant, word) -> a task that keeps others apart."""

    storage: dict[EngineId, list[float]] = field(default_factory=dict)
    apart: dict[tuple[EngineId, str, str], TaskId] = field(default_factory=dict)

    def copy(self) -> "Placed":
        return Placed({engine: [*held] for engine, held in self.storage.items()}, {**self.apart})


@dataclass(slots=True)
class Draft:
    """A decision while it is being made.  `anew`: everything is looked at, not only what changed.  `together`: running tasks may be
    moved that a choice within the last minute would have moved."""

    moment: Moment
    anew: bool = False
    together: bool = False
    chips: set[str] = field(default_factory=set)  # chip classes of which more may be had than before
    outs: bool = False  # what engines do not offer may have changed
    ordered: set[str] = field(default_factory=set)  # chip classes ordered from children
    holdings: Holdings | None = None  # kept by `owners`
    reclaimed: dict[tuple[str, str], int] = field(
        default_factory=dict
    )  # (tenant, chip class) -> devices told to go
    kept: dict[str, int] = field(
        default_factory=dict
    )  # "engine|chip class" -> free devices kept for promised seats
    placed: Placed = field(default_factory=Placed)  # kept by `conditions`
    commands: list[ToEngine] = field(default_factory=list)
    reports: list[Fact] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    ended: list[tuple[TaskId, str]] = field(default_factory=list)

    def because(self, task_id: TaskId, verdict: str, text: str, **values: object) -> None:
        self.reasons.append(
            Reason(
                task_id, verdict, text, tuple((name, str(value)) for name, value in sorted(values.items()))
            )
        )
