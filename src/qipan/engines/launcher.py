"""What a leaf engine stands on: plain processes, or another tool's own queue.  A `Launcher` gets devices, starts
supervisors (shims) in them, and tells whether they live; with it come the files that both sides read."""

import hashlib
import json
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from qipan.clock import Clock
from qipan.curves import Need
from qipan.engines import plain
from qipan.hardware import ChipClassId
from qipan.leases import Out, TaskId


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
class Folders:
    """Of one attempt.  `task`: where it works, and says how far it is; what lies there is the task's word.  `control`: between the
    engine and its supervisor (how it began and ended, its lease, its stop, its log); no sandbox shows it, so what lies there is not."""

    task: Path
    control: Path


def folders_of(engine: Path, attempt: str) -> Folders:
    """In an engine's folder.  One that was begun before there were two has one folder for both."""
    task, control = engine / "attempts" / attempt, engine / "control" / attempt
    return Folders(task, control if control.is_dir() else task)


@dataclass(frozen=True, slots=True)
class Holding:
    """What became of a hold: it waits (for what), holds its devices, or is gone (why)."""

    state: Literal["waiting", "held", "gone"]
    why: str = ""


class Launcher(Protocol):
    """What a leaf engine stands on.  Every method may be called twice.  `picks`: it gives devices as it likes, so the engine does not know
    which of them lie near each other; `in_place`: a rank can join an attempt whose other ranks run (`rank`)."""

    picks: bool
    in_place: bool

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        """After a start: `holds` are in use; others whose names begin with `prefix` are left from an earlier run."""
        ...

    def devices(self) -> Mapping[ChipClassId, int] | None:
        """How many devices tasks may use now, those in use included; None: what is below has not answered yet."""
        ...

    def draining(self, hold: Hold) -> str:
        """Why the node that the hold's devices are on is to go; empty: it stays."""
        ...

    def out(self) -> tuple[Out, ...]:
        """What there is and cannot be used, since its node is to go."""
        ...

    def environment(self, hold: Hold) -> dict[str, str]:
        """What a task's environment starts from: QIPAN_NUM_NODES, QIPAN_DEVICES, MASTER_ADDR at least."""
        ...

    def command(self, hold: Hold, run: str) -> list[str]:
        """What the supervisor starts inside the hold: the own script `run`, or the built-in trainer when it is empty."""
        ...

    def rank(self, hold: Hold) -> list[str] | None:
        """One rank of the built-in trainer, to join an attempt whose other ranks run; None where that cannot be."""
        ...

    def groups(self, hold: Hold) -> tuple[str, list[str], list[float]]:
        """The attempt's cgroup, one per device in it, and shares of a core to keep where there is no group."""
        ...

    def hold(self, hold: Hold) -> None:
        """Ask for the devices; `look` tells what came of it."""
        ...

    def look(self, hold: Hold) -> Holding: ...

    def start(self, hold: Hold, attempt: Folders) -> None:
        """The spec in `attempt.control` is written: let a supervisor run it inside the hold.  Raises InvalidInput where it must not run."""
        ...

    def beside(self) -> None:
        """Raises InvalidInput where a person's command cannot run beside an attempt."""
        ...

    def lives(self, hold: Hold, attempt: Folders) -> bool | None:
        """Whether the supervisor of a begun attempt still runs; None when that cannot be told."""
        ...

    def left(self, hold: Hold, attempt: Folders) -> list[int] | None:
        """Processes of a begun attempt that live, without its supervisor; None where they cannot be seen from here."""
        ...

    def end(self, hold: Hold, attempt: Folders) -> None:
        """Kill them and their supervisor, where `left` can see them."""
        ...

    def busy_s(self, hold: Hold, attempt: Folders) -> float | None:
        """Device-seconds that the devices of a begun attempt have worked, counted from any moment; None where nothing tells."""
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
    program = rank_program(python) if enter else [python, "-m", "qipan.trainer"]
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks_per_node}",
        "--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--no-python", *program,
    ]  # fmt: skip


def rank_program(python: str) -> list[str]:
    """One rank that enters its device's cgroup first."""
    return [python, "-S", str(Path(__file__).with_name("enter.py")), python, "-m", "qipan.trainer"]


HERE = Path(__file__).parent
#: of the supervisor; they need the standard library alone
MODULES = ("shim.py", "throttle.py", "processes.py", "plain.py")
#: the package by its folder, without what it imports; its modules are compiled once, where a script is at each start
START = (
    "import sys; engines = sys.modules['qipan.engines'] = type(sys)('qipan.engines'); "
    "engines.__path__ = [sys.argv.pop(1)]; from qipan.engines.{program} import main; main()"
)


def supervisor(python: str, *arguments: str, program: str = "shim", folder: Path = HERE) -> list[str]:
    """The shim, or one like it, from the modules in `folder`, with nothing of the place where it starts."""
    return [python, "-I", "-S", "-c", START.format(program=program), str(folder), *arguments]


def installed(folder: Path, *more: str) -> Path:
    """Where in `folder`, which nodes without this package reach, the supervisor's modules and `more` lie: a place for each version,
    there whole or not at all."""
    files = {name: (HERE / name).read_bytes() for name in (*MODULES, *more)}
    version = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    place = folder / f"supervisor-{version}"
    if not place.exists():
        part = Path(tempfile.mkdtemp(dir=folder))
        for name, content in files.items():
            (part / name).write_bytes(content)
        part.chmod(0o755)  # other users run pods
        try:
            part.rename(place)
        except OSError:
            if not place.exists():
                raise
            shutil.rmtree(part)  # another board was faster
    return place


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, for readers in other processes."""
    part = path.with_suffix(".part")
    plain.write_text(part, text)
    part.rename(path)


Unix = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
FILE_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Begun:
    """`pid.json` of an attempt: what its supervisor began, and when (Unix); `lease_s` is the same moment on the lease clock of
    `boot_id`, None by a supervisor of an earlier release."""

    pid: Pid
    shim: Pid
    started_s: Unix
    lease_s: Unix | None = None
    boot_id: str = ""

    def now_s(self, clock: Clock) -> float:
        """Unix seconds as the supervisor counts them: its wall clock when it began, and what has passed since.  The board's own may be
        minutes away, once a wall clock has jumped, and a bill never mixes two.  On another machine there is only the board's."""
        if self.lease_s is None or self.boot_id != clock.boot_id():
            return clock.now_s()
        return self.started_s + clock.lease_s() - self.lease_s


@dataclass(frozen=True, slots=True)
class Ended:
    """`exit.json` of an attempt, as its supervisor says it; "machine": nobody could."""

    code: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)] | None
    started_s: Unix
    ended_s: Unix
    ended_by: str


def begun(attempt: Folders) -> Begun | None:
    return _read(attempt.control / "pid.json", Begun)


def ended(attempt: Folders) -> Ended | None:
    return _read(attempt.control / "exit.json", Ended)


One = TypeVar("One", Begun, Ended)


def _read(path: Path, kind: type[One]) -> One | None:
    """None: not written yet, or not by the supervisor: a task without a sandbox can write there too."""
    try:
        return msgspec.json.decode(plain.read_text(path, FILE_BYTES_MAX), type=kind)
    except (OSError, ValueError, RecursionError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(plain.read_text(path))
    except (OSError, ValueError):
        return None  # not written yet
    return value if isinstance(value, dict) else None
