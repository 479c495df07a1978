import os
import random
import signal
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.errors import InvalidInput
from qipan.journal import Journal
from qipan.journal.settling import rows_of, run, runs
from qipan.ledger.requests import Post, Posted
from qipan.ledger.transfer import move
from qipan.settlement.contracts import split
from qipan.settlement.mirror import pair, reconcile
from qipan.settlement.service import Evidence, Service, credit_of, imbalance_of
from qipan.settlement.settle import differences, settle
from qipan.store.database import Sqlite
from qipan.store.opening import create, open_database, version_of
from settlements import later, period

pytestmark = pytest.mark.computes


class Deadly(Sqlite):
    """Ends its own process with SIGKILL before or after its n-th statement."""

    left, after = -1, False

    def count(self, act):
        self.left -= 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = act()
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def run(self, sql, values=()):
        return self.count(lambda: super(Deadly, self).run(sql, values))

    def rows(self, sql, values=()):
        return self.count(lambda: super(Deadly, self).rows(sql, values))

    def run_many(self, sql, rows):
        return self.count(lambda: super(Deadly, self).run_many(sql, rows))


def deadly(path) -> Journal:
    db = Deadly(path)
    if version_of(db) is None:
        create(db)
    return Journal(db)


def both_runs(journal, seed):
    run(journal, period(seed), "provisional", 100.0)
    run(journal, later(period(seed), seed), "final", 200.0)


def outcome_of(journal):
    """Rows, postings and balances: everything that must be the same."""
    rows = [rows_of(journal, name) for name, _, _, _ in runs(journal)]
    postings = journal.db.rows("SELECT key, body_hash FROM transfers ORDER BY transfer_id")
    return rows, postings, journal.balances(), runs(journal)


@pytest.mark.slow
def test_settlement_killed_at_a_hundred_points_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("qipan.journal.settling.BATCH", 20)
    whole = deadly(tmp_path / "whole.db")
    whole.db.left = 10**9
    both_runs(whole, 1)
    statements = 10**9 - whole.db.left
    expected = outcome_of(whole)
    assert not whole.check().problems
    killed = 0
    for seed in range(100):
        rng, path = random.Random(seed), tmp_path / f"{seed}.db"
        for _ in range(rng.randint(1, 3)):  # and again while it takes up
            killed += killed_while_settling(path, rng.randint(1, statements), rng.random() < 0.5)
        journal = Journal(open_database(path))
        both_runs(journal, 1)
        assert outcome_of(journal) == expected, f"seed {seed}"
        assert not journal.check().problems
        journal.db.close()
        path.unlink()
    assert killed >= 100


def killed_while_settling(path, statement, after):
    """Returns whether SIGKILL came before the end."""
    child = os.fork()
    if child == 0:
        try:
            journal = deadly(path)
            journal.db.left, journal.db.after = statement, after
            both_runs(journal, 1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_provisional_and_final_rows_together_are_the_final_rows(seed):
    first, last = settle(period(seed, 12, 6)), settle(later(period(seed, 12, 6), seed))
    sums: dict[str, int] = {}
    for row in [*first, *differences(first, last)]:
        for entry in row.entries:
            sums[entry.account] = sums.get(entry.account, 0) + entry.amount_micro
    for row in last:
        for entry in row.entries:
            sums[entry.account] -= entry.amount_micro
    assert not any(sums.values())


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_row_sums_to_zero_and_is_named_once(seed):
    rows = settle(period(seed, 12, 6))
    assert all(sum(entry.amount_micro for entry in row.entries) == 0 for row in rows)
    assert len({row.place for row in rows}) == len(rows)


def test_a_provider_that_claims_more_than_was_measured_is_paid_what_was_measured():
    first = period(1)
    honest = replace(first, deliveries=tuple(replace(one, claimed_device_us=one.measured.device_us) for one in first.deliveries))  # fmt: skip
    lying = replace(first, deliveries=tuple(replace(one, claimed_device_us=2 * one.measured.device_us) for one in first.deliveries))  # fmt: skip
    assert [row.entries for row in settle(honest)] == [row.entries for row in settle(lying)]


def test_a_run_with_other_inputs_under_the_same_name_is_refused():
    journal = Journal(open_database(None))
    run(journal, period(1), "provisional", 1.0)
    with pytest.raises(InvalidInput, match="other inputs"):
        run(journal, replace(period(1), penalty_ppm=1), "provisional", 2.0)
    with pytest.raises(InvalidInput, match="no finished provisional"):
        run(journal, period(2), "final", 2.0)


def test_what_both_see_is_paid_and_what_one_sees_is_disputed():
    service, good, bad = Service(), Evidence(0.0, 3600.0, 3600.0), Evidence(900.0, 3600.0, 3600.0)
    both = credit_of(service, 0.0, 1_000_000, bad, bad)
    one = credit_of(service, 0.0, 1_000_000, good, bad)
    silent = credit_of(service, 0.0, 1_000_000, None, bad)
    assert (both.certain_micro, both.disputed_micro) == (50_000, 0)
    assert (one.certain_micro, one.disputed_micro) == (0, 50_000)
    assert (silent.certain_micro, silent.disputed_micro) == (50_000, 0), "who says nothing agrees"


def test_credits_together_are_capped():
    worst = Evidence(9000.0, 0.0, 3600.0, 0, 0.0)
    assert credit_of(Service(), 0.0, 1_000_000, worst, worst).certain_micro == 300_000


def test_the_imbalance_price_is_the_dearer_of_clearing_and_replacement():
    cheap, dear = imbalance_of(3, 100, 80, 200_000), imbalance_of(3, 100, 180, 200_000)
    assert (cheap.refund_micro, cheap.extra_micro, cheap.penalty_micro) == (300, 0, 60)
    assert (dear.refund_micro, dear.extra_micro, dear.penalty_micro) == (300, 240, 108)


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any))
def test_a_split_is_exact(total, weights):
    parts = split(total, weights)
    assert sum(parts) == total
    assert all(abs(part * sum(weights) - total * weight) < sum(weights) for part, weight in zip(parts, weights, strict=True))  # fmt: skip


def test_mirrors_of_two_owners_sum_to_zero_and_a_lost_posting_is_found():
    ours, theirs = Journal(open_database(None)), Journal(open_database(None))
    ours.submit([Post(move("open", "opening", "bank/world", "tenant/a", 1000))], 0.0)
    for attempt in (1, 2, 3):
        here, there = pair("task-1", attempt, "day-1", payer="us", payee="them", source="tenant/a",
                           target="provider/p", amount_micro=10 * attempt)  # fmt: skip
        for _ in range(2):  # a repeated message posts once
            assert isinstance(ours.submit([Post(here)], 1.0)[0], Posted)
        if attempt != 2:
            theirs.submit([Post(there)], 1.0)
    assert ours.balance("mirror/them") == 60
    mine = [(key, amount) for _, key, _, amount, _ in ours.postings_of("mirror/them")]
    other = [(key, amount) for _, key, _, amount, _ in theirs.postings_of("mirror/us")]
    [difference] = reconcile(mine, other)
    assert (difference.key, difference.ours_micro, difference.theirs_micro) == ("mirror/task-1/2/day-1", 20, None)  # fmt: skip
