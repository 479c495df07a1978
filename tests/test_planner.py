from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.catalogue import load_catalogue
from qipan.console.sayings import say
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId, Probe
from qipan.planner import plan_task
from qipan.planner.costs import costs
from qipan.planner.plan import rank
from qipan.planner.space import space
from qipan.strategy import check_strategy
from qipan.workload import Limits
from qipan.workload.cards import CARDS
from qipan.workload.model import (
    hardware_flops_per_token,
    met_weights,
    parameter_count,
    tower_flops_per_token,
    train_flops_per_token,
)
from qipan.workload.parse import load_task, parse_task

PROBE = Probe(1e10, 10.0, 1e9, 1e-3, 0.02, 0.0, 0.2, 0.001)


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


def test_an_option_that_ends_when_the_chosen_one_does_says_so():
    option = plan_task(POEMS, tree(), vocab=2696).options[0]
    dearer = replace(option, option_id="other", cost_p50_micro_cny=option.cost_p50_micro_cny + 1_000_000)
    ranked = rank([option, dearer], lambda one: one.cost_p50_micro_cny)
    assert [one.why_not for one in ranked] == ["", "dearer by 1.00 CNY, ends at the same time"]
    assert say(ranked[1].why_not, "zh") == "贵 1.00 CNY，同时结束"
    sooner = rank([option, replace(dearer, finish_p50_s=1.0)], lambda one: one.cost_p50_micro_cny)[1]
    assert say(sooner.why_not, "zh").startswith("贵 1.00 CNY，早 ")


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


def test_a_script_for_several_nodes_gets_them_where_there_are_some_and_is_refused_where_there_are_too_few():
    task = parse_task(
        "kind: train\nname: a\nrun: x\ndevices: {min: 2, max: 2, per_node: 1}\nlimits: {time: 1h}\n"
    )
    two = plan_task(task, tree(devices=8)).curve
    assert two is not None
    assert two.points[0].needs[0].devices_per_node == 1
    one = plan_task(task, tree()).curve
    assert one is not None, "a machine of one node runs it once"
    three = replace(task, devices=replace(task.devices, min=3, max=3))
    assert (
        "needs 3 nodes with 1 device each, the pool has 2" in plan_task(three, tree(devices=8)).refused[0].why
    )


#: as published with the weights (Hugging Face model cards; OPT and GPT-2 as their checkpoints count)
PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma-7b": 8_537_680_896,
    "llava-1.5-7b": 7_063_427_072,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "phi-2": 2_779_683_840,
    "falcon-7b": 6_921_720_704,
    "bloom-176b": 176_247_271_424,
    "pythia-12b": 11_846_072_320,
    "gpt2-xl": 1_557_611_200,
    "opt-6.7b": 6_658_473_984,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("card", sorted(PUBLISHED_PARAMETERS))
def test_parameter_counts_are_the_published_ones(card):
    assert parameter_count(CARDS[card]) == PUBLISHED_PARAMETERS[card]


def test_a_tower_adds_its_weights_its_work_and_its_memory():
    plain, seeing = CARDS["llama-2-7b"], CARDS["llava-1.5-7b"]
    (clip,) = seeing.towers
    alone = replace(plain, name="clip", vocab=0, layers=0, towers=(replace(clip, projector=()),))
    assert (
        parameter_count(alone) - plain.hidden == 303_507_456
    )  # as published; the decoder's last norm is left
    whole = train_flops_per_token(seeing, 2048) - train_flops_per_token(replace(seeing, towers=()), 2048)
    attention = 12 * 24 * 1024 * 577
    assert whole == pytest.approx(0.5 * (6 * 324e6 + attention), rel=0.01)  # of half the tokens
    more = replace(seeing, towers=(replace(clip, share=1.0),))
    assert tower_flops_per_token(more) == pytest.approx(2 * tower_flops_per_token(seeing))
    h100 = load_catalogue().find("nvidia/h100-sxm5-80gb")
    layouts = space(seeing, 8, 64, 8, seq=2048)
    without, with_it = (costs(layouts, one, h100, 2048) for one in (replace(seeing, towers=()), seeing))
    assert (with_it.step_s > without.step_s).all()
    assert (with_it.memory_bytes > without.memory_bytes).all()


def test_flops_are_counted_in_three_named_ways():
    """A token meets 37 billion weights of DeepSeek-V3's 671 (its report, section 2), its embeddings left out."""
    assert met_weights(CARDS["deepseek-v3"]) == pytest.approx(37e9, rel=0.02)
    model = CARDS["llama-3-8b"]
    causal = train_flops_per_token(model, 8192)
    whole = hardware_flops_per_token(model, 8192, recompute=False)
    assert whole - causal == 6 * 32 * 4096 * 8192  # the masked half of the scores
    assert hardware_flops_per_token(model, 8192, recompute=True) > 1.25 * whole
