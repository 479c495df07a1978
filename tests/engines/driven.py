"""A leaf engine over a real queue, driven by hand."""

import json
import time
from dataclasses import replace

import msgspec

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.make import leaf_engine
from qipan.events import (
    LeaseGranted,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskProgress,
    TaskStarted,
)
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import LeaseId, Order, TaskId
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload import Launch, Model, Task, Work

CHIP = ChipClassId("sim/a")
WAIT = 'trap "exit 0" TERM; for i in $(seq 600); do sleep 0.1; done'


def points() -> tuple[Point, ...]:
    return tuple(Point(f"{CHIP}:{n}", (Need(CHIP, n),), n / 8, n / 8, n / 8, stop_s=5) for n in range(1, 9))


class Bench:
    """One engine over the cluster, driven by hand."""

    def __init__(self, cluster, folder, share="1.0", wait="20s", options=None):
        devices = cluster.nodes * cluster.devices
        pool = Pool(
            PoolId("dc/a"), BoardId("dc"), CHIP, devices, cluster.devices, 1, resource=cluster.resource
        )
        options = {
            **(options or cluster.options()),
            "share": share,
            "wait": wait,
            "folder": str(folder / "shared"),
        }
        self.board = BoardSpec(BoardId("dc"), pools=(pool,), engine=cluster.engine, engine_options=options)
        self.folder, self.generation, self.after = folder, 0, 0
        self.open()

    def open(self):
        self.engine = leaf_engine(self.board, self.folder / "engine", SystemClock(), self.folder / "ckpt")

    def order(self, run, task):
        launch = msgspec.json.encode(Launch(Task("train", task, run=run, workdir=str(self.folder))))
        return Order(TaskId(task), "alice", task, Curve(points(), 10.0), 1, 0.0, elastic=True, launch=launch)

    def reserve(self, run, devices=1, task="t", lease_s=60.0, per_node=0):
        self.generation += 1
        need = (Need(CHIP, devices, per_node),)
        lease = LeaseId(f"l-{task}")
        self.engine.reserve(
            Reserve(TaskId(task), lease, 1, self.generation, self.order(run, task), need, lease_s)
        )

    def start(self, run, devices=1, task="t", lease_s=60.0, per_node=0):
        self.reserve(run, devices, task, lease_s, per_node)
        self.until(LeaseGranted, task_id=task)
        self.go(task, devices, per_node)

    def go(self, task, devices=1, per_node=0):
        """Start in the lease that was granted."""
        self.generation += 1
        point = replace(points()[devices - 1], needs=(Need(CHIP, devices, per_node),))
        self.engine.start(Start(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 1, (point,)))

    def stop(self, park=True, task="t"):
        self.generation += 1
        self.engine.stop(Stop(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, park, "test"))

    def renew(self, task="t", lease_s=60.0):
        self.engine.renew(Renew((LeaseId(f"l-{task}"),), 1, lease_s))

    def resize(self, devices, task="t"):
        self.generation += 1
        point = (points()[devices - 1],)
        self.engine.resize(Resize(TaskId(task), LeaseId(f"l-{task}"), 1, self.generation, 2, point))

    def until(self, kind, limit_s=40.0, **fields):
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            for seq, fact in self.engine.observe(self.after):
                self.after = seq
                if isinstance(fact, kind) and all(
                    getattr(fact, name) == value for name, value in fields.items()
                ):
                    return fact
            time.sleep(0.02)
        seen = [fact for _, fact in self.engine.observe(0)]
        raise AssertionError(f"no {kind.__name__} {fields} in {limit_s} s; there were {seen}")

    def log(self, task="t", attempt=1):
        return (self.folder / "engine" / "control" / f"{task}-{attempt}" / "log.txt").read_text()

    def poll_until(self, done, limit_s=60.0):
        end_s = time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < end_s, f"not in {limit_s} s"
            self.engine.observe(self.after)
            time.sleep(0.1)

    def events(self, attempt: int, task: str = "t") -> list[dict]:
        said = self.folder / "engine" / "attempts" / f"{task}-{attempt}" / "events.jsonl"
        return [json.loads(line) for line in said.read_text().splitlines()]


STEPS = 400


def train_points() -> tuple[Point, ...]:
    """The built-in trainer, data parallel on one device or two."""
    made = []
    for n in (1, 2):
        stage = Stage(CHIP, ((0, 2),), dp=n, rows_per_dp=(4 // n,) * n)
        strategy = Strategy(0, 32, 4, (SiteStrategy("here", (stage,)),))
        made.append(
            Point(
                f"{CHIP}:{n}",
                (Need(CHIP, n, 1 if n == 2 else 0),),
                n / 2,
                n / 2,
                n / 2,
                stop_s=10,
                strategy=strategy,
            )
        )
    return tuple(made)


def a_gang_trains_on_two_nodes_and_goes_on_on_one(bench: Bench) -> None:
    """The built-in trainer, a rank on each of two nodes, is stopped, and ends on one device from what it had saved."""
    model = Model("test", 2, 32, 4, 4, 8, 64, 0, tied_embeddings=True)
    work = Work(STEPS * 128, 128, 32)
    launch = msgspec.json.encode(Launch(Task("train", "t", model, ("fortunes:song100",), work)))
    one, two = train_points()
    order = Order(TaskId("t"), "alice", "t", Curve((one, two), 10.0), 1, 0.0, elastic=True, launch=launch)

    def begin(point: Point, attempt: int) -> None:
        bench.generation += 2
        lease = LeaseId(f"l-t-{attempt}")
        bench.engine.reserve(Reserve(TaskId("t"), lease, 1, bench.generation - 1, order, point.needs, 600.0))
        bench.until(LeaseGranted, lease_id=lease, limit_s=120)
        bench.engine.start(Start(TaskId("t"), lease, 1, bench.generation, attempt, (point,)))
        bench.until(TaskStarted, attempt=attempt, limit_s=60)

    begin(two, 1)
    bench.until(TaskProgress, limit_s=300)
    bench.generation += 1
    bench.engine.stop(Stop(TaskId("t"), LeaseId("l-t-1"), 1, bench.generation, True, "test"))
    exited = bench.until(TaskExited, limit_s=120)
    assert (exited.outcome, exited.usage.devices) == ("parked", 2), bench.log()
    parked = next(said for said in bench.events(1) if said["event"] == "parked")
    assert 0 < parked["step"] < STEPS
    begin(one, 2)
    exited = bench.until(TaskExited, attempt=2, limit_s=300)
    assert exited.outcome == "done", bench.log(attempt=2)
    resumed = next(said for said in bench.events(2) if said["event"] == "resumed")
    assert resumed["step"] == parked["step"]
    losses = [
        said["loss"] for number in (1, 2) for said in bench.events(number) if said["event"] == "progress"
    ]
    assert losses[-1] < losses[0]
