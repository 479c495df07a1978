"""Seats that tasks may take at engines: which there are, what forbids one, and taking it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from qipan.curves import Point
from qipan.events import Reserve
from qipan.leases import EngineId, LeaseId, Offer
from qipan.quantities import format_devices
from qipan.scheduler.ask_table import allows
from qipan.scheduler.asks import engine_key
from qipan.scheduler.bids import time_left_s
from qipan.scheduler.conditions import set_down, unmet
from qipan.scheduler.moves import checkpoint_at
from qipan.scheduler.owners import owed_at, own_of, refused_by_rule, took
from qipan.scheduler.state import Draft, EngineState, Phase, State, TaskState, ToEngine, lease_for


@dataclass(frozen=True, slots=True)
class Seat:
    """One (engine, point) that a task may take.  Where the free devices are kept for an owner, others give up `short` of theirs first, and
    `beside` must stay free there beside its own."""

    engine: EngineId
    offer: Offer
    point: Point
    short: int = 0
    beside: int = 0

    @property
    def key(self) -> str:
        return f"{self.engine}|{self.point.point_id}"

    @property
    def needs(self) -> tuple[tuple[str, int], ...]:
        """("engine|chip class", devices that must be its own or free)."""
        return tuple(
            (engine_key(self.engine, need.chip_class), need.devices + self.beside)
            for need in self.point.needs
        )


def usable_engines(state: State, *, chooses: bool) -> dict[EngineId, EngineState]:
    """Engines that can be given tasks now."""
    return {
        engine: known
        for engine, known in state.engines.items()
        if known.chooses is chooses and not known.lost and engine not in state.uncounted
    }


def seats_at(task: TaskState, offers: Iterable[Offer]) -> list[tuple[Point, Offer]]:
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


def usable_points(task: TaskState, offers: Iterable[Offer]) -> list[Point]:
    """The points that the engine's chip classes could ever give, in the curve's order."""
    found = {point.point_id for point, _ in seats_at(task, offers)}
    return [point for point in task.order.curve.points if point.point_id in found]


def barred(
    state: State,
    draft: Draft,
    task: TaskState,
    seat: Seat,
    taken: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> bool:
    """Whether a quota rule, or what the place has beside devices, forbids the seat.  `taken` as in `refused_by_rule`."""
    short = _short(state, draft, task, seat, taken)
    return short is None or short > seat.short


def seat_for(state: State, draft: Draft, task: TaskState, seat: Seat) -> Seat | None:
    """The seat with what others must give up first; None where it is forbidden whatever they give up."""
    short = _short(state, draft, task, seat)
    if not short:
        return seat if short == 0 else None
    key, more = seat.needs[0][0], more_than_held(task, seat.point)
    return replace(seat, short=short, beside=max(0, _free_at(state, seat.engine, key) + short - more))


def _free_at(state: State, engine: EngineId, key: str) -> int:
    """Devices of "engine|chip class" that no task holds."""
    offers = state.engines[engine].offers
    there = sum(offer.devices for offer in offers if key == engine_key(engine, offer.chip_class))
    return there - state.tasks.held.get(key, 0)


def _short(
    state: State,
    draft: Draft,
    task: TaskState,
    seat: Seat,
    taken: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> int | None:
    """Devices that others must give up first; None: the seat is forbidden all the same."""
    short, more = 0, more_than_held(task, seat.point)
    if state.reserves and more > 0:
        refused = refused_by_rule(state, draft, task, seat.point, more, taken)
        if refused is not None:
            if not refused.short:
                return None
            short = refused.short
        for key, _ in seat.needs:
            owed = owed_at(state, draft.moment.now_s, task, key)
            if owed:
                short = max(short, owed + more - _free_at(state, seat.engine, key))
    return short if unmet(state, draft, task, seat.engine, seat.point) is None else None


def more_than_held(task: TaskState, point: Point) -> int:
    """Devices of the point's chip class that it would hold beyond those it holds."""
    held = sum(need.devices for need in task.needs if need.chip_class == point.needs[0].chip_class)
    return point.devices - (held if task.engine is not None else 0)


def reserve(state: State, task: TaskState, engine: EngineId, point: Point, draft: Draft) -> None:
    longer = set_down(state, draft, task, engine, point)
    own = max(task.order.own, own_of(state, draft, task, point))
    state.lease_sequence += 1
    lease_id = LeaseId(f"{state.board}-{state.term}-{state.lease_sequence}")
    task = replace(
        state.tasks[task.task_id],
        phase=Phase.RESERVING,
        since_s=draft.moment.now_s,
        engine=engine,
        lease_id=lease_id,
        point_id=point.point_id,
        needs=point.needs,
        generation=task.generation + 1,
        why_waiting="",
        promised_until_s=0.0,
        promised="",
        owed=None,
        idle_since_s=None,
        noticed_s=None,
        lent=(),
        checkpoint_longer=longer,
    )
    state.tasks[task.task_id] = task
    took(state, draft, task, point)
    order = replace(
        task.order,
        saved_s=task.saved_s,
        checkpoint_at=checkpoint_at(task),
        attempt=task.attempt,
        preempted_s=task.preempted_s,
        fence=(*task.order.fence, state.term, task.generation),
        above=task.parent.lease_id if task.parent is not None else "",
        checkpoint_longer=longer,
        own=own,
    )
    hours = task.order.hours
    left = f"{time_left_s(task.order, point, task.done_s):.0f} s of work left at that point"
    if hours is not None:
        left = f"replica {hours.replica} of a service"
    apart = ""
    if longer > 1:
        apart = (
            f"; {longer:.3g} times as long between its checkpoints as planned: more its storage cannot write"
        )
    draft.because(
        task.task_id,
        "placed",
        f"{engine} at {point.point_id}: {format_devices(point.devices)}, {left}{apart}",
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
        point.needs,
        lease_for(state, task, draft.moment),
    )
    draft.commands.append(ToEngine(engine, command))
