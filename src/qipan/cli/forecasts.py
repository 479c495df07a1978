"""`qipan forecast`: what a service should ask for, learnt from what its replicas' devices did."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from qipan.cli.options import Json, StoreDir, finite
from qipan.errors import InvalidInput
from qipan.forecast import Busy, Hours, Learnt, learnt, steps_of


def forecast(
    task: str,
    busy: Annotated[
        float,
        typer.Option(
            min=0.05, max=1.0, callback=finite, help="Share of the time that a replica's devices should work."
        ),
    ] = 0.7,
    json_: Json = False,
    store: StoreDir = None,
) -> None:
    """How many replicas a service should have asked for by the hour, from how much their devices worked: a `forecast` for its task file."""
    from qipan.cli.app import client, tell

    events = list(client(store).list(f"/tasks/{task}/events", "events"))
    hours = hours_in(events)
    if not hours:
        raise InvalidInput(f"{task} is no service: only `kind: serve` with `run` has a forecast")
    if any(one["fact"].get("order", {}).get("task_id") == task for one in events):
        raise InvalidInput(f"{task} is one replica of a service; ask for {task.rpartition('.')[0]}")
    found = learnt(hours, record_in(events), busy)
    answer = {
        "task_id": task,
        "every_s": hours[0].every_s,
        "replicas": {time_text(from_s): replicas for from_s, replicas in steps_of(found)},
        "hours": [
            {
                "from_s": one.from_s,
                "asked": one.asked,
                "busy": one.busy,
                "replicas": one.replicas,
                "cut": one.cut,
            }
            for one in found
        ],
    }
    tell(answer, json_, lambda _: show(found, hours[0].every_s, answer["replicas"]))


def show(found: Sequence[Learnt], every_s: float, replicas: Any) -> None:
    from qipan.cli import tables

    rows = [
        [
            time_text(one.from_s), str(one.asked), "not recorded" if one.busy is None else f"{one.busy:.2f}",
            f"{one.replicas}{' or more: all worked all the time' if one.cut else ''}",
        ]
        for one in found
    ]  # fmt: skip
    tables.table("预测 forecast", ["from", "asked for", "replicas' worth of work", "learnt"], rows)
    text = ", ".join(f"{at}: {count}" for at, count in replicas.items())
    print(f"  in the task file: forecast: {{every: {time_text(every_s)}, replicas: {{{text}}}, ...}}")


def time_text(seconds: float) -> str:
    """As a task file states it."""
    whole = round(seconds, 3)
    parts = [(3600.0, "h"), (60.0, "m")]
    text = ""
    for unit_s, name in parts:
        count = math.floor(whole / unit_s + 1e-9)
        text += f"{count}{name}" if count else ""
        whole = round(whole - count * unit_s, 3)
    return text + (f"{whole:g}s" if whole or not text else "")


def hours_in(events: Sequence[Mapping[str, Any]]) -> list[Hours]:
    import msgspec

    submitted = [one["fact"]["order"] for one in events if one["kind"] == "task_submitted"]
    return [msgspec.convert(order["hours"], Hours, strict=False) for order in submitted if order.get("hours")]


def record_in(events: Sequence[Mapping[str, Any]]) -> list[Busy]:
    """A share is told when it changes: it holds until the next word on the attempt, or its end."""
    told: dict[tuple[str, int], list[tuple[float, float]]] = {}  # (task, attempt) -> (from, share)
    ends: dict[tuple[str, int], float] = {}
    for one in events:
        fact = one["fact"]
        key = (fact.get("task_id", ""), fact.get("attempt", 0))
        if one["kind"] == "devices_busy":
            told.setdefault(key, []).append((fact["from_s"], fact["busy_share"]))
        elif one["kind"] == "task_exited":
            ends[key] = fact["usage"]["until_s"]
    latest_s = max((one["at_s"] for one in events), default=0.0)
    found = []
    for key, shares in sorted(told.items()):
        changes = [from_s for from_s, _ in shares[1:]] + [ends.get(key, latest_s)]
        found += [
            Busy(from_s, until_s, share) for (from_s, share), until_s in zip(shares, changes, strict=True)
        ]
    return found
