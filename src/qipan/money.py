"""What people ask of a host's ledger: accounts, statements, the auditor's answer, a bill held against its plan.  Changes nothing."""

from dataclasses import dataclass

import msgspec

from qipan.curves import Point
from qipan.errors import InvalidInput, NotFound
from qipan.host import Host
from qipan.journal import Journal
from qipan.ledger.auditor import Audit
from qipan.ledger.explain import Attempt, Difference, Planned, explain
from qipan.statements import Posting, Statement, make_statement
from qipan.stored import submitted_plan

LINES_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Account:
    account: str
    currency: str
    balance_micro: int


@dataclass(frozen=True, slots=True)
class Explained:
    """`differences` sum to what the task was charged less the plan's p50."""

    task_id: str
    charged_micro_cny: int
    planned: Planned
    differences: tuple[Difference, ...]


def accounts(host: Host, prefix: str) -> list[Account]:
    with host.lock:
        return [Account(*row) for row in host.store.balances() if row[0].startswith(prefix)]


def statement(host: Host, name: str, currency: str, from_s: float, until_s: float) -> Statement:
    """Of one account, or of `region/NAME`: all providers there.  Raises NotFound, InvalidInput."""
    if not from_s < until_s:
        raise InvalidInput(
            f"a statement from {from_s} until {until_s} is of no time; give an end after the beginning"
        )
    with host.lock:
        journal = Journal(host.store.db)
        opening, found = 0, list[Posting]()
        for account in _accounts_of(host, name):
            opening += journal.balance_before(account, currency, from_s)
            found += [
                (at_s, account, key, cause, amount)
                for at_s, key, cause, amount, kind in journal.postings_of(
                    account, from_s, until_s, LINES_MAX + 1
                )
                if kind == currency
            ]
    if len(found) > LINES_MAX:
        raise InvalidInput(f"{name} has more than {LINES_MAX} postings in that time; ask for a shorter one")
    found.sort(key=lambda posting: posting[0])
    begins_s = from_s or (
        found[0][0] if found else 0.0
    )  # "from the beginning" is the first posting, "for ever" is now
    return make_statement(name, currency, opening, found, begins_s, min(until_s, host.clock.now_s()))


def _accounts_of(host: Host, name: str) -> list[str]:
    known = {account for account, _, _ in host.store.balances()}
    if name.startswith("region/"):
        region = name.removeprefix("region/")
        boards = [spec.board for spec in host.site.root.walk() if spec.region == region and spec.pools]
        if not boards:
            regions = sorted({spec.region for spec in host.site.root.walk() if spec.region})
            raise NotFound(
                f"no region {region[:60]!r}; the site file's regions: {', '.join(regions) or 'none'}"
            )
        return [account for board in boards if (account := f"provider/{board}") in known]
    if name not in known:
        raise NotFound(f"no account {name[:80]!r}; `qipan ledger accounts` shows them")
    return [name]


def check(host: Host) -> Audit:
    """Everything recomputed from the entries."""
    with host.lock:
        return Journal(host.store.db).check()


def explained(host: Host, task_id: str) -> Explained:
    """Of a task in parts: each part against its own plan.  Raises NotFound."""
    if (told := host.queries.above("explained", task_id)) is not None:
        answered: Explained = msgspec.convert(told, type=Explained)
        return answered
    names = host.queries.parts(task_id)
    if names == [task_id]:
        return _explained(host, task_id)
    parts = [_explained(host, name) for name in names]
    planned = [part.planned for part in parts]
    whole = Planned(
        " + ".join(sorted({one.place for one in planned})), " + ".join(sorted({one.chip_class for one in planned})),
        sum(one.devices for one in planned), sum(one.cost_p50_micro_cny for one in planned),
        sum(one.cost_p90_micro_cny for one in planned), 0,
    )  # fmt: skip
    differences = [
        Difference(one.amount_micro_cny, f"{part.task_id.removeprefix(f'{task_id}.')}: {one.text}")
        for part in parts
        for one in part.differences
    ]
    return Explained(task_id, sum(part.charged_micro_cny for part in parts), whole, tuple(differences))


def _explained(host: Host, task_id: str) -> Explained:
    receipt = host.queries.bill(task_id)
    plan = submitted_plan(host.store, task_id)
    option = next((option for option in plan.options if option.option_id == plan.chosen), plan.options[0])
    prices = host.tariff.micro_cny_per_device_hour
    beside = option.storage_micro_cny + option.egress_micro_cny  # a bill is of devices
    planned = Planned(
        option.place, option.chip_class, option.devices, option.cost_p50_micro_cny - beside, option.cost_p90_micro_cny - beside,
        prices.get(f"{option.place}|{option.chip_class}", 0),
    )  # fmt: skip
    points: dict[str, Point] = {point.point_id: point for point in plan.curve.points} if plan.curve else {}
    lost: dict[int, float] = {}
    for fact in host.queries.exits(task_id):
        point = points.get(fact.usage.point_id)
        if fact.outcome in ("lost", "failed", "cancelled") and fact.attempt not in lost and point is not None:
            lost[fact.attempt] = max(0.0, fact.done_s - fact.saved_s) / point.rate
    kept = {fact.attempt + 1 for fact in host.queries.exits(task_id) if fact.in_place}
    attempts = []
    for number, line in enumerate(receipt.lines):
        point = points.get(line.usage.point_id)
        length_s = line.usage.device_s / max(1, line.usage.devices)
        restarted = number and line.usage.attempt not in kept
        idle_s = min(length_s, point.start_s + point.stop_s) if restarted and point is not None else 0.0
        lost_s = min(lost.get(line.usage.attempt, 0.0), length_s - idle_s)
        attempts.append(Attempt(line, lost_s, idle_s))
    return Explained(task_id, receipt.cost_micro_cny, planned, explain(planned, attempts))
