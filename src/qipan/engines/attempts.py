"""The attempts of a leaf engine: each is begun under a supervisor, followed by what its folder tells, changed in place where that
can be, and ended; the facts of it go into the journal."""

import json
import logging
from dataclasses import replace
from typing import Any

from qipan.clock import Clock
from qipan.curves import Point
from qipan.engines import alive, in_place
from qipan.engines.attempt_spec import spec_of
from qipan.engines.held import Held, Places
from qipan.engines.journal import Journal
from qipan.engines.launcher import Ended, Launcher, begun, ended
from qipan.engines.reading import (
    DETAIL_BYTES_MAX,
    Reading,
    gone_s,
    is_count,
    may_say,
    outcome_of,
    parse,
    silent_s,
    skip_to_the_rest,
    slow_ranks,
    steps_known,
    unread_lines,
    write_steps,
)
from qipan.engines.seats import Seats
from qipan.errors import InvalidInput, QipanError
from qipan.events import DevicesBusy, Outcome, TaskExited, TaskProgress, TaskStarted
from qipan.hardware import BoardId
from qipan.leases import EngineId, TaskId
from qipan.transfer import Stager

log = logging.getLogger("qipan.engine")

PROGRESS_S = 1.0
WHY_MAX = 500  # letters
MARGIN_S = 5.0  # beyond the end of its lease, after which an attempt that nobody can see is taken for gone
BUSY_EVERY_S = 60.0  # so often it is looked at how much an attempt's devices work
START_S = 5.0  # a supervisor that has given no sign for so long is looked for
REPORTED = frozenset(  # at once and each, where they are not very many
    {
        "ready", "first_step", "resumed", "parked", "rebalanced", "reshaped", "joined", "outside", "unsaved",
        "stream",
    }
)  # fmt: skip


class Attempts:
    """Of the leases in `journal`, those that run."""

    def __init__(
        self,
        engine: EngineId,
        board: BoardId,
        clock: Clock,
        launcher: Launcher,
        journal: Journal,
        places: Places,
        seats: Seats,
        stager: Stager | None,
        busy_every_s: float,
    ) -> None:
        self._engine = engine
        self._board = board
        self._clock = clock
        self._launcher = launcher
        self._journal = journal
        self._places = places
        self._seats = seats
        self._stager = stager
        self._busy_every_s = busy_every_s
        self._began_lease_s = clock.lease_s()
        self._readings: dict[TaskId, Reading] = {}

    def begin(self, held: Held, point: Point, attempt: int) -> None:
        held = replace(
            held, point_id=point.point_id, attempt=attempt, needs=point.needs, devices=held.devices[: point.devices],
            resize=None, next_point=None, kept=None, change=None, restart_why="",
        )  # fmt: skip
        folders = self._places.make(held)
        spec = spec_of(self._places, self._launcher, held, point)
        self._places.write_until(held, held.until_lease_s, self._clock)
        spec.write(str(folders.control / "spec"))
        self._journal.hold(held)
        self._readings[held.task_id] = Reading(folders, done_s=held.saved_s)
        try:
            self._launcher.start(self._places.hold(held), folders)
        except InvalidInput as error:
            self._break(held, str(error))

    def ask_to_stop(self, held: Held) -> None:
        """Its supervisor tells the task."""
        folders = self._places.attempt(held)
        in_place.withdraw(folders.task)
        (folders.control / "stop").touch()

    def forget(self, task_id: TaskId) -> None:
        self._readings.pop(task_id, None)

    def look(self, task_id: TaskId) -> Outcome | None:
        """What the attempt wrote since, and how it ended; None: it has not, or what it saved is still being kept."""
        held = self._journal.held[task_id]
        if held.broken:
            return self._look_at_broken(held)
        try:
            return self._follow(held)
        except (OSError, MemoryError, QipanError):
            raise  # the board's own
        except Exception as error:
            log.exception("%s: what its attempt %d wrote cannot be followed", task_id, held.attempt)
            self._break(self._journal.held[task_id], f"what it wrote cannot be followed: {error!r}"[:WHY_MAX])
            return None

    def _break(self, held: Held, why: str) -> None:
        self._journal.hold(replace(held, broken=why, doubtful=True, resize=None, change=None))
        self.ask_to_stop(held)

    def _look_at_broken(self, held: Held) -> Outcome | None:
        """It has failed once nothing of it runs: what it writes is no longer read."""
        hold, folders = self._places.hold(held), self._places.attempt(held)
        self._launcher.end(hold, folders)
        over = self._clock.lease_s() > held.until_lease_s + MARGIN_S
        lives = self._launcher.lives(hold, folders) is not False and ended(folders) is None
        if (lives and not over) or self._launcher.left(hold, folders):
            return None
        reading = self._readings.get(held.task_id) or Reading(folders, done_s=held.saved_s)
        began_s = self._began_at_s(held, reading)
        return self._end(held, reading, Ended(None, began_s, self._now_s(reading), "itself"))

    def _follow(self, held: Held) -> Outcome | None:
        task_id, folders = held.task_id, self._places.attempt(held)
        reading = self._readings.get(task_id)
        if reading is None:  # another engine on this folder began it
            read_from = held.kept.events_from if held.kept is not None else 0
            reading = self._readings[task_id] = Reading(folders, read_from, done_s=held.saved_s)
        started = begun(folders)
        if started is not None:
            self._say_started(held, reading)
        held = self._read_events(held, reading)
        if held.change is not None:
            self._look_at_change(held, reading)
            held = self._journal.held[task_id]
            if started is not None:
                self._say_started(held, reading)
            held = self._read_events(held, reading)
        exited = ended(folders)
        if started is None and exited is None and self._never_started(held, reading):
            exited = Ended(None, self._clock.now_s(), self._clock.now_s(), "machine")
        if exited is not None:
            return self._end(self._read_rest(held, reading), reading, exited)
        if started is None:
            return None
        if self._may_live(held, reading):
            reading.lived = True
            self._look_at_devices(held, reading)
            return None
        if ended(folders) is not None:
            return None  # it ended while we looked: the next look reads how
        if self._launcher.left(self._places.hold(held), folders):
            return None  # what is left of it was killed; it is lost when that is gone
        now_s, lease_s = started.now_s(self._clock), self._clock.lease_s()
        engine_began_s = now_s - (lease_s - self._began_lease_s)
        reading.gone_s = reading.gone_s or gone_s(reading, started.started_s, engine_began_s, now_s, lease_s)
        return self._end(held, reading, Ended(None, started.started_s, reading.gone_s, "machine"))

    # ---- what it says ----------------------------------------------------------------------------------------------

    def _say_started(self, held: Held, reading: Reading) -> None:
        if reading.started:
            return
        reading.started = True
        if (held.task_id, held.attempt) not in self._journal.started:
            self._journal.say(
                TaskStarted(
                    held.task_id, held.lease_id, self._engine, held.generation, held.attempt, held.point_id, held.needs,
                    self._engine,
                )
            )  # fmt: skip

    def _read_rest(self, held: Held, reading: Reading) -> Held:
        """A board that was away has more to read than a look takes, and the last line says how much is saved."""
        skip_to_the_rest(reading)
        before = -1
        while reading.offset != before:
            before = reading.offset
            held = self._read_events(held, reading)
        return held

    def _read_events(self, held: Held, reading: Reading) -> Held:
        if held.change is not None and held.change.reshaped_s:
            return held  # what follows is the next attempt's
        work_s, said, saved = held.order.curve.work_s, "", False
        for line in unread_lines(reading):
            event = parse(line)
            step, steps = event.get("step"), event.get("steps")
            if held.change is not None and in_place.reshaped(held, event):
                at_s = min(
                    float(event["at_s"]), self._now_s(reading)
                )  # the task's word, by a clock that may be set
                at_s = max(at_s, self._began_at_s(held, reading))
                change = replace(held.change, reshaped_s=at_s, standstill_s=in_place.standstill_s(event))
                held = replace(held, change=change)
                self._journal.hold(held)
                break
            reading.offset += len(line)
            detail = line.rstrip(b"\n").decode(errors="replace") if len(line) <= DETAIL_BYTES_MAX else "{}"
            match event.get("event"):
                case "progress" if is_count(step) and is_count(steps) and steps:
                    reading.done_s = work_s * min(step, steps) / steps
                    write_steps(reading, steps)
                    self._tell_of_slow(held, reading, event)
                    said = detail
                case "checkpoint" if is_count(step):
                    steps = steps_known(reading)
                    if steps:
                        held, saved = replace(held, saved_s=work_s * min(step, steps) / steps), True
                    said = detail
                case "done":
                    reading.finished = True
                    said = detail
                case "validation" | "round":
                    said = detail
                case str() as event_name if event_name in REPORTED:
                    said = ""
                    if may_say(reading, self._clock.now_s()):
                        self._report(held, reading, detail)
                case _:
                    continue  # another program's line
        if saved:  # of many checkpoints in one look the last is kept
            self._journal.hold(held)
            self._keep(held)
        now_s = self._clock.now_s()
        if said and (now_s - reading.reported_s >= PROGRESS_S or reading.finished):
            reading.reported_s = now_s
            self._report(held, reading, said)
        return held

    def _keep(self, held: Held) -> None:
        """What a task saves is kept as it goes on, should its site be lost.  An own script's files may be half written."""
        if self._stager is None:
            return
        task = held.launch().task
        if not task.run:
            data = self._places.saved(held.task_id, task)
            self._stager.keep(data.name, data, held.attempt, held.saved_s)

    def _tell_of_slow(self, held: Held, reading: Reading, event: dict[str, Any]) -> None:
        """A rank that computes slower than its like: a fact names it and its device, which is taken last from now on."""
        now_s = self._clock.lease_s()
        for rank, share in slow_ranks(reading, held, event, now_s).items():
            device = held.devices[rank]
            if self._seats.avoid(held.chip_class, device, now_s):
                found = {
                    "event": "slow", "rank": rank, "device": device, "board": self._board, "share": round(share, 3),
                    "step": event.get("step"),
                }  # fmt: skip
                self._report(held, reading, json.dumps(found))

    def _look_at_devices(self, held: Held, reading: Reading) -> None:
        """How much they worked since the last look is said when it changed by a hundredth."""
        now_s, before = self._clock.now_s(), reading.busy
        if before is not None and now_s < before[0] + self._busy_every_s:
            return
        worked_s = self._launcher.busy_s(self._places.hold(held), reading.folders)
        reading.busy = None if worked_s is None else (now_s, worked_s)
        if before is None or worked_s is None or now_s <= before[0]:
            return
        share = (worked_s - before[1]) / ((now_s - before[0]) * held.needs[0].devices)
        share = min(1.0, max(0.0, share))
        if reading.busy_share is None or abs(share - reading.busy_share) >= 0.01:
            reading.busy_share = share
            self._journal.say(
                DevicesBusy(held.task_id, self._engine, held.attempt, round(share, 4), before[0], now_s)
            )

    def _report(self, held: Held, reading: Reading, detail: str) -> None:
        began_s = self._began_at_s(held, reading)
        until_s = max(began_s, self._now_s(reading))
        usage = held.usage(self._board, self._engine, began_s, until_s, ended=False)
        self._journal.say(
            TaskProgress(
                held.task_id, self._engine, held.attempt, reading.done_s, held.saved_s, detail, usage
            )
        )

    def _now_s(self, reading: Reading) -> float:
        """Unix seconds, by the clock that tells when the attempt began."""
        started = begun(reading.folders)
        return started.now_s(self._clock) if started is not None else self._clock.now_s()

    def _began_at_s(self, held: Held, reading: Reading) -> float:
        started = begun(reading.folders)
        return held.began_s(started.started_s if started is not None else self._clock.now_s())

    # ---- whether it runs, and how it ended -------------------------------------------------------------------------

    def _never_started(self, held: Held, reading: Reading) -> bool:
        """The engine died between noting the attempt and starting its supervisor (seen after START_S)."""
        now_s = self._clock.lease_s()
        reading.waited_since_s = reading.waited_since_s or now_s
        if now_s - reading.waited_since_s < START_S:
            return False
        hold = self._places.hold(held)
        lives = self._launcher.lives(hold, reading.folders)
        if lives is None:
            return not self._may_live(held, reading)
        if lives:
            return False
        if self._launcher.left(hold, reading.folders):
            self._launcher.end(
                hold, reading.folders
            )  # its supervisor died before it could say what it had begun
            return False
        return True

    def _may_live(self, held: Held, reading: Reading) -> bool:
        """Where it cannot be told, the attempt is asked to stop and its lease is no longer renewed: once that is over,
        and a margin, nothing of it runs."""
        hold = self._places.hold(held)
        lives = self._launcher.lives(hold, reading.folders)
        if lives is None and not held.doubtful:
            self._journal.hold(replace(held, doubtful=True))
            self.ask_to_stop(held)
        over = self._clock.lease_s() > held.until_lease_s + MARGIN_S
        if lives is None:
            return not over
        silence_s = silent_s(reading, self._clock.lease_s())
        if lives and silence_s <= alive.SILENT_S:
            return True
        left = self._launcher.left(hold, reading.folders)
        if left:
            reading.left_s = self._clock.lease_s()
        found = alive.judge(lives, silence_s, left, over)
        if found == "end":
            self._launcher.end(hold, reading.folders)
        return found == "runs"

    def _end(self, held: Held, reading: Reading, exited: Ended) -> Outcome | None:
        outcome, why = outcome_of(reading, held, exited)
        if self._stager is not None and outcome in ("parked", "lost"):  # it may go on at another site
            data = self._places.saved(held.task_id, held.launch().task)
            kept = self._stager.settle(data.name, data, held.attempt, held.saved_s)
            if kept is None:
                return None  # the exit is said once others can find what it saved
            why = f"{why}; what it saved is not kept for other sites: {kept}" if kept else why
        began_s = held.began_s(exited.started_s)
        end_s = max(began_s, exited.ended_s)
        work_s = held.order.curve.work_s
        saved_s = work_s if outcome == "done" else held.saved_s
        done_s = work_s if outcome == "done" else max(reading.done_s, saved_s)
        usage = held.usage(self._board, self._engine, began_s, end_s, ended=True)
        self._say_exited(
            TaskExited(
                held.task_id, held.lease_id, self._engine, held.generation, held.attempt, outcome, exited.code, done_s, saved_s,
                why, usage, final=outcome != "resized",
            )
        )  # fmt: skip
        return outcome

    def _say_exited(self, fact: TaskExited) -> None:
        if (fact.task_id, fact.attempt) not in self._journal.ended:  # an engine that was ended here said it
            self._journal.say(fact)

    # ---- another point ---------------------------------------------------------------------------------------------

    def why_not_in_place(self, held: Held) -> str:
        """Why it must be started again to go on at the point of its `resize`; "" when it need not be."""
        assert held.resize is not None
        if self._launcher.rank(self._places.hold(held)) is None:
            return "this engine starts all ranks together"
        then = held.resize.points[0]
        return in_place.why_not(held.launch().task, held.order.curve, held.point_id, then)

    def change(self, held: Held) -> None:
        """Its processes are ordered to go on at the point of its `resize`."""
        held = in_place.planned(held, self._clock.lease_s())
        self._journal.hold(held)
        in_place.order(self._places, self._launcher, held)

    def start_again(self, held: Held, why: str) -> None:
        """The attempt ends, and the next one begins from its checkpoint in processes of its own."""
        held = replace(held, change=None, restart_why=why)
        self._journal.hold(held)
        self.ask_to_stop(held)

    def order_again(self, held: Held) -> None:
        """The order was kept, the file may not have been written."""
        if held.attempt and held.change is not None:
            in_place.order(self._places, self._launcher, held)
        elif held.attempt and (held.resize is not None or held.stop_outcome):
            self.ask_to_stop(held)

    def _look_at_change(self, held: Held, reading: Reading) -> None:
        """The next attempt begins in the same processes once these have gone on, or in new ones where they do not."""
        assert held.change is not None
        if in_place.went_on(reading.folders, held.change):
            self._go_on(held, reading)
            return
        why = in_place.gave_up(reading.folders, held, self._clock.lease_s())
        if why:
            self.start_again(held, why)

    def _go_on(self, held: Held, reading: Reading) -> None:
        next_held = in_place.gone_on(held, reading.offset)
        assert next_held.kept is not None
        assert held.change is not None
        began_s = self._began_at_s(held, reading)
        until_s = max(began_s, next_held.kept.began_s)
        usage = held.usage(self._board, self._engine, began_s, until_s, ended=True)
        self._say_exited(
            TaskExited(
                held.task_id, held.lease_id, self._engine, held.generation, held.attempt, "resized", None, reading.done_s,
                held.saved_s, f"goes on at {next_held.point_id} in the same processes", usage, final=False, in_place=True,
                standstill_s=held.change.standstill_s,
            )
        )  # fmt: skip
        self._launcher.groups(self._places.hold(next_held))  # what is left may use as much as its devices
        self._journal.hold(next_held)
        reading.started, reading.pace, reading.busy, reading.busy_share = False, None, None, None
