"""A real Ray cluster on this machine, in a network namespace of its own: a head without devices and nodes with some.
Ray listens on the host's address even when told not to, hence the namespace; and `ray stop` ends by name, hence pids."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

RAY = str(Path(sys.executable).with_name("ray"))
ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_MEMORY_MONITOR": "1",
    "RAY_raylet_start_wait_time_s": "90",
}


class RayCluster:
    """`nodes` x `devices` of the custom resource `sim`."""

    engine, resource = "ray", "sim"

    def options(self) -> dict[str, str]:
        return {"address": self.address}

    def __init__(self, folder: Path, nodes: int = 1, devices: int = 4, net: int = 41) -> None:
        self.folder, self.nodes, self.devices = folder, nodes, devices
        self.space, self.wire, self.net = f"qipan-ray-{net}", f"qray{net}", f"10.213.{net}"
        self.address = f"http://{self.net}.2:8265"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def up(self, limit_s: float = 120.0) -> "RayCluster":
        self._network()
        self.start_head()
        self._until(
            lambda: httpx.get(f"{self.address}/api/version", timeout=5).status_code == 200,
            limit_s,
            "the head",
        )
        for index in range(
            self.nodes
        ):  # one after another: a busy machine starts no two within Ray's own time limit
            self.start_node(index)
            self._until(lambda index=index: self.total() >= (index + 1) * self.devices, 60, "a node")
        return self

    def _network(self) -> None:
        ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: E731
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True)
        subprocess.run(["ip", "link", "del", self.wire], capture_output=True)
        ip("netns", "add", self.space)
        ip("link", "add", self.wire, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("addr", "add", f"{self.net}.1/24", "dev", self.wire)
        ip("link", "set", self.wire, "up")
        ip("-n", self.space, "addr", "add", f"{self.net}.2/24", "dev", "eth0")
        for name in ("eth0", "lo"):
            ip("-n", self.space, "link", "set", name, "up")

    def start_head(self) -> None:
        self._start(
            "head", "--head", "--port=6379", f"--dashboard-host={self.net}.2", "--dashboard-port=8265", "--num-cpus=4",
            f"--temp-dir=/tmp/{self.space}",
        )  # fmt: skip

    def start_node(self, index: int) -> None:
        self._start(
            f"node-{index}", f"--address={self.net}.2:6379", "--num-cpus=4", f"--resources={json.dumps({'sim': self.devices, f'mark{index}': 1})}",
        )  # fmt: skip

    def _start(self, name: str, *options: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        command = [
            "ip",
            "netns",
            "exec",
            self.space,
            RAY,
            "start",
            "--block",
            f"--node-ip-address={self.net}.2",
        ]
        self.processes[name] = subprocess.Popen(
            [*command, "--object-store-memory=80000000", *options], env={**os.environ, **ENV}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def index_of(self, node: str) -> int:
        """Which of ours a node of Ray's is, by a resource that only it has."""
        found = httpx.get(f"{self.address}/nodes?view=summary", timeout=5).json()["data"]["summary"]
        raylet = next(one["raylet"] for one in found if one["raylet"].get("nodeId") == node)
        return next(index for index in range(self.nodes) if f"mark{index}" in raylet["resourcesTotal"])

    def node_of(self, index: int) -> str:
        """The id of one of ours while the head takes it for alive, else empty."""
        found = httpx.get(f"{self.address}/nodes?view=summary", timeout=5).json()["data"]["summary"]
        alive = [one["raylet"] for one in found if one["raylet"].get("state") == "ALIVE"]
        return next((one["nodeId"] for one in alive if f"mark{index}" in one["resourcesTotal"]), "")

    def drain(self, node: str) -> None:
        """What a provider does before it takes a node away."""
        command = [
            "ip",
            "netns",
            "exec",
            self.space,
            RAY,
            "drain-node",
            f"--address={self.net}.2:6379",
            f"--node-id={node}",
        ]
        more = [
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=goes",
            "--deadline-remaining-seconds=120",
        ]
        subprocess.run([*command, *more], check=True, capture_output=True, env={**os.environ, **ENV})

    def again(self, index: int) -> None:
        """A node that was killed, started anew."""
        if self.processes[f"node-{index}"].poll() is None:
            self.kill(f"node-{index}")
        self._until(lambda: self.total() <= (self.nodes - 1) * self.devices, 60, "the node's end")
        self.start_node(index)
        self._until(lambda: self.total() >= self.nodes * self.devices, 60, "the node")

    def total(self) -> float:
        """Devices of the nodes that the head sees."""
        return self._usage()[1]

    def used(self) -> float:
        return self._usage()[0]

    def _usage(self) -> tuple[float, float]:
        status = httpx.get(f"{self.address}/api/cluster_status", timeout=5).json()
        used, total = status["data"]["clusterStatus"]["loadMetricsReport"]["usage"].get("sim", (0.0, 0.0))
        return used, total

    def until_idle(self) -> None:
        self._until(lambda: self.used() == 0, 60, "an idle cluster")

    def kill(self, name: str) -> None:
        """SIGKILL to everything of one node or of the head, the jobs' own processes excepted."""
        process = self.processes[name]
        every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        jobs = [
            one
            for one in every
            if one.status() != psutil.STATUS_ZOMBIE and " --hold " in " ".join(one.cmdline())
        ]
        spared = {below.pid for one in jobs for below in [one, *one.children(recursive=True)]}
        for one in every:
            if one.pid not in spared:
                with contextlib.suppress(psutil.NoSuchProcess):  # it went with its parent
                    one.kill()
        process.wait()

    def down(self) -> None:
        inside = subprocess.run(
            ["ip", "netns", "pids", self.space], capture_output=True, text=True
        ).stdout.split()
        for pid in inside:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        for process in self.processes.values():
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True)

    def _until(self, done, limit_s: float, what: str) -> None:
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            try:
                if done():
                    return
            except (httpx.HTTPError, KeyError, TypeError):
                pass  # not up yet
            time.sleep(0.2)
        raise AssertionError(f"{what} not up in {limit_s} s; see {self.folder}")
