"""Quota rules: the file, what they refuse, what comes back to an owner, on one board and in storms."""

from dataclasses import replace

import pytest

from qipan.controller import verify
from qipan.curves import Need
from qipan.errors import InvalidInput
from qipan.events import (
    EngineOffered,
    LeaseGranted,
    Reserve,
    RulesSet,
    Stop,
    TaskExited,
    TaskStarted,
    TaskSubmitted,
)
from qipan.forecast import Hours
from qipan.hardware import BoardId
from qipan.leases import AskStep, EngineId, Offer, TaskId, Usage
from qipan.quota import Loan, QuotaRule
from qipan.rules import check_rules, parse_rules
from qipan.scheduler import Moment, Phase, Settings, State, decide
from qipan.scheduler.asks import asks_of
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.state import TaskState
from qipan.twin import World, check_end
from qipan.twin.quota_check import QuotaWatch
from test_scheduler import ENGINE, commands, leaf_state, run_until_started
from test_twin import LARGE, stormy_world
from worlds import FAST, SLOW, TARIFF, order

pytestmark = pytest.mark.computes

DC = BoardId("dc")
RULES = """quota:
  - {board: east, tenant: alice, chips: [sim/*], floor: 4, ceiling: 8, lend: {hours: 20:00-08:00, notice: 10m}, protect: [serve]}
  - {board: "*", tenant: bob, share: 25%, borrow: 2}
"""


def board(*rules: QuotaRule, devices: int = 8) -> State:
    state = leaf_state(devices)
    decide(state, [RulesSet(rules)], Moment(0.5, 0.5))
    return state


def of(tenant: str, name: str, devices: int, **more: object):
    made = order(name, counts=(devices,), **more)  # type: ignore[arg-type]
    return TaskSubmitted(replace(made, tenant=tenant), 0)


def parked(state: State, task_id: str, now_s: float) -> TaskExited:
    task = state.tasks[TaskId(task_id)]
    usage = Usage(task.task_id, task.attempt, "dc", ENGINE, FAST, 1, task.point_id, 0.0, now_s, 1.0, True)
    return TaskExited(
        task.task_id, task.lease_id, ENGINE, task.generation, task.attempt, "parked", 0, 1.0, 1.0, "", usage
    )


def test_the_file_becomes_rules():
    alice, bob = parse_rules(RULES, "rules.yaml")
    assert (alice.floor, alice.ceiling, alice.protect) == (4, 8, ("serve",))
    assert alice.loan == Loan(600.0, 20 * 3600.0, 8 * 3600.0)
    assert (bob.share, bob.borrow, bob.floor) == (0.25, 2, 0)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            "{board: east, tenant: alice, flor: 4}",
            "rules.yaml:2:34: quota[0]: unknown key 'flor'; did you mean 'floor'?",
        ),
        ("{board: east, tenant: alice}", "gives and limits nothing"),
        ("{board: east, tenant: alice, floor: 4, ceiling: 2}", "2 is below the floor of 4"),
        ("{board: east, tenant: alice, share: 120%}", "is no share"),
        ("{board: east, tenant: alice, floor: 4, lend: {hours: 8-20, notice: 10m}}", "are no hours"),
        ("{board: east, tenant: alice, share: 10%, lend: {notice: 10m}}", "add `floor`"),
    ],
)
def test_a_wrong_rule_is_answered_with_its_place(rule, said):
    with pytest.raises(InvalidInput) as raised:
        parse_rules(f"quota:\n  - {rule}\n", "rules.yaml")
    assert said in (
        f"{raised.value.where}: {raised.value}" if said.startswith("rules") else str(raised.value)
    )


def test_rules_are_held_against_the_boards():
    there = {"east": {"sim/fast": 8}}
    with pytest.raises(InvalidInput, match="did you mean 'east'"):
        check_rules((QuotaRule(BoardId("eest"), "alice", floor=1),), there, ("alice",), "f")
    rules = (QuotaRule(BoardId("east"), "alice", floor=6), QuotaRule(BoardId("*"), "bob", floor=3))
    with pytest.raises(InvalidInput, match="promise 9 devices"):
        check_rules(rules, there, ("alice", "bob"), "f")


def test_a_ceiling_holds():
    state = board(QuotaRule(DC, "alice", ceiling=3))
    facts = [of("alice", name, 2) for name in ("a", "b")]
    assert len(commands(decide(state, facts, Moment(1, 1)), Reserve)) == 1
    assert "ceiling of 3: 2 are held, 2 more are wanted" in why_waiting_text(
        state, state.tasks[TaskId("b")], 1.0
    )


def test_a_floor_without_a_loan_is_kept_free():
    state = board(QuotaRule(DC, "alice", floor=6))
    decision = decide(state, [of("bob", "b", 4), of("bob", "c", 2)], Moment(1, 1))
    assert [command.task_id for command in commands(decision, Reserve)] == ["c"]
    assert commands(decide(state, [of("alice", "a", 4)], Moment(2, 2)), Reserve)


def test_a_share_is_lent_and_comes_back_when_its_owner_waits():
    state = board(QuotaRule(DC, "alice", share=0.5))
    decide(state, [of("bob", "b", 8, bid=50 * TARIFF)], Moment(1, 1))
    run_until_started(state, "b", 1.0)
    decision = decide(state, [of("alice", "a", 2, bid=2 * TARIFF)], Moment(2, 2))
    assert [command.park for command in commands(decision, Stop)] == [True]
    assert [reason.verdict for reason in decision.reasons] == ["reclaimed"]
    decision = decide(state, [parked(state, "b", 3.0)], Moment(3, 3))
    assert [command.task_id for command in commands(decision, Reserve)] == ["a"], (
        "its owner is served before a dearer bid"
    )


@pytest.mark.parametrize("bobs", [(8,), (4, 4)])
def test_what_a_tenant_holds_within_its_own_is_not_taken_for_a_dearer_bid(bobs):
    state = board(QuotaRule(DC, "alice", share=0.5))
    decide(state, [of("alice", "a", 4, bid=2 * TARIFF)], Moment(1, 1))
    run_until_started(state, "a", 1.0)
    dear = [of("bob", f"b{number}", devices, bid=50 * TARIFF) for number, devices in enumerate(bobs)]
    decision = decide(state, dear, Moment(2, 2))
    assert not commands(decision, Stop)
    assert len(commands(decision, Reserve)) == (1 if bobs == (4, 4) else 0), "what is not alice's"


def test_a_tenants_own_dearer_task_may_take_what_is_its_own():
    state = board(QuotaRule(DC, "alice", share=0.5))
    decide(state, [of("alice", "a", 4, bid=2 * TARIFF)], Moment(1, 1))
    run_until_started(state, "a", 1.0)
    decision = decide(state, [of("alice", "c", 8, bid=50 * TARIFF)], Moment(2, 2))
    assert [command.task_id for command in commands(decision, Stop)] == ["a"]


def test_a_task_that_may_not_be_parked_borrows_nothing():
    state = board(QuotaRule(DC, "alice", share=0.5))
    assert not commands(decide(state, [of("bob", "b", 6, preemptible=False)], Moment(1, 1)), Reserve)
    assert commands(decide(state, [of("bob", "c", 4, preemptible=False)], Moment(2, 2)), Reserve)


def test_a_protected_kind_is_not_taken_back_and_does_not_borrow():
    state = board(QuotaRule(DC, "alice", share=0.5), QuotaRule(DC, "bob", ceiling=8, protect=("serve",)))
    assert not commands(decide(state, [of("bob", "b", 6, kind="serve")], Moment(1, 1)), Reserve)


def test_borrowing_ends_at_its_bound():
    state = board(QuotaRule(DC, "bob", share=0.25, borrow=2))
    assert not commands(decide(state, [of("bob", "b", 6)], Moment(1, 1)), Reserve)
    assert commands(decide(state, [of("bob", "c", 4)], Moment(2, 2)), Reserve)


def test_a_floor_is_lent_in_its_hours_and_called_back_within_the_notice_before_they_end():
    loan = Loan(600.0, 20 * 3600.0, 8 * 3600.0, 0.0)
    state = board(QuotaRule(DC, "alice", floor=6, loan=loan))
    day_s, night_s = 12 * 3600.0, 22 * 3600.0
    assert not commands(decide(state, [of("bob", "b", 4)], Moment(day_s, day_s)), Reserve)
    assert commands(decide(state, [], Moment(night_s, night_s)), Reserve)
    run_until_started(state, "b", night_s)
    early_s = 32 * 3600.0 - 700.0
    assert not commands(decide(state, [], Moment(early_s, early_s)), Stop)
    woken_s = decide(state, [], Moment(early_s + 1, early_s + 1)).wake_s
    assert woken_s is not None
    assert woken_s <= 32 * 3600.0 - 599.0
    late_s = 32 * 3600.0 - 600.0
    assert [command.park for command in commands(decide(state, [], Moment(late_s, late_s)), Stop)] == [True]
    decide(state, [parked(state, "b", late_s + 2)], Moment(late_s + 2, late_s + 2))
    assert state.tasks[TaskId("b")].phase is Phase.QUEUED, "it waits for the next night"


def test_a_slow_task_does_not_borrow_what_must_be_back_sooner():
    state = board(QuotaRule(DC, "alice", floor=6, loan=Loan(0.5)))
    assert not commands(decide(state, [of("bob", "b", 4)], Moment(1, 1)), Reserve), (
        "it takes a second to park"
    )


def test_rules_hold_above_too():
    state = State(BoardId("top"))
    offer = Offer(FAST, 8, (AskStep(8, 0),), 8, TARIFF, "dc1", "east")
    decide(state, [EngineOffered(EngineId("dc1"), (offer,), chooses=True)], Moment(0, 0))
    decide(state, [RulesSet((QuotaRule(BoardId("*"), "alice", ceiling=3),))], Moment(0.5, 0.5))
    decision = decide(state, [of("alice", name, 2) for name in ("a", "b")], Moment(1, 1))
    assert [command.task_id for command in commands(decision, Reserve)] == ["a"]


# ---- in storms, held against by code apart -----------------------------------------------------------------------------

STORM_RULES = (
    QuotaRule(BoardId("cn"), "alice", share=0.3),
    QuotaRule(BoardId("east"), "bob", floor=2),
    QuotaRule(BoardId("dc1"), "alice", floor=2),
    QuotaRule(BoardId("dc2"), "alice", share=0.5),
    QuotaRule(BoardId("dc3"), "bob", floor=2, loan=Loan(30.0)),
    QuotaRule(BoardId("*"), "carol", ceiling=3, borrow=2),
)


def run_quota_storm(seed: int, settings: Settings = Settings()) -> World:  # noqa: B008
    """Forty tasks of three tenants under rules, over bad links, with a crash and kills."""
    try:
        world, submitted = stormy_world(seed, settings=settings, tenants=("alice", "bob", "carol"))
        for controller in world.tree.controllers.values():
            controller.accept(RulesSet(STORM_RULES))
        watch = QuotaWatch(STORM_RULES)
        world.after_step.append(watch.check)
        world.run(until_s=50_000)
        check_end(world, submitted)
        for controller in world.tree.controllers.values():
            settings_ = controller.state.settings
            verify(controller.store, controller.board, settings_, top=controller.parent is None)
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_quota.py -k 'storm and {seed}'`")
        raise
    assert watch.checked > 0
    assert watch.preempted <= 3 * len(submitted), f"seed {seed}: {watch.preempted} stops for others"
    return world


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_quota_storm(seed):
    run_quota_storm(seed, LARGE if seed % 2 else Settings(lease_s=60.0))


@pytest.mark.endurance
def test_quota_storms_by_the_thousand():
    for seed in range(20_000, 25_000):
        run_quota_storm(seed, LARGE if seed % 2 else Settings())


def occupied(rule: QuotaRule, chooses: bool) -> State:
    """Bob runs on all of east and west, under one engine each or as two sites of one board below; 4 devices are alice's."""
    state = State(BoardId("cn"), Settings())
    sites = [Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, name, name) for name in ("east", "west")]
    boards = {"below": tuple(sites)} if chooses else {offer.site: (offer,) for offer in sites}
    there = [EngineOffered(EngineId(name), offers, chooses) for name, offers in boards.items()]
    decide(state, [*there, RulesSet((rule,))], Moment(0, 0))
    for name in ("east", "west"):
        decide(state, [of("bob", name, 4, bid=50 * TARIFF, regions=(name,))], Moment(1, 1))
        task = state.tasks[TaskId(name)]
        granted = LeaseGranted(task.task_id, task.lease_id, task.engine, task.generation, task.needs)
        decide(state, [granted], Moment(1, 1))
        task = state.tasks[TaskId(name)]
        started = TaskStarted(
            task.task_id,
            task.lease_id,
            task.engine,
            task.generation,
            1,
            task.point_id,
            task.needs,
            f"{name}/engine",
        )
        decide(state, [started], Moment(1, 1))
    return state


@pytest.mark.parametrize("chooses", [False, True])
def test_devices_are_taken_back_where_the_owners_task_may_run(chooses):
    """What a borrower gave back in another region lay idle: the owner's task might not go there, nobody else could have it."""
    loan = Loan(100.0, 0.0, 0.0)
    state = occupied(QuotaRule("*", "alice", ("sim/*",), floor=4, loan=loan), chooses)
    back = decide(state, [of("alice", "a", 4, regions=("west",))], Moment(100, 100))
    assert [command.task_id for command in commands(back, Stop)] == ["west"]
    nowhere = decide(
        occupied(QuotaRule("*", "alice", ("sim/*",), floor=4, loan=loan), chooses),
        [of("alice", "a", 4, regions=("north",))],
        Moment(100, 100),
    )
    assert commands(nowhere, Stop) == []


# ---- devices that are kept for an owner who leaves them idle, and dearer tasks of others ------------------------------

BOARDS = pytest.mark.parametrize("look_at_all_up_to", [64, 0])


def told(state: State, facts: list[object], now_s: float) -> list[tuple[str, str]]:
    """(task, verdict) of one tick."""
    decision = decide(state, facts, Moment(now_s, now_s))  # type: ignore[arg-type]
    return [(str(reason.task_id), reason.verdict) for reason in decision.reasons]


def resized(state: State, task_id: str) -> TaskStarted:
    task = state.tasks[TaskId(task_id)]
    target = task.target()
    assert target is not None
    return TaskStarted(
        task.task_id, task.lease_id, ENGINE, task.generation, task.attempt, target.point_id, target.needs, "engine"
    )  # fmt: skip


@BOARDS
def test_a_dearer_task_has_devices_from_a_cheaper_one_while_others_are_kept_for_their_owner(
    look_at_all_up_to,
):
    state = board(QuotaRule(DC, "alice", floor=4))
    state.settings = Settings(look_at_all_up_to=look_at_all_up_to)
    told(state, [of("bob", "cheap", 4)], 1)
    run_until_started(state, "cheap", 1.0)
    assert told(state, [of("carol", "dear", 4, bid=50 * TARIFF)], 2) == [("cheap", "preempted")]
    assert "another task is giving up" in why_waiting_text(state, state.tasks[TaskId("dear")], 2.0)
    assert told(state, [parked(state, "cheap", 3.0)], 3) == [("dear", "placed")]
    run_until_started(state, "dear", 3.0)
    assert [told(state, [], float(now_s)) for now_s in range(4, 70)] == [[]] * 66, "and so it stays"
    assert told(state, [of("alice", "own", 4)], 70) == [("own", "placed")]


@BOARDS
def test_a_task_that_borrows_nothing_may_have_what_borrowers_leave(look_at_all_up_to):
    """Bob holds four devices that nobody owns and four of alice's; dave's task may not be parked: it has the former."""
    state = board(QuotaRule(DC, "alice", share=0.5))
    state.settings = Settings(look_at_all_up_to=look_at_all_up_to)
    told(state, [TaskSubmitted(replace(order("cheap", counts=(2, 4, 8)), tenant="bob"), 0)], 1)
    run_until_started(state, "cheap", 1.0)
    assert state.tasks[TaskId("cheap")].devices == 8
    facts = [of("dave", "dear", 4, bid=50 * TARIFF, preemptible=False)]
    assert told(state, facts, 2) == [("cheap", "shrunk")]
    assert told(state, [resized(state, "cheap")], 3) == [("dear", "placed")]
    run_until_started(state, "dear", 3.0)
    assert [told(state, [], float(now_s)) for now_s in range(4, 70)] == [[]] * 66
    assert told(state, [of("dave", "more", 2, bid=50 * TARIFF, preemptible=False)], 70) == []
    told(state, [of("alice", "own", 4)], 71)
    assert state.tasks[TaskId("cheap")].phase is Phase.STOPPING
    assert ("own", "placed") in told(state, [parked(state, "cheap", 72.0)], 72)


def test_what_borrowers_hold_that_park_too_slowly_is_not_lent():
    """Bob's task takes a second to park, alice has her floor back within half a second: dave's may not take what is free."""
    state = board(QuotaRule(DC, "alice", floor=4, loan=Loan(0.5)))
    told(state, [of("bob", "slow", 4)], 1)
    run_until_started(state, "slow", 1.0)
    assert told(state, [of("dave", "dear", 4, preemptible=False)], 2) == []
    quick = board(QuotaRule(DC, "alice", floor=4, loan=Loan(5.0)))
    told(quick, [of("bob", "quick", 4)], 1)
    run_until_started(quick, "quick", 1.0)
    assert told(quick, [of("dave", "dear", 4, preemptible=False)], 2) == [("dear", "placed")]


@BOARDS
def test_an_owner_has_its_free_devices_at_once_whoever_else_waits_for_others(look_at_all_up_to):
    state = board(QuotaRule(DC, "alice", floor=4))
    state.settings = Settings(look_at_all_up_to=look_at_all_up_to)
    told(state, [of("bob", "cheap", 4)], 1)
    run_until_started(state, "cheap", 1.0)
    facts = [of("carol", "dear", 4, bid=50 * TARIFF), of("alice", "own", 4)]
    assert ("own", "placed") in told(state, facts, 2)
    run_until_started(state, "own", 2.0)
    told(state, [], 65.0)  # a large board looks at everything once in a lease's time
    assert state.tasks[TaskId("cheap")].phase is Phase.STOPPING
    assert told(state, [parked(state, "cheap", 66.0)], 66) == [("dear", "placed")]


def test_a_wide_task_has_a_reservation_beside_what_is_kept():
    state = board(QuotaRule(DC, "alice", floor=2))
    told(state, [of("bob", "rigid", 4, preemptible=False, work_s=100.0)], 1)
    run_until_started(state, "rigid", 1.0)
    assert told(state, [of("carol", "wide", 6, preemptible=False)], 2) == [("wide", "reserved")]
    long = of("bob", "long", 2, preemptible=False, work_s=1000.0)
    assert told(state, [long], 3) == [], "it would end after the wide one can begin"
    short = of("bob", "short", 2, preemptible=False, work_s=10.0)
    assert told(state, [short], 4) == [("short", "placed")]


def test_above_a_dearer_task_goes_where_a_cheaper_one_gives_way_not_to_what_is_kept():
    """Bob fills dc1 for little; dc2 is free, and kept for alice by a rule of the board above."""
    state = State(BoardId("top"))
    asks = {"dc1": (AskStep(4, 2 * TARIFF),), "dc2": (AskStep(4, 0),)}
    free = {name: Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, name, "east") for name in asks}
    offered = [EngineOffered(EngineId(name), (offer,), chooses=True) for name, offer in free.items()]
    decide(state, [*offered, RulesSet((QuotaRule(BoardId("top"), "alice", floor=4),))], Moment(0, 0))
    decide(state, [of("bob", "cheap", 4)], Moment(1, 1))
    task = state.tasks[TaskId("cheap")]
    assert task.engine == "dc1"
    granted = LeaseGranted(task.task_id, task.lease_id, task.engine, task.generation, task.needs)
    decide(state, [granted], Moment(2, 2))
    task = state.tasks[TaskId("cheap")]
    started = TaskStarted(
        task.task_id, task.lease_id, task.engine, task.generation, 1, task.point_id, task.needs, "dc1/engine"
    )  # fmt: skip
    decide(state, [started], Moment(2, 2))
    full = replace(free["dc1"], asks=asks["dc1"])
    decide(state, [EngineOffered(EngineId("dc1"), (full,), chooses=True)], Moment(3, 3))
    assert not commands(decide(state, [of("bob", "poor", 4)], Moment(4, 4)), Reserve)
    dear = decide(state, [of("carol", "dear", 4, bid=50 * TARIFF)], Moment(5, 5))
    assert [sent.engine for sent in dear.commands if isinstance(sent.command, Reserve)] == ["dc1"]
    own = decide(state, [of("alice", "own", 4)], Moment(6, 6))
    assert [sent.engine for sent in own.commands if isinstance(sent.command, Reserve)] == ["dc2"]


@BOARDS
def test_what_is_taken_back_of_one_chip_class_goes_to_the_owner_though_others_are_free(look_at_all_up_to):
    """A share of all chips: the dearer borrower took the class that the owner waits for again and again, since as many of the other were free."""
    state = State(BoardId("dc"), Settings(look_at_all_up_to=look_at_all_up_to))
    offers = tuple(Offer(chip, 4, (), 4, TARIFF, "dc", "east") for chip in (FAST, SLOW))
    decide(state, [EngineOffered(ENGINE, offers, chooses=False)], Moment(0, 0))
    decide(state, [RulesSet((QuotaRule(DC, "alice", share=0.5),))], Moment(0.5, 0.5))
    told(state, [of("bob", "b", 4, bid=50 * TARIFF, chips=(SLOW,))], 1)
    run_until_started(state, "b", 1.0)
    assert told(state, [of("alice", "a", 2, chips=(SLOW,))], 2) == [("b", "reclaimed")]
    after = told(state, [parked(state, "b", 3.0)], 3)
    assert after[0] == ("a", "placed")
    assert ("b", "placed") not in after
    run_until_started(state, "a", 3.0)
    assert [told(state, [], float(now_s)) for now_s in range(4, 70)] == [[]] * 66


def test_above_nobody_else_goes_where_devices_come_free_for_an_owner():
    """The board below grew a borrower that came at once into all that the owner waited for."""
    state = State(BoardId("top"))
    rule = QuotaRule(BoardId("top"), "alice", share=0.5)
    full = Offer(SLOW, 4, (AskStep(4, 2 * TARIFF),), 4, TARIFF, "dc2", "west")
    free = replace(full, asks=(AskStep(4, 0),))
    other = Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, "dc1", "east")
    offered = [EngineOffered(EngineId(one.site), (one,), chooses=True) for one in (free, other)]
    decide(state, [*offered, RulesSet((rule,))], Moment(0, 0))
    borrower = order("b", counts=(1, 2, 4), chips=(SLOW,), bid=50 * TARIFF)
    decide(state, [TaskSubmitted(replace(borrower, tenant="bob"), 0)], Moment(1, 1))
    task = state.tasks[TaskId("b")]
    granted = LeaseGranted(task.task_id, task.lease_id, task.engine, task.generation, task.needs)
    decide(state, [granted], Moment(2, 2))
    task = state.tasks[TaskId("b")]
    at = (task.lease_id, task.engine, task.generation, 1, task.point_id, task.needs, "dc2/engine")
    decide(state, [TaskStarted(task.task_id, *at)], Moment(2, 2))
    decide(state, [EngineOffered(EngineId("dc2"), (full,), chooses=True)], Moment(3, 3))
    assert told(state, [of("alice", "a", 2, chips=(SLOW,))], 4) == [("b", "reclaimed")]
    exited = replace(parked(state, "b", 5.0), engine=EngineId("dc2"))
    back = decide(state, [exited, EngineOffered(EngineId("dc2"), (free,), chooses=True)], Moment(5, 5))
    assert [command.task_id for command in commands(back, Reserve)] == ["a"]


def test_what_is_its_tenants_own_above_is_not_taken_below_for_a_dearer_bid():
    """The board below parked it for a borrower that bid more, the one above had the borrower parked for it, and so on."""
    above = State(BoardId("top"))
    offer = Offer(FAST, 8, (AskStep(8, 0),), 8, TARIFF, "dc1", "east")
    decide(above, [EngineOffered(EngineId("dc1"), (offer,), chooses=True)], Moment(0, 0))
    decide(above, [RulesSet((QuotaRule(BoardId("top"), "alice", floor=3, loan=Loan(600.0)),))], Moment(0, 0))
    sent = commands(decide(above, [of("alice", "a", 2)], Moment(1, 1)), Reserve)
    sent += commands(decide(above, [of("alice", "b", 2), of("bob", "c", 2)], Moment(2, 2)), Reserve)
    assert {str(one.task_id): one.order.own for one in sent} == {"a": 2, "b": 1, "c": 0}

    below = leaf_state(4)
    decide(below, [TaskSubmitted(replace(of("alice", "a", 2).order, own=2), 0)], Moment(1, 1))
    run_until_started(below, "a", 1.0)
    decide(below, [of("bob", "c", 2)], Moment(1, 1))
    run_until_started(below, "c", 1.0)
    assert [step.devices for asked in asks_of(below, Moment(2, 2)) for step in asked.asks] == [2]
    assert not commands(decide(below, [of("bob", "dear", 4, bid=50 * TARIFF)], Moment(2, 2)), Stop)
    parks = commands(decide(below, [of("bob", "less", 2, bid=50 * TARIFF)], Moment(3, 3)), Stop)
    assert [command.task_id for command in parks] == ["c"]


def test_what_is_its_tenants_own_above_may_be_taken_by_its_own_dearer_task():
    below = leaf_state(2)
    decide(below, [TaskSubmitted(replace(of("alice", "a", 2).order, own=2), 0)], Moment(1, 1))
    run_until_started(below, "a", 1.0)
    dear = commands(decide(below, [of("alice", "dear", 2, bid=50 * TARIFF)], Moment(2, 2)), Stop)
    assert [command.task_id for command in dear] == ["a"]


def test_two_owners_who_wait_each_have_their_borrower_parked():
    """The devices that came free for the one were counted for the other too, and kept from both."""
    loan = Loan(60.0)
    state = board(QuotaRule(DC, "alice", floor=4, loan=loan), QuotaRule(DC, "carol", floor=4, loan=loan))
    told(state, [of("bob", "b1", 4, bid=50 * TARIFF), of("bob", "b2", 4, bid=51 * TARIFF)], 1)
    for name in ("b1", "b2"):
        run_until_started(state, name, 1.0)
    assert [verdict for _, verdict in told(state, [of("alice", "a", 4), of("carol", "c", 4)], 2)] == [
        "reclaimed"
    ] * 2
    back = told(state, [parked(state, "b1", 3.0), parked(state, "b2", 3.0)], 3)
    assert {("a", "placed"), ("c", "placed")} <= set(back)


@pytest.mark.parametrize("loan", [None, Loan(60.0)])
def test_a_floor_of_one_class_is_not_weighed_with_another_class(loan):
    """Carol's rule is about both classes and keeps nothing: what is free, or borrowed, of the other is no floor of alice's."""
    state = State(BoardId("dc"))
    offers = tuple(Offer(chip, 4, (), 4, TARIFF, "dc", "east") for chip in (FAST, SLOW))
    decide(state, [EngineOffered(ENGINE, offers, chooses=False)], Moment(0, 0))
    rules = (QuotaRule(DC, "alice", chips=(FAST,), floor=4, loan=loan), QuotaRule(DC, "carol", ceiling=4))
    decide(state, [RulesSet(rules)], Moment(0.5, 0.5))
    if loan is not None:
        told(state, [of("bob", "b", 4, chips=(SLOW,))], 1)
        run_until_started(state, "b", 1.0)
    assert told(state, [of("dave", "d", 4, preemptible=False)], 2) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("boards", [10, 70])
def test_what_a_lent_lease_keeps_free_above_sends_a_dearer_task_where_another_gives_way(boards):
    """Of more boards than a group's best seats are kept of, the same ones were valued without end."""
    state = State(BoardId("top"))
    free = [Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, f"dc{i}", "east") for i in range(boards)]
    decide(state, [EngineOffered(EngineId(one.site), (one,), chooses=True) for one in free], Moment(0, 0))
    decide(state, [of("bob", f"b{i:02}", 4) for i in range(boards)], Moment(1, 1))
    for i in range(boards):
        task = state.tasks[TaskId(f"b{i:02}")]
        granted = LeaseGranted(task.task_id, task.lease_id, task.engine, task.generation, task.needs)
        decide(state, [granted], Moment(2, 2))
        task = state.tasks[task.task_id]
        at = (
            task.lease_id,
            task.engine,
            task.generation,
            1,
            task.point_id,
            task.needs,
            f"{task.engine}/engine",
        )
        decide(state, [TaskStarted(task.task_id, *at)], Moment(2, 2))
    offers = [replace(one, asks=(AskStep(4, 10 * TARIFF),)) for one in free]
    offers.append(Offer(FAST, 4, (AskStep(4, 5 * TARIFF),), 4, TARIFF, "idle", "east"))
    decide(state, [EngineOffered(EngineId(one.site), (one,), chooses=True) for one in offers], Moment(3, 3))
    hours = Hours(1, 86_400.0, 0.0, ((0.0, 86_000.0),), 60.0, 60.0)
    service = replace(order("service", counts=(4,), bid=TARIFF // 1000), tenant="eve", hours=hours)
    state.tasks[TaskId("service")] = TaskState(
        service, Phase.QUEUED, 0.0, lent=(Need(FAST, 4),), turns_s=80_000.0
    )
    decision = decide(state, [of("carol", "dear", 4, bid=90 * TARIFF)], Moment(4, 4))
    [sent] = [
        one for one in decision.commands if isinstance(one.command, Reserve) and one.command.task_id == "dear"
    ]
    assert sent.engine != "idle"
