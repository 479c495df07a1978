"""Scenario files: what they may say, what a run tells, and `why` inside one."""

from pathlib import Path

import pytest

from qipan.errors import InvalidInput, NotFound
from qipan.twin.picture import write_files
from qipan.twin.scenario import load_scenario, run_scenario, why_in_scenario

SITE = """
site:
  lease: 5m
  board:
    name: cn
    children:
      - {name: east, region: cn-east, engine: simulated, pools: [{chip: sim/a, devices: 8, per_node: 8, tariff: 9 CNY}, {chip: sim/b, devices: 8, per_node: 8, tariff: 4 CNY}]}
      - {name: west, region: cn-west, engine: simulated, pools: [{chip: sim/b, devices: 8, per_node: 8, tariff: 3 CNY}]}
scenario:
  hours: 4
  mean_work: 20m
  speeds: {sim/a: 1.0, sim/b: 0.5}
"""


def scenario(folder: Path, more: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(SITE + more)
    return path


def test_a_data_centre_goes_dark_another_is_cut_off_and_all_tasks_end(tmp_path):
    path = scenario(
        tmp_path,
        "  tasks: 20\n  tide: 0.5\n  kills: 2\n  outages: [{board: east, at: 1h, for: 20m}]\n"
        "  partitions: [{board: west, at: 2h, for: 3m}]\n",
    )
    told = run_scenario(path, 3, "jct")
    assert told["figures"]["done"] == 20
    assert told["policy"] == "jct"
    dark = told["series"]["leased_share"]["east"][7]
    assert dark == 0.0, "nothing is leased where there is no power"
    made = write_files(told, tmp_path / "out")
    assert {file.name for file in made} >= {"report.json", "tasks.csv", "report.html"}
    assert "east, hour" in (tmp_path / "out" / "report.html").read_text()


def test_another_policy_tells_another_story(tmp_path):
    path = scenario(tmp_path, "  tasks: 25\n")
    ends = {
        name: [task["ended_s"] for task in run_scenario(path, 1, name)["tasks"]] for name in ("fifo", "jct")
    }
    assert ends["fifo"] != ends["jct"]
    assert run_scenario(path, 1, "jct")["tasks"] == run_scenario(path, 1, "jct")["tasks"], "by seed alone"


def test_why_answers_inside_a_scenario(tmp_path):
    path = scenario(tmp_path, "  tasks: 20\n  policy: fifo\n")
    rows = run_scenario(path, 2)["tasks"]
    last = max(rows, key=lambda row: (row["started_s"] or 0.0) - row["submitted_s"])
    whole = why_in_scenario(path, 2, None, last["task_id"], None)
    assert whole["state"] == "done"
    assert "placed" in {entry["verdict"] for entry in whole["decisions"]}
    if last["started_s"] - last["submitted_s"] > 60.0:
        then = why_in_scenario(path, 2, None, last["task_id"], last["submitted_s"] + 5.0)
        assert then["waiting"], "it waits, and is told for what"
    with pytest.raises(NotFound, match="task-00000"):
        why_in_scenario(path, 2, None, "nobody", None)


def test_submissions_come_from_a_trace(tmp_path):
    (tmp_path / "trace.csv").write_text(
        "job_id,vc,submit_s,duration_s,num_accelerators\n1,x,0,600,4\n2,y,10,300,2\n3,y,20,300,900\n"
    )
    told = run_scenario(scenario(tmp_path, "  trace: trace.csv\n"), 0)
    assert [task["task_id"] for task in told["tasks"]] == ["job-1", "job-2"], "the third fits nowhere"
    assert told["figures"]["done"] == 2


def test_a_wrong_scenario_is_told_where(tmp_path):
    with pytest.raises(InvalidInput, match="policy"):
        load_scenario(scenario(tmp_path, "  policy: magic\n"))
    with pytest.raises(InvalidInput, match="no such board"):
        load_scenario(scenario(tmp_path, "  outages: [{board: north, at: 1h, for: 1m}]\n"))
    with pytest.raises(NotFound, match="no such trace"):
        run_scenario(scenario(tmp_path, "  trace: none.csv\n"), 0)


def test_the_ten_clusters_are_read():
    found = load_scenario(Path(__file__).parent.parent / "examples" / "hubs.yaml")
    assert len([board for board in found.site.root.walk() if board.pools]) == 10
    assert len(found.site.root.children) == 8
