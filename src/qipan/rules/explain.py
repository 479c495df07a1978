"""Rules in sentences: what a tenant may count on, and what it lends."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qipan.quantities import format_devices, format_duration
from qipan.quota import Loan, QuotaRule
from qipan.rules.entitlement import Holdings, entitled


def explain_rules(
    rules: Sequence[QuotaRule], devices: Mapping[str, Mapping[str, int]]
) -> list[dict[str, object]]:
    """One entry per rule and board.  `devices`: board -> chip class -> devices."""
    told = []
    for board, stock in devices.items():
        for rule in rules:
            if rule.board in ("*", board) and any(rule.covers(chip) for chip in stock):
                own = entitled(rule, Holdings(stock, {}, {}))
                told.append(
                    {
                        "board": board,
                        "tenant": rule.tenant,
                        "own_devices": own,
                        "text": _sentence(rule, stock, own),
                    }
                )
    return told


def _sentence(rule: QuotaRule, stock: Mapping[str, int], own: int) -> str:
    told = [*_parked(rule), *_idle(rule)]
    if rule.tenant == "*" or rule == replace(
        rule, share=0.0, floor=0, ceiling=None, borrow=None, loan=None, protect=()
    ):
        return "; ".join(told)
    chips = ", ".join(sorted(chip for chip in stock if rule.covers(chip)))
    total = sum(count for chip, count in stock.items() if rule.covers(chip))
    parts = [f"owns {own or 'none'} of {format_devices(total)} ({chips})"]
    lent = max(0, own - rule.floor)
    if lent:
        parts.append(f"{lent} of them are lent whenever it leaves them idle, to tasks that may be parked")
    if rule.floor:
        parts.append(_lends(rule.floor, rule.loan))
    if own:
        parts.append(
            "what it waits for within its own is taken back from borrowers, who park with their checkpoint"
        )
    if rule.borrow is not None:
        parts.append(f"it may borrow {rule.borrow} more" if rule.borrow else "it borrows nothing")
    if rule.ceiling is not None:
        parts.append(f"it never holds more than {rule.ceiling}")
    if rule.protect:
        parts.append(
            f"its {', '.join(rule.protect)} tasks are never taken back, and borrow nothing that is lent"
        )
    return "; ".join([*parts, *told])


def _parked(rule: QuotaRule) -> list[str]:
    told = []
    if rule.per_task is not None:
        told.append(
            f"a task is parked for others at most {rule.per_task}, then keeps what it holds and borrows nothing"
        )
    if rule.per_tenant is not None:
        whose = "a tenant's" if rule.tenant == "*" else "its"
        told.append(f"{whose} tasks together are parked for others at most {rule.per_tenant}")
    return told


def _idle(rule: QuotaRule) -> list[str]:
    if rule.idle is None:
        return []
    idle, notice = rule.idle, format_duration(rule.idle.notice_s)
    return [
        f"a lease whose devices are busy for less than {idle.below:.0%} of {format_duration(idle.for_s)} is lent {notice} after"
        f" its holder was told, and is back within {notice} when it is woken"
    ]


def _lends(floor: int, loan: Loan | None) -> str:
    if loan is None:
        return f"{floor} are kept free for it and lent to nobody"
    when = "at any hour"
    if loan.from_s != loan.until_s:
        when = f"from {_clock(loan.from_s)} to {_clock(loan.until_s)} (UTC{loan.utc_offset_s / 3600:+g})"
    return f"{floor} are lent {when} to tasks that park within {loan.notice_s:g} s, which is how soon they are back"


def _clock(of_day_s: float) -> str:
    return f"{int(of_day_s) // 3600:02d}:{int(of_day_s) % 3600 // 60:02d}"
