"""The driver in a Ray cluster through which a board's leases hold their devices: `ray_keeper.py FOLDER NAME SUPERVISOR...`.
The board submits it as a job; it lives as long as the board looks, or something runs.  It needs Ray and the standard library.

A lease is asked for by the file `LEASE.ask` in FOLDER.  The keeper takes it by renaming it to `LEASE.NAME`, so one keeper starts it,
once.  It becomes one remote function per node that runs the supervisor there and waits for it: workers are used again, where a job
of its own costs a new actor process.  Over several nodes a placement group holds all of its devices or none.  `LEASE.cancel` ends
it; what became of it is said in `LEASE.over`.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

POLL_S = 0.05
DRAIN_POLL_S = 2.0
ALONE_S = 120.0  # nobody looked for so long, and nothing runs: the keeper ends


@ray.remote(num_cpus=0, max_retries=0, max_calls=0)
def supervise(command: list[str], rank: int, place: str) -> int:
    """Run the supervisor until it ends.  Its session is its own, since Ray ends a worker's group with the worker; it is told to
    stop when this worker goes, by which the devices are gone."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "QIPAN_NODE_ADDRESS": str(ray.util.get_node_ip_address()),  # type: ignore[no-untyped-call]
        "QIPAN_NODE_RANK": str(rank),
        "QIPAN_PARENT": str(os.getpid()),
    }
    Path(place).write_text(ray.get_runtime_context().get_node_id())
    shim = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    while True:
        try:
            return shim.wait()
        except KeyboardInterrupt:  # cancelled
            shim.terminate()


@dataclass(slots=True)
class Lease:
    taken: Path
    refs: list[Any]
    group: Any = None
    why_lost: str = ""

    def cancel(self) -> None:
        for ref in self.refs:
            ray.cancel(ref)


class Keeper:
    def __init__(self, folder: Path, name: str, supervisor: list[str]) -> None:
        self._folder, self._name, self._supervisor = folder, name, supervisor
        self._leases: dict[str, Lease] = {}
        self._drained: dict[str, Any] = {}

    def run(self) -> None:
        looked, looked_s, drain_s = "", time.monotonic(), 0.0
        mine = True  # a board that took this keeper for gone has another: what it asks is not ours
        while self._leases or (mine and time.monotonic() < looked_s + ALONE_S):
            mine = mine and _text(self._folder / "keeper") == self._name
            for entry in sorted(os.listdir(self._folder)):
                lease, _, ending = entry.rpartition(".")
                if ending == "ask" and mine:
                    self._take(lease)
                elif ending == "cancel":
                    if lease in self._leases:
                        self._leases[lease].cancel()
                    (self._folder / entry).unlink(missing_ok=True)
            self._wait()
            now = _text(self._folder / "looked")
            if now != looked:
                looked, looked_s = now, time.monotonic()
            if time.monotonic() > drain_s:
                self._say_drained()
                drain_s = time.monotonic() + DRAIN_POLL_S

    def _take(self, lease: str) -> None:
        taken = self._folder / f"{lease}.{self._name}"
        try:
            (self._folder / f"{lease}.ask").rename(taken)
        except FileNotFoundError:
            return  # it was taken back
        ask = json.loads(taken.read_text())
        each, nodes, resource = ask["devices"] // ask["nodes"], ask["nodes"], ask["resource"]
        options: dict[str, Any] = {"CPU": {"num_cpus": each}, "GPU": {"num_gpus": each}}.get(
            resource, {"resources": {resource: each}}
        )
        group = placement_group([{resource: each}] * nodes, strategy="STRICT_SPREAD") if nodes > 1 else None
        command = [*self._supervisor, "--hold", ask["folder"], str(nodes)]
        refs = []
        for rank in range(nodes):
            where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank)} if group else {}
            place = f"{ask['folder']}/place-{rank}"
            refs.append(supervise.options(**options, **where).remote(command, rank, place))
        self._leases[lease] = Lease(taken, refs, group)

    def _wait(self) -> None:
        refs = [ref for lease in self._leases.values() for ref in lease.refs]
        if not refs:
            time.sleep(POLL_S)
            return
        ended, _ = ray.wait(refs, num_returns=1, timeout=POLL_S, fetch_local=False)
        for ref in ended:
            name, lease = next((name, one) for name, one in self._leases.items() if ref in one.refs)
            lease.refs.remove(ref)
            try:
                ray.get(ref)
            except TaskCancelledError:
                pass  # it was asked for; nothing of it runs
            except RayError as error:
                lease.why_lost = lease.why_lost or f"Ray lost its worker: {str(error).strip()[:300]}"
                self._over(name, "lost", lease.why_lost)
            if not lease.refs:
                if lease.group is not None:
                    remove_placement_group(lease.group)
                if not lease.why_lost:
                    self._over(name, "ended", "")
                lease.taken.unlink(missing_ok=True)
                del self._leases[name]

    def _over(self, lease: str, state: str, why: str) -> None:
        part = self._folder / f"{lease}.part"
        part.write_text(json.dumps({"state": state, "why": why}))
        part.rename(self._folder / f"{lease}.over")

    def _say_drained(self) -> None:
        """Nodes that are to go, as Ray's control says: node id -> its resources."""
        leaving = ray._private.state.state.get_draining_nodes()
        nodes = ray.nodes() if leaving else []  # type: ignore[no-untyped-call]
        there = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        found = {node: there[node] for node in sorted(leaving) if node in there}
        if found != self._drained:
            self._drained = found
            part = self._folder / "drained.part"
            part.write_text(json.dumps(found))
            part.rename(self._folder / "drained")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # not written yet


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    Keeper(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]).run()
