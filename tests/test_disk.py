"""A disk that fills: nothing half written, a clear word, and it goes on when there is room again.  The disk is a small tmpfs."""

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import qipan.cli.run
from qipan.cli.run import operator_token, while_disk_is_full
from qipan.client import Client, Task
from qipan.disk import has_room, is_full, takes_a_file, told
from qipan.errors import DiskFull, Unreachable
from qipan.events import TaskExited, TaskStarted
from qipan.store.database import Sqlite
from qipan.trainer.stream import Fed
from test_grid import free_port, until
from test_local_engine import Bench

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def small(tmp_path):
    """A disk of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 16, 1):  # to the last byte
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def test_a_full_disk_is_known_by_any_of_its_names():
    outside = RuntimeError("outside")
    outside.__cause__ = OSError(errno.ENOSPC, "no space")
    assert is_full(outside)
    assert is_full(DiskFull("words"))
    assert not is_full(OSError(errno.EACCES, "no right"))
    assert not is_full(sqlite3.OperationalError("database is locked"))
    assert issubclass(DiskFull, Unreachable), "a caller waits and tries again"


@needs_root
def test_a_disk_is_called_full_only_when_it_is(small):
    assert "full" not in told(small)
    fill(small)
    assert told(small).startswith("its disk is full, 0 of 25,165,824 bytes are free")


@needs_root
def test_the_operators_token_is_written_whole_or_not_at_all(small):
    fill(small)
    with pytest.raises(OSError, match="No space"):
        operator_token(small)
    assert not (small / "token").exists()
    (small / "ballast").unlink()
    assert operator_token(small) == (small / "token").read_text() != ""


@needs_root
def test_what_does_not_fit_is_not_stored_at_all_and_fits_when_there_is_room(small):
    store = Sqlite(small / "board.db")
    store.run("CREATE TABLE kept (number INTEGER, body TEXT)")
    store.run("INSERT INTO kept VALUES (0, 'before')")
    fill(small)

    def many() -> None:
        with store.transaction():
            for number in range(1, 50):
                store.run("INSERT INTO kept VALUES (?, ?)", (number, "x" * 20_000))

    with pytest.raises(DiskFull, match="make room"):
        many()
    assert store.rows("SELECT number FROM kept") == [(0,)]
    (small / "ballast").unlink()
    with store.transaction():
        store.run("INSERT INTO kept VALUES (1, ?)", ("x" * 20_000,))
    assert store.row("PRAGMA integrity_check") == ("ok",)
    assert store.rows("SELECT number FROM kept") == [(0,), (1,)]
    store.close()


@needs_root
def test_an_engines_journal_loses_no_fact_and_takes_up_what_ran(small):
    bench = Bench(small / "engine")
    bench.start("sleep 2")
    bench.until(TaskStarted, task_id="t")
    journal = small / "engine" / "journal.jsonl"
    fill(small)

    def refusals() -> None:
        for number in range(2000):  # no such lease: a fact each
            bench.stop(task=f"none{number}")

    with pytest.raises(OSError, match="No space"):
        refusals()
    whole = journal.read_bytes()
    assert whole.endswith(b"\n"), "what comes next stands on a line of its own"
    bench.open()  # as a process that starts again, on the full disk
    assert journal.read_bytes()[: len(whole)] == whole
    (small / "ballast").unlink()
    assert bench.until(TaskExited, task_id="t").outcome == "done"


@needs_root
def test_how_a_task_ended_while_the_disk_was_full_is_told_when_there_is_room(small):
    bench = Bench(small / "engine")
    bench.start("sleep 1")
    bench.until(TaskStarted, task_id="t")
    fill(small)
    time.sleep(2.5)
    control = next((small / "engine" / "control").iterdir())
    assert not (control / "exit.json").exists()
    (small / "ballast").unlink()
    ended = bench.until(TaskExited, task_id="t")
    assert (ended.outcome, ended.exit_code) == ("done", 0)


@needs_root
def test_a_disk_without_inodes_takes_no_file_though_it_has_room(small):
    assert takes_a_file(small)
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", str(small)], check=True)
    (small / "last").touch()
    assert has_room(small)
    assert not takes_a_file(small)
    (small / "last").unlink()
    assert takes_a_file(small)
    assert not list(small.iterdir())


def test_a_limit_that_the_disk_does_not_show_is_no_hot_loop(tmp_path):
    tries, ended = [], threading.Event()

    def act() -> int:
        tries.append(has_room(tmp_path))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    threading.Timer(0.3, ended.set).start()
    assert while_disk_is_full(tmp_path, ended, act) == 130
    assert tries == [True]


@needs_root
def test_a_command_that_found_no_room_begins_anew_when_there_is_some(small, capsys, monkeypatch):
    monkeypatch.setattr(qipan.cli.run, "FULL_S", 0.3)
    tries = []

    def act() -> int:
        tries.append(has_room(small))
        if not tries[-1]:
            (small / "note").write_bytes(b"x" * 100_000)
        return 7

    fill(small)
    threading.Timer(1.2, (small / "ballast").unlink).start()
    assert while_disk_is_full(small, threading.Event(), act) == 7
    assert tries == [False, True]
    said = capsys.readouterr().err
    assert "its disk is full" in said
    assert "goes on" in said


@needs_root
@pytest.mark.computes
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_that_finds_no_room_leaves_nothing_and_the_one_before_stays(small):
    import torch

    from qipan.trainer import checkpoint

    model = torch.nn.Linear(256, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(small, model, optimizer, 1, "one", 2.0)
    kept = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    fill(small)
    for step in (2, 1):  # also of the step that is saved already
        with pytest.raises(DiskFull, match=f"step-0000000{step}"):
            checkpoint.save(small, model, optimizer, step, "one", 1.0)
        assert [found.step for found in checkpoint.committed(small)] == [1]
    assert sorted(path.name for path in small.iterdir()) == ["ballast", "best", "step-00000001"]
    checkpoint.load(small / "step-00000001", model, optimizer)
    assert torch.equal(model.weight, kept)
    (small / "ballast").unlink()
    for validation in (1.5, 1.0):  # the second takes the place of the first
        checkpoint.save(small, model, optimizer, 3, "one", validation)
        assert [found.step for found in checkpoint.committed(small)] == [1, 3]
        assert checkpoint.committed(small)[-1].validation_loss == validation
    assert sorted(path.name for path in small.iterdir()) == ["best", "step-00000001", "step-00000003"]


@pytest.mark.computes
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_kill_while_a_better_checkpoint_takes_the_place_of_the_best_leaves_one(tmp_path, monkeypatch):
    import torch

    from qipan.trainer import checkpoint

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path, model, optimizer, 1, "one", 2.0)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "best.new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        for validation in (1.5, 1.0):  # also where the last kill left none under its own name
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, model, optimizer, 2, "one", validation)
            found = checkpoint.best(tmp_path)
            assert found is not None
            assert (found.step, found.validation_loss) == (1, 2.0)
    checkpoint.save(tmp_path, model, optimizer, 2, "one", 1.0)
    found = checkpoint.best(tmp_path)
    assert found is not None
    assert (found.step, found.validation_loss) == (2, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000001", "step-00000002"]


@pytest.mark.computes
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_over_a_quota_is_told_as_a_full_disk(tmp_path, monkeypatch):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    from qipan.trainer import checkpoint

    def over_quota(*_: object, **__: object) -> None:
        quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        raise CheckpointException("write", {0: _wrap_exception(quota)})

    monkeypatch.setattr(dcp, "save", over_quota)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(DiskFull, match="quota"):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), 1, "one", 1.0)
    assert not list(tmp_path.iterdir())


FEED = """
import sys
from qipan.trainer.stream import feed

feed(lambda position: {"bin": bytes([position]) * 2**20}, samples=40, workers=2, ahead_bytes=2**30, per_piece=1, folder=sys.argv[1])
"""


@needs_root
def test_a_stream_that_fills_the_disk_waits_for_room_and_loses_nothing(small):
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("QIPAN_")},
        "PYTHONPATH": str(Path("src").absolute()),
    }
    command = [sys.executable, "-c", FEED, str(small)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: process.poll() is not None or not has_room(small))
    time.sleep(1.0)  # some tries without room
    stream = Fed(small, "prepare")
    for position in range(40):
        assert process.poll() in (None, 0), process.communicate()[0]
        assert stream.raw(position) == {"bin": bytes([position]) * 2**20}
        stream.saved(position + 1)
    stream.close()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0, out
    assert "its disk is full" in out
    assert sorted(path.name for path in small.iterdir()) == ["reader-0.json", "stream.json"]


@needs_root
@pytest.mark.slow
def test_a_board_on_a_full_disk_says_so_takes_nothing_and_goes_on_by_itself(small):
    store, log = small / "store", small.parent / "up.log"
    site = small.parent / "site.yaml"
    site.write_text(
        "site:\n  board: {name: dc, region: cn, pools: [{chip: sim/a, devices: 2, tariff: 1 CNY}]}\n"
        "  tenants: [{name: poets, balance: 100 CNY}]\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path("src").absolute())}
    command = [sys.executable, "-m", "qipan.cli"]
    made = [
        *command,
        "grid",
        "init",
        "--name",
        "dc",
        "--url",
        f"grid://127.0.0.1:{free_port()}",
        "--store",
        str(store),
    ]
    subprocess.run(made, env=env, check=True, capture_output=True)
    served = [*command, "board", "serve", "--site", str(site), "--store", str(store), "--no-probe"]
    with log.open("w") as file:
        process = subprocess.Popen(served, env=env, cwd=small.parent, stdout=file, stderr=file)
    task = (
        "kind: train\nname: {name}\ntenant: poets\nrun: sleep {seconds}; echo done\ndevices: 1\n"
        "limits: {{time: 20s, max_cost: 1 CNY}}\n"
    )
    try:
        until(lambda: "is served" in log.read_text(), 30, "it is served")
        long = Client(store).submit(Task(task.format(name="long", seconds=6), "task.yaml", str(small.parent)))
        until(lambda: Client(store).call("GET", f"/tasks/{long.task_id}")["state"] == "running", 20)
        fill(small)

        def submit_many() -> None:
            for number in range(50):
                text = task.format(name=f"many{number}", seconds=0)
                Client(store).submit(Task(text, "task.yaml", str(small.parent)))

        with pytest.raises(Unreachable) as told:
            submit_many()
        assert "disk is full" in str(told.value)
        until(lambda: "decides and takes nothing" in log.read_text(), 20, log.read_text)
        (small / "ballast").unlink()

        def ends() -> bool:
            try:
                return Client(store).call("GET", f"/tasks/{long.task_id}")["state"] == "done"
            except Unreachable:
                return False

        until(ends, 30, log.read_text)
        events = list(Client(store).list(f"/tasks/{long.task_id}/events", "events"))
        assert str(events).count("task_started") == 1, "it ran on, once"
    finally:
        process.terminate()
        process.wait(20)
