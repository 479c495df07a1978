"""The main job, whole, as `make demo` runs it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_demo_does_all_six_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qipan.cli", "demo", "--json", "--store", str(tmp_path / "store")],
        capture_output=True, text=True, timeout=400, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = [line["text"].split(": ")[1] for line in lines if line["event"] == "decision"]
    for verdict in ("placed", "shrunk", "grown", "lost"):
        assert verdict in verdicts
    assert any(line["event"] == "kill" for line in lines)
    result = next(line for line in lines if "test_loss" in line)
    shrunk, grown = result["changes"][:2]
    assert shrunk["devices"] > grown["devices"]
    for change in (shrunk, grown):
        assert change["in_place"], change["why"]
        assert change["seconds"] is not None
    assert result["gain_nat_per_character"] >= 0.5
    assert result["ledger_sum_micro_cny"] == 0
    assert result["receipts_agree"]
    assert result["verified_ticks"] > 50
    within = result["second_plan_p10_s"] * 0.8 <= result["second_task_s"] <= result["second_plan_p90_s"] * 1.2
    print(
        f"second task {result['second_task_s']} s, plan {result['second_plan_p10_s']}..{result['second_plan_p90_s']} s: {within}"
    )
