"""A Slurm cluster below a board, by its own commands or by slurmrestd (`slurm_rest.py`).  The cluster's queue keeps its rights:
Qipan uses at most `share` of a chip class, and gives back what the site's own jobs run on or wait for."""

import math
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qipan.curves import Need
from qipan.engines.launcher import Hold, supervisor
from qipan.engines.queue import (
    Job,
    View,
    gang_command,
    gang_environment,
    nodes_of,
    options_of,
    python_path,
    share_of,
)
from qipan.engines.slurm_control import Commands, Control, JobRow, amount_of, written
from qipan.engines.slurm_rest import SlurmRest
from qipan.engines.visible import visible
from qipan.errors import InvalidInput
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import Out, TaskId

STATES = {
    "PENDING": "waiting", "CONFIGURING": "waiting", "REQUEUED": "waiting", "SUSPENDED": "waiting", "RUNNING": "running",
    "COMPLETING": "running", "STAGE_OUT": "running", "SIGNALING": "running", "STOPPED": "running",
    "NODE_FAIL": "lost", "BOOT_FAIL": "lost",
}  # fmt: skip
OPTIONS = (
    "partition", "account", "qos", "conf", "python", "interface", "time", "memory_per_device", "rest", "token_file",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """`engine_options` of a site file.  `share`: of each chip class, the part that Qipan may use.  `conf`: the
    cluster's slurm.conf (SLURM_CONF) where it is not the machine's own.  `interface`: gloo's network interface.  `rest`: slurmrestd's
    address, asked in place of commands; `token_file`: the JSON web token for it, read anew each time."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    share: float = 1.0
    conf: str = ""
    python: str = sys.executable
    interface: str = ""
    time: str = ""
    memory_per_device: str = ""
    rest: str = ""
    token_file: str = ""

    @staticmethod
    def of(board: BoardSpec) -> "SlurmOptions":
        options = SlurmOptions(share=share_of(board), **options_of(board, OPTIONS))
        if bool(options.rest) != bool(options.token_file):
            raise InvalidInput(
                f"board {board.board}: engine_options needs `rest` and `token_file`, both or none"
            )
        return options


class Slurm:
    """`Queue` over a cluster."""

    def __init__(self, board: BoardSpec) -> None:
        self._options = SlurmOptions.of(board)
        self._pools = {pool.chip_class: pool for pool in board.pools}
        conf = {"SLURM_CONF": self._options.conf} if self._options.conf else {}
        environment = {**os.environ, **conf}
        self._control: Control = (
            SlurmRest(self._options.rest, Path(self._options.token_file), environment)
            if self._options.rest
            else Commands(environment)
        )

    def submit(self, hold: Hold) -> str:
        program = shlex.join(supervisor(self._options.python, "--hold", str(hold.folder)))
        return self._control.submit(
            hold.name, f"qipan {hold.task_id}", self.shape(hold), program, f"{hold.folder}/slurm.log"
        )

    def shape(self, hold: Hold) -> dict[str, str]:
        """What asks for a hold's devices: sbatch's long options -> values."""
        options, pool = self._options, self._pools[hold.need.chip_class]
        nodes = nodes_of(hold.need, pool)
        each = hold.need.devices // nodes
        kind = resource_of(pool)
        asked = {"nodes": str(nodes), "ntasks": str(nodes), "ntasks-per-node": "1"}
        asked |= (
            {"cpus-per-task": str(each)}
            if kind == "cpu"
            else {"gres": f"{kind}:{each}", "cpus-per-task": "1"}
        )
        if options.memory_per_device:
            number, unit = amount_of(options.memory_per_device)
            asked["mem"] = f"{number * each}{unit}"
        named = {
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "time": options.time,
        }
        return asked | {name: value for name, value in named.items() if value}

    def cancel(self, job_id: str) -> None:
        self._control.cancel(job_id)

    def look(self, prefix: str) -> View:
        jobs: dict[str, Job] = {}
        where: dict[str, set[str]] = {}  # our job -> its nodes
        taken: dict[ChipClassId, int] = defaultdict(int)  # by the site's own jobs, those that wait included
        for row in self._control.jobs():
            if row.name.startswith(prefix):
                jobs[row.name] = _job(row)
                where[row.name] = names_of(row.listed)
                continue
            if STATES.get(row.state) == "running" or (
                row.state == "PENDING" and row.reason in ("Resources", "Priority", "None")
            ):
                for chip_class, pool in self._pools.items():
                    taken[chip_class] += devices_of(pool, row)
        usable, leaving, out = self._nodes(taken)
        draining = {
            name: "; ".join(leaving[node] for node in sorted(on & set(leaving)))
            for name, on in where.items()
            if on & set(leaving) and jobs[name].state in ("waiting", "running")
        }
        return View(jobs, usable, draining, out)

    def _nodes(
        self, taken: Mapping[ChipClassId, int]
    ) -> tuple[dict[ChipClassId, int], dict[str, str], tuple[Out, ...]]:
        """Devices that can be used, the nodes that the site drains (with its reason), and their devices."""
        there: dict[ChipClassId, int] = defaultdict(int)
        leaving, out = dict[str, str](), list[Out]()
        for node in self._control.nodes(self._options.partition):
            if node.drains:
                leaving[node.name] = f"Slurm drains {node.name} ({node.reason})"
            for chip_class, pool in self._pools.items():
                kind = resource_of(pool)
                count = node.cpus if kind == "cpu" else gres_count(node.gres, kind)
                if not node.drains:
                    there[chip_class] += count
                elif count:
                    out.append(Out(chip_class, count, leaving[node.name]))
        usable = {
            chip_class: max(0, min(math.floor(there[chip_class] * self._options.share), there[chip_class] - taken[chip_class]))
            for chip_class in self._pools
        }  # fmt: skip
        return usable, leaving, tuple(out)

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]:
        pool = self._pools[hold.need.chip_class]
        nodes = nodes_of(hold.need, pool)
        rank = "${SLURM_NODEID:-0}"
        ranked = f"export QIPAN_NODE_RANK={rank}; {run}" if run else ""
        program = gang_command(self._options.python, hold, pool, ranked, granted, rank)
        if nodes == 1:
            return program
        spread = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        return ["srun", "--kill-on-bad-exit=1", *spread, *program]

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]:
        pool = self._pools[hold.need.chip_class]
        nodes = nodes_of(hold.need, pool)
        own = visible(pool, str(granted.get("devices", "")), granted.get("given")) if nodes == 1 else {}
        there = {"QIPAN_NODE_ADDRESSES": ",".join(sorted(names_of(str(granted.get("nodes", "")))))}
        return python_path() | own | gang_environment(granted, nodes, self._options.interface) | there

    def inside(self, pool: Pool, devices: int, command: list[str]) -> list[str]:
        """A local command that runs `command` on `devices` of the pool's, and waits for it."""
        hold = Hold("qipan-probe", Path(), TaskId("probe"), "", Need(pool.chip_class, devices), ())
        conf = ["env", f"SLURM_CONF={self._options.conf}"] if self._options.conf else []
        return [*conf, "srun", "--job-name=qipan-probe", *written(self.shape(hold)), *command]


def resource_of(pool: Pool) -> str:
    """What Slurm calls the pool's devices: a GRES type such as `gpu:h100`, or `cpu`."""
    return pool.resource or "gpu"


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


def names_of(listed: str) -> set[str]:
    """The nodes of a list such as `c0n[0-2,7],login1` (hostlist(3) with one bracket a name)."""
    names = set()
    for part in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,]*)?", listed):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            names.add(part)
            continue
        for span in match[2].split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.add(f"{match[1]}{number:0{len(first)}d}{match[3]}")
    return names


def devices_of(pool: Pool, job: JobRow) -> int:
    """Devices of the pool that a job of the site's own uses or asks for."""
    kind = resource_of(pool)
    if kind == "cpu":
        return job.cpus
    return gres_count(job.per_node, kind) * max(1, job.nodes) + gres_count(job.per_job, kind)


def _job(row: JobRow) -> Job:
    """One of ours.  What a requeued one ran before may be alive, on a node that Slurm took for lost, whatever it is about now."""
    if row.restarts:
        return Job(row.job_id, "lost", "its Slurm job was requeued")
    return Job(row.job_id, STATES.get(row.state, "ended"), _why(row.state, row.reason))  # type: ignore[arg-type]


def _why(state: str, reason: str) -> str:
    if state == "PENDING":
        return f"Slurm's queue: {reason}"
    return f"its Slurm job is {state}" if state not in ("RUNNING", "COMPLETING") else ""
