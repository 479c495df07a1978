"""One task as a board's store has it: what was submitted, its parts, how far its attempts came and how they ended.  Whoever reads while
the boards are stepped holds their lock."""

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from qipan.controller import fact_of
from qipan.events import Fact, TaskExited, TaskProgress, without_launch
from qipan.planner import Plan
from qipan.store import Store
from qipan.tracing import AtBoard
from qipan.workload import Task

F = TypeVar("F", bound=Fact)


def submitted_task(store: Store, task_id: str) -> Task:
    found = store.submission(task_id)
    assert found is not None
    return msgspec.json.decode(found[1], type=Task)


def submitted_plan(store: Store, task_id: str) -> Plan:
    found = store.submission(task_id)
    assert found is not None
    return msgspec.json.decode(found[2], type=Plan)


def parts_of(store: Store, task_id: str) -> list[str]:
    """The ids of a task's parts; itself when it has none."""
    found = store.submission(task_id)
    if found is None or not (
        b'"parts"' in found[1] or b'"stages":[{' in found[1] or b'"kind":"serve"' in found[1]
    ):
        return [task_id]
    task = msgspec.json.decode(found[1], type=Task)
    if task.is_service and task.replica is None and task.forecast is not None:
        return list(part_ids(task_id, [f"r{number + 1}" for number in range(task.forecast.most())]))
    if task.stages:
        return list(part_ids(task_id, [stage.name for stage in task.stages]))
    if task.sites is None:
        return [task_id]
    return [name for name, _ in store.submissions() if name.startswith(f"{task_id}.")]


def part_ids(task_id: str, stages: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{task_id}.{stage}" for stage in stages)


def progress_of(store: Store, task_id: str) -> list[tuple[float, TaskProgress]]:
    return facts_of_kind(store, parts_of(store, task_id), TaskProgress)


def exits_of(store: Store, task_id: str) -> list[TaskExited]:
    return [fact for _, fact in facts_of_kind(store, parts_of(store, task_id), TaskExited)]


def facts_of_kind(store: Store, names: Iterable[str], kind: type[F]) -> list[tuple[float, F]]:
    """(Unix time of the tick, fact) of several tasks, in the order of the store."""
    rows = sorted(row for name in names for row in store.facts_of(name, [kind.kind]))
    found: list[tuple[float, F]] = []
    for _, at_s, body in rows:
        fact = fact_of(body)
        assert isinstance(fact, kind)
        found.append((at_s, fact))
    return found


def seen_in_store(board: str, parent: str, store: Store, task_id: str) -> AtBoard:
    facts = tuple((at_s, without_launch(fact_of(body))) for _, at_s, body in store.facts_of(task_id))
    placed = tuple(at_s for at_s, verdict, _ in store.reasons_of(task_id) if verdict == "placed")
    return AtBoard(board, parent, facts, placed)
