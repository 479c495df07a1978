"""The rules file: YAML with positions, checked against the boards it is for.

quota:
  - {board: east, tenant: alice, chips: [nvidia/*], floor: 16, ceiling: 64, lend: {hours: 20:00-08:00, notice: 10m}, protect: [serve]}
  - {board: "*", tenant: bob, share: 30%, borrow: 8}
  - {board: "*", tenant: "*", preemptions: {per_task: 2 in 6h, per_tenant: 20 in 1h}, idle: {below: 5%, for: 10m, notice: 5m}}
"""

import re
from collections.abc import Mapping

from qipan.errors import InvalidInput
from qipan.hardware import BoardId
from qipan.quantities import format_devices, parse_duration_s, parse_utc_offset_s
from qipan.quota import REMEMBERED, REMEMBERED_S, Idle, Loan, QuotaRule, Rate
from qipan.workload.reader import Value, did_you_mean, read_yaml

OWN = ("share", "floor", "ceiling", "borrow", "lend", "protect")  # of one tenant by name
KEYS = ("board", "tenant", "chips", *OWN, "preemptions", "idle")
KINDS = ("train", "finetune", "batch", "serve", "dev")
MOST = 100_000_000


def parse_rules(text: str, file: str) -> tuple[QuotaRule, ...]:
    """Raises InvalidInput with the position."""
    top = read_yaml(text, file).fields(("quota",))
    if "quota" not in top:
        raise InvalidInput("has no `quota:`, a list of rules", file)
    rules = tuple(_rule(item) for item in top["quota"].items())
    twice = [
        rule for number, rule in enumerate(rules) if _mark(rule) in {_mark(other) for other in rules[:number]}
    ]
    if twice:
        raise top["quota"].error(f"{twice[0].name()} stands twice; keep one")
    return rules


def check_rules(
    rules: tuple[QuotaRule, ...],
    devices: Mapping[str, Mapping[str, int]],
    tenants: tuple[str, ...],
    file: str,
) -> None:
    """`devices`: board -> chip class -> devices at and below it.  Raises InvalidInput when a rule names what is not there, or
    floors and shares promise more than there is."""
    for rule in rules:
        if rule.board != "*" and rule.board not in devices:
            raise InvalidInput(f"no board {rule.board!r}{did_you_mean(rule.board, sorted(devices))}", file)
        if tenants and rule.tenant not in ("*", *tenants):
            raise InvalidInput(f"no tenant {rule.tenant!r}{did_you_mean(rule.tenant, sorted(tenants))}", file)
        if not any(rule.covers(chip) for board in _boards(rule, devices) for chip in devices[board]):
            chips = sorted({chip for board in _boards(rule, devices) for chip in devices[board]})
            raise InvalidInput(
                f"{rule.name()} covers no chip class there; there are {', '.join(chips)}", file
            )
    for board, stock in devices.items():
        here = [rule for rule in rules if rule.board in ("*", board)]
        for chip, count in stock.items():
            covering = [rule for rule in here if rule.covers(chip)]
            alone = [rule for rule in covering if sum(rule.covers(other) for other in stock) == 1]
            promised = sum(max(rule.floor, int(rule.share * count)) for rule in alone)
            if promised > count:
                who = ", ".join(sorted(rule.tenant for rule in alone))
                raise InvalidInput(
                    f"floors and shares of {who} at {board} promise {format_devices(promised)} of {chip}, there are {count};"
                    " lower some of them", file,
                )  # fmt: skip
        promised = sum(
            max(rule.floor, int(rule.share * sum(n for chip, n in stock.items() if rule.covers(chip))))
            for rule in here
        )
        if promised > sum(stock.values()):
            raise InvalidInput(
                f"floors and shares at {board} promise {format_devices(promised)}, there are {sum(stock.values())}; lower some",
                file,
            )


def _boards(rule: QuotaRule, devices: Mapping[str, Mapping[str, int]]) -> list[str]:
    return list(devices) if rule.board == "*" else [rule.board]


def _mark(rule: QuotaRule) -> tuple[str, str, tuple[str, ...]]:
    return rule.board, rule.tenant, rule.chips


def _rule(value: Value) -> QuotaRule:
    fields = value.fields(KEYS)
    for needed in ("board", "tenant"):
        if needed not in fields:
            raise value.error(f"needs `{needed}`")
    if not {"share", "floor", "ceiling", "borrow", "preemptions", "idle"} & set(fields):
        raise value.error(
            "gives and limits nothing; add one of share, floor, ceiling, borrow, preemptions, idle"
        )
    tenant = fields["tenant"].text()
    if tenant == "*" and set(OWN) & set(fields):
        raise value.error(
            f"`{min(set(OWN) & set(fields))}` is one tenant's; name it in place of '*' (preemptions and idle may be everyone's)"
        )
    per_task, per_tenant = _preemptions(fields["preemptions"]) if "preemptions" in fields else (None, None)
    floor = _whole(fields, "floor") or 0
    ceiling = _whole(fields, "ceiling")
    if ceiling is not None and ceiling < floor:
        raise fields["ceiling"].error(f"{ceiling} is below the floor of {floor}")
    if "lend" in fields and not floor:
        raise fields["lend"].error(
            "says when a floor is lent; add `floor` (a share is lent whenever it is idle)"
        )
    return QuotaRule(
        BoardId(fields["board"].text()),
        tenant,
        tuple(item.text() for item in fields["chips"].items()) if "chips" in fields else (),
        _share(fields["share"]) if "share" in fields else 0.0,
        floor,
        ceiling,
        _whole(fields, "borrow"),
        _loan(fields["lend"]) if "lend" in fields else None,
        tuple(item.choice(KINDS) for item in fields["protect"].items()) if "protect" in fields else (),
        per_task,
        per_tenant,
        _idle(fields["idle"]) if "idle" in fields else None,
    )


def _whole(fields: Mapping[str, Value], key: str) -> int | None:
    return fields[key].whole(0, MOST) if key in fields else None


def _share(value: Value) -> float:
    text = value.text()
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", text) or float(text[:-1]) > 100:
        raise value.error(f"{text[:40]!r} is no share; write one from 0% to 100%")
    return float(text[:-1]) / 100


def _loan(value: Value) -> Loan:
    fields = value.fields(("hours", "notice", "utc"))
    if "notice" not in fields:
        raise value.error("needs `notice`: how long before a lent device is back, such as 10m")
    notice_s = fields["notice"].parsed(parse_duration_s)
    from_s, until_s = _hours(fields["hours"]) if "hours" in fields else (0.0, 0.0)
    offset_s = fields["utc"].parsed(parse_utc_offset_s) if "utc" in fields else 8 * 3600.0
    return Loan(notice_s, from_s, until_s, offset_s)


def _preemptions(value: Value) -> tuple[Rate | None, Rate | None]:
    fields = value.fields(("per_task", "per_tenant"))
    if not fields:
        raise value.error("limits nothing; write {per_task: 2 in 6h, per_tenant: 20 in 1h}")
    return (
        _rate(fields["per_task"]) if "per_task" in fields else None,
        _rate(fields["per_tenant"]) if "per_tenant" in fields else None,
    )


def _rate(value: Value) -> Rate:
    found = re.fullmatch(r"(\d{1,3}) in (\S+)", value.text())
    if found is None or int(found[1]) > REMEMBERED:
        raise value.error(f"{value.text()[:40]!r} is no rate; write 2 in 6h, at most {REMEMBERED}")
    window_s = value.parsed(lambda _: parse_duration_s(found[2]))
    if not 0 < window_s <= REMEMBERED_S:
        raise value.error(f"{found[2][:40]!r} is no window; write one of up to 7d")
    return Rate(int(found[1]), window_s)


def _idle(value: Value) -> Idle:
    fields = value.fields(("below", "for", "notice"))
    if "notice" not in fields:
        raise value.error("needs `notice`: how long its holder is told before, such as 5m")
    return Idle(
        _share(fields["below"]) if "below" in fields else 0.05,
        fields["for"].parsed(parse_duration_s) if "for" in fields else 600.0,
        fields["notice"].parsed(parse_duration_s),
    )


def _hours(value: Value) -> tuple[float, float]:
    found = re.fullmatch(r"([01]?\d|2[0-4]):([0-5]\d)-([01]?\d|2[0-4]):([0-5]\d)", value.text())
    if found is None:
        raise value.error(f"{value.text()[:40]!r} are no hours; write 20:00-08:00")
    first_h, first_m, last_h, last_m = (int(part) for part in found.groups())
    return (first_h * 3600.0 + first_m * 60) % 86_400, (last_h * 3600.0 + last_m * 60) % 86_400
