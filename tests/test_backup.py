"""A store backed up while its tasks run, its host lost, and the store restored on another: nothing lost, nothing twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from api_site import served, submit
from qipan.boards import verify_store
from qipan.client import Client, Task
from qipan.errors import InvalidInput, NotFound, QipanError
from qipan.store import StoreFolder
from qipan.store.backup import back_up, restore_into

HERE = Path(__file__).parent
SITE = str(HERE / "tiny_site.yaml")
TASK = """\
kind: train
name: {name}
tenant: poets
run: exec {python} -S {script}
devices: 1
limits: {{time: 20s, max_cost: 1 CNY}}
env: {{TINY_LOG: "{log}", TINY_STEPS: "{steps}", TINY_STEP_S: "0.1"}}
"""


class Up:
    """`qipan up` on a store, as an operator runs it."""

    def __init__(self, store: Path, database: str | None, host: Sequence[str] = ()) -> None:
        self.store = store
        more = ["--database", database] if database else []
        command = ["up", "--store", str(store), "--site", SITE, "--no-console", "--json", *more]
        self.process = subprocess.Popen(
            [*host, sys.executable, "-m", "qipan.cli", *command], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline())["event"] == "up"
        self.client = Client(store)

    def states(self) -> dict[str, str]:
        return {task["task_id"]: task["state"] for task in self.client.list("/tasks", "tasks")}

    def until(self, wanted, limit_s: float = 150.0) -> None:
        end_s = time.monotonic() + limit_s
        while not wanted(self.states()):
            assert time.monotonic() < end_s, self.states()
            time.sleep(0.05)

    def lose(self) -> None:
        """The machine is gone: the boards, the supervisors and what they watch, all at once."""
        self.process.kill()
        self.process.wait()
        for path in self.store.glob("engines/*/control/*/pid.json"):
            told = json.loads(path.read_text())
            for pid in {told["shim"], told.get("pid", told["shim"])}:
                for number in [*children(pid), pid]:
                    if str(self.store) in command_of(number) or "tiny.py" in command_of(number):
                        os.kill(number, signal.SIGKILL)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [number for one in map(int, found) for number in [*children(one), one]]


def command_of(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes().replace(b"\0", b" ").decode() if path.exists() else ""


def another_host(folder: Path, network: bool) -> list[str]:
    """What begins a command on a machine of another name and another boot, without the network of this one when `network`.
    The disk is the same, and so are the processes; without root it is another folder only."""
    if os.geteuid() != 0:
        return []
    (folder / "boot_id").write_text("11111111-2222-4333-8444-555555555555\n")
    inside = 'hostname elsewhere; mount --bind "$0" /proc/sys/kernel/random/boot_id; exec "$@"'
    return ["unshare", "--uts", "--mount", *(["--net"] if network else []), "sh", "-c", inside, str(folder / "boot_id")]  # fmt: skip


def qipan(*command: str, host: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*host, sys.executable, "-m", "qipan.cli", *command], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_ran_when_it_was_backed_up_goes_on_on_another_host(database, tmp_path, request):
    url = request.getfixturevalue("postgres") if database == "postgresql" else None
    log, file = tmp_path / "lives", tmp_path / "backup.tar.gz"

    def text(name: str, steps: int) -> Task:
        script = HERE.parent / "examples" / "tiny.py"
        return Task(
            TASK.format(name=name, python=sys.executable, script=script, log=log, steps=steps), "tiny.yaml"
        )

    here = Up(tmp_path / "here", url)
    try:
        here.client.submit(text("short", 3), key="short")
        here.until(lambda states: states == {"short-1": "done"})
        for name in ("a", "b", "c", "d", "e"):
            here.client.submit(text(name, 150), key=name)
        here.until(lambda states: list(states.values()).count("running") == 3)
        time.sleep(1.0)
        done = qipan("backup", str(file), "--store", str(here.store))
        assert done.returncode == 0, done.stderr
    finally:
        here.lose()
    lost_s = time.time()
    shutil.rmtree(tmp_path / "here")
    there, host = tmp_path / "there", another_host(tmp_path, network=url is None)
    more = ["--database", url] if url else []
    done = qipan("restore", str(file), "--store", str(there), "--json", *more, host=host)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["boards"]) == {"cn", "east", "dc1", "dc2"}
    before = sum(verify_store(there).values())
    assert before > 10
    again = Up(there, None, host)
    try:
        again.until(lambda states: len(states) == 6 and set(states.values()) == {"done"})
        assert again.client.submit(text("a", 150), key="a").task_id == "a-1", "a key submits once, here too"
        lives = lives_of(log)
        assert all(began_s < lost_s for task, _, began_s, _ in lives if task == "short-1"), (
            "what was done is not done again"
        )
        for name in ("a", "b", "c", "d", "e"):
            spans = sorted((began_s, ended_s) for task, _, began_s, ended_s in lives if task == f"{name}-1")
            whole = [ended_s for _, ended_s in spans if ended_s is not None]
            assert len(whole) == 1, f"{name} came to its end once: {spans}"
            after = [span for span in spans if span[0] > lost_s]
            assert len(after) == 1, f"{name} ran once on the other host: {spans}"
            bill = again.client.call("GET", f"/tasks/{name}-1/bill")
            assert bill["receipt"]["cost_micro_cny"] == bill["charged_micro_cny"] > 0
            for line in bill["receipt"]["lines"]:
                usage = line["usage"]
                gone = usage["started_s"] < lost_s and usage["until_s"] > lost_s + 1.0
                assert not gone, "nobody pays for the time between the backup and the restoring"
        assert again.client.call("GET", "/ledger")["sum_micro_cny"] == 0
        resumed = [began for task, began in progress_of(there) if task != "short-1" and began > 0]
        assert len(resumed) >= 3, "what ran went on from its checkpoint"
    finally:
        again.end()
    assert sum(verify_store(there).values()) > before


def lives_of(log: Path) -> list[tuple[str, int, float, float | None]]:
    """(task, attempt, begin, end or None when killed) by the processes' own words."""
    begun: dict[str, tuple[str, int, float]] = {}
    ended: dict[str, float] = {}
    for line in log.read_text().splitlines():
        what, task, attempt, pid, at_s = line.split()
        if what == "begin":
            begun[f"{pid} {task}"] = (task, int(attempt), float(at_s))
        else:
            ended[f"{pid} {task}"] = float(at_s)
    return [(*life, ended.get(key)) for key, life in begun.items()]


def progress_of(store: Path) -> list[tuple[str, int]]:
    """(task, step from which the attempt began) of every attempt."""
    found = []
    for path in sorted(store.glob("engines/*/attempts/*/events.jsonl")):
        first = json.loads(path.read_text().splitlines()[0])
        found.append((path.parent.name.rpartition("-")[0], first["step"]))
    return found


def test_a_backup_holds_everything_and_is_for_its_owner_only(tmp_path):
    with served(tmp_path / "s") as host:
        from api_site import caller

        with caller(host) as api:
            submit(api)
        host.step()
        made = back_up(tmp_path / "s", tmp_path / "b.tar")
        assert made["boards"]["cn"]["ticks"] == len(list(host.store.ticks()))
    assert (tmp_path / "b.tar").stat().st_mode & 0o077 == 0
    with tarfile.open(tmp_path / "b.tar") as archive:
        names = archive.getnames()
    assert {"stores/cn.db", "files/token", "manifest.json"} <= set(names)
    assert not {"files/pid", "files/api.sock", "files/cn.db"} & set(names)
    restore_into(tmp_path / "b.tar", tmp_path / "t")
    assert StoreFolder(tmp_path / "t").boards() == ["cn", "dc1", "dc2", "east"]
    assert (tmp_path / "t" / "token").read_text() == (tmp_path / "s" / "token").read_text()
    assert verify_store(tmp_path / "t")["cn"] == made["boards"]["cn"]["ticks"]


@pytest.fixture
def backup(tmp_path) -> Path:
    store = StoreFolder(tmp_path / "s")
    (tmp_path / "s").mkdir()
    store.open("cn").close()
    (tmp_path / "s" / "token").write_text("secret")
    back_up(tmp_path / "s", tmp_path / "b.tar")
    return tmp_path / "b.tar"


def test_a_damaged_backup_is_refused_and_leaves_nothing(backup, tmp_path):
    body = bytearray(backup.read_bytes())
    body[body.index(b"secret")] ^= 1
    backup.write_bytes(body)
    with pytest.raises(InvalidInput, match="files/token"):
        restore_into(backup, tmp_path / "t")
    backup.write_bytes(body[: len(body) // 3])
    with pytest.raises(InvalidInput):
        restore_into(backup, tmp_path / "t")
    backup.write_bytes(b"no tar")
    with pytest.raises(InvalidInput, match="no whole backup"):
        restore_into(backup, tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "s"]


def test_a_backup_that_leads_out_of_its_folder_is_refused(tmp_path):
    for name in ("../evil", "/tmp/evil-of-qipan", "files/../../evil"):
        with tarfile.open(tmp_path / "b.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo(name))
        with pytest.raises(QipanError):
            restore_into(tmp_path / "b.tar", tmp_path / "t")
    assert not (tmp_path / "evil").exists()


def test_nothing_is_written_over(backup, tmp_path):
    with pytest.raises(InvalidInput, match="is there already"):
        back_up(tmp_path / "s", backup)
    with pytest.raises(InvalidInput, match="is not an empty folder"):
        restore_into(backup, tmp_path / "s")
    with pytest.raises(NotFound):
        restore_into(tmp_path / "none.tar", tmp_path / "t")
    with pytest.raises(NotFound):
        back_up(tmp_path / "t", tmp_path / "c.tar")
