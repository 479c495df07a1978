from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qipan.curves import Need
from qipan.events import TaskExited, TaskProgress, TaskStarted, TaskSubmitted
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, LeaseId, TaskId, Usage
from qipan.ledger import Books, Tariff, charged_once, cost_micro_cny, make_receipt
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


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["dc", "dc2"]), st.integers(0, 10**4)), max_size=12
    ),
    st.sets(st.integers(0, 11)),
    st.integers(0, 10**7),
)
def test_an_attempt_told_again_and_otherwise_is_charged_once_and_billed_as_it_is_charged(told, starts, hold):
    """`starts`: before which of the facts the board began anew."""
    tariff = Tariff("v1", {f"{board}|sim/fast": 600_000 for board in ("dc", "dc2")})
    books, charged, exits = Books(tariff), 0, []
    books.postings(TaskSubmitted(order("a"), hold), 0.0)
    for number, (attempt, board, seconds) in enumerate(told):
        if number in starts:
            kept, books = books.encode(), Books(tariff)
            books.restore(kept)
        exits.append(replace(exited(attempt, 0.0), usage=replace(usage(attempt, seconds), board=board)))
        for transfer in books.postings(exits[-1], 0.0):
            charged += sum(
                entry.amount_micro for entry in transfer.entries if entry.account[:8] == "provider"
            )
    usages = [fact.usage for fact in charged_once(exits)]
    assert (
        make_receipt(TaskId("a"), "alice", usages, tariff.of, "done", 0.0, lambda _: "").cost_micro_cny
        == charged
    )


def test_an_attempt_charged_before_keys_named_the_board_is_not_charged_again():
    books = Books(TARIFF)
    books.postings(TaskSubmitted(order("a"), 0), 0.0)
    books.postings(exited(1, 10.0), 10.0)
    old = books.encode().replace(b"charge/a/1/dc", b"charge/a/1")
    books.restore(old)
    assert not books.postings(exited(1, 10.0), 20.0)
    assert books.postings(exited(2, 10.0), 30.0)


def test_what_an_ended_attempt_says_late_does_not_count_against_the_budget_again():
    budget = 1_000_000
    books = Books(TARIFF)
    books.postings(TaskSubmitted(order("a"), budget, budget), 0.0)
    needs = (Need(ChipClassId("sim/fast"), 1),)
    books.postings(exited(1, 3600.0), 3600.0)  # six tenths of it
    books.postings(TaskStarted(TaskId("a"), LeaseId("l"), EngineId("e"), 1, 2, "p", needs, "cn/dc"), 3600.0)
    books.postings(TaskProgress(TaskId("a"), EngineId("e"), 1, 0.0, 0.0, "", usage(1, 3600.0)), 3601.0)
    assert not books.due(3602.0)


def test_cost_rounds_half_up_once():
    assert cost_micro_cny(usage(1, 3600.0), 600_000) == 600_000
    assert cost_micro_cny(usage(1, 0.003), 600_000) == 1, "half a micro-yuan"
    assert cost_micro_cny(replace(usage(1, 0.0)), 600_000) == 0
