"""The durable ledger: a batch of requests is judged against what it touches and written in one transaction, on SQLite or
PostgreSQL.  What to do is decided in `qipan.ledger`; here are only statements, on the tables of a board's store."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qipan.errors import QipanError
from qipan.ledger.auditor import Audit, audit
from qipan.ledger.judge import View, judge
from qipan.ledger.requests import (
    CaptureHold,
    ExpireHold,
    Hold,
    HoldState,
    Outcome,
    PlaceHold,
    Post,
    Posted,
    Request,
)
from qipan.ledger.transfer import Transfer
from qipan.store.database import Database
from qipan.store.ledger import add_transfers

VALUES_MAX = 500  # marks in one IN list
TRIES = 20
PAGE = 5000
TOUCH_BALANCE = (
    "INSERT INTO balances (account, currency, balance_micro) VALUES (?,?,0) ON CONFLICT DO NOTHING"
)
PUT_HOLD = (
    "INSERT INTO holds (hold_id, account, currency, amount_micro, left_micro, expires_s, state) VALUES (?,?,?,?,?,?,?)"
    " ON CONFLICT (hold_id) DO UPDATE SET left_micro = excluded.left_micro, state = excluded.state"
)


class Journal:
    """On a database with a store's tables.  On PostgreSQL several may write at once, each on its own connection."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._lock = " FOR UPDATE" if db.dialect == "postgresql" else ""

    # ---- posting ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], now_s: float, tick: int = 0) -> list[Outcome]:
        """One outcome a request, in order.  The batch is one transaction; what is refused changes nothing."""
        for _ in range(TRIES):
            try:
                with self.db.transaction():
                    view = self._view(requests)
                    outcomes = judge(requests, view, now_s)
                    self._write(outcomes, now_s, tick)
                return outcomes
            except Exception as error:
                if not _other_writer(error):
                    raise
        raise QipanError(f"{TRIES} times another writer was first; try again with smaller batches")

    def record(self, transfers: Sequence[Transfer], now_s: float, tick: int) -> None:
        """Transfers that follow from facts: they happened, so nothing is refused.  A key must be new."""
        with self.db.transaction():
            add_transfers(self.db, [(transfer, transfer.body_hash) for transfer in transfers], tick, now_s)

    def expire(self, now_s: float, most: int = 10_000) -> list[Outcome]:
        """Close the holds whose time is over."""
        rows = self.db.rows(
            "SELECT hold_id FROM holds WHERE state = 'open' AND expires_s <= ? ORDER BY expires_s, hold_id LIMIT ?",
            (now_s, most),
        )
        return self.submit([ExpireHold(row[0]) for row in rows], now_s) if rows else []

    def _view(self, requests: Sequence[Request]) -> View:
        hold_ids: set[str] = set()
        accounts: set[tuple[str, str]] = set()
        for request in requests:
            if isinstance(request, Post):
                accounts.update((entry.account, entry.currency) for entry in request.transfer.entries)
            else:
                hold_ids.add(request.hold_id)
                if isinstance(request, PlaceHold):
                    accounts.add((request.account, request.currency))
        holds = {
            row[0]: _hold(row)
            for row in self._in(
                "SELECT hold_id, account, currency, amount_micro, left_micro, expires_s, state FROM holds WHERE hold_id IN",
                sorted(hold_ids), " ORDER BY hold_id" + self._lock,
            )
        }  # fmt: skip
        for request in requests:
            if not isinstance(request, Post):
                hold = holds.get(request.hold_id)
                currency = hold.currency if hold else getattr(request, "currency", "CNY")
                accounts.add((f"hold/{request.hold_id}", currency))
                if hold is not None:
                    accounts.add((hold.account, currency))
                if isinstance(request, CaptureHold):
                    accounts.add((request.target, currency))
        if self._lock:  # rows must be there to be locked
            self.db.run_many(TOUCH_BALANCE, sorted(accounts))
        names = sorted({account for account, _ in accounts})
        balances = {
            (account, currency): int(balance)
            for account, currency, balance in self._in(
                "SELECT account, currency, balance_micro FROM balances WHERE account IN", names,
                " ORDER BY account, currency" + self._lock,
            )
        }  # fmt: skip
        keys = dict(
            self._in(
                "SELECT key, body_hash FROM transfers WHERE key IN", [request.key for request in requests]
            )
        )
        latest = self.db.rows("SELECT now_s FROM transfers ORDER BY transfer_id DESC LIMIT 1")
        return View(keys, balances, holds, float(latest[0][0]) if latest else 0.0)

    def _in(self, sql: str, values: Sequence[str], end: str = "") -> Iterator[Any]:
        for start in range(0, len(values), VALUES_MAX):
            some = values[start : start + VALUES_MAX]
            yield from self.db.rows(f"{sql} ({','.join('?' * len(some))}){end}", some)

    def _write(self, outcomes: Iterable[Outcome], now_s: float, tick: int) -> None:
        written: list[tuple[Transfer, str]] = []
        holds: dict[str, Hold] = {}
        for outcome in outcomes:
            if isinstance(outcome, Posted) and not outcome.repeated:
                assert outcome.transfer is not None
                written.append((outcome.transfer, outcome.body_hash))
                if outcome.hold is not None:
                    holds[outcome.hold.hold_id] = outcome.hold
        add_transfers(self.db, written, tick, now_s)
        if holds:
            self.db.run_many(
                PUT_HOLD,
                [
                    (
                        hold.hold_id,
                        hold.account,
                        hold.currency,
                        hold.amount_micro,
                        hold.left_micro,
                        hold.expires_s,
                        hold.state.value,
                    )
                    for hold in holds.values()
                ],
            )

    # ---- reading ---------------------------------------------------------------------------------------------------

    def balances(self, prefix: str = "") -> list[tuple[str, str, int]]:
        """(account, currency, balance), by account."""
        rows = self.db.rows(
            "SELECT account, currency, balance_micro FROM balances ORDER BY account, currency"
        )
        return [(row[0], row[1], int(row[2])) for row in rows if row[0].startswith(prefix)]

    def balance(self, account: str, currency: str = "CNY") -> int:
        rows = self.db.rows(
            "SELECT balance_micro FROM balances WHERE account = ? AND currency = ?", (account, currency)
        )
        return int(rows[0][0]) if rows else 0

    def hold(self, hold_id: str) -> Hold | None:
        rows = self.db.rows(
            "SELECT hold_id, account, currency, amount_micro, left_micro, expires_s, state FROM holds WHERE hold_id = ?",
            (hold_id,),
        )
        return _hold(rows[0]) if rows else None

    def balance_before(self, account: str, currency: str, at_s: float) -> int:
        """The sum of what was posted before a time."""
        rows = self.db.rows(
            "SELECT CAST(coalesce(sum(amount_micro), 0) AS BIGINT) FROM entries JOIN transfers USING (transfer_id)"
            " WHERE account = ? AND currency = ? AND now_s < ?",
            (account, currency, at_s),
        )
        return int(rows[0][0])

    def postings_of(
        self, account: str, from_s: float = 0.0, until_s: float = 1e18, most: int = 2**31
    ) -> list[tuple[float, str, str, int, str]]:
        """(now_s, key, cause, amount, currency) of an account, in order."""
        return self.db.rows(
            "SELECT now_s, key, cause, amount_micro, currency FROM entries JOIN transfers USING (transfer_id)"
            " WHERE account = ? AND now_s >= ? AND now_s < ? ORDER BY transfer_id, position LIMIT ?",
            (account, from_s, until_s, most),
        )

    def postings_about(self, cause: str) -> list[tuple[str, str, int, str]]:
        """(key, account, amount, currency) of the transfers with this cause, in order."""
        return self.db.rows(
            "SELECT key, account, amount_micro, currency FROM transfers JOIN entries USING (transfer_id)"
            " WHERE cause = ? ORDER BY transfer_id, position",
            (cause,),
        )

    def check(self) -> Audit:
        """The auditor's answer about all that is stored, as of one moment.  It holds balances in memory, not entries."""
        with self.db.frozen():
            return audit(
                self._streamed("SELECT transfer_id, key, body_hash, cause FROM transfers ORDER BY transfer_id"),
                self._streamed("SELECT transfer_id, account, amount_micro, currency FROM entries ORDER BY transfer_id, position"),
                self.balances(),
                self._streamed("SELECT hold_id, account, currency, amount_micro, left_micro, state FROM holds ORDER BY hold_id"),
            )  # fmt: skip

    def _streamed(self, sql: str) -> Iterator[Any]:
        for batch in self.db.batches(sql, PAGE):
            yield from batch


def _other_writer(error: Exception) -> bool:
    """PostgreSQL took another writer's transaction instead of this one: it may be done again."""
    return getattr(error, "sqlstate", None) in ("23505", "40P01", "40001")  # unique, deadlock, serialization


def _hold(row: Any) -> Hold:
    hold_id, account, currency, amount, left, expires_s, state = row
    return Hold(hold_id, account, currency, int(amount), int(left), expires_s, HoldState(state))
