"""Another point for a running attempt without starting its processes again: what that takes, and the files by which engine,
supervisor and trainer do it (`trainer.world_board` has the trainer's side).

Processes that go on keep their supervisor and their folder; they are the next attempt all the same, so that bills, fences and
boards see what they always see: one attempt ended "resized", the next one started.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qipan.curves import Curve, Point
from qipan.engines import launcher
from qipan.engines.attempt_spec import environment
from qipan.engines.held import Change, Held, Kept, Places
from qipan.engines.launcher import Folders, Launcher, read_json
from qipan.engines.processes import stat_of
from qipan.engines.shim import Spec
from qipan.engines.throttle import ranks_in, read_pid
from qipan.trainer.world_board import WorldBoard, WorldOrder
from qipan.workload import Task

ANSWER_S = 20.0  # running processes are given so long, or three times a planned stop


def why_not(task: Task, curve: Curve, point_id: str, then: Point) -> str:
    """Why an attempt at `point_id` must be started again to go on at `then`; "" when it need not be."""
    now = next((point for point in curve.points if point.point_id == point_id), None)
    if task.run:
        return "an own script"
    if task.part is not None:
        return "a part of a task over several sites"
    if now is None or now.strategy is None or then.strategy is None:
        return "no strategy for each of the points"
    before, after = now.strategy, then.strategy
    if before.outer is not None or after.outer is not None:
        return "sites that exchange keep their ranks"
    if (before.seed, before.seq, before.global_batch_rows) != (
        after.seed,
        after.seq,
        after.global_batch_rows,
    ):
        return "the points take unlike batches"
    if [need.chip_class for need in now.needs] != [need.chip_class for need in then.needs]:
        return "other chips"
    return ""


def answer_s(now: Point | None, then: Point, grows: bool) -> float:
    """How long an answer is waited for; newcomers have their imports to do."""
    stop_s = now.stop_s if now is not None else 0.0
    return max(ANSWER_S, 3 * stop_s) + (max(ANSWER_S, 3 * then.start_s) if grows else 0.0)


def planned(held: Held, now_s: float) -> Held:
    """With the change to the point of its `resize`: whoever stays keeps its number and its device, and those who join have the
    numbers that come next.  `now_s`: on the lease clock."""
    assert held.resize is not None
    then, before = held.resize.points[0], _workers(held)
    numbered = held.kept.numbered if held.kept is not None else len(before)
    new = max(0, then.devices - len(before))
    workers = (*before[: then.devices], *range(numbered, numbered + new))
    until_s = now_s + answer_s(held.point(), then, grows=new > 0)
    return replace(held, change=Change(workers, numbered + new, until_s))


def order(places: Places, below: Launcher, held: Held) -> None:
    """Said again after a crash it changes nothing."""
    change, resize, folders = held.change, held.resize, places.attempt(held)
    assert change is not None
    assert resize is not None
    then = resize.points[0]
    assert then.strategy is not None
    WorldBoard(folders.task).write(WorldOrder(resize.generation, then.strategy, change.workers))
    wide = replace(held, needs=then.needs)
    command = below.rank(places.hold(wide))
    before = set(_workers(held))
    for place, worker in enumerate(change.workers):
        if worker not in before and command is not None:
            _, ranks, _ = below.groups(places.hold(wide))
            env = environment(places, below, wide, held.launch(), then, ranks)
            join(folders.control, worker, command, {**env, "LOCAL_RANK": str(place)})


def _workers(held: Held) -> tuple[int, ...]:
    """Their numbers, by device."""
    return held.kept.workers if held.kept is not None else tuple(range(held.needs[0].devices))


def join(control: Path, worker: int, command: list[str], env: Mapping[str, str]) -> None:
    """Have the supervisor start one more process."""
    Spec(command, {**env, "QIPAN_WORKER": str(worker)}).write(str(control / f"join-{worker}.spec"))


def withdraw(folder: Path) -> None:
    WorldBoard(folder).withdraw()


def reshaped(held: Held, event: dict[str, Any]) -> bool:
    """Whether this line of the events file says that the processes went on at the point of the order."""
    assert held.resize is not None
    told = (event.get("event"), event.get("generation"))
    at_s = event.get("at_s")
    return told == ("reshaped", held.resize.generation) and isinstance(at_s, int | float) and 0 <= at_s < 1e11


def standstill_s(event: dict[str, Any]) -> float | None:
    """As the processes measured it; what they write may be anything."""
    seconds = event.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e7 else None


def went_on(folders: Folders, change: Change) -> bool:
    """Whether they have gone on, and those who left are gone: the next attempt has begun."""
    if not change.reshaped_s:
        return False
    return launcher.ended(folders) is not None or leave(folders.task, len(change.workers))


def gave_up(folders: Folders, held: Held, now_s: float) -> str:
    """Why a change that has not come about will not; "" while it may.  `now_s`: on the lease clock."""
    change, resize = held.change, held.resize
    assert change is not None
    assert resize is not None
    if launcher.ended(folders) is not None:
        return ""
    why = "" if change.reshaped_s else failed(folders, resize.generation, change)
    if now_s > change.until_lease_s and not why:
        why = "who was to leave did not" if change.reshaped_s else "its processes did not answer in time"
    return why


def gone_on(held: Held, events_from: int) -> Held:
    """The next attempt, in the same processes."""
    change, resize = held.change, held.resize
    assert change is not None
    assert resize is not None
    point = resize.points[0]
    processes = held.kept.attempt if held.kept is not None else held.attempt
    return replace(
        held, attempt=held.attempt + 1, point_id=point.point_id, needs=point.needs,
        devices=held.devices[: point.devices], resize=None, change=None,
        kept=Kept(processes, change.workers, change.numbered, change.reshaped_s, events_from),
    )  # fmt: skip


def failed(folders: Folders, generation: int, change: Change) -> str:
    """Why the order cannot be carried out, once that is known."""
    refusal = WorldBoard(folders.task).refusal(generation)
    if refusal:
        return refusal
    for worker in change.workers:
        left = read_json(folders.control / f"worker-{worker}.exit")
        if left is not None:
            return f"a process that was to join ended with exit code {left.get('code')}"
    return ""


def leave(folder: Path, devices: int) -> bool:
    """Whether every process on a device behind the first `devices` is gone; their marks go with them."""
    for rank in ranks_in(folder):
        mark = folder / f"rank-{rank}"
        if rank >= devices and mark.is_file():
            if _lives(read_pid(str(mark))):
                return False
            mark.unlink()
    return True


def _lives(pid: int) -> bool:
    try:
        return stat_of(pid)[0] not in "ZX"
    except OSError:
        return False  # gone
