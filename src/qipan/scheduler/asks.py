"""Ask curves: what a board would give a new task, and at what price.

Free devices cost nothing more (the tariff is apart) but what electricity costs beyond it at this hour.  Devices of running elastic tasks cost what their owners
would lose: the value of the progress given up and of the change itself.  These are shadow prices inside one owner.
"""

from dataclasses import replace

from qipan.curves import Point
from qipan.hardware import ChipClassId
from qipan.leases import AskStep, Block, EngineId, Offer, Out
from qipan.scheduler.bids import Worth, steady, worth_of
from qipan.scheduler.policies.objectives import RIGID
from qipan.scheduler.preemptions import within_limits
from qipan.scheduler.reshaping import ran_s, spared, start_again
from qipan.scheduler.state import Moment, Phase, State, TaskState

SECONDS_PER_HOUR = 3600
#: what a gang's progress is worth where it lies over two blocks though it would fit into one: its plan counts on the fast links.  Low enough
#: that a free block elsewhere wins over small differences in price
STRADDLED = 0.75
OUTS_MAX = 16  # nodes or devices named to the parent as not offered


def engine_key(engine: EngineId, chip_class: str) -> str:
    return f"{engine}|{chip_class}"


def child_key(engine: EngineId, offer: Offer) -> str:
    """Of an offer that a board below makes for one of its sites."""
    return f"{engine}|{offer.chip_class}|{offer.site}"


def offered(state: State) -> dict[str, int]:
    """Chip class -> devices of all engines that are not lost, held or not."""
    total: dict[str, int] = {}
    for known in state.engines.values():
        if not known.lost:
            for offer in known.offers:
                total[offer.chip_class] = total.get(offer.chip_class, 0) + offer.devices
    return total


def free_devices(state: State) -> dict[str, int]:
    """(engine, chip class) -> devices at directly called engines that no task holds."""
    free: dict[str, int] = {}
    for engine, known in state.engines.items():
        if not known.chooses and not known.lost:
            for offer in known.offers:
                key = engine_key(engine, offer.chip_class)
                free[key] = free.get(key, 0) + offer.devices
    return {key: devices - state.tasks.held.get(key, 0) for key, devices in free.items()}


def asks_of(state: State, moment: Moment, chips: set[str] | None = None) -> tuple[Offer, ...]:
    """This board's offers to its parent: one per (chip class, site), sorted; of `chips` only when given."""
    offers: dict[tuple[str, str], Offer] = {}
    free = free_devices(state)
    for engine, known in sorted(state.engines.items()):
        if known.lost:
            continue
        for offer in known.offers:
            if chips is not None and offer.chip_class not in chips:
                continue
            if known.chooses:
                own = _less_sent(state, engine, offer)
            else:
                own = _leaf_ask(state, engine, offer, free[engine_key(engine, offer.chip_class)], moment)
            key = (offer.chip_class, offer.site)
            offers[key] = _join(offers[key], own, state.settings.ask_steps) if key in offers else own
    return tuple(offers[key] for key in sorted(offers))


def outs_of(state: State) -> tuple[Out, ...]:
    """What is here and is not offered, for the parent, the most devices first; a leaf's reasons begin with its board.  What is too
    much to tell is told as one a chip class."""
    found = [
        out if known.chooses else replace(out, why=f"{state.board}: {out.why}")
        for _, known in sorted(state.engines.items())
        if not known.lost
        for out in known.out
    ]
    found.sort(key=lambda out: (-out.devices, out.chip_class, out.why))
    more: dict[ChipClassId, list[int]] = {}
    for out in found[OUTS_MAX:]:
        more.setdefault(out.chip_class, []).append(out.devices)
    rest = [
        Out(chip, sum(each), f"{len(each)} more below {state.board}") for chip, each in sorted(more.items())
    ]
    return (*found[:OUTS_MAX], *rest)


def price_of(offer: Offer, devices: int, already_sent: int) -> float | None:
    """Micro-CNY per hour for `devices` from the cheapest step on, after `already_sent`; None when there are too few."""
    price, skip, want = 0.0, already_sent, devices
    for step in offer.asks:
        skipped = min(skip, step.devices)
        take = min(want, step.devices - skipped)
        price += take * step.price_micro_cny_per_device_hour
        skip, want = skip - skipped, want - take
        if want == 0:
            return price
    return None


def nearness(offer: Offer, devices: int, already_sent: int) -> float:
    """STRADDLED for each kind of block that could hold so many and has not enough free in one, after `already_sent`."""
    factor = 1.0
    for block in offer.blocks:
        if block.size >= devices > block.free - already_sent:
            factor *= STRADDLED
    return factor


def give_up_price(state: State, task: TaskState, moment: Moment) -> int:
    """Micro-CNY per device-hour that a running task would lose by its next smaller point."""
    assert task.engine is not None
    offers = state.engines[task.engine].offers
    offer = next(offer for offer in offers if offer.chip_class == task.needs[0].chip_class)
    steps = _give_up(state, task, offer, moment)
    return steps[0].price_micro_cny_per_device_hour if steps else 0


def growth(task: TaskState) -> float:
    """How much better its best point on the chips it holds is than its present one."""
    now = task.point()
    if now is None:
        return 0.0
    chip, allowed = now.needs[0].chip_class, task.parent.points if task.parent is not None else ()
    best = max(
        point.rate
        for point in task.order.curve.points
        if point.needs[0].chip_class == chip and (not allowed or point.point_id in allowed or point is now)
    )
    return best - now.rate


def _leaf_ask(state: State, engine: EngineId, offer: Offer, free: int, moment: Moment) -> Offer:
    asked = two_digits(state.engines[engine].electricity_of(offer.chip_class))
    steps = [AskStep(free, asked)] if free > 0 else []
    if state.settings.asks and state.settings.policy not in RIGID:
        running = [
            task
            for task in state.tasks.at_chip(engine_key(engine, offer.chip_class))
            if task.phase is Phase.RUNNING and task.order.yields
        ]
        for task in within_limits(state, running, moment.now_s):
            left = task.devices
            for step in _give_up(state, task, offer, moment):
                left -= step.devices
                if left < task.order.own:
                    break
                steps.append(step)
    steps.sort(key=lambda step: (step.price_micro_cny_per_device_hour, step.devices))
    steps = steps[: state.settings.ask_steps]
    return replace(offer, asks=tuple(steps), largest_gang=sum(step.devices for step in steps), holders=())


def _give_up(state: State, task: TaskState, offer: Offer, moment: Moment) -> tuple[AskStep, ...]:
    """What the task would lose per device-hour, from its current point down to nothing, never falling on the way
    (devices are given up in this order).  Prices keep two digits, so that the curve changes seldom.  Those of a task whose worth is
    steady are kept until it changes, or has run for twice as long."""
    now = task.point()
    if now is None or now.needs[0].chip_class != offer.chip_class:
        return ()
    mark = (
        ran_s(task, now, moment.now_s), task.point_id, task.done_s, offer.chip_class, offer.tariff_micro_cny_per_device_hour,
        task.parent.points if task.parent is not None else (), task.reshape_s,
        task.engine is not None and state.engines[task.engine].in_place,
    )  # fmt: skip
    known = state.tasks.steps_down.get(task.task_id)
    if known is not None and known[0] is task.order and known[1] == mark:
        return known[2]
    steps = _steps_down(state, task, now, offer, moment)
    if steady(task.order, state.settings.policy):
        state.tasks.steps_down[task.task_id] = (task.order, mark, steps)
    return steps


def _steps_down(
    state: State, task: TaskState, now: Point, offer: Offer, moment: Moment
) -> tuple[AskStep, ...]:
    owner = worth_of(task.order, task.done_s, moment.now_s, state.settings.policy)
    change = start_again(task, owner, now)
    steps, point, floor = [], now, 0.0
    while point is not None:
        below = _next_below(task, point, offer.chip_class)
        devices = point.devices - (below.devices if below else 0)
        lost = _worth(owner, point, now, offer) - (_worth(owner, below, now, offer) if below else 0.0)
        kept = spared(state, task, owner, now, below, change) if point is now and below is not None else 0.0
        if point is now or below is None:  # what a smaller shape in place does not cost, the end does
            lost, change = lost + change - kept, kept
        floor = max(floor, lost / devices)
        steps.append(AskStep(devices, two_digits(floor * SECONDS_PER_HOUR)))
        point = below  # type: ignore[assignment]
    return tuple(steps)


def _worth(owner: Worth, point: Point, now: Point, offer: Offer) -> float:
    return owner.of(point, offer.tariff_micro_cny_per_device_hour, running=point is now)


def _next_below(task: TaskState, point: Point, chip_class: str) -> Point | None:
    allowed = task.parent.points if task.parent is not None else ()
    smaller = [
        other
        for other in task.order.curve.points
        if other.devices < point.devices
        and other.needs[0].chip_class == chip_class
        and (not allowed or other.point_id in allowed)
    ]
    return max(smaller, key=lambda other: (other.devices, other.rate, other.point_id)) if smaller else None


def two_digits(price: float) -> int:
    """Rounded up to two significant digits."""
    whole = max(0, round(price))
    scale: int = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // scale) * scale


def _less_sent(state: State, engine: EngineId, offer: Offer) -> Offer:
    """A child's offer less what was ordered from it since."""
    sent = whole = state.sent_down.get(child_key(engine, offer), 0)
    steps = []
    for step in offer.asks:
        taken = min(sent, step.devices)
        sent -= taken
        if step.devices > taken:
            steps.append(AskStep(step.devices - taken, step.price_micro_cny_per_device_hour))
    blocks = tuple(replace(block, free=max(0, block.free - whole)) for block in offer.blocks)
    return replace(offer, asks=tuple(steps), largest_gang=sum(step.devices for step in steps), blocks=blocks)


def _join(first: Offer, second: Offer, most: int) -> Offer:
    steps = sorted(
        (*first.asks, *second.asks), key=lambda step: (step.price_micro_cny_per_device_hour, step.devices)
    )
    return replace(
        first,
        devices=first.devices + second.devices,
        asks=tuple(steps[:most]),
        largest_gang=max(first.largest_gang, second.largest_gang),
        blocks=_join_blocks(first.blocks, second.blocks),
    )


def _join_blocks(first: tuple[Block, ...], second: tuple[Block, ...]) -> tuple[Block, ...]:
    free: dict[int, int] = {}
    for block in (*first, *second):
        free[block.size] = max(free.get(block.size, 0), block.free)
    return tuple(Block(size, free[size]) for size in sorted(free))
