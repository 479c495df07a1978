"""`qipan demo`: the main job in minutes, on this machine, with nothing pretended.

It speaks to the boards as a user would, and to the operating system as an accident would (it kills a worker).
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from qipan.boards import verify_store
from qipan.cli import tables
from qipan.cli.run import Running, _after_park
from qipan.errors import QipanError
from qipan.events import TaskExited, TaskProgress
from qipan.planner import Plan
from qipan.planning import plan_on
from qipan.quantities import format_devices, format_duration
from qipan.views import boards
from qipan.workload import Task
from qipan.workload.parse import load_task
from qipan.workload.site import Site

LIMIT_S = 330.0
SECOND_AT, KILL_AT = (
    0.18,
    0.10,
)  # share of the work: when the dearer task comes; how far past the growth a worker dies


class Demo:
    def __init__(self, site: Site, folder: Path, json_: bool) -> None:
        self.site, self.folder, self.json = site, folder, json_
        self.began_s = time.monotonic()
        self.running: Running | None = None
        self.tasks: list[str] = []  # those that are told of
        self._seen: dict[str, int] = {}
        self._decisions: set[tuple[str, str, str]] = set()

    def say(self, event: str, text: str, **values: Any) -> None:
        at_s = round(time.monotonic() - self.began_s, 1)
        if self.json:
            print(
                json.dumps({"event": event, "at_s": at_s, "text": text, **values}, ensure_ascii=False),
                flush=True,
            )
        else:
            print(f"[{at_s:6.1f}s] {text}", flush=True)

    # ---- the six steps ---------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        from qipan.cli.app import probed

        self.say(
            "probe", "measuring the chips of three data centres (each a fixed share of a core), all at once"
        )
        self.site = probed(self.site, quiet=True)
        self.running = Running(self.site, self.folder)
        self.running.start()
        host = self.running.host
        if not self.json:
            tables.print_boards(msgspec.to_builtins(boards(host, lambda _tenant: True)))
        poems, urgent = load_task(_example("train-poems.yaml")), load_task(_example("poems-urgent.yaml"))
        plan = self._show_plan(poems)
        first = self._submit(poems, "submitted at the nation's board")
        self._until(
            "the first task has made progress", lambda: host.queries.task(first).progress >= SECOND_AT
        )
        second_plan = self._show_plan(urgent)
        second = self._submit(urgent, "a dearer task with a deadline arrives")
        before = host.queries.task(first).devices
        self._until("the first task shrinks", lambda: _exited(host, first, "resized") >= 1)
        self._until("the second task ends", lambda: host.queries.task(second).state == "done")
        self._until(
            "the first task grows back",
            lambda: (
                host.queries.task(first).devices == before and host.queries.task(first).state == "running"
            ),
        )
        at = host.queries.task(first).progress
        self._until(
            "it makes progress again", lambda: host.queries.task(first).progress >= min(0.9, at + KILL_AT)
        )
        self._kill_a_worker(first)
        self._until("the loss is a fact", lambda: _exited(host, first, "lost") >= 1)
        self._until("the first task ends", lambda: host.queries.task(first).state == "done")
        return self._finish(first, second, plan, second_plan)

    def _submit(self, task: Task, text: str) -> str:
        assert self.running is not None
        task_id, _ = self.running.host.intake.submit(task)
        self.tasks.append(task_id)
        self.say("submitted", f"{task_id}: {text}", task_id=task_id)
        return task_id

    def _show_plan(self, task: Task) -> Plan:
        plan = plan_on(self.site, task)
        if self.json:
            self.say("plan", f"plan of {task.name}", plan=msgspec.to_builtins(plan))
        else:
            tables.print_plan(plan)
        return plan

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait for a state of the boards, telling what happens meanwhile."""
        assert self.running is not None
        queries = self.running.host.queries
        while not holds():
            for task_id in self.tasks:
                self.tell(task_id)
                if queries.task(task_id).state in ("failed", "cancelled"):
                    end = max(0, queries.logs(task_id)["size"] - 1500)
                    log = queries.logs(task_id, end)["text"]
                    raise QipanError(f"{task_id} failed while waiting until {what}; its log ends:\n{log}")
            if time.monotonic() - self.began_s > LIMIT_S:
                raise QipanError(
                    f"the demo took more than {LIMIT_S:.0f} s while waiting until {what}; look closer with: {self._closer(self.tasks[0])}"
                )
            time.sleep(0.2)
        for task_id in self.tasks:
            self.tell(task_id)

    def _closer(self, task_id: str) -> str:
        return f"qipan up --store {self.folder}, then qipan why {task_id} --store {self.folder}"

    def tell(self, task_id: str) -> None:
        """New decisions and every few seconds a line of progress.  What several boards say alike is said once."""
        assert self.running is not None
        host = self.running.host
        told = host.queries.why(task_id)["decisions"]
        for entry in told[self._seen.get(task_id, 0) :]:
            key = (task_id, entry["verdict"], entry["text"])
            if key not in self._decisions:
                self._decisions.add(key)
                text = f"{task_id} {entry['board']}: {entry['verdict']}: {entry['text']}"
                self.say("decision", text, task_id=task_id)
        self._seen[task_id] = len(told)
        facts = host.queries.progress(task_id)
        seen = self._seen.get(f"{task_id}/progress", 0)
        for _, fact in facts[seen:]:
            detail = fact.said()
            event = detail.get("event")
            if event == "progress" and time.monotonic() - self._seen.get(f"{task_id}/said", 0) > 4:
                self._seen[f"{task_id}/said"] = int(time.monotonic())
                view = host.queries.task(task_id)
                self.say(
                    "progress",
                    f"{task_id}: step {detail['step']}/{detail['steps']}, loss {detail['loss']:.3f}, on {format_devices(view.devices)} at {view.place}",
                    task_id=task_id, detail=detail,
                )  # fmt: skip
            elif event in SENTENCES:
                self.say(event, f"{task_id}: {sentence(fact)}", task_id=task_id, detail=detail)
        self._seen[f"{task_id}/progress"] = len(facts)

    def _kill_a_worker(self, task_id: str) -> None:
        assert self.running is not None
        for engine in self.running.host.engines.values():
            for running, folder in engine.running():
                marks = sorted(folder.glob("rank-*"))
                if running == task_id and marks:
                    pid = int(marks[-1].read_text())
                    os.kill(pid, signal.SIGKILL)
                    self.say("kill", f"SIGKILL to worker {marks[-1].name} of {task_id} (process {pid})")
                    return
        raise QipanError(f"{task_id} has no running worker to kill")

    def _finish(self, first: str, second: str, plan: Plan, second_plan: Plan) -> dict[str, Any]:
        assert self.running is not None
        host = self.running.host
        results = {task_id: _result(host, task_id) for task_id in (first, second)}
        bills = {task_id: host.queries.bill(task_id) for task_id in (first, second)}
        charged = {task_id: host.queries.charged(task_id) for task_id in (first, second)}
        balances, total = host.balances(), host.ledger_sum()
        why = host.queries.why(first)
        exits, progress = host.queries.exits(first), host.queries.progress(first)
        took_s = host.queries.exits(second)[-1].usage.until_s - host.queries.exits(second)[0].usage.started_s
        self.running.end(park=False)
        self.running = None
        ticks = verify_store(self.folder)
        option = second_plan.options[0]
        restarts_s = _restarts_s(exits, progress)
        if not self.json:
            tables.print_why(why)
            for task_id in (first, second):
                tables.print_receipt(msgspec.to_builtins(bills[task_id]), charged[task_id])
            tables.print_ledger(balances)
        gain = results[first]["unigram_loss"] - results[first]["test_loss"]
        report = {
            "test_loss": results[first]["test_loss"],
            "unigram_loss": results[first]["unigram_loss"],
            "gain_nat_per_character": round(gain, 4),
            "second_task_s": round(took_s, 1),
            "second_plan_p10_s": round(option.finish_p10_s, 1),
            "second_plan_p90_s": round(option.finish_p90_s, 1),
            "restart_planned_s": round(plan.options[0].restart_s, 1),
            "restarts_s": restarts_s,
            "changes": _changes(exits, progress),
            "ledger_sum_micro_cny": total,
            "receipts_agree": all(bills[name].cost_micro_cny == charged[name] for name in bills),
            "verified_ticks": sum(ticks.values()),
            "store": str(self.folder),
        }
        self.say(
            "result",
            f"the model's loss on unseen poems is {results[first]['test_loss']:.3f} nat per character, {gain:.2f} better than"
            f" the {results[first]['unigram_loss']:.3f} of guessing by frequency alone (an add-1 unigram)",
            **report,
        )
        self.say(
            "result",
            f"the second task took {format_duration(took_s)}, planned {format_duration(option.finish_p10_s)} to"
            f" {format_duration(option.finish_p90_s)}; replay gave the same commands in all {sum(ticks.values())} ticks",
        )
        wrong = [
            name
            for name, good in (
                ("loss", gain >= 0.5), ("ledger", total == 0), ("receipts", report["receipts_agree"]),
                ("second task", results[second] is not None),
            )
            if not good
        ]  # fmt: skip
        if wrong:
            raise QipanError(f"the demo ran, but {', '.join(wrong)} did not come out as promised: {report}")
        self.say("end", f"done; look closer with: {self._closer(first)}")
        return report


#: what the trainer says of a change and of the end (`trainer/loop.py`), for people
SENTENCES = {
    "reshaped": "now on {devices} without a restart: strategy {strategy_to} after {strategy_from}, from step {step} on; it stood still for {seconds:.1f} s",
    "resumed": "now on {devices}, from the checkpoint of step {step}: strategy {strategy}, saved under {from_strategy}; read in {seconds:.1f} s",
    "parked": "stopped at step {step}, with a checkpoint of it",
    "done": "done after {step} steps: loss {test_loss:.3f} nat per character on unseen text, by the checkpoint of step {best_step}; guessing by frequency alone: {unigram_loss:.3f}",
}


def sentence(fact: TaskProgress) -> str:
    said = fact.said()
    return SENTENCES[said["event"]].format(devices=format_devices(fact.usage.devices), **said)


def _restarts_s(exits: list[TaskExited], progress: list[tuple[float, TaskProgress]]) -> list[float]:
    """From the end of one attempt to the next one's readiness, for each restart."""
    ready: dict[int, float] = {}
    for _, fact in progress:
        detail = fact.said()
        if detail.get("event") == "ready":
            ready.setdefault(fact.attempt, float(detail["at_s"]))
    return [
        round(ready[fact.attempt + 1] - fact.usage.until_s, 2) for fact in exits if fact.attempt + 1 in ready
    ]


def _changes(exits: list[TaskExited], progress: list[tuple[float, TaskProgress]]) -> list[dict[str, Any]]:
    """Each change of the number of devices: how many before, whether the processes went on, and for how long they did not
    train."""
    seconds: dict[int, float] = {}
    for _, fact in progress:
        detail = fact.said()
        if detail.get("event") == "reshaped":
            seconds.setdefault(fact.attempt, float(detail["seconds"]))
    return [
        {"devices": fact.usage.devices, "in_place": fact.in_place, "why": fact.why, "seconds": seconds.get(fact.attempt + 1)}
        for fact in exits
        if fact.outcome == "resized"
    ]  # fmt: skip


def _exited(host: Any, task_id: str, outcome: str) -> int:
    return sum(fact.outcome == outcome for fact in host.queries.exits(task_id))


def _result(host: Any, task_id: str) -> dict[str, Any]:
    for _, fact in reversed(host.queries.progress(task_id)):
        detail = fact.said()
        if detail.get("event") == "done":
            return dict(detail)
    raise QipanError(f"{task_id} reported no result; its facts: `qipan events {task_id}`")


def _example(name: str) -> Path:
    path = Path("examples") / name
    if not path.is_file():
        raise QipanError(f"{path} is not here; run the demo in the root of the repository")
    return path


def run_demo(site: Site, store: Path | None, json_: bool) -> int:
    folder = store or Path(tempfile.mkdtemp(prefix="qipan-demo-"))
    demo = Demo(replace(site), folder, json_)
    try:
        demo.run()
    except KeyboardInterrupt:
        if demo.running is None:
            return 130
        print("\nqipan: asking the tasks for a checkpoint (10 s)", file=sys.stderr, flush=True)
        return _after_park(demo.running.end(park=True), folder)
    except BaseException:
        if demo.running is not None:
            demo.running.end(park=True)
        raise
    return 0
