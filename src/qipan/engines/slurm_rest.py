"""slurmrestd as the way to a Slurm cluster's control: openapi v0.0.38 (Slurm 22.05 and later ones that still serve it), with a
JSON web token of auth/jwt (`scontrol token`).  What its `signal` and `requeue` do not do, the job's script does or is said in
docs/engines.md."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from qipan.engines.slurm_control import LIMIT_S, WORKS, JobRow, NodeRow, amount_of
from qipan.errors import QipanError

API = "/slurm/v0.0.38"
MIB = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1 << 20}
#: sbatch's long options -> the API's names
NAMES = {
    "nodes": "nodes", "ntasks": "tasks", "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "gres": "gres",
    "mem": "memory_per_node", "partition": "partition", "account": "account", "qos": "qos", "time": "time_limit",
}  # fmt: skip
NUMBERS = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task")
#: flags of a node on which no job of ours can start
AWAY = {"NOT_RESPONDING", "FAIL", "RESERVED", "MAINTENANCE", "REBOOT_ISSUED", "POWERING_DOWN"}
#: a job is requeued whatever `requeue` says (22.05), and what ran once must not run again
ONCE = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0'


class SlurmRest:
    """`Control` over HTTP."""

    def __init__(self, address: str, token_file: Path, environment: Mapping[str, str]) -> None:
        self._address, self._token_file, self._environment = address.rstrip("/"), token_file, environment
        self._client = httpx.Client(base_url=self._address + API, timeout=LIMIT_S)

    def submit(self, name: str, comment: str, shape: Mapping[str, str], program: str, log: str) -> str:
        job = properties(shape) | {
            "name": name, "comment": comment, "standard_output": log, "current_working_directory": str(Path(log).parent),
            "environment": dict(self._environment),
        }  # fmt: skip
        script = f"#!/bin/sh\n{ONCE}\nexec {program}\n"
        return str(self._ask("POST", "/job/submit", {"script": script, "job": job})["job_id"])

    def cancel(self, job_id: str) -> None:
        self._ask("DELETE", f"/job/{job_id}")

    def jobs(self) -> list[JobRow]:
        return [
            JobRow(
                job["name"], str(job["job_id"]), job["job_state"], job["node_count"], job["cpus"], job["tres_per_node"] or "",
                job["tres_per_job"] or "", job["nodes"], job["state_reason"], job["restart_cnt"],
            )
            for job in self._ask("GET", "/jobs")["jobs"]
        ]  # fmt: skip

    def nodes(self, partition: str) -> list[NodeRow]:
        return [
            NodeRow(node["name"], "DRAIN" in node["state_flags"], node["gres"], node["cpus"], node["reason"])
            for node in self._ask("GET", "/nodes")["nodes"]
            if (not partition or partition in node["partitions"])
            and not AWAY & set(node["state_flags"])
            and (node["state"] in WORKS or "DRAIN" in node["state_flags"])
        ]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        try:
            token = self._token_file.read_text().strip()
        except OSError as error:
            raise QipanError(
                f"slurmrestd's token {self._token_file} cannot be read: {error.strerror}"
            ) from None
        headers = {"X-SLURM-USER-TOKEN": token, "X-SLURM-USER-NAME": user_of(token)}
        try:
            answer = self._client.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise QipanError(f"slurmrestd {self._address} does not answer ({error}); is it up?") from None
        try:
            said = answer.json()
        except ValueError:
            raise QipanError(
                f"slurmrestd answered {answer.status_code} to {method} {path}: {answer.text[:200]}; is the token in"
                f" {self._token_file} still good (`scontrol token`)?"
            ) from None
        if answer.status_code != 200 or said.get("errors"):
            why = "; ".join(
                str(one.get("description") or one.get("error")) for one in said.get("errors") or []
            )
            raise QipanError(f"slurmrestd refused {method} {path} ({answer.status_code}): {why[:300]}")
        return said


def properties(shape: Mapping[str, str]) -> dict[str, object]:
    """sbatch's long options as the API's job properties (`v0.0.38_job_properties`)."""
    made: dict[str, object] = {}
    for option, value in shape.items():
        if option == "mem":
            number, unit = amount_of(value)
            made[NAMES[option]] = max(1, round(number * MIB[unit]))
        else:
            made[NAMES[option]] = int(value) if option in NUMBERS else value
    return made


def user_of(token: str) -> str:
    """Whom a token of auth/jwt is for: its claim `sun`.  Raises QipanError."""
    try:
        claims = token.split(".")[1]
        return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sun"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        raise QipanError("slurmrestd's token is not one of `scontrol token`; write its value alone") from None
