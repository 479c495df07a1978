"""A Slurm cluster below a board, by its own commands.  The cluster's queue keeps its rights: Qipan uses at most `share`
of a chip class, and gives back what the site's own jobs run on or wait for."""

import math
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qipan.curves import Need
from qipan.engines.launcher import Hold, free_port, torchrun
from qipan.engines.queue import Job, View, options_of, python_path, share_of
from qipan.engines.visible import visible
from qipan.errors import QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import TaskId

LIMIT_S = 20.0
STATES = {
    "PENDING": "waiting", "CONFIGURING": "waiting", "REQUEUED": "waiting", "SUSPENDED": "waiting", "RUNNING": "running",
    "COMPLETING": "running", "STAGE_OUT": "running", "SIGNALING": "running", "STOPPED": "running",
    "NODE_FAIL": "lost", "BOOT_FAIL": "lost",
}  # fmt: skip
OPTIONS = ("partition", "account", "qos", "conf", "python", "interface", "time", "memory_per_device")
FIELDS = ("Name:.120", "JobID:.20", "State:.20", "NumNodes:.12", "NumCPUs:.12", "tres-per-node:.80", "tres-per-job:.80", "Reason:.80")  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """`engine_options` of a site file.  `share`: of each chip class, the part that Qipan may use.  `conf`: the
    cluster's slurm.conf (SLURM_CONF) where it is not the machine's own.  `interface`: gloo's network interface."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    share: float = 1.0
    conf: str = ""
    python: str = sys.executable
    interface: str = ""
    time: str = ""
    memory_per_device: str = ""

    @staticmethod
    def of(board: BoardSpec) -> "SlurmOptions":
        return SlurmOptions(share=share_of(board), **options_of(board, OPTIONS))


class Slurm:
    """`Queue` over sbatch, squeue, scancel and sinfo."""

    def __init__(self, board: BoardSpec) -> None:
        self._options = SlurmOptions.of(board)
        self._pools = {pool.chip_class: pool for pool in board.pools}

    def submit(self, hold: Hold) -> str:
        shim = Path(__file__).with_name("shim.py")
        program = shlex.join([self._options.python, "-S", str(shim), "--hold", str(hold.folder)])
        done = self._run(
            "sbatch", "--parsable", f"--job-name={hold.name}", f"--comment=qipan {hold.task_id}",
            *self.shape(hold), "--signal=B:TERM@60", "--no-requeue", f"--output={hold.folder}/slurm.log",
            "--export=ALL", f"--wrap=exec {program}",
        )  # fmt: skip
        return done.strip().split(";")[0]

    def shape(self, hold: Hold) -> list[str]:
        """The arguments that ask for a hold's devices."""
        options, pool = self._options, self._pools[hold.need.chip_class]
        nodes = nodes_for(hold.need.devices, pool.devices_per_node)
        each = hold.need.devices // nodes
        asked = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        kind = resource_of(pool)
        asked += (
            [f"--cpus-per-task={each}"] if kind == "cpu" else [f"--gres={kind}:{each}", "--cpus-per-task=1"]
        )
        if options.memory_per_device:
            number, unit = re.fullmatch(r"([0-9]+)([KMGT]?)", options.memory_per_device).groups()  # type: ignore[union-attr]
            asked.append(f"--mem={int(number) * each}{unit}")
        named = (
            ("partition", options.partition),
            ("account", options.account),
            ("qos", options.qos),
            ("time", options.time),
        )
        return asked + [f"--{name}={value}" for name, value in named if value]

    def cancel(self, job_id: str) -> None:
        self._run("scancel", job_id)

    def look(self, prefix: str) -> View:
        jobs: dict[str, Job] = {}
        taken: dict[ChipClassId, int] = defaultdict(int)  # by the site's own jobs, those that wait included
        for line in self._run(
            "squeue", "--noheader", "--states=all", "--Format", ",".join(FIELDS)
        ).splitlines():
            columns, at = [], 0
            for field in FIELDS:
                width = int(field.split(".")[1])
                columns.append(line[at : at + width].strip())
                at += width
            name, job_id, state, nodes, cpus, per_node, per_job, reason = columns
            if name.startswith(prefix):
                jobs[name] = Job(job_id, STATES.get(state, "ended"), _why(state, reason))  # type: ignore[arg-type]
                continue
            if STATES.get(state) == "running" or (
                state == "PENDING" and reason in ("Resources", "Priority", "None")
            ):
                for chip_class, pool in self._pools.items():
                    taken[chip_class] += devices_of(pool, int(nodes), int(cpus), per_node, per_job)
        return View(jobs, self._usable(taken))

    def _usable(self, taken: Mapping[ChipClassId, int]) -> dict[ChipClassId, int]:
        where = [f"--partition={self._options.partition}"] if self._options.partition else []
        there: dict[ChipClassId, int] = defaultdict(int)
        seen = set()
        for line in self._run("sinfo", "--noheader", "-N", *where, "-o", "%N|%T|%G|%c").splitlines():
            node, state, gres, cpus = line.split("|")
            if node in seen or state.rstrip("*$~#!%@^-+").split("-")[0] not in (
                "idle",
                "mixed",
                "allocated",
                "completing",
            ):
                continue
            if state.endswith("*"):
                continue  # it does not answer
            seen.add(node)
            for chip_class, pool in self._pools.items():
                kind = resource_of(pool)
                there[chip_class] += int(cpus) if kind == "cpu" else gres_count(gres, kind)
        return {
            chip_class: max(0, min(math.floor(there[chip_class] * self._options.share), there[chip_class] - taken[chip_class]))
            for chip_class in self._pools
        }  # fmt: skip

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]:
        pool = self._pools[hold.need.chip_class]
        nodes = nodes_for(hold.need.devices, pool.devices_per_node)
        each = hold.need.devices // nodes
        host = "127.0.0.1" if nodes == 1 else str(granted.get("host", ""))
        spread = [
            "srun",
            "--kill-on-bad-exit=1",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
        ]
        if run:
            once = ["bash", "-c", f"export QIPAN_NODE_RANK=${{SLURM_NODEID:-0}}; {run}"]
            return once if nodes == 1 else [*spread, *once]
        program = torchrun(self._options.python, nodes, each, f"{host}:{free_port()}", enter=False)
        return program if nodes == 1 else [*spread, *program]

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]:
        pool = self._pools[hold.need.chip_class]
        nodes = nodes_for(hold.need.devices, pool.devices_per_node)
        interface = self._options.interface or ("lo" if nodes == 1 else "")
        return {
            **python_path(),
            **(visible(pool, str(granted.get("devices", "")), granted.get("given")) if nodes == 1 else {}),
            "QIPAN_NUM_NODES": str(nodes),
            "QIPAN_DEVICES": str(granted.get("devices", "")),
            "MASTER_ADDR": "127.0.0.1" if nodes == 1 else str(granted.get("host", "")),
            "GLOO_SOCKET_IFNAME": interface,
        }

    def inside(self, pool: Pool, devices: int, command: list[str]) -> list[str]:
        """A local command that runs `command` on `devices` of the pool's, and waits for it."""
        hold = Hold("qipan-probe", Path(), TaskId("probe"), "", Need(pool.chip_class, devices), ())
        return [*self._prefix(), "srun", "--job-name=qipan-probe", *self.shape(hold), *command]

    def _prefix(self) -> list[str]:
        return ["env", f"SLURM_CONF={self._options.conf}"] if self._options.conf else []

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                [*self._prefix(), *command], capture_output=True, text=True, timeout=LIMIT_S, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            raise QipanError(
                f"{command[0]} is not on this machine; install Slurm's client, or take the board off the site file"
            ) from None
        except subprocess.TimeoutExpired:
            raise QipanError(f"{command[0]} gave no answer in {LIMIT_S:g} s; is slurmctld up?") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[:400]
            raise QipanError(
                f"{command[0]} failed ({done.returncode}): {said}; try it by hand with the same arguments"
            )
        return done.stdout


def resource_of(pool: Pool) -> str:
    """What Slurm calls the pool's devices: a GRES type such as `gpu:h100`, or `cpu`."""
    return pool.resource or "gpu"


def nodes_for(devices: int, per_node: int) -> int:
    """The fewest nodes on which `devices` lie evenly."""
    return next(
        nodes for nodes in range(max(1, math.ceil(devices / max(1, per_node))), devices + 1) if devices % nodes == 0
    )  # fmt: skip


def gres_count(gres: str, kind: str) -> int:
    """Devices of a kind in `gpu:h100:4(S:0-1),fpga:2` (what a node has) or `gres:gpu:h100:2` (what a job asks): an
    untyped request counts as of any type."""
    total = 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = [word for word in part.strip().split(":") if word and word != "gres"]
        if not words or words[0] in ("N/A", "null"):
            continue
        number = int(words[-1]) if words[-1].isdigit() else 1
        named = words[:-1] if words[-1].isdigit() else words
        wanted = kind.split(":")
        if named == wanted[: len(named)] or wanted == named[: len(wanted)]:
            total += number
    return total


def devices_of(pool: Pool, nodes: int, cpus: int, per_node: str, per_job: str) -> int:
    """Devices of the pool that a job of the site's own uses or asks for."""
    kind = resource_of(pool)
    if kind == "cpu":
        return cpus
    return gres_count(per_node, kind) * max(1, nodes) + gres_count(per_job, kind)


def _why(state: str, reason: str) -> str:
    if state == "PENDING":
        return f"Slurm's queue: {reason}"
    return f"its Slurm job is {state}" if state not in ("RUNNING", "COMPLETING") else ""
