"""The invariants of a tree, stated again, apart from the scheduler.  Run after every step of the twin.

1  no device is leased twice: what runs at an engine fits its devices
2  a gang is whole: an attempt holds exactly the devices of one of its task's points
3  nothing runs twice: a task runs at one engine only at a time.  It is done again only where its owner asked for that
   (`on_partition: restart`) and the board that held it was silent for its whole lease and the margin, so that its
   end was not known; the fence of the repeat is higher, so outputs take the one or the other
4  nothing is lost: a submitted task is live at the board where it was submitted, or over there
5  no storage overflows: the checkpoints of what runs at an engine fit its space, and its rate
6  tasks of a tenant that are kept apart never run at one engine at a time
7  a replica of a service is lent when its forecast does not ask for it, and only then
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from qipan.controller import Controller
from qipan.curves import Need
from qipan.engines.simulated import SimulatedEngine
from qipan.engines.simulated_lease import SimulatedLease
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import Order, Room, TaskId
from qipan.ledger import check_balances
from qipan.quantities import format_devices
from qipan.scheduler import Phase, State
from qipan.twin.world import World

#: steps after which `check_changes` looks at everything
WHOLE_EVERY = 1000


class Violation(AssertionError):
    pass


@dataclass(frozen=True, slots=True)
class Held:
    """A lease at an engine as it was seen last; `attempt`: None while nothing runs in it."""

    needs: tuple[Need, ...]
    attempt: int | None
    order: Order


@dataclass(slots=True)
class Seen:
    """What the last check saw at a board's engine.  `read`: of the changes that the engine told; `used`: chip class -> devices held;
    `words`: (tenant, word of `limits.apart`) -> tasks that run."""

    controller: Controller
    changes: int = -1
    tick: int = -1
    read: int = 0
    held: dict[TaskId, Held] = field(default_factory=dict)
    used: Counter[ChipClassId] = field(default_factory=Counter)
    words: Counter[tuple[str, str]] = field(default_factory=Counter)

    def forget(self, task_id: TaskId) -> bool:
        """Whether it ran."""
        before = self.held.pop(task_id, None)
        if before is None:
            return False
        for need in before.needs:
            self.used[need.chip_class] -= need.devices
        if before.attempt is not None and before.order.apart:
            self.words[before.order.tenant, before.order.apart] -= 1
        return before.attempt is not None

    def note(self, task_id: TaskId, now: Held) -> None:
        self.held[task_id] = now
        for need in now.needs:
            self.used[need.chip_class] += need.devices
        if now.attempt is not None and now.order.apart:
            self.words[now.order.tenant, now.order.apart] += 1


def check_world(world: World) -> None:
    """Everything at boards where anything changed since the last check."""
    _check(world, whole=True)


def check_changes(world: World) -> None:
    """The same invariants for the tasks that changed since the last check: those that the engine told of, and those that the board's last
    tick touched.  Every WHOLE_EVERY steps for all, counted from the engines anew; that these told of all that changed is checked then."""
    _check(world, whole=world.steps % WHOLE_EVERY == 0)


def _check(world: World, *, whole: bool) -> None:
    _check_hours(world)
    looked: list[tuple[BoardId, SimulatedEngine, State, Seen, dict[TaskId, Held]]] = []
    for board, engine in sorted(world.tree.engines.items()):
        assert isinstance(engine, SimulatedEngine)
        controller = world.tree.controllers[board]
        state, seen = controller.state, world.seen.get(board)
        if seen is None:
            seen = world.seen[board] = Seen(controller)
        ticks = state.tick - seen.tick
        follows = seen.controller is controller and 0 <= ticks <= 1
        if follows and ticks == 0 and engine.changes == seen.changes and world.steps % WHOLE_EVERY:
            continue
        told = {*engine.changed[seen.read :]}
        now = engine.held()
        if whole or not follows:
            fresh = {task_id: _held(now[task_id]) for task_id in now}
            _check_told(board, seen, fresh, told)
            looked_at = {*seen.held, *fresh}
        else:
            looked_at = told | {*state.tasks.touched} if ticks else told
            fresh = {task_id: _held(now[task_id]) for task_id in looked_at if task_id in now}
        for task_id in looked_at:
            if seen.forget(task_id):
                world.runs_at.pop(task_id, None)
        seen.controller, seen.changes, seen.tick, seen.read = controller, engine.changes, state.tick, len(engine.changed)  # fmt: skip
        if whole or not follows:
            seen.used.clear()
            seen.words.clear()
        looked.append((board, engine, state, seen, fresh))
    for board, engine, state, seen, fresh in looked:
        for task_id, held in fresh.items():
            seen.note(task_id, held)
        _check_engine(world, board, engine, seen)
        for task_id, held in fresh.items():
            if held.attempt is None:
                continue
            other = world.runs_at.setdefault(task_id, board)
            if other != board:
                raise Violation(f"{task_id} runs at {other} and at {board} (attempt {held.attempt})")
            task = state.tasks.get(task_id)
            if task is None or task.phase is not Phase.RUNNING:
                continue
            if all(point.needs != held.needs for point in task.order.curve.points):
                raise Violation(f"{task_id} holds {held.needs} at {board}, which is no point of its curve")


def _check_hours(world: World) -> None:
    """At the board where services were submitted, whenever it decided; a second is left for it to be woken."""
    root, now_s = world.tree.root, world.clock.now_s()
    if world.services and world.checked.get(root.board) != (root, root.state.tick):
        world.checked[root.board] = (root, root.state.tick)
        for task_id, hours in world.services.items():
            task = root.state.tasks.get(task_id)
            if task is None or hours.wanted(now_s) is not hours.wanted(now_s - 1.0):
                continue
            allowed = (Phase.LENT, Phase.STOPPING, Phase.PARKED)
            if task.phase is Phase.LENT if hours.wanted(now_s) else task.phase not in allowed:
                raise Violation(f"{task_id} is {task.phase} at {now_s} s: {hours}")


def _held(lease: SimulatedLease) -> Held:
    return Held(lease.needs, lease.attempt if lease.point is not None else None, lease.order)


def _check_told(board: BoardId, seen: Seen, now: dict[TaskId, Held], told: set[TaskId]) -> None:
    """A check of what changed sees all only where the engine told of it."""
    untold = [task_id for task_id in {*seen.held, *now} - told if seen.held.get(task_id) != now.get(task_id)]
    if untold:
        raise Violation(f"{board}: its engine did not tell that {sorted(untold)} changed")


def _check_engine(world: World, board: BoardId, engine: SimulatedEngine, seen: Seen) -> None:
    devices = engine.devices()
    for chip_class, used in seen.used.items():
        if used > devices[chip_class]:
            raise Violation(
                f"{board}: {format_devices(used - devices[chip_class])} of {chip_class} held twice at {world.clock.now_s()} s"
            )
    for (tenant, word), tasks in seen.words.items():
        if tasks > 1:
            raise Violation(f"{board}: {tasks} tasks of {tenant} with `apart: {word}` run")
    if engine.room is not None:
        _check_storage(board, engine.room, seen)


def _check_storage(board: BoardId, room: Room, seen: Seen) -> None:
    space_bytes, rate = 0, 0.0
    for task_id, held in seen.held.items():
        if held.attempt is None:
            continue
        order = held.order
        points = [point for point in order.curve.points if point.needs == held.needs]
        space_bytes += min((point.storage_bytes for point in points), default=0)
        if not 1.0 <= order.checkpoint_longer <= max(1.0, order.checkpoint_longer_max):
            raise Violation(f"{task_id}: its checkpoints lie {order.checkpoint_longer} times as far apart")
        rate += min((point.storage_bytes_per_s for point in points), default=0.0) / order.checkpoint_longer
    if room.space_bytes and space_bytes > room.space_bytes:
        raise Violation(f"{board}: checkpoints need {space_bytes} bytes of {room}")
    if not room.writes(rate):
        raise Violation(f"{board}: checkpoints need {rate} bytes/s of {room}")


def check_end(world: World, submitted: set[TaskId]) -> None:
    """At the end of a run: every task is over at the top and was done once; the ledger agrees with the engines.
    After the top's machine was lost, what only it knew is gone, and so are charges since its backup; after that of another board
    over others, charges that it had not told its parent."""
    over = world.tree.root.state.over
    missing = submitted - set(over) - set(world.tree.root.state.tasks) - world.gone
    if missing:
        raise Violation(f"lost: {sorted(missing)}")
    finished = Counter(task for board in world.tree.engines for task in world.simulated(board).finished)
    often = [task for task, times in sorted(finished.items()) if times > 1]
    twice = [task for task in often if finished[task] > 1 + _repeats(world, task)]
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
