import ast
from dataclasses import replace
from pathlib import Path

import pytest

import qipan.scheduler
from qipan.curves import Need
from qipan.events import (
    BudgetReached,
    CancelRequested,
    CommandReceived,
    DevicesBusy,
    EngineAttached,
    EngineOffered,
    HeldTask,
    LeaseGranted,
    LeaseRefused,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskProgress,
    TasksHeld,
    TaskStarted,
    TaskSubmitted,
)
from qipan.hardware import BoardId
from qipan.leases import AskStep, EngineId, LeaseId, Offer, TaskId, Usage
from qipan.scheduler import Moment, Phase, Settings, State, decide
from qipan.scheduler.asks import price_of
from qipan.scheduler.why import why_waiting
from worlds import FAST, SLOW, TARIFF, order

ENGINE = EngineId("engine")


def leaf_state(devices: int = 4, **settings: object) -> State:
    """A board with one directly called engine of `devices` fast chips."""
    state = State(BoardId("dc"), Settings(**settings))  # type: ignore[arg-type]
    offer = Offer(FAST, devices, (), devices, TARIFF, "dc", "east")
    decide(state, [EngineOffered(ENGINE, (offer,), chooses=False)], Moment(0, 0))
    return state


def run_until_started(state: State, task_id: str, now_s: float = 1.0) -> None:
    """Answer the board's Reserve and Start as the engine would."""
    task = state.tasks[TaskId(task_id)]
    decide(
        state,
        [LeaseGranted(task.task_id, task.lease_id, ENGINE, task.generation, task.needs)],
        Moment(now_s, now_s),
    )
    task = state.tasks[TaskId(task_id)]
    assert task.phase is Phase.STARTING
    started = TaskStarted(
        task.task_id,
        task.lease_id,
        ENGINE,
        task.generation,
        task.attempt,
        task.point_id,
        task.needs,
        "engine",
    )
    decide(state, [started], Moment(now_s, now_s))


def commands(decision, kind):
    return [sent.command for sent in decision.commands if isinstance(sent.command, kind)]


def test_a_parent_that_was_refused_while_a_board_was_not_counted_may_ask_again_once_it_is():
    """A task that came just after a data centre had joined its region waited for five seconds."""
    region, dc = State(BoardId("east"), Settings(), top=False), EngineId("dc")
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    decide(region, [EngineAttached(dc), EngineOffered(dc, (offer,), chooses=True)], Moment(0, 7.0))
    asked = Reserve(TaskId("a"), LeaseId("l"), 1, 1, order("a"), (), 60.0)
    refused = decide(region, [CommandReceived(asked)], Moment(1, 8.0)).reports
    assert [type(report) for report in refused] == [LeaseRefused]
    counted = decide(region, [TasksHeld(dc, 0, 7.0, ())], Moment(2, 9.0)).reports
    assert [type(report) for report in counted] == [EngineOffered]
    nation, east = State(BoardId("cn"), Settings()), EngineId("east")
    decide(nation, [replace(counted[0], engine=east), TaskSubmitted(order("a"), 0)], Moment(1, 1))
    task = nation.tasks[TaskId("a")]
    no = LeaseRefused(task.task_id, task.lease_id, east, task.generation, "dc does not answer")
    assert not commands(decide(nation, [no], Moment(2, 2)), Reserve)
    assert commands(decide(nation, [counted[0]], Moment(2.1, 2.1)), Reserve)


def test_a_lease_for_a_task_that_was_just_found_under_an_earlier_one_is_answered():
    """A data centre with a full disk was given up; back again it still took the lease that its region had refused upward, while the
    nation asked anew: without an answer it waited forever."""
    region, dc, need = State(BoardId("east"), Settings(), top=False), EngineId("dc"), (Need(FAST, 1),)
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    decide(region, [EngineAttached(dc), EngineOffered(dc, (offer,), chooses=True)], Moment(0, 7.0))
    below = replace(order("a"), above="cn-1")
    held = HeldTask(below, LeaseId("east-1"), 3, 0, False, "", need, "", 0.0, 0.0, 20.0)
    anew = Reserve(TaskId("a"), LeaseId("cn-2"), 1, 3, order("a"), (), 60.0)
    reports = decide(region, [TasksHeld(dc, 0, 7.0, (held,)), CommandReceived(anew)], Moment(1, 8.0)).reports
    told = [(type(one), one.lease_id) for one in reports if isinstance(one, LeaseGranted | LeaseRefused)]
    assert told == [(LeaseGranted, "cn-1"), (LeaseRefused, "cn-2")]
    again = decide(region, [CommandReceived(replace(anew, lease_id=LeaseId("cn-1")))], Moment(2, 9.0)).reports
    assert not [one for one in again if isinstance(one, LeaseRefused)], "what was said twice is answered once"


@pytest.mark.parametrize("granted", [True, False])
def test_a_grant_that_was_lost_with_a_machine_is_found_in_its_census_and_one_to_come_is_waited_for(granted):
    """A data centre that began from nothing answers what its parent takes for numbers of its earlier life: its grant was dropped, and the
    region waited for it for ever."""
    region, dc, need = State(BoardId("east"), Settings(), top=False), EngineId("dc"), (Need(FAST, 1),)
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    asked = Reserve(TaskId("a"), LeaseId("cn-1"), 1, 1, order("a"), (), 60.0)
    decide(region, [EngineOffered(dc, (offer,), chooses=True), CommandReceived(asked)], Moment(0, 0))
    task = region.tasks[TaskId("a")]
    assert task.phase is Phase.RESERVING
    decide(region, [EngineAttached(dc)], Moment(1, 1))
    below = replace(order("a"), above="cn-1")
    held = HeldTask(below, task.lease_id, 2, 0, False, "", need, "", 0.0, 0.0, 20.0, granted)
    told = decide(region, [TasksHeld(dc, 0, 1.0, (held,))], Moment(2, 2)).reports
    assert region.tasks[TaskId("a")].phase is (Phase.RESERVED if granted else Phase.RESERVING)
    if not granted:
        told = decide(region, [LeaseGranted(TaskId("a"), task.lease_id, dc, 2, need)], Moment(3, 3)).reports
    assert [one.lease_id for one in told if isinstance(one, LeaseGranted)] == ["cn-1"]
    task = region.tasks[TaskId("a")]
    assert (task.phase, task.parent.answered) == (Phase.RESERVED, True)


def started_below(*, told: bool) -> tuple[State, HeldTask]:
    """A region whose data centre was told to start task a, and what that would say it holds; `told`: it said that it runs."""
    region, dc = State(BoardId("east"), Settings(), top=False), EngineId("dc")
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    asked = Reserve(TaskId("a"), LeaseId("cn-1"), 1, 1, order("a"), (), 600.0)
    start = CommandReceived(Start(TaskId("a"), LeaseId("cn-1"), 1, 2, 1, order("a").curve.points))
    decide(region, [EngineOffered(dc, (offer,), chooses=True), CommandReceived(asked)], Moment(0, 0))
    task = region.tasks[TaskId("a")]
    granted = LeaseGranted(TaskId("a"), task.lease_id, dc, task.generation, task.needs)
    decide(region, [granted, start], Moment(1, 1))
    task = region.tasks[TaskId("a")]
    assert task.phase is Phase.STARTING
    started = TaskStarted(
        task.task_id, task.lease_id, dc, task.generation, 1, task.point_id, task.needs, "dc/engine"
    )
    if told:
        decide(region, [started], Moment(2, 2))
    below = replace(order("a"), above="cn-1")
    held = HeldTask(
        below,
        task.lease_id,
        task.generation,
        1,
        True,
        task.point_id,
        task.needs,
        started.place,
        0.0,
        0.0,
        20.0,
    )
    return region, held


def test_a_start_that_was_lost_with_a_machine_is_told_further_up_once_a_census_finds_it():
    """The nation took the task for starting until it ended: nothing that runs there could be taken back for an owner."""
    region, held = started_below(told=False)
    decide(region, [EngineAttached(EngineId("dc"))], Moment(3, 3))
    reports = decide(region, [TasksHeld(EngineId("dc"), 0, 3.0, (held,))], Moment(4, 4)).reports
    told = [one for one in reports if isinstance(one, TaskStarted)]
    assert [(one.lease_id, one.point_id, one.place) for one in told] == [
        ("cn-1", held.point_id, "east/dc/engine")
    ]


@pytest.mark.parametrize("how", ["done", "failed", "cancelled"])
def test_an_end_that_was_lost_with_a_machine_is_told_further_up_once_a_census_finds_it(how):
    """The region heard in a census that the task was over, and said nothing: the nation waited for it for ever."""
    region, _ = started_below(told=True)
    nation, east = State(BoardId("cn"), Settings()), EngineId("east")
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    decide(nation, [EngineOffered(east, (offer,), chooses=True), TaskSubmitted(order("a"), 0)], Moment(0, 0))
    above = nation.tasks[TaskId("a")]
    decide(
        nation, [LeaseGranted(TaskId("a"), above.lease_id, east, above.generation, above.needs)], Moment(1, 1)
    )
    decide(region, [EngineAttached(EngineId("dc"))], Moment(3, 3))
    over = TasksHeld(EngineId("dc"), 0, 3.0, (), ((TaskId("a"), how),))
    reports = decide(region, [over], Moment(4, 4)).reports
    [told] = [one for one in reports if isinstance(one, LeaseRefused)]
    ended = decide(nation, [replace(told, lease_id=above.lease_id)], Moment(5, 5)).ended
    assert (region.over, nation.over, ended) == ({"a": how}, {"a": how}, (("a", how),))


def test_a_start_for_a_task_that_has_ended_here_is_answered_with_how_it_ended():
    region, held = started_below(told=True)
    decide(region, [EngineAttached(EngineId("dc"))], Moment(3, 3))
    decide(region, [TasksHeld(EngineId("dc"), 0, 3.0, (), ((TaskId("a"), "done"),))], Moment(4, 4))
    again = CommandReceived(Start(TaskId("a"), LeaseId("cn-1"), 1, 4, 2, held.order.curve.points))
    [told] = [one for one in decide(region, [again], Moment(5, 5)).reports if isinstance(one, LeaseRefused)]
    assert (told.why, told.over) == ("no such lease here", "done")


@pytest.mark.parametrize(
    ("fact", "then"),
    [(CancelRequested(TaskId("a"), "me"), "cancelled"), (BudgetReached(TaskId("a"), 1, 1), Phase.PARKED)],
)
def test_what_was_told_to_stop_at_a_board_that_fell_silent_is_not_placed_anew(fact, then):
    """`on_partition: restart` brought a cancelled task back, and one whose budget was spent."""
    state, dc = State(BoardId("cn"), Settings()), EngineId("dc")
    offer = Offer(FAST, 4, (AskStep(4, TARIFF),), 4, TARIFF, "dc", "east")
    offered = EngineOffered(dc, (offer,), chooses=True)
    decide(state, [offered, TaskSubmitted(order("a", on_partition="restart"), 0)], Moment(0, 0))
    task = state.tasks[TaskId("a")]
    decide(state, [LeaseGranted(TaskId("a"), task.lease_id, dc, task.generation, task.needs)], Moment(1, 1))
    elsewhere = replace(offered, engine=EngineId("dc2"), offers=(replace(offer, site="dc2"),))
    decide(state, [fact, elsewhere], Moment(2, 2))
    silent = decide(state, [], Moment(100, 100))
    assert (silent.commands, silent.reasons[0].verdict) == ((), "moved")
    assert state.over.get(TaskId("a")) == then or state.tasks[TaskId("a")].phase is then


@pytest.mark.parametrize("policy", ["revenue", "fair"])
def test_while_one_parks_for_a_dearer_task_no_other_is_parked_for_it_as_well(policy):
    """Any fact that came meanwhile, a step of another task, made the next one give way, until nothing ran beside the dear one."""
    state = leaf_state(12, policy=policy)
    for number, name in enumerate("abc"):
        decide(
            state, [TaskSubmitted(order(name, counts=(4,), work_s=1e6, submitted_s=3000.0), 0)], Moment(1, 1)
        )
        run_until_started(state, name, 1.0 + number)
    dear = order("dear", counts=(4,), bid=100 * TARIFF, work_s=1e4)
    first = decide(state, [TaskSubmitted(dear, 0)], Moment(5000, 5000))
    assert len(commands(first, Stop)) == 1
    asked = [DevicesBusy(TaskId(name), ENGINE, 1, 0.9, 5000.0, 5001.0) for name in "abc"]
    assert commands(decide(state, asked, Moment(5001, 5001)), Stop) == []


def test_under_jct_no_other_task_is_parked_either_while_one_parks_for_longer_than_a_minute():
    state = leaf_state(12, policy="jct")
    for number, name in enumerate("abc"):
        at_s = 3000.0 + number
        long = order(name, counts=(4,), work_s=1e6, submitted_s=at_s)
        decide(state, [TaskSubmitted(long, 0)], Moment(at_s, at_s))
        run_until_started(state, name, at_s)
    decide(state, [TaskSubmitted(order("short", counts=(4,), submitted_s=5000.0), 0)], Moment(5000, 5000))
    stops = []
    for at_s in range(5060, 5480, 60):
        busy = [DevicesBusy(TaskId(name), ENGINE, 1, 0.9, 5000.0, float(at_s)) for name in "abc"]
        stops += commands(decide(state, busy, Moment(at_s, at_s)), Stop)
    assert len(stops) == 1


def lost_after(state: State, number: int, saved_s: float, *, told: bool) -> str:
    """Attempt `number` of task a is lost, with this much saved; `told` before, while it ran.  What is decided of it."""
    run_until_started(state, "a", float(number))
    task = state.tasks[TaskId("a")]
    usage = Usage(task.task_id, number, "dc", ENGINE, FAST, 1, task.point_id, 0.0, 1.0, 1.0, True)
    if told:
        decide(
            state,
            [TaskProgress(task.task_id, ENGINE, number, saved_s, saved_s, "", usage)],
            Moment(number, number),
        )
    gone = TaskExited(
        task.task_id, task.lease_id, ENGINE, task.generation, number, "lost", 137, saved_s, saved_s, "killed", usage
    )  # fmt: skip
    return decide(state, [gone], Moment(number + 0.5, number + 0.5)).reasons[0].verdict


@pytest.mark.parametrize("told", [True, False])
def test_only_losses_without_a_new_checkpoint_make_a_task_fail(told):
    """Whether its checkpoints were told while it ran or with its end."""
    state = leaf_state()
    decide(state, [TaskSubmitted(order("a", work_s=1000.0), 0)], Moment(0, 0))
    verdicts = [lost_after(state, number, 10.0 * number, told=told) for number in range(1, 9)]
    assert verdicts == ["lost"] * 8, "each had saved more than the one before"
    verdicts = [lost_after(state, number, 80.0, told=told) for number in range(9, 13)]
    assert verdicts == ["lost"] * 3 + ["failed"], "the eighth and these four saved nothing more"


def test_a_submitted_task_is_reserved_at_its_best_free_point():
    state = leaf_state()
    decision = decide(state, [TaskSubmitted(order("a", bid=8 * TARIFF), 0)], Moment(1, 1))
    [reserve] = commands(decision, Reserve)
    assert reserve.needs[0].devices == 4
    assert decision.reasons[0].verdict == "placed"


def test_a_granted_lease_is_started_at_exactly_one_point():
    state = leaf_state()
    [reserve] = commands(decide(state, [TaskSubmitted(order("a"), 0)], Moment(1, 1)), Reserve)
    granted = LeaseGranted(TaskId("a"), reserve.lease_id, ENGINE, reserve.generation, reserve.needs)
    [start] = commands(decide(state, [granted], Moment(2, 2)), Start)
    assert len(start.points) == 1
    assert start.generation > reserve.generation


def test_an_elastic_task_shrinks_for_a_dearer_one_that_then_waits_for_its_devices():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("cheap", work_s=500.0), 0)], Moment(1, 1))
    run_until_started(state, "cheap")
    dear = order("dear", bid=40 * TARIFF, counts=(2,), elastic=False)
    decision = decide(state, [TaskSubmitted(dear, 0)], Moment(10, 10))
    [resize] = commands(decision, Resize)
    assert resize.points[0].devices == 2
    assert not commands(decision, Reserve), "the devices are not confirmed free yet"


def test_a_task_that_is_resized_is_seen_to_go_on_until_it_is():
    """Its processes train on while newcomers come."""
    state = leaf_state()
    decide(state, [TaskSubmitted(order("cheap", work_s=500.0), 0)], Moment(1, 1))
    run_until_started(state, "cheap")
    dear = order("dear", bid=40 * TARIFF, counts=(2,), elastic=False)
    decide(state, [TaskSubmitted(dear, 0)], Moment(10, 10))
    task = state.tasks[TaskId("cheap")]
    runs = task.attempt - 1  # the order to resize counts the next one
    usage = Usage(TaskId("cheap"), runs, "dc", ENGINE, "sim/a", 4, task.point_id, 1.0, 12.0, 44.0, False)
    decide(state, [TaskProgress(TaskId("cheap"), ENGINE, runs, 50.0, 20.0, "", usage)], Moment(12, 12))
    after = state.tasks[TaskId("cheap")]
    assert (after.done_s, after.saved_s, after.attempt) == (50.0, 20.0, task.attempt)


def test_a_task_that_is_not_elastic_is_never_taken_from():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("fixed", counts=(4,), elastic=False), 0)], Moment(1, 1))
    run_until_started(state, "fixed")
    decision = decide(state, [TaskSubmitted(order("dear", bid=100 * TARIFF), 0)], Moment(10, 10))
    assert not commands(decision, Resize)
    assert not commands(decision, Stop)


def test_a_task_grows_when_the_devices_are_confirmed_free_and_not_before():
    """Told at once it was refused by the engine, and told again at every fact, while others took what was freed for it."""
    state = leaf_state()
    decide(state, [TaskSubmitted(order("b", counts=(2,), work_s=5000.0), 0)], Moment(1, 1))
    decide(state, [TaskSubmitted(order("a", counts=(2, 4), work_s=5000.0), 0)], Moment(1, 1))
    run_until_started(state, "a")
    run_until_started(state, "b")
    a, b = state.tasks[TaskId("a")], state.tasks[TaskId("b")]
    assert (a.needs[0].devices, b.needs[0].devices) == (2, 2)
    state.tasks[TaskId("a")] = replace(a, order=replace(a.order, bid_micro_cny_per_device_hour=90 * TARIFF))
    decision = decide(state, [TaskSubmitted(order("poor", bid=1), 0)], Moment(400, 400))
    [stop] = commands(decision, Stop)
    assert stop.task_id == "b"
    assert not commands(decision, Resize), "its devices are not confirmed free yet"
    usage = Usage(TaskId("b"), b.attempt, "dc", ENGINE, FAST, 2, b.point_id, 1.0, 410.0, 818.0, True)
    gone = TaskExited(
        b.task_id, stop.lease_id, ENGINE, stop.generation, b.attempt, "parked", 0, 400.0, 400.0, "", usage
    )
    [resize] = commands(decide(state, [gone], Moment(410, 410)), Resize)
    assert (resize.task_id, resize.points[0].devices) == ("a", 4)


def test_a_nearly_finished_task_is_not_resized_for_a_small_gain():
    state = leaf_state(devices=6)
    decide(
        state,
        [
            TaskSubmitted(order("a", counts=(2, 4), work_s=100), 0),
            TaskSubmitted(order("b", counts=(4,), elastic=False, bid=3 * TARIFF), 0),
        ],
        Moment(1, 1),
    )
    run_until_started(state, "a")
    task = state.tasks[TaskId("a")]
    assert task.needs[0].devices == 2
    state.tasks[TaskId("a")] = replace(task, done_s=99.0)
    decision = decide(state, [CancelRequested(TaskId("b"), "test")], Moment(50, 50))
    assert not commands(decision, Resize), "one second of work is left, a change costs three"


def test_a_task_that_is_lost_again_and_again_is_failed_not_started_forever():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("a"), 0)], Moment(1, 1))
    for attempt in range(1, 6):
        assert TaskId("a") in state.tasks
        run_until_started(state, "a")
        task = state.tasks[TaskId("a")]
        usage = Usage(TaskId("a"), attempt, "dc", ENGINE, FAST, 4, "p", 0.0, 1.0, 4.0, True)
        lost = TaskExited(
            TaskId("a"),
            task.lease_id,
            ENGINE,
            task.generation,
            attempt,
            "lost",
            137,
            0.0,
            0.0,
            "killed",
            usage,
        )
        decide(state, [lost], Moment(attempt * 10, attempt * 10))
    assert state.over == {TaskId("a"): "failed"}


def test_equal_bids_are_served_in_order_of_submission_then_id():
    state = leaf_state(devices=1)
    facts = [TaskSubmitted(order(name, counts=(1,), elastic=False), 0) for name in ("b", "a")]
    decision = decide(state, facts, Moment(1, 1))
    assert [command.task_id for command in commands(decision, Reserve)] == ["a"]


def test_a_board_is_asked_at_the_child_with_the_best_net_worth():
    state = State(BoardId("top"), Settings())
    cheap = Offer(FAST, 4, (AskStep(4, 0),), 4, TARIFF, "dc1", "east")
    dear = Offer(FAST, 4, (AskStep(4, 10 * TARIFF),), 4, TARIFF, "dc2", "west")
    offers = [
        EngineOffered(EngineId("west"), (dear,), chooses=True),
        EngineOffered(EngineId("east"), (cheap,), chooses=True),
    ]
    decision = decide(state, [*offers, TaskSubmitted(order("a", bid=8 * TARIFF), 0)], Moment(1, 1))
    assert [sent.engine for sent in decision.commands] == ["east"]


def test_a_task_is_kept_out_of_regions_and_vendors_that_its_owner_excludes():
    for limits in ({"regions": ("cn-*",)}, {"vendors": ("huawei",)}):
        state = leaf_state()
        decision = decide(state, [TaskSubmitted(order("a", **limits), 0)], Moment(1, 1))
        assert not commands(decision, Reserve), limits


def test_why_names_the_single_change_that_starts_a_waiting_task():
    state = leaf_state()
    decide(state, [TaskSubmitted(order("a", regions=("west",)), 0)], Moment(1, 1))
    told = why_waiting(state, TaskId("a"), 2.0, 2.0)
    assert [entry["constraint"] for entry in told] == ["now", "regions"]


def test_asks_skip_what_was_already_ordered():
    offer = Offer(FAST, 4, (AskStep(2, 0), AskStep(2, 100)), 4, TARIFF)
    assert price_of(offer, 2, 0) == 0
    assert price_of(offer, 2, 2) == 200
    assert price_of(offer, 3, 2) is None


def test_the_same_facts_give_the_same_decision():
    def decision():
        state = leaf_state()
        facts = [TaskSubmitted(order(name, chips=(FAST, SLOW)), 0) for name in "cab"]
        return decide(state, facts, Moment(1, 1))

    assert decision() == decision()


def test_no_identifier_in_the_scheduler_names_a_level():
    levels = ("nation", "region_board", "data_centre", "datacentre", "datacenter", "province")
    for path in Path(qipan.scheduler.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                getattr(node, "id", None)
                or getattr(node, "name", None)
                or getattr(node, "attr", None)
                or getattr(node, "arg", None)
            )
            assert not any(level in str(name).lower() for level in levels), f"{path}: {name}"
