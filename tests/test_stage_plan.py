"""The plan of a task with stages: how many workers feed a stage, what each costs, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from qipan.cli import tables
from qipan.errors import Infeasible
from qipan.planner.stages import rate_in, stream_text, workers_needed
from qipan.planning import plan_on, plan_staged
from qipan.workload.parse import parse_task
from qipan.workload.site import load_site

pytestmark = pytest.mark.timeout(120)
EXAMPLES = Path(__file__).parent.parent / "examples"


def site():
    return load_site(EXAMPLES / "sites" / "stages.yaml")


def staged(rate: float = 700, taken: float = 1200):
    text = (EXAMPLES / "stages.yaml").read_text()
    return parse_task(
        text.replace("_per_s: 900", f"_per_s: {rate}").replace("_per_s: 400", f"_per_s: {taken}")
    )


def test_the_plan_takes_as_many_workers_as_keep_the_fed_stage_from_waiting():
    plan = plan_on(site(), staged())
    [flow] = plan.flows
    assert (flow.workers, flow.workers_needed, flow.wait_share, flow.limit) == (2, 2, 0.0, "learn")
    learn = plan.stages[1]
    assert learn.ends_s == pytest.approx(6400 / 1200, rel=0.2)
    assert [stage.begins_s for stage in plan.stages] == [0.0, 0.0, learn.ends_s]
    assert plan.options[0].finish_p50_s == plan.options[1].finish_p50_s, "what streams ends together"


def test_the_plan_says_when_preparation_limits_and_for_how_long_it_is_waited_for():
    [flow] = plan_on(site(), staged(rate=150)).flows
    assert (flow.workers, flow.workers_needed, flow.limit) == (4, 9, "prepare")
    assert flow.text.endswith("learn waits 50% of its time, limited by prepare; 9 workers would end that")
    assert flow.wait_share == pytest.approx(0.5)
    slow, quick = plan_on(site(), staged(rate=150)), plan_on(site(), staged())
    ratio = slow.options[1].finish_p50_s / quick.options[1].finish_p50_s
    assert ratio == pytest.approx(2.0), "a stage that waits half of its time takes twice as long"


def test_what_an_earlier_run_measured_goes_before_what_is_stated():
    measured = {("poems-in-stages", "prepare", "cpu/core"): 450.0}
    [flow] = plan_on(site(), staged(), rates=measured).flows
    assert (flow.workers, flow.made_per_s, flow.made_source) == (3, 450.0, "measured in earlier runs")


def test_rates_that_nobody_knows_are_said_to_be_unknown():
    text = (EXAMPLES / "stages.yaml").read_text().replace("    samples_per_s: 400", "    elastic: false")
    [flow] = plan_on(site(), parse_task(text)).flows
    assert (flow.workers, flow.workers_needed, flow.wait_share) == (1, None, None)
    assert flow.text.endswith("is not known: state samples_per_s of learn, or run it once")


def test_money_is_shared_by_cost_and_stages_that_cost_too_much_are_refused():
    parts = plan_staged(site(), staged()).parts
    shares = [task.limits.max_cost_micro_cny for task, _ in parts.values()]
    assert sum(shares) == pytest.approx(1_000_000, abs=3)
    poor = replace(staged(), limits=replace(staged().limits, max_cost_micro_cny=10))
    with pytest.raises(Infeasible, match=r"its stages cost .* limits.max_cost is"):
        plan_on(site(), poor)


def test_stages_that_start_together_and_find_no_room_at_once_are_refused_by_name():
    text = (EXAMPLES / "stages.yaml").read_text().replace("chips: cpu", "chips: sim/yan-1")
    with pytest.raises(
        Infeasible, match="prepare and learn start together, and no places have devices for all at once"
    ):
        plan_on(site(), parse_task(text))


def test_many_stages_that_start_together_and_find_no_room_are_refused_soon(tmp_path):
    (tmp_path / "site.yaml").write_text(
        "site: {board: {name: dc, pools: [{chip: sim/a, devices: 1, tariff: 1 CNY}, {chip: cpu/core, devices: 64, tariff: 1 CNY}]}}"
    )
    stage = "feeds: learn, samples: 1000, samples_per_s: 10"
    feeders = [
        f"{{name: f{n:02d}, run: f, chips: cpu, {stage}, devices: {{min: 1, max: 8}}}}" for n in range(14)
    ]
    rest = [
        f"{{name: last, run: f, chips: sim/a, {stage}}}",
        "{name: learn, kind: train, run: f, chips: sim/a}",
    ]
    text = f"{{kind: train, name: many, stages: [{', '.join([*feeders, *rest])}]}}"
    with pytest.raises(Infeasible, match="no places have devices for all at once"):
        plan_on(load_site(tmp_path / "site.yaml"), parse_task(text))


def test_people_see_the_stages_of_a_plan_and_which_part_a_decision_is_about(capsys):
    plan = plan_on(site(), staged())
    tables.print_plan(plan)
    tables.print_submitted({"task_id": "t-1", "directives": [], "plan": msgspec.to_builtins(plan)})
    decision = {"at_s": 1.0, "board": "cn", "verdict": "placed", "text": "there", "task_id": "t-1.learn"}
    tables.print_why({"task_id": "t-1", "state": "running", "decisions": [decision], "waiting": []})
    told = capsys.readouterr().out
    assert re.search(r"evaluate +after learn +shanghai +sim/yan-1 +1 ", told)
    assert re.search(r"cpu/core +1 .* learn would wait 42% of its time", told)
    assert told.count("2 workers are needed so that learn never waits") == 2
    assert "planned prepare on 2 x cpu/core, learn on 1 x sim/yan-1" in told
    assert re.search(r"cn +learn +placed +there", told)


def test_how_many_workers_are_needed_leaves_what_rates_are_off_by():
    assert workers_needed(100, 95) == 1
    assert workers_needed(100, 100) == 2
    assert workers_needed(30, 100) == 4


def test_what_both_ends_told_becomes_one_sentence():
    text = stream_text(
        "t.learn", {"wait_share": 0.31, "samples_per_s": 100.0}, "t.prepare", {"samples_per_s_per_device": 34.5, "workers": 2}
    )  # fmt: skip
    assert text.endswith("2 workers prepare 69.0/s; it takes 100.0/s: 4 workers would keep it busy")
    assert stream_text("t.learn", {}, "t.prepare", {}) == ""
    assert rate_in([]) == {}
