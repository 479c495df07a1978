"""What a leaf engine keeps through its own end: every fact it said (`journal.jsonl`, numbered by line, an empty one where a fact was
lost), the leases it holds and how far each task's commands have come (`held.json`)."""

import os
from pathlib import Path

import msgspec

from qipan.engines.held import Held
from qipan.events import (
    FINAL,
    EngineOffered,
    Fact,
    LeaseRefused,
    StorageOffered,
    TaskExited,
    TaskStarted,
    decode,
    encode,
)
from qipan.leases import LeaseId, Room, TaskId
from qipan.scheduler.census import OVER_MAX


class Journal:
    """What the facts say is kept beside them; all of it is read back from `folder`.  The facts themselves are in memory only until
    the board's store has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "journal.jsonl"
        self._count = 0  # of lines
        self._fresh: list[Fact] = []  # the last of them
        self.held: dict[TaskId, Held] = {}
        #: (term, generation) of the last command for each task held here, and for the newest OVER_MAX others; the newest last
        self.commands: dict[TaskId, tuple[int, int]] = {}
        self.started: set[tuple[TaskId, int]] = set()  # attempts
        self.ended: set[tuple[TaskId, int]] = set()
        #: tasks that came to their end here, and how
        self.over: dict[TaskId, str] = {}
        self.offered: EngineOffered | None = None  # the last
        self.room: Room | None = None
        self._read_back()

    def say(self, fact: Fact) -> None:
        """Raises OSError."""
        self._write(encode(fact) + b"\n")
        self._count += 1
        self._fresh.append(fact)
        self._note(fact)

    def go_on_behind(self, number: int) -> None:
        """The board's store has facts up to this number.  Where a machine that went down lost their lines here, what is said next
        has numbers behind them all the same: else it would pass for what was heard.  Raises OSError."""
        if number > self._count:
            self._write(b"\n" * (number - self._count))
            self._count, self._fresh = number, []

    def after(self, number: int) -> list[tuple[int, Fact]]:
        """What was said behind this number, up to which the board's store has all."""
        first = self._count - len(self._fresh)
        if number < first:
            return self._read(number)  # a start, or a store that was restored
        del self._fresh[: number - first]
        return list(enumerate(self._fresh, number + 1))

    def hold(self, *leases: Held) -> None:
        """All are written at once: the file is whole, and a renewal takes very many."""
        self.held.update({held.task_id: held for held in leases})
        self._save()

    def release(self, task_id: TaskId) -> None:
        del self.held[task_id]
        self._save()

    def newer(self, task_id: TaskId, term: int, generation: int) -> bool:
        """Whether this command comes after all others for the task; it is counted as the last one then."""
        if (term, generation) <= self.commands.get(task_id, (0, 0)):
            return False
        self.commands.pop(task_id, None)
        self.commands[task_id] = (term, generation)
        return True

    def ends(self) -> tuple[tuple[TaskId, str], ...]:
        """How tasks ended here that hold nothing now, the newest OVER_MAX of them."""
        return tuple(one for one in self.over.items() if one[0] not in self.held)[-OVER_MAX:]

    def _write(self, lines: bytes) -> None:
        """Whole or not at all: what is said next must not stand behind half a line."""
        journal = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(journal).st_size
            try:
                while lines:
                    lines = lines[os.write(journal, lines) :]
            except OSError:
                os.ftruncate(journal, size)
                raise
        finally:
            os.close(journal)

    def _read(self, number: int) -> list[tuple[int, Fact]]:
        with self._path.open("rb") as file:
            return [(at, _fact(line)) for at, line in enumerate(file, 1) if at > number and line != b"\n"]

    def _save(self) -> None:
        for task_id in [one for one in self.commands if one not in self.held][:-OVER_MAX]:
            del self.commands[task_id]
        part = self._folder / "held.part"
        part.write_bytes(msgspec.json.encode((self.held, self.commands)))
        part.rename(self._folder / "held.json")

    def _note(self, fact: Fact) -> None:
        match fact:
            case TaskStarted():
                self.started.add((fact.task_id, fact.attempt))
            case TaskExited():
                self.ended.add((fact.task_id, fact.attempt))
                if fact.outcome in FINAL:
                    self.over[fact.task_id] = fact.outcome
            case EngineOffered():
                self.offered = fact
            case StorageOffered():
                self.room = fact.room

    def _read_back(self) -> None:
        refused: set[tuple[LeaseId, int]] = set()
        whole = 0  # bytes
        self._path.touch()
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or b"\0" in line:
                    break  # cut by a crash, of the process or of the machine, which may leave zeros
                whole, self._count = whole + len(line), self._count + 1
                if line != b"\n":
                    fact = _fact(line)
                    self._note(fact)
                    if isinstance(fact, LeaseRefused):
                        refused.add((fact.lease_id, fact.generation))
        if whole < self._path.stat().st_size:
            os.truncate(self._path, whole)
        path = self._folder / "held.json"
        if path.exists():
            kind = tuple[dict[TaskId, Held], dict[TaskId, tuple[int, int]]]
            held, self.commands = msgspec.json.decode(path.read_bytes(), type=kind)
            self.held = {
                task_id: one for task_id, one in held.items() if not self._was_given_up(one, refused)
            }

    def _was_given_up(self, held: Held, refused: set[tuple[LeaseId, int]]) -> bool:
        """Its end was said, and the engine died before it let go: devices that came since are not taken."""
        if held.runs:
            return False
        if held.attempt:
            return (held.task_id, held.attempt + 1) in self.ended
        return (held.lease_id, held.generation) in refused


def _fact(line: bytes) -> Fact:
    fact = decode(line)
    assert isinstance(fact, Fact)
    return fact
