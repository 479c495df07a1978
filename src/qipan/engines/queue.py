"""Another tool's queue (Slurm, Ray, Kubernetes) below a leaf engine.

A lease is a job there: the job's program is the supervisor (shim) in its waiting form.  It says that it has its devices
(`granted.json`), waits for an attempt (`go`), runs it, and leaves.  So devices are really held before a lease is granted,
tasks go on when the queue's daemons are gone, and the lease ends them even then.  The folder of the engine must be seen
under the same path by the nodes of the queue (a shared file system).
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from qipan.engines.launcher import Hold, Holding, free_port, read_json, torchrun, write_text
from qipan.errors import InvalidInput, QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool

POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """One of our jobs as its queue sees it.  "ended": its processes are gone for certain; "lost": the queue gave it up,
    its processes may be alive."""

    job_id: str
    state: Literal["waiting", "running", "ended", "lost"]
    why: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """One look at a queue.  `jobs`: name -> job, of those whose names begin with the prefix asked for.  `usable`:
    devices that our tasks may use now, those in use included."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    usable: Mapping[ChipClassId, int] = field(default_factory=dict)


class Queue(Protocol):
    """Calls may take seconds and raise QipanError when the queue cannot be reached; they run on one thread."""

    def submit(self, hold: Hold) -> str:
        """Ask for the hold's devices; returns the job's id.  Raises QipanError."""
        ...

    def cancel(self, job_id: str) -> None: ...

    def look(self, prefix: str) -> View: ...

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]: ...

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]: ...

    def inside(self, pool: Pool, devices: int, command: list[str]) -> list[str]:
        """A local command that runs `command` on `devices` of the pool's, and waits for it."""
        ...


def share_of(board: BoardSpec) -> float:
    """The part of each chip class that Qipan may use.  Raises InvalidInput."""
    text = board.engine_options.get("share", "1")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidInput(f"board {board.board}: share is {text}; give more than 0, at most 1")
    return share


def options_of(board: BoardSpec, known: Sequence[str], needed: Sequence[str] = ()) -> dict[str, str]:
    """The board's `engine_options` without those that every queue has (`folder`, `wait`, `share`).  Raises InvalidInput."""
    given = {
        key: value for key, value in board.engine_options.items() if key not in ("folder", "wait", "share")
    }
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidInput(
            f"board {board.board}: engine_options {unknown[0]!r} is not one of {', '.join(known)}, folder, wait, share"
        )
    missing = [name for name in needed if name not in board.engine_options]
    if missing:
        raise InvalidInput(
            f"board {board.board}: engine_options needs `{missing[0]}` for engine {board.engine}"
        )
    return given


def on_one_node(python: str, hold: Hold, run: str) -> list[str]:
    """What a supervisor starts whose devices lie on its own node."""
    if run:
        return ["bash", "-c", run]
    return torchrun(python, 1, hold.need.devices, f"127.0.0.1:{free_port()}", enter=False)


def one_node_environment(granted: Mapping[str, object], interface: str) -> dict[str, str]:
    return {
        "QIPAN_NUM_NODES": "1",
        "QIPAN_DEVICES": str(granted.get("devices", "")),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": interface,
    }


def python_path() -> dict[str, str]:
    """Nodes that share our file system find our modules where we do."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


class QueueLauncher:
    """The launcher over a `Queue`.  One thread speaks to it, so that a slow daemon never holds up the board."""

    def __init__(self, queue_: Queue, poll_s: float = POLL_S) -> None:
        self._queue = queue_
        self._poll_s = poll_s
        self._prefix = ""
        self._view = View()
        self._looked_s = float("-inf")  # when the newest look began, on the monotonic clock
        self._known: set[str] = set()
        self._refused: dict[str, str] = {}  # hold -> why it could not be asked for
        self._asked_s: dict[str, float] = {}
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    # ---- what the leaf engine calls --------------------------------------------------------------------------------

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        self._prefix = prefix
        self._known = {hold.name for hold in holds}
        self._look()
        for name, job in sorted(self._view.jobs.items()):
            if name not in self._known and job.state in ("waiting", "running"):
                self._orders.put(lambda job_id=job.job_id: self._queue.cancel(job_id))  # type: ignore[misc]
        for hold in holds:
            if hold.name not in self._view.jobs and read_json(hold.folder / "granted.json") is None:
                self.hold(hold)  # the engine died before it had asked
        self._thread.start()

    def devices(self) -> Mapping[ChipClassId, int]:
        return self._view.usable

    def environment(self, hold: Hold) -> dict[str, str]:
        return self._queue.environment(hold, read_json(hold.folder / "granted.json") or {})

    def command(self, hold: Hold, run: str) -> list[str]:
        return self._queue.command(hold, run, read_json(hold.folder / "granted.json") or {})

    def groups(self, hold: Hold) -> tuple[str, list[str], list[float]]:
        return "", [], []

    def hold(self, hold: Hold) -> None:
        self._known.add(hold.name)
        self._asked_s[hold.name] = time.monotonic()
        self._orders.put(lambda: self._ask(hold))

    def look(self, hold: Hold) -> Holding:
        if read_json(hold.folder / "granted.json") is not None:
            return Holding("held")
        if hold.name in self._refused:
            return Holding("gone", self._refused[hold.name])
        job = self._view.jobs.get(hold.name)
        if job is not None and job.state in ("ended", "lost"):
            return Holding("gone", job.why or "its job ended before it had devices")
        return Holding("waiting", job.why if job is not None else "")

    def start(self, hold: Hold, attempt: Path) -> None:
        write_text(hold.folder / "go", str(attempt))

    def lives(self, hold: Hold, attempt: Path) -> bool | None:
        if (attempt / "exit.json").exists():
            return True  # the engine has yet to read it
        job = self._view.jobs.get(hold.name)
        if job is None:
            asked_s = self._asked_s.get(hold.name, float("-inf"))
            return None if self._looked_s > asked_s + self._poll_s else True
        if job.state == "lost":
            return None
        return job.state != "ended"

    def release(self, hold: Hold) -> None:
        self._known.discard(hold.name)
        if hold.folder.exists():
            (hold.folder / "release").touch()
        if read_json(hold.folder / "granted.json") is None:
            self._orders.put(lambda: self._take_back(hold.name))

    def sweep(self) -> bool:
        return True

    # ---- the thread that speaks to the queue -----------------------------------------------------------------------

    def _speak(self) -> None:
        while True:
            wait_s = max(0.0, self._looked_s + self._poll_s - time.monotonic())
            try:
                order = self._orders.get(timeout=wait_s)
            except queue.Empty:
                self._look()
                continue
            try:
                order()
            except QipanError:
                continue  # the daemon is away: what was asked shows in the next look, and is asked again or lapses

    def _ask(self, hold: Hold) -> None:
        try:
            job_id = self._queue.submit(hold)
        except QipanError as error:
            self._refused[hold.name] = str(error)
            return
        (hold.folder / "job").write_text(job_id)

    def _take_back(self, name: str) -> None:
        job = self._queue.look(self._prefix).jobs.get(name)
        if job is not None and job.state in ("waiting", "running"):
            self._queue.cancel(job.job_id)

    def _look(self) -> None:
        began_s = time.monotonic()
        try:
            self._view = self._queue.look(self._prefix)
        except QipanError:
            self._looked_s = (
                began_s - self._poll_s + min(self._poll_s, 1.0)
            )  # what was seen last stands; soon again
            return
        self._looked_s = began_s
