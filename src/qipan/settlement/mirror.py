"""Boards of different owners: each keeps its own ledger and, in it, a mirror of the other.  One key per (task, attempt, period)
stands in both; the two mirrors sum to zero.  Clauses X-1 and X-2 of docs/rules/grid.md."""

from collections.abc import Iterable
from dataclasses import dataclass

from qipan.ledger.transfer import Transfer, move


@dataclass(frozen=True, slots=True)
class Difference:
    """`ours` and `theirs`: what each ledger has under the key, seen from ours (None: nothing)."""

    key: str
    ours_micro: int | None
    theirs_micro: int | None


def pair(
    task: str, attempt: int, period: str, *, payer: str, payee: str, source: str, target: str, amount_micro: int
) -> tuple[Transfer, Transfer]:  # fmt: skip
    """The payer's ledger: `source` -> mirror of the payee.  The payee's ledger: mirror of the payer -> `target`."""
    key = f"mirror/{task}/{attempt}/{period}"
    return (
        move(key, task, source, f"mirror/{payee}", amount_micro),
        move(key, task, f"mirror/{payer}", target, amount_micro),
    )


def reconcile(ours: Iterable[tuple[str, int]], theirs: Iterable[tuple[str, int]]) -> tuple[Difference, ...]:
    """(key, amount) of the mirror accounts in both ledgers.  Empty when they agree: every key in both, of opposite sign."""
    here, there = dict(ours), dict(theirs)
    found = []
    for key in sorted(here.keys() | there.keys()):
        mine, other = here.get(key), there.get(key)
        if mine is None or other is None or mine + other:
            found.append(Difference(key, mine, None if other is None else -other))
    return tuple(found)
