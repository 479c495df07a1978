"""Ten written cases: the limit is named, and following the remedy removes it."""

import json
import math
import random
from dataclasses import replace

import msgspec
import pytest
from typer.testing import CliRunner

from qipan.catalogue import load_catalogue
from qipan.cli.app import app
from qipan.hardware import BoardId, ChipClassId, Pool, PoolId, Storage
from qipan.planner.balance import balance, balance_room, cheapest, limiting
from qipan.planner.machine import Job, Room, room_of, run, scaled
from qipan.store.folder import StoreFolder
from qipan.workload.cards import CARDS
from qipan.workload.parse import load_task
from qipan.workload.site import load_site

CHIPS = load_catalogue().chips
TERA = 10**12


def room(
    chip: str = "nvidia/h100-sxm5-80gb",
    devices: int = 1024,
    read: float = 100e9,
    write: float = 100e9,
    capacity: int = 0,
    failures: float = 3.79e-3,
    **figures: float,
) -> Room:
    name = ChipClassId(chip)
    pool = Pool(PoolId("dc/p"), BoardId("dc"), name, devices, 8, 10_000_000, failures_per_node_day=failures)
    known = CHIPS[name]
    changed = {key: replace(getattr(known, key), value=value) for key, value in figures.items()}
    return room_of(
        replace(known, **changed), pool, Storage("dc/storage", BoardId("dc"), capacity, read, write)
    )


def job(model: str = "llama-3-70b", tokens: int = 2 * TERA, rows: int = 1024, seq: int = 8192, per_token: float = 4.0) -> Job:  # fmt: skip
    return Job(CARDS[model], tokens, rows, seq, per_token)


VIDEO = 3900.0
CASES = {
    "a well built room computes": (job(), room(), "FLOPs"),
    "a slow network between sharded nodes": (job(rows=512), room(devices=512, nic_bytes_per_s=2e8), "NIC"),
    "ranks of one sequence each on a slow network": (
        job("llama-2-7b", rows=256, seq=2048),
        room(devices=256, nic_bytes_per_s=2e8),
        "NIC",
    ),
    "tensor parallel over PCIe": (
        job("llama-3.1-405b", rows=128),
        room(devices=1024, intra_node_bytes_per_s=1e9, nic_bytes_per_s=50e9),
        "intra-node link",
    ),
    "video from a disk": (job("llama-3-8b", per_token=VIDEO), room(devices=512, read=2e9), "storage read"),
    "pictures from one server": (
        job("llama-3-8b", per_token=400.0),
        room(devices=1024, read=5e8),
        "storage read",
    ),
    "a checkpoint that takes longer than two failures are apart": (
        job("llama-3.1-405b"),
        room(devices=2048, write=2e7, failures=2e-3),
        "storage write",
    ),
    "nodes that fail all day": (job(), room(devices=1024, failures=3.0), "failures"),
    "a model that does not fit": (job("llama-3.1-405b"), room(devices=64), "HBM capacity"),
    "data that does not fit": (job(per_token=VIDEO), room(capacity=10**15), "storage capacity"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_named_and_its_remedy_removes_it(case):
    task, place, wanted = CASES[case]
    found = balance(task, place)
    assert found.limit == wanted, [(part.name, part.limits_s) for part in found.parts]
    assert found.factor > 1
    assert found.then != wanted
    after = scaled(place, wanted, found.factor)
    assert limiting(task, after)[0] != wanted
    assert run(task, after).finish_s < found.outcome.finish_s


def test_a_tenth_more_of_what_limits_saves_most_of_what_is_no_chip():
    found = balance(*CASES["video from a disk"][:2])
    best = max(found.parts, key=lambda part: part.saved_s_per_cny)
    assert best.name == "storage read"


def test_the_cheapest_way_to_a_deadline_is_found_by_hand_too():
    task, place = job(tokens=TERA // 2), room()
    alone = [run(task, replace(place, devices=count)) for count in (128, 256, 512, 1024)]
    deadline_s = alone[2].finish_s * 1.01
    found = cheapest(task, place, deadline_s)
    assert found is not None
    assert found.finish_s <= deadline_s
    assert found.cost_micro_cny <= min(one.cost_micro_cny for one in alone if one.finish_s <= deadline_s)
    assert cheapest(task, place, 3600.0) is None


def test_a_room_is_limited_by_what_limits_most_of_its_device_seconds():
    place = room(devices=512, read=2e9)
    found = balance_room(
        [("film", job("llama-3-8b", per_token=VIDEO)), ("text", job("llama-3-8b", tokens=10**11))], place
    )
    assert next(iter(found.share_by_limit)) == "storage read"
    assert math.isclose(sum(found.share_by_limit.values()), 1)


def test_the_command_tells_people_and_programs():
    run_ = CliRunner()
    asked = [
        "balance",
        "examples/llama-70b.yaml",
        "--site",
        "examples/sites/three-vendors.yaml",
        "--chip",
        "mi300x",
    ]
    shown = run_.invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    for words in ("limited by", "cheapest in time", "storage write", "saved per 1000 CNY"):
        assert words in shown.output
    (found,) = json.loads(run_.invoke(app, [*asked, "--json"]).output)
    assert found["limit"] == "FLOPs"
    assert found["cheapest"]["finish_s"] <= 30 * 86400
    site = json.loads(run_.invoke(app, [*asked[:1], asked[1], asked[1], *asked[2:], "--json"]).output)
    assert [len(room["tasks"]) for room in site] == [2]
    none = run_.invoke(app, [*asked[:-1], "abacus"])
    assert none.exit_code != 0


def test_the_last_tasks_of_a_store_are_read(tmp_path):
    site = load_site("examples/sites/three-vendors.yaml")
    task = load_task("examples/llama-70b.yaml")
    board = StoreFolder(tmp_path).open(site.root.board)
    board.save_submission("llama-1", None, 0.0, msgspec.json.encode(task), b"{}")
    board.close()
    asked = [
        "balance",
        "--site",
        "examples/sites/three-vendors.yaml",
        "--store",
        str(tmp_path),
        "--chip",
        "a100",
        "--json",
    ]
    (room_,) = json.loads(CliRunner().invoke(app, asked).output)
    assert [name for name, _ in room_["tasks"]] == ["llama-70b"]


def test_more_of_anything_is_never_slower():
    chance = random.Random(3)
    for _ in range(6):
        place = room(
            devices=chance.choice((64, 256)),
            read=chance.choice((1e9, 1e11)),
            write=chance.choice((1e9, 1e11)),
        )
        task = job("llama-3-8b", tokens=10**11, rows=512, per_token=chance.choice((4.0, VIDEO)))
        before = run(task, place).finish_s
        for name in ("HBM capacity", "intra-node link", "NIC", "storage read", "storage write", "failures"):
            assert run(task, scaled(place, name, 1.5)).finish_s <= before * (1 + 1e-9), name
