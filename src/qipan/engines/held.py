"""A lease as a leaf engine keeps it on disk, and where what belongs to it lies in the engine's folder."""

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qipan.clock import Clock
from qipan.curves import Need, Point
from qipan.engines.launcher import Folders, Hold, folders_of, read_json, write_text
from qipan.events import Resize
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import EngineId, LeaseId, Order, TaskId, Usage
from qipan.workload import Launch, Task


@dataclass(frozen=True, slots=True)
class Kept:
    """Processes that an earlier attempt started.  `attempt`: whose folder they live in; `workers`: their numbers, by device;
    `numbered`: workers so far; `began_s`: when this attempt took them over (Unix); `events_from`: where its part of the
    events file begins, in bytes."""

    attempt: int
    workers: tuple[int, ...]
    numbered: int
    began_s: float
    events_from: int


@dataclass(frozen=True, slots=True)
class Change:
    """An order to go on at another point.  `until_lease_s`: an answer that comes later is not waited for; `reshaped_s`: when
    they went on (Unix), while whoever leaves is still on the way out; `standstill_s`: how long they stood still for it, as they say."""

    workers: tuple[int, ...]
    numbered: int
    until_lease_s: float
    reshaped_s: float = 0.0
    standstill_s: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """One lease on disk.  `devices` are indices into the pool of its chip class.  `attempt` 0: not started."""

    lease_id: LeaseId
    term: int
    generation: int
    order: Order
    needs: tuple[Need, ...]
    devices: tuple[int, ...]
    until_lease_s: float
    lease_s: float  # how long it was given for
    point_id: str = ""
    attempt: int = 0
    saved_s: float = 0.0
    stop_outcome: str = ""  # "parked" or "cancelled" once a stop was ordered
    resize: Resize | None = None
    hold: str = ""  # the name under which devices were asked for
    granted: bool = False
    asked_s: float = 0.0  # when, on the lease clock
    next_point: Point | None = None  # the attempt that begins once the hold is granted
    doubtful: bool = False  # nobody can say whether it runs: its lease is not renewed
    stop_why: str = ""  # why the board ordered it
    called_in: str = ""  # why the engine itself asked for the devices back
    staging: bool = False  # its data is on the way; it holds no devices yet
    kept: Kept | None = None  # its processes were started by an earlier attempt
    change: Change | None = None  # its processes were ordered to go on at the point of `resize`
    restart_why: str = ""  # why they are started again for it
    broken: str = ""  # why what it writes is no longer read: it has failed, once nothing of it runs

    @property
    def task_id(self) -> TaskId:
        return self.order.task_id

    @property
    def runs(self) -> bool:
        """An attempt has begun, and has not ended for another one that waits for its devices."""
        return self.attempt > 0 and self.next_point is None

    @property
    def chip_class(self) -> ChipClassId:
        return self.needs[0].chip_class

    def launch(self) -> Launch:
        return msgspec.json.decode(self.order.launch, type=Launch)

    def point(self) -> Point | None:
        """At which its attempt runs, where its curve has it."""
        return next((point for point in self.order.curve.points if point.point_id == self.point_id), None)

    def began_s(self, started_s: float) -> float:
        """When the attempt began (Unix), given when its processes were started."""
        return self.kept.began_s if self.kept is not None else started_s

    def usage(
        self, board: BoardId, engine: EngineId, began_s: float, until_s: float, *, ended: bool
    ) -> Usage:
        # A gang that is to grow already holds its new devices, but its attempt used the old ones.
        need = self.needs[0]
        return Usage(
            self.task_id, self.attempt, board, engine, need.chip_class, need.devices, self.point_id, began_s,
            until_s, (until_s - began_s) * need.devices, ended,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Places:
    """`folder`: the engine's; `checkpoints`: what tasks save.  Both absolute: tasks have other working folders."""

    folder: Path
    checkpoints: Path

    def attempt(self, held: Held) -> Folders:
        return folders_of(self.folder, _name(held))

    def make(self, held: Held) -> Folders:
        """The folders of an attempt that is to begin: one, where a supervisor of an earlier release waits for it."""
        granted = read_json(self.hold(held).folder / "granted.json")
        earlier = granted is not None and not granted.get("control")
        for kind in ("attempts",) if earlier else ("control", "attempts"):
            (self.folder / kind / _name(held)).mkdir(parents=True, exist_ok=True)
        return self.attempt(held)

    def beside(self, task_id: TaskId, attempt: int) -> Path:
        return self.folder / "beside" / f"{task_id}-{attempt}"  # where no task reaches

    def saved(self, task_id: TaskId, task: Task) -> Path:
        part = task.part  # parts at one site write one checkpoint
        return self.checkpoints / (f"{part.of}.{part.site}" if part is not None else task_id)

    def hold(self, held: Held) -> Hold:
        folder = self.folder / "holds" / held.hold
        return Hold(held.hold, folder, held.task_id, held.order.tenant, held.needs[0], held.devices)

    def hold_name(self, lease_id: LeaseId, generation: int) -> str:
        return f"{self.prefix()}{re.sub('[^A-Za-z0-9-]', '-', lease_id)}-{generation}"

    def prefix(self) -> str:
        """Own to this folder, so that two hosts on one machine, or in one cluster, keep apart."""
        mark = hashlib.blake2b(str(self.folder.resolve()).encode(), digest_size=4).hexdigest()
        return f"qipan-{mark}-"

    def write_until(self, held: Held, until_s: float, clock: Clock) -> None:
        """For supervisors on this machine and on others: see `shim.Until`."""
        left_s = until_s - clock.lease_s()
        text = f"{until_s} {clock.boot_id()} {left_s} {time.time() + left_s}"
        write_text(self.hold(held).folder / "until", text)
        if held.runs:
            write_text(self.attempt(held).control / "until", text)


def _name(held: Held) -> str:
    """Of the attempt's folders."""
    return f"{held.task_id}-{held.kept.attempt if held.kept is not None else held.attempt}"
