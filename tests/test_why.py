"""`why` in named situations: the change that it names, when it is made, starts the task."""

from dataclasses import replace

import pytest

from qipan.events import (
    DevicesBusy,
    ElectricityPriced,
    EngineLost,
    EngineOffered,
    LinksSet,
    ParkRequested,
    RulesSet,
    StorageOffered,
    TaskSubmitted,
)
from qipan.hardware import BoardId
from qipan.leases import EngineId, Out, Room, TaskId
from qipan.network import Link
from qipan.quota import Idle, Loan, QuotaRule, Rate
from qipan.scheduler import Moment, Phase, State, decide
from qipan.scheduler.why import changes_that_start, why_waiting
from test_quota import of, parked
from test_scheduler import ENGINE, leaf_state, run_until_started
from worlds import FAST, TARIFF

DC, ME = BoardId("dc"), TaskId("me")
NIGHT = Loan(600.0, 20 * 3600.0, 8 * 3600.0, 0.0)


def waiting(
    *rules: QuotaRule, runs: tuple[TaskSubmitted, ...] = (), devices: int = 8, me: TaskSubmitted
) -> State:
    state = leaf_state(devices)
    decide(state, [RulesSet(rules)], Moment(0.5, 0.5))
    for fact in runs:
        decide(state, [fact], Moment(1, 1))
        run_until_started(state, fact.order.task_id)
    decide(state, [me], Moment(2, 2))
    return state


def storing(me: TaskSubmitted, space_bytes: int, rate: float) -> State:
    """A storage in which another task's checkpoints lie, 200 B at 10 B/s; `me` needs as much."""
    state = leaf_state(8)
    room = Room("dc/storage", space_bytes, rate)
    decide(state, [StorageOffered(ENGINE, room)], Moment(0.5, 0.5))
    for fact in (of("other", "o", 2, elastic=False), me):
        points = tuple(
            replace(point, storage_bytes=200, storage_bytes_per_s=10.0) for point in fact.order.curve.points
        )
        order = replace(fact.order, curve=replace(fact.order.curve, points=points))
        decide(state, [TaskSubmitted(order, 0)], Moment(1, 1))
        if fact is not me:
            run_until_started(state, order.task_id)
    return state


def far_from_its_data() -> State:
    """Its data lies at a site without devices; the way from there is dearer than the whole task."""
    state = leaf_state(8)
    links = (Link(BoardId("far"), DC, 1e9, 0.0, 10**9),)
    me = of("me", "me", 4)
    me = TaskSubmitted(replace(me.order, data_bytes_at=(("far", 2**40),)), 0)
    decide(state, [LinksSet(links), me], Moment(2, 2))
    return state


def parked_board() -> State:
    state = leaf_state(8)
    decide(state, [ParkRequested(True, "test")], Moment(1, 1))
    decide(state, [of("me", "me", 2)], Moment(2, 2))
    return state


def lost_engine() -> State:
    state = leaf_state(8)
    decide(state, [EngineLost(ENGINE, "silent")], Moment(1, 1))
    decide(state, [of("me", "me", 2)], Moment(2, 2))
    return state


def drained_node() -> State:
    """Half of the devices stand on a node that its site drains."""
    state = leaf_state(8)
    (offer,) = state.engines[ENGINE].offers
    half, out = (
        replace(offer, devices=4, largest_gang=4),
        Out(offer.chip_class, 4, "Slurm drains n1 (repair)"),
    )
    decide(state, [EngineOffered(ENGINE, (half,), False, (out,))], Moment(1, 1))
    decide(state, [of("me", "me", 6, elastic=False)], Moment(2, 2))
    return state


def drained_below() -> State:
    """The same, seen by the board above, which knows only what the data centre's board reports."""
    below = leaf_state(8)
    below.top = False
    (offer,) = below.engines[ENGINE].offers
    half, out = (
        replace(offer, devices=4, largest_gang=4),
        Out(offer.chip_class, 4, "Slurm drains n1 (repair)"),
    )
    reports = decide(below, [EngineOffered(ENGINE, (half,), False, (out,))], Moment(1, 1)).reports
    [told] = [report for report in reports if isinstance(report, EngineOffered)]
    state = State(BoardId("cn"))
    decide(state, [told], Moment(1, 1))
    decide(state, [of("me", "me", 6, elastic=False)], Moment(2, 2))
    return state


def refused_lately() -> State:
    state = leaf_state(8)
    decide(state, [ParkRequested(True, "test"), of("me", "me", 2)], Moment(2, 2))
    state.tasks[ME] = replace(state.tasks[ME], refused=((EngineId("engine"), 10.0),))
    decide(state, [ParkRequested(False, "test")], Moment(2, 2))
    return state


def fixed(name: str, devices: int, bid: int = 2 * TARIFF) -> TaskSubmitted:
    return of("other", name, devices, bid=bid, elastic=False)


def in_dear_hours() -> State:
    state = leaf_state(8)
    decide(state, [ElectricityPriced(ENGINE, ((FAST, 10 * TARIFF),))], Moment(1, 1))
    decide(state, [of("me", "me", 4)], Moment(2, 2))
    return state


def spared_neighbour() -> State:
    """All devices are held by a cheap task that may be parked for nobody."""
    rule = QuotaRule(DC, "*", per_task=Rate(0, 3600.0))
    return waiting(rule, runs=(of("other", "o", 8),), me=of("me", "me", 4, bid=90 * TARIFF, elastic=False))


def beside_an_idle_lease() -> State:
    """The devices were lent by a task that wants them back half a second after it asks."""
    rule = QuotaRule(DC, "other", idle=Idle(0.05, 10.0, 0.5))
    state = waiting(rule, runs=(of("other", "o", 8),), me=of("me", "me", 4, bid=1))
    o = TaskId("o")
    decide(state, [DevicesBusy(o, ENGINE, 1, 0.0, 1.0, 2.0)], Moment(2, 2))
    decide(state, [], Moment(2.1, 2.1))
    state.tasks[o] = replace(state.tasks[o], idle_since_s=-20.0, noticed_s=-5.0)
    decide(state, [], Moment(2.2, 2.2))
    decide(state, [parked(state, "o", 2.5)], Moment(2.5, 2.5))
    return state


SITUATIONS = {
    "bid": lambda: waiting(runs=(of("other", "o", 8, bid=8 * TARIFF, work_s=5000.0),), me=of("me", "me", 4, elastic=False)),
    "other tasks": lambda: waiting(runs=(fixed("o", 8),), me=of("me", "me", 4)),
    "gang": lambda: waiting(runs=(fixed("o", 5),), me=of("me", "me", 4)),
    "regions": lambda: waiting(me=of("me", "me", 4, regions=("west",))),
    "vendors": lambda: waiting(me=of("me", "me", 4, vendors=("huawei",))),
    "parked": parked_board,
    "engine": lost_engine,
    "drain": drained_node,
    "drain below": drained_below,
    "refusals": refused_lately,
    "ceiling": lambda: waiting(QuotaRule(DC, "me", ceiling=3), me=of("me", "me", 4)),
    "borrow": lambda: waiting(QuotaRule(DC, "me", share=0.25, borrow=1), me=of("me", "me", 4)),
    "floor": lambda: waiting(QuotaRule(DC, "owner", floor=6), me=of("me", "me", 4)),
    "hours": lambda: waiting(QuotaRule(DC, "owner", floor=6, loan=replace(NIGHT, from_s=3600.0, until_s=7200.0)), me=of("me", "me", 4)),
    "notice": lambda: waiting(QuotaRule(DC, "owner", floor=6, loan=Loan(0.5)), me=of("me", "me", 4)),
    "share": lambda: waiting(QuotaRule(DC, "owner", share=0.75), me=of("me", "me", 4, preemptible=False)),
    "elastic": lambda: waiting(QuotaRule(DC, "owner", share=0.75), me=of("me", "me", 4, preemptible=False)),
    "apart": lambda: waiting(runs=(of("me", "o", 2, apart="web", elastic=False),), me=of("me", "me", 4, apart="web")),
    "storage": lambda: storing(me=of("me", "me", 4), space_bytes=250, rate=0.0),
    "storage rate": lambda: storing(me=of("me", "me", 4), space_bytes=0, rate=15.0),
    "data": lambda: far_from_its_data(),
    "preemptions": lambda: spared_neighbour(),
    "idle": lambda: beside_an_idle_lease(),
    "electricity": lambda: in_dear_hours(),
    "protect": lambda: waiting(
        QuotaRule(DC, "owner", share=0.75), QuotaRule(DC, "me", ceiling=8, protect=("serve",)), me=of("me", "me", 4, kind="serve")
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", sorted(SITUATIONS))
def test_the_change_that_why_names_starts_the_task(situation):
    state = SITUATIONS[situation]()
    assert state.tasks[ME].phase is Phase.QUEUED
    changes = {change.constraint: change for change in changes_that_start(state, ME, Moment(3, 3))}
    constraint = situation.removesuffix(" below")
    assert constraint in changes, [*changes]
    changes[constraint].make(state)
    state.more = True  # as after the facts that make such a change
    decide(state, [], Moment(3, 3))
    task = state.tasks[ME]
    assert task.phase is Phase.RESERVING or task.promised_until_s > 3


def test_boards_above_name_the_node_and_stop_when_it_is_back():
    told = why_waiting(drained_below(), ME, 3.0, 3.0)
    assert "with 4 devices of sim/fast back: dc: Slurm drains n1 (repair)" in [
        entry["text"] for entry in told
    ]
    below = leaf_state(8)
    below.top = False
    [offer] = below.engines[ENGINE].offers
    outs = tuple(Out(offer.chip_class, 1, f"node {number}") for number in range(40))
    said = []
    for out in (outs, outs[:2], ()):
        reports = decide(below, [EngineOffered(ENGINE, (offer,), False, out)], Moment(1, 1)).reports
        said.append([report.out for report in reports if isinstance(report, EngineOffered)])
    assert [sum(out.devices for out in one[0]) for one in said] == [40, 2, 0]
    assert len(said[0][0]) == 17
    assert said[0][0][-1].why == "24 more below dc"


def test_the_bid_that_why_names_is_the_least():
    state = SITUATIONS["bid"]()
    [change] = [
        change for change in changes_that_start(state, ME, Moment(3, 3)) if change.constraint == "bid"
    ]
    change.make(state)
    bid = state.tasks[ME].order.bid_micro_cny_per_device_hour
    other = SITUATIONS["bid"]()
    task = other.tasks[ME]
    other.tasks[ME] = replace(task, order=replace(task.order, bid_micro_cny_per_device_hour=int(bid * 0.95)))
    decide(other, [], Moment(3, 3))
    assert other.tasks[ME].phase is Phase.QUEUED
    assert other.tasks[ME].promised_until_s == 0


def test_the_ceiling_that_why_names_is_the_least():
    [change] = [
        c for c in changes_that_start(SITUATIONS["ceiling"](), ME, Moment(3, 3)) if c.constraint == "ceiling"
    ]
    assert change.text.startswith("with a ceiling of 4 ")


@pytest.mark.parametrize(
    ("situation", "text"),
    [
        ("storage", "with 150B more in dc/storage"),
        ("storage rate", "with 2 times as long between its checkpoints (`checkpoint: longest`)"),
        ("apart", "without `limits.apart: web`"),
    ],
)
def test_the_change_is_the_cheapest_and_what_it_runs_into_is_said(situation, text):
    told = why_waiting(SITUATIONS[situation](), ME, 3.0, 3.0)
    assert text in [entry["text"] for entry in told]
    assert ("dc/storage" if "storage" in situation else "engine has o") in told[0]["text"]


def test_why_on_a_board_of_many_tasks_copies_what_matters():
    state = SITUATIONS["ceiling"]()
    facts = [of("me", f"w{number:05d}", 4) for number in range(20_000)]
    decide(state, facts, Moment(2, 2))
    told = why_waiting(state, ME, 3.0, 3.0)
    assert {entry["constraint"] for entry in told} >= {"now", "ceiling"}
    assert len(state.tasks) == 20_001, "the state itself is untouched"
