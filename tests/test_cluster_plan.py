import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qipan.catalogue import load_catalogue
from qipan.hardware import ChipClassId
from qipan.host import plan_on
from qipan.planner.cluster import USABLE_MEMORY
from qipan.planner.costs import costs
from qipan.planner.space import space
from qipan.planner.useful import checkpoint_every_s, useful_share
from qipan.strategy import check_strategy
from qipan.workload.cards import CARDS
from qipan.workload.parse import load_task
from qipan.workload.site import load_site

CHIPS = load_catalogue().chips
H100 = CHIPS[ChipClassId("nvidia/h100-sxm5-80gb")]
LLAMA = CARDS["llama-3-70b"]


def test_llama_70b_gets_options_on_unlike_chips_with_odds_and_limits():
    task = load_task("examples/llama-70b.yaml")
    free = replace(task, limits=replace(task.limits, max_cost_micro_cny=None, deadline_s=None))
    plan = plan_on(load_site("examples/sites/three-vendors.yaml"), free)
    vendors = {option.chip_class.split("/")[0] for option in plan.options}
    assert vendors == {"nvidia", "huawei", "amd"}
    assert any(option.on_front for option in plan.options)
    for option in plan.options:
        assert math.isclose(sum(option.parts_s.values()), option.step_s)
        assert option.limit
        assert option.memory_bytes <= USABLE_MEMORY * CHIPS[ChipClassId(option.chip_class)].memory_bytes.value
    for point in plan.curve.points:
        check_strategy(point.strategy)


def test_odds_of_the_deadline_rise_with_the_deadline():
    task = load_task("examples/llama-70b.yaml")
    site = load_site("examples/sites/three-vendors.yaml")

    def odds(days: float) -> dict[str, float]:
        limits = replace(task.limits, max_cost_micro_cny=None, deadline_s=days * 86400)
        return {o.option_id: o.deadline_odds for o in plan_on(site, replace(task, limits=limits)).options}

    early, late = odds(100), odds(200)
    assert early
    for option_id, chance in early.items():
        assert 0.5 <= chance <= late[option_id] <= 1


def test_a_plan_for_four_pools_takes_under_a_second():
    task, site = load_task("examples/llama-70b.yaml"), load_site("examples/sites/three-vendors.yaml")
    started = time.process_time()
    plan_on(site, task)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("what", ["memory_bytes_per_s", "intra_node_bytes_per_s", "nic_bytes_per_s"])
def test_more_bandwidth_is_never_slower(what):
    layouts = space(LLAMA, 256, 512, 8)
    figure = getattr(H100, what)
    faster = replace(H100, **{what: replace(figure, value=figure.value * 1.5)})
    assert np.all(costs(layouts, LLAMA, faster, 8192).step_s <= costs(layouts, LLAMA, H100, 8192).step_s)


def test_layouts_that_cannot_fit_are_called_too_big():
    """By arithmetic: 16 bytes of weights, gradients and moments a weight (ZeRO 1 shards 12 of them)."""
    layouts = space(CARDS["llama-3.1-405b"], 64, 64, 8)
    found = costs(layouts, CARDS["llama-3.1-405b"], H100, 8192)
    least = 405e9 * 16 / 64
    assert least > H100.memory_bytes.value
    assert np.all(found.memory_bytes > H100.memory_bytes.value)


def test_useful_time_agrees_with_a_simulation_of_failures_and_checkpoints():
    for hours, save_s, restart_s in [(1, 20, 480), (5, 60, 300), (24, 20, 480), (100, 120, 900)]:
        rate = 1 / (hours * 3600)
        every_s = checkpoint_every_s(save_s, rate)
        simulated = _simulated(every_s, save_s, restart_s, rate, random.Random(f"useful {hours}"))
        assert useful_share(every_s, save_s, restart_s, rate) == pytest.approx(simulated, rel=0.01)


def test_llama_3_kept_more_than_nine_tenths_useful():
    rate = 2048 * 3.79e-3 / 86400
    assert useful_share(checkpoint_every_s(20, rate), 20, 480, rate) > 0.90


def _simulated(every_s: float, save_s: float, restart_s: float, rate: float, chance: random.Random) -> float:
    """60,000 segments, failure by failure; a restart may fail too."""
    spent = 0.0
    segments = 60_000
    for _ in range(segments):
        while True:
            failure_s = chance.expovariate(rate)
            if failure_s > every_s + save_s:
                spent += every_s + save_s
                break
            spent += failure_s
            while (again_s := chance.expovariate(rate)) < restart_s:
                spent += again_s
            spent += restart_s
    return segments * every_s / spent


def accuracy(tmp_path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planner_accuracy", "--json", str(out), *arguments],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_accuracy_on_published_runs(tmp_path):
    figures = accuracy(tmp_path)["figures"]
    missed = [figure["name"] for figure in figures if figure["holds"] is False]
    assert missed == []
    assert len(figures) > 20


def test_a_file_of_runs_alone_is_predicted_whatever_it_leaves_open(tmp_path):
    """No fit, no measurement: null fields are guessed, a chip that nobody knows is named."""
    model = {
        "name": "m", "layers": 32, "hidden": 4096, "ffn_hidden": 11008, "heads": 32, "kv_heads": None,
        "head_dim": None, "vocab": 32000, "seq_len": 4096, "gated_mlp": True, "tied_embeddings": False, "moe": None,
    }  # fmt: skip
    system = {"accelerator": "H100-SXM-80GB", "per_node": 8, "count": 64, "intra": None, "inter": None}
    stated = {
        "tp": 1,
        "pp": 1,
        "dp": 64,
        "micro_batch": 1,
        "global_batch": 256,
        "zero": 3,
        "recompute": "full",
    }
    open_ = dict.fromkeys(stated) | {"global_batch": 256}
    runs = [
        {"id": name, "group": "g", "model": model, "dtype": "bf16", "system": system | chip, "parallel": parallel}
        for name, chip, parallel in (
            ("stated", {}, stated), ("open", {}, open_), ("unknown", {"accelerator": "Abacus-1"}, stated),
        )
    ]  # fmt: skip
    path = tmp_path / "runs.yaml"
    path.write_text(json.dumps({"runs": runs}))
    answer = accuracy(tmp_path, "--runs", str(path), "--data", str(tmp_path / "none"))
    by_id = {row["id"]: row for row in answer["rows"]}
    assert set(by_id) == {"stated", "open"}
    assert "Abacus-1" in answer["setting"]["left_out"]["unknown"]
    for row in by_id.values():
        assert 1 < row["p10"] < row["step_time_s"] < row["p90"] < 60
    assert by_id["open"]["step_time_s"] <= by_id["stated"]["step_time_s"]  # the best of what it can mean
