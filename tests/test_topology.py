"""Which devices a gang gets: never over two blocks while one has room, and of as few nodes as can be."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from qipan.engines.topology import free_blocks, nearest
from qipan.errors import InvalidInput
from qipan.events import EngineOffered, Reserve, TaskSubmitted
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import AskStep, Block, EngineId, Offer
from qipan.scheduler import Moment, State, decide
from qipan.scheduler.asks import STRADDLED, asks_of, nearness
from qipan.twin import arrivals, build_world
from qipan.workload.reader import read_yaml
from qipan.workload.site import parse_site
from test_local_engine import Bench
from worlds import FAST, TARIFF, leaf, order

pytestmark = pytest.mark.computes
NODE, BLOCK = 4, 8


@pytest.mark.parametrize("seed", range(300))
def test_a_gang_does_not_straddle_while_a_block_has_room(seed):
    rng = random.Random(seed)
    free = sorted(rng.sample(range(24), rng.randint(1, 24)))
    count = rng.randint(1, len(free))
    got = nearest(free, count, (NODE, BLOCK))
    assert len(set(got)) == count
    assert set(got) <= set(free)
    for size in (NODE, BLOCK):
        room = max(len([device for device in free if device // size == block]) for block in range(24 // size))
        used = len({device // size for device in got})
        assert used == 1 or room < count, (free, count, got)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_takes_fewer_blocks(seed):
    rng = random.Random(seed)
    free = sorted(rng.sample(range(16), rng.randint(1, 10)))
    count = rng.randint(1, len(free))
    got = nearest(free, count, (2, 4))
    for size in (4,):
        fewest = min(len({device // size for device in one}) for one in combinations(free, count))
        assert len({device // size for device in got}) == fewest, (free, count, got)


def test_small_gangs_leave_whole_nodes_free():
    assert nearest([0, 1, 2, 3, 6, 7], 2, (NODE, BLOCK)) == (6, 7)


def test_a_gang_grows_beside_what_it_has():
    free = [2, 3, 4, 5, 6, 7, 8, 9]
    assert nearest(free, 2, (NODE, BLOCK), (0, 1)) == (2, 3)
    assert set(nearest(free, 4, (NODE, BLOCK), (0, 1))) <= {2, 3, 4, 5, 6, 7}
    assert len(nearest(free, 8, (NODE, BLOCK), (0, 1))) == 8


SITE = "board: {{name: dc, pools: [{{chip: sim/x, devices: 16, per_node: 4, per_block: {}, tariff: 1 CNY}}]}}"


def test_a_block_of_the_site_file_is_whole_nodes():
    assert parse_site(read_yaml(SITE.format(8), "s")).pools()[0].devices_per_block == 8
    with pytest.raises(InvalidInput, match="no whole number of nodes of 4"):
        parse_site(read_yaml(SITE.format(6), "s"))


def test_an_engine_gives_the_second_task_a_node_of_its_own(tmp_path):
    bench = Bench(tmp_path / "engine", pool=(4, 2))
    bench.reserve("true", 1, task="one")
    bench.reserve("true", 2, task="two")
    held = {task: lease.devices for task, lease in bench.engine.journal.held.items()}
    assert held == {"one": (0,), "two": (2, 3)}


# ---- above leaves: the blocks go up with the asks --------------------------------------------------------------------------

NODES_OF_4 = tuple(
    replace(leaf(name, 8), pools=(replace(leaf(name, 8).pools[0], devices_per_node=4),))
    for name in ("dc1", "dc2")
)


def test_an_offer_says_what_is_free_in_one_block():
    assert free_blocks([0, 1, 4, 5, 6], (NODE, BLOCK), 16) == (Block(4, 3), Block(8, 5))
    assert free_blocks([0, 1], (NODE, BLOCK), 8) == (Block(4, 2),), "all of them lie in one block"
    offer = Offer(FAST, 8, (AskStep(4, 0),), 4, TARIFF, blocks=(Block(4, 3), Block(8, 4)))
    assert nearness(offer, 3, 0) == 1.0
    assert nearness(offer, 4, 0) == STRADDLED, "it would fit into a node, and none has so many"
    assert nearness(offer, 3, 1) == STRADDLED, "one was ordered since"
    assert nearness(offer, 8, 0) == STRADDLED, "no node could hold it; a block could"


def two_children(first: tuple[Block, ...], second: tuple[Block, ...], tariff: int = TARIFF) -> State:
    state = State(BoardId("top"))
    for name, blocks, price in (("dc1", first, TARIFF), ("dc2", second, tariff)):
        offer = Offer(FAST, 8, (AskStep(4, 0),), 4, price, name, "east", blocks)
        decide(state, [EngineOffered(EngineId(name), (offer,), chooses=True)], Moment(0, 0))
    return state


@pytest.mark.parametrize(
    ("tariff", "goes_to"), [(TARIFF, "dc2"), (TARIFF * 11 // 10, "dc2"), (TARIFF * 19 // 10, "dc1")]
)
def test_a_gang_goes_to_the_child_that_has_a_whole_block_unless_that_is_far_dearer(tariff, goes_to):
    state = two_children((Block(4, 2),), (Block(4, 4),), tariff)
    task = TaskSubmitted(order("a", counts=(4,), objective="cost"), 0)
    [sent] = [
        sent for sent in decide(state, [task], Moment(1, 1)).commands if isinstance(sent.command, Reserve)
    ]
    assert sent.engine == goes_to


def test_blocks_go_up_through_a_board_between():
    state = two_children((Block(4, 2),), (Block(4, 4),))
    state.top = False
    assert {offer.site: offer.blocks for offer in asks_of(state, Moment(1, 1))} == {
        "dc1": (Block(4, 2),), "dc2": (Block(4, 4),),
    }  # fmt: skip


def test_in_a_tree_a_gang_goes_where_a_node_is_free():
    """Both centres have four devices free: dc1 two in each node, dc2 a whole node."""
    spec = BoardSpec(BoardId("cn"), children=(BoardSpec(BoardId("east"), children=NODES_OF_4),))
    world = build_world(spec, seed=1, topology=True)
    first = [order(name, counts=(count,), work_s=5000.0, elastic=False, regions=(site,))
             for name, count, site in (("a", 3, "dc1"), ("b", 3, "dc1"), ("c", 4, "dc2"))]  # fmt: skip
    gang = order("gang", counts=(2,), work_s=500.0, elastic=False, submitted_s=100.0)
    world.happenings = arrivals([*first, gang])
    world.run(until_s=150.0)
    offered = {board: world.tree.controllers[board].state.published[0].blocks for board in ("dc1", "dc2")}
    assert offered["dc1"] == (Block(4, 1),)
    nodes = {seat // 4 for seat in world.simulated("dc2").where[FAST]["gang"]}
    assert len(nodes) == 1
    world.run(until_s=50_000.0)
    assert set(world.tree.root.state.over.values()) == {"done"}
