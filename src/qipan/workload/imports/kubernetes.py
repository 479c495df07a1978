"""Kubernetes Job, PyTorchJob (Kubeflow), JobSet and RayJob: one manifest becomes one task."""

import re
import shlex
from collections.abc import Callable

from qipan.quantities import format_devices
from qipan.workload.imports.directive import Source, read_documents, task_name
from qipan.workload.task import Limits, Shape, Task

#: extended resource -> what the chips must be (device plugins' own names)
RESOURCES = {
    "nvidia.com/gpu": "nvidia", "amd.com/gpu": "amd", "habana.ai/gaudi": "intel", "huawei.com/Ascend910": "huawei",
    "huawei.com/Ascend910B": "huawei", "cambricon.com/mlu": "cambricon", "hygon.com/dcu": "hygon",
    "metax-tech.com/gpu": "metax", "mthreads.com/gpu": "mthreads", "iluvatar.com/gpu": "iluvatar",
}  # fmt: skip
PRODUCTS = ("nvidia.com/gpu.product", "accelerator", "cloud.google.com/gke-accelerator")
POD_IGNORED = {
    "tolerations": "Qipan chooses the place", "affinity": "Qipan chooses the place",
    "schedulerName": "Qipan schedules", "priorityClassName": "Qipan bids by max_cost and deadline",
    "volumes": "volumes are not mounted; state `data` and `checkpoint.to`", "restartPolicy": "a task goes on from its checkpoint",
    "serviceAccountName": "the task has Qipan's own identity", "initContainers": "only the first container runs",
}  # fmt: skip
CONTAINER_IGNORED = {
    "image": "runs in the node's own environment; images are not run yet",
    "imagePullPolicy": "images are not run yet",
    "volumeMounts": "volumes are not mounted; state `data` and `checkpoint.to`",
    "ports": "nothing is published",
    "workingDir": "a folder of the image; the task starts in the file's folder",
}


def job_task(source: Source, workdir: str) -> Task:
    """batch/v1 Job.  Indexed completions become foreach."""
    name = _named(source)
    pods = source.whole("spec.parallelism", 1, 1)
    completions = source.whole("spec.completions", 1, 1)
    indexed = source.text("spec.completionMode") == "Indexed" and completions > pods
    source.mark(
        "used" if pods == 1 else "approximated", "spec.parallelism", "devices are those of all pods together"
    )
    source.mark("approximated", "spec.completions", "foreach" if indexed else "the task runs once")
    source.mark(
        "approximated",
        "spec.completionMode",
        "foreach" if indexed else "one task, JOB_COMPLETION_INDEX is set",
    )
    if completions > 10_000:
        raise source.error("spec.completions", f"{completions} is more than 10000; submit several")
    index = "QIPAN_ITEM" if indexed else "QIPAN_NODE_RANK"
    wanted = source.text("spec.completionMode") == "Indexed"  # the only mode in which Kubernetes sets it
    prologue = f'export JOB_COMPLETION_INDEX="${{{index}:-0}}"\n' if wanted else ""
    return _pod_task(
        source, name, "spec.template.spec", pods, prologue, workdir, _limit_s(source, "spec.activeDeadlineSeconds"),
        foreach=tuple(str(index) for index in range(completions)) if indexed else (),
    )  # fmt: skip


def pytorch_task(source: Source, workdir: str) -> Task:
    """kubeflow.org/v1 PyTorchJob: all replicas run the Worker's (else the Master's) command."""
    name, top = _named(source), "spec.pytorchReplicaSpecs"
    roles = list(source.mapping(top))
    if not roles or not set(roles) <= {"Master", "Worker"}:
        raise source.error(top, f"needs Master, Worker or both, found {', '.join(roles) or 'none'}")
    pods = sum(source.whole(f"{top}.{role}.replicas", 1, 1) for role in roles)
    role = "Master" if "Master" in roles else "Worker"
    for each in roles:
        source.mark("approximated", f"{top}.{each}.replicas", f"{pods} pods become the devices of one task")
        if each != role:
            source.mark("approximated", f"{top}.{each}.template", f"taken to be the same as {role}'s")
    elastic = None
    if source.get("spec.elasticPolicy") is not None:
        elastic = (
            source.whole("spec.elasticPolicy.minReplicas", 1, 1),
            source.whole("spec.elasticPolicy.maxReplicas", pods, 1),
        )
        for key in ("minReplicas", "maxReplicas"):
            source.mark("used", f"spec.elasticPolicy.{key}", "elastic: true, devices between the two")
        source.mark(
            "ignored", "spec.elasticPolicy.rdzvBackend", "Qipan starts the ranks of each attempt itself"
        )
    source.mark("ignored", "spec.runPolicy", "Qipan cleans up and tries again by itself")
    prologue = (
        f'export WORLD_SIZE="${{WORLD_SIZE:-{pods}}}" RANK="${{QIPAN_NODE_RANK:-0}}" PYTHONUNBUFFERED=1\n'
        f'export PET_NNODES="{pods}" PET_NODE_RANK="${{QIPAN_NODE_RANK:-0}}" '
        'PET_MASTER_ADDR="$MASTER_ADDR" PET_MASTER_PORT="$MASTER_PORT"\n'
    )
    limit_s = _limit_s(source, "spec.runPolicy.activeDeadlineSeconds")
    return _pod_task(
        source, name, f"{top}.{role}.template.spec", pods, prologue, workdir, limit_s, elastic=elastic
    )


def jobset_task(source: Source, workdir: str) -> Task:
    """jobset.x-k8s.io JobSet with one replicated job; several have no counterpart yet."""
    name, jobs = _named(source), source.items("spec.replicatedJobs")
    if len(jobs) != 1:
        raise source.error(
            "spec.replicatedJobs",
            f"{len(jobs)} jobs; Qipan reads a JobSet with one: write the others as tasks of their own",
        )
    top = "spec.replicatedJobs[0]"
    replicas = source.whole(f"{top}.replicas", 1, 1)
    pods = replicas * source.whole(f"{top}.template.spec.parallelism", 1, 1)
    for key in ("replicas", "template.spec.parallelism", "template.spec.completions"):
        source.mark("approximated", f"{top}.{key}", f"{pods} pods become the devices of one task")
    source.mark("ignored", "spec.network", "one task has one network")
    source.mark(
        "ignored", "spec.failurePolicy", "a task that loses a node always goes on from its checkpoint"
    )
    prologue = 'export JOB_COMPLETION_INDEX="${QIPAN_NODE_RANK:-0}" JOB_INDEX=0\n'
    limit_s = _limit_s(source, f"{top}.template.spec.activeDeadlineSeconds")
    return _pod_task(source, name, f"{top}.template.spec.template.spec", pods, prologue, workdir, limit_s)


def ray_task(source: Source, workdir: str) -> Task:
    """ray.io/v1 RayJob: the entrypoint runs; workers are counted for devices."""
    name, run = _named(source), source.text("spec.entrypoint")
    if not run:
        raise source.error("spec.entrypoint", "is missing; a RayJob needs its command")
    source.mark(
        "approximated", "spec.entrypoint", "run, without a Ray cluster: ray.init() starts one on the node"
    )
    env: list[tuple[str, str]] = []
    if source.text("spec.runtimeEnvYAML"):
        inner = read_documents(source.text("spec.runtimeEnvYAML"), f"{source.file}: runtimeEnvYAML")[0]
        env = [(key, inner.text(f'env_vars."{key}"')) for key in inner.mapping("env_vars")]
        source.mark(
            "approximated",
            "spec.runtimeEnvYAML",
            "env_vars are set; packages and working_dir are not installed",
        )
    least = most = 0
    vendors: set[str] = set()
    for i in range(len(source.items("spec.rayClusterSpec.workerGroupSpecs"))):
        group = f"spec.rayClusterSpec.workerGroupSpecs[{i}]"
        per_pod, vendor = _devices(source, f"{group}.template.spec.containers[0]")
        vendors |= {vendor} - {""}
        replicas = source.whole(f"{group}.replicas", 1)
        least += per_pod * (source.whole(f"{group}.minReplicas", replicas))
        most += per_pod * (source.whole(f"{group}.maxReplicas", replicas))
        for key in ("replicas", "minReplicas", "maxReplicas"):
            source.mark("approximated", f"{group}.{key}", "devices of all workers together")
        _ignore_pod(source, f"{group}.template.spec")
        source.mark("ignored", f"{group}.rayStartParams", "no Ray cluster is started")
    source.mark("ignored", "spec.rayClusterSpec.headGroupSpec", "no Ray head is started")
    source.mark("ignored", "spec.shutdownAfterJobFinishes", "devices are always given back at the end")
    least, most = max(1, least), max(1, least, most)
    limit_s = _limit_s(source, "spec.activeDeadlineSeconds")
    return Task(
        "train", name, run=run, env=tuple(env), devices=Shape(least, most), elastic=least < most, workdir=workdir,
        limits=Limits(vendors=tuple(sorted(vendors)), time_limit_s=limit_s),
    )  # fmt: skip


TRANSLATORS: dict[str, Callable[[Source, str], Task]] = {
    "Job": job_task,
    "PyTorchJob": pytorch_task,
    "JobSet": jobset_task,
    "RayJob": ray_task,
}


def _named(source: Source) -> str:
    """Marks what every manifest has."""
    name = task_name(source.text("metadata.name") or source.text("metadata.generateName"))
    source.mark("used", "apiVersion", "which kind of file this is")
    source.mark("used", "kind", "which kind of file this is")
    source.mark("used", "metadata.name", f"name: {name}")
    source.mark("approximated", "metadata.generateName", f"name: {name}, without a random end")
    source.mark("ignored", "metadata.namespace", "the tenant and the board are chosen at submission")
    for key in ("labels", "annotations"):
        source.mark("ignored", f"metadata.{key}", "labels choose nothing in Qipan")
    source.mark("ignored", "spec.backoffLimit", "Qipan tries again by itself")
    source.mark("ignored", "spec.ttlSecondsAfterFinished", "a task stays in the store")
    return name


def _pod_task(
    source: Source, name: str, pod: str, pods: int, prologue: str, workdir: str, limit_s: float | None, *,
    elastic: tuple[int, int] | None = None, foreach: tuple[str, ...] = (),
) -> Task:  # fmt: skip
    box = f"{pod}.containers[0]"
    if not source.items(f"{pod}.containers"):
        raise source.error(pod, "has no containers")
    per_pod, vendor = _devices(source, box)
    count = pods * max(1, per_pod)
    shape = Shape(count, count, max(1, per_pod) if pods > 1 else 0)
    if elastic:
        shape = Shape(max(1, per_pod) * elastic[0], max(1, per_pod) * elastic[1], shape.per_node)
        if shape.max < shape.min:
            raise source.error(
                "spec.elasticPolicy", f"maxReplicas {elastic[1]} is below minReplicas {elastic[0]}"
            )
    _ignore_pod(source, pod)
    return Task(
        "batch" if foreach else "train", name, run=prologue + _command(source, box), env=_env(source, box),
        devices=shape, elastic=shape.min < shape.max, foreach=foreach, workdir=workdir,
        limits=Limits(vendors=(vendor,) if vendor else (), chips=_chips(source, pod), time_limit_s=limit_s),
    )  # fmt: skip


def _command(source: Source, box: str) -> str:
    """The container's command and arguments as one shell line; `$(NAME)` becomes `${NAME}` as Kubernetes expands it."""
    words = source.words(f"{box}.command") + source.words(f"{box}.args")
    if not source.words(f"{box}.command"):
        raise source.error(box, "has no command; the image's own entry point is unknown: write `command:`")
    for key in ("command", "args"):
        source.mark("used", f"{box}.{key}", "run")
    return " ".join(_expanded(word) for word in words)


def _expanded(word: str) -> str:
    """Plain parts quoted, references to variables left to the shell inside double quotes."""
    parts = re.split(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", word)
    if len(parts) == 1:
        return shlex.quote(word)
    return "".join(
        f'"${{{part}}}"' if i % 2 else (shlex.quote(part) if part else "") for i, part in enumerate(parts)
    )


def _env(source: Source, box: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for i in range(len(source.items(f"{box}.env"))):
        at = f"{box}.env[{i}]"
        if source.get(f"{at}.valueFrom") is not None:
            source.mark(
                "ignored", at, "secrets and fields of the pod are not read; set the value under `env`"
            )
            continue
        source.mark("used", at, "env")
        pairs.append((source.text(f"{at}.name"), source.text(f"{at}.value")))
    return tuple(pairs)


def _devices(source: Source, box: str) -> tuple[int, str]:
    """Devices of one pod and their vendor, from the extended resources (limits, else requests)."""
    for part in ("limits", "requests"):
        for resource in source.mapping(f"{box}.resources.{part}"):
            if resource in RESOURCES:
                count = source.whole(f'{box}.resources.{part}."{resource}"', 0)
                for each in ("limits", "requests"):
                    source.mark(
                        "used",
                        f'{box}.resources.{each}."{resource}"',
                        f"{format_devices(count)} a pod, vendors: {RESOURCES[resource]}",
                    )
                return count, RESOURCES[resource]
    return 0, ""


def _chips(source: Source, pod: str) -> tuple[str, ...]:
    """A node selector by product becomes a pattern of chip classes."""
    for key in source.mapping(f"{pod}.nodeSelector"):
        if key in PRODUCTS:
            product = source.text(f'{pod}.nodeSelector."{key}"').lower()
            match = re.search(r"[a-z]*[0-9]{2,4}[a-z]*[0-9]*", product.replace("nvidia-", ""))
            if match:
                chip = f"*/*{match[0]}*"
                source.mark("approximated", f'{pod}.nodeSelector."{key}"', f"limits.chips: {chip}")
                return (chip,)
    return ()


def _ignore_pod(source: Source, pod: str) -> None:
    for key, why in POD_IGNORED.items():
        source.mark("ignored", f"{pod}.{key}", why)
    source.mark("ignored", f"{pod}.nodeSelector", "Qipan chooses the place")
    for i in range(len(source.items(f"{pod}.containers"))):
        if i:
            source.mark("ignored", f"{pod}.containers[{i}]", "only the first container runs")
            continue
        source.mark("used", f"{pod}.containers[0].name", "a label only")
        source.mark(
            "ignored",
            f"{pod}.containers[0].resources",
            "cores and host memory come with the devices of a pool",
        )
        for key, why in CONTAINER_IGNORED.items():
            source.mark("ignored", f"{pod}.containers[0].{key}", why)


def _limit_s(source: Source, path: str) -> float | None:
    if source.get(path) is None:
        return None
    seconds = source.whole(path, 1, 1)
    source.mark("used", path, f"limits.time: {seconds}s")
    return float(seconds)
