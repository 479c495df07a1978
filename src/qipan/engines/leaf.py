"""A leaf engine: leases, and one supervisor (shim) per attempt.  What is below it, plain processes or another tool's
own scheduler, is a `Launcher`: it gets devices, starts supervisors in them, and tells whether they live.

Everything durable lies in one folder that the supervisors see too: `journal.jsonl` (every fact, numbered by its line),
`held.json` (leases), `holds/NAME/` (devices asked for), `attempts/TASK-N/` (an attempt's own) and `control/TASK-N/` (its
supervisor's).  The board's process may die at any time: tasks run on under their shims, and the next engine on the folder takes
them up again.

Here are the commands, the leases and the offers.  What runs inside a lease is `attempts`, which devices it gets `seats`, what is
kept on disk `journal` and `held`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from qipan.clock import Clock
from qipan.engines import beside
from qipan.engines.attempts import BUSY_EVERY_S, Attempts
from qipan.engines.held import Held, Places
from qipan.engines.journal import Journal
from qipan.engines.launcher import Launcher
from qipan.engines.seats import Seats, Sick
from qipan.errors import InvalidInput, NotFound
from qipan.events import (
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
    TasksHeld,
)
from qipan.hardware import BoardSpec
from qipan.leases import UNUSED, EngineId, TaskId, room_of
from qipan.quantities import format_devices
from qipan.transfer import Stager


class LeafEngine:
    """`wait_s`: a hold that was not granted for so long is given up, and the lease refused.  `sick`: devices to be drained.
    `stager`: brings what a task saved elsewhere before devices are asked for, and keeps what it saved here; None: all sites see
    one folder."""

    def __init__(
        self,
        engine: EngineId,
        board: BoardSpec,
        folder: Path,
        clock: Clock,
        checkpoints: Path,
        launcher: Launcher,
        wait_s: float = 20.0,
        sick: Callable[[], Sick] = dict,
        stager: Stager | None = None,
        busy_every_s: float = BUSY_EVERY_S,
    ) -> None:
        self.engine = engine
        self.folder = folder.absolute()
        self._board = board
        self._clock = clock
        self._launcher = launcher
        self._wait_s = wait_s
        self._stager = stager
        (self.folder / "attempts").mkdir(parents=True, exist_ok=True)
        (self.folder / "holds").mkdir(exist_ok=True)
        self.places = Places(self.folder, checkpoints.absolute())
        self.journal = Journal(self.folder)
        self.seats = Seats(board, launcher, clock, self.journal, self.places, sick)
        self._attempts = Attempts(
            engine, board.board, clock, launcher, self.journal, self.places, self.seats, stager, busy_every_s
        )
        held_before = list(self.journal.held.values())
        for held in held_before:
            self._attempts.order_again(held)
        launcher.adopt(
            self.places.prefix(), [self.places.hold(held) for held in held_before if not held.staging]
        )

    # ---- commands --------------------------------------------------------------------------------------------------

    def reserve(self, command: Reserve) -> None:
        if not self.journal.newer(command.task_id, command.term, command.generation):
            self._refuse_stale(command)
            return
        need = command.needs[0]
        free = self.seats.free(need.chip_class)
        if command.task_id in self.journal.held or len(free) < need.devices or len(command.needs) != 1:
            why = f"needs {format_devices(need.devices)} of {need.chip_class}, {len(free)} are free at {self._board.board}"
            drained = sorted({out.why for out in self.seats.out() if out.chip_class == need.chip_class})
            why += f" ({'; '.join(drained)})" if drained else ""
            self._refuse(command, why)
            return
        full = self.seats.full(command.order, command.needs)
        if full:
            self._refuse(command, full)
            return
        now_s = self._clock.lease_s()
        held = Held(
            command.lease_id, command.term, command.generation, command.order, command.needs,
            self.seats.near(need.chip_class, need.devices, free), now_s + command.duration_s, command.duration_s,
            saved_s=command.order.saved_s, hold=self.places.hold_name(command.lease_id, command.generation),
            asked_s=now_s,
        )  # fmt: skip
        if self._stager is None or not command.order.attempt:
            self._ask_for(held)
            return
        self.places.hold(held).folder.mkdir(parents=True, exist_ok=True)
        held = replace(held, devices=(), staging=True)
        self.journal.hold(held)
        self._look_at_staging(held)

    def start(self, command: Start) -> None:
        held = self._leased(command)
        if held is not None:
            assert len(command.points) == 1, "a leaf engine is always given exactly one point"
            ended = self.journal.ended
            before = max((attempt for task_id, attempt in ended if task_id == command.task_id), default=0)
            attempt = max(command.attempt, before + 1)  # a restored board may count lower than has run here
            self._attempts.begin(replace(held, generation=command.generation), command.points[0], attempt)

    def resize(self, command: Resize) -> None:
        held = self._leased(command)
        if held is None or not held.attempt:
            return
        need = command.points[0].needs[0]
        more = need.devices - len(held.devices)
        free = self.seats.free(need.chip_class)
        if held.next_point is not None:
            return  # it waits for the devices of the change before
        if held.stop_outcome:
            self._refuse(command, f"it is being stopped: {held.called_in or 'that was ordered before'}")
            return
        if more > len(free):
            self._refuse(
                command,
                f"cannot grow to {format_devices(need.devices)} of {need.chip_class}: {len(free)} are free",
            )
            return
        devices = (*held.devices, *self.seats.near(need.chip_class, max(0, more), free, held.devices))
        under_way = held.change is not None or held.resize is not None
        held = replace(held, generation=command.generation, devices=devices, resize=command)
        why = "a change was under way" if under_way else self._attempts.why_not_in_place(held)
        if why:
            self._attempts.start_again(held, why)
        else:
            self._attempts.change(held)

    def stop(self, command: Stop) -> None:
        held = self._leased(command)
        if held is None:
            return
        held = replace(held, generation=command.generation)
        if not held.attempt:
            self._give_up(held, "released")
            return
        outcome: Outcome = "parked" if command.park else "cancelled"
        if held.next_point is not None:
            self._give_up(held, command.why, outcome)
            return
        held = replace(held, stop_outcome=outcome, stop_why=command.why, resize=None, change=None)
        self.journal.hold(held)
        self._attempts.ask_to_stop(held)

    def renew(self, command: Renew) -> None:
        until_s = self._clock.lease_s() + command.duration_s
        wanted = set(command.lease_ids)
        renewed = [
            replace(held, until_lease_s=until_s)
            for held in self.journal.held.values()
            if held.lease_id in wanted and not held.doubtful
        ]
        self.journal.hold(*renewed)
        for held in renewed:
            self.places.write_until(held, until_s, self._clock)

    def census(self, command: TakeCensus) -> None:
        for task_id in sorted(self.journal.held):
            self._look_at(task_id)  # what ended meanwhile is said before
        term_seen = max((term for term, _ in self.journal.commands.values()), default=0)
        now_s = self._clock.lease_s()
        held = tuple(
            HeldTask(
                held.order, held.lease_id, held.generation, held.attempt or held.order.attempt, held.attempt > 0,
                held.point_id, held.needs, self.engine, held.saved_s, held.saved_s, max(0.0, held.until_lease_s - now_s),
                held.granted,
            )
            for held in self.journal.held.values()
        )  # fmt: skip
        ends = self.journal.ends()
        self.journal.say(TasksHeld(self.engine, term_seen, command.asked_lease_s, held, ends))

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        self.journal.go_on_behind(after)
        for task_id in sorted(self.journal.held):
            self._look_at(task_id)
        self._offer()
        self._launcher.sweep()
        return self.journal.after(after)

    def close(self) -> None:
        """Clean up after what has ended."""
        for _ in range(20):
            if self._launcher.sweep():
                return
            time.sleep(0.05)

    def running(self) -> list[tuple[TaskId, Path]]:
        """(task, its folder) of attempts that run."""
        return [
            (task_id, self.places.attempt(held).task)
            for task_id, held in sorted(self.journal.held.items())
            if held.runs
        ]

    # ---- beside a running attempt ------------------------------------------------------------------------------------

    def act_beside(self, task_id: str, act: str, name: str, given: list[Any]) -> Any:
        """One of the three below, as people and other boards ask for it.  Raises what that does, InvalidInput for another."""
        match act, given:
            case "begin", [list() as words, int() | float() as limit_s]:
                return self.begin_beside(TaskId(task_id), list(map(str, words)), float(limit_s))
            case "read", [int() as after]:
                return msgspec.to_builtins(self.read_beside(TaskId(task_id), name, after))
            case "end", []:
                return self.end_beside(TaskId(task_id), name)
        raise InvalidInput(f"{act[:20]!r} is nothing to do beside a task")

    def begin_beside(self, task_id: TaskId, command: list[str], limit_s: float) -> str:
        """A person's command in the environment of the running attempt; returns its name.  Raises NotFound, InvalidInput,
        OverLimit."""
        held = self.journal.held.get(task_id)
        if held is None or not held.runs:
            raise NotFound(f"{task_id} does not run now; `qipan why {task_id}` says what it waits for")
        beside.check_command(command, limit_s)
        self._launcher.beside()
        place = self.places.beside(task_id, held.attempt)
        number = beside.begin(place, self.places.attempt(held).control, command, limit_s)
        return f"{held.attempt}.{number}"

    def read_beside(self, task_id: TaskId, name: str, after: int) -> beside.Piece:
        """Raises NotFound."""
        return beside.read(*self._beside(task_id, name), after)

    def end_beside(self, task_id: TaskId, name: str) -> None:
        """Raises NotFound."""
        beside.end(*self._beside(task_id, name))

    def _beside(self, task_id: TaskId, name: str) -> tuple[Path, str]:
        attempt, _, number = name.partition(".")
        return self.places.beside(task_id, int(attempt) if attempt.isdecimal() else 0), number

    # ---- leases ----------------------------------------------------------------------------------------------------

    def _leased(self, command: Start | Resize | Stop) -> Held | None:
        if not self.journal.newer(command.task_id, command.term, command.generation):
            return None
        held = self.journal.held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            self._refuse(command, f"no lease {command.lease_id} here")
            return None
        return held

    def _refuse(self, command: Reserve | Start | Resize | Stop, why: str) -> None:
        self.journal.say(
            LeaseRefused(command.task_id, command.lease_id, self.engine, command.generation, why)
        )

    def _refuse_stale(self, command: Reserve) -> None:
        """A new lease counted lower than what was heard (the board was restored): tell it how far the count is."""
        held = self.journal.held.get(command.task_id)
        if held is None or held.lease_id != command.lease_id:
            generation = self.journal.commands[command.task_id][1]
            why = f"the task's commands have reached {generation} here"
            self.journal.say(LeaseRefused(command.task_id, command.lease_id, self.engine, generation, why))

    def _ask_for(self, held: Held) -> None:
        hold = self.places.hold(held)
        hold.folder.mkdir(parents=True, exist_ok=True)
        self.places.write_until(held, held.until_lease_s, self._clock)
        self.journal.hold(held)
        self._launcher.hold(hold)
        self._look_at_hold(held)

    def _look_at(self, task_id: TaskId) -> None:
        held = self.journal.held[task_id]
        if held.staging:
            self._look_at_staging(held)
        elif not held.runs:
            self._look_at_hold(held)
        else:
            outcome = self._attempts.look(task_id)
            held = self.journal.held[task_id]
            if outcome == "resized":
                self._ask_for_next(held)
            elif outcome is not None:
                self._release(held)

    def _look_at_staging(self, held: Held) -> None:
        """Devices are asked for once the task's data is here: they never wait for it."""
        assert self._stager is not None
        folder = self.places.saved(held.task_id, held.launch().task)
        came = self._stager.arrive(folder.name, folder, held.order.attempt, held.order.saved_s)
        now_s, need = self._clock.lease_s(), held.needs[0]
        if came.state == "failed" or (came.state == "coming" and now_s > held.asked_s + self._wait_s):
            self._give_up(held, came.why)  # what is under way goes on, and is there when it is asked again
        elif came.state == "here" and len(self.seats.free(need.chip_class)) < need.devices:
            self._give_up(held, "others took the devices while its data came")
        elif came.state == "here":
            devices = self.seats.near(need.chip_class, need.devices, self.seats.free(need.chip_class))
            self._ask_for(replace(held, staging=False, devices=devices, asked_s=now_s))

    def _look_at_hold(self, held: Held) -> None:
        found = self._launcher.look(self.places.hold(held))
        now_s = self._clock.lease_s()
        if found.state == "held" and held.next_point is not None:
            self._attempts.begin(replace(held, granted=True), held.next_point, held.attempt + 1)
        elif found.state == "held" and not held.granted:
            self.journal.hold(replace(held, granted=True))
            self.journal.say(
                LeaseGranted(held.task_id, held.lease_id, self.engine, held.generation, held.needs)
            )
        elif found.state == "held" and now_s > held.until_lease_s:
            self._give_up(held, UNUSED)
        elif found.state == "gone" or (found.state == "waiting" and now_s > held.asked_s + self._wait_s):
            self._give_up(held, found.why or f"got no devices in {self._wait_s:g} s")

    def _ask_for_next(self, held: Held) -> None:
        """Its attempt ended for another point, for which devices are asked anew."""
        assert held.resize is not None
        point = held.resize.points[0]
        self._launcher.release(self.places.hold(held))
        again = replace(
            held, needs=point.needs, devices=held.devices[: point.devices], next_point=point, resize=None,
            hold=self.places.hold_name(held.lease_id, held.generation), asked_s=self._clock.lease_s(), granted=False,
            kept=None, change=None,
        )  # fmt: skip
        self._ask_for(again)

    def _give_up(self, held: Held, why: str, outcome: Outcome = "parked") -> None:
        """Nothing of the task runs here: end its lease, and say so."""
        if held.attempt:
            now_s, attempt = self._clock.now_s(), held.attempt + 1
            usage = held.usage(self._board.board, self.engine, now_s, now_s, ended=True)
            self.journal.say(
                TaskExited(
                    held.task_id, held.lease_id, self.engine, held.generation, attempt, outcome, None, held.saved_s,
                    held.saved_s, why, replace(usage, attempt=attempt),
                )
            )  # fmt: skip
        else:
            self.journal.say(LeaseRefused(held.task_id, held.lease_id, self.engine, held.generation, why))
        self._release(held)

    def _release(self, held: Held) -> None:
        self._launcher.release(self.places.hold(held))
        self._attempts.forget(held.task_id)
        self.journal.release(held.task_id)

    # ---- offers ----------------------------------------------------------------------------------------------------

    def _offer(self) -> None:
        """Offer what can be had now; when that is less than what is held, the newest leases are called in."""
        known = self.seats.known()
        offers, out = self.seats.offers(), self.seats.out()
        in_place = self._launcher.in_place
        offered = EngineOffered(self.engine, offers, chooses=False, out=out, in_place=in_place)
        if known and offered != self.journal.offered:
            self.journal.say(offered)
        room = room_of(self._board.stores)
        if room != self.journal.room:
            self.journal.say(StorageOffered(self.engine, room))
        if not known:
            return  # what was offered last stands
        for task_id, why in self.seats.to_go():
            self._call_in(self.journal.held[task_id], why)
        for offer in offers:
            for task_id in self.seats.too_many(offer):
                self._call_in(self.journal.held[task_id], f"{self._board.board} needs its devices back")

    def _call_in(self, held: Held, why: str) -> None:
        if not held.runs:
            self._give_up(held, why)
            return
        held = replace(held, stop_outcome="parked", called_in=why, resize=None, change=None)
        self.journal.hold(held)
        self._attempts.ask_to_stop(held)
