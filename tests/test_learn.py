"""Progress corrects the constants, and what it taught at one layout holds for others."""

import math

import pytest

from qipan.curves import Curve, Need, Point
from qipan.hardware import ChipClassId
from qipan.planner.learn import corrected, corrected_s, observe, prior

ALONE = {"compute": 9.0, "links inside a node": 0.5, "network between nodes": 0.2, "memory bandwidth": 0.3}
WIDE = {"compute": 2.0, "links inside a node": 0.5, "network between nodes": 3.0, "memory bandwidth": 0.3}
CHIP = ChipClassId("a/b")


def truth(parts: dict[str, float], compute: float, transfer: float) -> float:
    factors = {"compute": compute, "links inside a node": transfer, "network between nodes": transfer}
    return sum(seconds * factors.get(part, 1.0) for part, seconds in parts.items())


def test_two_layouts_tell_compute_from_transfers_and_a_third_is_predicted():
    belief = prior(0.75, 1.29)
    third = {"compute": 4.0, "network between nodes": 4.0}
    wanted = truth(third, 1.2, 1.6)
    before = abs(math.log(corrected_s(belief, third)[1] / wanted))
    for _ in range(10):
        belief = observe(belief, ALONE, truth(ALONE, 1.2, 1.6))
        belief = observe(belief, WIDE, truth(WIDE, 1.2, 1.6))
    low, middle, high = corrected_s(belief, third)
    assert middle == pytest.approx(wanted, rel=0.05)
    assert abs(math.log(middle / wanted)) < before / 4
    assert low < wanted < high


def test_the_band_narrows_with_what_was_seen_and_never_below_a_layouts_own_deviation():
    belief = prior(0.75, 1.29)
    widths = []
    for _ in range(5):
        low, _, high = corrected_s(belief, ALONE)
        widths.append(high / low)
        belief = observe(belief, ALONE, 10.0, reports=20)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] > math.exp(2 * 1.2816 * 0.05)


def test_a_factor_that_a_layout_hardly_uses_is_hardly_moved():
    belief = observe(prior(0.75, 1.29), ALONE, 15.0, reports=10)
    assert belief.mean[0] > 0.2
    assert abs(belief.mean[1]) < belief.mean[0] / 2


def test_a_corrected_curve_is_normalised_by_its_best_point():
    points = tuple(
        Point(name, (Need(CHIP, count),), rate, rate * 0.7, rate * 1.3) for name, count, rate in (("a", 1, 0.4), ("b", 4, 1.0))
    )  # fmt: skip
    curve = Curve(points, 1000.0)
    belief = prior(0.75, 1.29)
    for _ in range(10):
        belief = observe(belief, WIDE, truth(WIDE, 1.0, 2.0), reports=10)
    found = corrected(curve, belief, {"a": ALONE, "b": WIDE})
    assert found.source == "progress"
    assert max(point.rate for point in found.points) == pytest.approx(1.0)
    slower = truth(WIDE, 1.0, 2.0) / sum(WIDE.values())
    assert found.work_s == pytest.approx(1000.0 * slower, rel=0.06)
    assert found.point("a").rate > 0.5  # it suffers less from slow transfers
    for point in found.points:
        assert point.rate_p10 < point.rate < point.rate_p90
