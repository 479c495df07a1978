"""Everything in a ledger recomputed from its entries.  Written apart: it uses nothing that posts (clause L-8)."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

#: transfer id, key, body hash, cause
TransferRow = tuple[int, str, str, str]
#: transfer id, account, amount, currency; those of one transfer together, in their order
EntryRow = tuple[int, str, int, str]
BalanceRow = tuple[str, str, int]
#: hold id, account, currency, amount, left, state
HoldRow = tuple[str, str, str, int, int, str]
PROBLEMS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Audit:
    """`problems` is empty in a sound ledger (at most 1,000 are told).  `sums`: currency -> sum of all entries, zero."""

    transfers: int
    entries: int
    holds_open: int
    sums: dict[str, int]
    problems: tuple[str, ...]


def audit(
    transfers: Iterable[TransferRow],
    entries: Iterable[EntryRow],
    balances: Iterable[BalanceRow],
    holds: Iterable[HoldRow],
) -> Audit:
    """`transfers` and `entries` come in order of the transfer id."""
    problems: list[str] = []
    totals: dict[tuple[str, str], int] = defaultdict(int)
    keys: set[str] = set()
    walk, count, seen = iter(entries), 0, 0
    row = next(walk, None)
    for transfer_id, key, body_hash, cause in transfers:
        seen += 1
        if key in keys:
            problems.append(f"key {key!a} was posted twice")
        keys.add(key)
        lines, sums, size = [cause], defaultdict[str, int](int), 0
        while row is not None and row[0] == transfer_id:
            _, account, amount, currency = row
            lines.append(f"{account} {amount} {currency}")
            sums[currency] += amount
            totals[account, currency] += amount
            size += 1
            row = next(walk, None)
        count += size
        if size < 2 or any(sums.values()):
            problems.append(f"transfer {key!a}: {size} entries that sum to {dict(sums)}")
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        if body_hash[-32:] != digest:
            problems.append(f"transfer {key!a}: its entries are not those that were posted")
        if row is not None and row[0] < transfer_id:
            problems.append(f"an entry of {row[1]!a} belongs to no transfer ({row[0]})")
            break
    if row is not None:
        problems.append(f"entries without a transfer, the first of {row[1]!a} ({row[0]})")
    problems += _balance_problems(totals, balances)
    open_holds, hold_problems = _hold_problems(totals, holds)
    sums_of: dict[str, int] = defaultdict(int)
    for (_, currency), amount in totals.items():
        sums_of[currency] += amount
    problems += [f"all entries in {currency} sum to {total}" for currency, total in sums_of.items() if total]
    return Audit(seen, count, open_holds, dict(sums_of), (*problems, *hold_problems)[:PROBLEMS_MAX])


def _balance_problems(totals: dict[tuple[str, str], int], balances: Iterable[BalanceRow]) -> list[str]:
    kept = {(account, currency): balance for account, currency, balance in balances}
    return [
        f"{account!a} is kept at {kept.get((account, currency), 0)} {currency}, its entries sum to {totals.get((account, currency), 0)}"
        for account, currency in sorted(kept.keys() | totals.keys())
        if kept.get((account, currency), 0) != totals.get((account, currency), 0)
    ]


def _hold_problems(totals: dict[tuple[str, str], int], holds: Iterable[HoldRow]) -> tuple[int, list[str]]:
    opened, problems = 0, []
    for hold_id, _account, currency, amount, left, state in holds:
        opened += state == "open"
        has = totals.get((f"hold/{hold_id}", currency), 0)
        expected = left if state == "open" else 0
        if has != expected or not 0 <= left <= amount or (state != "open" and left):
            problems.append(f"hold {hold_id!a} is {state} with {left} of {amount}, its account has {has}")
    return opened, problems
