"""What a tree of processes does under measure, for benchmarks.grid: a nation over a region over a data centre, each a process with a store on
disk, over mutual TLS on this machine.

Placement: one task at a time, submitted at each level; until the board has answered (by then the order is stored at the nation), until
the data centre has chosen its devices, until the task's own first instruction.  Tasks per second: submitted and ended at the nation while four
callers keep 200 under way; with devices that are simulated (what the boards take), and with real processes (what one node takes).  Lost
work: a task with a checkpoint every so often is killed at seeded moments; what it had done and does again, by its own log."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.form import Figure
from qipan.client import Client, Task
from qipan.clock import named_random
from qipan.controller import fact_of
from qipan.events import TaskExited
from qipan.hardware import ChipClassId
from qipan.store import StoreFolder

CHIP = ChipClassId("sim/a")
LEVELS = ("cn", "east", "dc1")
SIMULATED_DEVICES, REAL_DEVICES = 512, 16
CALLERS, UNDER_WAY = 4, 200
KILLS = 6  # at each interval between checkpoints
STEP_S = 0.05
INTERVALS_S = (0.5, 1.0, 2.0, 4.0)
SHORT = """\
kind: train
name: {name}
tenant: poets
run: exec {python} -S -c 'import os, time; open(os.environ["BEGAN"], "w").write(str(time.time()))'
devices: 1
limits: {{time: 5s, max_cost: 1 CNY}}
env: {{BEGAN: "{began}"}}
"""
EMPTY = """\
kind: train
name: {name}
tenant: poets
run: "true"
devices: 1
limits: {{time: 1s, max_cost: 1 CNY}}
"""
STEPS = """\
kind: train
name: {name}
tenant: poets
run: exec {python} -S {script}
devices: 1
limits: {{time: 600s, max_cost: 10 CNY}}
env: {{STEPS_LOG: "{log}", STEPS_EVERY: "{every}", STEP_S: "{step_s}"}}
"""
SCRIPT = """\
import json, os, time
state = os.path.join(os.environ["QIPAN_CHECKPOINT_DIR"], "state.json")
step = json.load(open(state)) if os.path.exists(state) else 0
log, events = open(os.environ["STEPS_LOG"], "a", 1), open(os.environ["QIPAN_EVENTS"], "a", 1)
every, step_s = int(os.environ["STEPS_EVERY"]), float(os.environ["STEP_S"])
print("from", os.getpid(), step, time.time(), file=log)
while True:
    time.sleep(step_s)
    step += 1
    print("step", os.getpid(), step, time.time(), file=log)
    if step % every == 0:
        with open(state + ".part", "w") as file:
            json.dump(step, file)
        os.replace(state + ".part", state)
        print(json.dumps({"event": "checkpoint", "step": step}), file=events)
    print(json.dumps({"event": "progress", "step": step, "steps": 12000}), file=events)
"""


class Tree:
    """cn over east over dc1, whose devices are simulated or this machine's."""

    def __init__(self, folder: Path, *, simulated: bool) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        ports: dict[str, int] = {}
        for above, board in itertools.pairwise(("", *LEVELS)):
            pools = f"[{{chip: {CHIP}, devices: {REAL_DEVICES}, tariff: 1 CNY}}]" if board == "dc1" else "[]"
            tenants = "[{name: poets, balance: 1M CNY}]" if not above else "[]"
            (folder / f"{board}.yaml").write_text(
                f"site:\n  board: {{name: {board}, region: cn-east, pools: {pools}}}\n  tenants: {tenants}\n"
            )
            listens = board != "dc1"
            url = "grid://127.0.0.1:1"  # the port that is served is another
            if not above:
                self._qipan(board, "grid", "init", "--name", board, "--url", url)
            else:
                at = f"grid://127.0.0.1:{ports[above]}"
                token = self._qipan(above, "grid", "invite", board, "--url", at, *["--may-invite"] * listens)
                self._qipan(board, "grid", "join", token, *(["--url", url] if listens else []))
            if board == "dc1" and simulated:
                self._start(board, "-m", "benchmarks.grid_leaf", str(folder / board), str(SIMULATED_DEVICES))
            else:
                listen = ["--listen", "127.0.0.1:0"] if listens else []
                site = str(folder / f"{board}.yaml")
                told = self._start(board, "-m", "qipan.cli", "board", "serve", "--store", str(folder / board),
                                   "--site", site, "--no-probe", "--json", *listen)  # fmt: skip
                ports[board] = int(json.loads(told)["port"] or 0)
        self.clients = {board: Client(folder / board) for board in LEVELS}
        wait(
            lambda: CHIP in json.dumps(self.clients["cn"].call("GET", "/boards")),
            60,
            "the nation sees the data centre",
        )

    def _qipan(self, board: str, *words: str) -> str:
        command = [sys.executable, "-m", "qipan.cli", *words, "--store", str(self.folder / board)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _start(self, board: str, *words: str) -> str:
        """Returns its first line."""
        with (self.folder / f"{board}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._processes.append(process)
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, (self.folder / f"{board}.log").read_text()
        return told

    def submit(self, board: str, text: str) -> str:
        return self.clients[board].submit(Task(text, "task.yaml", str(self.folder))).task_id

    def is_(self, task_id: str, state: str) -> bool:
        return bool(self.clients["cn"].task(task_id)["state"] == state)

    def cpu_s(self) -> dict[str, float]:
        """Of the board processes, themselves alone."""
        tick = os.sysconf("SC_CLK_TCK")
        stats = [
            Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            for process in self._processes
        ]
        return {board: sum(map(int, stat[11:13])) / tick for board, stat in zip(LEVELS, stats, strict=True)}

    def ended(self) -> Iterator[tuple[str, str]]:
        """(task, how) of every attempt that ended by now at the nation, each once; goes on when asked again."""
        store, last = StoreFolder(self.folder / "cn").open("cn", writer=False), 0
        while True:
            rows = store.db.rows(
                "SELECT fact_id, body FROM facts WHERE kind = 'task_exited' AND fact_id > ? ORDER BY fact_id",
                (last,),
            )
            for fact_id, body in rows:
                last, fact = fact_id, fact_of(body)
                assert isinstance(fact, TaskExited)
                yield fact.task_id, fact.outcome
            yield "", ""

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def a_tree(*, simulated: bool) -> Iterator[Tree]:
    with tempfile.TemporaryDirectory(prefix="qipan-tree-") as scratch:
        tree = None
        try:
            tree = Tree(Path(scratch), simulated=simulated)
            yield tree
        finally:
            if tree is not None:
                tree.close()


def wait(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not in {limit_s:.0f} s: {what}"
        time.sleep(0.02)


# ---- placement --------------------------------------------------------------------------------------------------------


def placement(tree: Tree, times: int) -> tuple[list[Figure], list[dict[str, Any]]]:
    first = tree.submit(
        "cn", EMPTY.format(name="first")
    )  # a child that just joined is asked what it holds first
    wait(partial(tree.is_, first, "done"), 60, f"{first} ends")
    rows = list[dict[str, Any]]()
    for number, level in itertools.product(range(times), LEVELS):
        began = tree.folder / f"began-{level}-{number}"
        text = SHORT.format(name=f"{level}-{number}", python=sys.executable, began=began)
        at_s = time.time()
        task_id = tree.submit(level, text)
        answered_s = time.time() - at_s
        wait(partial(_has_text, began), 60, f"{task_id} begins")
        wait(partial(tree.is_, task_id, "done"), 60, f"{task_id} ends")
        told = tree.clients["cn"].call("GET", f"/tasks/{task_id}/why")["decisions"]
        placed = {entry["board"]: entry["at_s"] - at_s for entry in told if entry["verdict"] == "placed"}
        rows.append(
            {"submitted_at": level, "answered_s": answered_s, "started_s": float(began.read_text()) - at_s}
            | {f"placed_by_{board}_s": placed[board] for board in LEVELS}
        )
    figures = []
    for level in LEVELS:
        own = [row for row in rows if row["submitted_at"] == level]
        for what in ("answered_s", "placed_by_dc1_s", "started_s"):
            values = sorted(row[what] for row in own)
            name = f"at_{level}_{what.removesuffix('_s')}"
            figures.append(Figure(f"{name}_p50_s", round(statistics.median(values), 4), "s"))
            figures.append(Figure(f"{name}_max_s", round(values[-1], 4), "s"))
    return figures, rows


def _has_text(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


# ---- tasks per second ---------------------------------------------------------------------------------------------------


def sustained(tree: Tree, name: str, window_s: float) -> tuple[Figure, dict[str, Any]]:
    """Tasks that end in a second, over the window, once as many have ended as are under way."""
    lock, numbers, over = threading.Lock(), itertools.count(), threading.Event()
    submitted, done = [0], [0]
    failures: list[BaseException] = []

    def call() -> None:
        client = Client(tree.folder / "cn")
        try:
            while not over.is_set():
                with lock:
                    room = submitted[0] - done[0] < UNDER_WAY
                    submitted[0] += room
                if not room:
                    over.wait(0.01)
                    continue
                client.submit(
                    Task(EMPTY.format(name=f"{name}-{next(numbers)}"), "task.yaml", str(tree.folder))
                )
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call, daemon=True) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    ended, at, used = tree.ended(), list[tuple[float, int]](), dict[str, float]()
    end_s = time.monotonic() + 300
    while not at or at[-1][0] - at[0][0] < window_s:
        for task_id, how in ended:
            if not task_id:
                break
            if not task_id.startswith(f"{name}-"):
                continue  # it was measured before
            assert how == "done", f"{task_id}: {how}"
            done[0] += 1
        if done[0] >= UNDER_WAY:
            at.append((time.monotonic(), done[0]))
            used = used or tree.cpu_s()
        assert not failures, failures
        assert time.monotonic() < end_s, f"{done[0]} tasks ended in 300 s"
        time.sleep(0.2)
    spent = tree.cpu_s()
    over.set()
    for caller in callers:
        caller.join()
    (first_s, first), (last_s, last) = at[0], at[-1]
    rate = (last - first) / (last_s - first_s)
    row = {"what": name, "tasks_per_s": rate, "ended": last - first, "window_s": last_s - first_s, "submitted": submitted[0],
           "load": os.getloadavg()[0],
           "cpu_ms_per_task": {board: round(1e3 * (spent[board] - used[board]) / (last - first), 1) for board in LEVELS}}  # fmt: skip
    return Figure(f"tasks_per_s_{name}", round(rate, 2), "tasks/s"), row


# ---- lost work ------------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """Of one attempt, by its own log: the step it began from and when, its last step and when."""

    pid: int
    first: int
    from_s: float
    step: int
    last_s: float


def lost_work(tree: Tree, interval_s: float, kills: int) -> dict[str, Any]:
    """One task, killed so often at moments by chance between two of its checkpoints."""
    rng, every = named_random(1, f"kills {interval_s}"), round(interval_s / STEP_S)
    script, log = tree.folder / "steps.py", tree.folder / f"steps-every-{every}"
    script.write_text(SCRIPT)
    log.touch()
    text = STEPS.format(
        name=log.name, python=sys.executable, script=script, log=log, every=every, step_s=STEP_S
    )
    task_id = tree.submit("cn", text)

    def in_life(number: int, steps: int) -> bool:
        lived = lives(log)
        return len(lived) > number and lived[number].step - lived[number].first >= steps

    lost, again = [], []
    for number in range(kills):
        wait(partial(in_life, number, every), 120, f"a checkpoint of {task_id}")
        time.sleep(rng.uniform(0, interval_s))
        os.kill(lives(log)[number].pid, signal.SIGKILL)
        wait(partial(in_life, number + 1, 0), 120, f"the next attempt of {task_id}")
        killed, after = lives(log)[number : number + 2]
        lost.append((killed.step - after.first) * STEP_S)
        again.append(after.from_s - killed.last_s)
    tree.clients["cn"].call("POST", f"/tasks/{task_id}/cancel")
    wait(partial(tree.is_, task_id, "cancelled"), 60, f"{task_id} is cancelled")
    return {
        "checkpoint_every_s": interval_s, "kills": kills, "lost_mean_s": statistics.mean(lost), "lost_max_s": max(lost),
        "again_after_p50_s": statistics.median(again), "again_after_max_s": max(again),
    }  # fmt: skip


def lives(log: Path) -> list[Life]:
    """A line that is half written is left out."""
    found: dict[int, Life] = {}
    for line in log.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        what, pid, step, at_s = line.split()
        if what == "from":
            found[int(pid)] = Life(int(pid), int(step), float(at_s), int(step), float(at_s))
        else:
            found[int(pid)].step, found[int(pid)].last_s = int(step), float(at_s)
    return list(found.values())


# ---- all of it --------------------------------------------------------------------------------------------------------------


def all_figures(times: int, window_s: float) -> tuple[list[Figure], list[dict[str, Any]]]:
    """`times` submissions at each level; tasks per second over the window."""
    with a_tree(simulated=True) as tree:
        figure, row = sustained(tree, "simulated", window_s)
    figures, rows = [figure], [row]
    with a_tree(simulated=False) as tree:
        placed, more = placement(tree, times)
        for interval_s in INTERVALS_S:
            row = lost_work(tree, interval_s, KILLS)
            placed.append(
                Figure(f"lost_work_mean_s_every_{interval_s:g}s", round(row["lost_mean_s"], 3), "s")
            )
            placed.append(Figure(f"lost_work_max_s_every_{interval_s:g}s", round(row["lost_max_s"], 3), "s"))
            more.append(row)
        figure, row = sustained(tree, "processes", window_s)
    return [*figures, *placed, figure], [*rows, *more, row]
