"""A training task shrinks and grows on the local engine: in the processes that run, and started again from its checkpoint.

Two chips of a quarter of a core train the poems of the demo; the task is ordered to one chip and back, in both forms by turns.
`ordered`: from the order to the next attempt; `standstill`: the longest time without a step, less a usual one.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.form import Figure, arguments, write
from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.leaf import LeafEngine
from qipan.engines.local import Processes
from qipan.events import Fact, Renew, Reserve, Resize, Start, Stop, TaskExited, TaskStarted
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload import Launch, Model, Task, Work

CHIP, SHARE, LAYERS, ROWS, SEQ, STEPS = ChipClassId("sim/a"), 0.25, 4, 16, 64, 100_000
AFTER_S = 4.0  # of training after each change
TASK, LEASE, LEASE_S = TaskId("poems"), LeaseId("lease"), 60.0


class Restarting(Processes):
    """The form without: every rank is started again."""

    def rank(self, hold: Any) -> None:
        return None


def main() -> None:
    given = arguments("resize", runs=3)
    rows = [
        row
        for run in range(given.runs)
        for form in ("in place", "restart")
        for row in changes(form, run)
    ]  # fmt: skip
    figures = []
    for change in ("shrink", "grow"):
        for form in ("in place", "restart"):
            own = [row for row in rows if (row["change"], row["form"]) == (change, form)]
            for what in ("ordered_s", "standstill_s"):
                name = f"{change}_{form.replace(' ', '_')}_{what}"
                figures.append(Figure(name, statistics.median(row[what] for row in own), "s"))
    write(given.json, figures, rows, runs=given.runs, share=SHARE, layers=LAYERS, rows_a_batch=ROWS, seq=SEQ)


def point(devices: int) -> Point:
    stage = Stage(CHIP, ((0, LAYERS),), dp=devices, rows_per_dp=(ROWS // devices,) * devices)
    strategy = Strategy(0, SEQ, ROWS, (SiteStrategy("here", (stage,)),))
    return Point(
        f"{CHIP}:{devices}",
        (Need(CHIP, devices),),
        devices / 2,
        devices / 2,
        devices / 2,
        15.0,
        3.0,
        strategy,
    )


class Bench:
    def __init__(self, folder: Path, form: str) -> None:
        pool = Pool(PoolId("dc/a"), BoardId("dc"), CHIP, 2, 2, 1, cpu_share=SHARE)
        board = BoardSpec(BoardId("dc"), pools=(pool,))
        launcher = Processes(board) if form == "in place" else Restarting(board)
        self.folder, self.seen, self.generation = folder, 0, 0
        self.engine = LeafEngine(EngineId("dc"), board, folder, SystemClock(), folder / "ckpt", launcher)

    def next(self) -> int:
        self.generation += 1
        return self.generation

    def until(self, kind: type, limit_s: float = 200.0) -> tuple[float, Fact]:
        """(when it was seen, the next fact of a kind)."""
        ends_s = time.monotonic() + limit_s
        while time.monotonic() < ends_s:
            self.engine.renew(Renew((LEASE,), 1, LEASE_S))
            for number, fact in self.engine.observe(self.seen):
                self.seen = number
                if isinstance(fact, kind):
                    return time.time(), fact
            time.sleep(0.05)
        logs = [path.read_text()[-2000:] for path in self.folder.glob("control/*/log.txt")]
        sys.exit(f"no {kind.__name__} in {limit_s} s; logs: {logs}")

    def steps(self) -> list[tuple[float, int]]:
        """(when, step) of every line of progress."""
        found = []
        for path in self.folder.glob("attempts/*/events.jsonl"):
            for line in path.read_text().splitlines():
                told = json.loads(line)
                if told["event"] == "progress":
                    found.append((told["at_s"], told["step"]))
        return sorted(found)

    def train(self, past_s: float, seconds: float) -> None:
        """Until it has trained for so long after `past_s`."""
        while not any(at_s > past_s + seconds for at_s, _ in self.steps()):
            self.engine.renew(Renew((LEASE,), 1, LEASE_S))
            self.seen = max([self.seen, *(n for n, _ in self.engine.observe(self.seen))])
            time.sleep(0.1)


def changes(form: str, run: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="qipan-resize-") as folder:
        bench = Bench(Path(folder) / "engine", form)
        model = Model("poems", LAYERS, 96, 6, 6, 16, 256, 0, tied_embeddings=True)
        task = Task(
            "train", "poems", model, ("fortunes:tang300+song100",), Work(STEPS * ROWS * SEQ, ROWS * SEQ, SEQ)
        )
        order = Order(
            TASK, "poets", "poems", Curve((point(1), point(2)), 1e6), 1, 0.0, elastic=True,
            launch=msgspec.json.encode(Launch(task)),
        )  # fmt: skip
        bench.engine.reserve(Reserve(TASK, LEASE, 1, bench.next(), order, (Need(CHIP, 2),), LEASE_S))
        bench.engine.start(Start(TASK, LEASE, 1, bench.next(), 1, (point(2),)))
        began_s, _ = bench.until(TaskStarted)
        bench.train(began_s, AFTER_S)
        rows = []
        for change, devices in (("shrink", 1), ("grow", 2)):
            ordered_s = time.time()
            bench.engine.resize(Resize(TASK, LEASE, 1, bench.next(), 2, (point(devices),)))
            _, exited = bench.until(TaskExited)
            started_s, _ = bench.until(TaskStarted)
            assert isinstance(exited, TaskExited)
            assert exited.in_place == (form == "in place"), exited
            bench.train(started_s, AFTER_S)
            times = [at_s for at_s, _ in bench.steps() if at_s > ordered_s - 2]
            gaps = np.diff(times)
            rows.append({
                "run": run, "form": form, "change": change, "ordered_s": started_s - ordered_s,
                "standstill_s": float(gaps.max() - np.median(gaps)), "why": exited.why,
            })  # fmt: skip
        bench.engine.stop(Stop(TASK, LEASE, 1, bench.next(), False, "over"))
        bench.until(TaskExited)
        bench.engine.close()
        return rows


if __name__ == "__main__":
    main()
