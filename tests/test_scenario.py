"""Scenario files: what they may say, what a run tells, and `why` inside one."""

from pathlib import Path

import pytest

from qipan.errors import InvalidInput, NotFound
from qipan.events import ElectricityPriced, TaskSubmitted
from qipan.leases import TaskId
from qipan.scheduler import Moment, Phase, decide
from qipan.scheduler.limits import why_waiting_text
from qipan.twin.picture import write_files
from qipan.twin.scenario import load_scenario, run_scenario, why_in_scenario
from test_scheduler import ENGINE, leaf_state
from worlds import FAST, TARIFF, order

pytestmark = pytest.mark.computes

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


POWER = (
    "  tasks: 15\n  watts: {sim/a: 1000, sim/b: 500}\n"
    '  electricity: [{board: cn, price: 0.5 CNY}, {board: east, hours: "01:00-03:00", price: 90 CNY}]\n'
)


def test_electricity_is_counted_and_dear_hours_send_work_elsewhere(tmp_path):
    plain = run_scenario(scenario(tmp_path, POWER.replace("90 CNY", "0.5 CNY")), 3)
    dear = run_scenario(scenario(tmp_path, POWER), 3)
    west = next(row for row in plain["clusters"] if row["cluster"] == "west")
    assert west["electricity_kwh"] == pytest.approx(west["device_hours"] * 0.5, rel=0.02)
    assert west["electricity_cny"] == pytest.approx(west["electricity_kwh"] * 0.5, rel=0.02)

    def begun_in_dear_hours(told):
        return sum(
            "east" in row["where"].split()[0] and 3600 <= row["started_s"] < 10_800 for row in told["tasks"]
        )

    assert begun_in_dear_hours(dear) < begun_in_dear_hours(plain)
    assert dear["figures"]["done"] == 15, "what waits for cheaper hours gets them"


def test_what_waits_for_cheap_electricity_is_told_so():
    state = leaf_state(8)
    price = ElectricityPriced(ENGINE, ((FAST, 10 * TARIFF),))
    decide(state, [price, TaskSubmitted(order("a", counts=(4,)), 0)], Moment(1, 1))
    task = state.tasks[TaskId("a")]
    assert task.phase is Phase.QUEUED
    assert "electricity for 4 devices at dc costs 40.0000 CNY/h beyond the tariff now" in why_waiting_text(
        state, task, 1.0
    )
    decide(state, [ElectricityPriced(ENGINE, ())], Moment(2, 2))
    assert state.tasks[TaskId("a")].phase is Phase.RESERVING


def test_wrong_electricity_is_told_where(tmp_path):
    with pytest.raises(InvalidInput, match="what a device of sim/a, sim/b draws is not known"):
        load_scenario(scenario(tmp_path, "  electricity: [{board: cn, price: 1 CNY}]\n"))
    with pytest.raises(InvalidInput, match="no whole hours"):
        load_scenario(scenario(tmp_path, POWER.replace("01:00", "01:30")))


STORM = (
    "  tasks: 25\n  tide: 0.5\n  kills: 6\n  crashes: 2\n  lose: 0.03\n"
    "  outages: [{board: east, at: 1h, for: 50m}]\n  partitions: [{board: west, at: 80m, for: 20m}]\n"
)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_two_runs_from_one_snapshot_are_one(tmp_path, seed):
    """It is taken while one data centre has no power and another is cut off."""
    path, written = scenario(tmp_path, STORM), tmp_path / "at-90m"
    whole = run_scenario(path, seed, snapshot_at_s=5400.0, snapshot=written)
    assert whole["figures"]["done"] == 25
    first, second = (run_scenario(path, 0, start_from=written) for _ in range(2))
    assert first == second
    assert (first["seed"], first["figures"]["done"]) == (seed, 25)
    before = [(task["task_id"], task["ended_s"]) for task in whole["tasks"] if task["ended_s"] <= 5400]
    assert before
    assert set(before) <= {(task["task_id"], task["ended_s"]) for task in first["tasks"]}
    shares = [told["series"]["leased_share"]["west"][:9] for told in (whole, first)]
    assert shares[0] == shares[1], "what was is what it was"


def test_from_a_snapshot_on_another_policy_and_other_faults_tell_another_story(tmp_path):
    path, written = scenario(tmp_path, "  tasks: 14\n"), tmp_path / "at-1h"
    run_scenario(path, 1, "fifo", snapshot_at_s=3600.0, snapshot=written)
    same = run_scenario(path, 1, "fifo", start_from=written)
    other = run_scenario(path, 1, "jct", start_from=written)
    dark = run_scenario(
        scenario(tmp_path, "  tasks: 14\n  outages: [{board: east, at: 2h, for: 1h}]\n"),
        1,
        "fifo",
        start_from=written,
    )
    ends = [[task["ended_s"] for task in told["tasks"]] for told in (same, other, dark)]
    assert ends[0] != ends[1]
    assert ends[0] != ends[2]
    assert dark["series"]["leased_share"]["east"][13] == 0.0


def test_a_snapshot_that_the_scenario_could_not_have_come_to_is_refused(tmp_path):
    path, written = scenario(tmp_path, "  tasks: 5\n"), tmp_path / "at-1h"
    run_scenario(path, 1, snapshot_at_s=3600.0, snapshot=written)
    with pytest.raises(InvalidInput, match=r"other tasks would have come by 60\.0m"):
        run_scenario(scenario(tmp_path, "  tasks: 5\n  tide: 0.9\n"), 1, start_from=written)
    renamed = scenario(tmp_path, "  tasks: 5\n")
    renamed.write_text(renamed.read_text().replace("name: west", "name: north"))
    with pytest.raises(InvalidInput, match="the scenario has the boards cn, east, north, the snapshot"):
        run_scenario(renamed, 1, start_from=written)
    larger = scenario(tmp_path, "  tasks: 5\n")
    larger.write_text(
        larger.read_text().replace(
            "{chip: sim/b, devices: 8, per_node: 8, tariff: 3",
            "{chip: sim/b, devices: 12, per_node: 8, tariff: 3",
        )
    )
    with pytest.raises(InvalidInput, match="its boards have other devices, tariffs or storages"):
        run_scenario(larger, 1, start_from=written)
    again = scenario(tmp_path, "  tasks: 5\n")
    with pytest.raises(InvalidInput, match="is before the snapshot"):
        run_scenario(again, 1, start_from=written, snapshot_at_s=60.0, snapshot=tmp_path / "x")
    written.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="is no snapshot of this release"):
        run_scenario(path, 1, start_from=written)
    with pytest.raises(NotFound, match="no such snapshot"):
        run_scenario(path, 1, start_from=tmp_path / "none")
