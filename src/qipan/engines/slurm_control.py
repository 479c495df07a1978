"""The ways to a Slurm cluster's control, slurmctld: what a board asks of it, and its own commands; slurmrestd is in
`slurm_rest.py`."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from qipan.errors import QipanError

LIMIT_S = 20.0
#: states of a node; "planned": one that a waiting job is to have, idle until the rest of what that asks for is free
WORKS = ("idle", "mixed", "allocated", "completing", "planned")
FIELDS = ("Name:.120", "JobID:.20", "State:.20", "NumNodes:.12", "NumCPUs:.12", "tres-per-node:.80", "tres-per-job:.80", "NodeList:.200", "Reason:.80")  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job of anybody's.  `per_node`, `per_job`: the GRES that it asks for.  `restarts`: how often Slurm took its nodes for lost, or
    its owner asked for it anew."""

    name: str
    job_id: str
    state: str
    nodes: int
    cpus: int
    per_node: str
    per_job: str
    listed: str
    reason: str
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node that answers and on which jobs can start, or that the site takes away (`drains`)."""

    name: str
    drains: bool
    gres: str
    cpus: int
    reason: str


class Control(Protocol):
    """A way to slurmctld.  Every call may take seconds and raise QipanError."""

    def submit(self, name: str, comment: str, shape: Mapping[str, str], program: str, log: str) -> str:
        """A job that runs `program` (shell words), once; returns its id.  `shape`: sbatch's long options -> values."""
        ...

    def cancel(self, job_id: str) -> None: ...

    def jobs(self) -> list[JobRow]: ...

    def nodes(self, partition: str) -> list[NodeRow]:
        """Each once; all of the cluster's where no partition is named."""
        ...


class Commands:
    """`Control` by sbatch, squeue, scancel and sinfo."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def submit(self, name: str, comment: str, shape: Mapping[str, str], program: str, log: str) -> str:
        done = self._run(
            "sbatch", "--parsable", f"--job-name={name}", f"--comment={comment}", *written(shape),
            "--signal=B:TERM@60", "--no-requeue", f"--output={log}", "--export=ALL", f"--wrap=exec {program}",
        )  # fmt: skip
        return done.decode().strip().split(";")[0]

    def cancel(self, job_id: str) -> None:
        self._run("scancel", job_id)

    def jobs(self) -> list[JobRow]:
        rows = []
        for line in self._run(
            "squeue", "--noheader", "--states=all", "--Format", ",".join(FIELDS)
        ).splitlines():
            columns, at = [], 0
            for field in FIELDS:
                width = int(field.split(".")[1])  # bytes: a name may be cut amid a letter
                columns.append(line[at : at + width].decode(errors="replace").strip())
                at += width
            name, job_id, state, nodes, cpus, per_node, per_job, listed, reason = columns
            rows.append(JobRow(name, job_id, state, int(nodes), int(cpus), per_node, per_job, listed, reason))
        return rows

    def nodes(self, partition: str) -> list[NodeRow]:
        where = [f"--partition={partition}"] if partition else []
        rows: dict[str, NodeRow] = {}  # a node is listed once a partition
        for line in (
            self._run("sinfo", "--noheader", "-N", *where, "-o", "%N|%T|%G|%c|%E")
            .decode(errors="replace")
            .splitlines()
        ):
            node, state, gres, cpus, reason = line.split("|", 4)
            plain = state.rstrip("*$~#!%@^-+").split("-")[0]
            drains = plain in ("draining", "drained")
            if state.endswith("*") or not (drains or plain in WORKS):
                continue  # it does not answer, or is down
            rows.setdefault(node, NodeRow(node, drains, gres, int(cpus), reason.strip()))
        return list(rows.values())

    def _run(self, *command: str) -> bytes:
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL,
                env=self._environment,
            )  # fmt: skip
        except FileNotFoundError:
            raise QipanError(
                f"{command[0]} is not on this machine; install Slurm's client, or take the board off the site file"
            ) from None
        except subprocess.TimeoutExpired:
            raise QipanError(f"{command[0]} gave no answer in {LIMIT_S:g} s; is slurmctld up?") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()[:400]
            raise QipanError(
                f"{command[0]} failed ({done.returncode}): {said}; try it by hand with the same arguments"
            )
        return done.stdout


def amount_of(memory: str) -> tuple[int, str]:
    """Of sbatch's `--mem`: number, unit."""
    number, unit = re.fullmatch(r"([0-9]+)([KMGT]?)", memory).groups()  # type: ignore[union-attr]
    return int(number), unit


def written(options: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
