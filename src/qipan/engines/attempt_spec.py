"""What an attempt's supervisor is told to start: its command, its environment, and how it is stopped."""

import os
import time
from pathlib import Path

import msgspec

from qipan.curves import Point
from qipan.engines.held import Held, Places
from qipan.engines.launcher import Launcher, free_port
from qipan.engines.shim import Spec
from qipan.leases import PARKING_SHARE
from qipan.tracing import environment_of_attempt
from qipan.workload import Launch, Task, foreach
from qipan.workload.task import RESERVED, Part, Stage

STOP_GRACE_S = 30.0
EVERY_S = 15.0  # between checkpoints of a stage, or of a task whose plan does not know their size
PARK_S = 5.0  # a checkpoint is given at least so long, of a lease that is long enough


def spec_of(places: Places, launcher: Launcher, held: Held, point: Point) -> Spec:
    """Makes the folders that the environment names, and the attempt's cgroup."""
    hold, folder = places.hold(held), places.attempt(held).task
    group, ranks, shares = launcher.groups(hold)
    launch = held.launch()
    own, run = bool(launch.task.run), launch.task.run
    if launch.task.foreach:
        run = foreach.script(run, launch.task.foreach)
    there = os.path.isdir(launch.task.workdir)  # False, too, where it may not be looked at or is no name
    return Spec(
        joined(launcher.command(hold, run), launch.task.part),
        environment(places, launcher, held, launch, point, ranks),
        cwd=(launch.task.workdir if there else str(folder)) if own else "",
        group=group,
        shares=shares,
        grace_s=STOP_GRACE_S,
        park_s=min(max(point.stop_s, PARK_S), held.lease_s * PARKING_SHARE),
        signal_on_stop=own,
        task=str(folder),
        folders=[str(places.saved(held.task_id, launch.task)), *_stage_folders(places, launch.task)],
    )


def environment(
    places: Places, launcher: Launcher, held: Held, launch: Launch, point: Point, ranks: list[str]
) -> dict[str, str]:
    """`ranks`: the cgroup of each device.  Makes the folders that it names."""
    task_id, folder = held.task_id, places.attempt(held).task
    checkpoints = places.saved(task_id, launch.task)
    checkpoints.mkdir(parents=True, exist_ok=True)
    own = environment_of_attempt(launch.attempt_env, task_id, held.attempt)
    return {
        **launcher.environment(places.hold(held)),
        **{name: value for name, value in launch.task.env if not name.startswith(RESERVED)},
        **own,
        **_stage_environment(places, launch.task),
        **_replica_environment(launch.task),
        "QIPAN_TASK_ID": task_id,
        "QIPAN_ATTEMPT": str(held.attempt),
        "QIPAN_ATTEMPT_DIR": str(folder),
        "QIPAN_NODE_RANK": "0",
        "QIPAN_CHECKPOINT_DIR": str(checkpoints),
        "QIPAN_CHECKPOINT_EVERY_S": str(every_s(launch.task, point) * held.order.checkpoint_longer),
        "QIPAN_EVENTS": str(folder / "events.jsonl"),
        "QIPAN_CONTROL": str(folder / "stop"),
        "QIPAN_STRATEGY": point.strategy.to_json() if point.strategy else "",
        "QIPAN_TASK": msgspec.json.encode(launch.task).decode(),
        "QIPAN_FENCE": ".".join(str(part) for part in (*held.order.fence, held.generation)),
        "QIPAN_LAUNCHED_S": str(time.time()),
        "QIPAN_RANK_GROUPS": ":".join(ranks),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def every_s(task: Task, point: Point) -> float:
    """Between checkpoints: as stated, or as planned, which is what their size and the rate that the point counts for them say.  A stage
    saves often: what feeds it keeps all that it has not saved."""
    if task.checkpoint.every_s is not None:
        return task.checkpoint.every_s
    if task.stage is not None:
        return EVERY_S
    size = point.storage_bytes / task.checkpoint.keep
    return size / point.storage_bytes_per_s if size and point.storage_bytes_per_s else EVERY_S


def _streams(places: Places, stage: Stage) -> Path:
    return places.checkpoints / f"{stage.of}.streams"


def _left_by(places: Places, stage: Stage) -> list[Path]:
    """What those that it comes after saved."""
    return [places.checkpoints / f"{stage.of}.{name}" for name in stage.after]


def _stage_folders(places: Places, task: Task) -> list[str]:
    if task.stage is None:
        return []
    return [str(one) for one in (_streams(places, task.stage), *_left_by(places, task.stage)) if one.is_dir()]


def _stage_environment(places: Places, task: Task) -> dict[str, str]:
    """Where a stage finds what others of its task stream to it or left."""
    stage = task.stage
    if stage is None:
        return {}
    streams = _streams(places, stage)
    streams.mkdir(parents=True, exist_ok=True)
    return {
        "QIPAN_STAGE": task.name,
        "QIPAN_STREAMS": str(streams),
        "QIPAN_AFTER": ":".join(map(str, _left_by(places, stage))),
        "QIPAN_FEEDS": stage.feeds,
        "QIPAN_SAMPLES": str(stage.samples),
        "QIPAN_AHEAD_BYTES": str(stage.ahead_bytes),
    }


def _replica_environment(task: Task) -> dict[str, str]:
    if task.replica is None:
        return {}
    return {"QIPAN_SERVICE": task.replica.of, "QIPAN_REPLICA": str(task.replica.number)}


def joined(command: list[str], part: Part | None) -> list[str]:
    """The same command as one node of its site's world."""
    if part is None or part.nodes == 1:
        return command
    host, _, port = part.endpoint.rpartition(":")
    own = [word for word in command if not word.startswith(("--nnodes=", "--rdzv-"))]
    at = own.index("--max-restarts=0")
    more = [
        f"--nnodes={part.nodes}",
        f"--node-rank={part.node_rank}",
        f"--master-addr={host}",
        f"--master-port={port}",
    ]
    return [*own[:at], *more, *own[at:]]
