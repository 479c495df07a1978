"""Transfers, their entries, and the balances of the accounts.  Entries are never changed; a balance is their sum."""

from collections.abc import Sequence

from qipan.errors import InvalidInput
from qipan.ledger import Transfer
from qipan.store.database import Database

BALANCE = (
    "INSERT INTO balances VALUES (?,?,?) ON CONFLICT (account, currency)"
    " DO UPDATE SET balance_micro = balances.balance_micro + excluded.balance_micro"
)
NUMBERING = 20261125


class Ledger:
    db: Database

    def post(self, transfer: Transfer, now_s: float) -> bool:
        """Post outside a tick (opening balances, top-ups).  The same key with the same body is posted once; with
        another body it is refused.  Returns whether it was new."""
        found = self.db.row("SELECT body_hash FROM transfers WHERE key = ?", (transfer.key,))
        if found is not None:
            if found[0] != transfer.body_hash:
                raise InvalidInput(
                    f"transfer {transfer.key} was posted before with other entries; use a new key"
                )
            return False
        with self.db.transaction():
            self._add_transfers([transfer], 0, now_s)
        return True

    def _add_transfers(self, transfers: Sequence[Transfer], tick: int, now_s: float) -> None:
        """Transfers that follow from facts: they happened, so nothing is refused."""
        add_transfers(self.db, [(transfer, transfer.body_hash) for transfer in transfers], tick, now_s)

    def balances(self) -> list[tuple[str, str, int]]:
        """(account, currency, balance in 1e-6), by account."""
        rows = self.db.rows(
            "SELECT account, currency, balance_micro FROM balances ORDER BY account, currency"
        )
        return [(account, currency, balance) for account, currency, balance in rows]

    def balance(self, account: str, currency: str = "CNY") -> int | None:
        """In 1e-6; None when nothing was ever posted there."""
        row = self.db.row(
            "SELECT balance_micro FROM balances WHERE account = ? AND currency = ?", (account, currency)
        )
        return int(row[0]) if row else None

    def wrong_balances(self) -> list[tuple[str, str, int, int]]:
        """(account, currency, balance, sum of its entries) where the two differ: none in a sound ledger."""
        rows = self.db.rows(
            "SELECT account, currency, b.balance_micro, coalesce(e.amount, 0) FROM balances b LEFT JOIN"
            " (SELECT account, currency, CAST(sum(amount_micro) AS BIGINT) AS amount FROM entries GROUP BY account, currency) e"
            " USING (account, currency) WHERE b.balance_micro <> coalesce(e.amount, 0) ORDER BY account, currency"
        )
        return [(account, currency, balance, amount) for account, currency, balance, amount in rows]

    def postings_about(self, cause: str) -> list[tuple[str, str, int, str]]:
        """(key, account, amount, currency) of the transfers with this cause, in order."""
        rows = self.db.rows(
            "SELECT key, account, amount_micro, currency FROM transfers JOIN entries USING (transfer_id)"
            " WHERE cause = ? ORDER BY transfer_id, position",
            (cause,),
        )
        return [(key, account, amount, currency) for key, account, amount, currency in rows]


def add_transfers(db: Database, transfers: Sequence[tuple[Transfer, str]], tick: int, now_s: float) -> None:
    """(transfer, body hash), inside a transaction.  Numbers have no gaps and stand in the order of commits."""
    if not transfers:
        return
    if db.dialect == "postgresql":  # other writers wait here until this one has committed
        db.rows("SELECT pg_advisory_xact_lock(?)", (NUMBERING,))
    row = db.row("SELECT max(transfer_id) FROM transfers")
    first = int((row and row[0]) or 0) + 1
    heads, entries = [], []
    change: dict[tuple[str, str], int] = {}
    for number, (transfer, body_hash) in enumerate(transfers, first):
        heads.append((number, transfer.key, body_hash, tick, transfer.cause, now_s))
        for position, entry in enumerate(transfer.entries):
            entries.append((number, position, entry.account, entry.amount_micro, entry.currency))
            account = (entry.account, entry.currency)
            change[account] = change.get(account, 0) + entry.amount_micro
    db.run_many("INSERT INTO transfers VALUES (?,?,?,?,?,?)", heads)
    db.run_many("INSERT INTO entries VALUES (?,?,?,?,?)", entries)
    db.run_many(BALANCE, [(*account, change[account]) for account in sorted(change)])
