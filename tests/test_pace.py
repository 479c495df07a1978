"""Which rank is slow, told by a pure rule from what ranks say of their speed."""

from qipan.clock import named_random
from qipan.engines.pace import Pace


def told(groups, reports):
    """The last answer over reports one second apart."""
    pace, found = Pace(tuple(groups)), {}
    for second, rates in enumerate(reports):
        found = pace.slow(float(second), rates)
    return {rank: round(share, 9) for rank, share in found.items()}


def test_the_one_slow_rank_of_a_gang_is_named_with_its_share_within_a_minute():
    assert told([range(4)], [(100.0, 102.0, 49.0, 98.0)] * 12) == {2: 0.49}


def test_it_takes_ten_seconds_so_that_a_long_step_is_noise():
    even, slow = (100.0, 100.0, 100.0), (100.0, 100.0, 40.0)
    assert told([range(3)], [slow] * 9) == {}
    assert told([range(3)], [*[even] * 9, (100.0, 100.0, 1.0), even, even]) == {}
    assert told([range(3)], [*[even] * 20, *[slow] * 11]) == {2: 0.4}


def test_stages_with_unlike_parts_of_the_model_are_not_compared():
    assert told([range(2), range(2, 4)], [(100.0, 100.0, 30.0, 30.0)] * 12) == {}
    assert told([range(2), range(2, 4)], [(100.0, 100.0, 30.0, 15.0)] * 12) == {3: 0.5}


def test_of_two_the_slower_one_is_meant_and_one_alone_has_no_measure():
    assert told([range(2)], [(100.0, 60.0)] * 12) == {1: 0.6}
    assert told([range(1)], [(10.0,)] * 12) == {}


def test_ranks_that_say_nothing_of_their_speed_are_not_judged():
    assert told([range(3)], [(100.0, 0.0, 100.0)] * 12) == {}
    assert told([range(3)], [(100.0,)] * 12) == {}


def test_noise_of_a_fifth_names_nobody_and_a_rank_at_half_speed_is_always_named():
    for seed in range(200):
        rng = named_random(seed, "noise")
        speeds = [100.0, 100.0, 100.0, 100.0 if seed % 2 else 50.0]
        reports = [[speed * rng.uniform(0.85, 1.05) for speed in speeds] for _ in range(15)]
        assert list(told([range(4)], reports)) == ([] if seed % 2 else [3])
