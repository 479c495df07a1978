"""The controller and workers killed with SIGKILL at seeded moments: nothing lost, nothing run twice, nothing billed
that did not run."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qipan.boards import verify_store
from qipan.client import Client, Task
from qipan.clock import named_random
from qipan.errors import Unreachable

HERE = Path(__file__).parent
TASK = """\
kind: train
name: tiny
tenant: poets
run: exec {python} -S {script}
devices: 1
limits: {{time: 3s, max_cost: 1 CNY}}
env: {{TINY_LOG: "{log}", TINY_STEPS: "{steps}", TINY_STEP_S: "0.05"}}
"""
TRAINING = """\
kind: train
name: poems
tenant: poets
model: {layers: 2, hidden: 32, heads: 4, ffn_hidden: 64, tied_embeddings: true}
data: fortunes:song100
work: {tokens: 200k, global_batch: 1000, seq: 50}
devices: 2
limits: {max_cost: 1 CNY}
checkpoint: {every: 2s}
"""

pytestmark = pytest.mark.slow


class Killed:
    """One world: a store that outlives its hosts."""

    def __init__(self, folder: Path, steps: int = 20) -> None:
        self.store, self.log = folder / "store", folder / "lives"
        script = HERE.parent / "examples" / "tiny.py"
        self.task = TASK.format(python=sys.executable, script=script, log=self.log, steps=steps)
        self.process: subprocess.Popen[str] | None = None

    def up(self, facts: int = 0, when: str = "after") -> None:
        command = [
            sys.executable,
            str(HERE / "kill_host.py"),
            str(self.store),
            str(HERE / "tiny_site.yaml"),
            str(facts),
            when,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "up\n" or self.process.wait(5) == -signal.SIGKILL, line

    def submit(self, count: int) -> None:
        for i in range(count):
            self._once(lambda i=i: Client(self.store).submit(Task(self.task, "tiny.yaml"), f"key-{i}"))

    def states(self) -> dict[str, str]:
        tasks = self._once(lambda: Client(self.store).call("GET", "/tasks"))
        return {task["task_id"]: task["state"] for task in tasks["tasks"]}

    def _once(self, act):
        """Against a host that may die in the middle: start another and ask again (the key makes it once)."""
        for _ in range(50):
            try:
                return act()
            except Unreachable:
                assert self.process is not None
                if self.process.poll() is not None:
                    self.up()
                time.sleep(0.1)
        raise AssertionError("no host answers")

    def finish(self, count: int, limit_s: float = 120.0) -> None:
        end_s = time.monotonic() + limit_s
        while len(states := self.states()) < count or set(states.values()) != {"done"}:
            assert time.monotonic() < end_s, states
            time.sleep(0.1)

    def down(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(20) == 0

    def lives(self) -> dict[tuple[str, int], tuple[float, float]]:
        """(task, attempt) -> (begin, end) by the processes' own log; without an end the last moment is unknown."""
        begun, ended = {}, {}
        for line in self.log.read_text().splitlines():
            what, task, attempt, _pid, at_s = line.split()
            (begun if what == "begin" else ended)[task, int(attempt)] = float(at_s)
        return {key: (at_s, ended.get(key, float("nan"))) for key, at_s in begun.items()}

    def check(self, count: int, seed: str) -> None:
        client = Client(self.store)
        lives = self.lives()
        for task in self.states():
            receipt = client.call("GET", f"/tasks/{task}/bill")
            assert receipt["receipt"]["cost_micro_cny"] == receipt["charged_micro_cny"], seed
            billed = {line["usage"]["attempt"]: line["usage"] for line in receipt["receipt"]["lines"]}
            ran = {attempt: life for (name, attempt), life in lives.items() if name == task}
            assert set(billed) >= set(ran), f"{seed}: ran {sorted(ran)}, billed {sorted(billed)}"
            spans = [(usage["started_s"], usage["until_s"]) for _, usage in sorted(billed.items())]
            assert all(first[1] <= second[0] + 0.05 for first, second in itertools.pairwise(spans)), (
                f"{seed}: {task} ran twice"
            )
            for attempt, (began_s, ended_s) in ran.items():
                usage = billed[attempt]
                assert abs(usage["started_s"] - began_s) < 1.0, seed
                if ended_s == ended_s:
                    assert abs(usage["until_s"] - ended_s) < 1.0, seed
        assert client.call("GET", "/ledger")["sum_micro_cny"] == 0
        assert len(self.states()) == count


@pytest.mark.parametrize("seed", range(20))
def test_the_controller_is_killed_at_a_seeded_fact(seed, tmp_path):
    rng = named_random(seed, "kill")
    facts, when = rng.randint(2, 28), rng.choice(["before", "after"])
    note = f"seed {seed}: killed {when} the commit of fact {facts}"
    world = Killed(tmp_path)
    world.up(facts, when)
    try:
        world.submit(2)
        world.finish(2)
        world.check(2, note)
        world.down()
        assert sum(verify_store(world.store).values()) > 0
    finally:
        if world.process is not None:
            world.process.kill()


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_is_killed_at_a_seeded_moment(seed, tmp_path):
    world = Killed(tmp_path, steps=30)
    world.up()
    try:
        world.submit(1)
        time.sleep(0.8 + named_random(seed, "worker").uniform(0, 1.0))
        pid = int(world.log.read_text().split()[3])
        os.kill(pid, signal.SIGKILL)
        world.finish(1)
        world.check(1, f"seed {seed}")
        assert len(world.lives()) == 2, "a second attempt went on"
        world.down()
        verify_store(world.store)
    finally:
        if world.process is not None:
            world.process.kill()


@pytest.mark.parametrize("seed", range(3))
def test_the_controller_is_killed_while_the_trainer_trains(seed, tmp_path):
    facts = named_random(seed, "kill training").randint(4, 16)
    world = Killed(tmp_path)
    world.task = TRAINING
    world.up(facts)
    try:
        world.submit(1)
        world.finish(1, limit_s=120)
        world.log.touch()
        world.check(1, f"seed {seed}: killed at fact {facts}")
        log = next((world.store / "engines" / "dc1" / "attempts").glob("poems-1-*/events.jsonl")).read_text()
        assert log.count('"done"') == 1
        world.down()
        verify_store(world.store)
    finally:
        if world.process is not None:
            world.process.kill()
