"""The invariants of a tree, stated again, apart from the scheduler.  Run after every step of the twin.

1  no device is leased twice: what runs at an engine fits its devices
2  a gang is whole: an attempt holds exactly the devices of one of its task's points
3  nothing runs twice: a task runs at one engine only at a time.  It is done again only where its owner asked for that
   (`on_partition: restart`) and the board that held it was silent for its whole lease and the margin, so that its
   end was not known; the fence of the repeat is higher, so outputs take the one or the other
4  nothing is lost: a submitted task is live at the board where it was submitted, or over there
5  no storage overflows: the checkpoints of what runs at an engine fit its space, and its rate
6  tasks of a tenant that are kept apart never run at one engine at a time
"""

from itertools import pairwise

from qipan.engines.simulated import SimulatedEngine
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import TaskId
from qipan.ledger import check_balances
from qipan.scheduler import Phase
from qipan.twin.world import World


class Violation(AssertionError):
    pass


def check_world(world: World) -> None:
    """Boards at whose engine nothing changed since the last check hold what they held."""
    changed = []
    for board, engine in sorted(world.tree.engines.items()):
        assert isinstance(engine, SimulatedEngine)
        controller = world.tree.controllers[board]
        now = (engine.changes, controller, controller.state.tick)
        if world.checked.get(board) != now:
            world.checked[board] = now
            changed.append((board, engine, controller.state))
            for task_id in world.runs.pop(board, ()):
                world.runs_at.pop(task_id, None)
    for board, engine, state in changed:
        for chip_class, free in engine.free().items():
            if free < 0:
                raise Violation(
                    f"{board}: {-free} devices of {chip_class} are held twice at {world.clock.now_s()} s"
                )
        _check_conditions(board, engine)
        running = world.runs[board] = engine.running()
        for task_id, (attempt, needs) in running.items():
            other = world.runs_at.setdefault(task_id, board)
            if other != board:
                raise Violation(f"{task_id} runs at {other} and at {board} (attempt {attempt})")
            task = state.tasks.get(task_id)
            if task is None or task.phase is not Phase.RUNNING:
                continue
            if all(point.needs != needs for point in task.order.curve.points):
                raise Violation(f"{task_id} holds {needs} at {board}, which is no point of its curve")


def _check_conditions(board: BoardId, engine: SimulatedEngine) -> None:
    words: set[tuple[str, str]] = set()
    space_bytes, rate, room = 0, 0.0, engine.room
    for task_id, (_, needs) in engine.running().items():
        order = engine.order_of(task_id)
        if order.apart and (order.tenant, order.apart) in words:
            raise Violation(f"{board}: two tasks of {order.tenant} with `apart: {order.apart}` run")
        words.add((order.tenant, order.apart))
        if room is not None:
            points = [point for point in order.curve.points if point.needs == needs]
            space_bytes += min((point.storage_bytes for point in points), default=0)
            rate += min((point.storage_bytes_per_s for point in points), default=0.0)
    if room is not None and room.space_bytes and space_bytes > room.space_bytes:
        raise Violation(f"{board}: checkpoints need {space_bytes} bytes of {room}")
    if room is not None and room.write_bytes_per_s and rate > room.write_bytes_per_s * (1 + 1e-9):
        raise Violation(f"{board}: checkpoints need {rate} bytes/s of {room}")


def check_end(world: World, submitted: set[TaskId]) -> None:
    """At the end of a run: every task is over at the top and was done once; the ledger agrees with the engines.
    After the top's machine was lost, what only it knew is gone, and so are charges since its backup."""
    over = world.tree.root.state.over
    missing = submitted - set(over) - set(world.tree.root.state.tasks) - world.gone
    if missing:
        raise Violation(f"lost: {sorted(missing)}")
    finished = [task for board in sorted(world.tree.engines) for task in world.simulated(board).finished]
    twice = sorted({task for task in finished if finished.count(task) > 1 + _repeats(world, task)})
    if twice:
        raise Violation(f"done twice: {twice}")
    _check_overlap(world)
    _check_ledger(world)


def _repeats(world: World, task_id: TaskId) -> int:
    """How often a board placed the task anew because the one that held it was silent."""
    told = [verdict for store in world.tree.stores.values() for _, verdict, _ in store.reasons_of(task_id)]
    return told.count("moved")


def _check_overlap(world: World) -> None:
    """No two attempts of a task were alive at one time, wherever they ran."""
    lives: dict[TaskId, list[tuple[float, float, str]]] = {}
    for board in sorted(world.tree.engines):
        for task_id, attempt, _, _, start_s, end_s in world.simulated(board).lifetimes:
            lives.setdefault(task_id, []).append((start_s, end_s, f"attempt {attempt} at {board}"))
    for task_id, spans in lives.items():
        for (_, end_s, first), (start_s, _, second) in pairwise(sorted(spans)):
            if start_s < end_s:
                raise Violation(f"{task_id}: {second} began at {start_s}, before {first} ended at {end_s}")


def _check_ledger(world: World) -> None:
    balances = world.tree.root.store.balances()
    if any(check_balances(balances).values()):
        raise Violation(f"the ledger does not sum to zero: {balances}")
    holds = {account: balance for account, _, balance in balances if account.startswith("hold/") and balance}
    live = {f"hold/{task_id}" for task_id in world.tree.root.state.tasks}
    if set(holds) - live:
        raise Violation(f"holds of tasks that are over: {holds}")
    for board in world.tree.engines:
        ran = sum(
            round(devices * (end_s - start_s) * 1e6) * _tariff(world, board, chip) / 3.6e9
            for _, _, chip, devices, start_s, end_s in world.simulated(board).lifetimes
        )
        paid = sum(balance for account, _, balance in balances if account == f"provider/{board}")
        attempts = len(world.simulated(board).lifetimes)
        wrong = paid - ran > attempts if world.restored else abs(paid - ran) > attempts
        if not world.tree.root.state.tasks and wrong:
            raise Violation(
                f"{board} was paid {paid}, its engine ran for {ran:.0f} micro-CNY in {attempts} attempts"
            )


def _tariff(world: World, board: BoardId, chip_class: ChipClassId) -> int:
    spec = next(spec for spec in world.tree.spec.walk() if spec.board == board)
    return next(pool.tariff_micro_cny_per_device_hour for pool in spec.pools if pool.chip_class == chip_class)
