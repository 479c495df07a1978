"""Tasks that were submitted at a board below: they run there if that is good enough, else rise from board to board.

The top keeps every task, its money and its word to people, and offers one that entered below to the child that leads there.  A board that cannot
place it gives it back to its parent, which asks its next best child as a buyer of its own: region by region, within the owner's
limits.  Good enough is a matter of price: a place elsewhere must be worth more by a share of what the task's progress is worth at its
best, HOME than the board where it entered and NEAR than any board of the same child.
"""

from typing import Any

import numpy as np

from qipan.leases import EngineId, Offer
from qipan.scheduler.asks import SECONDS_PER_HOUR, child_key, nearness, price_of
from qipan.scheduler.bids import worth_of
from qipan.scheduler.moves import Moves, worth_there
from qipan.scheduler.seats import seats_at
from qipan.scheduler.state import State, TaskState

HOME, NEAR = 0.2, 0.1


def leads_to(state: State, board: str) -> EngineId | None:
    """The engine that is the board, or that offers what stands there; None where this board knows no way down to it."""
    if EngineId(board) in state.engines:
        return EngineId(board)
    ways = (
        engine
        for engine, known in sorted(state.engines.items())
        if any(offer.site == board for offer in known.offers)
    )
    return next(ways, None)


def can_go_home(state: State, task: TaskState, now_s: float) -> bool:
    """Whether a child that leads to where the task entered has devices for it there, at no more than they are worth to it: this board's own
    engines are not asked before that."""
    board = task.order.entered_at
    way = leads_to(state, board) if board else None
    if way is None or any(engine == way and again_s > now_s for engine, again_s in task.refused):
        return False
    known = state.engines[way]
    if not known.chooses or known.lost or way in state.uncounted:
        return False
    owner = worth_of(task.order, task.done_s, now_s, state.settings.policy)
    moves = Moves(state, task)
    for point, offer in seats_at(task, known.offers):
        if share_at(board, way, way, offer) == HOME and point.devices <= offer.largest_gang:
            sent = state.sent_down.get(child_key(way, offer), 0)
            ask = price_of(offer, point.devices, sent)
            worth = worth_there(owner, point, offer.tariff_micro_cny_per_device_hour, moves.to(offer.site))
            if ask is not None and worth * nearness(offer, point.devices, sent) >= ask / SECONDS_PER_HOUR:
                return True
    return False


def share_at(board: str, way: EngineId | None, engine: EngineId, offer: Offer) -> float:
    """What a seat there counts for beyond what it is worth, as a share of the value of the task's progress."""
    if way is None or engine != way:
        return 0.0
    return HOME if board in (offer.site, engine) else NEAR


def shares(board: str, way: EngineId | None, engines: list[EngineId], offers: list[Offer]) -> Any:
    """As an array, per row."""
    rows = zip(engines, offers, strict=True)
    return np.array([share_at(board, way, engine, offer) for engine, offer in rows])
