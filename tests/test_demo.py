"""The main job, whole, as `make demo` runs it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qipan.cli.demo import Demo
from qipan.events import TaskProgress
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, TaskId, Usage

#: what the trainer said in a run of the demo
RECORDED = (
    {"event": "ready", "at_s": 1796048909.247, "start_s": 27.885, "step": 0, "steps": 244},
    {"event": "reshaped", "at_s": 1796048932.213, "step": 48, "strategy_from": "dp4", "strategy_to": "dp2", "generation": 5, "members": [0, 1], "seconds": 0.106},
    {"event": "parked", "at_s": 1796048992.942, "step": 117},
    {"event": "resumed", "at_s": 1796049047.147, "step": 123, "from_strategy": "dp4", "strategy": "dp2", "seconds": 1.447},
    {"event": "done", "at_s": 1796049103.737, "step": 244, "test_loss": 4.9485, "unigram_loss": 6.3182, "best_step": 218, "vocab": 2696},
)  # fmt: skip


def told(capsys: pytest.CaptureFixture[str], tmp_path, *, json_: bool) -> list[str]:
    """The lines about these facts, and about a loss that three boards note, looked at twice."""
    usage = Usage(
        TaskId("poems-1"), 1, "dc", EngineId("dc-local"), ChipClassId("sim/a"), 2, "sim/a:2", 0.0, 0.0, 0.0, False
    )  # fmt: skip
    facts = [
        (0.0, TaskProgress(TaskId("poems-1"), EngineId("dc-local"), 1, 0.0, 0.0, json.dumps(one), usage))
        for one in RECORDED
    ]
    lost = [
        {"board": board, "verdict": "lost", "text": "attempt 3 was lost"} for board in ("dc", "east", "cn")
    ]
    queries = SimpleNamespace(why=lambda _: {"decisions": lost}, progress=lambda _: facts)
    demo = Demo(None, tmp_path, json_)  # type: ignore[arg-type]
    demo.running = SimpleNamespace(host=SimpleNamespace(queries=queries))  # type: ignore[assignment]
    for _ in range(2):
        demo.tell("poems-1")
    return capsys.readouterr().out.splitlines()


def test_changes_and_ends_are_told_once_as_sentences(capsys, tmp_path):
    assert [line.partition("] ")[2] for line in told(capsys, tmp_path, json_=False)] == [
        "poems-1 dc: lost: attempt 3 was lost",
        "poems-1: now on 2 devices without a restart: strategy dp2 after dp4, from step 48 on; it stood still for 0.1 s",
        "poems-1: stopped at step 117, with a checkpoint of it",
        "poems-1: now on 2 devices, from the checkpoint of step 123: strategy dp2, saved under dp4; read in 1.4 s",
        "poems-1: done after 244 steps: loss 4.949 nat per character on unseen text, by the checkpoint of step 218; guessing by frequency alone: 6.318",
    ]


def test_for_programs_the_details_stand_beside_the_sentences(capsys, tmp_path):
    lines = [json.loads(line) for line in told(capsys, tmp_path, json_=True)]
    assert [line["detail"] for line in lines[1:]] == [*RECORDED[1:]]
    assert [line["event"] for line in lines[1:]] == ["reshaped", "parked", "resumed", "done"]


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
