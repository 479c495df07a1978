"""Leaves: engines that take one point are allocated together.

Every queued and running task bids with the points it may use, and the allocation's winners run.
"""

from collections.abc import Mapping
from dataclasses import replace
from heapq import heapify, heappop, heapreplace

from qipan.events import Resize
from qipan.leases import EngineId, TaskId
from qipan.quantities import format_devices
from qipan.scheduler.adjust import adjust
from qipan.scheduler.allocate import Bidder, Candidate, allocate, at_rest, preference
from qipan.scheduler.asks import SECONDS_PER_HOUR, engine_key, free_devices
from qipan.scheduler.backfill import Ends, Reservation, first_of, reservation_for, reserves, tell_reserved
from qipan.scheduler.bids import steady, time_left_s, worth_of
from qipan.scheduler.children import by_bid, rank_of
from qipan.scheduler.conditions import watched
from qipan.scheduler.defragment import waits_for_block
from qipan.scheduler.entered import can_go_home
from qipan.scheduler.gangs import PASSES, Aside, barred_of_gangs, gang_fits, gang_in_line, lines_of, torn
from qipan.scheduler.movable import cheapest, hungriest, makes_room
from qipan.scheduler.moves import Moves, worth_there
from qipan.scheduler.owners import freeing, own_of, owned
from qipan.scheduler.policies import CHOOSERS, PEERS, Contender, Option
from qipan.scheduler.preemptions import note, within_limits
from qipan.scheduler.reshaping import change_s, ran_s, spared, start_again, unsaved_s
from qipan.scheduler.seats import Seat, barred, more_than_held, reserve, seat_for, seats_at, usable_engines
from qipan.scheduler.state import AfterStop, Draft, Phase, State, TaskState, ToEngine
from qipan.scheduler.tasks import Group
from qipan.scheduler.transitions import order_stop

#: waiting tasks, and running ones of each kind, that bid against each other on a large board; and waiting ones for each that fits
NEAR, BESIDE = 8, 2
#: a policy that serves short tasks first is told that a service, which is due now, has so little left
SERVICE_LEFT_S = 60.0
#: policies that move tasks together, at the end of a minute
TOGETHER, MINUTE_S = frozenset({"jct"}), 60.0

#: task -> the seats it bids for, by their keys
Seats = dict[str, dict[str, Seat]]


def allocate_leaves(state: State, draft: Draft, groups: list[Group]) -> None:
    if not usable_engines(state, chooses=False):
        return
    if not (groups or draft.anew or draft.chips or state.tasks.freed):
        return
    movable = within_limits(state, _who_bids(state, draft, groups), draft.moment.now_s)
    if not any(task.phase is Phase.QUEUED or task.order.elastic for task in movable):
        return
    chosen = _chosen_whole(state, draft, movable)
    own = owned(state, draft, movable)
    while chips := _lost_to_others(movable, chosen, own):
        movable = [
            task for task in movable if task.task_id not in own or task.needs[0].chip_class not in chips
        ]
        chosen = _chosen_whole(state, draft, movable)
    if _put_off(state, draft, movable, chosen):
        return
    # Whoever gives devices up is told first; who takes them does when they are confirmed free.
    for task in movable:
        seat = chosen.get(task.task_id)
        if task.phase is Phase.RUNNING and (seat is None or more_than_held(task, seat.point) <= 0):
            _keep_or_change(state, task, seat, draft)
    free = _free_for_all(state, draft)
    takers = [task for task in movable if _takes(state, task, chosen.get(task.task_id))]
    kept: Reservation | None = None
    ends: Ends = {}
    for task in sorted(takers, key=lambda task: rank_of(task, draft.moment.now_s, state.settings.policy)):
        seat = chosen.get(task.task_id)
        if seat is None:
            if kept is None:
                seats = _bidder(state, task, draft)[1].values()
                kept = reservation_for(state, draft, task, seats, free, ends)
                tell_reserved(state, draft, kept)
            continue
        if state.tasks[task.task_id].phase is not task.phase:
            continue
        if task.phase is Phase.RUNNING:
            key = engine_key(seat.engine, seat.point.needs[0].chip_class)
            more = more_than_held(task, seat.point)
            if more + seat.beside <= free.get(key, 0):
                free[key] -= more
                _keep_or_change(state, task, seat, draft)
            continue
        line = gang_in_line(state, task)
        if line:
            if gang_fits(state, draft, line, chosen, free):
                for one in line:
                    _take(state, draft, one, chosen[one.task_id], free)
            continue
        if barred(state, draft, task, seat):
            continue  # one served before it took what was left
        if kept is not None:
            at = seat.needs[0][0], seat.point, draft.moment.now_s
            if kept.bars(state, task, *at):
                continue
            kept.take(state, task, *at)
        if all(free.get(key, 0) >= devices for key, devices in seat.needs):
            if waits_for_block(state, draft, state.tasks[task.task_id], seat):
                free.update((key, free[key] - devices) for key, devices in seat.needs)
            else:
                _take(state, draft, task, seat, free)
        else:
            state.tasks[task.task_id] = replace(
                task,
                why_waiting="waits for devices that another task is giving up",
                promised_until_s=draft.moment.now_s + state.settings.lease_s,
                promised=seat.key if large(state) else "",
            )


def _lost_to_others(movable: list[TaskState], chosen: dict[str, Seat], own: Mapping[TaskId, int]) -> set[str]:
    """Chip classes of which some task would keep less than its `own` devices while another tenant gains some."""
    if not own:
        return set()
    gains: dict[str, set[str]] = {}  # chip class -> tenants
    kept: dict[str, int] = {}
    for task in movable:
        seat = chosen.get(task.task_id)
        if seat is not None:
            kept[task.task_id] = seat.point.devices
            if more_than_held(task, seat.point) > 0:
                gains.setdefault(seat.point.needs[0].chip_class, set()).add(task.order.tenant)
    return {
        str(task.needs[0].chip_class)
        for task in movable
        if kept.get(task.task_id, 0) < own.get(task.task_id, 0)
        and gains.get(task.needs[0].chip_class, set()) - {task.order.tenant}
    }


def _takes(state: State, task: TaskState, seat: Seat | None) -> bool:
    """Whether it takes more devices than it holds, or waits for some that may be kept for it."""
    if seat is None:
        return task.phase is Phase.QUEUED and reserves(state, task)
    return more_than_held(task, seat.point) > 0


def _put_off(state: State, draft: Draft, movable: list[TaskState], chosen: dict[str, Seat]) -> bool:
    """Under a policy of TOGETHER a choice that moves a running task waits for the end of the minute, and what is then chosen is done: the
    arrivals and ends of a minute are answered by one change.  A choice that moves nobody is done at once, and one for a service."""
    if state.settings.policy not in TOGETHER or large(state):
        return False
    held = {task.task_id: task.point_id for task in movable if task.phase is Phase.RUNNING}
    seats = {name: chosen[name].point.point_id if name in chosen else None for name in held}
    if all(seats[name] == point for name, point in held.items()):
        state.moves_at_s = None
        return False
    waiting = [task for task in movable if task.phase is Phase.QUEUED and task.task_id in chosen]
    moved = [task for task in movable if task.task_id in held and seats[task.task_id] != task.point_id]
    if draft.together or any(task.order.hours is not None for task in (*waiting, *moved)):
        return False
    if state.moves_at_s is None:
        state.moves_at_s = (draft.moment.now_s // MINUTE_S + 1.0) * MINUTE_S
    for task in waiting:
        why = "waits for the end of the minute, when tasks that run make room"
        state.tasks[task.task_id] = replace(task, why_waiting=why, promised_until_s=state.moves_at_s)
    return True


def _take(state: State, draft: Draft, task: TaskState, seat: Seat, free: dict[str, int]) -> None:
    for key, devices in seat.needs:
        free[key] -= devices
    reserve(state, task, seat.engine, seat.point, draft)


def _chosen_whole(state: State, draft: Draft, movable: list[TaskState]) -> dict[str, Seat]:
    """Task -> seat, sought again at most PASSES times until all of each gang in line have one that they may take, or none has."""
    bidders: list[Bidder] = []
    seats: Seats = {}
    for task in sorted(movable, key=lambda task: task.task_id):
        bidder, own = _bidder(state, task, draft)
        if own:
            bidders.append(bidder)
            seats[task.task_id] = own
    lines = lines_of(state, [name for name in state.tasks.gangs if name in seats])
    parts = torn(lines, seats)
    bidders = [bidder for bidder in bidders if bidder.task_id not in parts]
    capacity = _free_for_all(state, draft)
    for task in movable:
        if task.engine is not None:
            for need in task.needs:
                capacity[engine_key(task.engine, need.chip_class)] += need.devices
    if not large(state) and state.settings.policy not in PEERS:
        # Who waits for what is given up makes nobody else give way.  A large board keeps it for who it is promised to; a peer's policy
        # is about what there is: shown what is to come, sia moves four times as many.
        for task in (*state.tasks.in_phase(Phase.STOPPING), *state.tasks.in_phase(Phase.RESIZING)):
            key = engine_key(EngineId(task.engine or ""), task.needs[0].chip_class)
            if key in capacity:
                capacity[key] += freeing(task)
    first = _owners_first(state, draft, bidders, seats)
    for seat in first.values():
        capacity.update((key, capacity[key] - devices) for key, devices in seat.needs)
    bidders = [bidder for bidder in bidders if bidder.task_id not in first]
    chosen = _chosen(state, draft, bidders, seats, capacity)
    aside = Aside()
    for _ in range(PASSES if lines else 0):
        parts = torn(lines, chosen)
        forbidden = {} if parts else barred_of_gangs(state, draft, lines, chosen)
        if not parts and not forbidden:
            break
        aside.take(state, parts, draft)
        bidders = [_without(bidder, forbidden) for bidder in bidders]
        bid = [bidder for bidder in bidders if bidder.task_id not in aside.names]
        chosen = _chosen(state, draft, bid, seats, capacity)
    return first | chosen


def _owners_first(state: State, draft: Draft, bidders: list[Bidder], seats: Seats) -> dict[str, Seat]:
    """Task -> seat of those that may start at once on what is their own, when others bid for that to be left beside them: else who is kept from
    it would keep it from them until it has its own."""
    if not any(seat.short for own in seats.values() for seat in own.values()):
        return {}
    owners = []
    for bidder in bidders:
        task = state.tasks[TaskId(bidder.task_id)]
        if task.phase is not Phase.QUEUED or task.order.gang:
            continue
        at_once = []
        for one in bidder.candidates:
            seat = seats[bidder.task_id][one.point_id]
            if not seat.short and own_of(state, draft, task, seat.point) == seat.point.devices:
                at_once.append(one)
        owners.append(replace(bidder, candidates=tuple(at_once)))
    owners = [bidder for bidder in owners if bidder.candidates]
    return _chosen(state, draft, owners, seats, _free_for_all(state, draft)) if owners else {}


def _without(bidder: Bidder, forbidden: dict[str, str]) -> Bidder:
    key = forbidden.get(bidder.task_id)
    if key is None:
        return bidder
    return replace(bidder, candidates=tuple(one for one in bidder.candidates if one.point_id != key))


def large(state: State) -> bool:
    return len(state.tasks) > state.settings.look_at_all_up_to


def _chosen(
    state: State, draft: Draft, bidders: list[Bidder], seats: Seats, capacity: dict[str, int]
) -> dict[str, Seat]:
    """Task -> seat: the most value, or what a policy chooses by itself."""
    policy = (PEERS if large(state) else CHOOSERS).get(state.settings.policy)
    if policy is None:
        if at_rest(bidders, capacity):
            found = {bidder.task_id: bidder.current for bidder in bidders if bidder.current is not None}
        else:
            found = adjust(bidders, capacity) if large(state) else allocate(bidders, capacity).chosen
        return {task_id: seats[task_id][key] for task_id, key in found.items()}
    contenders = []
    for bidder in bidders:
        task = state.tasks[TaskId(bidder.task_id)]
        order, point = task.order, task.point() if task.phase is Phase.RUNNING else None
        options = tuple(
            Option(one.point_id, one.needs, seats[bidder.task_id][one.point_id].point.rate)
            for one in bidder.candidates
        )
        held = point.devices / point.rate if point is not None else 1.0
        left = order.curve.work_s - task.done_s if order.hours is None else SERVICE_LEFT_S
        like = point or order.curve.points[0]
        restart_s = like.start_s + like.stop_s
        contenders.append(
            Contender(
                bidder.task_id, options, order.submitted_s, bidder.current, tenant=order.tenant,
                served_s=task.done_s * held, done=task.done_s, left=left, deadline_s=order.deadline_s,
                restarts=max(0, task.attempt - 1), restart_s=restart_s,
            )
        )  # fmt: skip
    found = policy.choose(contenders, capacity, draft.moment.now_s)
    return {task_id: seats[task_id][key] for task_id, key in found.items()}


def _who_bids(state: State, draft: Draft, groups: list[Group]) -> list[TaskState]:
    """Everybody on a small board.  On a large one the dearest that wait, and the running tasks that would give up devices of their
    chip classes for the least, or gain the most by more; the others stay as they are."""
    tasks = state.tasks
    if not large(state):
        return [task for task in tasks.values() if _movable(state, task, draft)]
    free = take_promised(state, draft)
    fitting, left = _dearest(state, draft, groups, free)
    chips = {chip for task in left for chip in tasks.group_of[task.task_id].chips}
    chips |= {key.split("|")[1] for key in tasks.freed}
    running: dict[str, TaskState] = {}

    def allowed(task: TaskState) -> bool:
        return _movable(state, task, draft)

    for key in sorted(free):
        chip = key.split("|")[1]
        if not draft.anew and chip not in chips:
            continue
        found = cheapest(state, draft.moment, key, NEAR, allowed) if left and chip in chips else []
        if free[key] > 0:
            found += hungriest(state, draft.moment, key, NEAR, allowed)
        running.update((task.task_id, task) for task in found)
    first = first_of(state)
    if first is not None and first not in fitting and first not in left:
        left.append(first)
    return [*fitting, *left, *running.values()]


def take_promised(state: State, draft: Draft) -> dict[str, int]:
    """Seats that were being freed for someone are taken by them; what is free of those not whole yet is kept for them, or those
    that gave it up would take it back.  Returns what is free for the others."""
    free = free_devices(state)
    now_s, policy = draft.moment.now_s, state.settings.policy
    promised = [state.tasks[task_id] for task_id in state.tasks.promised]
    for task in sorted(promised, key=lambda task: rank_of(task, now_s, policy)):
        seat = _bidder(state, task, draft)[1].get(task.promised) if task.phase is Phase.QUEUED else None
        if seat is None:  # it waits no more, or may not have it now
            state.tasks[task.task_id] = replace(task, promised="", promised_until_s=0.0)
            continue
        whole = all(free.get(key, 0) >= devices for key, devices in seat.needs)
        if whole and waits_for_block(state, draft, task, seat):
            whole = False
        if whole:
            reserve(state, task, seat.engine, seat.point, draft)
        for key, devices in seat.needs:
            kept = min(devices - seat.beside, max(0, free.get(key, 0) - seat.beside))
            free[key] = free.get(key, 0) - kept
            if not whole:
                draft.kept[key] = draft.kept.get(key, 0) + kept
    return free


def _dearest(
    state: State, draft: Draft, groups: list[Group], free: dict[str, int]
) -> tuple[list[TaskState], list[TaskState]]:
    """Who waits, the dearest first: those that fit at their best point into what is `free`, which is taken off, and of the others
    NEAR and BESIDE for each that fits, since they may be worth more there; all of a gang, which starts together."""
    now_s = draft.moment.now_s
    fitting, left = list[TaskState](), list[TaskState]()
    heap = []
    most = NEAR + (1 + BESIDE) * max(0, sum(free.values()))
    for number, group in enumerate(group for group in groups if group.members):
        line = by_bid(state, group, now_s, most)
        heap.append((next(line), number, line))
    heapify(heap)
    while heap and len(left) < NEAR + BESIDE * len(fitting):
        rank, number, line = heap[0]
        following = next(line, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (following, number, line))
        task = state.tasks[rank[2]]
        if task.promised or task.phase is not Phase.QUEUED:
            continue
        bidder, _ = _bidder(state, task, draft)
        if not bidder.candidates:
            continue
        best = max(bidder.candidates, key=preference)
        if all(free.get(key, 0) >= devices for key, devices in best.needs):
            for key, devices in best.needs:
                free[key] -= devices
            fitting.append(task)
        else:
            left.append(task)
    bid = {task.task_id for task in (*fitting, *left)}
    mates = {one.task_id: one for task in (*fitting, *left) for one in gang_in_line(state, task)}
    return fitting, left + [
        one for task_id, one in mates.items() if task_id not in bid and one.phase is Phase.QUEUED
    ]


def _movable(state: State, task: TaskState, draft: Draft) -> bool:
    return task.phase is Phase.QUEUED or makes_room(state, task, draft.moment.now_s)


def _bidder(state: State, task: TaskState, draft: Draft) -> tuple[Bidder, dict[str, Seat]]:
    """What the task bids, and for which seats.  Kept where time and what others hold cannot change it: of those that wait one bid a group."""
    if task.phase is Phase.QUEUED and can_go_home(state, task, draft.moment.now_s):
        return Bidder(task.task_id, ()), {}
    if (
        state.reserves or state.links or state.uncounted or task.refused or task.order.apart
        or task.phase not in (Phase.QUEUED, Phase.RUNNING)
        or not steady(task.order, state.settings.policy) or watched(state)
    ):  # fmt: skip
        return _bid(state, task, draft)
    engines = tuple((engine, known) for engine, known in state.engines.items() if not known.chooses)
    if task.phase is Phase.QUEUED:
        group = state.tasks.group_of[task.task_id]
        if group.bid is None or group.bid[0] != engines:
            group.bid = (engines, *_bid(state, task, draft))
        bidder, seats = group.bid[1:]
        return Bidder(task.task_id, bidder.candidates), seats
    now, known = task.point(), state.tasks.bids.get(task.task_id)
    assert now is not None
    mark = (ran_s(task, now, draft.moment.now_s), engines)
    if known is None or known[0] is not task or known[1] != mark:
        known = state.tasks.bids[task.task_id] = (task, mark, *_bid(state, task, draft))
    return known[2], known[3]


def _bid(state: State, task: TaskState, draft: Draft) -> tuple[Bidder, dict[str, Seat]]:
    owner = worth_of(task.order, task.done_s, draft.moment.now_s, state.settings.policy)
    candidates, current_key, moves = [], None, Moves(state, task)
    now = task.point() if task.phase is Phase.RUNNING else None
    again = 0.0
    if now is not None:  # what a stop would throw away
        again = start_again(task, owner, now, unsaved_s(task, now))
    seats: dict[str, Seat] = {}
    for engine, known in sorted(state.engines.items()):
        if known.chooses or known.lost or engine in state.uncounted or _refused(task, engine, draft):
            continue
        if task.phase is Phase.RUNNING and engine != task.engine:
            continue
        for point, offer in seats_at(task, known.offers):
            if task.phase is Phase.RUNNING and point.needs[0].chip_class != task.needs[0].chip_class:
                continue  # a resize holds the larger of two shapes of one class; it cannot hold both classes
            seat = Seat(engine, offer, point)
            stays = task.phase is Phase.RUNNING and task.engine == engine and point.point_id == task.point_id
            tariff = offer.tariff_micro_cny_per_device_hour
            if task.phase is Phase.QUEUED:
                worth = worth_there(owner, point, tariff, moves.to(offer.site))
                worth -= point.devices * known.electricity_of(offer.chip_class) / SECONDS_PER_HOUR
            else:  # what a stop would throw away speaks for staying, and for a change that does without
                assert now is not None
                saved = again if stays else spared(state, task, owner, now, point, again)
                worth = owner.of(point, tariff, running=saved > 0) + saved
                current_key = seat.key if stays else current_key
            open_seat = seat_for(state, draft, task, seat) if worth > 0 else None
            if open_seat is not None:
                seats[seat.key] = open_seat
                candidates.append(Candidate(seat.key, open_seat.needs, worth))
    return Bidder(task.task_id, tuple(candidates), current_key), seats


def _refused(task: TaskState, engine: EngineId, draft: Draft) -> bool:
    return any(name == engine and again_s > draft.moment.now_s for name, again_s in task.refused)


def _free_for_all(state: State, draft: Draft) -> dict[str, int]:
    """Free devices that are not kept for a promised seat."""
    return {key: devices - draft.kept.get(key, 0) for key, devices in free_devices(state).items()}


def _keep_or_change(state: State, task: TaskState, seat: Seat | None, draft: Draft) -> None:
    assert task.engine is not None
    assert task.lease_id is not None
    now = task.point()
    assert now is not None
    if seat is None:
        why = "dearer tasks need its devices"
        draft.because(task.task_id, "preempted", f"parked with its checkpoint: {why}", point=task.point_id)
        after = AfterStop.RETURN if task.parent is not None else AfterStop.QUEUE
        order_stop(state, note(state, task, draft), draft, park=True, why=why, after=after)
    elif seat.point.point_id != task.point_id:
        if barred(state, draft, task, seat):
            return
        draft.placed.storage.pop(seat.engine, None)  # counted anew with its next shape
        grows = seat.point.devices > now.devices
        verdict = "grown" if grows else "shrunk" if seat.point.devices < now.devices else "reshaped"
        cost_s = change_s(state, task, now, seat.point)
        cost = f"{cost_s:.1f} s in place" if cost_s < now.stop_s + seat.point.start_s else f"{cost_s:.0f} s"
        draft.because(
            task.task_id,
            verdict,
            f"from {now.point_id} ({format_devices(now.devices)}) to {seat.point.point_id} ({seat.point.devices});"
            f" {time_left_s(task.order, now, task.done_s):.0f} s left before, "
            f"{time_left_s(task.order, seat.point, task.done_s):.0f} s after, the change costs {cost}",
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
