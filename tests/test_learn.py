"""Measured steps correct the constants, and what they taught at one layout holds for others."""

import json
import math
from dataclasses import replace

import pytest

from api_site import served
from qipan.engines.reading import parse
from qipan.errors import Unreachable
from qipan.events import TaskProgress
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId, Probe
from qipan.leases import EngineId, TaskId, Usage
from qipan.planner import plan_task
from qipan.planner.experience import beliefs, seen_in
from qipan.planner.learn import Seen, corrected_s, factors, observe, planned, prior
from qipan.planner.steps import Layout, Timed, calibrated, step_s
from qipan.trainer.probe import cases
from qipan.workload.model import Model
from qipan.workload.parse import load_task

ALONE = {"compute": 9.0, "links inside a node": 0.5, "network between nodes": 0.2, "memory bandwidth": 0.3}
WIDE = {"compute": 2.0, "links inside a node": 0.5, "network between nodes": 3.0, "memory bandwidth": 0.3}


def truth(parts: dict[str, float], compute: float, transfer: float) -> float:
    factors = {"compute": compute, "links inside a node": transfer, "network between nodes": transfer}
    return sum(seconds * factors.get(part, 1.0) for part, seconds in parts.items())


def test_two_layouts_tell_compute_from_transfers_and_a_third_is_predicted():
    belief = planned(0.75, 1.29)
    third = {"compute": 4.0, "network between nodes": 4.0}
    wanted = truth(third, 1.2, 1.6)
    before = abs(math.log(corrected_s(belief, third)[1] / wanted))
    belief = observe(belief, [Seen(ALONE, truth(ALONE, 1.2, 1.6)), Seen(WIDE, truth(WIDE, 1.2, 1.6))] * 10)
    low, middle, high = corrected_s(belief, third)
    assert middle == pytest.approx(wanted, rel=0.05)
    assert abs(math.log(middle / wanted)) < before / 4
    assert low < wanted < high


def test_the_band_narrows_with_what_was_seen_and_never_below_a_layouts_own_deviation():
    belief = planned(0.75, 1.29)
    widths = []
    for _ in range(5):
        low, _, high = corrected_s(belief, ALONE)
        widths.append(high / low)
        belief = observe(belief, [Seen(ALONE, 10.0, 20)])
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] > math.exp(2 * 1.2816 * 0.05)


def test_a_factor_that_a_layout_hardly_uses_is_hardly_moved():
    belief = observe(planned(0.75, 1.29), [Seen(ALONE, 15.0, 10)])
    assert belief.mean[0] > 0.2
    assert abs(belief.mean[1]) < belief.mean[0] / 2


def test_many_steps_at_once_teach_what_they_teach_one_by_one():
    seen = [Seen(ALONE, 12.0), Seen(WIDE, 8.0)]
    one = observe(observe(prior({"compute": 1.5, "transfer": 2, "fixed": 2}), seen[:1]), seen[1:])
    both = observe(prior({"compute": 1.5, "transfer": 2, "fixed": 2}), seen)
    assert factors(one)["compute"] == pytest.approx(factors(both)["compute"], rel=0.05)


SLOW = Probe(
    1e10, 3.0, 4e8, 5e-4, 0.02, 0.0, launch_s=2e-3, product_flops_per_s=3e10, pass_bytes_per_s=1e9, weight_s=2e-8,
    dispatch_s=3e-2, bubble_share=0.7,
)  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_twenty_steps_find_a_devices_constants_well_enough_for_models_they_never_saw(ranks):
    timed = [
        Timed(layout, model, rows, seq, step_s(layout, model, SLOW, rows, seq))
        for model, layout, rows, seq in cases(ranks)
    ]
    lone = replace(SLOW, collective_bytes_per_s=1e9)  # a collective alone is faster than one beside computing
    found = calibrated(lone, timed)
    other = Model("other", 6, 256, 8, 8, 32, 768, 1024)
    for layout in (Layout(1, ranks, 0), Layout(1, ranks, 0, recompute="full"), Layout(1, ranks, 3)):
        wanted = step_s(layout, other, SLOW, 8 * ranks, 128)
        assert step_s(layout, other, found, 8 * ranks, 128) == pytest.approx(wanted, rel=0.2)


SITE = BoardSpec(
    BoardId("dc"), region="cn-east",
    pools=(Pool(PoolId("dc/sim"), BoardId("dc"), ChipClassId("sim/a"), 4, 4, 600_000, probe=SLOW),),
)  # fmt: skip
POEMS = load_task("examples/train-poems.yaml")


def told(option, step, measured_s) -> TaskProgress:
    usage = Usage(
        TaskId("poems-1"), 1, option.place, EngineId("dc"), ChipClassId("sim/a"), option.devices, option.point_id,
        0.0, 1.0, 1.0, False,
    )  # fmt: skip
    detail = json.dumps({"event": "progress", "step": step, "step_s": measured_s})
    return TaskProgress(TaskId("poems-1"), EngineId("dc"), 1, 1.0, 0.0, detail, usage)


def test_the_next_plan_at_a_site_is_nearer_to_what_tasks_there_took():
    before = plan_task(POEMS, SITE, vocab=2696)
    ran = before.options[0]
    facts = [told(ran, step, 1.5 * ran.step_s) for step in range(30)]
    lessons = seen_in(before, [*facts, replace(facts[0], detail='{"event": "ready"}')])
    assert [place for place, _ in lessons] == [("dc", "sim/a")]
    after = plan_task(POEMS, SITE, vocab=2696, learned=beliefs(lessons))
    now = next(option for option in after.options if option.point_id == ran.point_id)
    assert now.step_s == pytest.approx(1.5 * ran.step_s, rel=0.1)
    assert now.finish_p90_s / now.finish_p10_s < ran.finish_p90_s / ran.finish_p10_s
    assert "tasks that ended here" in now.source
    assert now.before_s == ran.parts_s  # so that the next lesson is not about the corrected plan
    again = seen_in(after, [told(now, step, 1.5 * ran.step_s) for step in range(30)])
    assert again[0][1].parts_s == lessons[0][1].parts_s


def test_a_script_that_tells_no_step_time_teaches_nothing():
    plan = plan_task(POEMS, SITE, vocab=2696)
    fact = replace(told(plan.options[0], 1, 1.0), detail="")
    assert seen_in(plan, [fact]) == []


@pytest.mark.parametrize("told_s", ["0.5", None, True, [1], -1.0, 0, math.nan, math.inf, 10**400, 1e300])
def test_a_script_that_tells_no_number_of_seconds_teaches_nothing_and_stops_nobody(told_s):
    plan = plan_task(POEMS, SITE, vocab=2696)
    option = plan.options[0]
    assert seen_in(plan, [told(option, 1, told_s)]) == []
    ((_, seen),) = seen_in(plan, [told(option, 1, told_s), told(option, 2, 2 * option.step_s)])
    assert (seen.measured_s, seen.reports) == (2 * option.step_s, 1)


@pytest.mark.parametrize("detail", ["\ufeff{}", "[", "[" * 100_000, "[1]", "7", ""])
def test_a_line_that_is_no_object_teaches_nothing(detail):
    plan = plan_task(POEMS, SITE, vocab=2696)
    assert seen_in(plan, [replace(told(plan.options[0], 1, 1.0), detail=detail)]) == []
    assert parse(detail.encode()) == {}, "nor does it stop the engine"


def test_lessons_that_were_cut_off_are_read_again(tmp_path, monkeypatch):
    with served(tmp_path) as host:
        monkeypatch.setattr(host.store, "newest_of_kind", lambda _kind, after, _most: [(after + 1, "tiny-1")])
        monkeypatch.setattr(host.store, "fact_count", lambda: 9)
        with monkeypatch.context() as patch:
            patch.setattr(host.store, "submission", fails)
            with pytest.raises(Unreachable):
                host.intake.lessons.learned()
        assert host.intake.lessons._learned_to == 0
        host.intake.lessons.learned()
        assert host.intake.lessons._learned_to == 9


def fails(_task_id: str) -> None:
    raise Unreachable("the database went away")
