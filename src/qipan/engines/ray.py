"""A Ray cluster below a board: existing clusters only, Ray itself is not imported here.

A board keeps one job on the cluster, the keeper (`ray_keeper.py`), submitted by the jobs API of the dashboard (HTTP).  A lease is
a file for the keeper, which holds the devices by a remote function on each of the lease's nodes.  Asking twice is asking once, and
a lease that one keeper took is started by no other: what a keeper that is gone had taken counts as lost.
"""

import json
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qipan.engines.launcher import Hold, installed, read_json, supervisor, write_text
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
from qipan.engines.visible import visible
from qipan.errors import QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import Out

LIMIT_S = 20.0
LOOKS = 3
AGAIN_S = 30.0  # between a keeper that ended at once and the next
REMEMBERED_S = 600.0  # what ended is shown so long, as Slurm does (MinJobAge)
OPTIONS = ("address", "python", "interface")


@dataclass(frozen=True, slots=True)
class RayOptions:
    """`engine_options` of a site file.  `address`: the dashboard, such as http://ray-head:8265."""

    address: str
    share: float = 1.0
    python: str = sys.executable
    interface: str = ""

    @staticmethod
    def of(board: BoardSpec) -> "RayOptions":
        given = options_of(board, OPTIONS, needed=("address",))
        return RayOptions(
            given["address"].rstrip("/"),
            share_of(board),
            given.get("python", sys.executable),
            given.get("interface", ""),
        )


class Ray:
    """`Queue` over a keeper.  `folder`: the engine's; the cluster's nodes, the head among them, see it under the same path."""

    def __init__(self, board: BoardSpec, folder: Path) -> None:
        self._options = RayOptions.of(board)
        self._pools = {pool.chip_class: pool for pool in board.pools}
        #: what others used in the newest looks.  Ray's report of use and what its workers say are not of one moment (a lease
        #: that began or ended looks like somebody else's for a while), so the least of them counts.
        self._others = {chip_class: deque[float](maxlen=LOOKS) for chip_class in self._pools}
        self._client = httpx.Client(base_url=self._options.address, timeout=LIMIT_S)
        self._holds, self._folder = folder / "holds", folder / "ray"
        self._begun_s = float("-inf")  # when the keeper was submitted
        self._keeper_why = ""  # why it takes nothing
        self._asks: dict[str, dict[str, Any]] = {}  # what was asked for by each lease

    def submit(self, hold: Hold) -> str:
        pool = self._pools[hold.need.chip_class]
        self._folder.mkdir(exist_ok=True)
        if not any(self._folder.glob(f"{hold.name}.*")):
            ask = {
                "folder": str(hold.folder), "resource": resource_of(pool), "devices": hold.need.devices,
                "nodes": nodes_of(hold.need, pool), "chip": hold.need.chip_class,
            }  # fmt: skip
            write_text(self._folder / f"{hold.name}.ask", json.dumps(ask))
        return hold.name

    def cancel(self, job_id: str) -> None:
        try:
            (self._folder / f"{job_id}.ask").unlink()
        except FileNotFoundError:  # the keeper has taken it
            (self._folder / f"{job_id}.cancel").touch()

    def look(self, prefix: str) -> View:
        keeper = self._keeper(prefix)
        jobs, ours, waiting = {}, dict.fromkeys(self._pools, 0), dict.fromkeys(self._pools, 0)
        drained = read_json(self._folder / "drained") or {}
        draining = {}
        for entry in sorted(os.listdir(self._folder)):
            name, _, ending = entry.rpartition(".")
            if not name.startswith(prefix) or ending in ("part", "cancel"):
                continue
            jobs[name] = job = self._job(name, ending, keeper)
            ask = self._asks.get(name) or read_json(self._folder / entry) or {}
            if job.state in ("ended", "lost"):
                self._asks.pop(name, None)
                continue
            if ask:  # else the keeper took it while we looked
                self._asks[name] = ask
            counted = ours if job.state == "running" else waiting
            if ask.get("chip") in counted:
                counted[ChipClassId(ask["chip"])] += int(ask["devices"])
            for place in (self._holds / name).glob("place-*"):
                node = place.read_text()
                if node in drained:
                    draining[name] = _drains(node)
        for name in [name for name, job in jobs.items() if job.state in ("ended", "lost")]:
            over = self._folder / f"{name}.over"
            if over.exists() and over.stat().st_mtime < time.time() - REMEMBERED_S:
                over.unlink()
        out = tuple(
            Out(chip_class, int(count), _drains(node))
            for node, resources in sorted(drained.items())
            for chip_class, pool in self._pools.items()
            for count in [resources.get(resource_of(pool), 0)]
            if count
        )
        return View(jobs, self._usable(ours, waiting, out), draining, out)

    def _job(self, name: str, ending: str, keeper: str) -> Job:
        over = read_json(self._folder / f"{name}.over")
        if over is not None:
            return Job(name, over["state"], over["why"])
        if ending == "ask":
            return Job(name, "waiting", self._keeper_why)
        if keeper and ending != keeper:
            why = f"the driver {ending} that held its devices is gone"
            write_text(self._folder / f"{name}.over", json.dumps({"state": "lost", "why": why}))
            (self._folder / f"{name}.{ending}").unlink()
            return Job(name, "lost", why)
        if (self._holds / name / "granted.json").exists():
            return Job(name, "running")
        return Job(name, "waiting", "Ray has no devices for it yet")

    def _keeper(self, prefix: str) -> str:
        """The name of the keeper that lives, submitted where there is none; empty where one ended at once, which is not tried
        again for a while."""
        self._folder.mkdir(exist_ok=True)
        write_text(self._folder / "looked", str(time.time()))
        name, self._keeper_why = _text(self._folder / "keeper"), "Ray's keeper has not taken it yet"
        if name:
            found = self._ask("GET", f"/api/jobs/{name}", allow=(404,))
            if found.status_code == 200 and found.json()["status"] in ("PENDING", "RUNNING"):
                return name
            if found.status_code == 200 and time.monotonic() < self._begun_s + AGAIN_S:
                self._keeper_why = f"Ray's job {name} ended: {str(found.json().get('message'))[-300:]}"
                return ""
        name = f"{prefix}keeper-{int(name.rpartition('-')[2] or 0) + 1}"
        write_text(self._folder / "keeper", name)
        (self._folder / "drained").unlink(missing_ok=True)
        programs = installed(self._folder, "ray_keeper.py")  # the nodes need Ray and Python only
        supervise = supervisor(self._options.python, folder=programs)
        command = [self._options.python, str(programs / "ray_keeper.py"), str(self._folder), name, *supervise]
        self._begun_s = time.monotonic()
        self._ask("POST", "/api/jobs/", {"entrypoint": "exec " + shlex.join(command), "submission_id": name})
        return name

    def _usable(
        self, ours: Mapping[ChipClassId, int], waiting: Mapping[ChipClassId, int], out: Sequence[Out]
    ) -> dict[ChipClassId, int]:
        """The share of what stays, less what others use and wait for."""
        status = self._ask("GET", "/api/cluster_status").json()
        report = ((status.get("data") or {}).get("clusterStatus") or {}).get("loadMetricsReport") or {}
        usable = {}
        for chip_class, pool in self._pools.items():
            resource = resource_of(pool)
            used, total = _named(report.get("usage") or {}, resource) or (0, 0)
            total -= sum(one.devices for one in out if one.chip_class == chip_class)
            asked = sum(float(_named(shape, resource)) * count for shape, count in _demands(report))
            others = max(0.0, used - ours[chip_class]) + max(0.0, asked - waiting[chip_class])
            self._others[chip_class].append(others)
            others = min(self._others[chip_class])
            usable[chip_class] = max(0, math.floor(min(total * self._options.share, total - others) + 1e-9))
        return usable

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]:
        return gang_command(self._options.python, hold, self._pools[hold.need.chip_class], run, granted)

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]:
        pool = self._pools[hold.need.chip_class]
        nodes = nodes_of(hold.need, pool)
        own = visible(pool, str(granted.get("devices", "")), granted.get("given")) if nodes == 1 else {}
        return python_path() | own | gang_environment(granted, nodes, self._options.interface)

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


def _drains(node: str) -> str:
    return f"Ray drains the node {node[:12]}"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


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
