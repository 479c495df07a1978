from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qipan.events import TaskExited, TaskSubmitted
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, LeaseId, TaskId, Usage
from qipan.ledger import Books, Tariff, cost_micro_cny, make_receipt
from worlds import order

TARIFF = Tariff("v1", {"dc|sim/fast": 600_000})


def usage(attempt: int, device_s: float) -> Usage:
    return Usage(
        TaskId("a"),
        attempt,
        "dc",
        EngineId("e"),
        ChipClassId("sim/fast"),
        1,
        "p",
        0.0,
        device_s,
        device_s,
        True,
    )


def exited(attempt: int, device_s: float) -> TaskExited:
    return TaskExited(
        TaskId("a"),
        LeaseId("l"),
        EngineId("e"),
        1,
        attempt,
        "lost",
        1,
        0.0,
        0.0,
        "",
        usage(attempt, device_s),
    )


@given(st.lists(st.floats(0, 1e6), max_size=6), st.integers(0, 10**12))
def test_charges_equal_the_receipt_and_everything_sums_to_zero(seconds, hold):
    books = Books(TARIFF)
    facts = [TaskSubmitted(order("a"), hold), *(exited(i + 1, value) for i, value in enumerate(seconds))]
    transfers = [transfer for fact in facts for transfer in books.postings(fact, 0.0)]
    transfers += books.task_over(TaskId("a"))
    balances: dict[str, int] = {}
    for transfer in transfers:
        for entry in transfer.entries:
            balances[entry.account] = balances.get(entry.account, 0) + entry.amount_micro
    receipt = make_receipt(
        TaskId("a"),
        "alice",
        [usage(i + 1, value) for i, value in enumerate(seconds)],
        TARIFF.of,
        "done",
        0.0,
        lambda _: "",
    )
    assert sum(balances.values()) == 0
    assert balances.get("hold/a", 0) == 0
    assert balances.get("provider/dc", 0) == receipt.cost_micro_cny == -balances.get("tenant/alice", 0)


def test_a_repeated_fact_posts_nothing():
    books = Books(TARIFF)
    submitted = TaskSubmitted(order("a"), 10**9)
    assert len(books.postings(submitted, 0.0)) == 1
    assert not books.postings(submitted, 0.0)
    assert len(books.postings(exited(1, 3600.0), 0.0)) == 1
    assert not books.postings(exited(1, 3600.0), 0.0)


def test_books_restored_go_on_where_they_stood():
    books = Books(TARIFF)
    books.postings(TaskSubmitted(order("a"), 10**9), 0.0)
    again = Books(TARIFF)
    again.restore(books.encode())
    [transfer] = again.postings(exited(1, 3600.0), 0.0)
    assert transfer.entries[1].amount_micro == 600_000


def test_cost_rounds_half_up_once():
    assert cost_micro_cny(usage(1, 3600.0), 600_000) == 600_000
    assert cost_micro_cny(usage(1, 0.003), 600_000) == 1, "half a micro-yuan"
    assert cost_micro_cny(replace(usage(1, 0.0)), 600_000) == 0
