"""What a waiting task runs into as things are, in one sentence, computed when it is asked for."""

from qipan.scheduler.ask_table import in_regions
from qipan.scheduler.asks import engine_key, free_devices, price_of
from qipan.scheduler.bids import worth_of
from qipan.scheduler.conditions import unmet
from qipan.scheduler.moves import Moves, worth_there
from qipan.scheduler.owners import refused_by_rule
from qipan.scheduler.state import Draft, Moment, Phase, State, TaskState

SECONDS_PER_HOUR = 3600


def why_waiting_text(state: State, task: TaskState, now_s: float) -> str:
    """Empty for a task that does not wait."""
    if task.phase is not Phase.QUEUED:
        return ""
    if state.parked:
        return "the board is parked"
    if task.promised_until_s > now_s:
        return task.why_waiting
    group = state.tasks.group_of[task.task_id]
    if group.said is None or group.said[0] != state.tick:
        group.said = (state.tick, _text(state, task, now_s))
    return group.said[1]


def _text(state: State, task: TaskState, now_s: float) -> str:
    moves = Moves(state, task)
    order, limits, draft = task.order, set(), Draft(Moment(now_s, 0.0))
    free = free_devices(state)
    owner = worth_of(order, task.done_s, now_s, state.settings.policy)
    for engine, known in sorted(state.engines.items()):
        for offer in known.offers:
            points = [point for point in order.curve.points if point.needs[0].chip_class == offer.chip_class]
            if not points:
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
                have = free[engine_key(engine, offer.chip_class)] if not known.chooses else offer.largest_gang
                if not known.chooses or point.devices > have:
                    limits.add(
                        f"{where} has {have} devices of {offer.chip_class} to give at once, it needs {point.devices}"
                    )
                    continue
                sent = state.sent_down.get(f"{engine}|{offer.chip_class}|{offer.site}", 0)
                ask = price_of(offer, point.devices, sent)
                move = moves.to(offer.site)
                worth = (
                    worth_there(owner, point, offer.tariff_micro_cny_per_device_hour, move) * SECONDS_PER_HOUR
                )
                first = f" after its {move}" if move.size_bytes else ""
                limits.add(
                    f"{where} has no {point.devices} devices of {offer.chip_class} to give now"
                    if ask is None
                    else f"{where} asks {ask / 1e6:.4f} CNY/h for {point.devices} devices of {offer.chip_class},"
                    f" {point.point_id} is worth {worth / 1e6:.4f}{first}"
                )
    told = sorted(limits)
    more = f"; and so at {len(told) - 6} more places" if len(told) > 6 else ""
    return "; ".join(told[:6]) + more or "no engine offers a chip class it can run on"
