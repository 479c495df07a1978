"""Another tool's queue (Slurm, Ray, Kubernetes) below a leaf engine.

A lease is a job there: the job's program is the supervisor (shim) in its waiting form.  It says that it has its devices
(`granted.json`), waits for an attempt (`go`), runs it, and leaves.  So devices are really held before a lease is granted,
tasks go on when the queue's daemons are gone, and the lease ends them even then.  The folder of the engine must be seen
under the same path by the nodes of the queue (a shared file system).
"""

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qipan.curves import Need
from qipan.engines.launcher import Folders, Hold, Holding, ended, free_port, read_json, torchrun, write_text
from qipan.errors import InvalidInput, QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import Out

POLL_S = 2.0
AGAIN_S = 1.0  # after a look that failed

log = logging.getLogger("qipan.queue")


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
    devices that our tasks may use now, those in use included, those on nodes that are to go not.  `draining`: name of a job on
    such a node -> why.  `out`: the devices of such nodes."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    usable: Mapping[ChipClassId, int] = field(default_factory=dict)
    draining: Mapping[str, str] = field(default_factory=dict)
    out: tuple[Out, ...] = ()


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


def nodes_of(need: Need, pool: Pool) -> int:
    """The fewest nodes of the pool on which the devices lie evenly, with no more on each than the task wants."""
    wanted = [number for number in (need.devices_per_node, pool.devices_per_node) if number]
    per_node, devices = min(wanted, default=need.devices), need.devices
    return next(
        nodes for nodes in range(max(1, math.ceil(devices / per_node)), devices + 1) if devices % nodes == 0
    )


#: torchrun would ask each node by its host's name whether the rendezvous is its own, and tell others that name: neither need
#: lead anywhere.  These are its options as variables.
MEETING = (
    'export PET_RDZV_CONF=is_host=$(({rank} == 0)); [ -z "$QIPAN_NODE_ADDRESS" ] || export PET_LOCAL_ADDR=$QIPAN_NODE_ADDRESS;'
    ' exec "$@"'
)


def gang_command(
    python: str,
    hold: Hold,
    pool: Pool,
    run: str,
    granted: Mapping[str, object],
    rank: str = "${QIPAN_NODE_RANK:-0}",
) -> list[str]:
    """What the supervisor on each node of a hold starts.  `rank`: the node's, as shell."""
    if run:
        return ["bash", "-c", run]
    nodes = nodes_of(hold.need, pool)
    host = "127.0.0.1" if nodes == 1 else str(granted.get("host", ""))
    start = torchrun(python, nodes, hold.need.devices // nodes, f"{host}:{free_port()}", enter=False)
    return start if nodes == 1 else ["bash", "-c", MEETING.format(rank=rank), "bash", *start]


def gang_environment(granted: Mapping[str, object], nodes: int, interface: str) -> dict[str, str]:
    """`interface`: gloo's, where several nodes do not find theirs by themselves."""
    hosts = granted.get("hosts")
    return {
        "QIPAN_NUM_NODES": str(nodes),
        "QIPAN_NODE_ADDRESSES": ",".join(map(str, hosts))
        if nodes > 1 and isinstance(hosts, list)
        else "127.0.0.1",
        "QIPAN_DEVICES": str(granted.get("devices", "")),
        "MASTER_ADDR": "127.0.0.1" if nodes == 1 else str(granted.get("host", "")),
        "GLOO_SOCKET_IFNAME": interface or ("lo" if nodes == 1 else ""),
    }


def python_path() -> dict[str, str]:
    """Nodes that share our file system find our modules where we do."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


class QueueLauncher:
    """The launcher over a `Queue`.  One thread speaks to it, so that a slow daemon never holds up the board."""

    picks = True
    in_place = False

    def __init__(self, queue_: Queue, poll_s: float = POLL_S) -> None:
        self._queue = queue_
        self._poll_s = poll_s
        self._prefix = ""
        self._view: View | None = None  # until the queue has answered
        self._looked_s = float("-inf")  # when the newest look that it answered began, on the monotonic clock
        self._next_look_s = float("-inf")
        self._away = ""  # why the last thing asked of the queue failed
        self._adopted: Sequence[Hold] = ()
        self._known: set[str] = set()
        self._refused: dict[str, str] = {}  # hold -> why it could not be asked for
        self._asked_s: dict[str, float] = {}
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    # ---- what the leaf engine calls --------------------------------------------------------------------------------

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        self._prefix, self._adopted = prefix, holds
        self._known = {hold.name for hold in holds}
        self._look()
        self._thread.start()

    def devices(self) -> Mapping[ChipClassId, int] | None:
        return self._view.usable if self._view is not None else None

    def draining(self, hold: Hold) -> str:
        return self._view.draining.get(hold.name, "") if self._view is not None else ""

    def out(self) -> tuple[Out, ...]:
        return self._view.out if self._view is not None else ()

    def environment(self, hold: Hold) -> dict[str, str]:
        return self._queue.environment(hold, read_json(hold.folder / "granted.json") or {})

    def command(self, hold: Hold, run: str) -> list[str]:
        return self._queue.command(hold, run, read_json(hold.folder / "granted.json") or {})

    def rank(self, hold: Hold) -> list[str] | None:
        return None  # a job has the devices that it was given

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
        job = self._job(hold)
        if job is not None and job.state in ("ended", "lost"):
            return Holding("gone", job.why or "its job ended before it had devices")
        return Holding("waiting", self._away or (job.why if job is not None else ""))

    def start(self, hold: Hold, attempt: Folders) -> None:
        write_text(hold.folder / "go", str(attempt.control))

    def beside(self) -> None:
        raise InvalidInput(
            "the task runs in a job of the site's own scheduler; use that one's way in (srun --overlap --jobid, ray, kubectl exec)"
        )

    def lives(self, hold: Hold, attempt: Folders) -> bool | None:
        if ended(attempt) is not None:
            return True  # the engine has yet to read it
        job = self._job(hold)
        if job is None:
            asked_s = self._asked_s.get(hold.name, float("-inf"))
            return None if self._looked_s > asked_s + self._poll_s else True
        if job.state == "lost":
            return None
        return job.state != "ended"

    def left(self, hold: Hold, attempt: Folders) -> None:
        """The queue ends what its jobs leave behind."""

    def end(self, hold: Hold, attempt: Folders) -> None:
        """As above."""

    def release(self, hold: Hold) -> None:
        self._known.discard(hold.name)
        if hold.folder.exists():
            (hold.folder / "release").touch()
        if read_json(hold.folder / "granted.json") is None:
            self._orders.put(lambda: self._take_back(hold.name))

    def busy_s(self, hold: Hold, attempt: Folders) -> float | None:
        """The queue's own machines do not tell."""
        return None

    def sweep(self) -> bool:
        return True

    def _job(self, hold: Hold) -> Job | None:
        return self._view.jobs.get(hold.name) if self._view is not None else None

    # ---- the thread that speaks to the queue -----------------------------------------------------------------------

    def _speak(self) -> None:
        while True:
            wait_s = max(0.0, self._next_look_s - time.monotonic())
            try:
                order = self._orders.get(timeout=wait_s)
            except queue.Empty:
                order = self._look
            try:
                order()
            except Exception as error:  # what was asked shows in the next look, and is asked again or lapses
                self._failed(error)

    def _ask(self, hold: Hold) -> None:
        try:
            self._queue.submit(hold)
        except Exception as error:
            self._refused[hold.name] = str(error) or type(error).__name__
            raise

    def _take_back(self, name: str) -> None:
        job = self._queue.look(self._prefix).jobs.get(name)
        if job is not None and job.state in ("waiting", "running"):
            self._queue.cancel(job.job_id)

    def _look(self) -> None:
        began_s = time.monotonic()
        try:
            view = self._queue.look(self._prefix)
        except Exception as error:
            self._next_look_s = began_s + min(self._poll_s, AGAIN_S)  # what was seen last stands; soon again
            self._failed(error)
            return
        first = self._view is None
        poll_s = (
            self._poll_s if any(view.usable.values()) else min(self._poll_s, POLL_S)
        )  # all is gone: soon again
        self._view, self._looked_s, self._next_look_s, self._away = view, began_s, began_s + poll_s, ""
        if first:
            self._take_up(view)

    def _take_up(self, view: View) -> None:
        """What an engine before this one left in the queue; only now it is known what was asked for."""
        for name, job in sorted(view.jobs.items()):
            if name not in self._known and job.state in ("waiting", "running"):
                self._orders.put(lambda job_id=job.job_id: self._queue.cancel(job_id))  # type: ignore[misc]
        for hold in self._adopted:
            asked = hold.name in view.jobs or read_json(hold.folder / "granted.json") is not None
            if hold.name in self._known and not asked:
                self.hold(hold)  # the engine died before it had asked

    def _failed(self, error: Exception) -> None:
        """This thread goes on whatever happens: without it nothing is asked, cancelled or seen."""
        away = f"its queue could not be asked: {str(error) or type(error).__name__}"
        if away != self._away:
            log.warning("%s", away, exc_info=None if isinstance(error, QipanError) else error)
        self._away = away
