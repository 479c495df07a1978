import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.scheduler.allocate import Bidder, Candidate, allocate

RESOURCES = ("a", "b", "c")


def instance(seed: int, tasks: int = 12) -> tuple[list[Bidder], dict[str, int]]:
    """A crowded cluster: three resources, gangs up to half of one, rates that fall off with devices."""
    rng = random.Random(seed)
    capacity = {key: rng.randint(8, 32) for key in RESOURCES}
    bidders = []
    for i in range(tasks):
        candidates = []
        for key in rng.sample(RESOURCES, rng.randint(1, 3)):
            speed, worth = rng.uniform(0.3, 1.0), rng.uniform(1, 10)
            counts = [2**k for k in range(rng.randint(0, 2), 5) if 2**k <= capacity[key] // 2]
            candidates += [Candidate(f"{key}:{n}", ((key, n),), worth * speed * n**0.8) for n in counts]
        bidders.append(Bidder(f"t{i:02d}", tuple(candidates)))
    return bidders, capacity


def total(bidders, allocation) -> float:
    value = {(bidder.task_id, one.point_id): one.value for bidder in bidders for one in bidder.candidates}
    return sum(value[item] for item in allocation.chosen.items())


@given(st.integers(0, 10**6), st.sampled_from([0, 10_000]))
@settings(max_examples=40, deadline=None)
def test_capacity_is_never_exceeded_and_the_order_of_bidders_does_not_matter(seed, exact_up_to):
    bidders, capacity = instance(seed)
    allocation = allocate(bidders, capacity, exact_up_to=exact_up_to)
    used = dict.fromkeys(RESOURCES, 0)
    needs = {(bidder.task_id, one.point_id): one.needs for bidder in bidders for one in bidder.candidates}
    for item in allocation.chosen.items():
        for key, devices in needs[item]:
            used[key] += devices
    assert all(used[key] <= capacity[key] for key in RESOURCES)
    assert allocate(bidders[::-1], capacity, exact_up_to=exact_up_to) == allocation


def test_the_heuristic_stays_close_to_the_exact_answer():
    gaps = []
    for seed in range(40):
        bidders, capacity = instance(seed)
        exact, greedy = (
            allocate(bidders, capacity, exact_up_to=10_000),
            allocate(bidders, capacity, exact_up_to=0),
        )
        if exact.method == "exact":
            gaps.append(1 - total(bidders, greedy) / total(bidders, exact))
    assert len(gaps) >= 30
    assert max(gaps) <= 0.06
    assert sum(gaps) / len(gaps) <= 0.02


def test_with_room_for_all_everybody_gets_the_best_point_and_devices_cost_nothing():
    bidders, _ = instance(1)
    allocation = allocate(bidders, dict.fromkeys(RESOURCES, 10_000))
    assert allocation.method == "free"
    assert set(allocation.shadow_price.values()) == {0.0}


def test_a_full_resource_has_a_price():
    bidders = [
        Bidder(name, (Candidate("a:1", (("a", 1),), value),)) for name, value in (("x", 3.0), ("y", 2.0))
    ]
    allocation = allocate(bidders, {"a": 1})
    assert allocation.chosen == {"x": "a:1"}
    assert allocation.shadow_price == {"a": 2.0}
