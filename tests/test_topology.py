"""Which devices a gang gets: never over two blocks while one has room, and of as few nodes as can be."""

import random
from itertools import combinations

import pytest

from qipan.engines.topology import nearest
from qipan.errors import InvalidInput
from qipan.workload.reader import read_yaml
from qipan.workload.site import parse_site
from test_local_engine import Bench

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
    with pytest.raises(InvalidInput, match="not whole nodes of 4"):
        parse_site(read_yaml(SITE.format(6), "s"))


def test_an_engine_gives_the_second_task_a_node_of_its_own(tmp_path):
    bench = Bench(tmp_path / "engine", pool=(4, 2))
    bench.reserve("true", 1, task="one")
    bench.reserve("true", 2, task="two")
    held = {task: lease.devices for task, lease in bench.engine._held.items()}
    assert held == {"one": (0,), "two": (2, 3)}
