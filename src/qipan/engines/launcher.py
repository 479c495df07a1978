"""What a leaf engine stands on: plain processes, or another tool's own queue.  A `Launcher` gets devices, starts
supervisors (shims) in them, and tells whether they live; with it come the files that both sides read."""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from qipan.curves import Need
from qipan.hardware import ChipClassId
from qipan.leases import TaskId


@dataclass(frozen=True, slots=True)
class Hold:
    """Devices asked for on behalf of one lease.  `name` asks once, however often it is said; the supervisor finds its
    orders in `folder`."""

    name: str
    folder: Path
    task_id: TaskId
    tenant: str
    need: Need
    devices: tuple[int, ...]  # which of the pool's, where the launcher leaves that to the engine


@dataclass(frozen=True, slots=True)
class Holding:
    """What became of a hold: it waits (for what), holds its devices, or is gone (why)."""

    state: Literal["waiting", "held", "gone"]
    why: str = ""


class Launcher(Protocol):
    """What a leaf engine stands on.  Every method may be called twice."""

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        """After a start: `holds` are in use; others whose names begin with `prefix` are left from an earlier run."""
        ...

    def devices(self) -> Mapping[ChipClassId, int]:
        """How many devices tasks may use now, those in use included."""
        ...

    def environment(self, hold: Hold) -> dict[str, str]:
        """What a task's environment starts from: QIPAN_NUM_NODES, QIPAN_DEVICES, MASTER_ADDR at least."""
        ...

    def command(self, hold: Hold, run: str) -> list[str]:
        """What the supervisor starts inside the hold: the own script `run`, or the built-in trainer when it is empty."""
        ...

    def groups(self, hold: Hold) -> tuple[str, list[str], list[float]]:
        """The attempt's cgroup, one per device in it, and shares of a core to keep where there is no group."""
        ...

    def hold(self, hold: Hold) -> None:
        """Ask for the devices; `look` tells what came of it."""
        ...

    def look(self, hold: Hold) -> Holding: ...

    def start(self, hold: Hold, attempt: Path) -> None:
        """`attempt/spec.json` is written: let a supervisor run it inside the hold."""
        ...

    def lives(self, hold: Hold, attempt: Path) -> bool | None:
        """Whether the supervisor of a begun attempt still runs; None when that cannot be told."""
        ...

    def release(self, hold: Hold) -> None:
        """Give the devices back; nothing runs in them any more."""
        ...

    def sweep(self) -> bool:
        """Clean up after what ended; returns whether nothing is left to clean."""
        ...


def torchrun(python: str, nodes: int, ranks_per_node: int, endpoint: str, enter: bool) -> list[str]:
    """The built-in trainer on `nodes` x `ranks_per_node`, rendezvous at `endpoint` (host:port).  `enter`: each rank is
    put into its device's cgroup first."""
    program = [python, "-m", "qipan.trainer"]
    if enter:
        program = [python, "-S", str(Path(__file__).with_name("enter.py")), *program]
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks_per_node}",
        "--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--no-python", *program,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, for readers in other processes."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # not written yet
    return value if isinstance(value, dict) else None
