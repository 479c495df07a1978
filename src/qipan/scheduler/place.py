"""Placement: group, price, allocate, order.

Engines that take one point (leaves) are allocated together: every queued and running task bids with the points it
may use, and the allocation's winners run.  Engines that choose (boards) are asked one at a time, the best first.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from qipan.curves import Need, Point
from qipan.events import Reserve, Resize, Start
from qipan.leases import EngineId, LeaseId, Offer, Order
from qipan.scheduler.allocate import Bidder, Candidate, allocate
from qipan.scheduler.asks import engine_key, free_devices, price_of
from qipan.scheduler.bids import progress_value, time_left_s, worth_of
from qipan.scheduler.state import AfterStop, Draft, EngineState, Phase, State, TaskState, ToEngine, lease_for
from qipan.scheduler.transitions import give_back, order_stop

SECONDS_PER_HOUR = 3600


def place(state: State, draft: Draft) -> None:
    start_granted(state, draft)
    if not state.parked:
        allocate_leaves(state, draft)
        ask_boards(state, draft)
    return_unplaced(state, draft)


def start_granted(state: State, draft: Draft) -> None:
    """A granted lease is started at once, or, for a task from the parent, when its Start has come."""
    for task in list(state.tasks.values()):
        if task.phase is not Phase.RESERVED or (task.parent is not None and not task.parent.started):
            continue
        assert task.engine is not None
        if task.engine in state.uncounted:
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


def allocate_leaves(state: State, draft: Draft) -> None:
    leaves = _usable(state, chooses=False)
    if not leaves:
        return
    movable = [task for task in state.tasks.values() if _movable(state, task)]
    if not any(task.phase is Phase.QUEUED or task.order.elastic for task in movable):
        return
    bidders: list[Bidder] = []
    seats: dict[tuple[str, str], Seat] = {}
    for task in sorted(movable, key=lambda task: task.task_id):
        bidder = _bidder(state, task, draft, seats)
        if bidder.candidates:
            bidders.append(bidder)
    capacity = free_devices(state, [task for task in state.tasks.values() if not _movable(state, task)])
    chosen = allocate(bidders, capacity).chosen
    # Whoever gives devices up is told first; who takes them starts when they are confirmed free.
    for task in movable:
        seat = seats.get((task.task_id, chosen.get(task.task_id, "")))
        if task.phase is Phase.RUNNING:
            _keep_or_change(state, task, seat, draft)
    free = free_devices(state, state.tasks.values())
    for task in sorted(movable, key=lambda task: _bid_key(task, draft)):
        seat = seats.get((task.task_id, chosen.get(task.task_id, "")))
        if task.phase is not Phase.QUEUED or seat is None:
            continue
        needs = seat.point.needs
        if all(free.get(engine_key(seat.engine, need.chip_class), 0) >= need.devices for need in needs):
            for need in needs:
                free[engine_key(seat.engine, need.chip_class)] -= need.devices
            _reserve(state, task, seat.engine, seat.point, needs, draft)
        else:
            state.tasks[task.task_id] = replace(
                task,
                why_waiting="waits for devices that another task is giving up",
                promised_until_s=draft.moment.now_s + state.settings.lease_s,
            )


def _movable(state: State, task: TaskState) -> bool:
    if task.phase is Phase.QUEUED:
        return True
    if task.phase is not Phase.RUNNING or task.engine is None or state.engines[task.engine].chooses:
        return False
    if task.engine in state.uncounted:
        return False
    return task.order.elastic and state.settings.elastic and task.order.preemptible


def _bidder(state: State, task: TaskState, draft: Draft, seats: dict[tuple[str, str], Seat]) -> Bidder:
    owner = worth_of(task.order, task.done_s, draft.moment.now_s)
    candidates, current_key = [], None
    for engine, known in sorted(state.engines.items()):
        if known.chooses or known.lost or engine in state.uncounted or _refused(task, engine, draft):
            continue
        if task.phase is Phase.RUNNING and engine != task.engine:
            continue
        for point, offer in _seats_at(state, task, known.offers):
            stays = task.phase is Phase.RUNNING and task.engine == engine and point.point_id == task.point_id
            worth = owner.of(point, offer.tariff_micro_cny_per_device_hour, running=stays)
            if stays:
                # What a change would throw away speaks for staying.
                left_s = time_left_s(task.order, point, task.done_s)
                unsaved_s = 0.0 if point.stop_s > 0 else task.done_s - task.saved_s
                worth += owner.of_change(point, unsaved_s) / left_s
                current_key = f"{engine}|{point.point_id}"
            if worth <= 0:
                continue
            key = f"{engine}|{point.point_id}"
            seats[task.task_id, key] = Seat(engine, offer, point)
            needs = tuple((engine_key(engine, need.chip_class), need.devices) for need in point.needs)
            candidates.append(Candidate(key, needs, worth))
    return Bidder(task.task_id, tuple(candidates), current_key)


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


def ask_boards(state: State, draft: Draft) -> None:
    boards = _usable(state, chooses=True)
    if not boards:
        return
    waiting = [task for task in state.tasks.values() if task.phase is Phase.QUEUED]
    for task in sorted(waiting, key=lambda task: _bid_key(task, draft)):
        best = None
        limits: list[str] = []
        for engine, known in sorted(boards.items()):
            if _refused(task, engine, draft):
                limits.append(f"{engine} refused lately")
                continue
            for point, offer in _seats_at(state, task, known.offers):
                score = _score(state, task, engine, point, offer, draft, limits)
                if score is not None and (best is None or score > best[0]):
                    best = (score, engine, point, offer)
        if best is None:
            why = "; ".join(sorted(set(limits))) or "no engine offers a chip class it can run on"
            state.tasks[task.task_id] = replace(task, why_waiting=why)
            continue
        _, engine, point, offer = best
        for need in point.needs:
            key = f"{engine}|{need.chip_class}|{offer.site}"
            state.sent_down[key] = state.sent_down.get(key, 0) + need.devices
        _reserve(state, task, engine, point, point.needs, draft)


def _score(
    state: State,
    task: TaskState,
    engine: EngineId,
    point: Point,
    offer: Offer,
    draft: Draft,
    limits: list[str],
) -> float | None:
    """What the task's owner gains per second at this point and place, the ask taken off; None when it cannot be
    had.  Moving data there delays the start and counts against it over the time left."""
    devices = point.devices
    if devices > offer.largest_gang:
        limits.append(
            f"{offer.site or engine} gives at most {offer.largest_gang} devices at once, {point.point_id} needs {devices}"
        )
        return None
    sent = state.sent_down.get(f"{engine}|{offer.chip_class}|{offer.site}", 0)
    ask = price_of(offer, devices, sent)
    if ask is None:
        limits.append(f"{offer.site or engine} has no {devices} devices of {offer.chip_class} to give now")
        return None
    owner = worth_of(task.order, task.done_s, draft.moment.now_s)
    worth = owner.of(point, offer.tariff_micro_cny_per_device_hour)
    if ask / SECONDS_PER_HOUR > worth:
        limits.append(
            f"{offer.site or engine} asks {ask / 1e6:.4f} CNY/h for {devices} devices of {offer.chip_class},"
            f" {point.point_id} is worth {worth * SECONDS_PER_HOUR / 1e6:.4f}"
        )
        return None
    return worth - ask / SECONDS_PER_HOUR


# ---- shared ----------------------------------------------------------------------------------------------------------


def _reserve(
    state: State, task: TaskState, engine: EngineId, point: Point, needs: tuple[Need, ...], draft: Draft
) -> None:
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
    )
    state.tasks[task.task_id] = task
    order = replace(
        task.order,
        saved_s=task.saved_s,
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
    for task in list(state.tasks.values()):
        promised = task.promised_until_s > draft.moment.now_s
        if task.parent is not None and task.phase is Phase.QUEUED and not promised:
            give_back(state, task, draft, task.why_waiting or "no devices for it at its bid")


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
    regions = not order.regions or any(
        fnmatchcase(offer.region, pattern) or fnmatchcase(offer.site, pattern) for pattern in order.regions
    )
    vendor = offer.chip_class.split("/")[0]
    return regions and (not order.vendors or vendor in order.vendors)


def _refused(task: TaskState, engine: EngineId, draft: Draft) -> bool:
    return any(name == engine and again_s > draft.moment.now_s for name, again_s in task.refused)


def _bid_key(task: TaskState, draft: Draft) -> tuple[float, float, str]:
    value = progress_value(task.order, task.done_s, draft.moment.now_s)
    return (-value, task.order.submitted_s, task.task_id)
