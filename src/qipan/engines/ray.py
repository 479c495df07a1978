"""A Ray cluster below a board, by the jobs API of its dashboard (HTTP): existing clusters only, Ray itself is not imported.

A lease is a submitted job that asks for the devices as resources of its entry point; the submission id is the hold's
name, so asking twice is asking once.  Devices of one lease lie on one node.
"""

import math
import shlex
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qipan.engines.launcher import Hold
from qipan.engines.queue import (
    Job,
    View,
    on_one_node,
    one_node_environment,
    options_of,
    python_path,
    share_of,
)
from qipan.engines.visible import visible
from qipan.errors import QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool

LIMIT_S = 20.0
LOOKS = 3
STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "ended",
    "SUCCEEDED": "ended",
    "FAILED": "lost",
}
OPTIONS = ("address", "python", "interface")


@dataclass(frozen=True, slots=True)
class RayOptions:
    """`engine_options` of a site file.  `address`: the dashboard, such as http://ray-head:8265."""

    address: str
    share: float = 1.0
    python: str = sys.executable
    interface: str = "lo"

    @staticmethod
    def of(board: BoardSpec) -> "RayOptions":
        given = options_of(board, OPTIONS, needed=("address",))
        return RayOptions(
            given["address"].rstrip("/"),
            share_of(board),
            given.get("python", sys.executable),
            given.get("interface", "lo"),
        )


class Ray:
    """`Queue` over the jobs API."""

    def __init__(self, board: BoardSpec) -> None:
        self._options = RayOptions.of(board)
        self._pools = {pool.chip_class: pool for pool in board.pools}
        #: what others used in the newest looks.  Ray's report of use and its list of jobs are not of one moment (a job
        #: that began or ended looks like somebody else's for a while), so the least of them counts.
        self._others = {chip_class: deque[float](maxlen=LOOKS) for chip_class in self._pools}
        self._client = httpx.Client(base_url=self._options.address, timeout=LIMIT_S)

    def submit(self, hold: Hold) -> str:
        if hold.need.devices > self._pools[hold.need.chip_class].devices_per_node:
            raise QipanError(
                f"{hold.need.devices} devices do not lie on one node of {hold.need.chip_class}; a lease on Ray is on one"
            )
        shim = Path(__file__).with_name("shim.py")
        resource = resource_of(self._pools[hold.need.chip_class])
        job: dict[str, Any] = {
            "entrypoint": "exec " + shlex.join([self._options.python, "-S", str(shim), "--hold", str(hold.folder)]),
            "submission_id": hold.name,
            "metadata": {"qipan_task": hold.task_id, "qipan_chip": hold.need.chip_class, "qipan_devices": str(hold.need.devices)},
        }  # fmt: skip
        if resource in ("CPU", "GPU"):
            job[f"entrypoint_num_{resource.lower()}s"] = hold.need.devices
        else:
            job |= {"entrypoint_num_cpus": 0, "entrypoint_resources": {resource: hold.need.devices}}
        answer = self._ask("POST", "/api/jobs/", job, allow=(400, 500))
        if answer.status_code != 200 and not self._known(hold.name):
            raise QipanError(f"Ray refused the job: {answer.text[:400]}")
        return hold.name

    def _known(self, name: str) -> bool:
        return self._ask("GET", f"/api/jobs/{name}", allow=(404,)).status_code == 200

    def cancel(self, job_id: str) -> None:
        self._ask("POST", f"/api/jobs/{job_id}/stop", allow=(404,))

    def look(self, prefix: str) -> View:
        jobs, ours, waiting = {}, dict.fromkeys(self._pools, 0), dict.fromkeys(self._pools, 0)
        for job in self._ask("GET", "/api/jobs/").json():
            name, state = str(job.get("submission_id") or ""), STATES.get(str(job["status"]), "lost")
            if not name.startswith(prefix):
                continue
            jobs[name] = Job(name, state, "" if state == "running" else str(job.get("message") or ""))  # type: ignore[arg-type]
            chip = ChipClassId((job.get("metadata") or {}).get("qipan_chip", ""))
            devices = int((job.get("metadata") or {}).get("qipan_devices", "0"))
            if chip in ours and state == "running":
                ours[chip] += devices
            elif chip in waiting and state == "waiting":
                waiting[chip] += devices
        return View(jobs, self._usable(ours, waiting))

    def _usable(
        self, ours: Mapping[ChipClassId, int], waiting: Mapping[ChipClassId, int]
    ) -> dict[ChipClassId, int]:
        """The share, less what others use and wait for."""
        status = self._ask("GET", "/api/cluster_status").json()
        report = ((status.get("data") or {}).get("clusterStatus") or {}).get("loadMetricsReport") or {}
        usable = {}
        for chip_class, pool in self._pools.items():
            resource = resource_of(pool)
            used, total = _named(report.get("usage") or {}, resource) or (0, 0)
            asked = sum(float(_named(shape, resource)) * count for shape, count in _demands(report))
            others = max(0.0, used - ours[chip_class]) + max(0.0, asked - waiting[chip_class])
            self._others[chip_class].append(others)
            others = min(self._others[chip_class])
            usable[chip_class] = max(0, math.floor(min(total * self._options.share, total - others) + 1e-9))
        return usable

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]:
        return on_one_node(self._options.python, hold, run)

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]:
        own = visible(
            self._pools[hold.need.chip_class], str(granted.get("devices", "")), granted.get("given")
        )
        return python_path() | own | one_node_environment(granted, self._options.interface)

    def inside(self, pool: Pool, devices: int, command: list[str]) -> list[str]:
        program = [
            sys.executable,
            "-m",
            "qipan.engines.ray_once",
            self._options.address,
            resource_of(pool),
            str(devices),
        ]
        return [*program, *command]

    def _ask(
        self, method: str, path: str, body: object = None, allow: tuple[int, ...] = ()
    ) -> httpx.Response:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise QipanError(
                f"Ray's dashboard {self._options.address} does not answer ({error}); is the head up?"
            ) from None
        if answer.status_code != 200 and answer.status_code not in allow:
            raise QipanError(
                f"Ray's dashboard answered {answer.status_code} to {method} {path}: {answer.text[:300]}"
            )
        return answer


def resource_of(pool: Pool) -> str:
    """What Ray calls the pool's devices: GPU, CPU, or a custom resource."""
    return pool.resource or "GPU"


def _named(resources: Mapping[str, Any], resource: str) -> Any:
    """The dashboard writes names in camel case: `npu_910b` is `npu910b` there."""
    plain = resource.replace("_", "").lower()
    return next((value for name, value in resources.items() if name.replace("_", "").lower() == plain), 0)


def _demands(report: Mapping[str, Any]) -> list[tuple[dict[str, float], int]]:
    """(resources, how many) that tasks, actors and placement groups wait for."""
    asked = [entry for entry in report.get("resourceDemand") or [] if isinstance(entry[0], dict)]
    groups = [entry for entry in report.get("pgDemand") or [] if isinstance(entry[0], dict)]
    bundles = [
        (bundle, count * times) for group, times in groups for bundle, count in group.get("bundles", [])
    ]
    return [(shape, int(count)) for shape, count in [*asked, *bundles]]
