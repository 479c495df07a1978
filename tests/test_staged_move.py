"""A task moves between two data centres that share no folder: what it saved is copied before it holds devices there."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from qipan.clock import ManualClock, SystemClock
from qipan.curves import Curve, Need, Point
from qipan.engines.launcher import Holding
from qipan.engines.leaf import LeafEngine
from qipan.engines.make import leaf_engine
from qipan.errors import InvalidInput
from qipan.events import LeaseGranted, LeaseRefused, Reserve, Start, Stop, TaskExited, TaskStarted
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId, Storage
from qipan.leases import EngineId, LeaseId, Order, TaskId
from qipan.network import Link, link_between
from qipan.transfer import Stager
from qipan.transfer.serve import server
from qipan.workload import Launch, Task
from qipan.workload.reader import read_yaml
from qipan.workload.site import parse_site

CHIP = ChipClassId("sim/a")
COUNT = """cd "$QIPAN_CHECKPOINT_DIR"; echo "found $(cat count 2>/dev/null)"
trap 'echo $((${n:-0} + 1)) > count; exit 0' TERM; n=$(cat count 2>/dev/null); while :; do sleep 0.05; done"""


class Dc:
    """A local engine with a storage of its own."""

    def __init__(self, name: str, folder: Path, storages: list[Storage], own: Storage, ways=()) -> None:
        pool = Pool(PoolId(f"{name}/a"), BoardId(name), CHIP, 2, 2, 1)
        self.name, self.folder, self.after, self.number = name, folder / name, 0, 0
        board = BoardSpec(BoardId(name), pools=(pool,))
        stager = Stager(own, storages, ways)
        self.engine = leaf_engine(board, self.folder, SystemClock(), folder / "nobody", stager)

    def reserve(self, attempt, generation, saved_s=0.0, devices=1):
        launch = msgspec.json.encode(Launch(Task("train", "t", run=COUNT)))
        point = Point("p", (Need(CHIP, devices),), 1.0, 1.0, 1.0)
        order = Order(TaskId("t"), "alice", "t", Curve((point,), 10.0), 1, 0.0, launch=launch)
        order = replace(order, attempt=attempt, saved_s=saved_s)
        self.engine.reserve(Reserve(TaskId("t"), LeaseId(self.name), 1, generation, order, point.needs, 60.0))
        return point

    def run(self, attempt, generation):
        point = self.reserve(attempt, generation)
        self.until(LeaseGranted)
        self.engine.start(Start(TaskId("t"), LeaseId(self.name), 1, generation + 1, attempt + 1, (point,)))
        self.until(TaskStarted)
        log = self.folder / "control" / f"t-{attempt + 1}" / "log.txt"
        self.poll(lambda: log.exists() and "found" in log.read_text())
        self.engine.stop(Stop(TaskId("t"), LeaseId(self.name), 1, generation + 2, True, "test"))
        exited = self.until(TaskExited)
        assert exited.outcome == "parked", exited
        return log.read_text().splitlines()[0].strip(), exited

    def until(self, kind):
        found = []

        def look():
            for seq, fact in self.engine.observe(self.after):
                self.after = seq
                found.append(fact)
            return any(isinstance(fact, kind) for fact in found)

        self.poll(look, found)
        return next(fact for fact in found if isinstance(fact, kind))

    def poll(self, done, found=()):
        end_s = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end_s, list(found)
            time.sleep(0.02)


def storage(name: str, url: object, **options: str) -> Storage:
    return Storage(f"{name}/store", BoardId(name), 0, 0.0, 0.0, url=str(url), options=options)


def test_a_task_finds_at_each_site_what_it_saved_at_the_other(tmp_path):
    stores = [storage("a", tmp_path / "store-a"), storage("b", tmp_path / "store-b")]
    a, b = (Dc(own.site, tmp_path, stores, own) for own in stores)
    said = [dc.run(attempt, 1 + 3 * attempt)[0] for attempt, dc in enumerate((a, b, b, a))]
    assert said == ["found", "found 1", "found 2", "found 3"]


def test_no_device_waits_for_data(tmp_path):
    """What is on the way holds nothing; when it cannot come, the lease is refused with the reason."""
    store = storage("a", tmp_path / "store-a")
    a = Dc("a", tmp_path, [store], store)
    a.run(0, 1)
    serving = server(tmp_path / "store-a", "127.0.0.1", 0, "s")
    (tmp_path / "token").write_text("s")
    far = storage("a", f"http://127.0.0.1:{serving.server_port}", token_file=str(tmp_path / "token"))
    own = storage("b", tmp_path / "store-b")
    b = Dc("b", tmp_path, [far, own], own)
    b.reserve(1, 4, devices=2)  # nobody serves yet
    assert len(b.engine.seats.free(CHIP)) == 2
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    b.until(LeaseGranted)
    assert len(b.engine.seats.free(CHIP)) == 0
    assert (b.folder / "checkpoints" / "t" / "count").read_text() == "1\n"
    b.engine.stop(Stop(TaskId("t"), LeaseId("b"), 1, 5, True, "test"))
    serving.shutdown()
    serving.server_close()


def test_a_storage_that_does_not_answer_is_waited_for(tmp_path):
    away = storage("a", "http://127.0.0.1:9")
    own = storage("b", tmp_path / "store-b")
    b = Dc("b", tmp_path, [away, own], own)
    b.reserve(1, 1)
    assert "a/store does not answer" in b.until(LeaseRefused).why


class Gone:
    """A launcher whose supervisors begin and are gone at once."""

    in_place = False

    def adopt(self, prefix, holds): ...
    def hold(self, hold): ...
    def release(self, hold): ...
    def devices(self):
        return {CHIP: 2}

    def draining(self, hold):
        return ""

    def out(self):
        return ()

    def environment(self, hold):
        return {}

    def command(self, hold, run):
        return []

    def groups(self, hold):
        return "", [], []

    def look(self, hold):
        return Holding("held")

    def start(self, hold, attempt):
        (attempt.control / "pid.json").write_text('{"pid": 2, "shim": 2, "started_s": 100.0}')

    def lives(self, hold, attempt):
        return False

    picks = False

    def left(self, hold, attempt):
        return []

    def busy_s(self, hold, attempt):
        return None

    def sweep(self):
        return True


class Slow:
    """A stager that keeps nothing until it is told to."""

    kept = None

    def settle(self, name, folder, attempt, saved_s):
        return self.kept


def test_nobody_pays_while_what_a_lost_attempt_saved_is_being_kept(tmp_path):
    pool = Pool(PoolId("a/a"), BoardId("a"), CHIP, 2, 2, 1)
    board, clock, stager = BoardSpec(BoardId("a"), pools=(pool,)), ManualClock(100.0), Slow()
    engine = LeafEngine(EngineId("a"), board, tmp_path, clock, tmp_path / "saved", Gone(), stager=stager)
    point = Point("p", (Need(CHIP, 1),), 1.0, 1.0, 1.0)
    launch = msgspec.json.encode(Launch(Task("train", "t", run=COUNT)))
    order = Order(TaskId("t"), "alice", "t", Curve((point,), 10.0), 1, 0.0, launch=launch)
    engine.reserve(Reserve(TaskId("t"), LeaseId("a"), 1, 1, order, point.needs, 9_000.0))
    engine.start(Start(TaskId("t"), LeaseId("a"), 1, 2, 1, (point,)))
    for now_s in (110.0, 400.0):
        clock.advance_to(now_s)
        assert not any(isinstance(fact, TaskExited) for _, fact in engine.observe(0))
    stager.kept = ""
    [exited] = [fact for _, fact in engine.observe(0) if isinstance(fact, TaskExited)]
    assert (exited.outcome, exited.usage.device_s) == ("lost", 10.0)


SITE = """
board:
  name: cn
  children:
    - name: east
      children:
        - {name: dc-a, pools: [{chip: sim/a, devices: 1, tariff: 1 CNY}], storage: [{url: /srv/a, keep: 3d}]}
    - name: west
      children:
        - {name: dc-b, pools: [{chip: sim/a, devices: 1, tariff: 1 CNY}], storage: [{url: "s3://b/q", options: {endpoint: "http://s"}}]}
links:
  - {between: [east, west], rate: 1Gbit/s, share: 0.25}
"""


def test_a_site_file_says_what_storages_there_are_and_what_lies_between():
    site = parse_site(read_yaml(SITE, "site.yaml"))
    assert [(one.site, one.url, one.keep_s) for one in site.storages] == [
        ("dc-a", "/srv/a", 3 * 86_400.0),
        ("dc-b", "s3://b/q", 30 * 86_400.0),
    ]
    assert site.storages[1].options == {"endpoint": "http://s"}
    assert [(way.source, way.target, way.bytes_per_s * way.share) for way in site.ways] == [
        ("dc-a", "dc-b", 31.25e6),
        ("dc-b", "dc-a", 31.25e6),
    ]
    with pytest.raises(InvalidInput, match="no share of a link"):
        parse_site(read_yaml(SITE.replace("0.25", "1.5"), "site.yaml"))


def test_the_most_specific_link_counts():
    wide, near = (
        Link(BoardId("east"), BoardId("west"), 1.0, 0.0),
        Link(BoardId("a"), BoardId("west"), 2.0, 0.0),
    )
    down = {"a": (BoardId("cn"), BoardId("east"), BoardId("a")), "b": (BoardId("cn"), BoardId("west"))}
    assert link_between((wide, near), down["a"], down["b"]) is near
    assert link_between((near,), down["b"], down["a"]) is None
