"""Plain processes on this machine: a leaf engine whose devices are shares of cores (or the machine's own chips)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qipan.clock import Clock
from qipan.engines import devices as chips
from qipan.engines.launcher import Hold, Holding, free_port, read_json, torchrun
from qipan.engines.leaf import LeafEngine
from qipan.engines.visible import visible
from qipan.errors import InvalidInput
from qipan.hardware import BoardSpec, ChipClassId
from qipan.leases import EngineId
from qipan.probe.watch import Watch
from qipan.transfer import Stager


class LocalEngine(LeafEngine):
    """`quotas` False holds chips to their shares by a duty cycle even where cgroups could; None: by what is there."""

    def __init__(
        self,
        engine: EngineId,
        board: BoardSpec,
        folder: Path,
        clock: Clock,
        checkpoints: Path,
        quotas: bool | None = None,
        sick: Callable[[], Mapping[ChipClassId, Mapping[int, str]]] | None = None,
        stager: Stager | None = None,
    ) -> None:
        real = [pool.chip_class for pool in board.pools if not pool.cpu_share]
        watch = sick or (Watch(real).sick if real else dict)
        super().__init__(
            engine, board, folder, clock, checkpoints, Processes(board, quotas), sick=watch, stager=stager
        )


class Processes:
    """The launcher of this machine: one supervisor (shim) in a session of its own per attempt."""

    def __init__(self, board: BoardSpec, quotas: bool | None = None) -> None:
        self._pools = {pool.chip_class: pool for pool in board.pools}
        self._sandboxed = _sandbox_of(board)
        self._quotas = chips.quotas_available() if quotas is None else quotas
        self._shims: list[subprocess.Popen[bytes]] = []
        #: groups whose attempt ended; removed once their last process has left
        self._empty_groups: list[str] = []

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        in_use = {str(chips.ROOT / hold.name) for hold in holds}
        self._empty_groups = [group for group in chips.groups(prefix) if group not in in_use]

    def devices(self) -> Mapping[ChipClassId, int]:
        return {chip_class: pool.devices for chip_class, pool in self._pools.items()}

    def environment(self, hold: Hold) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("QIPAN_", "TORCHELASTIC"))
        }
        devices = ",".join(str(device) for device in hold.devices)
        return {
            **kept,
            **visible(self._pools[hold.need.chip_class], devices),
            "QIPAN_NUM_NODES": "1",
            "QIPAN_DEVICES": devices,
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def command(self, hold: Hold, run: str) -> list[str]:
        if run:
            return ["bash", "-c", run]
        return torchrun(sys.executable, 1, len(hold.devices), f"127.0.0.1:{free_port()}", enter=True)

    def groups(self, hold: Hold) -> tuple[str, list[str], list[float]]:
        share = self._pools[hold.need.chip_class].cpu_share
        shares = (share,) * len(hold.devices) if share else ()
        if shares and self._quotas:
            return *chips.make_group(hold.name, shares), []
        return "", [], list(shares)

    def hold(self, hold: Hold) -> None:
        """The engine's own count is all there is."""

    def look(self, hold: Hold) -> Holding:
        return Holding("held")

    def start(self, hold: Hold, attempt: Path) -> None:
        if self._sandboxed:
            sandbox(attempt)
        shim = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).with_name("shim.py")), str(attempt)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(attempt / "shim.err").open("w"),
            start_new_session=True,
        )  # fmt: skip
        self._shims.append(shim)

    def lives(self, hold: Hold, attempt: Path) -> bool:
        """Whether a supervisor of this attempt runs: its pid may have been given away, so its command is read."""
        mark, pid = str(attempt).encode(), read_json(attempt / "pid.json")
        found = (
            [f"/proc/{pid['shim']}/cmdline"]
            if pid
            else [str(at) for at in Path("/proc").glob("[0-9]*/cmdline")]
        )
        return any(mark in _read(path) for path in found)

    def release(self, hold: Hold) -> None:
        self._empty_groups.append(str(chips.ROOT / hold.name))

    def sweep(self) -> bool:
        """Supervisors that ended are reaped (a zombie keeps its group), then empty groups go."""
        self._shims = [shim for shim in self._shims if shim.poll() is None]
        self._empty_groups = [group for group in self._empty_groups if not chips.remove_group(group)]
        return not self._empty_groups


def _sandbox_of(board: BoardSpec) -> bool:
    """`engine_options: {sandbox: bubblewrap}`.  Raises InvalidInput."""
    kind = board.engine_options.get("sandbox", "none")
    if kind not in ("none", "bubblewrap"):
        raise InvalidInput(f"board {board.board}: no sandbox {kind[:40]!r}; there are bubblewrap and none")
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        raise InvalidInput(
            f"board {board.board}: sandbox bubblewrap needs the program bwrap (package bubblewrap); install it, or say none"
        )
    return kind == "bubblewrap"


def sandbox(attempt: Path) -> None:
    """The attempt's command runs in bubblewrap: the machine is read-only but for the attempt's folder, its checkpoints, its
    working folder and a /tmp of its own; what else the board keeps (keys, other tasks) is not there; no rights, no
    way to signal or see processes outside."""
    spec = json.loads((attempt / "spec.json").read_text())
    if spec["command"][0] == "bwrap":
        return
    env = spec["env"]
    store = next((above for above in attempt.parents if (above / "identity").is_dir()), attempt.parent)
    kept = [str(attempt), env["QIPAN_CHECKPOINT_DIR"], spec["cwd"], spec["group"]]
    command = [
        "bwrap",
        "--ro-bind",
        "/",
        "/",
        "--dev-bind",
        "/dev",
        "/dev",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        str(store),
    ]
    for path in [path for path in kept if path and path != "/"]:
        command += ["--bind", path, path]
    command += [
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-uts",
        "--cap-drop",
        "ALL",
        "--new-session",
        "--die-with-parent",
    ]
    if not spec["shares"]:  # a duty cycle is kept from outside by the ranks' own process numbers
        command += ["--unshare-pid", "--proc", "/proc"]
    spec["command"] = [*command, "--", *spec["command"]]
    (attempt / "spec.json").write_text(json.dumps(spec))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # it ended while we looked
