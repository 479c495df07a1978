"""A transfer moves money between accounts; its entries sum to zero in each currency.

An account is named "class/name".  Amounts are integers of 1e-6 of a currency.  A transfer is never edited: a correction is
a new transfer that takes the old one back (`reverse`) and another that says what is right.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from qipan.errors import InvalidInput

AMOUNT_MICRO_MAX = 2**62
TEXT_MAX = 200


@dataclass(frozen=True, slots=True)
class Entry:
    account: str
    amount_micro: int
    currency: str = "CNY"


@dataclass(frozen=True, slots=True)
class Transfer:
    """`key` makes it idempotent: the same key with another body is refused.  `cause` is the task or event it is
    about.  Raises InvalidInput when the entries do not sum to zero, or a text or amount cannot be kept."""

    key: str
    cause: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        sums: dict[str, int] = {}
        for entry in self.entries:
            sums[entry.currency] = sums.get(entry.currency, 0) + entry.amount_micro
            if not -AMOUNT_MICRO_MAX <= entry.amount_micro <= AMOUNT_MICRO_MAX:
                raise InvalidInput(
                    f"transfer {shown(self.key)}: {entry.amount_micro} is beyond {AMOUNT_MICRO_MAX}; split it"
                )
            check_text(entry.account)
        if len(self.entries) < 2 or any(sums.values()):
            raise InvalidInput(
                f"transfer {shown(self.key)} does not sum to zero: {sums}; give entries that do"
            )
        check_text(self.key)
        check_text(self.cause)
        for currency in sums:
            check_currency(currency)

    @property
    def body_hash(self) -> str:
        body = "\n".join(f"{entry.account} {entry.amount_micro} {entry.currency}" for entry in self.entries)
        return hashlib.blake2b(f"{self.cause}\n{body}".encode(), digest_size=16).hexdigest()


def move(
    key: str, cause: str, source: str, target: str, amount_micro: int, currency: str = "CNY"
) -> Transfer:
    """Raises InvalidInput when the amount is negative: it would take from the target."""
    if amount_micro < 0:
        raise InvalidInput(
            f"transfer {shown(key)} moves {amount_micro}; name source and target the other way round"
        )
    return Transfer(
        key, cause, (Entry(source, -amount_micro, currency), Entry(target, amount_micro, currency))
    )


def exchange(
    key: str,
    cause: str,
    account: str,
    give: Entry,
    get_currency: str,
    rate: tuple[int, int],
    desk: str = "fx/desk",
) -> Transfer:
    """`account` gives `give` (its amount is positive) and gets amount * rate[0] / rate[1] of another currency, rounded down: the
    rest of a micro-unit stays with the desk.  Raises InvalidInput."""
    if give.amount_micro <= 0 or rate[0] <= 0 or rate[1] <= 0 or give.currency == get_currency:
        raise InvalidInput(
            f"exchange {shown(key)}: {give.amount_micro} {give.currency} at {rate[0]}/{rate[1]} into {get_currency[:8]};"
            " give a positive amount, a positive rate and two currencies"
        )
    got = give.amount_micro * rate[0] // rate[1]
    return Transfer(
        key,
        cause,
        (
            Entry(account, -give.amount_micro, give.currency),
            Entry(desk, give.amount_micro, give.currency),
            Entry(desk, -got, get_currency),
            Entry(account, got, get_currency),
        ),
    )


def reverse(transfer: Transfer, key: str, cause: str) -> Transfer:
    """Takes a transfer back, entry by entry."""
    return Transfer(
        key,
        cause,
        tuple(Entry(entry.account, -entry.amount_micro, entry.currency) for entry in transfer.entries),
    )


def check_balances(balances: Iterable[tuple[str, str, int]]) -> dict[str, int]:
    """(account, currency, balance) -> the sum per currency; all zero in a sound ledger."""
    sums: dict[str, int] = {}
    for _account, currency, balance in balances:
        sums[currency] = sums.get(currency, 0) + balance
    return sums


@lru_cache(maxsize=1 << 16)
def check_text(text: str) -> str:
    """Accounts, keys and causes go into logs and statements: one printable line.  Raises InvalidInput."""
    if not 0 < len(text) <= TEXT_MAX or not text.isprintable() or text != text.strip():
        raise InvalidInput(
            f"{shown(text)} is no name: give 1 to {TEXT_MAX} printable characters without space at the ends"
        )
    return text


@lru_cache(maxsize=1024)
def check_currency(currency: str) -> str:
    """Raises InvalidInput."""
    if not (len(currency) == 3 and currency.isascii() and currency.isalpha() and currency.isupper()):
        raise InvalidInput(f"{shown(currency)} is no currency; give three capital letters such as CNY")
    return currency


def shown(text: object) -> str:
    """Foreign text as it may stand in a message: quoted, escaped, short."""
    return ascii(str(text)[:60])
