"""SkyPilot tasks, dstack configurations and Compose files: a shell command with resources."""

import re
import shlex

from qipan.errors import InvalidInput
from qipan.quantities import format_devices, parse_duration_s
from qipan.workload.imports.directive import Source, task_name
from qipan.workload.task import Kind, Limits, Shape, Task

#: one address a line, the first node's first
NODE_IPS = '$(printf %s "${QIPAN_NODE_ADDRESSES:-${MASTER_ADDR:-127.0.0.1}}" | tr , "\\n")'
DEVICE = re.compile(r"([A-Za-z][\w.-]*)(?::([0-9]{1,6}))?")


def skypilot_task(source: Source, workdir: str) -> Task:
    """A SkyPilot task YAML: num_nodes times resources.accelerators."""
    run = source.text("run")
    if not run:
        raise source.error("run", "is missing; a task needs its command")
    if source.get("service") is not None:
        raise source.error("service", "is a SkyServe service; write it as `kind: serve` with slo and load")
    nodes = source.whole("num_nodes", 1, 1)
    per_node, chips = _accelerators(source)
    count = nodes * max(1, per_node)
    source.mark("used", "num_nodes", f"devices: {count} in all")
    source.mark("used", "run", "run")
    source.mark("approximated", "setup", "runs before each attempt, in the node's own environment")
    name = task_name(source.text("name"), "sky")
    source.mark("used", "name", f"name: {name}")
    for key in ("cloud", "infra", "region", "zone", "instance_type", "any_of", "ordered"):
        source.mark(
            "ignored",
            f"resources.{key}",
            "Qipan chooses the place; state limits.regions to keep it somewhere",
        )
    for key in ("cpus", "memory", "disk_size", "disk_tier"):
        source.mark("ignored", f"resources.{key}", "comes with the devices of a pool")
    source.mark(
        "ignored", "resources.use_spot", "every task may lose its devices and goes on from its checkpoint"
    )
    source.mark("ignored", "resources.job_recovery", "every task goes on from its checkpoint")
    source.mark("ignored", "resources.image_id", "images are not run yet")
    source.mark("ignored", "file_mounts", "nothing is copied; state `data` and `checkpoint.to`")
    source.mark("ignored", "secrets", "secrets are not read from files")
    place = source.text("workdir")
    source.mark("used", "workdir", "where the command starts")
    prologue = (
        f"export SKYPILOT_NUM_NODES={nodes} SKYPILOT_NUM_GPUS_PER_NODE={per_node}\n"
        f'export SKYPILOT_NODE_RANK="${{QIPAN_NODE_RANK:-0}}" SKYPILOT_NODE_IPS="{NODE_IPS}"\n'
        'export SKYPILOT_TASK_ID="$QIPAN_TASK_ID" SKYPILOT_SETUP_NODE_RANK="$SKYPILOT_NODE_RANK" '
        'SKYPILOT_SETUP_NODE_IPS="$SKYPILOT_NODE_IPS" '
        'SKYPILOT_CLUSTER_INFO=\'{"cluster_name":"qipan","cloud":"","region":"","zone":""}\'\n'
    )
    setup = source.text("setup")
    body = prologue + (f"(\nset -e\n{setup.rstrip()}\n) || exit $?\n" if setup else "") + run
    source.mark("used", "envs", "env")
    env = tuple((key, source.text(f'envs."{key}"')) for key in source.mapping("envs"))
    return Task(
        "train", name, run=body, env=env, devices=Shape(count, count, max(1, per_node) if nodes > 1 else 0),
        limits=Limits(chips=chips), workdir=_below(workdir, place),
    )  # fmt: skip


def dstack_task(source: Source, workdir: str) -> Task:
    """A dstack `type: task` (a dev-environment becomes kind dev); nodes times resources.gpu."""
    kind = source.text("type")
    if kind not in ("task", "dev-environment"):
        raise source.error("type", f"{kind!r} is not read; Qipan reads type: task and type: dev-environment")
    commands = source.words("commands")
    if kind == "task" and not commands:
        raise source.error("commands", "is missing; a task needs its commands")
    nodes = source.whole("nodes", 1, 1)
    per_node, chips = _gpu(source)
    count, name = nodes * max(1, per_node), task_name(source.text("name"), "dstack")
    source.mark("used", "type", f"kind: {'train' if kind == 'task' else 'dev'}")
    source.mark("used", "name", f"name: {name}")
    source.mark("used", "nodes", f"devices: {count} in all")
    source.mark("used", "commands", "run, ended by the first command that fails")
    source.mark("ignored", "image", "images are not run yet")
    source.mark("ignored", "python", "the node's own Python runs")
    source.mark("ignored", "spot_policy", "every task may lose its devices and goes on from its checkpoint")
    source.mark("ignored", "max_price", "is dollars an hour; state limits.max_cost in CNY")
    source.mark("ignored", "retry", "Qipan tries again by itself")
    for key in ("backends", "regions", "instance_types", "fleets", "resources.cpu", "resources.memory",
                "resources.disk", "resources.shm_size"):  # fmt: skip
        source.mark("ignored", key, "Qipan chooses the place; these come with the devices of a pool")
    for key in ("repos", "files", "volumes"):
        source.mark("ignored", key, "nothing is copied or mounted; state `data` and `checkpoint.to`")
    limit_s = None
    duration = source.text("max_duration")
    if duration and duration != "off":
        try:
            limit_s = parse_duration_s(duration)
        except InvalidInput as error:
            raise source.error("max_duration", str(error)) from None
        source.mark("used", "max_duration", f"limits.time: {limit_s:.0f}s")
    prologue = (
        f"export DSTACK_RUN_NAME={shlex.quote(name)} DSTACK_NODES_NUM={nodes} DSTACK_GPUS_PER_NODE={per_node} "
        f"DSTACK_GPUS_NUM={nodes * per_node}\n"
        'export DSTACK_NODE_RANK="${QIPAN_NODE_RANK:-0}" DSTACK_MASTER_NODE_IP="${MASTER_ADDR:-127.0.0.1}" '
        f'DSTACK_NODES_IPS="{NODE_IPS}"\nset -e\n'
    )
    task_kind: Kind = "train" if kind == "task" else "dev"
    return Task(
        task_kind, name, run=prologue + "\n".join(commands or ["exec sleep infinity"]), env=_environment(source, "env"),
        devices=Shape(count, count, max(1, per_node) if nodes > 1 else 0),
        limits=Limits(chips=chips, time_limit_s=limit_s), workdir=workdir,
    )  # fmt: skip


def compose_task(source: Source, workdir: str) -> Task:
    """A Compose file with one service that has a command; several services have no counterpart yet."""
    services = list(source.mapping("services"))
    if len(services) != 1:
        raise source.error(
            "services", f"{len(services)} services ({', '.join(services)[:80]}); Qipan reads a file with one"
        )
    top = f'services."{services[0]}"'
    words = [word for key in ("entrypoint", "command") for word in _words(source, f"{top}.{key}")]
    if not words:
        raise source.error(top, "has no command; the image's own entry point is unknown: write `command:`")
    count, vendors = 0, set()
    for i in range(len(source.items(f"{top}.deploy.resources.reservations.devices"))):
        at = f"{top}.deploy.resources.reservations.devices[{i}]"
        ids = source.words(f"{at}.device_ids")
        every = source.text(f"{at}.count") == "all"
        count += len(ids) or (1 if every else source.whole(f"{at}.count", 1, 1))
        vendors |= {source.text(f"{at}.driver")} - {""}
        source.mark("used", at, "devices")
        source.mark("approximated", f"{at}.device_ids", "their number; Qipan chooses which")
        if every:
            source.mark("approximated", f"{at}.count", "`all` is read as 1; state a number")
    name = task_name(source.text("name") or services[0], "compose")
    source.mark("used", "name", f"name: {name}")
    for key in ("entrypoint", "command"):
        source.mark("used", f"{top}.{key}", "run")
    source.mark("used", f"{top}.environment", "env")
    source.mark("ignored", "version", "the form of the file")
    for key in ("image", "build", "working_dir", "user", "shm_size", "ipc", "runtime"):
        source.mark("ignored", f"{top}.{key}", "runs in the node's own environment; images are not run yet")
    source.mark("ignored", f"{top}.volumes", "volumes are not mounted; state `data` and `checkpoint.to`")
    source.mark("ignored", "volumes", "volumes are not mounted")
    source.mark("ignored", f"{top}.ports", "nothing is published")
    source.mark("ignored", f"{top}.restart", "a task goes on from its checkpoint")
    source.mark("ignored", f"{top}.env_file", "is not read; write the values under `environment`")
    devices = max(1, count)
    return Task(
        "train", name, run=shlex.join(words), env=_environment(source, f"{top}.environment"),
        devices=Shape(devices, devices), limits=Limits(vendors=tuple(sorted(vendors))), workdir=workdir,
    )  # fmt: skip


def _accelerators(source: Source) -> tuple[int, tuple[str, ...]]:
    """`H100:8`, `{H100: 8}`, `[H100:8, A100:8]` (any of them, which must be equal in number)."""
    at = "resources.accelerators"
    found = source.get(at)
    if found is None:
        return 0, ()
    if isinstance(found, dict):
        words = [f"{key}:{count}" for key, count in found.items()]
    else:
        words = [found] if isinstance(found, str) else source.words(at)
    pairs = [_device(source, at, word) for word in words]
    if not pairs:
        raise source.error(at, "names no device; write H100:8, or leave it out")
    counts = {count for _, count in pairs}
    if len(counts) > 1:
        source.mark("approximated", at, f"any of them, {max(counts)} a node")
    else:
        source.mark("used", at, f"{format_devices(max(counts))} a node, limits.chips")
    return max(counts), tuple(chip for chip, _ in pairs)


def _gpu(source: Source) -> tuple[int, tuple[str, ...]]:
    """`H100:8`, `24GB`, `2`, `24GB:2`, or `{name, count, memory}`; memory asks nothing of Qipan yet."""
    at, found = "resources.gpu", source.get("resources.gpu")
    if found is None:
        return 0, ()
    if isinstance(found, dict):
        count = source.whole(f"{at}.count", 1, 1)
        source.mark("used", f"{at}.count", "devices a node")
        names = source.get(f"{at}.name") or []
        names = [names] if isinstance(names, str) else source.words(f"{at}.name")
        source.mark("used", f"{at}.name", "limits.chips")
        source.mark("ignored", f"{at}.memory", "state limits.chips for chips with this much memory")
        return count, tuple(f"*/*{each.lower()}*" for each in names)
    parts = source.text(at).split(":")
    counts = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 7]
    names = [part for part in parts if re.fullmatch(r"[A-Za-z][\w-]*", part)]
    memory = [
        part for part in parts if re.fullmatch(r"[0-9]+(GB)?(\.\.)?([0-9]+GB)?", part) and not part.isdigit()
    ]
    if len(counts) + len(names) + len(memory) != len(parts) or len(counts) > 1:
        raise source.error(at, f"{source.text(at)[:60]!r} is not a GPU such as H100:8 or 24GB")
    source.mark(
        "approximated" if memory else "used",
        at,
        "devices and limits.chips" + ("; memory is not asked for" if memory else ""),
    )
    return (counts or [1])[0], tuple(f"*/*{each.lower()}*" for each in names)


def _device(source: Source, at: str, word: str) -> tuple[str, int]:
    match = DEVICE.fullmatch(word)
    if match is None or match[2] == "0":
        raise source.error(at, f"{word[:40]!r} is not devices such as H100:8")
    return f"*/*{match[1].lower()}*", int(match[2] or 1)


def _environment(source: Source, path: str) -> tuple[tuple[str, str], ...]:
    """A mapping, or a list of NAME=VALUE; a name alone is taken from nobody's environment."""
    source.mark("used", path, "env")
    found = source.get(path)
    if isinstance(found, dict):
        return tuple((key, source.text(f'{path}."{key}"')) for key in found)
    words = source.words(path)
    if any("=" not in word for word in words):
        source.mark(
            "approximated",
            path,
            "stated values are set; a name without `=` is not taken from your environment",
        )
    pairs = [word.partition("=") for word in words if "=" in word]
    return tuple((name, value) for name, _, value in pairs)


def _words(source: Source, path: str) -> list[str]:
    found = source.get(path)
    if isinstance(found, str):
        try:
            return shlex.split(found)
        except ValueError as error:
            raise source.error(path, f"cannot be read as a command: {error}") from None
    return source.words(path)


def _below(workdir: str, place: str) -> str:
    if not place or place == ".":
        return workdir
    return place if place.startswith(("/", "~")) else f"{workdir}/{place.removeprefix('./')}"
