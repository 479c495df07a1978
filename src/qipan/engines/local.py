"""Plain processes on this machine: a leaf engine whose devices are shares of cores (or the machine's own chips)."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qipan.clock import Clock
from qipan.engines import alive, sandbox
from qipan.engines import devices as chips
from qipan.engines.attempts import BUSY_EVERY_S
from qipan.engines.launcher import (
    Folders,
    Hold,
    Holding,
    begun,
    free_port,
    rank_program,
    supervisor,
    torchrun,
)
from qipan.engines.leaf import LeafEngine
from qipan.engines.visible import visible
from qipan.hardware import BoardSpec, ChipClassId
from qipan.leases import EngineId, Out
from qipan.probe.busy import BusyDevices
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
        busy_every_s: float = BUSY_EVERY_S,
    ) -> None:
        real = [pool.chip_class for pool in board.pools if not pool.cpu_share]
        watch = sick or (Watch(real).sick if real else dict)
        super().__init__(
            engine, board, folder, clock, checkpoints, Processes(board, quotas), sick=watch, stager=stager,
            busy_every_s=busy_every_s,
        )  # fmt: skip


class Processes:
    """The launcher of this machine: one supervisor (shim) in a session of its own per attempt."""

    picks = False

    def __init__(self, board: BoardSpec, quotas: bool | None = None) -> None:
        self._pools = {pool.chip_class: pool for pool in board.pools}
        self._sandboxed = sandbox.wanted(board)
        self.in_place = not self._sandboxed  # a sandbox is closed once it runs
        self._quotas = chips.quotas_available() if quotas is None else quotas
        self._busy = BusyDevices()
        self._shims: list[subprocess.Popen[bytes]] = []
        #: groups whose attempt ended; removed once their last process has left
        self._empty_groups: list[str] = []

    def adopt(self, prefix: str, holds: Sequence[Hold]) -> None:
        in_use = {str(chips.ROOT / hold.name) for hold in holds}
        self._empty_groups = [group for group in chips.groups(prefix) if group not in in_use]

    def devices(self) -> Mapping[ChipClassId, int]:
        return {chip_class: pool.devices for chip_class, pool in self._pools.items()}

    def draining(self, hold: Hold) -> str:
        return ""

    def out(self) -> tuple[Out, ...]:
        return ()

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

    def rank(self, hold: Hold) -> list[str] | None:
        return rank_program(sys.executable) if self.in_place else None

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

    def start(self, hold: Hold, attempt: Folders) -> None:
        if self._sandboxed:
            sandbox.enclose(attempt)
        shim = subprocess.Popen(
            supervisor(sys.executable, str(attempt.control)),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(attempt.control / "shim.err").open("w"),
            start_new_session=True,
        )  # fmt: skip
        self._shims.append(shim)

    def beside(self) -> None:
        """It is the same machine."""

    def lives(self, hold: Hold, attempt: Folders) -> bool:
        return self._supervisor(attempt) > 0

    def left(self, hold: Hold, attempt: Folders) -> list[int]:
        return alive.left_of(attempt.task, self._supervisor(attempt))

    def end(self, hold: Hold, attempt: Folders) -> None:
        alive.end(attempt.task, self._supervisor(attempt))

    def _supervisor(self, attempt: Folders) -> int:
        """Its pid, 0 when it is gone: the pid may have been given away, so its command is read."""
        mark, known = str(attempt.control).encode(), begun(attempt)
        found = [known.shim] if known else [int(at) for at in os.listdir("/proc") if at.isdigit()]
        return next((at for at in found if mark in _read(f"/proc/{at}/cmdline").split(b"\0")), 0)

    def busy_s(self, hold: Hold, attempt: Folders) -> float | None:
        """Of shares of cores the processor time of the attempt's processes, in devices; of chips what their tool says."""
        pool, known = self._pools[hold.need.chip_class], begun(attempt)
        if pool.cpu_share and known is not None:
            return chips.cpu_s_below(known.shim) / pool.cpu_share
        if hold.need.chip_class.startswith("nvidia/"):
            return self._busy.busy_s(hold.devices)
        return None

    def release(self, hold: Hold) -> None:
        self._empty_groups.append(str(chips.ROOT / hold.name))

    def sweep(self) -> bool:
        """Supervisors that ended are reaped (a zombie keeps its group), then empty groups go."""
        self._shims = [shim for shim in self._shims if shim.poll() is None]
        self._empty_groups = [group for group in self._empty_groups if not chips.remove_group(group)]
        return not self._empty_groups


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # it ended while we looked
