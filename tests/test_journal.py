"""The ledger on a real database: histories against a model told apart, retries, crashes, expiry, several writers, the auditor."""

import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ledger_model import Model, check, play, random_request
from qipan.journal import Journal
from qipan.ledger.requests import CaptureHold, HoldState, PlaceHold, Post, Posted, Refused, VoidHold
from qipan.ledger.transfer import Entry, Transfer, exchange, move
from qipan.store import Place
from qipan.store.database import Postgres
from qipan.store.opening import open_database

HISTORIES = 10_000


@pytest.fixture
def journal():
    made = Journal(open_database(None))
    made.submit([Post(move("open", "opening", "bank/world", "tenant/a", 1000))], 0.0)
    return made


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_random_histories_are_what_the_model_says(part):
    done = sum(play(seed) for seed in range(part * HISTORIES // 4, (part + 1) * HISTORIES // 4))
    assert done > HISTORIES, "most histories must do something"


class LedgerMachine(RuleBasedStateMachine):
    """The same, where hypothesis chooses and shrinks."""

    @initialize()
    def begin(self):
        self.journal, self.model, self.step = Journal(open_database(None)), Model(), 0
        self.history = []

    @rule(seed=st.integers(0, 2**32))
    def ask(self, seed):
        rng = random.Random(seed)
        request = random_request(rng, self.step, self.history, list(self.model.holds))
        [outcome] = self.journal.submit([request], float(self.step))
        expected = self.model.expects(request, float(self.step))
        got = ("repeated" if outcome.repeated else "done") if isinstance(outcome, Posted) else "refused"
        assert got == expected, (request, outcome)
        if expected == "done":
            self.history.append(request)
        self.step += 1

    @invariant()
    def sums_to_zero(self):
        check(self.journal, self.model, "")


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def test_a_batch_sees_its_own_earlier_requests(journal):
    outcomes = journal.submit(
        [
            PlaceHold("p", "task", "t", "tenant/a", 900),
            PlaceHold("q", "task", "u", "tenant/a", 200),
            CaptureHold("c", "task", "t", "provider/p", 300, close=True),
            PlaceHold("r", "task", "v", "tenant/a", 200),
        ],
        1.0,
    )
    assert [type(outcome) for outcome in outcomes] == [Posted, Refused, Posted, Posted]
    assert journal.balance("tenant/a") == 500
    assert journal.hold("t").state is HoldState.POSTED


def test_a_hold_ends_once_whoever_is_first(journal):
    journal.submit([PlaceHold("p", "task", "t", "tenant/a", 400, expires_s=10.0)], 1.0)
    [expired] = journal.expire(10.0)
    assert isinstance(expired, Posted)
    late = journal.submit(
        [VoidHold("v", "cancel", "t"), CaptureHold("c", "task", "t", "provider/p", 1)], 11.0
    )
    assert all(isinstance(outcome, Refused) and "expired already" in outcome.why for outcome in late)
    assert journal.expire(12.0) == []
    assert journal.balance("tenant/a") == 1000


def test_a_key_is_bound_to_its_body(journal):
    first = PlaceHold("p", "task", "t", "tenant/a", 400)
    assert isinstance(journal.submit([first], 1.0)[0], Posted)
    again, other = journal.submit([first, PlaceHold("p", "task", "t", "tenant/a", 401)], 2.0)
    assert isinstance(again, Posted)
    assert again.repeated
    assert isinstance(other, Refused)
    assert other.clause == "L-3"


def test_an_exchange_leaves_the_rest_of_a_micro_unit_with_the_desk(journal):
    [outcome] = journal.submit(
        [Post(exchange("x", "fx", "tenant/a", Entry("tenant/a", 100), "USD", (1, 7)))], 1.0
    )
    assert isinstance(outcome, Posted)
    assert journal.balance("tenant/a", "USD") == 14
    assert {row[1]: row[2] for row in journal.balances("fx/")} == {"CNY": 100, "USD": -14}


def test_what_follows_from_facts_is_never_refused(journal):
    journal.record([move("charge", "task", "tenant/a", "provider/p", 5000)], 1.0, 7)
    assert journal.balance("tenant/a") == -4000, "the service was given: it is owed"
    [more] = journal.submit([Post(move("pay", "t", "tenant/a", "provider/p", 1))], 2.0)
    assert isinstance(more, Refused)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("UPDATE entries SET amount_micro = amount_micro + 1 WHERE rowid = 2", "sum to"),
        ("UPDATE entries SET account = 'tenant/b' WHERE account = 'tenant/a'", "not those that were posted"),
        ("UPDATE balances SET balance_micro = balance_micro + 5 WHERE account = 'tenant/a'", "is kept at"),
        ("DELETE FROM entries WHERE rowid = 1", "entries that sum to"),
        ("DELETE FROM transfers WHERE transfer_id = 1", "belongs to no transfer"),
        ("UPDATE holds SET left_micro = 1", "its account has"),
        ("UPDATE holds SET state = 'open', left_micro = 7", "its account has"),
        ("UPDATE transfers SET cause = 'gift' WHERE transfer_id = 1", "not those that were posted"),
    ],
)
def test_the_auditor_sees_what_was_edited(journal, edit, told):
    journal.submit(
        [PlaceHold("p", "task", "t", "tenant/a", 400), CaptureHold("c", "task", "t", "provider/p", 100, True)], 1.0
    )  # fmt: skip
    assert journal.check().problems == ()
    journal.db.run(edit)
    assert any(told in problem for problem in journal.check().problems), journal.check().problems


def test_a_batch_that_cannot_be_written_changes_nothing(journal):
    journal.db.run("CREATE TRIGGER no BEFORE INSERT ON entries WHEN NEW.account = 'tenant/b'"
                                  " BEGIN SELECT raise(ABORT, 'disk is full'); END")  # fmt: skip
    before = journal.balances()
    with pytest.raises(sqlite3.Error, match="disk is full"):
        journal.submit(
            [Post(move("a", "t", "bank/world", "tenant/a", 1)), Post(move("b", "t", "bank/world", "tenant/b", 1))], 1.0
        )  # fmt: skip
    assert journal.balances() == before
    assert not journal.check().problems


def test_a_transfer_of_many_entries_and_currencies(journal):
    transfer = Transfer(
        "m", "split",
        (Entry("bank/world", -10), Entry("tenant/a", 7), Entry("tenant/b", 3), Entry("fx/desk", -2, "USD"), Entry("tenant/b", 2, "USD")),
    )  # fmt: skip
    assert isinstance(journal.submit([Post(transfer)], 1.0)[0], Posted)
    assert journal.check().sums == {"CNY": 0, "USD": 0}


@pytest.mark.slow
def test_eight_writers_on_postgres_lose_nothing_and_double_nothing(postgres):
    """Each posts its own, and all of them the same ones, into the same accounts."""
    place = Place(postgres, "writers")
    open_database(place).close()
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda number: write_some(place, number), range(8)))
    journal = Journal(Postgres(postgres, "writers", writer=False))
    assert sum(new) == 8 * 100 + 50, "the shared ones were posted once"
    assert journal.balance("tenant/hot") == 850
    found = journal.check()
    assert (found.problems, found.transfers) == ((), 850)


def write_some(place: Place, number: int) -> int:
    journal, new = Journal(Postgres(place.url, place.schema, writer=False)), 0
    for batch in range(10):
        asked = [
            Post(move(f"own/{number}/{batch}/{i}", "t", "bank/world", "tenant/hot", 1)) for i in range(10)
        ]
        asked += [Post(move(f"shared/{batch}/{i}", "t", "bank/world", "tenant/hot", 1)) for i in range(5)]
        random.Random(number).shuffle(asked)
        new += sum(not outcome.repeated for outcome in journal.submit(asked, 1.0))
    journal.db.close()
    return new


@pytest.mark.slow
def test_histories_on_postgres_are_what_the_model_says(postgres):
    for seed in range(30):
        rng = random.Random(seed)
        journal, model = Journal(open_database(Place(postgres, f"history{seed}"))), Model()
        history = []
        for step in range(14):
            request = random_request(rng, step, history, list(model.holds))
            [outcome] = journal.submit([request], float(step))
            expected = model.expects(request, float(step))
            got = ("repeated" if outcome.repeated else "done") if isinstance(outcome, Posted) else "refused"
            assert got == expected, (seed, step, request, outcome)
            if expected == "done":
                history.append(request)
        check(journal, model, f"seed {seed}")
        assert not journal.check().problems
        journal.db.close()
