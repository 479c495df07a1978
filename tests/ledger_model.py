"""A ledger told again in the simplest way, apart from `qipan.ledger`: what a random history must come to."""

import random
from dataclasses import dataclass, field

from qipan.journal import Journal
from qipan.ledger.requests import CaptureHold, ExpireHold, PlaceHold, Post, Posted, Request, VoidHold
from qipan.ledger.transfer import Entry, exchange, move, reverse
from qipan.store.database import Sqlite
from qipan.store.opening import create

TENANTS, CURRENCIES = ("tenant/a", "tenant/b"), ("CNY", "USD")
MAY_OWE = ("bank", "fx")


@dataclass
class Model:
    """Balances and holds as plain dicts; `seen`: key -> request."""

    money: dict[tuple[str, str], int] = field(default_factory=dict)
    holds: dict[str, dict] = field(default_factory=dict)
    seen: dict[str, Request] = field(default_factory=dict)

    def expects(self, request: Request, now_s: float) -> str:
        """ "done", "repeated" or "refused"; a done one has happened in the model."""
        if request.key in self.seen:
            return "repeated" if self.seen[request.key] == request else "refused"
        moves = self.moves(request, now_s)
        if moves is None:
            return "refused"
        after = dict(self.money)
        for account, amount, currency in moves:
            after[account, currency] = after.get((account, currency), 0) + amount
        if any(
            amount < 0 and account.partition("/")[0] not in MAY_OWE for (account, _), amount in after.items()
        ):
            return "refused"
        self.money = after
        self.seen[request.key] = request
        match request:
            case PlaceHold():
                self.holds[request.hold_id] = {
                    "of": request.account, "left": request.amount_micro, "until": request.expires_s,
                    "open": True, "currency": request.currency,
                }  # fmt: skip
            case CaptureHold():
                hold = self.holds[request.hold_id]
                hold["left"] -= request.amount_micro
                if request.close or not hold["left"]:
                    hold.update(left=0, open=False)
            case VoidHold() | ExpireHold():
                self.holds[request.hold_id].update(left=0, open=False)
        return "done"

    def moves(self, request: Request, now_s: float) -> list[tuple[str, int, str]] | None:
        match request:
            case Post(transfer):
                return [(entry.account, entry.amount_micro, entry.currency) for entry in transfer.entries]
            case PlaceHold():
                if request.hold_id in self.holds or request.amount_micro <= 0:
                    return None
                if request.expires_s is not None and request.expires_s <= now_s:
                    return None
                box = f"hold/{request.hold_id}"
                return [
                    (request.account, -request.amount_micro, request.currency),
                    (box, request.amount_micro, request.currency),
                ]
        hold = self.holds.get(request.hold_id)
        if hold is None or not hold["open"]:
            return None
        box, over = f"hold/{request.hold_id}", hold["until"] is not None and now_s >= hold["until"]
        match request:
            case CaptureHold():
                if over or not 0 < request.amount_micro <= hold["left"]:
                    return None
                rest = hold["left"] - request.amount_micro if request.close else 0
                return [
                    (box, -request.amount_micro - rest, hold["currency"]),
                    (request.target, request.amount_micro, hold["currency"]),
                    (hold["of"], rest, hold["currency"]),
                ]
            case ExpireHold() if not over:
                return None
        return [(box, -hold["left"], hold["currency"]), (hold["of"], hold["left"], hold["currency"])]


class Crash(Exception):
    pass


class Crashing(Sqlite):
    """Fails at the n-th statement of a write when told to."""

    countdown = -1

    def run_many(self, sql, rows):
        self.countdown -= 1
        if self.countdown == 0:
            raise Crash
        super().run_many(sql, rows)


def random_request(rng: random.Random, step: int, history: list[Request], holds: list[str]) -> Request:
    """One that is often right, sometimes wrong, sometimes an old one again."""
    dice, key = rng.random(), f"k{step}"
    tenant, currency = rng.choice(TENANTS), rng.choice(CURRENCIES)
    hold_id = rng.choice(holds) if holds and rng.random() < 0.9 else f"h{rng.randrange(8)}"
    if history and dice < 0.12:
        return rng.choice(history)  # a retry
    if history and dice < 0.17:
        key = rng.choice(history).key  # another body under an old key
    if dice < 0.35:
        return Post(move(key, "top-up", "bank/world", tenant, rng.randint(1, 50), currency))
    if dice < 0.45:
        return Post(move(key, "pay", tenant, "provider/p", rng.randint(1, 30), currency))
    if dice < 0.52:
        paid = [request for request in history if isinstance(request, Post)]
        if paid:
            return Post(reverse(rng.choice(paid).transfer, key, "refund"))
    if dice < 0.60:
        give, other = Entry(tenant, rng.randint(1, 30), currency), "USD" if currency == "CNY" else "CNY"
        return Post(exchange(key, "exchange", tenant, give, other, (rng.randint(1, 9), rng.randint(1, 9))))
    if dice < 0.75:
        until = rng.choice([None, float(step + rng.randint(-1, 6))])
        return PlaceHold(key, "task", f"h{rng.randrange(8)}", tenant, rng.randint(0, 30), until, currency)
    if dice < 0.88:
        return CaptureHold(key, "charge", hold_id, "provider/p", rng.randint(0, 20), rng.random() < 0.4)
    return VoidHold(key, "cancel", hold_id) if dice < 0.94 else ExpireHold(hold_id)


def play(seed: int, steps: int = 14) -> int:
    """One history against the model, crashes between and in the middle of writes included.  Returns how many requests were done."""
    rng = random.Random(seed)
    db = Crashing(None)
    create(db)
    journal, model, done = Journal(db), Model(), 0
    history: list[Request] = []
    for step in range(steps):
        request = random_request(rng, step, history, list(model.holds))
        if rng.random() < 0.1:
            db.countdown = rng.randint(1, 3)
            try:
                journal.submit([request], float(step))
            except Crash:
                pass
            else:  # it was refused, or known: nothing was written
                if db.countdown > 0:
                    db.countdown = -1
            db.countdown = -1
        outcome = journal.submit([request], float(step))[0]
        known = request.key in model.seen
        expected = model.expects(request, float(step))
        got = ("repeated" if outcome.repeated else "done") if isinstance(outcome, Posted) else "refused"
        if got == "repeated" and not known:
            got = "done"  # the crash came after its last statement
        assert got == expected, (
            f"seed {seed}, step {step}: {request} is {got}, expected {expected}: {outcome}"
        )
        if expected == "done":
            history.append(request)
            done += 1
        check(journal, model, f"seed {seed}, step {step}")
    found = journal.check()
    assert not found.problems, (seed, found.problems)
    db.close()
    return done


def check(journal: Journal, model: Model, where: str) -> None:
    kept = {(account, currency): amount for account, currency, amount in journal.balances() if amount}
    assert kept == {place: amount for place, amount in model.money.items() if amount}, where
    for currency in CURRENCIES:
        assert sum(amount for (_, kind), amount in kept.items() if kind == currency) == 0, where
    for (account, _), amount in kept.items():
        assert amount >= 0 or account.partition("/")[0] in MAY_OWE, (where, account, amount)
