"""What a ledger does with requests: pure.  The journal loads a `View` of what a batch touches, judges it, and writes the
outcomes in one transaction; a refused request changes nothing.  Clauses are those of docs/rules/ledger.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qipan.errors import InvalidInput
from qipan.ledger.requests import (
    CaptureHold,
    ExpireHold,
    Hold,
    HoldState,
    Outcome,
    PlaceHold,
    Post,
    Posted,
    Refused,
    Request,
    VoidHold,
)
from qipan.ledger.transfer import AMOUNT_MICRO_MAX, Entry, Transfer, check_text, move, shown

#: class -> whether its accounts may go below zero: the outer world, other owners' ledgers, the exchange desk
CLASSES = {
    "bank": True, "mirror": True, "fx": True, "tenant": False, "hold": False, "provider": False, "platform": False,
    "escrow": False, "bond": False, "voucher": False, "reserve": False, "payout": False, "subsidy": False,
    "cost": False, "market": False,
}  # fmt: skip
#: a writer's clock may be this far behind the newest posting
SKEW_S = 300.0
HOLD_S_MAX = 400 * 86400.0


@dataclass(slots=True)
class View:
    """What a batch touches: `keys` of it that are known -> body hash; (account, currency) -> balance; hold id -> hold.
    `judge` updates it as it goes, so that later requests of the batch see earlier ones."""

    keys: dict[str, str] = field(default_factory=dict)
    balances: dict[tuple[str, str], int] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    latest_s: float = 0.0


def judge(requests: Sequence[Request], view: View, now_s: float) -> list[Outcome]:
    """One outcome a request, in order."""
    if not math.isfinite(now_s) or now_s < view.latest_s - SKEW_S:
        why = f"the clock says {now_s}, the newest posting {view.latest_s}; set the clock"
        return [Refused(request.key, "L-9", why) for request in requests]
    return [_judged(request, view, now_s) for request in requests]


def _judged(request: Request, view: View, now_s: float) -> Outcome:
    key, body_hash = request.key, request.body_hash
    known = view.keys.get(key)
    if known is not None:
        if known.partition(":")[0] == body_hash:
            return Posted(key, known, None, repeated=True)
        return Refused(key, "L-3", f"key {shown(key)} was used for another body; use a new key")
    try:
        check_text(key)
        outcome = _decide(request, body_hash, view, now_s)
    except InvalidInput as error:
        return Refused(key, "L-1", str(error))
    if isinstance(outcome, Posted):
        view.keys[key] = outcome.body_hash
        if outcome.hold is not None:
            view.holds[outcome.hold.hold_id] = outcome.hold
    return outcome


def _decide(request: Request, body_hash: str, view: View, now_s: float) -> Outcome:
    match request:
        case Post(transfer, owing):
            for entry in transfer.entries:
                if entry.account.startswith("hold/"):
                    return Refused(
                        transfer.key,
                        "L-5",
                        f"{shown(entry.account)} is a hold; place, capture or void it instead",
                    )
            refusal = _apply(transfer, view, owing)
            return refusal or Posted(transfer.key, body_hash, transfer)
        case PlaceHold():
            return _place(request, body_hash, view, now_s)
        case CaptureHold():
            return _capture(request, body_hash, view, now_s)
        case VoidHold():
            hold = view.holds.get(request.hold_id)
            if hold is None or hold.state is not HoldState.OPEN:
                return _not_open(request.key, request.hold_id, hold)
            return _close(request.key, body_hash, request.cause, hold, HoldState.VOIDED, view)
        case ExpireHold():
            hold = view.holds.get(request.hold_id)
            if hold is None or hold.state is not HoldState.OPEN:
                return _not_open(request.key, request.hold_id, hold)
            if hold.expires_s is None or now_s < hold.expires_s:
                until = "has no end by time" if hold.expires_s is None else f"lasts until {hold.expires_s}"
                return Refused(
                    request.key, "L-6", f"hold {shown(hold.hold_id)} {until}, it is {now_s}; wait or void it"
                )
            return _close(request.key, body_hash, "expired", hold, HoldState.EXPIRED, view)


def _place(request: PlaceHold, body_hash: str, view: View, now_s: float) -> Outcome:
    if request.hold_id in view.holds:
        return Refused(request.key, "L-5", f"hold {shown(request.hold_id)} was placed before; use a new id")
    if request.amount_micro <= 0:
        return Refused(
            request.key, "L-2", f"a hold of {request.amount_micro} sets nothing aside; give more than 0"
        )
    if request.account.startswith("hold/"):
        return Refused(request.key, "L-5", f"{shown(request.account)} is a hold itself; name who gives the money")  # fmt: skip
    if request.expires_s is not None and not now_s < request.expires_s <= now_s + HOLD_S_MAX:
        return Refused(
            request.key, "L-6",
            f"the hold would expire at {request.expires_s}, it is {now_s}; give a time within {HOLD_S_MAX / 86400:g} days",
        )  # fmt: skip
    hold = Hold(
        request.hold_id, request.account, request.currency, request.amount_micro, request.amount_micro, request.expires_s
    )  # fmt: skip
    transfer = move(
        request.key, request.cause, request.account, hold.own_account, hold.amount_micro, hold.currency
    )
    return _apply(transfer, view) or Posted(request.key, f"{body_hash}:{transfer.body_hash}", transfer, hold)


def _capture(request: CaptureHold, body_hash: str, view: View, now_s: float) -> Outcome:
    hold = view.holds.get(request.hold_id)
    if hold is None or hold.state is not HoldState.OPEN:
        return _not_open(request.key, request.hold_id, hold)
    if hold.expires_s is not None and now_s >= hold.expires_s:
        return Refused(
            request.key,
            "L-6",
            f"hold {shown(hold.hold_id)} ran out at {hold.expires_s}, it is {now_s}; place a new one",
        )
    if request.target.startswith("hold/") or not 0 < request.amount_micro <= hold.left_micro:
        return Refused(
            request.key, "L-5",
            f"capture of {request.amount_micro} to {shown(request.target)}: the hold has {hold.left_micro}; give 1 to that,"
            " and an account that is no hold",
        )  # fmt: skip
    entries = [
        Entry(hold.own_account, -request.amount_micro, hold.currency),
        Entry(request.target, request.amount_micro, hold.currency),
    ]
    rest = hold.left_micro - request.amount_micro
    after = replace(hold, left_micro=rest)
    if request.close or rest == 0:
        after = replace(hold, left_micro=0, state=HoldState.POSTED)
        if rest:
            entries += [
                Entry(hold.own_account, -rest, hold.currency),
                Entry(hold.account, rest, hold.currency),
            ]
    transfer = Transfer(request.key, request.cause, tuple(entries))
    return _apply(transfer, view) or Posted(request.key, f"{body_hash}:{transfer.body_hash}", transfer, after)


def _close(key: str, body_hash: str, cause: str, hold: Hold, state: HoldState, view: View) -> Outcome:
    transfer = move(key, cause, hold.own_account, hold.account, hold.left_micro, hold.currency)
    after = replace(hold, left_micro=0, state=state)
    return _apply(transfer, view) or Posted(key, f"{body_hash}:{transfer.body_hash}", transfer, after)


def _not_open(key: str, hold_id: str, hold: Hold | None) -> Refused:
    if hold is None:
        return Refused(key, "L-5", f"no hold {shown(hold_id)}; place it first")
    return Refused(key, "L-5", f"hold {shown(hold_id)} is {hold.state.value} already; it is closed once")


def _apply(transfer: Transfer, view: View, owing: Sequence[str] = ()) -> Refused | None:
    """Move the view's balances, or say why not."""
    after: dict[tuple[str, str], int] = {}
    balances = view.balances
    for entry in transfer.entries:
        place = (entry.account, entry.currency)
        before = after.get(place)
        after[place] = (balances.get(place, 0) if before is None else before) + entry.amount_micro
    for (account, currency), balance in after.items():
        may_owe = CLASSES.get(account.partition("/")[0])
        if may_owe is None:
            return Refused(
                transfer.key, "L-1", f"{shown(account)} is in no class of account; the classes: {', '.join(CLASSES)}"
            )  # fmt: skip
        if not -AMOUNT_MICRO_MAX <= balance <= AMOUNT_MICRO_MAX:
            return Refused(transfer.key, "L-2", f"{shown(account)} would have {balance}, beyond {AMOUNT_MICRO_MAX}")  # fmt: skip
        if balance < 0 and not may_owe and account not in owing:
            before = balances.get((account, currency), 0)
            if balance < before:
                return Refused(
                    transfer.key,
                    "L-4",
                    f"{shown(account)} has {before} micro-{currency}, this takes {before - balance}; top up or lower it",
                )
    balances.update(after)
    return None
