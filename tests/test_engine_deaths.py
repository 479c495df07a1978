"""A board and its leaf engine that die at any write of theirs, over a site in memory whose supervisors live on: nothing runs twice,
nothing is lost, every attempt ends once."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from qipan.clock import ManualClock
from qipan.controller import Controller
from qipan.curves import Curve, Need, Point
from qipan.engines.held import Places
from qipan.engines.journal import Journal
from qipan.engines.launcher import Folders, Hold, Holding
from qipan.engines.leaf import LeafEngine
from qipan.engines.shim import Spec
from qipan.events import Renew, Reserve, TaskExited, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.scheduler import Settings
from qipan.store import Store
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")
ENGINE = EngineId("dc-local")
STEP_S = 2.0
WORK_S = 40.0
STRIDE = 3  # of the writes every so many is a death


class Death(BaseException):
    """Of the process of board and engine: nobody catches it."""


@dataclass
class Run:
    """One supervisor and its task."""

    attempt: Folders
    began_s: float
    ended_s: float | None = None


@dataclass
class Site:
    """What outlives the board: holds, supervisors, and the clock."""

    clock: ManualClock
    grant_s: float
    holds: dict[str, float] = field(default_factory=dict)  # name -> when it was asked for
    runs: dict[str, Run] = field(default_factory=dict)  # control folder -> its supervisor
    worked: Counter[str] = field(default_factory=Counter)  # steps that a task did

    def advance(self) -> None:
        self.clock.advance_to(self.clock.now_s() + STEP_S)
        now_s = self.clock.now_s()
        for control, run in self.runs.items():
            if run.ended_s is not None:
                continue
            task = Path(control).name.rpartition("-")[0]
            self.worked[task] += 1
            (run.attempt.control / "beat").write_text(str(now_s))
            if self.worked[task] % 8 == 0:
                told = {"step": self.worked[task], "steps": int(WORK_S / STEP_S)}
                lines = [{"event": "progress", **told}, {"event": "checkpoint", "step": told["step"]}]
                with (run.attempt.task / "events.jsonl").open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            over = float((run.attempt.control / "until").read_text().split()[0]) < now_s
            stopped = (run.attempt.control / "stop").exists()
            if over or stopped or self.worked[task] * STEP_S >= WORK_S:
                how = "lease" if over else "stop" if stopped else "itself"
                told = {"code": 0, "started_s": run.began_s, "ended_s": now_s, "ended_by": how}
                (run.attempt.control / "exit.json").write_text(json.dumps(told))
                run.ended_s = now_s


class Launcher:
    """Over the site: devices are granted a while after they were asked for."""

    picks = in_place = False

    def __init__(self, site: Site) -> None:
        self.site = site

    def adopt(self, prefix, holds):
        names = {hold.name for hold in holds}
        self.site.holds = {name: at_s for name, at_s in self.site.holds.items() if name in names}
        for hold in holds:
            self.hold(hold)

    def devices(self):
        return {CHIP: 4}

    def draining(self, hold):
        return ""

    def out(self):
        return ()

    def environment(self, hold):
        return {}

    def command(self, hold, run):
        return ["bash", "-c", run]

    def rank(self, hold):
        return None

    def groups(self, hold):
        return "", [], []

    def hold(self, hold: Hold) -> None:
        self.site.holds.setdefault(hold.name, self.site.clock.now_s())

    def look(self, hold):
        at_s = self.site.holds.get(hold.name)
        if at_s is None:
            return Holding("gone", "it was given back")
        grant_s = self.site.grant_s if int(hold.name.rpartition("-")[2]) % 3 else 3 * self.site.grant_s
        return Holding("held" if at_s + grant_s <= self.site.clock.now_s() else "waiting")

    def start(self, hold, attempt):
        now_s = self.site.clock.now_s()
        if str(attempt.control) in self.site.runs:
            return
        beside = [run.attempt.control.name for run in self.site.runs.values() if run.ended_s is None]
        task = attempt.control.name.rpartition("-")[0]
        assert self.look(hold).state == "held", f"{task} is started without devices"
        assert not [name for name in beside if name.rpartition("-")[0] == task], f"{task} runs twice"
        self.site.runs[str(attempt.control)] = Run(attempt, now_s)
        begun = {"pid": 1, "shim": 1, "started_s": now_s, "lease_s": now_s, "boot_id": "manual"}
        (attempt.control / "pid.json").write_text(json.dumps(begun))

    def lives(self, hold, attempt):
        run = self.site.runs.get(str(attempt.control))
        return run is not None and run.ended_s is None

    def left(self, hold, attempt):
        return [1] if self.lives(hold, attempt) else []

    def end(self, hold, attempt):
        run = self.site.runs.get(str(attempt.control))
        if run is not None and run.ended_s is None:
            run.ended_s = self.site.clock.now_s()

    def busy_s(self, hold, attempt):
        return None

    def release(self, hold):
        self.site.holds.pop(hold.name, None)

    def sweep(self):
        return True


WRITES = (
    (Journal, "say"), (Journal, "_save"), (Places, "write_until"), (Spec, "write"), (Store, "record"),
    (Launcher, "hold"), (Launcher, "start"), (Launcher, "release"),
)  # fmt: skip


class Deaths:
    """At the write `at`, before or after it; counted from 1."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.count, self.at, self.where = 0, at, ""
        for kind, name in WRITES:
            monkeypatch.setattr(kind, name, self.deadly(kind, name, getattr(kind, name)))

    def deadly(self, kind, name, write):
        def call(*given, **named):
            for when in ("before", "after"):
                self.count += 1
                if self.count == self.at:
                    self.where = f"{when} {kind.__name__}.{name}"
                    raise Death
                if when == "before":
                    done = write(*given, **named)
            return done

        return call


def order(name: str, bid: int, submitted_s: float, most: int) -> Order:
    launch = msgspec.json.encode(Launch(Task("train", name, run="true")))
    points = tuple(
        Point(f"p{n}", (Need(CHIP, n),), n / most, n / most, n / most, start_s=0.5, stop_s=0.5)
        for n in (1, 2, 4)
        if n <= most
    )
    return Order(
        TaskId(name), "me", name, Curve(points, WORK_S), bid, submitted_s, elastic=True, launch=launch
    )


class Board:
    """The process: a board over its engine, opened again after each death."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.folder, self.site = folder, site
        self.store = Store(folder / "board.db")
        pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 4, 4, 1)
        spec = BoardSpec(BoardId("dc"), pools=(pool,))
        self.engine = LeafEngine(
            ENGINE, spec, folder / "engine", site.clock, folder / "ckpt", Launcher(site), wait_s=9.0
        )
        self.controller = Controller(
            BoardId("dc"), self.store, site.clock, {ENGINE: self.engine}, settings=Settings(lease_s=60.0)
        )


def lived(folder: Path, monkeypatch, at: int, grant_s: float) -> Deaths:
    folder.mkdir()
    site = Site(ManualClock(1000.0), grant_s)
    (folder / "engine").mkdir()
    orders = [order("a", 4, 1000.0, 4), order("b", 40, 1020.0, 1)]
    board = Board(folder, site)
    deaths = Deaths(monkeypatch, at)
    for _ in range(600):
        try:
            if board is None:
                board = Board(folder, site)
            for one in orders:
                if one.submitted_s <= site.clock.now_s() and not board.store.facts_of(one.task_id):
                    board.controller.accept(TaskSubmitted(one, 0))
            board.controller.step()
        except Death:
            board.store.close()
            board = None
        if board is not None and len(board.controller.state.over) == len(orders):
            break
        site.advance()
    assert board is not None
    over = dict(board.controller.state.over)
    assert over == {TaskId(name): "done" for name in "ab"}, (deaths.where, over)
    exits = [fact for _, fact in board.engine.observe(0) if isinstance(fact, TaskExited)]
    told = Counter((fact.task_id, fact.attempt) for fact in exits)
    assert set(told.values()) == {1}, (deaths.where, told)
    assert not board.engine.journal.held, deaths.where
    board.store.close()
    return deaths


def test_a_board_that_dies_at_a_write_loses_and_doubles_nothing(tmp_path):
    """`grant_s`: so long or three times as long devices are waited for, the latter longer than a lease does."""
    for grant_s in (0.0, 4.0):
        at, last = 1, 0
        while not last:
            with pytest.MonkeyPatch.context() as patch:
                deaths = lived(tmp_path / f"{grant_s}-{at}", patch, at, grant_s)
            last = deaths.count if deaths.count < at else 0
            at += STRIDE
        assert last > 100, "it dies at each kind of write"


def test_a_renewal_of_all_leases_writes_them_once(tmp_path, monkeypatch):
    site = Site(ManualClock(1000.0), 0.0)
    (tmp_path / "engine").mkdir()
    engine = Board(tmp_path, site).engine
    names = "abc"
    for name in names:
        need = (Need(CHIP, 1),)
        engine.reserve(Reserve(TaskId(name), LeaseId(name), 1, 1, order(name, 1, 0.0, 1), need, 60.0))
    saved = []
    monkeypatch.setattr(Journal, "_save", lambda journal: saved.append(journal))
    engine.renew(Renew(tuple(map(LeaseId, names)), 1, 90.0))
    assert len(saved) == 1
    assert [held.until_lease_s for held in engine.journal.held.values()] == [1090.0] * 3


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_board_whose_machine_lost_the_end_of_the_engines_journal_hears_what_comes_after(tmp_path, left):
    """What was written last may be gone after a power cut, here but for so many lines and zeros; the board's store has all of it."""
    site = Site(ManualClock(1000.0), 0.0)
    (tmp_path / "engine").mkdir()
    board = Board(tmp_path, site)
    for name in "xyza":
        board.controller.accept(TaskSubmitted(order(name, 4, 1000.0, 4), 0))
        for _ in range(12 if name == "a" else 60):
            board.controller.step()
            site.advance()
    board.store.close()
    site.runs.clear()
    journal = tmp_path / "engine" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > left + 1
    journal.write_bytes(b"".join(lines[:left]) + bytes(64 * left))
    for _ in range(2):
        board = Board(tmp_path, site)
        for _ in range(60):
            board.controller.step()
            site.advance()
        board.store.close()
    assert dict(board.controller.state.over) == {TaskId(name): "done" for name in "xyza"}
