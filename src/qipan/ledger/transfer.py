"""A transfer moves money between accounts; its entries sum to zero in each currency."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from qipan.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Entry:
    account: str
    amount_micro: int
    currency: str = "CNY"


@dataclass(frozen=True, slots=True)
class Transfer:
    """`key` makes it idempotent: the same key with another body is refused.  `cause` is the task or event it is
    about.  Raises InvalidInput when the entries do not sum to zero."""

    key: str
    cause: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        sums: dict[str, int] = {}
        for entry in self.entries:
            sums[entry.currency] = sums.get(entry.currency, 0) + entry.amount_micro
        if len(self.entries) < 2 or any(sums.values()):
            raise InvalidInput(f"transfer {self.key} does not sum to zero: {sums}; give entries that do")

    @property
    def body_hash(self) -> str:
        body = "\n".join(f"{entry.account} {entry.amount_micro} {entry.currency}" for entry in self.entries)
        return hashlib.blake2b(f"{self.cause}\n{body}".encode(), digest_size=16).hexdigest()


def move(key: str, cause: str, source: str, target: str, amount_micro_cny: int) -> Transfer:
    return Transfer(key, cause, (Entry(source, -amount_micro_cny), Entry(target, amount_micro_cny)))


def check_balances(balances: Iterable[tuple[str, str, int]]) -> dict[str, int]:
    """(account, currency, balance) -> the sum per currency; all zero in a sound ledger."""
    sums: dict[str, int] = {}
    for _account, currency, balance in balances:
        sums[currency] = sums.get(currency, 0) + balance
    return sums
