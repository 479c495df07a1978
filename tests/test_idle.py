"""Leases that stand idle: the holder is told, the devices are lent, and come back within the notice."""

from dataclasses import replace

import pytest

from api_site import caller, served, submit
from qipan.asking import GridIntake, tell
from qipan.controller import fact_of
from qipan.errors import InvalidInput
from qipan.events import BudgetRaised, BudgetReached, DevicesBusy, Reserve, RulesSet, Stop, TaskWoken
from qipan.hardware import BoardId
from qipan.leases import TaskId
from qipan.probe.busy import BusyDevices, shares_of
from qipan.quota import Idle, QuotaRule
from qipan.rules import parse_rules
from qipan.rules.explain import explain_rules
from qipan.scheduler import Moment, Phase, State, decide
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.scheduler.why import why_waiting
from qipan.twin import Happening, arrivals, build_world, check_world
from test_local_engine import Bench
from test_quota import board, of, parked
from test_scheduler import ENGINE, commands, run_until_started
from worlds import TARIFF, nation

pytestmark = pytest.mark.computes

T, NOTICE_S = TaskId("t"), 300.0
RULE = QuotaRule(BoardId("dc"), "alice", idle=Idle(0.05, 600.0, NOTICE_S))


def busy(share: float, from_s: float, until_s: float, task: TaskId = T) -> DevicesBusy:
    return DevicesBusy(task, ENGINE, 1, share, from_s, until_s)


def holding(*rules: QuotaRule, **more) -> State:
    """Alice's task holds all eight devices since second 1, and they have hardly worked since second 10."""
    state = board(*(rules or (RULE,)))
    decide(state, [of("alice", "t", 8, elastic=False, **more)], Moment(1, 1))
    run_until_started(state, "t", 1.0)
    decide(state, [busy(0.01, 10.0, 70.0)], Moment(70, 70))
    return state


def said(state: State, now_s: float, *facts) -> list[tuple[str, str]]:
    return [(one.task_id, one.verdict) for one in decide(state, facts, Moment(now_s, now_s)).reasons]


def lent() -> State:
    state = holding()
    said(state, 610.0)
    decide(state, [], Moment(910, 910))
    decide(state, [parked(state, "t", 911.0)], Moment(911, 911))
    return state


def test_the_file_says_when_a_lease_is_idle():
    [rule] = parse_rules('quota: [{board: dc, tenant: "*", idle: {notice: 5m}}]', "f")
    assert rule.idle == Idle(0.05, 600.0, 300.0)
    [told] = explain_rules([rule], {"dc": {"sim/fast": 8}})
    assert "is lent 5.0m after its holder was told" in str(told["text"])


def test_the_holder_is_told_then_the_task_is_parked_and_its_devices_are_lent():
    state = holding()
    assert said(state, 609.0) == []
    woken_s = decide(state, [], Moment(609.5, 609.5)).wake_s
    assert woken_s is not None
    assert woken_s <= 610.0
    assert said(state, 610.0) == [("t", "notice")]
    assert said(state, 909.0) == []
    decision = decide(state, [], Moment(910, 910))
    assert [command.park for command in commands(decision, Stop)] == [True]
    assert "`qipan wake t` has them back within 5.0m" in decision.reasons[0].text
    decide(state, [parked(state, "t", 911.0)], Moment(911, 911))
    assert state.tasks[T].phase is Phase.PARKED, "it asks for nothing while it sleeps"
    borrowed = commands(decide(state, [of("bob", "b", 8)], Moment(912, 912)), Reserve)
    assert [command.task_id for command in borrowed] == ["b"]


def test_devices_that_work_again_are_not_lent():
    state = holding()
    said(state, 610.0)
    assert said(state, 700.0, busy(0.5, 640.0, 700.0)) == [("t", "notice")]
    assert said(state, 2000.0) == []


def test_a_lease_of_a_protected_kind_is_not_lent():
    protects = QuotaRule(BoardId("dc"), "alice", ceiling=8, protect=("dev",))
    assert said(holding(RULE, protects, kind="dev"), 5000.0) == []
    assert said(holding(RULE, preemptible=False), 5000.0) == []


def test_the_holder_may_wake_it_before_it_is_parked():
    state = holding()
    said(state, 610.0)
    assert said(state, 700.0, TaskWoken(T, "alice")) == [("t", "woken")]
    assert said(state, 1299.0) == []
    assert said(state, 1300.0) == [("t", "notice")], "if it goes on standing idle"


def test_who_borrowed_it_gives_it_back_within_the_notice_and_nobody_else_gets_it():
    state = lent()
    decide(state, [of("bob", "b", 4), of("carol", "c", 4)], Moment(912, 912))
    for name in ("b", "c"):
        run_until_started(state, name, 912.0)
    decision = decide(state, [TaskWoken(T, "alice"), of("dan", "d", 8, bid=90 * TARIFF)], Moment(1000, 1000))
    stops = {command.task_id: command.why for command in commands(decision, Stop)}
    assert stops == dict.fromkeys(("b", "c"), "its devices go back to alice")
    decision = decide(state, [parked(state, "b", 1001.0), parked(state, "c", 1001.0)], Moment(1001, 1001))
    assert [command.task_id for command in commands(decision, Reserve)] == ["t"]
    assert state.tasks[T].lent == ()
    waits = why_waiting_text(state, state.tasks[TaskId("d")], 1002.0)
    assert "0 devices" in waits


def test_what_was_borrowed_is_not_lent_once_more():
    state = lent()
    decide(state, [of("alice", "b", 8)], Moment(912, 912))
    run_until_started(state, "b", 912.0)
    decide(state, [busy(0.0, 913.0, 973.0, TaskId("b"))], Moment(973, 973))
    assert said(state, 5000.0) == []
    assert said(state, 5001.0, TaskWoken(T, "alice")) == [("t", "woken"), ("b", "reclaimed")]


def test_what_does_not_park_within_the_notice_borrows_nothing():
    state = lent()
    for number, name in enumerate(("rigid", "slow")):
        fact = of("bob", name, 4, preemptible=name == "slow")
        points = tuple(replace(point, stop_s=NOTICE_S + 1) for point in fact.order.curve.points)
        if name == "slow":
            fact = replace(fact, order=replace(fact.order, curve=replace(fact.order.curve, points=points)))
        assert not commands(decide(state, [fact], Moment(912 + number, 912)), Reserve)
        told = why_waiting_text(state, state.tasks[TaskId(name)], 913.0)
        assert "8 devices of another tenant's task: idle, lent to tasks that park within 5.0m" in told


def test_a_tenant_is_never_told_the_id_of_anothers_task():
    state = board(replace(RULE, tenant="*"))
    decide(state, [of("alice", "secret", 8, elastic=False)], Moment(1, 1))
    run_until_started(state, "secret", 1.0)
    bobs = TaskId("b")
    decide(state, [of("bob", "b", 8, bid=9 * TARIFF), of("alice", "a", 8)], Moment(2, 2))
    told = why_waiting(state, bobs, 2, 2)
    assert any(entry["text"].startswith("when another tenant's task ends") for entry in told)
    own = why_waiting(state, TaskId("a"), 2, 2)
    assert any(entry["text"].startswith("when secret ends") for entry in own)
    decide(state, [busy(0.0, 10.0, 70.0, TaskId("secret"))], Moment(70, 70))
    said(state, 610.0)
    decide(state, [], Moment(910, 910))
    decide(state, [parked(state, "secret", 911.0)], Moment(911, 911))
    run_until_started(state, "b", 912.0)
    decision = decide(state, [TaskWoken(TaskId("secret"), "alice")], Moment(1000, 1000))
    told = [one.text for one in decision.reasons if one.task_id == "b"]
    told += [command.why for command in commands(decision, Stop)]
    decide(state, [of("carol", "c", 8)], Moment(1001, 1001))
    told += [entry["text"] for name in ("b", "c") for entry in why_waiting(state, TaskId(name), 1001, 1001)]
    assert "parked with its checkpoint within 300 s: alice takes up a lent lease again" in told[0]
    assert [text for text in told if "secret" in text] == []


def budget(verdict: str) -> BudgetReached | BudgetRaised:
    return BudgetReached(T, 90, 100) if verdict == "reached" else BudgetRaised(T, 200, "alice")


def test_waking_does_not_go_on_with_a_task_whose_budget_is_spent():
    state = lent()
    decide(state, [budget("reached")], Moment(920, 920))
    decide(state, [TaskWoken(T, "alice")], Moment(930, 930))
    assert state.tasks[T].phase is Phase.PARKED
    assert "raises it" in state.tasks[T].why_waiting
    assert commands(decide(state, [budget("raised")], Moment(940, 940)), Reserve)


def test_nor_while_it_is_being_parked():
    state = holding()
    said(state, 610.0)
    decide(state, [], Moment(910, 910))
    decide(state, [budget("reached")], Moment(910.2, 910.2))
    decide(state, [TaskWoken(T, "alice")], Moment(910.5, 910.5))
    decide(state, [parked(state, "t", 911.0)], Moment(911, 911))
    assert state.tasks[T].phase is Phase.PARKED
    assert "raises it" in state.tasks[T].why_waiting


def test_a_raised_budget_does_not_wake_a_lent_lease():
    state = lent()
    assert not commands(decide(state, [budget("raised")], Moment(920, 920)), Reserve)
    assert state.tasks[T].phase is Phase.PARKED
    assert commands(decide(state, [TaskWoken(T, "alice")], Moment(930, 930)), Reserve)


def test_a_lent_lease_outlives_the_board():
    again = decode_state(encode_state(lent()))
    assert again.tasks.lent == {T}
    assert commands(decide(again, [TaskWoken(T, "alice")], Moment(950, 950)), Reserve)


def test_in_a_tree_the_board_where_it_was_submitted_lends_it():
    """Busy shares go up from the leaf; the top parks the task, bob borrows at the leaf, and alice has it back within the notice."""
    world = build_world(nation(), seed=1)
    rule = QuotaRule(BoardId("cn"), "*", idle=Idle(0.05, 600.0, 60.0))
    world.after_step.append(check_world)
    mine = of("alice", "t", 4, work_s=9000.0).order
    theirs = [of("bob", f"b{number}", 4, work_s=9000.0, submitted_s=900.0).order for number in range(2)]
    world.happenings = [
        Happening(0.0, "rules", lambda world: [one.accept(RulesSet((rule,))) for one in world.tree.controllers.values()]),
        *arrivals([mine, *theirs]),
        Happening(100.0, "idle", lambda world: world.simulated(where(world)).be_busy(T, 0.0, 40.0)),
        Happening(2000.0, "wake", lambda world: world.tree.root.accept(TaskWoken(T, "alice"))),
    ]  # fmt: skip

    def where(world):
        return next(board for board in sorted(world.tree.engines) if T in world.simulated(board).running())

    world.run(until_s=1990.0)
    assert world.tree.root.state.tasks[T].phase is Phase.PARKED
    runs = [task for board in world.tree.engines for task in world.simulated(board).running()]
    assert sorted(runs) == ["b0", "b1"], "both run: one on the lent devices"
    world.run(until_s=2060.0)
    assert T in world.simulated(where(world)).running()


class Above:
    """The link of a child board to its parent, which answers in this process."""

    def __init__(self, parent) -> None:
        self._parent, self.asked = parent, []

    def ask(self, question: str, body: list[str]) -> object:
        self.asked.append(question)
        return tell(self._parent, question, body)


def test_people_of_a_board_below_wake_their_tasks_and_the_fact_says_who(tmp_path):
    with served(tmp_path) as host, caller(host) as api:
        host.park(10)  # so that nothing is run
        name = TaskId(submit(api).json()["task_id"])
        made = {"user": "bob", "tenant": "poets", "role": "user", "password": "a long password"}
        assert api.post("/users", json=made).status_code == 201
        session = api.post("/login", json={"user": "bob", "password": made["password"]}).json()
        above = Above(host)
        below = GridIntake(host, host.queries, above, lambda: None)
        tasks = host.tree.root.state.tasks
        with caller(host, session["access_token"]) as bob:
            for act in (
                lambda: below.wake(name, "ann"),
                lambda: bob.post(f"/tasks/{name}/wake").json()["state"],
            ):
                tasks[name] = replace(tasks[name], idle_since_s=1.0)
                assert act() == host.queries.task(name).state
                tasks[name] = replace(tasks[name], idle_since_s=None)
        with pytest.raises(InvalidInput, match="does not stand idle"):
            below.wake(name, "ann")
        facts = host.store.facts_of(name, ["task_woken"])
    assert above.asked == ["wake", "wake"], "the board that knows that it stands idle"
    assert [fact_of(body).by for _, _, body in facts] == ["ann", "bob"]


# ---- measured ----------------------------------------------------------------------------------------------------------


def test_the_tool_of_nvidia_is_read():
    assert shares_of("0, 97\n1, 0\n2, [N/A]\nnot a line\n") == {0: 0.97, 1: 0.0}


def test_busy_seconds_are_the_samples_over_time():
    devices = BusyDevices(lambda: {0: 0.5, 1: 1.0}, sample_s=1e9)
    devices.take()
    first = devices.busy_s((0, 1))
    devices._sampled_s -= 10.0
    devices.take()
    assert devices.busy_s((0, 1)) - first == pytest.approx(15.0, abs=0.2)
    assert devices.busy_s((0, 7)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "least", "most"), [("while :; do :; done", 0.5, 1.0), ("sleep 60", 0.0, 0.04)]
)
def test_an_engine_reports_how_much_a_tasks_devices_work(tmp_path, run, least, most):
    bench = Bench(tmp_path / "engine", share=0.2, busy_every_s=2.0)
    bench.start(run)
    fact = bench.until(DevicesBusy, limit_s=30.0)
    assert least <= fact.busy_share <= most, fact
    assert fact.until_s - fact.from_s >= 2.0
    bench.stop(park=False)
