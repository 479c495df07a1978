"""Ranks leave and join a training task whose other processes go on: nobody is started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer.world_board import WorldBoard, WorldOrder
from qipan.workload import Model, Task, Work

ROWS, SEQ, STEPS = 8, 32, 300


def strategy(rows: tuple[int, ...], *, tp: int = 1) -> Strategy:
    stage = Stage("cpu", ((0, 2),), tp=tp, dp=len(rows), rows_per_dp=rows)
    return Strategy(0, SEQ, ROWS, (SiteStrategy("here", (stage,)),))


def start(folder: Path, made: Strategy, port: int, **environment: str) -> "subprocess.Popen[bytes]":
    model = Model("test", 2, 32, 4, 4, 8, 64, 0, tied_embeddings=True)
    task = Task("train", "t", model, ("fortunes:song100",), Work(STEPS * ROWS * SEQ, ROWS * SEQ, SEQ))
    folder.mkdir(exist_ok=True)
    whole = {
        **os.environ, "QIPAN_TASK": msgspec.json.encode(task).decode(), "QIPAN_STRATEGY": made.to_json(),
        "QIPAN_CHECKPOINT_DIR": str(folder / "ckpt"), "QIPAN_EVENTS": str(folder / "events"), "QIPAN_CONTROL": str(folder / "stop"),
        "QIPAN_CHECKPOINT_EVERY_S": "1000", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore", **environment,
    }  # fmt: skip
    (folder / "ckpt").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "qipan.trainer"], env=whole, stderr=(folder / "err").open("ab")
    )


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "events"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [one for one in found if one["event"] == kind]


def until(condition, folder: Path) -> None:
    ends_s = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < ends_s, (folder / "err").read_text()[-3000:]
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_ranks_leave_and_join_while_the_others_train_on(tmp_path):
    port, board = free_port(), WorldBoard(tmp_path / "moved")
    two = strategy((4, 4))
    first = start(tmp_path / "moved", two, port, RANK="0", WORLD_SIZE="2")
    second = start(tmp_path / "moved", two, port, RANK="1", WORLD_SIZE="2")
    alone = start(tmp_path / "alone", strategy((8,)), 0)
    until(lambda: events(tmp_path / "moved", "ready"), tmp_path / "moved")
    board.write(WorldOrder(1, strategy((8,)), (0,)))
    until(lambda: len(events(tmp_path / "moved", "reshaped")) == 1, tmp_path / "moved")
    first.send_signal(signal.SIGSTOP)  # a fast machine must not finish while the newcomer does its imports
    assert second.wait(60) == 0, "whoever leaves, leaves well"
    board.write(WorldOrder(2, strategy((8,), tp=2), (0, 7)))
    third = start(tmp_path / "moved", two, port, QIPAN_WORKER="7")
    until((tmp_path / "moved" / "worker-7.ready").exists, tmp_path / "moved")
    first.send_signal(signal.SIGCONT)
    until(lambda: len(events(tmp_path / "moved", "reshaped")) == 2, tmp_path / "moved")
    board.write(WorldOrder(3, strategy((4, 3)), (0, 7)))  # rows that do not sum to the batch
    until(lambda: events(tmp_path / "moved", "refused"), tmp_path / "moved")
    assert [run.wait(200) for run in (first, third, alone)] == [0, 0, 0], (
        tmp_path / "moved" / "err"
    ).read_text()[-3000:]
    reshaped = events(tmp_path / "moved", "reshaped")
    assert [one["members"] for one in reshaped] == [[0], [0, 7]]
    assert len(events(tmp_path / "moved", "ready")) == 1, "worker 0 was never started again"
    [moved], [whole] = events(tmp_path / "moved", "done"), events(tmp_path / "alone", "done")
    assert moved["test_loss"] == pytest.approx(whole["test_loss"], abs=2e-3)
    assert "rows_per_dp sum to 7" in events(tmp_path / "moved", "refused")[0]["why"]
