"""What must come to a place before a task runs there, in the decision: data, checkpoints, over links with a price."""

from dataclasses import replace

import pytest

from qipan.events import EngineOffered, LinksSet, Reserve, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import AskStep, EngineId, Offer, TaskId
from qipan.network import Link
from qipan.scheduler import Moment, State, decide
from qipan.scheduler.bids import worth_of
from qipan.scheduler.moves import Move, links_of, move_to, worth_there
from qipan.twin import build_world, check_end, check_world
from qipan.twin.world import outage
from test_scheduler import commands
from worlds import FAST, TARIFF, leaf, order

GIB = 2**30


def link(source: str, target: str, gib_per_s: float = 1.0, price: int = 0) -> Link:
    return Link(BoardId(source), BoardId(target), gib_per_s * GIB, 0.0, price)


def nation_over(*sites: str, asks: dict[str, int] = {}) -> State:  # noqa: B006  (read only)
    """A board over children of one site each, with free devices; some ask more for them."""
    state = State(BoardId("cn"))
    offers = [
        EngineOffered(
            EngineId(site), (Offer(FAST, 8, (AskStep(8, asks.get(site, 0)),), 8, TARIFF, site, "east"),), chooses=True
        )
        for site in sites
    ]  # fmt: skip
    decide(state, offers, Moment(0, 0))
    return state


def placed_at(state: State, links: tuple[Link, ...], **of: object) -> str:
    facts = [LinksSet(links), TaskSubmitted(order("a", counts=(4,), **of), 0)]  # type: ignore[arg-type]
    [command] = [
        sent for sent in decide(state, facts, Moment(1, 1)).commands if isinstance(sent.command, Reserve)
    ]
    return command.engine


def test_pieces_come_one_after_the_other_and_those_at_the_place_do_not():
    links = links_of([link("x", "z", 2.0, 3), link("y", "z", 1.0, 5)])
    move = move_to(links, (("x", 10 * GIB), ("y", 4 * GIB), ("z", 99 * GIB)), "z")
    assert move == Move(14 * GIB, 5.0 + 4.0, 30 + 20)


def test_staging_and_egress_are_spread_over_the_run():
    made = order("a", counts=(4,), work_s=100.0)
    [point] = made.curve.points
    owner = worth_of(made, 0.0, 0.0)
    here = worth_there(owner, point, TARIFF, Move())
    assert worth_there(owner, point, TARIFF, Move(GIB, 25.0, 0)) == pytest.approx(here * 100 / 125)
    assert worth_there(owner, point, TARIFF, Move(GIB, 0.0, 50)) == pytest.approx(here - 0.5)


def test_a_task_goes_where_its_data_lies_unless_devices_there_are_too_dear():
    links = (link("b", "a", 0.05),)
    data = (("b", 10 * GIB),)
    assert placed_at(nation_over("a", "b"), links) == "a", "without data the first"
    assert placed_at(nation_over("a", "b"), links, data_bytes_at=data) == "b"
    dear = nation_over("a", "b", asks={"b": TARIFF})
    assert placed_at(dear, links, data_bytes_at=data) == "a"


def test_a_deadline_that_staging_would_miss_keeps_it_near():
    links = (link("b", "a", 0.1),)
    asks = {"b": TARIFF // 8}
    data = (("b", 10 * GIB),)  # 100 s
    assert placed_at(nation_over("a", "b", asks=asks), links, data_bytes_at=data, work_s=3000.0) == "a"
    near = placed_at(
        nation_over("a", "b", asks=asks), links, data_bytes_at=data, work_s=3000.0, deadline_s=3050.0
    )
    assert near == "b"


def test_egress_dearer_than_the_task_keeps_it_waiting():
    state = nation_over("a")
    facts = [
        LinksSet((link("b", "a", 1.0, 10**9),)),
        TaskSubmitted(order("a", counts=(4,), data_bytes_at=(("b", 100 * GIB),)), 0),
    ]
    assert not commands(decide(state, facts, Moment(1, 1)), Reserve)


def test_a_checkpoint_counts_where_a_task_moves_and_the_move_takes_its_time():
    """dc1 has no power after a while: the task moves to dc2, near, not to dc3, far; its checkpoint comes over first."""
    sites = (leaf("dc1", 4), leaf("dc2", 4), leaf("dc3", 4))
    links = (link("dc1", "dc2", 1.0), link("dc1", "dc3", 0.01))
    world = build_world(BoardSpec(BoardId("cn"), children=sites), seed=1, links=links)
    world.after_step.append(check_world)
    made = order("a", counts=(4,), work_s=1000.0, checkpoint_bytes=50 * GIB)
    world.submit(replace(made, regions=("dc1", "dc2", "dc3")))
    world.happenings = outage(BoardId("dc1"), 300.0, 90_000.0)
    world.run(until_s=20_000.0)
    check_end(world, {TaskId("a")})
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    [life] = world.simulated(BoardId("dc2")).lifetimes
    assert not world.simulated(BoardId("dc3")).lifetimes
    [first] = world.simulated(BoardId("dc1")).lifetimes
    left_s = 1000.0 - (first[5] - first[4])
    assert life[5] - life[4] > left_s + 40.0, "50 s of them for the checkpoint"
