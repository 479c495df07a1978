"""Tasks with stages under real boards and processes, killed and cancelled; and the example."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qipan.errors import Infeasible
from qipan.hardware import Probe
from qipan.host import Host
from qipan.workload.parse import load_task, parse_task
from qipan.workload.site import load_site
from test_stage_plan import site

pytestmark = pytest.mark.timeout(120)
EXAMPLES = Path(__file__).parent.parent / "examples"


TASK = """
kind: train
name: tiny-stages
limits: {max_cost: 5 CNY}
stages:
  - {name: prepare, run: exec PYTHON prepare.py, chips: sim/a, feeds: learn, samples: 300, samples_per_s: 150, devices: 1}
  - {name: learn, kind: train, run: exec PYTHON learn.py, chips: sim/a, samples_per_s: 100}
  - {name: evaluate, run: exec PYTHON evaluate.py, after: learn, limits: {time: 5s}}
"""
TINY_PREPARE = """
import time
from qipan.trainer.stream import feed

def prepare(position):
    time.sleep(0.005)
    return {"txt": str(position * 3).encode()}

feed(prepare, per_piece=10)
"""
TINY_LEARN = """
import json, os
from pathlib import Path
from qipan.trainer.stream import fed, say

kept = Path(os.environ["QIPAN_CHECKPOINT_DIR"], "sum.json")
step, total = json.loads(kept.read_text()) if kept.exists() else (0, 0)
with fed("prepare") as stream:
    while step < 30:
        total += sum(int(row["text"]) for row in stream.rows(range(step * 10, step * 10 + 10)))
        step += 1
        part = kept.with_suffix(".part")
        part.write_text(json.dumps([step, total]))
        part.rename(kept)
        stream.saved(step * 10)
        say("progress", step=step, steps=30)
        say("checkpoint", step=step)
"""
TINY_EVALUATE = """
from qipan.trainer.stream import output_of
print("evaluate:", (output_of() / "sum.json").read_text())
"""


def tiny_host(tmp_path) -> tuple[Host, Path]:
    for name, text in (("prepare", TINY_PREPARE), ("learn", TINY_LEARN), ("evaluate", TINY_EVALUATE)):
        (tmp_path / f"{name}.py").write_text(text)
    return Host(load_site(Path(__file__).parent / "tiny_site.yaml"), tmp_path / "store")


def until(host: Host, task_id: str, condition, limit_s: float = 60.0) -> None:
    ends_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends_s, (host.queries.tasks(), host.queries.logs(task_id)["text"][-2000:])
        host.step()
        time.sleep(0.02)


def kill(host: Host, stage: str) -> None:
    [attempt] = [
        folder for engine in host.engines.values() for name, folder in engine.running() if name == stage
    ]
    control = attempt.parent.parent / "control" / attempt.name
    os.killpg(json.loads((control / "pid.json").read_text())["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_task_of_three_stages_survives_its_feeder_and_its_reader_and_is_one_receipt(tmp_path):
    host = tiny_host(tmp_path)
    task = parse_task(TASK.replace("PYTHON", sys.executable), "t.yaml", str(tmp_path))
    try:
        task_id, plan = host.intake.submit(task)
        prepare, learn, evaluate = host.queries.parts(task_id)
        assert [flow.workers for flow in plan.flows] == [1]
        until(host, task_id, lambda: host.queries.task(learn).progress > 0.1)
        assert (host.queries.task(task_id).state, host.queries.task(evaluate).state) == ("running", "behind")
        assert f"{evaluate}: starts when {learn} is done" in host.queries.task(task_id).waiting
        kill(host, prepare)
        until(
            host,
            task_id,
            lambda: host.queries.task(prepare).attempt == 2 and host.queries.task(learn).progress > 0.4,
        )
        kill(host, learn)
        until(host, task_id, lambda: host.queries.task(task_id).state == "done")
        told = host.queries.why(task_id)
        receipt = host.queries.bill(task_id)
        assert host.queries.charged(task_id) == receipt.cost_micro_cny
        log = host.queries.logs(task_id)["text"]
        [again] = host.intake.plan(task).flows
        left = list((tmp_path / "store" / "checkpoints").glob("*.streams/prepare/piece-*"))
        holds = {
            account: amount
            for account, amount in host.balances().items()
            if account.startswith("hold/") and amount
        }
    finally:
        host.close()
    assert f"evaluate: [30, {3 * sum(range(300))}]" in log, "every sample once"
    assert {(entry["task_id"], entry["verdict"]) for entry in told["decisions"]} >= {
        (prepare, "lost"), (learn, "lost"), (evaluate, "released"),
    }  # fmt: skip
    assert {(line.usage.task_id, line.usage.attempt) for line in receipt.lines} == {
        (prepare, 1), (prepare, 2), (learn, 1), (learn, 2), (evaluate, 1),
    }  # fmt: skip
    assert (again.made_source, again.taken_source) == ("measured in earlier runs",) * 2
    assert 5 < again.made_per_s < 200, "a sample sleeps 5 ms, and a busy machine adds to it"
    assert (left, holds) == ([], {})


@pytest.mark.slow
def test_cancelling_a_task_with_stages_ends_all_of_them_and_a_failing_stage_fails_it(tmp_path):
    host = tiny_host(tmp_path)
    text = TASK.replace("PYTHON", sys.executable)
    (tmp_path / "broken.py").write_text(
        TINY_PREPARE.replace("time.sleep(0.005)", "assert position < 40, 'torn'")
    )
    try:
        first, _ = host.intake.submit(parse_task(text, "t.yaml", str(tmp_path)))
        until(host, first, lambda: host.queries.task(first).state == "running")
        host.intake.cancel(first, "me")
        until(host, first, lambda: host.queries.task(first).state == "cancelled")
        broken = text.replace("prepare.py", "broken.py").replace("tiny-stages", "torn-stages")
        second, _ = host.intake.submit(parse_task(broken, "t.yaml", str(tmp_path)))
        until(host, second, lambda: host.queries.task(second).state == "failed")
        states = [
            host.queries.task(name).state
            for name in (*host.queries.parts(first), *host.queries.parts(second))
        ]
        told = [entry["text"] for entry in host.queries.why(second)["decisions"]]
        host.sweep()
        left = list((tmp_path / "store" / "checkpoints").glob("*.streams"))
    finally:
        host.close()
    assert states == ["cancelled", "cancelled", "cancelled", "failed", "cancelled", "cancelled"]
    assert any("torn" in text for text in told)
    assert left == [], "what was streamed for nobody is gone"
    assert f"{second}.prepare, which feeds it, failed" in told


class FarEngines(Host):
    """A board over hosts that joined it: it runs nothing itself."""

    @property
    def engines(self):
        return {}


def test_stages_on_other_hosts_than_this_ones_are_refused_by_name(tmp_path):
    host = FarEngines(site(), tmp_path / "store")
    try:
        with pytest.raises(
            Infeasible, match="stages hand each other files on one host, and shanghai runs no engine itself"
        ):
            host.intake.submit(load_task(EXAMPLES / "stages.yaml"))
        assert host.queries.tasks() == []
    finally:
        host.close()


@pytest.mark.endurance
@pytest.mark.timeout(600)
def test_the_example_learns_the_same_whoever_is_killed(tmp_path):
    site = load_site(EXAMPLES / "sites" / "stages.yaml")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    host = Host(site, tmp_path / "store")
    try:
        whole, _ = host.intake.submit(load_task(EXAMPLES / "stages.yaml"))
        until(host, whole, lambda: host.queries.task(whole).state == "done", 240)
        broken, _ = host.intake.submit(load_task(EXAMPLES / "stages.yaml"))
        until(host, broken, lambda: host.queries.task(f"{broken}.learn").progress > 0.2, 240)
        kill(host, f"{broken}.learn")
        kill(host, f"{broken}.prepare")
        until(host, broken, lambda: host.queries.task(broken).state == "done", 240)
        logs = [host.queries.logs(name)["text"] for name in (whole, broken)]
    finally:
        host.close()
    found = [
        re.findall(r"evaluate: ([\d.]+) nat per character on 25 held-out poems; counting: ([\d.]+)", log)
        for log in logs
    ]
    assert found[0] == found[1]
    assert float(found[0][0][0]) < float(found[0][0][1]), "it learned more than how often characters come"


BUILT_IN = """
kind: train
name: built-in
stages:
  - {name: prepare, run: exec PYTHON EXAMPLES/stages/prepare.py, chips: cpu, feeds: learn, samples: 1600, samples_per_s: 900}
  - name: learn
    chips: sim/yan-1
    model: {layers: 2, hidden: 48, heads: 4, ffn_hidden: 96, tied_embeddings: true}
    data: fortunes:tang300
    work: {tokens: 38400, global_batch: 768, seq: 24}
    checkpoint: {every: 2s}
"""


@pytest.mark.endurance
@pytest.mark.timeout(600)
def test_the_built_in_trainer_is_fed_and_goes_on_from_its_checkpoint(tmp_path):
    site = load_site(EXAMPLES / "sites" / "stages.yaml")
    pools = tuple(replace(pool, probe=Probe(2e9, 3.0, 1e9, 1e-4, 0.05, 0.0)) for pool in site.root.pools)
    text = BUILT_IN.replace("PYTHON", sys.executable).replace("EXAMPLES", str(EXAMPLES))
    host = Host(replace(site, root=replace(site.root, pools=pools)), tmp_path / "store")
    try:
        task_id, plan = host.intake.submit(parse_task(text))
        learn = f"{task_id}.learn"
        assert (plan.flows[0].taken_source, plan.flows[0].workers_needed is not None) == (
            "probe + closed form",
            True,
        )
        until(host, task_id, lambda: host.queries.task(learn).saved > 0.1, 240)
        kill(host, learn)
        until(host, task_id, lambda: host.queries.task(task_id).state == "done", 240)
        told = [json.loads(fact.detail) for _, fact in host.queries.progress(learn)]
    finally:
        host.close()
    assert [one["event"] for one in told].count("resumed") == 1
    assert any(one["event"] == "stream" and one["from"] == "prepare" for one in told)
    [done] = [one for one in told if one["event"] == "done"]
    assert done["step"] == 50
