from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId, Probe
from qipan.planner import plan_task
from qipan.strategy import check_strategy
from qipan.workload import Limits
from qipan.workload.cards import CARDS
from qipan.workload.model import parameter_count
from qipan.workload.parse import load_task, parse_task

PROBE = Probe(1e10, 10.0, 1e9, 1e-3, 0.02, 0.0, 0.2, 0.01)


def tree(**changes: object) -> BoardSpec:
    pool = Pool(PoolId("dc/sim"), BoardId("dc"), ChipClassId("sim/a"), 4, 4, 600_000, probe=PROBE)
    return BoardSpec(BoardId("dc"), pools=(replace(pool, **changes),), region="cn-east")  # type: ignore[arg-type]


POEMS = load_task("examples/train-poems.yaml")


def test_every_point_of_the_curve_has_a_strategy_that_the_trainer_accepts():
    plan = plan_task(POEMS, tree(), vocab=2696)
    assert plan.curve is not None
    for point in plan.curve.points:
        assert point.strategy is not None
        check_strategy(point.strategy)
    assert max(point.rate for point in plan.curve.points) == pytest.approx(1.0)


def test_an_option_says_what_it_costs_when_it_ends_and_why_not():
    plan = plan_task(POEMS, tree(), vocab=2696)
    for option in plan.options:
        assert option.finish_p10_s < option.finish_p50_s < option.finish_p90_s
        assert option.cost_p50_micro_cny > 0
        assert bool(option.why_not) == (option.option_id != plan.chosen)
    assert any(option.on_front for option in plan.options)


@given(st.floats(1.1, 100))
@settings(max_examples=30, deadline=None)
def test_more_bandwidth_is_never_slower_and_a_higher_tariff_never_cheaper(factor):
    def best(root):
        return min(option.step_s for option in plan_task(POEMS, root, vocab=2696).options)

    def cost(root):
        return [
            option.cost_p50_micro_cny
            for option in sorted(plan_task(POEMS, root, vocab=2696).options, key=lambda o: o.devices)
        ]

    faster = replace(PROBE, collective_bytes_per_s=PROBE.collective_bytes_per_s * factor)
    assert best(tree(probe=faster)) <= best(tree())
    unlimited = replace(POEMS, limits=Limits())
    dear = plan_task(unlimited, tree(tariff_micro_cny_per_device_hour=round(600_000 * factor)), vocab=2696)
    plain = plan_task(unlimited, tree(), vocab=2696)
    assert sum(o.cost_p50_micro_cny for o in dear.options) > sum(o.cost_p50_micro_cny for o in plain.options)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(regions=("eu-*",)), "limits.regions"),
        (Limits(chips=("nvidia/*",)), "limits.chips"),
        (Limits(vendors=("huawei",)), "limits.vendors"),
        (Limits(deadline_s=1.0), "limits.deadline"),
        (Limits(max_cost_micro_cny=1), "limits.max_cost"),
    ],
)
def test_a_limit_that_excludes_everything_is_named(limits, message):
    plan = plan_task(replace(POEMS, limits=limits), tree(), vocab=2696)
    assert not plan.options
    assert plan.curve is None
    assert message in plan.refused[0].why


@pytest.mark.parametrize("name", ["serve-llama.yaml"])
def test_kinds_that_cannot_run_yet_say_so(name):
    plan = plan_task(load_task(f"examples/{name}"), tree())
    assert "not yet runnable" in plan.refused[0].why


def test_a_script_has_one_point_a_chip_class_from_its_time_limit():
    plan = plan_task(load_task("examples/tiny.yaml"), tree())
    assert plan.curve is not None
    assert plan.curve.source == "time limit"
    assert [point.devices for point in plan.curve.points] == [1]


def test_an_elastic_script_has_a_point_for_each_count():
    task = parse_task(
        "kind: train\nname: a\nrun: x\nelastic: true\ndevices: {min: 1, max: 3}\nlimits: {time: 1h}\n"
    )
    plan = plan_task(task, tree())
    assert plan.curve is not None
    assert [point.devices for point in plan.curve.points] == [1, 2, 3]


@pytest.mark.parametrize(
    ("card", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_parameter_counts_are_the_published_ones(card, parameters):
    assert parameter_count(CARDS[card]) == parameters
