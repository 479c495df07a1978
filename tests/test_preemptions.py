"""How often tasks are parked for others: the file, the decision, the count that goes with a task, `why`, and code apart."""

from dataclasses import replace

import pytest

from qipan.errors import InvalidInput
from qipan.events import EngineOffered, LeaseGranted, Reserve, RulesSet, Stop, TaskStarted
from qipan.hardware import BoardId
from qipan.leases import AskStep, EngineId, Offer, TaskId
from qipan.quota import Loan, QuotaRule, Rate
from qipan.rules import check_rules, parse_rules
from qipan.rules.explain import explain_rules
from qipan.scheduler import Moment, Phase, Settings, State, decide
from qipan.scheduler.asks import asks_of
from qipan.scheduler.limits import why_waiting_text
from qipan.twin import Violation, check_end
from qipan.twin.quota_check import QuotaWatch
from test_quota import board, of, parked
from test_scheduler import commands, run_until_started
from test_twin import LARGE, stormy_world
from worlds import FAST, TARIFF

pytestmark = pytest.mark.computes

DC = BoardId("dc")
ONCE = QuotaRule(BoardId("*"), "*", per_task=Rate(1, 3600.0))


def stopped(state: State, now_s: float, *facts) -> list[str]:
    return [command.task_id for command in commands(decide(state, facts, Moment(now_s, now_s)), Stop)]


def preempted_once(*rules: QuotaRule) -> State:
    """Bob's task was parked for a dearer one, which ended, and runs again."""
    state = board(*rules)
    decide(state, [of("bob", "b", 8)], Moment(1, 1))
    run_until_started(state, "b", 1.0)
    assert stopped(state, 2.0, of("alice", "a", 8, bid=20 * TARIFF)) == ["b"]
    decide(state, [parked(state, "b", 3.0)], Moment(3, 3))
    run_until_started(state, "a", 3.0)
    decide(state, [replace(parked(state, "a", 4.0), outcome="done")], Moment(4, 4))
    run_until_started(state, "b", 5.0)
    return state


def test_the_file_limits_preemptions_of_everybody():
    [rule] = parse_rules(
        'quota: [{board: "*", tenant: "*", preemptions: {per_task: 2 in 6h, per_tenant: 20 in 1h}}]', "f"
    )
    assert (rule.per_task, rule.per_tenant) == (Rate(2, 21_600.0), Rate(20, 3600.0))
    check_rules((rule,), {"dc": {"sim/fast": 8}}, ("alice",), "f")
    [told] = explain_rules([rule], {"dc": {"sim/fast": 8}})
    assert "a task is parked for others at most 2 in 6.0h" in str(told["text"])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('{board: dc, tenant: "*", floor: 2}', "`floor` is one tenant's; name it"),
        ("{board: dc, tenant: a, preemptions: {per_task: often}}", "'often' is no rate; write 2 in 6h"),
        ("{board: dc, tenant: a, preemptions: {per_task: 65 in 1h}}", "at most 64"),
        ("{board: dc, tenant: a, preemptions: {per_task: 2 in 8d}}", "write one of up to 7d"),
        ("{board: dc, tenant: a, preemptions: {per_task: 2 in ever}}", "is not a duration"),
        ("{board: dc, tenant: a, preemptions: {}}", "limits nothing"),
    ],
)
def test_a_wrong_limit_is_told(rule, said):
    with pytest.raises(InvalidInput) as raised:
        parse_rules(f"quota:\n  - {rule}\n", "rules.yaml")
    assert said in str(raised.value)
    assert "rules.yaml:2" in str(raised.value.where)


@pytest.mark.parametrize("settings", [Settings(), LARGE])
def test_a_task_is_parked_no_more_often_than_the_rule_says(settings):
    state = preempted_once(ONCE)
    state.settings = settings
    assert stopped(state, 6.0, of("alice", "c", 8, bid=20 * TARIFF)) == []
    assert stopped(state, 3601.0) == [], "the window has not passed"
    waits = why_waiting_text(state, state.tasks[TaskId("c")], 3601.0)
    assert "tasks that were parked often enough hold 8 devices" in waits
    assert state.tasks[TaskId("c")].promised_until_s == 0.0, "nothing is being freed for it"
    assert stopped(state, 3665.0) == ["b"], "a large board looks at all once in a lease's time"


def test_without_the_rule_it_is_parked_again():
    assert stopped(preempted_once(), 6.0, of("alice", "c", 8, bid=20 * TARIFF)) == ["b"]


def test_a_tenants_tasks_together_are_parked_no_more_often_the_least_valued_first():
    state = board(QuotaRule(DC, "bob", per_tenant=Rate(1, 60.0)))
    for name, bid in (("b1", 3), ("b2", 2)):
        decide(state, [of("bob", name, 4, bid=bid * TARIFF)], Moment(1, 1))
        run_until_started(state, name, 1.0)
    assert stopped(state, 2.0, of("alice", "a", 8, bid=20 * TARIFF)) == [], "it would take both"
    assert stopped(state, 3.0, of("alice", "c", 4, bid=20 * TARIFF)) == ["b2"]
    assert stopped(state, 4.0, of("alice", "d", 4, bid=20 * TARIFF)) == []
    assert stopped(state, 64.0) == ["b1"]


def test_what_an_owner_takes_back_counts_and_is_not_refused_and_who_was_parked_enough_borrows_no_more():
    state = board(ONCE, QuotaRule(DC, "alice", share=0.5))
    decide(state, [of("bob", "b", 8)], Moment(1, 1))
    run_until_started(state, "b", 1.0)
    assert stopped(state, 2.0, of("alice", "a", 4)) == ["b"]
    decide(state, [parked(state, "b", 3.0)], Moment(3, 3))
    run_until_started(state, "a", 3.0)
    decide(state, [replace(parked(state, "a", 4.0), outcome="done")], Moment(4, 4))
    task = state.tasks[TaskId("b")]
    assert task.phase is Phase.QUEUED
    assert "it was parked 1 in 60.0m, as often as" in why_waiting_text(state, task, 4.0)
    decide(state, [], Moment(3700, 3700))
    assert state.tasks[TaskId("b")].phase is Phase.RESERVING


def test_devices_of_a_spared_task_are_not_offered_to_the_parent():
    state = preempted_once(ONCE)
    [offer] = asks_of(state, Moment(6, 6))
    assert offer.largest_gang == 0
    [offer] = asks_of(state, Moment(3700, 3700))
    assert offer.largest_gang == 8


def test_the_count_goes_with_the_task_to_the_next_child():
    state, dc1, dc2 = State(BoardId("top")), EngineId("dc1"), EngineId("dc2")
    asks = Offer(FAST, 8, (AskStep(8, 0),), 8, TARIFF, "dc1", "east")
    decide(state, [EngineOffered(dc1, (asks,), chooses=True)], Moment(0, 0))
    decide(state, [of("bob", "b", 8)], Moment(1, 1))
    task = state.tasks[TaskId("b")]
    facts = [LeaseGranted(task.task_id, task.lease_id, dc1, task.generation, task.needs)]
    decide(state, facts, Moment(1, 1))
    task = state.tasks[TaskId("b")]
    run = TaskStarted(
        task.task_id, task.lease_id, dc1, task.generation, task.attempt, "sim/fast:8", task.needs, "dc1"
    )
    decide(state, [run], Moment(1, 1))
    ended = replace(parked(state, "b", 3.0), engine=dc1, preempted_s=(2.5,))
    gone = EngineOffered(dc1, (replace(asks, devices=0, asks=(), largest_gang=0),), chooses=True)
    other = EngineOffered(dc2, (replace(asks, site="dc2"),), chooses=True)
    [again] = commands(decide(state, [ended, gone, other], Moment(10, 10)), Reserve)
    assert again.order.preempted_s == (2.5,)
    child = board(ONCE)
    child.top = False
    decide(child, [of("x", "x", 1)], Moment(9, 9))
    assert child.tasks[TaskId("x")].preempted_s == ()


# ---- in storms, counted apart -------------------------------------------------------------------------------------------

STORM_RULES = (
    QuotaRule(BoardId("*"), "*", per_task=Rate(1, 400.0)),
    QuotaRule(BoardId("dc1"), "alice", floor=1, loan=Loan(30.0), per_tenant=Rate(2, 300.0)),
    QuotaRule(BoardId("dc3"), "bob", per_tenant=Rate(1, 300.0)),
)


def run_preemption_storm(seed: int, settings: Settings = Settings(), *, kept: bool = True) -> int:  # noqa: B008
    """Forty tasks of three tenants; returns how often one was parked for others.  `kept` False: the boards know of no rule."""
    try:
        world, submitted = stormy_world(seed, settings=settings, tenants=("alice", "bob", "carol"))
        for controller in world.tree.controllers.values():
            controller.accept(RulesSet(STORM_RULES if kept else ()))
        watch = QuotaWatch(STORM_RULES)
        world.after_step.append(watch.check)
        world.run(until_s=50_000)
        check_end(world, submitted)
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_preemptions.py -k 'storm and {seed}'`")
        raise
    return watch.preempted


@pytest.mark.slow
def test_storms_keep_the_limits():
    times = [run_preemption_storm(seed, LARGE if seed % 2 else Settings()) for seed in range(3)]
    assert sum(times) >= 3, times


@pytest.mark.slow
def test_the_check_apart_sees_boards_that_keep_no_limit():
    with pytest.raises(Violation, match="was parked for others"):
        [run_preemption_storm(seed, kept=False) for seed in range(20)]
