"""Double entry in integers of 1e-6 CNY: holds, charges, releases, receipts."""

from qipan.ledger.books import Books, Tariff, charged_once
from qipan.ledger.receipt import cost_micro_cny, make_receipt
from qipan.ledger.transfer import Entry, Transfer, check_balances

__all__ = [
    "Books",
    "Entry",
    "Tariff",
    "Transfer",
    "charged_once",
    "check_balances",
    "cost_micro_cny",
    "make_receipt",
]
