"""Why a task waits: remove one constraint at a time and decide again, on a copy; then the least change of that one that starts it.
Never from templates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qipan.curves import Need
from qipan.leases import EngineId, Out, TaskId
from qipan.quantities import format_bytes, format_devices, format_money
from qipan.quota import REMEMBERED, QuotaRule, Rate
from qipan.scheduler.asks import engine_key
from qipan.scheduler.backfill import first_of, goes_first
from qipan.scheduler.bids import progress_value
from qipan.scheduler.conditions import held_of_storage
from qipan.scheduler.decide import decide
from qipan.scheduler.gangs import gang_in_line
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.moves import pieces_of
from qipan.scheduler.state import Moment, Phase, State, TaskState, named_to
from qipan.scheduler.tasks import Tasks

#: a higher bid is looked for up to this many times the present one
BID_MOST = 1024
#: running tasks tried one by one
OTHERS_TRIED = 12


@dataclass(frozen=True, slots=True)
class Change:
    """One change that would start the task now.  `make` makes it in a state."""

    constraint: str
    text: str
    make: Callable[[State], None]


def why_waiting(state: State, task_id: TaskId, now_s: float, lease_s: float) -> list[dict[str, str]]:
    """For a queued task: what it runs into as it is, and each single change that would start it now.  Empty for a task
    that is not waiting."""
    task = state.tasks.get(task_id)
    if task is not None and task.phase is Phase.BEHIND:
        return [{"constraint": "after", "text": why_waiting_text(state, task, now_s)}]
    if task is not None and task.phase is Phase.LENT:
        return [{"constraint": "forecast", "text": why_waiting_text(state, task, now_s)}]
    if task is None or task.phase is not Phase.QUEUED:
        return []
    found = [{"constraint": "now", "text": why_waiting_text(state, task, now_s)}]
    changes = changes_that_start(state, task_id, Moment(now_s, lease_s))
    return found + [{"constraint": change.constraint, "text": change.text} for change in changes]


def changes_that_start(state: State, task_id: TaskId, moment: Moment) -> list[Change]:
    """Cheapest first: what only lifts a refusal, then what moves a limit, then what costs money or others' work."""
    task = state.tasks[task_id]
    found: list[Change] = []
    for change in _tried(state, task, moment):
        told = change.constraint in ("gang", "data") and any(
            other.constraint == change.constraint for other in found
        )
        if not told and _starts(state, task_id, change.make, moment):
            found.append(change)
    return found


def _tried(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    """The candidates; each that can be small is sought as small as it starts the task."""
    yield from _of_the_board(state, task, moment)
    yield from _of_the_rules(state, task, moment)
    yield from _of_the_place(state, task, moment)
    yield from _of_the_limits(state, task, moment)
    yield from _of_the_bid(state, task, moment)
    yield from _of_others(state, task, moment)


def _of_the_board(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    def unpark(state: State) -> None:
        state.parked = False

    if state.parked:
        yield Change("parked", "the board is parked; `qipan up` takes it up again", unpark)
    waits = [(again_s, engine) for engine, again_s in task.refused if again_s > moment.now_s]
    if waits:
        again_s, engine = min(waits)
        yield Change(
            "refusals",
            f"{engine}, which refused it lately, is asked again in {again_s - moment.now_s:.0f} s",
            _setter(task, refused=()),
        )
    for engine in sorted(state.engines):
        if state.engines[engine].lost or engine in state.uncounted:
            yield Change("engine", f"{engine} does not answer; with it, it would start", _answers(engine))
        for out in state.engines[engine].out:
            yield Change(
                "drain",
                f"with {format_devices(out.devices)} of {out.chip_class} back: {out.why}",
                _back(engine, out),
            )


def _back(engine: EngineId, out: Out) -> Callable[[State], None]:
    def make(state: State) -> None:
        state.engines[engine] = state.engines[engine].with_more(out.chip_class, out.devices)

    return make


def _answers(engine: str) -> Callable[[State], None]:
    def make(state: State) -> None:
        for name in [name for name in state.engines if name == engine]:
            state.engines[name] = replace(state.engines[name], lost=False)
            state.uncounted.pop(name, None)

    return make


def _of_the_rules(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    together = gang_in_line(state, task) or [task]
    wanted = sum(max(point.devices for point in one.order.curve.points) for one in together)
    slowest = max(point.stop_s for point in task.order.curve.points)
    for number, rule in enumerate(state.rules):
        for part in ("per_task", "per_tenant"):
            rate: Rate | None = getattr(rule, part)
            if rate is not None:
                at = _rate_at(number, part, rate)
                least = _least(state, task, moment, rate.most, rate.most + REMEMBERED, at)
                wider = replace(rate, most=least)
                yield Change(
                    "preemptions", f"with `preemptions: {{{part}: {wider}}}` in {rule.name()}", at(least)
                )
        if rule.idle is not None and state.tasks.lent:
            later = replace(rule.idle, notice_s=max(rule.idle.notice_s, slowest))
            yield Change(
                "idle",
                f"with a notice of {later.notice_s:g} s for idle leases in {rule.name()}",
                _rule(number, idle=later),
            )
        if rule.tenant == task.order.tenant:
            held = sum(
                count
                for (tenant, chip), count in state.tasks.held_by.items()
                if tenant == rule.tenant and rule.covers(chip)
            )
            if rule.ceiling is not None:
                least = _least(state, task, moment, rule.ceiling, held + wanted, _rule_at(number, "ceiling"))
                yield Change(
                    "ceiling", f"with a ceiling of {least} in {rule.name()}", _rule(number, ceiling=least)
                )
            if rule.borrow is not None:
                least = _least(state, task, moment, rule.borrow, held + wanted, _rule_at(number, "borrow"))
                yield Change(
                    "borrow", f"with `borrow: {least}` in {rule.name()}", _rule(number, borrow=least)
                )
            if rule.protect:
                yield Change(
                    "protect",
                    f"without `protect` in {rule.name()} it could borrow",
                    _rule(number, protect=()),
                )
            continue
        if rule.loan is not None and rule.floor:
            change_s = rule.loan.next_change_s(moment.now_s)
            opens = (
                f" (they open in {(change_s - moment.now_s) / 3600:.1f} h)" if change_s is not None else ""
            )
            always = replace(rule.loan, from_s=0.0, until_s=0.0)
            if not rule.loan.open_at(moment.now_s):
                yield Change(
                    "hours", f"within the lending hours of {rule.name()}{opens}", _rule(number, loan=always)
                )
            longer = replace(rule.loan, notice_s=max(rule.loan.notice_s, slowest))
            yield Change(
                "notice",
                f"with a notice of {longer.notice_s:g} s in {rule.name()}",
                _rule(number, loan=longer),
            )
        if rule.floor:
            most = _most(state, task, moment, rule.floor, _rule_at(number, "floor"))
            yield Change("floor", f"with a floor of {most} in {rule.name()}", _rule(number, floor=most))
        if rule.share:
            yield Change("share", f"without the share in {rule.name()}", _rule(number, share=0.0))
    if state.reserves and not task.order.preemptible and task.order.hours is None:
        yield Change(
            "elastic",
            "with `elastic: true`: what may be parked may borrow",
            _setter_of_order(task, preemptible=True),
        )


def _of_the_place(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    order = task.order
    for engine, known in sorted(state.engines.items()):
        room = known.room
        if room is None:
            continue
        held = held_of_storage(state, engine)
        if room.space_bytes and any(point.storage_bytes for point in order.curve.points):
            most = sum(space_bytes for space_bytes, _ in held) + max(
                point.storage_bytes for point in order.curve.points
            )
            least = _least(state, task, moment, room.space_bytes, most, _with_space(engine))
            more = format_bytes(least - room.space_bytes)
            yield Change("storage", f"with {more} more in {room.storage_id}", _with_space(engine)(least))
        left = room.write_bytes_per_s - sum(rate for _, rate in held)
        rate = max(point.storage_bytes_per_s for point in order.curve.points)
        if room.write_bytes_per_s and 0 < left < rate:
            longer = math.ceil(10 * rate / left) / 10
            yield Change(
                "storage rate",
                f"with {longer:.3g} times as long between its checkpoints (`checkpoint: longest`)",
                _setter_of_order(task, checkpoint_longer_max=longer),
            )
    for engine, known in sorted(state.engines.items()):
        most = max((price for _, price in known.electricity), default=0)
        if most:
            cheaper = _electricity_at(engine)
            price = _most(state, task, moment, most, cheaper)
            text = f"when electricity at {engine} costs no more than {format_money(price)} a device-hour beyond the tariff"
            yield Change("electricity", text, cheaper(price))
    pieces = pieces_of(task)
    if state.links and pieces:
        size = sum(piece_bytes for _, piece_bytes in pieces)
        for site in sorted({offer.site for known in state.engines.values() for offer in known.offers}):
            moved = replace(order, data_bytes_at=((site, size),), checkpoint_bytes=0)
            there = _setter(task, order=moved)
            yield Change("data", f"with its {format_bytes(size)} of data and checkpoints at {site}", there)
    if order.apart:
        yield Change("apart", f"without `limits.apart: {order.apart}`", _setter_of_order(task, apart=""))


def _with_space(engine: EngineId) -> Callable[[int], Callable[[State], None]]:
    def of(space_bytes: int) -> Callable[[State], None]:
        def make(state: State) -> None:
            known = state.engines[engine]
            assert known.room is not None
            state.engines[engine] = replace(known, room=replace(known.room, space_bytes=space_bytes))

        return make

    return of


def _electricity_at(engine: EngineId) -> Callable[[int], Callable[[State], None]]:
    """No chip class dearer than that."""

    def of(most: int) -> Callable[[State], None]:
        def make(state: State) -> None:
            known = state.engines[engine]
            less = tuple((chip, min(price, most)) for chip, price in known.electricity)
            state.engines[engine] = replace(known, electricity=less)

        return make

    return of


def _of_the_limits(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    order = task.order
    offers = [offer for engine in sorted(state.engines) for offer in state.engines[engine].offers]
    if order.regions:
        for place in sorted({offer.region or offer.site for offer in offers}):
            yield Change(
                "regions",
                f"with {place} in limits.regions",
                _setter_of_order(task, regions=(*order.regions, place)),
            )
    if order.vendors:
        for vendor in sorted({offer.chip_class.split("/")[0] for offer in offers} - {*order.vendors}):
            yield Change(
                "vendors",
                f"with {vendor} in limits.vendors",
                _setter_of_order(task, vendors=(*order.vendors, vendor)),
            )
    if order.deadline_s is not None:
        yield Change(
            "deadline",
            "without its deadline: no point that is free meets it",
            _setter_of_order(task, deadline_s=None),
        )
    yield from _smaller(state, task)


def _smaller(state: State, task: TaskState) -> Iterator[Change]:
    """A point of fewer devices than its curve has, at the rate of the nearest one in proportion."""
    least: dict[str, int] = {}
    for point in task.order.curve.points:
        chip = str(point.needs[0].chip_class)
        least[chip] = min(least.get(chip, point.devices), point.devices)
    for chip, devices in sorted(least.items()):
        point = next(
            point
            for point in task.order.curve.points
            if point.devices == devices and point.needs[0].chip_class == chip
        )
        for fewer in range(devices - 1, 0, -1):
            smaller = replace(
                point, point_id=f"{point.point_id}/{fewer}", needs=(Need(point.needs[0].chip_class, fewer),),
                rate=point.rate * fewer / devices,
            )  # fmt: skip
            curve = replace(task.order.curve, points=(*task.order.curve.points, smaller))
            change = Change(
                "gang",
                f"with {format_devices(fewer)} of {chip} instead of {devices}",
                _setter_of_order(task, curve=curve),
            )
            yield change


def _of_the_bid(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    bid = task.order.bid_micro_cny_per_device_hour

    def at(price: int) -> Callable[[State], None]:
        return _setter_of_order(task, bid_micro_cny_per_device_hour=price)

    least = _least(state, task, moment, bid, max(bid, 1) * BID_MOST, at)
    text = (
        f"with a limits.max_cost that bids {format_money(least)} a device-hour instead of {format_money(bid)}"
    )
    yield Change("bid", text, at(least))


def _of_others(state: State, task: TaskState, moment: Moment) -> Iterator[Change]:
    """Without the one that devices are kept for; without the running task of the least value whose end would make room, else all of them."""
    first = _kept_for_another(state, task)
    if first is not None:
        text = f"if {named_to(task, first)}, for which devices are kept, did not wait"
        yield Change("reservation", text, _without((first.task_id,)))
    others = [one for one in _neighbours(state, task) if one.phase is Phase.RUNNING]
    policy = state.settings.policy
    others.sort(key=lambda one: (progress_value(one.order, one.done_s, moment.now_s, policy), one.task_id))
    for other in others[:OTHERS_TRIED]:
        gone = _without((other.task_id,))
        if _starts(state, task.task_id, gone, moment):
            yield Change(
                "other tasks",
                f"when {named_to(task, other)} ends, which is worth the least of those in its place",
                gone,
            )
            return
    gone = _without(tuple(one.task_id for one in (*others, *([first] if first is not None else []))))
    yield Change("other tasks", "if the other tasks were not there", gone)


def _kept_for_another(state: State, task: TaskState) -> TaskState | None:
    """The waiting task that devices are kept for, where that is in this one's way."""
    first = first_of(state)
    return first if first not in (None, task) and not goes_first(state, task) else None


def _without(task_ids: tuple[TaskId, ...]) -> Callable[[State], None]:
    def make(state: State) -> None:
        for task_id in task_ids:
            state.tasks.pop(task_id, None)

    return make


# ---- deciding again ----------------------------------------------------------------------------------------------------


def _starts(state: State, task_id: TaskId, make: Callable[[State], None], moment: Moment) -> bool:
    """Whether the task is given devices, or others are told to give them to it."""
    copy = _copy(state, state.tasks[task_id])
    make(copy)
    decide(copy, (), moment)
    after = copy.tasks.get(task_id)
    if after is None:
        return False
    return after.phase is not Phase.QUEUED or after.promised_until_s > moment.now_s


def _copy(state: State, task: TaskState) -> State:
    """A state with the task, its gang and those that hold what it could use; the others are there as the devices they hold."""
    kept = {one.task_id: one for one in _neighbours(state, task)} | {task.task_id: task}
    kept |= {task_id: state.tasks[task_id] for task_id in state.tasks.lent}
    first = _kept_for_another(state, task)
    if first is not None:
        there = state.tasks.at(EngineId(state.first_at.split("|")[0]))
        kept |= {one.task_id: one for one in (first, *there)}
    kept |= {one.task_id: one for name in task.order.gang if (one := state.tasks.get(TaskId(name)))}
    copy = replace(state, tasks=Tasks(kept, state.lease_due_s, state.time_due_s), engines=dict(state.engines))
    copy.sent_down, copy.uncounted = dict(state.sent_down), dict(state.uncounted)
    copy.moves_at_s = 0.0  # what would be done at the end of the minute
    copy.over, copy.more, copy.preempted_s = {}, True, dict(state.preempted_s)
    copy.tasks.held = dict(state.tasks.held)
    copy.tasks.held_by = dict(state.tasks.held_by)
    return copy


def _neighbours(state: State, task: TaskState) -> list[TaskState]:
    chips = sorted({need.chip_class for point in task.order.curve.points for need in point.needs})
    keys = [
        engine_key(engine, chip)
        for engine in sorted(state.engines)
        if not state.engines[engine].chooses
        for chip in chips
    ]
    found = {one.task_id: one for key in keys for one in state.tasks.at_chip(key)}
    for engine, known in state.engines.items():
        if known.room is not None:  # what lies in its storage counts, on whatever chips it was made
            found.update((one.task_id, one) for one in state.tasks.at(engine))
        apart = state.tasks.apart.get((engine, task.order.tenant, task.order.apart), ())
        found.update((task_id, state.tasks[task_id]) for task_id in apart)
    return [found[task_id] for task_id in sorted(found)]


def _least(
    state: State,
    task: TaskState,
    moment: Moment,
    now: int,
    most: int,
    make: Callable[[int], Callable[[State], None]],
) -> int:
    """The least number from `now` to `most` that starts the task, by halving; `most` when none does."""
    if not _starts(state, task.task_id, make(most), moment):
        return most
    low, high = now, most
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        if _starts(state, task.task_id, make(middle), moment):
            high = middle
        else:
            low = middle
    return high


def _most(
    state: State, task: TaskState, moment: Moment, now: int, make: Callable[[int], Callable[[State], None]]
) -> int:
    """The most below `now` that starts the task; 0 when none does."""
    low, high = 0, now
    while high - low > 1:
        middle = (low + high) // 2
        if _starts(state, task.task_id, make(middle), moment):
            low = middle
        else:
            high = middle
    return low


def _setter(task: TaskState, **changes: object) -> Callable[[State], None]:
    def make(state: State) -> None:
        state.tasks[task.task_id] = replace(state.tasks[task.task_id], **changes)  # type: ignore[arg-type]

    return make


def _setter_of_order(task: TaskState, **changes: object) -> Callable[[State], None]:
    def make(state: State) -> None:
        now = state.tasks[task.task_id]
        state.tasks[task.task_id] = replace(now, order=replace(now.order, **changes))  # type: ignore[arg-type]

    return make


def _rule(number: int, **changes: object) -> Callable[[State], None]:
    def make(state: State) -> None:
        rules: list[QuotaRule] = [*state.rules]
        rules[number] = replace(rules[number], **changes)  # type: ignore[arg-type]
        state.rules = tuple(rules)

    return make


def _rule_at(number: int, part: str) -> Callable[[int], Callable[[State], None]]:
    """The rule with that part set to the number given."""
    return lambda devices: _rule(number, **{part: devices})


def _rate_at(number: int, part: str, rate: Rate) -> Callable[[int], Callable[[State], None]]:
    return lambda most: _rule(number, **{part: replace(rate, most=most)})


__all__ = ["Change", "changes_that_start", "why_waiting"]
