"""Placement: group, price, allocate, order.

Engines that take one point (leaves) are allocated together: every queued and running task bids with the points it
may use, and the allocation's winners run.  Engines that choose (boards) are asked one at a time, the best first.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace, nlargest, nsmallest

from qipan.curves import Need, Point
from qipan.events import Reserve, Resize, Start
from qipan.leases import EngineId, LeaseId, Offer, Order, TaskId
from qipan.scheduler.adjust import adjust
from qipan.scheduler.allocate import Bidder, Candidate, allocate, preference
from qipan.scheduler.ask_table import in_regions
from qipan.scheduler.asks import engine_key, free_devices, give_up_price, growth
from qipan.scheduler.bids import time_left_s, worth_of
from qipan.scheduler.children import by_bid, children_of, choose, rank_of
from qipan.scheduler.conditions import set_down, unmet
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.moves import Moves, checkpoint_at, worth_there
from qipan.scheduler.owners import reclaim, refused_by_rule, took
from qipan.scheduler.policies import CHOOSERS, PEERS, RIGID, Contender, Option
from qipan.scheduler.state import AfterStop, Draft, EngineState, Phase, State, TaskState, ToEngine, lease_for
from qipan.scheduler.tasks import Group
from qipan.scheduler.transitions import give_back, order_stop

#: waiting tasks, and running ones of each kind, that bid against each other on a large board
NEAR = 8


def place(state: State, draft: Draft) -> None:
    start_granted(state, draft)
    if not state.parked:
        groups = groups_to_look_at(state, draft)
        allocate_leaves(state, draft, groups)
        ask_boards(state, draft, groups)
        reclaim(state, draft)
    return_unplaced(state, draft)


def groups_to_look_at(state: State, draft: Draft) -> list[Group]:
    """All that wait, or those that something may have changed for: a member came, or more of a chip class that it could use can be
    had."""
    if draft.anew:
        return list(state.tasks.groups.values())
    tasks, found = state.tasks, {}
    for task_id in tasks.touched:
        group = tasks.group_of.get(task_id)
        if group is not None:
            found[group.key] = group
    chips = draft.chips | {key.split("|")[1] for key in tasks.freed}
    if chips:
        found.update((key, group) for key, group in tasks.groups.items() if chips & group.chips)
    return list(found.values())


def start_granted(state: State, draft: Draft) -> None:
    """A granted lease is started at once, or, for a task from the parent, when its Start has come."""
    for task in state.tasks.in_phase(Phase.RESERVED):
        if task.parent is not None and not task.parent.started:
            continue
        assert task.engine is not None
        if task.engine in state.uncounted or not _gang_is_held(state, task):
            continue
        assert task.lease_id is not None
        if state.engines[task.engine].chooses:
            points = tuple(usable_points(state, task, state.engines[task.engine].offers))
            if not task.order.elastic:
                points = tuple(point for point in points if point.point_id == task.point_id)
        else:
            points = (task.order.curve.point(task.point_id),)
        task = replace(
            task,
            phase=Phase.STARTING,
            since_s=draft.moment.now_s,
            generation=task.generation + 1,
            attempt=task.attempt + 1,
        )
        state.tasks[task.task_id] = task
        assert task.engine is not None
        assert task.lease_id is not None
        command = Start(task.task_id, task.lease_id, state.term, task.generation, task.attempt, points)
        draft.commands.append(ToEngine(task.engine, command))


def _gang_is_held(state: State, task: TaskState) -> bool:
    """A gang starts when the leases of all its parts are granted; until then they wait, or lapse.  A part that comes
    back later joins what runs."""
    if task.parent is not None or task.attempt > 0:
        return True
    others = [state.tasks.get(TaskId(name)) for name in task.order.gang if name != task.task_id]
    return all(one is not None and one.phase not in (Phase.QUEUED, Phase.RESERVING) for one in others)


def _usable(state: State, *, chooses: bool) -> dict[EngineId, EngineState]:
    """Engines that can be given tasks now."""
    return {
        engine: known
        for engine, known in state.engines.items()
        if known.chooses is chooses and not known.lost and engine not in state.uncounted
    }


# ---- leaves: one allocation for all tasks --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seat:
    """One (engine, point) that a task may take."""

    engine: EngineId
    offer: Offer
    point: Point


def allocate_leaves(state: State, draft: Draft, groups: list[Group]) -> None:
    leaves = _usable(state, chooses=False)
    if not leaves or not (groups or draft.anew or draft.chips or state.tasks.freed):
        return
    movable = _who_bids(state, draft, groups)
    if not any(task.phase is Phase.QUEUED or task.order.elastic for task in movable):
        return
    bidders: list[Bidder] = []
    seats: dict[tuple[str, str], Seat] = {}
    for task in sorted(movable, key=lambda task: task.task_id):
        bidder = _bidder(state, task, draft, seats)
        if bidder.candidates:
            bidders.append(bidder)
    capacity = _free_for_all(state, draft)
    for task in movable:
        if task.engine is not None:
            for need in task.needs:
                capacity[engine_key(task.engine, need.chip_class)] += need.devices
    if large(state) and state.settings.policy not in PEERS:
        now_s, policy = draft.moment.now_s, state.settings.policy
        bidders.sort(key=lambda bidder: rank_of(state.tasks[TaskId(bidder.task_id)], now_s, policy))
        chosen = adjust(bidders, capacity)
    else:
        chosen = _chosen(state, draft, bidders, seats, capacity)
    # Whoever gives devices up is told first; who takes them starts when they are confirmed free.
    for task in movable:
        seat = seats.get((task.task_id, chosen.get(task.task_id, "")))
        if task.phase is Phase.RUNNING:
            _keep_or_change(state, task, seat, draft)
    free = _free_for_all(state, draft)
    for task in sorted(movable, key=lambda task: rank_of(task, draft.moment.now_s, state.settings.policy)):
        seat = seats.get((task.task_id, chosen.get(task.task_id, "")))
        if task.phase is not Phase.QUEUED or seat is None:
            continue
        needs = seat.point.needs
        if _barred(state, draft, task, seat, seat.point.devices):
            continue  # one served before it took what was left
        if all(free.get(engine_key(seat.engine, need.chip_class), 0) >= need.devices for need in needs):
            for need in needs:
                free[engine_key(seat.engine, need.chip_class)] -= need.devices
            _reserve(state, task, seat.engine, seat.point, needs, draft)
        else:
            state.tasks[task.task_id] = replace(
                task,
                why_waiting="waits for devices that another task is giving up",
                promised_until_s=draft.moment.now_s + state.settings.lease_s,
                promised=f"{seat.engine}|{seat.point.point_id}" if large(state) else "",
            )


def large(state: State) -> bool:
    return len(state.tasks) > state.settings.look_at_all_up_to


def _chosen(
    state: State,
    draft: Draft,
    bidders: list[Bidder],
    seats: dict[tuple[str, str], Seat],
    capacity: dict[str, int],
) -> dict[str, str]:
    """Task -> seat: the most value, or what a policy chooses by itself."""
    policy = CHOOSERS.get(state.settings.policy)
    if policy is None:
        return allocate(bidders, capacity).chosen
    contenders = []
    for bidder in bidders:
        task = state.tasks[TaskId(bidder.task_id)]
        order, point = task.order, task.point() if task.phase is Phase.RUNNING else None
        options = tuple(
            Option(one.point_id, one.needs, seats[bidder.task_id, one.point_id].point.rate)
            for one in bidder.candidates
        )
        held = point.devices / point.rate if point is not None else 1.0
        left = order.curve.work_s - task.done_s
        like = point or order.curve.points[0]
        restart_s = like.start_s + like.stop_s
        contenders.append(
            Contender(
                bidder.task_id, options, order.submitted_s, bidder.current, tenant=order.tenant,
                served_s=task.done_s * held, done=task.done_s, left=left, deadline_s=order.deadline_s,
                restarts=max(0, task.attempt - 1), restart_s=restart_s,
            )
        )  # fmt: skip
    return policy.choose(contenders, capacity, draft.moment.now_s)


def _who_bids(state: State, draft: Draft, groups: list[Group]) -> list[TaskState]:
    """Everybody on a small board.  On a large one the dearest that wait, after all that fit at their best point were
    placed, and the running tasks that would give up devices of their chip classes for the least, or gain the most by more;
    the others stay as they are."""
    tasks = state.tasks
    if not large(state):
        return [task for task in tasks.values() if _movable(state, task)]
    free = take_promised(state, draft)
    waiting = _fill(state, draft, groups, free)
    free = _free_for_all(state, draft)
    chips = {chip for task in waiting for chip in tasks.group_of[task.task_id].chips}
    chips |= {key.split("|")[1] for key in tasks.freed}
    running: dict[str, TaskState] = {}
    for key in sorted(free):
        chip = key.split("|")[1]
        if not draft.anew and chip not in chips:
            continue
        movable = [task for task in tasks.at_chip(key) if _movable(state, task)]
        if waiting and chip in chips:
            cheap = nsmallest(
                NEAR, movable, key=lambda task: (give_up_price(state, task, draft.moment), task.task_id)
            )
            running.update((task.task_id, task) for task in cheap)
        if free[key] > 0:
            hungry = [(growth(task), task.task_id) for task in movable]
            for gain, task_id in nlargest(NEAR, hungry):
                if gain > 0:
                    running[task_id] = tasks[TaskId(task_id)]
    return [*waiting, *running.values()]


def take_promised(state: State, draft: Draft) -> dict[str, int]:
    """Seats that were being freed for someone are taken by them; what is free of those not whole yet is kept for them, or those
    that gave it up would take it back.  Returns what is free for the others."""
    free = free_devices(state)
    now_s, policy = draft.moment.now_s, state.settings.policy
    promised = [state.tasks[task_id] for task_id in state.tasks.promised]
    for task in sorted(promised, key=lambda task: rank_of(task, now_s, policy)):
        seats: dict[tuple[str, str], Seat] = {}
        _bidder(state, task, draft, seats)
        seat = seats.get((task.task_id, task.promised))
        if task.phase is not Phase.QUEUED or seat is None:
            state.tasks[task.task_id] = replace(task, promised="", promised_until_s=0.0)
            continue
        keys = [(engine_key(seat.engine, need.chip_class), need.devices) for need in seat.point.needs]
        whole = all(free.get(key, 0) >= devices for key, devices in keys)
        if whole:
            _reserve(state, task, seat.engine, seat.point, seat.point.needs, draft)
        for key, devices in keys:
            kept = min(devices, max(0, free.get(key, 0)))
            free[key] = free.get(key, 0) - kept
            if not whole:
                draft.kept[key] = draft.kept.get(key, 0) + kept
    return free


def _fill(state: State, draft: Draft, groups: list[Group], free: dict[str, int]) -> list[TaskState]:
    """Place the dearest at their best point while that is free.  Returns the first NEAR of those that do not get it."""
    now_s = draft.moment.now_s
    left: list[TaskState] = []
    heap = []
    most = NEAR + max(0, sum(free.values()))
    for number, group in enumerate(group for group in groups if group.members):
        line = by_bid(state, group, now_s, most)
        heap.append((next(line), number, line))
    heapify(heap)
    while heap and len(left) < NEAR:
        rank, number, line = heap[0]
        following = next(line, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (following, number, line))
        task = state.tasks[rank[2]]
        if task.promised or task.phase is not Phase.QUEUED:
            continue
        seats: dict[tuple[str, str], Seat] = {}
        bidder = _bidder(state, task, draft, seats)
        if not bidder.candidates:
            continue
        best = max(bidder.candidates, key=preference)
        if all(free.get(key, 0) >= devices for key, devices in best.needs):
            seat = seats[task.task_id, best.point_id]
            if _barred(state, draft, task, seat, seat.point.devices):
                continue
            for key, devices in best.needs:
                free[key] -= devices
            _reserve(state, task, seat.engine, seat.point, seat.point.needs, draft)
        else:
            left.append(task)
    return left


def _movable(state: State, task: TaskState) -> bool:
    if task.phase is Phase.QUEUED:
        return True
    if task.phase is not Phase.RUNNING or task.engine is None or state.engines[task.engine].chooses:
        return False
    if task.engine in state.uncounted:
        return False
    if state.settings.policy in RIGID:
        return False
    return task.order.elastic and state.settings.elastic and task.order.preemptible


def _bidder(state: State, task: TaskState, draft: Draft, seats: dict[tuple[str, str], Seat]) -> Bidder:
    owner = worth_of(task.order, task.done_s, draft.moment.now_s, state.settings.policy)
    candidates, current_key, moves = [], None, Moves(state, task)
    for engine, known in sorted(state.engines.items()):
        if known.chooses or known.lost or engine in state.uncounted or _refused(task, engine, draft):
            continue
        if task.phase is Phase.RUNNING and engine != task.engine:
            continue
        for point, offer in _seats_at(state, task, known.offers):
            if task.phase is Phase.RUNNING and point.needs[0].chip_class != task.needs[0].chip_class:
                continue  # a resize holds the larger of two shapes of one class; it cannot hold both classes
            stays = task.phase is Phase.RUNNING and task.engine == engine and point.point_id == task.point_id
            tariff = offer.tariff_micro_cny_per_device_hour
            if task.phase is Phase.QUEUED:
                worth = worth_there(owner, point, tariff, moves.to(offer.site))
            else:
                worth = owner.of(point, tariff, running=stays)
            if stays:
                # What a change would throw away speaks for staying.
                left_s = time_left_s(task.order, point, task.done_s)
                unsaved_s = 0.0 if point.stop_s > 0 else task.done_s - task.saved_s
                worth += owner.of_change(point, unsaved_s) / left_s
                current_key = f"{engine}|{point.point_id}"
            if worth <= 0 or (state.rules and refused_by_rule(state, draft, task, point, _more(task, point))):
                continue
            if unmet(state, draft, task, engine, point) is not None:
                continue
            key = f"{engine}|{point.point_id}"
            seats[task.task_id, key] = Seat(engine, offer, point)
            needs = tuple((engine_key(engine, need.chip_class), need.devices) for need in point.needs)
            candidates.append(Candidate(key, needs, worth))
    return Bidder(task.task_id, tuple(candidates), current_key)


def _free_for_all(state: State, draft: Draft) -> dict[str, int]:
    """Free devices that are not kept for a promised seat."""
    return {key: devices - draft.kept.get(key, 0) for key, devices in free_devices(state).items()}


def _barred(state: State, draft: Draft, task: TaskState, seat: Seat, more: int) -> bool:
    """Whether a quota rule, or what the place has beside devices, forbids the seat; it takes `more` devices than the task has."""
    if refused_by_rule(state, draft, task, seat.point, more):
        return True
    return unmet(state, draft, task, seat.engine, seat.point) is not None


def _more(task: TaskState, point: Point) -> int:
    """Devices of the point's chip class that it would hold beyond those it holds."""
    held = sum(need.devices for need in task.needs if need.chip_class == point.needs[0].chip_class)
    return point.devices - (held if task.engine is not None else 0)


def _keep_or_change(state: State, task: TaskState, seat: Seat | None, draft: Draft) -> None:
    assert task.engine is not None
    assert task.lease_id is not None
    now = task.point()
    assert now is not None
    if seat is None:
        why = "dearer tasks need its devices"
        draft.because(task.task_id, "preempted", f"parked with its checkpoint: {why}", point=task.point_id)
        after = AfterStop.RETURN if task.parent is not None else AfterStop.QUEUE
        order_stop(state, task, draft, park=True, why=why, after=after)
    elif seat.point.point_id != task.point_id:
        if _barred(state, draft, task, seat, _more(task, seat.point)):
            return
        draft.placed.storage.pop(seat.engine, None)  # counted anew with its next shape
        grows = seat.point.devices > now.devices
        verdict = "grown" if grows else "shrunk" if seat.point.devices < now.devices else "reshaped"
        cost_s = now.stop_s + seat.point.start_s
        draft.because(
            task.task_id,
            verdict,
            f"from {now.point_id} ({now.devices} devices) to {seat.point.point_id} ({seat.point.devices});"
            f" {time_left_s(task.order, now, task.done_s):.0f} s left before, "
            f"{time_left_s(task.order, seat.point, task.done_s):.0f} s after, the change costs {cost_s:.0f} s",
            bid_micro_cny_per_device_hour=task.order.bid_micro_cny_per_device_hour,
        )
        held = seat.point.needs if grows else task.needs
        task = replace(
            task,
            phase=Phase.RESIZING,
            since_s=draft.moment.now_s,
            generation=task.generation + 1,
            attempt=task.attempt + 1,
            target_id=seat.point.point_id,
            needs=held,
        )
        state.tasks[task.task_id] = task
        assert task.engine is not None
        assert task.lease_id is not None
        command = Resize(
            task.task_id, task.lease_id, state.term, task.generation, task.attempt, (seat.point,)
        )
        draft.commands.append(ToEngine(task.engine, command))


# ---- boards: one is asked at a time --------------------------------------------------------------------------------


def ask_boards(state: State, draft: Draft, groups: list[Group]) -> None:
    boards = _usable(state, chooses=True)
    if not boards or not groups:
        return
    groups = [group for group in groups if group.members]
    most = state.settings.orders_per_tick
    chosen = choose(children_of(state, draft, boards), groups, most)
    state.more = len(chosen) == most
    for task, seat in chosen:
        key = f"{seat.engine}|{seat.offer.chip_class}|{seat.offer.site}"
        state.sent_down[key] = state.sent_down.get(key, 0) + seat.point.devices
        draft.ordered.add(seat.offer.chip_class)
        _reserve(state, task, seat.engine, seat.point, seat.point.needs, draft)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _reserve(
    state: State, task: TaskState, engine: EngineId, point: Point, needs: tuple[Need, ...], draft: Draft
) -> None:
    set_down(state, draft, task, engine, point)
    state.lease_sequence += 1
    lease_id = LeaseId(f"{state.board}-{state.term}-{state.lease_sequence}")
    task = replace(
        state.tasks[task.task_id],
        phase=Phase.RESERVING,
        since_s=draft.moment.now_s,
        engine=engine,
        lease_id=lease_id,
        point_id=point.point_id,
        needs=needs,
        generation=task.generation + 1,
        why_waiting="",
        promised_until_s=0.0,
        promised="",
    )
    state.tasks[task.task_id] = task
    took(state, draft, task, point)
    order = replace(
        task.order,
        saved_s=task.saved_s,
        checkpoint_at=checkpoint_at(task),
        attempt=task.attempt,
        fence=(*task.order.fence, state.term, task.generation),
        above=task.parent.lease_id if task.parent is not None else "",
    )
    draft.because(
        task.task_id,
        "placed",
        f"{engine} at {point.point_id}: {point.devices} devices,"
        f" {time_left_s(task.order, point, task.done_s):.0f} s of work left at that point",
        engine=engine,
        point=point.point_id,
        bid_micro_cny_per_device_hour=task.order.bid_micro_cny_per_device_hour,
    )
    command = Reserve(
        task.task_id,
        lease_id,
        state.term,
        task.generation,
        order,
        needs,
        lease_for(state, task, draft.moment),
    )
    draft.commands.append(ToEngine(engine, command))


def return_unplaced(state: State, draft: Draft) -> None:
    """A task from the parent that found no place here goes back to it: the parent asks the next best.  One that
    waits for devices which a cheaper task was told to give up stays."""
    for task_id in sorted(state.tasks.from_parent_waiting):
        task = state.tasks[task_id]
        if task.promised_until_s <= draft.moment.now_s:
            give_back(state, task, draft, why_waiting_text(state, task, draft.moment.now_s))


def usable_points(state: State, task: TaskState, offers: Iterable[Offer]) -> list[Point]:
    """The points that the engine's chip classes could ever give, in the curve's order."""
    found = {point.point_id for point, _ in _seats_at(state, task, offers)}
    return [point for point in task.order.curve.points if point.point_id in found]


def _seats_at(state: State, task: TaskState, offers: Iterable[Offer]) -> list[tuple[Point, Offer]]:
    """(point, offer) pairs allowed by the owner's limits and, for a task from the parent, by its lease."""
    allowed = task.parent.points if task.parent is not None and task.parent.started else ()
    order = task.order
    seats = []
    for point in order.curve.points:
        if allowed and point.point_id not in allowed:
            continue
        if len({need.chip_class for need in point.needs}) != 1:
            continue  # points on unlike chips are placed by the mixed form
        for offer in offers:
            need = point.needs[0]
            if (
                offer.chip_class == need.chip_class
                and offer.devices >= point.devices
                and allows(order, offer)
            ):
                seats.append((point, offer))
    return seats


def allows(order: Order, offer: Offer) -> bool:
    vendor = offer.chip_class.split("/")[0]
    return in_regions(order.regions, offer) and (not order.vendors or vendor in order.vendors)


def _refused(task: TaskState, engine: EngineId, draft: Draft) -> bool:
    return any(name == engine and again_s > draft.moment.now_s for name, again_s in task.refused)
