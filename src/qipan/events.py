"""Facts and commands: everything that comes into `decide`, and everything that goes out.

Every fact is a *cause* (it came from outside: submission, failure, price) or an *outcome* (it follows from what
was decided: start, progress, exit).  Replay takes all of them; a what-if takes causes only.
Between boards and in the store they travel in an envelope with kind and version; old versions are read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NewType

import msgspec

from qipan.curves import Need, Point
from qipan.errors import InvalidInput
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, LeaseId, Offer, Order, Out, Room, TaskId, Usage
from qipan.network import Link
from qipan.quota import QuotaRule

FactId = NewType("FactId", int)

# ---- commands: down to engines -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hold the largest of `order.curve`'s points that fits; lapses by itself after `duration_s`."""

    task_id: TaskId
    lease_id: LeaseId
    term: int
    generation: int
    order: Order
    needs: tuple[Need, ...]
    duration_s: float
    kind: ClassVar[str] = "reserve"


@dataclass(frozen=True, slots=True)
class Start:
    """Run the task inside the lease at one of the points (a leaf is always given exactly one).
    `resume_from_s` is work already checkpointed, in seconds at the best point."""

    task_id: TaskId
    lease_id: LeaseId
    term: int
    generation: int
    attempt: int
    points: tuple[Point, ...]
    kind: ClassVar[str] = "start"


@dataclass(frozen=True, slots=True)
class Resize:
    """Go on at another point: checkpoint, stop, reshard, start.  The next attempt begins with the new point."""

    task_id: TaskId
    lease_id: LeaseId
    term: int
    generation: int
    attempt: int
    points: tuple[Point, ...]
    kind: ClassVar[str] = "resize"


@dataclass(frozen=True, slots=True)
class Stop:
    """Checkpoint when `park`, then end the task's processes and give the lease back."""

    task_id: TaskId
    lease_id: LeaseId
    term: int
    generation: int
    park: bool
    why: str
    kind: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class Renew:
    """Keep the leases until `asked_lease_s + duration_s` on the holder's clock, where `asked_lease_s` is the stamp
    the holder put into its RenewalAsked; None for an engine called directly: from now on.  A renewal that arrives
    late therefore never extends past what its sender counts on (Gray and Cheriton 1989)."""

    lease_ids: tuple[LeaseId, ...]
    term: int
    duration_s: float
    asked_lease_s: float | None = None
    kind: ClassVar[str] = "renew"


@dataclass(frozen=True, slots=True)
class TakeCensus:
    """Say what you hold for this board: asked after a start of either side.  `asked_lease_s` is on the asker's clock;
    `taken` is the highest of the other side's report numbers that the asker has stored."""

    term: int
    asked_lease_s: float
    taken: int = 0
    kind: ClassVar[str] = "take_census"


Command = Reserve | Start | Resize | Stop | Renew | TakeCensus
TaskCommand = Reserve | Start | Resize | Stop

# ---- facts: up from engines and in from people -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineOffered:
    """An engine's current offers; replaces its last ones.  `chooses`: the engine picks among a task's points and
    gives devices up at its asks by itself (a board does); otherwise the board above does.  `out`: what it has and does not
    offer; `in_place`: it can have the processes of a task go on at another point."""

    engine: EngineId
    offers: tuple[Offer, ...]
    chooses: bool
    out: tuple[Out, ...] = ()
    in_place: bool = False
    kind: ClassVar[str] = "engine_offered"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class StorageOffered:
    """Where a leaf engine's tasks keep their checkpoints; replaces what it said last.  None: not counted."""

    engine: EngineId
    room: Room | None
    kind: ClassVar[str] = "storage_offered"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class BoardStarted:
    """This board's process began.  `engines` are those it is joined to; `same_boot`: lease times in its store are
    still on this machine's running clock; `reign`: how often a standby took this board over."""

    engines: tuple[EngineId, ...]
    same_boot: bool
    reign: int = 0
    kind: ClassVar[str] = "board_started"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class EngineAttached:
    """An engine joined this board, or was started again."""

    engine: EngineId
    kind: ClassVar[str] = "engine_attached"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class HeldTask:
    """One lease that an engine holds for the board above.  `running` False: nothing started.
    `lease_left_s`: how long it lasts without renewal.  `granted`: the answer was sent, and may be lost with the
    numbers of a board that started from nothing; False: it is still to come."""

    order: Order
    lease_id: LeaseId
    generation: int
    attempt: int
    running: bool
    point_id: str
    needs: tuple[Need, ...]
    place: str
    done_s: float
    saved_s: float
    lease_left_s: float
    granted: bool = True


@dataclass(frozen=True, slots=True)
class TasksHeld:
    """The answer to TakeCensus: everything held, after every report numbered before it.  `term_seen` is the highest
    term that was heard of before the question; `asked_lease_s` is the question's stamp; `over` how tasks ended
    here, so that a restored board does not run them again."""

    engine: EngineId
    term_seen: int
    asked_lease_s: float
    held: tuple[HeldTask, ...]
    over: tuple[tuple[TaskId, str], ...] = ()
    kind: ClassVar[str] = "tasks_held"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine has been silent for longer than its lease and the margin, or was detached."""

    engine: EngineId
    why: str
    kind: ClassVar[str] = "engine_lost"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RenewalAsked:
    """A child board asks its parent to renew the leases it holds from it; `asked_lease_s` is on its own clock."""

    engine: EngineId
    lease_ids: tuple[LeaseId, ...]
    asked_lease_s: float
    kind: ClassVar[str] = "renewal_asked"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """Devices of a chip class at a leaf engine failed (negative) or came back (positive)."""

    engine: EngineId
    chip_class: str
    devices: int
    why: str
    kind: ClassVar[str] = "capacity_changed"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TaskSubmitted:
    """`budget_micro_cny`: what its owner lets it cost; None when the owner said nothing and the hold is an estimate."""

    order: Order
    hold_micro_cny: int
    budget_micro_cny: int | None = None
    kind: ClassVar[str] = "task_submitted"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class CancelRequested:
    task_id: TaskId
    by: str
    kind: ClassVar[str] = "cancel_requested"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RulesSet:
    """The quota rules of all boards, in place of those before; a board keeps its own."""

    rules: tuple[QuotaRule, ...]
    kind: ClassVar[str] = "rules_set"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class LinksSet:
    """The links between sites, in place of those before."""

    links: tuple[Link, ...]
    kind: ClassVar[str] = "links_set"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ElectricityPriced:
    """What electricity costs a leaf engine's owner now beyond what the tariff covers: chip class -> micro-CNY per device-hour.  Replaces
    what was said last."""

    engine: EngineId
    micro_cny_per_device_hour: tuple[tuple[ChipClassId, int], ...]
    kind: ClassVar[str] = "electricity_priced"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TaskWoken:
    """The holder of a lease that stood idle needs its devices: they are not lent, or come back within the notice."""

    task_id: TaskId
    by: str
    kind: ClassVar[str] = "task_woken"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class BudgetReached:
    """The books say that the task's attempt must park now to end within its budget.  `spent_micro_cny`: so far."""

    task_id: TaskId
    spent_micro_cny: int
    budget_micro_cny: int
    kind: ClassVar[str] = "budget_reached"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class BudgetRaised:
    task_id: TaskId
    budget_micro_cny: int
    by: str
    kind: ClassVar[str] = "budget_raised"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ParkRequested:
    """Park everything (Ctrl-C of `up`) or take up work again (`resume`)."""

    park: bool
    by: str
    kind: ClassVar[str] = "park_requested"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class PersonNoted:
    """Who logged in, was refused, was added or lost a session: for people to read; nothing is decided by it.  `source` is an
    address, or who did it; `issuer` "" a user of this host."""

    what: str
    user: str
    tenant: str
    role: str
    issuer: str
    session: str
    source: str
    why: str
    kind: ClassVar[str] = "person_noted"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """A command from the parent board."""

    command: Command
    kind: ClassVar[str] = "command_received"
    cause: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    task_id: TaskId
    lease_id: LeaseId
    engine: EngineId
    generation: int
    needs: tuple[Need, ...]
    kind: ClassVar[str] = "lease_granted"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """The lease is not given, or is no longer held.  `over`: how the task ended there, empty where it did not; its exit was said, and may be
    lost with the numbers of a board that started from nothing."""

    task_id: TaskId
    lease_id: LeaseId
    engine: EngineId
    generation: int
    why: str
    over: str = ""
    kind: ClassVar[str] = "lease_refused"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """`place` is the leaf's path from the reporting engine down: "east/dc1/local"."""

    task_id: TaskId
    lease_id: LeaseId
    engine: EngineId
    generation: int
    attempt: int
    point_id: str
    needs: tuple[Need, ...]
    place: str
    kind: ClassVar[str] = "task_started"
    cause: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class TaskProgress:
    """`done_s` and `saved_s`: work done and work in the newest checkpoint, of the whole task, in seconds at the
    best point.  `detail` is what the task printed (step, loss, rows per second by rank), as JSON text."""

    task_id: TaskId
    engine: EngineId
    attempt: int
    done_s: float
    saved_s: float
    detail: str
    usage: Usage
    kind: ClassVar[str] = "task_progress"
    cause: ClassVar[bool] = False

    def said(self) -> dict[str, Any]:
        """What `detail` tells; nothing where it is no JSON object, for a script may print what it likes."""
        try:
            value = json.loads(self.detail)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class DevicesBusy:
    """What share of the time from `from_s` to `until_s` the attempt's devices were busy, as measured where it runs.  Said when it changed by
    a hundredth or more."""

    task_id: TaskId
    engine: EngineId
    attempt: int
    busy_share: float
    from_s: float
    until_s: float
    kind: ClassVar[str] = "devices_busy"
    cause: ClassVar[bool] = False


Outcome = Literal["done", "failed", "parked", "resized", "lost", "cancelled"]
FINAL = ("done", "failed", "cancelled")  # after these a task is over


@dataclass(frozen=True, slots=True)
class TaskExited:
    """One attempt ended.  After "done", "failed" and "cancelled" the task is over; after "parked" and "lost" its
    lease is given back (a board may have tried again by itself before saying so: then `final` is False);
    after "resized" the next attempt follows in the same lease, `in_place`: in the same processes, which stood still for
    `standstill_s` (None: not measured)."""

    task_id: TaskId
    lease_id: LeaseId
    engine: EngineId
    generation: int
    attempt: int
    outcome: Outcome
    exit_code: int | None
    done_s: float
    saved_s: float
    why: str
    usage: Usage
    final: bool = True
    preempted_s: tuple[float, ...] = ()  # when boards below parked the task for others
    in_place: bool = False
    standstill_s: float | None = None
    kind: ClassVar[str] = "task_exited"
    cause: ClassVar[bool] = False


Fact = (
    BoardStarted
    | EngineAttached
    | TasksHeld
    | EngineOffered
    | StorageOffered
    | EngineLost
    | RenewalAsked
    | CapacityChanged
    | TaskSubmitted
    | CancelRequested
    | RulesSet
    | LinksSet
    | ElectricityPriced
    | TaskWoken
    | DevicesBusy
    | BudgetReached
    | BudgetRaised
    | ParkRequested
    | PersonNoted
    | CommandReceived
    | LeaseGranted
    | LeaseRefused
    | TaskStarted
    | TaskProgress
    | TaskExited
)
Message = Fact | Command

#: kind -> class, of everything that is stored or sent
KINDS: dict[str, Any] = {
    kind.kind: kind
    for kind in (
        Reserve, Start, Resize, Stop, Renew, TakeCensus, BoardStarted, EngineAttached, TasksHeld,
        EngineOffered, StorageOffered, EngineLost, RenewalAsked, CapacityChanged, TaskSubmitted, CancelRequested, ParkRequested, LeaseGranted,
        RulesSet, LinksSet, ElectricityPriced, TaskWoken, DevicesBusy, BudgetReached, BudgetRaised, PersonNoted,
        LeaseRefused, TaskStarted, TaskProgress, TaskExited,
    )
}  # fmt: skip

Readers = Mapping[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]]
#: kind -> the version that is written; 1 where nothing stands.  A field with a default needs no new version
VERSIONS: Mapping[str, int] = {}
#: (kind, version) -> makes of that version's body the next one's; what was stored stays as it is and is read through these
READERS: Readers = {}


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """`cause` is the id of the fact or tick that this followed from, at its origin."""

    kind: str
    version: int
    cause: str
    body: msgspec.Raw


def encode(message: Message, cause: str = "") -> bytes:
    if isinstance(message, CommandReceived):
        inner = encode(message.command, cause)
        return msgspec.json.encode(
            Envelope("command_received", VERSIONS.get("command_received", 1), cause, msgspec.Raw(inner))
        )
    return msgspec.json.encode(
        Envelope(
            message.kind, VERSIONS.get(message.kind, 1), cause, msgspec.Raw(msgspec.json.encode(message))
        )
    )


def without_launch(fact: Fact) -> Fact:
    """As people may see it: an order's `launch` has the task's environment in it, keys and passwords too."""
    if isinstance(fact, TaskSubmitted):
        return replace(fact, order=replace(fact.order, launch=b""))
    if isinstance(fact, CommandReceived) and isinstance(fact.command, Reserve):
        order = replace(fact.command.order, launch=b"")
        return replace(fact, command=replace(fact.command, order=order))
    if isinstance(fact, TasksHeld):
        held = tuple(replace(one, order=replace(one.order, launch=b"")) for one in fact.held)
        return replace(fact, held=held)
    return fact


def decode(payload: bytes, versions: Mapping[str, int] = VERSIONS, readers: Readers = READERS) -> Message:
    """Of any version that was ever written.  Raises InvalidInput on an unknown kind, a later version, or a body that
    does not fit."""
    try:
        envelope = msgspec.json.decode(payload, type=Envelope)
        if envelope.kind not in KINDS and envelope.kind != "command_received":
            raise InvalidInput(f"unknown kind {envelope.kind!r}; update qipan on this board")
        body = bytes(envelope.body)
        now = versions.get(envelope.kind, 1)
        if envelope.version != now:
            body = _brought(envelope, now, readers)
        if envelope.kind == "command_received":
            inner = decode(body, versions, readers)
            assert not isinstance(inner, Fact)
            return CommandReceived(inner)
        message: Message = msgspec.json.decode(body, type=KINDS[envelope.kind])
        return message
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"unreadable message: {error}") from error


def _brought(envelope: Envelope, now: int, readers: Readers) -> bytes:
    """The body of an earlier version as the present one has it."""
    if not 0 < envelope.version < now:
        raise InvalidInput(
            f"{envelope.kind} has version {envelope.version}; this release reads 1 to {now}; update qipan on this board"
        )
    body = msgspec.json.decode(envelope.body)
    for version in range(envelope.version, now):
        body = readers[envelope.kind, version](body)
    return msgspec.json.encode(body)
