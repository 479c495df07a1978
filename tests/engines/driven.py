"""A leaf engine over a real queue, driven by hand."""

import time

import msgspec

from qipan.clock import SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.make import leaf_engine
from qipan.events import LeaseGranted, Renew, Reserve, Resize, Start, Stop
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import LeaseId, Order, TaskId
from qipan.workload import Launch, Task

CHIP = ChipClassId("sim/a")
WAIT = 'trap "exit 0" TERM; for i in $(seq 600); do sleep 0.1; done'


def points() -> tuple[Point, ...]:
    return tuple(Point(f"{CHIP}:{n}", (Need(CHIP, n),), n / 8, n / 8, n / 8, stop_s=5) for n in range(1, 9))


class Bench:
    """One engine over the cluster, driven by hand."""

    def __init__(self, cluster, folder, share="1.0", wait="20s"):
        devices = cluster.nodes * cluster.devices
        pool = Pool(
            PoolId("dc/a"), BoardId("dc"), CHIP, devices, cluster.devices, 1, resource=cluster.resource
        )
        options = {**cluster.options(), "share": share, "wait": wait, "folder": str(folder / "shared")}
        self.board = BoardSpec(BoardId("dc"), pools=(pool,), engine=cluster.engine, engine_options=options)
        self.folder, self.generation, self.after = folder, 0, 0
        self.open()

    def open(self):
        self.engine = leaf_engine(self.board, self.folder / "engine", SystemClock(), self.folder / "ckpt")

    def order(self, run, task):
        launch = msgspec.json.encode(Launch(Task("train", task, run=run, workdir=str(self.folder))))
        return Order(TaskId(task), "alice", task, Curve(points(), 10.0), 1, 0.0, elastic=True, launch=launch)

    def reserve(self, run, devices=1, task="t", lease_s=60.0):
        self.generation += 1
        need = (Need(CHIP, devices),)
        lease = LeaseId(f"l-{task}")
        self.engine.reserve(
            Reserve(TaskId(task), lease, 1, self.generation, self.order(run, task), need, lease_s)
        )

    def start(self, run, devices=1, task="t", lease_s=60.0):
        self.reserve(run, devices, task, lease_s)
        self.until(LeaseGranted, task_id=task)
        self.go(task, devices)

    def go(self, task, devices=1):
        """Start in the lease that was granted."""
        self.generation += 1
        point = points()[devices - 1]
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
        return (self.folder / "engine" / "attempts" / f"{task}-{attempt}" / "log.txt").read_text()

    def poll_until(self, done, limit_s=60.0):
        end_s = time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < end_s, f"not in {limit_s} s"
            self.engine.observe(self.after)
            time.sleep(0.1)
