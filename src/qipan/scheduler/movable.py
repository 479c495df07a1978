"""Running tasks that may be parked, shrunk or grown for others, by what their devices would cost and by what more would gain them.

One line for each "engine|chip class", brought up to date with the tasks that changed since it was read.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heappop, heappush, merge

from qipan.leases import EngineId, TaskId
from qipan.scheduler.asks import give_up_price, growth
from qipan.scheduler.backfill import parks
from qipan.scheduler.bids import steady
from qipan.scheduler.policies import RIGID
from qipan.scheduler.preemptions import spared_by
from qipan.scheduler.reshaping import ages_s
from qipan.scheduler.state import Moment, Phase, State, TaskState
from qipan.scheduler.tasks import MovableLine

Allowed = Callable[[TaskState], bool]


def makes_room(state: State, task: TaskState, now_s: float) -> bool:
    """Whether a task that runs at an engine of this board may be parked, moved or changed for others now."""
    if task.phase is not Phase.RUNNING or task.engine is None or state.engines[task.engine].chooses:
        return False
    if task.engine in state.uncounted or state.settings.policy in RIGID:
        return False
    return parks(state, task) and spared_by(state, task, now_s) is None


def cheapest(state: State, moment: Moment, key: str, most: int, allowed: Allowed) -> list[TaskState]:
    """Those whose next step down costs the least per device, the cheapest first."""
    line, tasks = _line(state, moment, key), state.tasks
    drifting = sorted((give_up_price(state, tasks[name], moment), name) for name in line.drifting)
    return _first((name for _, name in merge(line.prices, drifting)), state, most, allowed)


def hungriest(state: State, moment: Moment, key: str, most: int, allowed: Allowed) -> list[TaskState]:
    """Those that would gain the most by more devices, the hungriest first; none that would gain nothing."""
    line = _line(state, moment, key)
    return _first((name for _, name in reversed(line.gains)), state, most, allowed)


def _first(names: Iterator[TaskId], state: State, most: int, allowed: Allowed) -> list[TaskState]:
    found: list[TaskState] = []
    for name in names:
        if len(found) == most:
            break
        task = state.tasks[name]
        if allowed(task):
            found.append(task)
    return found


def _line(state: State, moment: Moment, key: str) -> MovableLine:
    tasks = state.tasks
    engine, chip = key.split("|", 1)
    known = state.engines[EngineId(engine)]
    mark = (known.in_place, next(offer for offer in known.offers if offer.chip_class == chip).tariff_micro_cny_per_device_hour)  # fmt: skip
    line = tasks.lines.get(key)
    if line is None or line.mark != mark:
        line = tasks.lines[key] = MovableLine(mark, stale={*tasks.at_key.get(key, ())})
    while line.ages and line.ages[0][0] <= moment.now_s:
        line.stale.add(heappop(line.ages)[1])
    for name in sorted(line.stale):
        _note(state, moment, key, line, name)
    line.stale.clear()
    return line


def _note(state: State, moment: Moment, key: str, line: MovableLine, name: TaskId) -> None:
    task = state.tasks.get(name)
    now: tuple[int | None, float] | None = None
    if task is not None and _may_move(task) and name in state.tasks.at_key.get(key, ()):
        price, point = None, task.point()
        assert point is not None
        if steady(task.order, state.settings.policy):
            price, at_s = give_up_price(state, task, moment), ages_s(task, point, moment.now_s)
            if at_s is not None:
                heappush(line.ages, (at_s, name))
        now = (price, growth(task))
    before = line.entries.get(name)
    if before == now:
        return
    if before is not None:
        del line.entries[name]
        line.drifting.discard(name)
        if before[0] is not None:
            del line.prices[bisect_left(line.prices, (before[0], name))]
        if before[1] > 0:
            del line.gains[bisect_left(line.gains, (before[1], name))]
    if now is not None:
        line.entries[name] = now
        if now[0] is None:
            line.drifting.add(name)
        else:
            insort(line.prices, (now[0], name))
        if now[1] > 0:
            insort(line.gains, (now[1], name))


def _may_move(task: TaskState) -> bool:
    return task.phase is Phase.RUNNING and task.order.yields
