"""What a leaf engine keeps through its own end: every fact it said (`journal.jsonl`, numbered by line), the leases it holds and
how far each task's commands have come (`held.json`)."""

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


class Journal:
    """What the facts say is kept beside them; all of it is read back from `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.facts: list[Fact] = []
        self.held: dict[TaskId, Held] = {}
        #: (term, generation) of the last command for each task
        self.commands: dict[TaskId, tuple[int, int]] = {}
        self.started: set[tuple[TaskId, int]] = set()  # attempts
        self.ended: set[tuple[TaskId, int]] = set()
        #: tasks that came to their end here, and how
        self.over: dict[TaskId, str] = {}
        self.offered: EngineOffered | None = None  # the last
        self.room: Room | None = None
        self._read_back()

    def say(self, fact: Fact) -> None:
        """Whole or not at all: what is said next must not stand behind half a line.  Raises OSError."""
        line = encode(fact) + b"\n"
        journal = os.open(
            self._folder / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            size = os.fstat(journal).st_size
            try:
                while line:
                    line = line[os.write(journal, line) :]
            except OSError:
                os.ftruncate(journal, size)
                raise
        finally:
            os.close(journal)
        self._note(fact)

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
        self.commands[task_id] = (term, generation)
        return True

    def _save(self) -> None:
        part = self._folder / "held.part"
        part.write_bytes(msgspec.json.encode((self.held, self.commands)))
        part.rename(self._folder / "held.json")

    def _note(self, fact: Fact) -> None:
        self.facts.append(fact)
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
        journal = self._folder / "journal.jsonl"
        if journal.exists():
            body = journal.read_bytes()
            whole = body[: body.rfind(b"\n") + 1]
            if len(whole) != len(body):
                # the last line was cut by a crash; its fact was never given out
                os.truncate(journal, len(whole))
            for line in whole.splitlines():
                fact = decode(line)
                assert isinstance(fact, Fact)
                self._note(fact)
        path = self._folder / "held.json"
        if path.exists():
            kind = tuple[dict[TaskId, Held], dict[TaskId, tuple[int, int]]]
            held, self.commands = msgspec.json.decode(path.read_bytes(), type=kind)
            refused = {
                (fact.lease_id, fact.generation) for fact in self.facts if isinstance(fact, LeaseRefused)
            }
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
