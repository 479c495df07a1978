"""What a run of the twin came to: figures, one row for each data centre and each task, and utilisation over time."""

from collections.abc import Mapping, Sequence
from typing import Any

from qipan.hardware import BoardId
from qipan.leases import Order, TaskId
from qipan.scheduler.why import why_waiting
from qipan.twin.electricity import Electricity, leaves
from qipan.twin.world import World

#: seconds of one value of the utilisation series
BUCKET_S = 600.0


def report_of(
    world: World, orders: Sequence[Order], finished: Mapping[TaskId, float], hours: float
) -> dict[str, Any]:
    lives = [
        (board, *life) for board in sorted(world.tree.engines) for life in world.simulated(board).lifetimes
    ]
    tasks = task_rows(world, orders, finished, lives)
    ended_s = max(finished.values(), default=0.0)
    return {
        "figures": figures(world, tasks, lives),
        "clusters": [_cluster(world, board, lives, hours * 3600) for board in sorted(world.tree.engines)],
        "tasks": tasks,
        "series": {
            "bucket_s": BUCKET_S,
            "leased_share": {
                board: _series(lives, board, devices_of(world, board), ended_s)
                for board in sorted(world.tree.engines)
            },
        },
        "tree": tree_of(world),
    }


def task_rows(
    world: World, orders: Sequence[Order], finished: Mapping[TaskId, float], lives: Sequence[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    ran: dict[TaskId, list[tuple[Any, ...]]] = {}
    for life in lives:
        ran.setdefault(life[1], []).append(life)
    rows = []
    for order in orders:
        own = sorted(ran.get(order.task_id, []), key=lambda life: life[5])
        ended_s = finished.get(order.task_id)
        rows.append({
            "task_id": order.task_id,
            "tenant": order.tenant,
            "submitted_s": round(order.submitted_s, 1),
            "started_s": round(own[0][5], 1) if own else None,
            "ended_s": round(ended_s, 1) if ended_s is not None else None,
            "jct_s": round(ended_s - order.submitted_s, 1) if ended_s is not None else None,
            "outcome": world.tree.root.state.over.get(order.task_id, "not over"),
            "on_time": None if order.deadline_s is None or ended_s is None else ended_s <= order.deadline_s,
            "attempts": len(own),
            "device_hours": round(sum(life[4] * (life[6] - life[5]) for life in own) / 3600, 3),
            "where": " ".join(dict.fromkeys(str(life[0]) for life in own)),
        })  # fmt: skip
    return rows


def figures(
    world: World, tasks: Sequence[Mapping[str, Any]], lives: Sequence[tuple[Any, ...]]
) -> dict[str, Any]:
    lengths = sorted(task["jct_s"] for task in tasks if task["jct_s"] is not None)
    waits = sorted(task["started_s"] - task["submitted_s"] for task in tasks if task["started_s"] is not None)
    last_s = max((task["ended_s"] for task in tasks if task["ended_s"] is not None), default=0.0)
    makespan_s = last_s - min(task["submitted_s"] for task in tasks)
    devices = sum(pool.devices for board in world.tree.spec.walk() for pool in board.pools)
    held_s = sum(life[4] * (life[6] - life[5]) for life in lives)
    due = [task["on_time"] for task in tasks if task["on_time"] is not None]
    return {
        "tasks": len(tasks),
        "done": sum(task["outcome"] == "done" for task in tasks),
        "mean_jct_h": round(sum(lengths) / max(1, len(lengths)) / 3600, 3),
        "p95_jct_h": round(lengths[int(len(lengths) * 0.95)] / 3600, 3) if lengths else 0.0,
        "mean_wait_h": round(sum(waits) / max(1, len(waits)) / 3600, 3),
        "makespan_h": round(makespan_s / 3600, 3),
        "leased_share": round(held_s / max(1.0, devices * makespan_s), 4),
        "deadlines_met": f"{sum(due)} of {len(due)}",
        "attempts": len(lives),
        "ticks": sum(controller.state.tick for controller in world.tree.controllers.values()),
    }


def add_electricity(report: dict[str, Any], world: World, electricity: Electricity) -> None:
    """What was drawn while devices were leased, and what that cost, of each data centre and in all."""
    drawn = {}
    for above, spec in leaves(world.tree.spec):
        lives = [
            (chip, count, start_s, end_s)
            for _, _, chip, count, start_s, end_s in world.simulated(spec.board).lifetimes
        ]
        drawn[spec.board] = electricity.drawn(above, lives)
    for row in report["clusters"]:
        kwh, micro_cny = drawn[row["cluster"]]
        row["electricity_kwh"], row["electricity_cny"] = round(kwh, 1), round(micro_cny / 1e6, 2)
    report["figures"]["electricity_kwh"] = round(sum(kwh for kwh, _ in drawn.values()), 1)
    report["figures"]["electricity_cny"] = round(sum(micro for _, micro in drawn.values()) / 1e6, 2)


def why_of(world: World, task_id: TaskId) -> dict[str, Any]:
    """As `qipan why` tells it: the decisions of every board until now, and what the task waits for."""
    told = [
        {"at_s": at_s, "board": board, "verdict": verdict, "text": text, "task_id": task_id}
        for board, controller in world.tree.controllers.items()
        for at_s, verdict, text in controller.store.reasons_of(task_id)
    ]
    told.sort(
        key=lambda entry: float(str(entry["at_s"]))
    )  # boards in the order of the tree: the sort is stable
    root = world.tree.root.state
    state = root.over.get(task_id) or (
        root.tasks[task_id].phase.value if task_id in root.tasks else "not submitted yet"
    )
    waiting = why_waiting(root, task_id, world.clock.now_s(), world.clock.lease_s())
    return {"task_id": task_id, "state": str(state), "decisions": told, "waiting": waiting}


def devices_of(world: World, board: BoardId) -> int:
    return sum(pool.devices for spec in world.tree.spec.walk() if spec.board == board for pool in spec.pools)


def _cluster(world: World, board: BoardId, lives: Sequence[tuple[Any, ...]], span_s: float) -> dict[str, Any]:
    spec = next(spec for spec in world.tree.spec.walk() if spec.board == board)
    own = [life for life in lives if life[0] == board]
    devices = devices_of(world, board)
    held_s = sum(life[4] * max(0.0, min(life[6], span_s) - min(life[5], span_s)) for life in own)
    return {
        "cluster": board,
        "region": spec.region,
        "chips": " ".join(f"{pool.chip_class}:{pool.devices}" for pool in spec.pools),
        "devices": devices,
        "leased_share": round(held_s / (devices * span_s), 4),
        "device_hours": round(sum(life[4] * (life[6] - life[5]) for life in own) / 3600, 1),
        "attempts": len(own),
        "tasks": len({life[1] for life in own}),
    }


def _series(lives: Sequence[tuple[Any, ...]], board: BoardId, devices: int, end_s: float) -> list[float]:
    """Share of the devices that was leased, for each BUCKET_S."""
    held = [0.0] * (int(end_s // BUCKET_S) + 1)
    for name, _, _, _, count, start_s, stop_s in lives:
        if name != board:
            continue
        for bucket in range(int(start_s // BUCKET_S), int(stop_s // BUCKET_S) + 1):
            inside_s = min(stop_s, (bucket + 1) * BUCKET_S) - max(start_s, bucket * BUCKET_S)
            if bucket < len(held):
                held[bucket] += count * max(0.0, inside_s)
    return [round(value / (devices * BUCKET_S), 4) for value in held]


def tree_of(world: World) -> list[dict[str, Any]]:
    """One row for each board, parents first."""
    rows = []

    def walk(spec: Any, depth: int) -> None:
        rows.append(
            {
                "board": spec.board,
                "depth": depth,
                "devices": sum(p.devices for own in spec.walk() for p in own.pools),
            }
        )
        for child in spec.children:
            walk(child, depth + 1)

    walk(world.tree.spec, 0)
    return rows
