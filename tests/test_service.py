"""Services by forecast: their devices are lent while it does not ask for them, and back in time."""

import math
from dataclasses import replace

import msgspec
import pytest

from qipan.cli.forecasts import hours_in, record_in, time_text
from qipan.curves import Need
from qipan.errors import Infeasible, InvalidInput
from qipan.events import (
    BoardStarted,
    BudgetRaised,
    BudgetReached,
    CancelRequested,
    DevicesBusy,
    EngineOffered,
    HeldTask,
    Reserve,
    Resize,
    Stop,
    TasksHeld,
    TaskSubmitted,
)
from qipan.forecast import Busy, Forecast, learnt, steps_of
from qipan.hardware import BoardId
from qipan.leases import AskStep, EngineId, LeaseId, Offer, Order, TaskId
from qipan.planning import order_of, plan_service
from qipan.quantities import format_money
from qipan.scheduler import Moment, Phase, State, decide
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.scheduler.state import TaskState
from qipan.scheduler.why import why_waiting
from qipan.workload.parse import parse_task
from qipan.workload.site import load_site
from test_quota import of, parked
from test_scheduler import ENGINE, commands, leaf_state, run_until_started
from worlds import FAST, TARIFF, order

pytestmark = pytest.mark.computes

MONDAY_S, HOUR_S = 4 * 86_400.0, 3600.0
#: one replica by night, two from 8, four from 18 to 23 o'clock
EVENING = Forecast(
    86_400.0, ((0.0, 1), (8 * HOUR_S, 2), (18 * HOUR_S, 4), (23 * HOUR_S, 1)), utc_offset_s=0.0
)
START_S = 60.0


def at(hour: float) -> float:
    return MONDAY_S + hour * HOUR_S


def replica(number: int, *, until_s: float | None = None, forecast: Forecast = EVENING, **more) -> Order:
    one = order(
        f"chat.r{number}", counts=(1,), work_s=1e9, elastic=False, preemptible=False, kind="serve", **more
    )
    return replace(one, tenant="bob", hours=forecast.hours_of(number, until_s))


def told(state: State, now_s: float, *facts):
    return decide(state, facts, Moment(now_s, now_s))


def serving(now_s: float, *numbers: int, devices: int = 4, **more) -> State:
    """A leaf where these replicas run."""
    state = leaf_state(devices)
    told(state, now_s, *(TaskSubmitted(replica(number, **more), 0) for number in numbers))
    for number in numbers:
        run_until_started(state, f"chat.r{number}", now_s)
    return state


# ---- hours -------------------------------------------------------------------------------------------------------------


def test_a_replica_is_wanted_its_start_and_the_notice_earlier_than_the_forecast_asks():
    hours = EVENING.hours_of(3)
    assert [hours.wanted(at(hour)) for hour in (17.8, 17.9, 18.0, 22.99, 23.0)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert hours.next_change_s(at(12)) == at(18) - 360.0
    assert hours.next_change_s(at(18)) == at(23)
    assert hours.next_change_s(at(23)) == at(42) - 360.0
    assert hours.lent_text(at(12)) == "lent until 17:54: the forecast asks for replica 3 at 18:00"


def test_one_that_is_always_asked_for_never_changes_and_one_that_never_is_neither():
    assert EVENING.hours_of(1).next_change_s(at(3)) is None
    assert EVENING.hours_of(1).wanted(at(3))
    assert EVENING.hours_of(5).next_change_s(at(3)) is None
    assert not EVENING.hours_of(5).wanted(at(19))


def test_hours_go_on_over_midnight_and_the_week_begins_on_monday():
    night = Forecast(86_400.0, ((0.0, 2), (6 * HOUR_S, 1), (22 * HOUR_S, 2)), 300.0, 0.0, 0.0).hours_of(2)
    assert night.windows == ((22 * HOUR_S, 30 * HOUR_S),)
    assert [night.wanted(at(hour)) for hour in (5, 7, 21.95, 25)] == [True, False, True, True]
    shanghai = replace(EVENING, every_s=7 * 86_400.0, utc_offset_s=8 * HOUR_S, start_s=0.0).hours_of(4)
    assert shanghai.next_asked_s(at(0)) == at(18 - 8), "18 o'clock on Monday in Shanghai"
    assert shanghai.lent_text(at(24)).endswith("the forecast asks for replica 4 at Mon 18:00")


def test_a_time_shorter_than_the_lead_is_not_lent():
    gap = Forecast(
        86_400.0, ((0.0, 1), (8 * HOUR_S, 2), (9 * HOUR_S, 1), (9 * HOUR_S + 200, 2)), 300.0, START_S, 0.0
    )
    assert gap.hours_of(2).windows == ((8 * HOUR_S, 24 * HOUR_S),)


def test_every_change_is_a_change_whatever_the_time():
    """Wakes follow each other without a gap: what is wanted differs on the two sides of each, and nowhere else."""
    odd = Forecast(86_400.0 / 7, ((0.0, 3), (1000.1, 1), (5000.7, 2), (9999.9, 3)), 10.0, 3.3, 0.0)
    for number in (1, 2, 3):
        hours, now_s = odd.hours_of(number), 1_795_000_000.25
        for _ in range(20):
            change_s = hours.next_change_s(now_s)
            if change_s is None:
                assert number == 1
                break
            assert hours.wanted(change_s) is not hours.wanted(change_s - 0.01) is hours.wanted(now_s)
            now_s = change_s


# ---- in a task file ----------------------------------------------------------------------------------------------------

FILE = "kind: serve\nname: chat\nrun: x\n"


def test_a_service_reads_its_forecast_and_without_one_all_replicas_are_asked_for_always():
    text = FILE + 'forecast: {every: 7d, replicas: {0h: 1, 1d8h: 3}, notice: 2m, start: 90s, utc: "+00:00"}\n'
    task = parse_task(text)
    assert task.forecast == Forecast(7 * 86_400.0, ((0.0, 1), (32 * HOUR_S, 3)), 120.0, 90.0, 0.0)
    assert task.in_parts
    always = parse_task(FILE + "replicas: 3\n").forecast
    assert always is not None
    assert [always.hours_of(number).next_change_s(at(1)) for number in (1, 3)] == [None, None]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("forecast: {replicas: {1h: 2}}", "times begin with 0h"),
        ("forecast: {replicas: {0h: 2, 30h: 1}}", "before the end of the period, 24.0h"),
        ("forecast: {replicas: {0h: 0}}", "asks for no replica at any time"),
        ("forecast: {every: 5m, replicas: {0s: 1}}", "`start` and `notice` take 6.0m, as long as a period"),
        (
            "forecast: {replicas: {0h: 9}}\nreplicas: {min: 1, max: 8}",
            "asks for 9 replicas, `replicas` has 1 to 8",
        ),
        ("devices: {min: 1, max: 2}\nelastic: true", "a replica has one shape"),
        ("limits: {deadline: 1h}", "a service has no deadline"),
        ("forecast: {every: 1ms, start: 0s, notice: 0s, replicas: {0s: 1}}", "stands for a second at least"),
        ("forecast: {replicas: {0h: 1, 8h: 2, 28800.5s: 1}}", "stands for a second at least"),
        ("forecast: {replicas: {0h: -1}}", "is not a whole number from 0"),
    ],
)
def test_a_wrong_service_is_answered_with_what_is_wrong(more, said):
    with pytest.raises(InvalidInput) as raised:
        parse_task(FILE + more + "\n")
    assert said in str(raised.value)


def test_a_service_is_planned_for_its_time_so_that_its_budget_is_compared_with_what_that_costs():
    site, text = (
        load_site("tests/tiny_site.yaml"),
        FILE + "limits: {chips: [sim/a], max_cost: 3 CNY, time: 2h}\n",
    )
    _, two_hours = plan_service(site, parse_task(text), "chat-1")
    _, a_day = plan_service(site, parse_task(text.replace(", max_cost: 3 CNY, time: 2h", "")), "chat-1")
    assert a_day.options[0].cost_p50_micro_cny == pytest.approx(
        12 * two_hours.options[0].cost_p50_micro_cny, rel=0.02
    )
    with pytest.raises(Infeasible, match=r"limits.max_cost is 3.00 CNY"):
        plan_service(site, parse_task(text.replace("time: 2h", "time: 30d")), "chat-1")


@pytest.mark.parametrize(("replicas", "said"), [(3, ""), (4, ", room for 3 at once")])
def test_a_plan_says_when_there_is_room_for_fewer_replicas_than_are_asked_for(replicas, said):
    site = load_site("tests/tiny_site.yaml")
    _, whole = plan_service(site, parse_task(f"{FILE}replicas: {replicas}\n"), "chat-1")
    assert {option.strategy for option in whole.options} == {f"{replicas} replicas of its own script{said}"}


def test_an_option_of_a_service_says_by_how_much_all_its_replicas_are_dearer():
    site = load_site("qipan.yaml")
    _, whole = plan_service(site, parse_task(FILE + "replicas: 3\n"), "chat-1")
    first, *others = whole.options
    assert first.option_id == whole.chosen
    assert others
    for other in others:
        difference = format_money(abs(other.cost_p50_micro_cny - first.cost_p50_micro_cny))
        assert f"by {difference}, " in other.why_not


def test_a_budget_with_a_time_is_what_a_service_bids_and_is_divided_by_its_hours():
    text = (
        FILE
        + "limits: {max_cost: 144 CNY, time: 2d, chips: [sim/a]}\nforecast: {replicas: {0h: 1, 12h: 2}}\n"
    )
    site = load_site("tests/tiny_site.yaml")
    parts, whole = plan_service(site, parse_task(text), "chat-1")
    budgets = {name: part.limits.max_cost_micro_cny for name, (part, _) in parts.items()}
    assert budgets == {"chat-1.r1": 96_000_000, "chat-1.r2": 48_000_000}
    assert whole.options[0].devices == 2
    for name, (part, plan) in parts.items():
        made = order_of(site, part, TaskId(name), plan.curve, at(3))
        assert made.bid_micro_cny_per_device_hour == 2_000_000
        assert (made.hours.until_s, made.preemptible) == (at(51), False)


# ---- on a board --------------------------------------------------------------------------------------------------------


def test_a_replica_that_is_not_asked_for_waits_for_its_hour_and_wakes_the_board_for_it():
    state = leaf_state()
    decision = told(state, at(12), TaskSubmitted(replica(3), 0))
    assert not commands(decision, Reserve)
    assert decision.wake_s == at(18) - 360.0
    assert state.tasks[TaskId("chat.r3")].phase is Phase.LENT
    assert [one["constraint"] for one in why_waiting(state, TaskId("chat.r3"), at(12), 0.0)] == ["forecast"]
    decision = told(state, at(18) - 360.0)
    assert [command.task_id for command in commands(decision, Reserve)] == ["chat.r3"]
    assert "asks for replica 3 at 18:00" in decision.reasons[0].text


def test_when_the_tide_falls_devices_are_lent_and_a_training_grows_onto_them():
    state = serving(at(20), 2, 3)
    told(state, at(20), of("alice", "t", 2, bid=TARIFF))
    run_until_started(state, "t", at(20))
    told(state, at(20.5), TaskSubmitted(replace(order("e", bid=TARIFF), tenant="carol"), 0))
    decision = told(state, at(23))
    stops = {command.task_id: command.why for command in commands(decision, Stop)}
    assert stops["chat.r3"] == "lent until Tue 17:54: the forecast asks for replica 3 at Tue 18:00".replace(
        "Tue ", ""
    )
    assert set(stops) == {"chat.r2", "chat.r3"}
    decision = told(state, at(23), parked(state, "chat.r2", at(23)), parked(state, "chat.r3", at(23)))
    assert [command.task_id for command in commands(decision, Reserve)] == ["e"]
    assert why_waiting_text(state, state.tasks[TaskId("chat.r2")], at(23)).startswith("lent until 07:54")


def lent(training: str = "elastic", bid: int = 90 * TARIFF) -> State:
    """By night: three replicas sleep, and a training that pays far more than they has all that they lent."""
    state = serving(at(20), 1, 2, 3, 4)
    told(state, at(23))
    told(state, at(23), *(parked(state, f"chat.r{number}", at(23)) for number in (2, 3, 4)))
    assert state.tasks.lent == {TaskId(f"chat.r{number}") for number in (2, 3, 4)}
    borrower = order(
        "b",
        counts=(3,),
        bid=bid,
        work_s=1e6,
        elastic=training == "elastic",
        preemptible=training == "elastic",
    )
    told(state, at(23.1), TaskSubmitted(borrower, 0))
    return state


def test_only_a_task_that_parks_within_the_notice_borrows():
    rigid = lent("rigid")
    assert "not asked for by its forecast now, lent to tasks that park within 5.0m" in why_waiting_text(
        rigid, rigid.tasks[TaskId("b")], at(23.1)
    )
    assert rigid.tasks[TaskId("b")].phase is Phase.QUEUED
    elastic = lent()
    assert elastic.tasks[TaskId("b")].phase is Phase.RESERVING


def test_devices_come_back_in_time_even_from_one_that_pays_more_and_nobody_else_gets_them():
    state = lent()
    run_until_started(state, "b", at(23.1))
    decision = told(state, at(32) - 360.0, of("dan", "d", 2, bid=900 * TARIFF))
    assert [command.task_id for command in commands(decision, Stop)] == ["b"]
    decision = told(state, at(32) - 350.0, parked(state, "b", at(32) - 350.0))
    placed = [command.task_id for command in commands(decision, Reserve)]
    assert "chat.r2" in placed
    assert state.tasks[TaskId("chat.r2")].lent == ()


def test_a_replica_that_never_had_devices_does_not_stand_before_one_that_takes_up_its_own():
    """At a board above with one device, which is kept for the second of two alike."""
    state = State(BoardId("top"))
    offer = Offer(FAST, 1, (AskStep(1, 0),), 1, TARIFF, "dc", "east")
    decide(state, [EngineOffered(EngineId("dc"), (offer,), chooses=True)], Moment(at(18.5), 1))
    for number in (1, 2):
        one = state.tasks.shared(replica(number))
        had = (Need(FAST, 1),) if number == 2 else ()
        state.tasks[one.task_id] = TaskState(one, Phase.QUEUED, at(18.5), lent=had)
    decision = decide(state, [], Moment(at(18.5), 2))
    assert [sent.task_id for sent in commands(decision, Reserve)] == [replica(2).task_id]


def test_a_training_that_can_shrinks_for_a_service_that_pays_more():
    state = serving(at(20), 1, 2, 3)
    told(state, at(23))
    told(state, at(23), parked(state, "chat.r2", at(23)), parked(state, "chat.r3", at(23)))
    told(state, at(23), TaskSubmitted(order("b", counts=(1, 2, 3), bid=TARIFF, work_s=1e6), 0))
    run_until_started(state, "b", at(23))
    assert state.tasks[TaskId("b")].needs[0].devices == 3
    decision = told(state, at(32) - 360.0)
    assert [command.points[0].devices for command in commands(decision, Resize)] == [2]
    assert not commands(decision, Stop)


def test_a_replica_that_was_told_to_stop_goes_on_when_it_is_asked_for_meanwhile():
    state = serving(at(20), 3)
    told(state, at(23))
    assert state.tasks[TaskId("chat.r3")].phase is Phase.STOPPING
    told(state, at(42) - 360.0)
    decision = told(state, at(42) - 300.0, parked(state, "chat.r3", at(42) - 300.0))
    assert [command.task_id for command in commands(decision, Reserve)] == ["chat.r3"]


@pytest.mark.parametrize("hour", [20.0, 12.0])
def test_a_service_ends_at_its_time_and_its_replicas_are_done(hour):
    state = leaf_state()
    told(state, at(hour), TaskSubmitted(replica(3, until_s=at(22)), 0))
    if hour == 20.0:
        run_until_started(state, "chat.r3", at(hour))
    decision = told(state, at(22))
    if hour == 20.0:
        decision = told(state, at(22), parked(state, "chat.r3", at(22)))
    assert decision.ended == (("chat.r3", "done"),)
    assert decision.wake_s is None


def test_a_lent_replica_can_be_cancelled_and_a_spent_budget_goes_before_the_forecast():
    state = serving(at(20), 3)
    told(state, at(20.1), BudgetReached(TaskId("chat.r3"), 2, 1))
    told(state, at(20.1), parked(state, "chat.r3", at(20.1)))
    told(state, at(42))
    assert state.tasks[TaskId("chat.r3")].phase is Phase.PARKED
    told(state, at(48), BudgetRaised(TaskId("chat.r3"), 3, "bob"))
    assert state.tasks[TaskId("chat.r3")].phase is Phase.LENT, "it is not asked for at this hour"
    assert told(state, at(49), CancelRequested(TaskId("chat.r3"), "bob")).ended == (("chat.r3", "cancelled"),)


@pytest.mark.parametrize("fact", [None, BudgetReached(TaskId("chat.r2"), 1, 1)])
def test_one_that_waited_for_a_seat_on_a_large_board_and_waits_no_more_stops_nobody(fact):
    """A board whose replica was lent while another gave devices up for it could not decide any more."""
    state = leaf_state(1, look_at_all_up_to=0)
    told(state, at(22), TaskSubmitted(order("cheap", counts=(1,)), 0))
    run_until_started(state, "cheap", at(22))
    told(state, at(22.99), TaskSubmitted(replica(2, bid=50 * TARIFF), 0))
    assert state.tasks[TaskId("chat.r2")].promised
    told(state, at(23), parked(state, "cheap", at(23)), *([] if fact is None else [fact]))
    waiting = state.tasks[TaskId("chat.r2")]
    assert waiting.phase is (Phase.LENT if fact is None else Phase.PARKED)
    assert state.tasks[TaskId("cheap")].phase is Phase.RESERVING


def test_a_service_that_ends_while_one_of_its_replicas_parks_for_its_budget_is_over():
    state = serving(at(18), 3, until_s=at(20))
    name = TaskId("chat.r3")
    told(state, at(19.999), BudgetReached(name, 1, 1))
    told(state, at(20))
    told(state, at(20.001), parked(state, name, at(20.001)))
    assert state.over == {name: "done"}


def test_a_replica_that_a_board_remembers_as_lent_and_finds_running_keeps_no_devices_from_others():
    """The board's store was an older copy of itself."""
    state = serving(at(18), 3, devices=2)
    name = TaskId("chat.r3")
    told(state, at(23))
    told(state, at(23.01), parked(state, name, at(23.01)))
    lent = state.tasks[name]
    assert (lent.phase, lent.lent) == (Phase.LENT, (Need(FAST, 1),))
    point = lent.order.curve.points[0].point_id
    held = HeldTask(lent.order, LeaseId("x"), 9, 2, True, point, lent.lent, "engine", 0.0, 0.0, 20.0)
    told(state, at(42), BoardStarted((ENGINE,), True))
    told(state, at(42.001), TasksHeld(ENGINE, 0, at(42), (held,)))
    rigid = TaskSubmitted(order("rigid", counts=(1,), elastic=False, preemptible=False), 0)
    assert commands(told(state, at(42.01), rigid), Reserve)


def test_while_a_replica_parks_the_devices_that_nobody_holds_are_not_kept_for_it_as_well():
    state = serving(at(18), 3, devices=2)
    told(state, at(23))
    assert state.tasks[TaskId("chat.r3")].phase is Phase.STOPPING
    rigid = TaskSubmitted(order("rigid", counts=(1,), elastic=False, preemptible=False), 0)
    assert commands(told(state, at(23), rigid), Reserve)


def test_a_state_with_lent_replicas_is_kept_and_goes_on_alike():
    state = lent()
    again = decode_state(encode_state(state))
    assert again.tasks[TaskId("chat.r2")].turns_s == at(32) - 360.0
    for one in (state, again):
        run_until_started(one, "b", at(23.1))
    ones, others = told(state, at(32) - 360.0), told(again, at(32) - 360.0)
    assert ones.commands == others.commands
    assert not math.isinf(ones.wake_s or math.inf)


# ---- what former days teach --------------------------------------------------------------------------------------------


def test_a_forecast_is_learnt_from_how_much_devices_worked():
    hours = [EVENING.hours_of(number) for number in (1, 2, 3, 4)]
    day = [Busy(at(19), at(20), 0.35) for _ in range(4)] + [
        Busy(at(9), at(11), 0.2),
        Busy(at(9), at(11), 0.1),
    ]
    found = learnt(hours, [*day, Busy(at(3), at(3.2), 0.9)], 0.7)
    by_hour = {round(one.from_s / HOUR_S): one for one in found}
    assert (by_hour[19].asked, by_hour[19].busy, by_hour[19].replicas) == (4, 1.4, 2)
    assert (by_hour[9].asked, by_hour[9].replicas, by_hour[10].replicas) == (2, 1, 1)
    assert (by_hour[12].busy, by_hour[12].replicas) == (None, 2), "nothing was recorded: as it was asked for"
    assert (by_hour[3].busy, by_hour[3].replicas) == (None, 1), "twelve minutes are no hour"
    assert steps_of(found)[:3] == ((0.0, 1), (8 * HOUR_S, 2), (9 * HOUR_S, 1))


def test_where_replicas_had_nothing_to_do_one_is_still_asked_for():
    hours = [EVENING.hours_of(number) for number in (1, 2)]
    found = learnt(hours, [Busy(at(0), at(24), 0.0), Busy(at(8), at(24), 0.0)], 0.7)
    assert steps_of(found) == ((0.0, 1),)


def test_a_week_is_learnt_by_the_hour():
    week = replace(EVENING, every_s=7 * 86_400.0, steps=((0.0, 1), (32 * HOUR_S, 2)))
    found = learnt([week.hours_of(number) for number in (1, 2)], [Busy(at(33), at(34), 0.9)] * 2, 0.5)
    assert steps_of(found) == ((0.0, 1), (32 * HOUR_S, 2), (33 * HOUR_S, 4), (34 * HOUR_S, 2))


def test_where_all_worked_all_the_time_one_more_is_asked_for_and_the_busiest_day_counts():
    hours = [EVENING.hours_of(number) for number in (1, 2)]
    record = [Busy(at(12), at(13), 0.98), Busy(at(12), at(13), 1.0), Busy(at(36), at(37), 0.1)]
    noon = learnt(hours, record, 0.7)[12]
    assert (noon.replicas, noon.cut) == (3, True)


def test_a_share_that_was_told_holds_until_the_next_word_or_the_end_of_its_attempt():
    order = {"order": msgspec.to_builtins(replica(1))}
    told = [
        DevicesBusy(TaskId("chat.r1"), "e", 1, share, from_s, from_s + 60)
        for share, from_s in ((0.5, 0.0), (0.1, 600.0))
    ]
    events = [{"kind": "task_submitted", "at_s": 0.0, "fact": order}]
    events += [{"kind": fact.kind, "at_s": fact.until_s, "fact": msgspec.to_builtins(fact)} for fact in told]
    events.append(
        {
            "kind": "task_exited",
            "at_s": 1000.0,
            "fact": {"task_id": "chat.r1", "attempt": 1, "usage": {"until_s": 990.0}},
        }
    )
    assert hours_in(events) == [EVENING.hours_of(1)]
    assert record_in(events) == [Busy(0.0, 600.0, 0.5), Busy(600.0, 990.0, 0.1)]
    assert [time_text(seconds) for seconds in (0.0, 5400.0, 90.5)] == ["0s", "1h30m", "1m30.5s"]
