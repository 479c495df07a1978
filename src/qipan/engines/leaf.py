"""A leaf engine: leases, and one supervisor (shim) per attempt.  What is below it, plain processes or another tool's
own scheduler, is a `Launcher`: it gets devices, starts supervisors in them, and tells whether they live.

Everything durable lies in one folder that the supervisors see too: `journal.jsonl` (every fact, numbered by its line),
`held.json` (leases), `holds/NAME/` (devices asked for) and `attempts/TASK-N/`.  The board's process may die at any time:
tasks run on under their shims, and the next engine on the folder takes them up again.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from qipan.clock import Clock
from qipan.curves import Need, Point
from qipan.engines.launcher import Hold, Launcher, free_port, read_json, write_text
from qipan.engines.topology import nearest, tiers_of
from qipan.events import (
    FINAL,
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
from qipan.hardware import BoardSpec, ChipClassId
from qipan.leases import EngineId, LeaseId, Offer, Order, Room, TaskId, Usage, room_of
from qipan.transfer import Stager
from qipan.workload import Launch, Task, foreach
from qipan.workload.task import Part

PROGRESS_S = 1.0
STOP_GRACE_S = 30.0
PARK_S = 5.0  # a checkpoint is given at least so long, of a lease that is long enough
PARKING_SHARE = 0.25  # of a lease at most: so much is set aside at its end for parking
MARGIN_S = 5.0  # beyond the end of its lease, after which an attempt that nobody can see is taken for gone
START_S = 5.0  # a supervisor that has given no sign for so long is looked for
PARKED_BESIDE = re.compile(r"exitcode\s*:\s*75\b")  # the trainer's word: another part of its site was stopped
KILLED = re.compile(
    r"exitcode\s*:\s*-9|Signal 9 \(SIGKILL\)|Connection closed by peer|Connection reset by peer"
)


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
    called_in: str = ""  # why the engine itself asked for the devices back
    staging: bool = False  # its data is on the way; it holds no devices yet


@dataclass(slots=True)
class Reading:
    """How far an attempt's events file was read."""

    offset: int = 0
    done_s: float = 0.0
    reported_s: float = 0.0
    started: bool = False
    finished: bool = False
    waited_since_s: float = 0.0  # for the supervisor's first sign
    lived: bool = False  # this engine has seen its supervisor
    gone_s: float = 0.0  # when it ended, once its supervisor is gone: keeping what it saved is not charged


class LeafEngine:
    """`wait_s`: a hold that was not granted for so long is given up, and the lease refused.  `stager`: brings what a task
    saved elsewhere before devices are asked for, and keeps what it saved here; None: all sites see one folder."""

    def __init__(
        self,
        engine: EngineId,
        board: BoardSpec,
        folder: Path,
        clock: Clock,
        checkpoints: Path,
        launcher: Launcher,
        wait_s: float = 20.0,
        sick: Callable[[], Mapping[ChipClassId, Mapping[int, str]]] = dict,
        stager: Stager | None = None,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self._board = board
        self._clock = clock
        self._checkpoints = checkpoints
        self._launcher = launcher
        self._wait_s = wait_s
        #: chip class -> device -> why it is to be drained: what runs there is parked, and nothing more is put there
        self._sick = sick
        self._stager = stager
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        (folder / "holds").mkdir(exist_ok=True)
        self._pools = {pool.chip_class: pool for pool in board.pools}
        self._journal: list[Fact] = []
        self._exited: set[tuple[str, int]] = set()
        self._over: dict[TaskId, str] = {}
        self._commands: dict[TaskId, tuple[int, int]] = {}
        self._held: dict[TaskId, Held] = {}
        self._reading: dict[TaskId, Reading] = {}
        self._offered: tuple[Offer, ...] | None = None
        self._room: Room | None = None
        self._began_s = clock.now_s()
        self._read_back()
        for held in self._held.values():
            if held.attempt and (held.resize is not None or held.stop_outcome):
                self._ask_to_stop(held)  # the order was kept, the file may not have been written
        asked = [self._hold_of(held) for held in self._held.values() if not held.staging]
        launcher.adopt(self._prefix(), asked)
        self._offer()

    # ---- commands --------------------------------------------------------------------------------------------------

    def reserve(self, command: Reserve) -> None:
        if not self._newer(command.task_id, command.term, command.generation):
            self._refuse_stale(command)
            return
        need = command.needs[0]
        free = self._free(need.chip_class)
        if command.task_id in self._held or len(free) < need.devices or len(command.needs) != 1:
            why = f"needs {need.devices} devices of {need.chip_class}, {len(free)} are free at {self._board.board}"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        now_s = self._clock.lease_s()
        held = Held(
            command.lease_id, command.term, command.generation, command.order, command.needs,
            self._near(need, free), now_s + command.duration_s, command.duration_s,
            saved_s=command.order.saved_s, hold=self._hold_name(command.lease_id, command.generation), asked_s=now_s,
        )  # fmt: skip
        if self._stager is None or not command.order.attempt:
            self._ask_for(command.task_id, held)
            return
        self._hold_of(held).folder.mkdir(parents=True, exist_ok=True)
        self._hold(command.task_id, replace(held, devices=(), staging=True))
        self._look_at_staging(command.task_id, self._held[command.task_id])

    def start(self, command: Start) -> None:
        held = self._leased(command)
        if held is not None:
            assert len(command.points) == 1, "a leaf engine is always given exactly one point"
            before = max(
                (attempt for task_id, attempt in self._exited if task_id == command.task_id), default=0
            )
            attempt = max(command.attempt, before + 1)  # a restored board may count lower than has run here
            self._begin(replace(held, generation=command.generation), command.points[0], attempt)

    def resize(self, command: Resize) -> None:
        held = self._leased(command)
        if held is None or not held.attempt:
            return
        point = command.points[0]
        need = point.needs[0]
        more = need.devices - len(held.devices)
        free = self._free(need.chip_class)
        if held.next_point is not None:
            return  # it waits for the devices of the change before
        if more > len(free):
            why = f"cannot grow to {need.devices} devices of {need.chip_class}: {len(free)} are free"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return
        tiers = tiers_of(self._pools[need.chip_class])
        devices = (*held.devices, *nearest(free, max(0, more), tiers, held.devices))
        self._hold(
            command.task_id, replace(held, generation=command.generation, devices=devices, resize=command)
        )
        self._ask_to_stop(held)

    def stop(self, command: Stop) -> None:
        held = self._leased(command)
        if held is None:
            return
        if not held.attempt:
            self._give_up(command.task_id, replace(held, generation=command.generation), "released")
            return
        outcome: Outcome = "parked" if command.park else "cancelled"
        if held.next_point is not None:
            self._give_up(command.task_id, replace(held, generation=command.generation), command.why, outcome)
            return
        self._hold(
            command.task_id, replace(held, generation=command.generation, stop_outcome=outcome, resize=None)
        )
        self._ask_to_stop(held)

    def renew(self, command: Renew) -> None:
        until_s = self._clock.lease_s() + command.duration_s
        for task_id, held in list(self._held.items()):
            if held.lease_id in command.lease_ids and not held.doubtful:
                self._hold(task_id, replace(held, until_lease_s=until_s))
                self._write_until(held, until_s)

    def census(self, command: TakeCensus) -> None:
        for task_id in sorted(self._held):
            self._look_at(task_id)  # what ended meanwhile is said before
        term_seen = max((term for term, _ in self._commands.values()), default=0)
        now_s = self._clock.lease_s()
        held = tuple(
            HeldTask(
                held.order, held.lease_id, held.generation, held.attempt or held.order.attempt, held.attempt > 0,
                held.point_id, held.needs, self.engine, held.saved_s, held.saved_s, max(0.0, held.until_lease_s - now_s),
            )
            for held in self._held.values()
        )  # fmt: skip
        over = tuple((task_id, how) for task_id, how in self._over.items() if task_id not in self._held)
        self._say(TasksHeld(self.engine, term_seen, command.asked_lease_s, held, over))

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        for task_id in sorted(self._held):
            self._look_at(task_id)
        self._offer()
        self._launcher.sweep()
        return list(enumerate(self._journal[after:], start=after + 1))

    def close(self) -> None:
        """Clean up after what has ended."""
        for _ in range(20):
            if self._launcher.sweep():
                return
            time.sleep(0.05)

    def running(self) -> list[tuple[TaskId, Path]]:
        """(task, attempt folder) of attempts that run."""
        return [
            (task, self._attempt_dir(held))
            for task, held in sorted(self._held.items())
            if held.attempt and held.next_point is None
        ]

    # ---- devices from below ----------------------------------------------------------------------------------------

    def _ask_for(self, task_id: TaskId, held: Held) -> None:
        hold = self._hold_of(held)
        hold.folder.mkdir(parents=True, exist_ok=True)
        self._write_until(held, held.until_lease_s)
        self._hold(task_id, held)
        self._launcher.hold(hold)
        self._look_at_hold(task_id, held)

    def _look_at_staging(self, task_id: TaskId, held: Held) -> None:
        """Devices are asked for once the task's data is here: they never wait for it."""
        assert self._stager is not None
        folder = self._checkpoints_of(task_id, _launch_of(held).task)
        came = self._stager.arrive(folder.name, folder, held.order.attempt, held.order.saved_s)
        now_s, need = self._clock.lease_s(), held.needs[0]
        if came.state == "failed" or (came.state == "coming" and now_s > held.asked_s + self._wait_s):
            self._give_up(
                task_id, held, came.why
            )  # what is under way goes on, and is there when it is asked again
        elif came.state == "here" and len(self._free(need.chip_class)) < need.devices:
            self._give_up(task_id, held, "others took the devices while its data came")
        elif came.state == "here":
            devices = self._near(need, self._free(need.chip_class))
            self._ask_for(task_id, replace(held, staging=False, devices=devices, asked_s=now_s))

    def _look_at_hold(self, task_id: TaskId, held: Held) -> None:
        found = self._launcher.look(self._hold_of(held))
        now_s = self._clock.lease_s()
        if found.state == "held" and held.next_point is not None:
            self._begin(replace(held, granted=True), held.next_point, held.attempt + 1)
        elif found.state == "held" and not held.granted:
            self._hold(task_id, replace(held, granted=True))
            self._say(LeaseGranted(task_id, held.lease_id, self.engine, held.generation, held.needs))
        elif found.state == "held" and now_s > held.until_lease_s:
            self._give_up(task_id, held, "the lease lapsed before it was used")
        elif found.state == "gone" or (found.state == "waiting" and now_s > held.asked_s + self._wait_s):
            self._give_up(task_id, held, found.why or f"got no devices in {self._wait_s:g} s")

    def _give_up(self, task_id: TaskId, held: Held, why: str, outcome: Outcome = "parked") -> None:
        """Nothing of the task runs here: end its lease, and say so."""
        if held.attempt:
            now_s = self._clock.now_s()
            usage = replace(self._usage(held, now_s, now_s, ended=True), attempt=held.attempt + 1)
            fact = TaskExited(
                task_id, held.lease_id, self.engine, held.generation, held.attempt + 1, outcome, None, held.saved_s,
                held.saved_s, why, usage,
            )  # fmt: skip
            self._noted(fact)
            self._say(fact)
        else:
            self._say(LeaseRefused(task_id, held.lease_id, self.engine, held.generation, why))
        self._launcher.release(self._hold_of(held))
        self._release(task_id)

    def _offer(self) -> None:
        """Offer what can be had now; when that is less than what is held, the newest leases are called in."""
        usable, sick = self._launcher.devices(), self._sick()
        offers = tuple(
            Offer(
                pool.chip_class, here, (), here, pool.tariff_micro_cny_per_device_hour, self._board.board,
                self._board.region,
            )
            for pool in self._board.pools
            for here in [min(pool.devices - len(sick.get(pool.chip_class, {})), usable.get(pool.chip_class, 0))]
        )  # fmt: skip
        if offers != self._offered:
            self._offered = offers
            self._say(EngineOffered(self.engine, offers, chooses=False))
        if room_of(self._board.stores) != self._room:
            self._room = room_of(self._board.stores)
            self._say(StorageOffered(self.engine, self._room))
        for task_id, held in sorted(self._held.items()):
            bad = {
                device: why
                for device, why in sick.get(held.needs[0].chip_class, {}).items()
                if device in held.devices
            }
            if bad and not held.stop_outcome:
                why = "; ".join(f"device {device} is drained: {why}" for device, why in sorted(bad.items()))
                self._call_in(task_id, held, why)
        for offer in offers:
            newest_first = sorted(self._held.items(), key=lambda item: (-item[1].asked_s, item[0]))
            over = sum(self._counts(held, offer.chip_class) for _, held in newest_first) - offer.devices
            for task_id, held in newest_first:
                if over <= 0:
                    break
                over -= self._counts(held, offer.chip_class)
                if held.needs[0].chip_class == offer.chip_class and not held.stop_outcome:
                    self._call_in(task_id, held, f"{self._board.board} needs its devices back")

    def _counts(self, held: Held, chip_class: ChipClassId) -> int:
        return held.needs[0].devices if held.needs[0].chip_class == chip_class and not held.staging else 0

    def _call_in(self, task_id: TaskId, held: Held, why: str) -> None:
        if not held.attempt or held.next_point is not None:
            self._give_up(task_id, held, why)
            return
        self._hold(task_id, replace(held, stop_outcome="parked", called_in=why, resize=None))
        self._ask_to_stop(held)

    def _write_until(self, held: Held, until_s: float) -> None:
        """For supervisors on this machine and on others: see `shim.Until`."""
        left_s = until_s - self._clock.lease_s()
        text = f"{until_s} {self._clock.boot_id()} {left_s} {time.time() + left_s}"
        write_text(self._hold_of(held).folder / "until", text)
        if held.attempt and held.next_point is None:
            write_text(self._attempt_dir(held) / "until", text)

    def _hold_of(self, held: Held) -> Hold:
        return Hold(
            held.hold, self.folder / "holds" / held.hold, held.order.task_id, held.order.tenant, held.needs[0], held.devices
        )  # fmt: skip

    def _hold_name(self, lease_id: LeaseId, generation: int) -> str:
        return f"{self._prefix()}{re.sub('[^A-Za-z0-9-]', '-', lease_id)}-{generation}"

    def _prefix(self) -> str:
        """Own to this folder, so that two hosts on one machine, or in one cluster, keep apart."""
        mark = hashlib.blake2b(str(self.folder.resolve()).encode(), digest_size=4).hexdigest()
        return f"qipan-{mark}-"

    # ---- one attempt -----------------------------------------------------------------------------------------------

    def _begin(self, held: Held, point: Point, attempt: int) -> None:
        task_id = held.order.task_id
        held = replace(
            held, point_id=point.point_id, attempt=attempt, needs=point.needs, devices=held.devices[: point.devices],
            resize=None, next_point=None,
        )  # fmt: skip
        hold = self._hold_of(held)
        folder = self._attempt_dir(held)
        folder.mkdir(parents=True, exist_ok=True)
        group, ranks, shares = self._launcher.groups(hold)
        launch = _launch_of(held)
        own, run = bool(launch.task.run), launch.task.run
        if launch.task.foreach:
            run = foreach.script(run, launch.task.foreach)
        spec = {
            "command": joined(self._launcher.command(hold, run), launch.task.part),
            "env": self._environment(held, launch, point, folder, ranks),
            "cwd": launch.task.workdir
            if own and Path(launch.task.workdir).is_dir()
            else str(folder)
            if own
            else "",
            "group": group,
            "shares": shares,
            "grace_s": STOP_GRACE_S,
            "park_s": min(max(point.stop_s, PARK_S), held.lease_s * PARKING_SHARE),
            "signal_on_stop": own,
        }
        self._write_until(held, held.until_lease_s)
        write_text(folder / "spec.json", json.dumps(spec))
        self._hold(task_id, held)
        self._reading[task_id] = Reading(done_s=held.saved_s)
        self._launcher.start(hold, folder)

    def _environment(
        self, held: Held, launch: Launch, point: Point, folder: Path, ranks: list[str]
    ) -> dict[str, str]:
        task_id = held.order.task_id
        checkpoints = self._checkpoints_of(task_id, launch.task)
        checkpoints.mkdir(parents=True, exist_ok=True)
        every_s = launch.task.checkpoint.every_s
        return {
            **self._launcher.environment(self._hold_of(held)),
            **dict(launch.task.env),
            **launch.attempt_env,
            "QIPAN_TASK_ID": task_id,
            "QIPAN_ATTEMPT": str(held.attempt),
            "QIPAN_ATTEMPT_DIR": str(folder),
            "QIPAN_NODE_RANK": "0",
            "QIPAN_CHECKPOINT_DIR": str(checkpoints),
            "QIPAN_CHECKPOINT_EVERY_S": str(every_s if every_s is not None else 15.0),
            "QIPAN_EVENTS": str(folder / "events.jsonl"),
            "QIPAN_CONTROL": str(folder / "stop"),
            "QIPAN_STRATEGY": point.strategy.to_json() if point.strategy else "",
            "QIPAN_TASK": msgspec.json.encode(launch.task).decode(),
            "QIPAN_FENCE": ".".join(str(part) for part in (*held.order.fence, held.generation)),
            "QIPAN_LAUNCHED_S": str(time.time()),
            "QIPAN_RANK_GROUPS": ":".join(ranks),
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def _checkpoints_of(self, task_id: TaskId, task: Task) -> Path:
        part = task.part  # parts at one site write one checkpoint
        return self._checkpoints / (f"{part.of}.{part.site}" if part is not None else task_id)

    def _look_at(self, task_id: TaskId) -> None:
        """What the attempt wrote since, and whether it ended."""
        held = self._held[task_id]
        if held.staging:
            self._look_at_staging(task_id, held)
            return
        if not held.attempt or held.next_point is not None:
            self._look_at_hold(task_id, held)
            return
        folder = self._attempt_dir(held)
        reading = self._reading.setdefault(task_id, Reading(done_s=held.saved_s))
        pid = read_json(folder / "pid.json")
        if pid is not None and not reading.started:
            reading.started = True
            if not self._journaled_start(task_id, held.attempt):
                self._say(
                    TaskStarted(
                        task_id, held.lease_id, self.engine, held.generation, held.attempt, held.point_id, held.needs,
                        self.engine,
                    )
                )  # fmt: skip
        held = self._read_events(task_id, held, folder, reading)
        ended = read_json(folder / "exit.json")
        if pid is None and ended is None and self._never_started(held, folder, reading):
            now_s = self._clock.now_s()
            ended = {"code": None, "started_s": now_s, "ended_s": now_s, "ended_by": "machine"}
        if ended is not None:
            held = self._read_events(task_id, held, folder, reading)
            self._end(task_id, held, folder, reading, ended)
        elif pid is not None and self._may_live(task_id, held, folder):
            reading.lived = True
        elif pid is not None:
            if read_json(folder / "exit.json") is not None:
                return  # it ended while we looked: the next look reads how
            reading.gone_s = reading.gone_s or self._gone_s(folder, reading, float(str(pid["started_s"])))
            gone = {
                "code": None,
                "started_s": pid["started_s"],
                "ended_s": reading.gone_s,
                "ended_by": "machine",
            }
            self._end(task_id, held, folder, reading, gone)

    def _read_events(self, task_id: TaskId, held: Held, folder: Path, reading: Reading) -> Held:
        path = folder / "events.jsonl"
        if not path.exists():
            return held
        with path.open("rb") as file:
            file.seek(reading.offset)
            fresh = file.read(1 << 20)
        whole = fresh[: fresh.rfind(b"\n") + 1]
        reading.offset += len(whole)
        work_s, said = held.order.curve.work_s, ""
        for line in whole.splitlines():
            event = _parse(line)
            step, steps = event.get("step"), event.get("steps")
            match event.get("event"):
                case "progress" if isinstance(step, int) and isinstance(steps, int) and steps > 0:
                    reading.done_s = work_s * min(step, steps) / steps
                    (folder / "steps").write_text(str(steps))
                    said = line.decode(errors="replace")
                case "checkpoint" if isinstance(step, int):
                    steps_known = _number(folder / "steps")
                    if steps_known:
                        held = replace(held, saved_s=work_s * min(step, steps_known) / steps_known)
                        self._hold(task_id, held)
                        self._keep(held)
                    said = line.decode(errors="replace")
                case "done":
                    reading.finished = True
                    said = line.decode(errors="replace")
                case (
                    "ready"
                    | "resumed"
                    | "validation"
                    | "parked"
                    | "rebalanced"
                    | "reshaped"
                    | "joined"
                    | "outside"
                    | "round"
                ):
                    said = line.decode(errors="replace")
                    if event["event"] not in ("validation", "round"):
                        self._report(task_id, held, folder, reading, said)
                case _:
                    continue  # another program's line
        now_s = self._clock.now_s()
        if said and (now_s - reading.reported_s >= PROGRESS_S or reading.finished):
            reading.reported_s = now_s
            self._report(task_id, held, folder, reading, said)
        return held

    def _keep(self, held: Held) -> None:
        """What a task saves is kept as it goes on, should its site be lost.  An own script's files may be half written."""
        if self._stager is None:
            return
        task = _launch_of(held).task
        if not task.run:
            data = self._checkpoints_of(held.order.task_id, task)
            self._stager.keep(data.name, data, held.attempt, held.saved_s)

    def _report(self, task_id: TaskId, held: Held, folder: Path, reading: Reading, detail: str) -> None:
        pid = read_json(folder / "pid.json")
        began_s = pid["started_s"] if pid else self._clock.now_s()
        usage = self._usage(held, began_s, max(began_s, self._clock.now_s()), ended=False)
        self._say(
            TaskProgress(task_id, self.engine, held.attempt, reading.done_s, held.saved_s, detail, usage)
        )

    def _gone_s(self, folder: Path, reading: Reading, started_s: float) -> float:
        """When an attempt whose supervisor is gone ended.  One that was never seen alive by this engine went with the
        machine, or its store was restored: it ended when it last wrote before that, and nobody pays for what lies between."""
        if reading.lived or started_s >= self._began_s:
            return self._clock.now_s()
        written = [path.stat().st_mtime for path in folder.iterdir() if path.is_file()]
        return max([started_s, *(at_s for at_s in written if at_s < self._began_s)])

    def _end(
        self, task_id: TaskId, held: Held, folder: Path, reading: Reading, ended: dict[str, Any]
    ) -> None:
        outcome, why = self._outcome(held, folder, reading, ended)
        if self._stager is not None and outcome in ("parked", "lost"):  # it may go on at another site
            data = self._checkpoints_of(task_id, _launch_of(held).task)
            kept = self._stager.settle(data.name, data, held.attempt, held.saved_s)
            if kept is None:
                return  # the exit is said once others can find what it saved
            why = f"{why}; what it saved is not kept for other sites: {kept}" if kept else why
        began_s, end_s = float(str(ended["started_s"])), float(str(ended["ended_s"]))
        work_s = held.order.curve.work_s
        saved_s = work_s if outcome == "done" else held.saved_s
        done_s = work_s if outcome == "done" else max(reading.done_s, saved_s)
        code = ended["code"] if isinstance(ended["code"], int) else None
        fact = TaskExited(
            task_id, held.lease_id, self.engine, held.generation, held.attempt, outcome, code, done_s, saved_s, why,
            self._usage(held, began_s, end_s, ended=True), final=outcome != "resized",
        )  # fmt: skip
        if (task_id, held.attempt) not in self._exited:
            self._noted(fact)
            self._say(fact)
        if outcome == "resized":
            assert held.resize is not None
            self._next_attempt(task_id, held, held.resize.points[0])
        else:
            self._launcher.release(self._hold_of(held))
            self._release(task_id)

    def _next_attempt(self, task_id: TaskId, held: Held, point: Point) -> None:
        self._launcher.release(self._hold_of(held))
        again = replace(
            held, needs=point.needs, devices=held.devices[: point.devices], next_point=point, resize=None,
            hold=self._hold_name(held.lease_id, held.generation), asked_s=self._clock.lease_s(), granted=False,
        )  # fmt: skip
        self._ask_for(task_id, again)

    def _outcome(
        self, held: Held, folder: Path, reading: Reading, ended: dict[str, Any]
    ) -> tuple[Outcome, str]:
        code = ended["code"]
        if reading.finished:
            return "done", "finished"
        if held.stop_outcome == "cancelled":
            return "cancelled", "cancelled"
        if ended["ended_by"] == "stop":
            if held.resize is not None:
                return "resized", f"goes on at {held.resize.points[0].point_id}"
            if held.doubtful:
                return "lost", "its queue lost it; it was ended by its own supervisor"
            return "parked", held.called_in or "ordered to stop"
        if ended["ended_by"] == "lease":
            return "parked", "the lease ran out"
        if ended["ended_by"] == "signal":
            return "parked", "the engine's own scheduler asked for the devices back"
        if ended["ended_by"] == "machine":
            return "lost", "its supervisor is gone (killed, or the machine was started again)"
        if code == 0:
            return "done", "finished"
        tail = _tail(folder / "log.txt")
        if isinstance(code, int) and code < 0:
            return "lost", f"killed by signal {-code}"
        if PARKED_BESIDE.search(tail):
            return "parked", "another part of its site was stopped"
        if KILLED.search(tail):
            return "lost", "a worker was killed (SIGKILL)"
        last = [line for line in tail.splitlines() if line.strip()][-5:]
        return "failed", f"exit code {code}; last lines: " + " | ".join(last)

    def _ask_to_stop(self, held: Held) -> None:
        (self._attempt_dir(held) / "stop").touch()

    def _never_started(self, held: Held, folder: Path, reading: Reading) -> bool:
        """The engine died between noting the attempt and starting its supervisor (seen after START_S)."""
        now_s = self._clock.lease_s()
        reading.waited_since_s = reading.waited_since_s or now_s
        if now_s - reading.waited_since_s < START_S:
            return False
        return self._launcher.lives(self._hold_of(held), folder) is False

    def _may_live(self, task_id: TaskId, held: Held, folder: Path) -> bool:
        """Where it cannot be told, the attempt is asked to stop and its lease is no longer renewed: once that is over,
        and a margin, nothing of it runs."""
        lives = self._launcher.lives(self._hold_of(held), folder)
        if lives is None and not held.doubtful:
            self._hold(task_id, replace(held, doubtful=True))
            self._ask_to_stop(held)
        over = self._clock.lease_s() > held.until_lease_s + MARGIN_S
        return lives or (lives is None and not over)

    # ---- what is held ----------------------------------------------------------------------------------------------

    def _free(self, chip_class: ChipClassId) -> list[int]:
        if chip_class not in self._pools:
            return []
        used = {
            device
            for held in self._held.values()
            if held.needs[0].chip_class == chip_class
            for device in held.devices
        }
        usable = min(self._pools[chip_class].devices, self._launcher.devices().get(chip_class, 0))
        sick = set(self._sick().get(chip_class, {}))
        usable -= len(sick - used)  # of those in use the tasks are called in
        free = [device for device in range(self._pools[chip_class].devices) if device not in used | sick]
        return free[: max(0, usable - len(used))]

    def _near(self, need: Need, free: list[int]) -> tuple[int, ...]:
        return nearest(free, need.devices, tiers_of(self._pools[need.chip_class]))

    def _leased(self, command: Start | Resize | Stop) -> Held | None:
        if not self._newer(command.task_id, command.term, command.generation):
            return None
        held = self._held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            why = f"no lease {command.lease_id} here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why))
            return None
        return held

    def _refuse_stale(self, command: Reserve) -> None:
        """A new lease counted lower than what was heard (the board was restored): tell it how far the count is."""
        held = self._held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            generation = self._commands[command.task_id][1]
            why = f"the task's commands have reached {generation} here"
            self._say(LeaseRefused(command.task_id, command.lease_id, self.engine, generation, why))

    def _newer(self, task_id: TaskId, term: int, generation: int) -> bool:
        if (term, generation) <= self._commands.get(task_id, (0, 0)):
            return False
        self._commands[task_id] = (term, generation)
        return True

    def _hold(self, task_id: TaskId, held: Held) -> None:
        self._held[task_id] = held
        self._save()

    def _release(self, task_id: TaskId) -> None:
        del self._held[task_id]
        self._reading.pop(task_id, None)
        self._save()

    def _save(self) -> None:
        part = self.folder / "held.part"
        part.write_bytes(msgspec.json.encode((self._held, self._commands)))
        part.rename(self.folder / "held.json")

    def _say(self, fact: Fact) -> None:
        with (self.folder / "journal.jsonl").open("ab") as file:
            file.write(encode(fact) + b"\n")
        self._journal.append(fact)

    def _noted(self, fact: TaskExited) -> None:
        self._exited.add((fact.task_id, fact.attempt))
        if fact.outcome in FINAL:
            self._over[fact.task_id] = fact.outcome

    def _read_back(self) -> None:
        journal = self.folder / "journal.jsonl"
        if journal.exists():
            body = journal.read_bytes()
            whole = body[: body.rfind(b"\n") + 1]
            if len(whole) != len(body):
                journal.write_bytes(whole)  # the last line was cut by a crash; its fact was never given out
            for line in whole.splitlines():
                fact = decode(line)
                assert isinstance(fact, Fact)
                self._journal.append(fact)
                if isinstance(fact, TaskExited):
                    self._noted(fact)
                if isinstance(fact, EngineOffered):
                    self._offered = fact.offers
                if isinstance(fact, StorageOffered):
                    self._room = fact.room
        path = self.folder / "held.json"
        if path.exists():
            kind = tuple[dict[TaskId, Held], dict[TaskId, tuple[int, int]]]
            self._held, self._commands = msgspec.json.decode(path.read_bytes(), type=kind)

    def _journaled_start(self, task_id: TaskId, attempt: int) -> bool:
        return any(
            isinstance(fact, TaskStarted) and fact.task_id == task_id and fact.attempt == attempt
            for fact in self._journal
        )

    def _attempt_dir(self, held: Held) -> Path:
        return self.folder / "attempts" / f"{held.order.task_id}-{held.attempt}"

    def _usage(self, held: Held, began_s: float, until_s: float, *, ended: bool) -> Usage:
        # A gang that is to grow already holds its new devices, but its attempt used the old ones.
        need = held.needs[0]
        return Usage(
            held.order.task_id, held.attempt, self._board.board, self.engine, need.chip_class, need.devices,
            held.point_id, began_s, until_s, (until_s - began_s) * need.devices, ended,
        )  # fmt: skip


def _launch_of(held: Held) -> Launch:
    return msgspec.json.decode(held.order.launch, type=Launch)


def joined(command: list[str], part: Part | None) -> list[str]:
    """The same command as one node of its site's world."""
    if part is None or part.nodes == 1:
        return command
    host, _, port = part.endpoint.rpartition(":")
    own = [word for word in command if not word.startswith(("--nnodes=", "--rdzv-"))]
    at = own.index("--max-restarts=0")
    more = [
        f"--nnodes={part.nodes}",
        f"--node-rank={part.node_rank}",
        f"--master-addr={host}",
        f"--master-port={port}",
    ]
    return [*own[:at], *more, *own[at:]]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # a task may write what it likes; only whole JSON objects mean something
    return value if isinstance(value, dict) else {}


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _tail(path: Path, size: int = 16_384) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")
