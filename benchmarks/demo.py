"""How true the demo's plans are: python -m benchmarks.demo --runs 5 --json OUT

Each run is `qipan demo`.  The second task, undisturbed, should finish inside [p10, p90] of its plan widened by 20 %;
each restart should take at most 1.5 times the stated restart time; the first task's time should be near its plan once the
stated restarts and the shrunk spell are taken off.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.form import Figure, arguments, write


def main() -> None:
    given = arguments("demo", runs=5)
    rows = [one_run() for _ in range(given.runs)]
    inside = sum(row["second_inside"] for row in rows) / len(rows)
    worst = max(row["restart_worst_s"] / row["restart_planned_s"] for row in rows)
    useful = max(abs(row["step_ratio"] - 1) for row in rows)
    figures = [
        Figure("second_task_inside_share", inside, "share", ">= 0.8"),
        Figure("restart_worst_over_planned", worst, "ratio", "<= 1.5"),
        Figure("first_task_step_time_error", useful, "share", "<= 0.25"),
        Figure("gain_nat_per_character_least", min(row["gain"] for row in rows), "nat", ">= 0.5"),
        Figure("demo_s_most", max(row["demo_s"] for row in rows), "s", "<= 360"),
    ]
    write(given.json, figures, rows, runs=given.runs)


def one_run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qipan.cli", "demo", "--json", "--store", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    result = next(line for line in lines if "test_loss" in line)
    plan = next(line["plan"] for line in lines if line["event"] == "plan")
    option = next(option for option in plan["options"] if option["option_id"] == plan["chosen"])
    steps = [
        line["detail"]
        for line in lines
        if line["event"] == "progress"
        and line["task_id"].startswith("poems")
        and f"on {option['devices']} devices" in line["text"]
    ]
    step_s = [detail["step_s"] for detail in steps]
    low, high = result["second_plan_p10_s"] * 0.8, result["second_plan_p90_s"] * 1.2
    return {
        "second_task_s": result["second_task_s"],
        "second_inside": low <= result["second_task_s"] <= high,
        "restart_planned_s": result["restart_planned_s"],
        "restart_worst_s": max(result["restarts_s"]),
        "step_ratio": sum(step_s) / len(step_s) / option["step_s"],
        "gain": result["gain_nat_per_character"],
        "demo_s": lines[-1]["at_s"],
    }


if __name__ == "__main__":
    main()
