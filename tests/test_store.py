import pytest

from qipan.errors import InvalidInput, QipanError
from qipan.ledger.transfer import Entry, Transfer, move
from qipan.store import Store, StoredFact, StoredTick


def tick(number: int) -> StoredTick:
    return StoredTick(number, 1.0, 1.0, "boot", b"decision", ())


def test_a_tick_is_stored_whole_or_not_at_all(tmp_path):
    store = Store(tmp_path / "a.db")
    fact = StoredFact("here", 1, "kind", "t", b"x")
    store.record([fact], tick(1), [b"report"], [])
    with pytest.raises(Exception, match="UNIQUE"):
        store.record([fact], tick(2), [b"report"], [])
    assert [stored.tick for stored in store.ticks()] == [1]
    assert store.reports_after(0) == [(1, b"report")]


def test_a_store_opened_again_knows_where_each_source_stood(tmp_path):
    store = Store(tmp_path / "a.db")
    store.record([StoredFact("engine", 7, "kind", "t", b"x")], tick(1), [], [])
    store.close()
    assert Store(tmp_path / "a.db").cursor("engine") == 7


def test_a_transfer_is_posted_once_and_another_body_under_its_key_is_refused():
    store = Store(None)
    assert store.post(move("k", "t", "a", "b", 5), 0.0)
    assert not store.post(move("k", "t", "a", "b", 5), 0.0)
    with pytest.raises(InvalidInput, match="posted before"):
        store.post(move("k", "t", "a", "b", 6), 0.0)
    assert sum(balance for _, _, balance in store.balances()) == 0


def test_a_transfer_that_does_not_sum_to_zero_cannot_be_made():
    with pytest.raises(InvalidInput, match="does not sum to zero"):
        Transfer("k", "t", (Entry("a", 1), Entry("b", 1)))


def test_another_schema_is_refused(tmp_path):
    store = Store(tmp_path / "a.db")
    store.put("schema_version", "99")
    store.close()
    with pytest.raises(QipanError, match="schema version 99"):
        Store(tmp_path / "a.db")
