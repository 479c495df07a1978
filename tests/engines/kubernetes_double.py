"""A stateful double of a Kubernetes API server, written from the published API conventions and schemas, apart from the
adapter.  It refuses what the strict published schemas refuse, keeps resourceVersions, answers watches (and 410 for
versions it has compacted away), applies on its own side with field managers, and admits suspended jobs as Kueue does.
Its nodes run a pod's command as a process of this machine.  It is not a cluster: the docs say so."""

import copy
import json
import os
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import kubernetes_validate
import yaml

VERSION = "1.31"
JOB_NAME = "batch.kubernetes.io/job-name"


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class KubernetesDouble:
    def __init__(self, resource: str = "example.com/sim", devices: int = 4, nodes: int = 1) -> None:
        self.resource, self.devices = resource, devices
        self.node_names = [f"node-{index}" for index in range(nodes)]
        self.cordoned: set[str] = set()
        self.lock = threading.RLock()
        self.version = 100
        self.oldest = 0  # watches from before here are answered 410
        self.objects: dict[tuple[str, str, str], dict] = {}  # (kind, namespace, name)
        self.events: list[tuple[int, str, str, dict]] = []  # (version, kind, type, object)
        self.managers: dict[tuple[str, str, str], str] = {}
        self.processes: dict[tuple[str, int], subprocess.Popen] = {}  # (job, index of the pod)
        self.watches = self.lists = 0
        self.closed = threading.Event()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                return

            def _answer(self, code, body):
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _do(self):
                url = urlparse(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    if self.command == "GET" and query.get("watch") == "true":
                        self._watch(url.path, query)
                    else:
                        content = self.headers.get("Content-Type", "")
                        self._answer(*double.handle(self.command, url.path, query, body, content))
                except Refused as refused:
                    status = {
                        "kind": "Status",
                        "code": refused.code,
                        "reason": refused.reason,
                        "message": str(refused),
                    }
                    self._answer(refused.code, status)

            def _watch(self, path, query):
                since = int(query.get("resourceVersion") or 0)
                if since < double.oldest:
                    raise Refused(410, "Expired", f"too old resource version: {since}")
                double.watches += 1
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                end_s, kind, sent = (
                    time.monotonic() + float(query.get("timeoutSeconds", "30")),
                    double.kind(path),
                    since,
                )
                while time.monotonic() < end_s and not double.closed.is_set():
                    with double.lock:
                        fresh = [event for event in double.events if event[0] > sent and event[1] == kind]
                    for number, _, what, found in fresh:
                        self._chunk({"type": what, "object": found})
                        sent = number
                    time.sleep(0.05)
                self.wfile.write(b"0\r\n\r\n")

            def _chunk(self, value):
                data = json.dumps(value).encode() + b"\n"
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            do_GET = do_PATCH = do_DELETE = do_POST = do_PUT = _do

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        threading.Thread(target=self._control, daemon=True).start()

    # ---- the API -----------------------------------------------------------------------------------------------------

    def kind(self, path: str) -> str:
        words = path.strip("/").split("/")
        plural = words[-1] if words[-1] in ("jobs", "pods", "nodes") else words[-2]
        return {"jobs": "Job", "pods": "Pod", "nodes": "Node"}[plural]

    def handle(self, method: str, path: str, query: dict, body: bytes, content: str):
        words = path.strip("/").split("/")
        kind = self.kind(path)
        namespace = words[words.index("namespaces") + 1] if "namespaces" in words else ""
        name = words[-1] if words[-1] not in ("jobs", "pods", "nodes") else ""
        with self.lock:
            if method == "GET" and not name:
                self.lists += 1
                items = [
                    found
                    for (one, where, _), found in sorted(self.objects.items())
                    if one == kind and namespace in ("", where)
                ]
                if kind == "Node":
                    items = [self._node(name) for name in self.node_names]
                return 200, {
                    "kind": f"{kind}List",
                    "items": items,
                    "metadata": {"resourceVersion": str(self.version)},
                }
            key = (kind, namespace, name)
            if method == "PATCH":
                return self._apply(key, query, body, content)
            if key not in self.objects:
                raise Refused(404, "NotFound", f'{kind.lower()}s "{name}" not found')
            if method == "DELETE":
                self._delete(key)
                return 200, {"kind": "Status", "status": "Success"}
            if method == "GET":
                return 200, self.objects[key]
        raise Refused(405, "MethodNotAllowed", method)

    def _apply(self, key, query, body, content):
        if content != "application/apply-patch+yaml":
            raise Refused(415, "UnsupportedMediaType", content)
        if "fieldManager" not in query:
            raise Refused(400, "BadRequest", "fieldManager is required for apply patch")
        manifest = yaml.safe_load(body)
        try:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Refused(422, "Invalid", f"{error.message} at {error.path}") from None
        if (manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]) != key:
            raise Refused(400, "BadRequest", "the name of the object does not match the URL")
        if len(key[2]) > 63 or not key[2].replace("-", "").isalnum() or key[2] != key[2].lower():
            raise Refused(422, "Invalid", f"metadata.name: {key[2]!r} is no RFC 1123 label")
        for label in manifest["metadata"].get("labels", {}).values():
            if len(label) > 63:
                raise Refused(422, "Invalid", f"label value {label!r} is longer than 63")
        known = self.objects.get(key)
        if known is None:
            self.managers[key] = query["fieldManager"]
            made = copy.deepcopy(manifest) | {"status": {}}
            self._put(key, made, "ADDED")
            return 201, made
        if known["spec"]["template"] != manifest["spec"]["template"]:
            raise Refused(422, "Invalid", "spec.template: field is immutable")
        if self.managers[key] != query["fieldManager"] and query.get("force") != "true":
            raise Refused(409, "Conflict", f"conflict with {self.managers[key]!r}")
        return 200, known

    def _put(self, key, found, what) -> None:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = found
        self.events.append((self.version, key[0], what, copy.deepcopy(found)))

    def _delete(self, key) -> None:
        found = self.objects.pop(key)
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, key[0], "DELETED", copy.deepcopy(found)))
        if key[0] == "Job":
            self._terminate(key[2])
            of_job = [
                one
                for one, pod in self.objects.items()
                if one[0] == "Pod" and pod["metadata"].get("labels", {}).get(JOB_NAME) == key[2]
            ]
            for pod in of_job:
                self._delete(pod)

    def _terminate(self, job: str) -> None:
        for (name, _), process in self.processes.items():
            if name == job and process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def compact(self) -> None:
        """Forget the events so far: a watch from an older version is answered 410."""
        with self.lock:
            self.version += 1
            self.oldest = self.version

    def cordon(self, name: str) -> None:
        with self.lock:
            self.cordoned.add(name)

    def uncordon(self, name: str) -> None:
        with self.lock:
            self.cordoned.discard(name)

    def _node(self, name: str):
        return {
            "kind": "Node", "metadata": {"name": name, "resourceVersion": str(self.version)},
            "spec": {"unschedulable": True} if name in self.cordoned else {},
            "status": {
                "allocatable": {self.resource: str(self.devices), "cpu": "4"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }  # fmt: skip

    def own_pod(self, name: str, devices: int) -> None:
        """A pod of somebody else's."""
        with self.lock:
            asked = {self.resource: str(devices)}
            pod = {
                "kind": "Pod", "metadata": {"name": name, "namespace": "other"}, "status": {"phase": "Running"},
                "spec": {"containers": [{"name": "x", "resources": {"requests": asked}}], "nodeName": "node-0"},
            }  # fmt: skip
            self._put(("Pod", "other", name), pod, "ADDED")

    # ---- the controllers -----------------------------------------------------------------------------------------------

    def _pods_on(self, node: str) -> list[dict]:
        return [
            found
            for (kind, _, _), found in self.objects.items()
            if kind == "Pod"
            and found["status"]["phase"] in ("Pending", "Running")
            and found["spec"]["nodeName"] == node
        ]

    def _room_for(self, template: dict, devices: int) -> str | None:
        """The node on which the scheduler puts a pod: free devices, not cordoned, no pod there that it keeps apart from."""
        terms = template["spec"].get("affinity", {}).get("podAntiAffinity", {})
        apart = [
            term["labelSelector"]["matchLabels"]
            for term in terms.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        ]
        for node in self.node_names:
            there = self._pods_on(node)
            used = sum(
                int(pod["spec"]["containers"][0]["resources"]["requests"][self.resource]) for pod in there
            )
            labels = [pod["metadata"].get("labels", {}) for pod in there]
            near = any(wanted.items() <= has.items() for wanted in apart for has in labels)
            if node not in self.cordoned and devices <= self.devices - used and not near:
                return node
        return None

    def _control(self) -> None:
        while not self.closed.wait(0.05):
            with self.lock:
                for key, job in sorted(self.objects.items()):
                    if key[0] == "Job":
                        self._reconcile(key, copy.deepcopy(job))

    def _reconcile(self, key, job) -> None:
        name, template = key[2], job["spec"]["template"]
        container = template["spec"]["containers"][0]
        devices = int(container["resources"]["requests"][self.resource])
        count = job["spec"].get("parallelism", 1)
        if job["spec"].get("suspend"):
            if devices * count <= sum(self.devices for _ in self.node_names) - sum(
                int(pod["spec"]["containers"][0]["resources"]["requests"][self.resource])
                for node in self.node_names
                for pod in self._pods_on(node)
            ):
                job["spec"]["suspend"] = False  # Kueue admits it, all pods or none
                self._put(key, job, "MODIFIED")
            return
        if job["status"].get("conditions"):
            return
        for index in range(count):
            node = None if (name, index) in self.processes else self._room_for(template, devices)
            if node is not None:
                self._start_pod(key, job, index, node)
        processes = [self.processes.get((name, index)) for index in range(count)]
        codes = [process.poll() for process in processes if process is not None]
        for index in [index for index in range(count) if processes[index] is not None]:
            self._pod_ended(("Pod", key[1], f"{name}-{index}"), processes[index].poll())
        running = codes.count(None)
        status = {"active": running, "ready": running} if running else {}
        if any(code not in (None, 0) for code in codes):
            self._terminate(name)  # backoffLimit 0
            if not running:
                status = {"conditions": [{"type": "Failed", "status": "True"}]}
        elif len(codes) == count and not running:
            status = {"conditions": [{"type": "Complete", "status": "True"}]}
        if status != job["status"]:
            job["status"] = status
            self._put(key, job, "MODIFIED")

    def _start_pod(self, key, job, index: int, node: str) -> None:
        template = job["spec"]["template"]
        container = template["spec"]["containers"][0]
        fields = {
            "status.podIP": "127.0.0.1",
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
        }
        env = {
            one["name"]: one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            for one in container.get("env", [])
        }
        self.processes[key[2], index] = subprocess.Popen(
            container["command"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **env},
        )  # fmt: skip
        labels = {**template["metadata"].get("labels", {}), JOB_NAME: key[2]}
        pod = {
            "kind": "Pod", "metadata": {"name": f"{key[2]}-{index}", "namespace": key[1], "labels": labels},
            "status": {"phase": "Running"}, "spec": {**template["spec"], "nodeName": node},
        }  # fmt: skip
        self._put(("Pod", key[1], f"{key[2]}-{index}"), pod, "ADDED")

    def _pod_ended(self, key, code: int | None) -> None:
        if code is None or key not in self.objects or self.objects[key]["status"]["phase"] != "Running":
            return
        pod = copy.deepcopy(self.objects[key])
        pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
        self._put(key, pod, "MODIFIED")

    def down(self) -> None:
        self.closed.set()
        self.server.shutdown()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
