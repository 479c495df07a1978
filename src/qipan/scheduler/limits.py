"""What a waiting task runs into as things are, in one sentence, computed when it is asked for."""

from collections.abc import Callable

from qipan.leases import EngineId, Offer
from qipan.quantities import format_devices
from qipan.scheduler.ask_table import in_regions
from qipan.scheduler.asks import SECONDS_PER_HOUR, child_key, engine_key, free_devices, price_of
from qipan.scheduler.backfill import first_of, goes_first
from qipan.scheduler.bids import worth_of
from qipan.scheduler.conditions import unmet
from qipan.scheduler.gangs import gang_in_line
from qipan.scheduler.moves import Moves, worth_there
from qipan.scheduler.owners import owed_at, refused_by_rule
from qipan.scheduler.preemptions import limited, spared_by, why_spared
from qipan.scheduler.state import Draft, Moment, Phase, State, TaskState, named_to


def why_waiting_text(state: State, task: TaskState, now_s: float) -> str:
    """Empty for a task that does not wait."""
    if task.phase is Phase.BEHIND:
        return f"starts when {' and '.join(name for name in task.order.after if name in state.tasks)} is done"
    if task.phase is Phase.LENT:
        assert task.order.hours is not None
        return task.order.hours.lent_text(now_s)
    if task.phase is Phase.PARKED:
        return task.why_waiting
    if task.phase is not Phase.QUEUED:
        return ""
    if state.parked:
        return "the board is parked"
    if task.promised_until_s > now_s:
        return task.why_waiting
    group = state.tasks.group_of[task.task_id]
    if group.said is None or group.said[0] != state.tick:
        group.said = (state.tick, _text(state, task, now_s))
    line = gang_in_line(state, task)
    others = [one.task_id for one in line if one.task_id != task.task_id]
    if not others:
        return group.said[1]
    refused = _refused_together(state, line, now_s)
    together = f"{group.said[1]}; it starts together with {', '.join(others)}"
    return f"{together}: {refused}" if refused else together


def _refused_together(state: State, line: list[TaskState], now_s: float) -> str:
    """The rule that keeps a gang from the least which all of it need of a chip class; empty when none does."""
    draft, least = Draft(Moment(now_s, 0.0)), dict[str, int]()
    for one in line:
        point = min(one.order.curve.points, key=lambda point: (point.devices, point.point_id))
        chip = str(point.needs[0].chip_class)
        least[chip] = least.get(chip, 0) + point.devices
        refused = refused_by_rule(state, draft, one, point, least[chip])
        if refused is not None:
            return refused.text
    return ""


def _text(state: State, task: TaskState, now_s: float) -> str:
    told = sorted(_met(state, task, now_s))
    more = f"; and so at {len(told) - 6} more places" if len(told) > 6 else ""
    return "; ".join(told[:6]) + more or "no engine offers a chip class it can run on"


def why_not_at(state: State, task: TaskState, engine: EngineId, board: str, now_s: float) -> str:
    """What it runs into at a board that is the engine, or that the engine leads to."""
    told = sorted(
        _met(state, task, now_s, lambda name, offer: name == engine and board in (name, offer.site))
    )
    return "; ".join(told) or f"{board} offers no chip class it can run on"


def _met(
    state: State,
    task: TaskState,
    now_s: float,
    looked_at: Callable[[EngineId, Offer], bool] = lambda _engine, _offer: True,
) -> set[str]:
    moves = Moves(state, task)
    order, limits, draft = task.order, set(), Draft(Moment(now_s, 0.0))
    free = free_devices(state)
    owner = worth_of(order, task.done_s, now_s, state.settings.policy)
    for engine, known in sorted(state.engines.items()):
        for offer in known.offers:
            points = [point for point in order.curve.points if point.needs[0].chip_class == offer.chip_class]
            if not points or not looked_at(engine, offer):
                continue
            where = offer.site or engine
            if order.vendors and offer.chip_class.split("/")[0] not in order.vendors:
                limits.add(f"limits.vendors keeps it off {offer.chip_class}")
            elif not in_regions(order.regions, offer):
                limits.add(f"limits.regions keeps it out of {where}")
            elif known.lost or engine in state.uncounted:
                limits.add(f"{engine} does not answer")
            elif any(name == engine and again_s > now_s for name, again_s in task.refused):
                limits.add(f"{engine} refused lately")
            else:
                point = min(points, key=lambda point: (point.devices, point.point_id))
                rule = refused_by_rule(state, draft, task, point, point.devices)
                if rule is not None:
                    limits.add(rule.text)
                    continue
                lacking = None if known.chooses else unmet(state, draft, task, engine, point)
                if lacking is not None:
                    limits.add(lacking.text)
                    continue
                key = engine_key(engine, offer.chip_class)
                owed = owed_at(state, now_s, task, key, offer)
                if owed and (known.chooses or free[key] - owed < point.devices):
                    limits.add(
                        f"{where} gives {format_devices(owed)} of {offer.chip_class} back to their owner, whose task waits for them"
                    )
                    continue
                price = known.electricity_of(offer.chip_class)
                power, move = price * point.devices, moves.to(offer.site)
                worth = (
                    worth_there(owner, point, offer.tariff_micro_cny_per_device_hour, move) * SECONDS_PER_HOUR
                )
                if price and worth <= power:
                    limits.add(
                        f"electricity for {format_devices(point.devices)} at {where} costs {power / 1e6:.4f} CNY/h beyond the tariff now,"
                        f" {point.point_id} is worth {worth / 1e6:.4f}"
                    )
                    continue
                have = free[key] if not known.chooses else offer.largest_gang
                at = f"{engine}|{offer.chip_class}" + (f"|{offer.site}" if known.chooses else "")
                kept_for = first_of(state) if state.first_at == at and not goes_first(state, task) else None
                if kept_for not in (None, task) and have >= point.devices:
                    limits.add(
                        f"devices at {where} are kept for {named_to(task, kept_for)}, and it would end after that can begin"
                    )
                    continue
                if not known.chooses or point.devices > have:
                    limits.add(
                        f"{where} has {format_devices(have)} of {offer.chip_class} to give at once, it needs {point.devices}"
                    )
                    if not known.chooses:
                        limits |= _spared(state, key, now_s)
                    continue
                sent = state.sent_down.get(child_key(engine, offer), 0)
                ask = price_of(offer, point.devices, sent)
                first = f" after its {move}" if move.size_bytes else ""
                limits.add(
                    f"{where} has no {format_devices(point.devices)} of {offer.chip_class} to give now"
                    if ask is None
                    else f"{where} asks {ask / 1e6:.4f} CNY/h for {format_devices(point.devices)} of {offer.chip_class},"
                    f" {point.point_id} is worth {worth / 1e6:.4f}{first}"
                )
    return limits


def _spared(state: State, key: str, now_s: float) -> set[str]:
    """Tasks there that are not parked for others now, and by which rule."""
    if not limited(state):
        return set()
    found: dict[str, int] = {}  # the rule -> devices
    for task in state.tasks.at_chip(key):
        rule = spared_by(state, task, now_s) if task.phase is Phase.RUNNING else None
        if rule is not None:
            text = why_spared(rule)
            found[text] = found.get(text, 0) + task.devices
    return {
        f"tasks that were parked often enough hold {format_devices(devices)}: {text}"
        for text, devices in found.items()
    }
