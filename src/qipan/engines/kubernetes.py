"""A Kubernetes cluster below a board, by its API (HTTP).  A lease is a Job whose pods, one on each node, ask for the devices as
extended resources; with `queue` it is suspended and admitted by Kueue, all pods or none.  What is written is applied on the server's side, so
asking twice is asking once; what is there is listed once and then watched from its resourceVersion.

The engine's folder is a volume claim that the pods mount under the same path; the supervisor lies in it, so an image needs
Python and the task's own software only.
"""

import json
import math
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qipan.engines.launcher import Hold, installed, supervisor
from qipan.engines.queue import Job, View, gang_command, gang_environment, nodes_of, options_of, share_of
from qipan.errors import QipanError
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import Out

LIMIT_S = 20.0
WATCH_S = 1
MANAGER = "qipan"
OPTIONS = ("api", "namespace", "image", "claim", "queue", "token_file", "ca_file", "python")


@dataclass(frozen=True, slots=True)
class KubernetesOptions:
    """`engine_options` of a site file.  `claim`: the PersistentVolumeClaim behind `folder`.  `queue`: a Kueue LocalQueue."""

    api: str
    image: str
    claim: str
    folder: str
    namespace: str = "default"
    queue: str = ""
    token_file: str = ""
    ca_file: str = ""
    python: str = "python3"
    share: float = 1.0

    @staticmethod
    def of(board: BoardSpec) -> "KubernetesOptions":
        given = options_of(board, OPTIONS, needed=("api", "image", "claim", "folder"))
        return KubernetesOptions(folder=board.engine_options["folder"], share=share_of(board), **given)


class Kubernetes:
    """`Queue` over the API server."""

    def __init__(self, board: BoardSpec, transport: httpx.BaseTransport | None = None) -> None:
        self._options = options = KubernetesOptions.of(board)
        self._pools = {pool.chip_class: pool for pool in board.pools}
        headers = {}
        if options.token_file:
            headers["Authorization"] = f"Bearer {Path(options.token_file).read_text().strip()}"
        verify = ssl.create_default_context(cafile=options.ca_file) if options.ca_file else True
        self._client = httpx.Client(
            base_url=options.api, headers=headers, verify=verify, timeout=LIMIT_S, transport=transport
        )
        self._jobs = Watched(self, f"/apis/batch/v1/namespaces/{options.namespace}/jobs")
        self._pods = Watched(self, "/api/v1/pods")

    def submit(self, hold: Hold) -> str:
        path = f"/apis/batch/v1/namespaces/{self._options.namespace}/jobs/{hold.name}"
        self.ask(
            "PATCH", path, params={"fieldManager": MANAGER, "force": "true"}, content=json.dumps(self.manifest(hold)),
            headers={"Content-Type": "application/apply-patch+yaml"},
        )  # fmt: skip
        return hold.name

    def manifest(self, hold: Hold) -> dict[str, Any]:
        """The Job of a lease: its devices evenly on as many nodes, a pod on each."""
        options, pool = self._options, self._pools[hold.need.chip_class]
        nodes = nodes_of(hold.need, pool)
        labels = {"app.kubernetes.io/managed-by": MANAGER, "qipan.io/task": hold.task_id[:63]}
        if options.queue:
            labels["kueue.x-k8s.io/queue-name"] = options.queue
        devices = {resource_of(pool): str(hold.need.devices // nodes)}
        container: dict[str, Any] = {
            "name": "supervisor",
            "image": options.image,
            "command": supervisor(
                options.python, "--hold", str(hold.folder), str(nodes), folder=installed(Path(options.folder))
            ),
            "env": [_field("QIPAN_NODE_ADDRESS", "status.podIP")],
            "resources": {"limits": devices, "requests": devices},
            "volumeMounts": [{"name": "qipan", "mountPath": options.folder}],
        }
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 60,
            "containers": [container],
            "volumes": [{"name": "qipan", "persistentVolumeClaim": {"claimName": options.claim}}],
        }
        spec: dict[str, Any] = {
            "backoffLimit": 0,
            "suspend": bool(options.queue),
            "ttlSecondsAfterFinished": 600,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        if nodes > 1:
            labels["qipan.io/lease"] = hold.name[-63:].strip("-")
            container["env"].append(
                _field("QIPAN_NODE_RANK", "metadata.annotations['batch.kubernetes.io/job-completion-index']")
            )
            beside = {"labelSelector": {"matchLabels": {"qipan.io/lease": labels["qipan.io/lease"]}}, "topologyKey": "kubernetes.io/hostname"}  # fmt: skip
            pod["affinity"] = {
                "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [beside]}
            }
            spec |= {"parallelism": nodes, "completions": nodes, "completionMode": "Indexed"}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": hold.name, "namespace": options.namespace, "labels": labels},
            "spec": spec,
        }

    def cancel(self, job_id: str) -> None:
        path = f"/apis/batch/v1/namespaces/{self._options.namespace}/jobs/{job_id}"
        self.ask("DELETE", path, params={"propagationPolicy": "Foreground"}, allow=(404,))

    def look(self, prefix: str) -> View:
        jobs = {}
        for job in self._jobs.look():
            name = str(job["metadata"]["name"])
            if name.startswith(prefix):
                jobs[name] = _job(name, job.get("status") or {}, job.get("spec") or {})
        nodes = self.ask("GET", "/api/v1/nodes").json()["items"]
        pods = [
            pod
            for pod in self._pods.look()
            if (pod.get("status") or {}).get("phase") in ("Pending", "Running", None)
        ]
        leaving = {
            str(node["metadata"]["name"]): f"Kubernetes has cordoned {node['metadata']['name']}"
            for node in nodes
            if (node.get("spec") or {}).get("unschedulable")
        }
        draining = {
            str((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-name", "")): leaving[node]
            for pod in pods
            for node in [str((pod.get("spec") or {}).get("nodeName", ""))]
            if node in leaving and str(pod["metadata"]["name"]).startswith(prefix)
        }
        out = tuple(
            Out(chip_class, count, leaving[node["metadata"]["name"]])
            for node in nodes
            if node["metadata"]["name"] in leaving
            for chip_class, pool in self._pools.items()
            for count in [_allocatable(node, pool)]
            if count
        )
        return View(jobs, self._usable(prefix, nodes, pods), draining, out)

    def _usable(
        self, prefix: str, nodes: list[dict[str, Any]], pods: list[dict[str, Any]]
    ) -> dict[ChipClassId, int]:
        """The share of what ready nodes have, less what others' pods hold there or wait for."""
        ready = {str(node["metadata"]["name"]) for node in nodes if _ready(node)}
        usable = {}
        for chip_class, pool in self._pools.items():
            resource = resource_of(pool)
            there = sum(_allocatable(node, pool) for node in nodes if node["metadata"]["name"] in ready)
            others = sum(
                _requested(pod, resource)
                for pod in pods
                if not str(pod["metadata"]["name"]).startswith(prefix)
                and ((pod.get("spec") or {}).get("nodeName") or "") in {"", *ready}
            )
            usable[chip_class] = max(0, min(math.floor(there * self._options.share), there - others))
        return usable

    def command(self, hold: Hold, run: str, granted: Mapping[str, object]) -> list[str]:
        return gang_command(self._options.python, hold, self._pools[hold.need.chip_class], run, granted)

    def environment(self, hold: Hold, granted: Mapping[str, object]) -> dict[str, str]:
        return gang_environment(granted, nodes_of(hold.need, self._pools[hold.need.chip_class]), "")

    def inside(self, pool: Pool, devices: int, command: list[str]) -> list[str]:
        raise QipanError(
            f"{pool.pool_id}: pools on Kubernetes are not measured from here; run `qipan chips measure` in a pod of theirs"
        )

    def ask(self, method: str, path: str, allow: tuple[int, ...] = (), **more: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            raise QipanError(
                f"the API server {self._options.api} does not answer ({error}); is it up, and is `token_file` right?"
            ) from None
        if answer.status_code >= 300 and answer.status_code not in allow:
            raise QipanError(
                f"the API server answered {answer.status_code} to {method} {path}: {answer.text[:300]}"
            )
        return answer

    def stream(self, path: str, params: dict[str, str]) -> Iterator[dict[str, Any]]:
        try:
            with self._client.stream("GET", path, params=params) as answer:
                if answer.status_code == 410:
                    raise Expired
                if answer.status_code != 200:
                    raise QipanError(f"the API server answered {answer.status_code} to a watch of {path}")
                for line in answer.iter_lines():
                    if line.strip():
                        yield json.loads(line)
        except httpx.HTTPError as error:
            raise QipanError(f"the watch of {path} broke ({error})") from None


class Expired(Exception):
    """The resourceVersion is too old to watch from: list again."""


class Watched:
    """The objects of one kind: listed once, then kept by watching from where the list was."""

    def __init__(self, api: Kubernetes, path: str) -> None:
        self._api, self._path = api, path
        self._objects: dict[tuple[str, str], dict[str, Any]] = {}
        self._version = ""

    def look(self) -> list[dict[str, Any]]:
        if self._version:
            try:
                self._watch()
            except Expired:
                self._version = ""
        if not self._version:
            self._list()
        return [self._objects[key] for key in sorted(self._objects)]

    def _list(self) -> None:
        body = self._api.ask("GET", self._path).json()
        self._objects = {_key(item): item for item in body["items"]}
        self._version = str(body["metadata"]["resourceVersion"])

    def _watch(self) -> None:
        params = {
            "watch": "true", "resourceVersion": self._version, "timeoutSeconds": str(WATCH_S), "allowWatchBookmarks": "true",
        }  # fmt: skip
        for event in self._api.stream(self._path, params):
            found = event["object"]
            if event["type"] == "ERROR":
                if found.get("code") == 410:
                    raise Expired
                raise QipanError(f"the watch of {self._path} ended: {found.get('message', '')[:200]}")
            self._version = str(found["metadata"]["resourceVersion"])
            if event["type"] == "DELETED":
                self._objects.pop(_key(found), None)
            elif event["type"] in ("ADDED", "MODIFIED"):
                self._objects[_key(found)] = found


def resource_of(pool: Pool) -> str:
    """The extended resource, such as nvidia.com/gpu or huawei.com/Ascend910."""
    return pool.resource or "nvidia.com/gpu"


def _field(name: str, path: str) -> dict[str, Any]:
    """An environment variable that the kubelet fills in."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _key(item: Mapping[str, Any]) -> tuple[str, str]:
    return str(item["metadata"].get("namespace", "")), str(item["metadata"]["name"])


def _job(name: str, status: Mapping[str, Any], spec: Mapping[str, Any]) -> Job:
    conditions = {one["type"]: one for one in status.get("conditions") or [] if one.get("status") == "True"}
    if "Complete" in conditions:
        return Job(name, "ended")
    if "Failed" in conditions:
        return Job(name, "lost", f"its Job failed: {conditions['Failed'].get('message', '')}")
    if status.get("ready") or (status.get("active") and "ready" not in status):
        return Job(name, "running")
    return Job(
        name, "waiting", "Kueue has not admitted it" if spec.get("suspend") else "its pod waits for a node"
    )


def _ready(node: Mapping[str, Any]) -> bool:
    conditions = node["status"].get("conditions") or []
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _allocatable(node: Mapping[str, Any], pool: Pool) -> int:
    return _count((node["status"].get("allocatable") or {}).get(resource_of(pool), "0"))


def _requested(pod: Mapping[str, Any], resource: str) -> int:
    containers = (pod.get("spec") or {}).get("containers") or []
    asked = [((one.get("resources") or {}).get("requests") or {}).get(resource, "0") for one in containers]
    return sum(_count(text) for text in asked)


def _count(text: object) -> int:
    """Extended resources are whole numbers."""
    return int(str(text)) if str(text).isdigit() else 0
