"""Five hosts in network namespaces: a nation over two regions over two data centres, each board a process of its own."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qipan.client import Client, Task
from qipan.engines.shim import Spec, boot_id
from qipan.errors import QipanError, Unreachable

HERE = Path(__file__).parent
HOSTS = {"cn": 0, "east": 1, "west": 2, "dc1": 3, "dc2": 4}
PARENT = {"east": "cn", "west": "cn", "dc1": "east", "dc2": "west"}
LEASE_S = 30
DISK_MB = 96  # of each board
PORT = 8443
NUMBERS = itertools.count()  # of the worlds of this process

LIGHT = """\
kind: train
name: {name}
tenant: poets
run: exec {python} -S {script}
devices: 1
on_partition: {wish}
limits: {{time: {time_s}s, max_cost: 1 CNY{where}}}
env: {{LIGHT_LOG: "{log}", LIGHT_TICKS: "{ticks}"}}
"""
GANG = """\
kind: train
name: {name}
tenant: poets
run: exec {python} -S {script}
devices: 3
limits: {{time: 90s, max_cost: 10 CNY, regions: [{site}]}}
env: {{GANG_STEPS: "{steps}"}}
"""
TRAINING = """\
kind: train
name: {name}
tenant: poets
run: exec {python} {script}
devices: 2
limits: {{time: 60s, max_cost: 10 CNY}}
env: {{TRAIN_STEPS: "{steps}"}}
"""


def until(condition: Callable[[], bool], limit_s: float, what: object) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"not in {limit_s:.0f} s: {what() if callable(what) else what}")
        time.sleep(0.1)


@dataclass
class World:
    folder: Path
    prefix: str = field(
        default_factory=lambda: f"qg{os.getpid() % 10000}.{next(NUMBERS)}-"
    )  # of its namespaces
    boards: dict[str, subprocess.Popen] = field(default_factory=dict)
    submitted: dict[str, str] = field(default_factory=dict)  # task -> the board where it was submitted
    clocks: dict[str, Path] = field(default_factory=dict)  # board -> the file with faketime's offset
    unwatched_s: dict[str, float] = field(
        default_factory=dict
    )  # task -> how long its supervisor was stopped: it held its devices

    def __post_init__(self) -> None:
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self.control = self.folder / "wan.json"
        self.log = self.folder / "lives"
        self.log.touch()
        self.control.write_text("{}")
        self.wan = subprocess.Popen(
            [sys.executable, str(HERE / "wan.py"), self.prefix, str(len(HOSTS)), str(self.control)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.wan.stdout is not None
        assert self.wan.stdout.readline() == "up\n"
        for board in HOSTS:
            self._disk(board)
        self._qipan("cn", "grid", "init", "--name", "cn", "--url", self._url("cn"))
        for board in HOSTS:
            self._site(board)
            if board in PARENT:
                invite = ["--may-invite"] if board in PARENT.values() else []
                token = self._qipan(PARENT[board], "grid", "invite", board, *invite)
                url = ["--url", self._url(board)] if invite else []
                until(partial(self._joined, board, token, url), 40, f"{board} joins")
            self.start(board)
        until(
            lambda: self.seen() >= {"dc1", "dc2"}, 60, lambda: f"the nation sees {self.seen()}; {self.logs()}"
        )

    def _joined(self, board: str, token: str, url: list[str]) -> bool:
        try:
            self._qipan(board, "grid", "join", token, *url)
        except subprocess.CalledProcessError as error:
            if "does not answer" not in error.stderr:
                raise AssertionError(error.stderr) from None
            return False
        return True

    def _url(self, board: str) -> str:
        return f"grid://10.77.{HOSTS[board]}.2:{PORT}"

    def _disk(self, board: str) -> None:
        """A disk of its own, small enough to be filled."""
        (self.folder / board).mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(self.folder / board)]
        subprocess.run(command, check=True)

    def _site(self, board: str) -> None:
        pools = "[{chip: sim/a, devices: 12, tariff: 1 CNY}]" if board.startswith("dc") else "[]"
        tenants = "[{name: poets, balance: 1000 CNY}]" if board == "cn" else "[]"
        (self.folder / f"{board}.yaml").write_text(
            f"site:\n  lease: {LEASE_S}s\n  board: {{name: {board}, region: cn-{board}, pools: {pools}}}\n  tenants: {tenants}\n"
        )

    def _command(self, board: str, *arguments: str) -> list[str]:
        inside = ["ip", "netns", "exec", f"{self.prefix}{HOSTS[board]}"]
        # A faked clock is the board's only: libfaketime breaks `sleep` in the supervisors and tasks that it starts.
        main = ["-c", "import os; os.environ.pop('LD_PRELOAD', 0); from qipan.cli import main; main()"]
        return [*inside, sys.executable, *main, *arguments, "--store", str(self.folder / board)]

    def _environment(self, board: str) -> dict[str, str]:
        env = {**os.environ, "PYTHONPATH": str(Path("src").absolute())}
        if board in self.clocks:
            env |= {
                "FAKETIME_TIMESTAMP_FILE": str(self.clocks[board]), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "LD_PRELOAD": next(str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")),
            }  # fmt: skip
        return env

    def _qipan(self, board: str, *arguments: str) -> str:
        done = subprocess.run(
            self._command(board, *arguments), env=self._environment(board), check=True, capture_output=True, text=True
        )  # fmt: skip
        return done.stdout.strip()

    # ---- boards ----------------------------------------------------------------------------------------------------

    def start(self, board: str) -> None:
        path = self.folder / f"{board}.log"
        command = self._command(
            board, "board", "serve", "--site", str(self.folder / f"{board}.yaml"), "--no-probe"
        )
        with path.open("a") as log:
            begin = log.tell()
            self.boards[board] = subprocess.Popen(
                command, env=self._environment(board), stdout=log, stderr=log
            )
        until(lambda: "is served" in path.read_text()[begin:], 60, lambda: path.read_text()[begin:])

    def set_clock(self, board: str, offset: str) -> None:
        """Its wall clock jumps, while it runs; it must have been started with a clock of its own."""
        part = self.clocks[board].with_suffix(".part")
        part.write_text(offset)
        part.rename(self.clocks[board])

    def fill(self, board: str) -> None:
        """To the last byte."""
        with (self.folder / board / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def make_room(self, board: str) -> None:
        (self.folder / board / "ballast").unlink()

    def log_of(self, board: str) -> str:
        return (self.folder / f"{board}.log").read_text()

    def supervisor_of(self, task_id: str, attempt: int = 1) -> int:
        """Of an attempt that runs."""
        path = next(self.folder.glob(f"*/engines/*/control/{task_id}-{attempt}/pid.json"))
        return int(json.loads(path.read_text())["shim"])

    def kill(self, board: str) -> None:
        self.boards[board].kill()
        self.boards[board].wait()

    def signal(self, board: str, number: int) -> None:
        self.boards[board].send_signal(number)

    def link(self, board: str, *, down: bool = True, up: bool = True, **more: float) -> None:
        """The link of a board to its parent: which ways it carries, and how."""
        above, below = HOSTS[PARENT[board]], HOSTS[board]
        ways = json.loads(self.control.read_text())
        ways[f"{above}>{below}"] = {"up": down, **more}
        ways[f"{below}>{above}"] = {"up": up, **more}
        part = self.control.with_suffix(".part")
        part.write_text(json.dumps(ways))
        part.rename(self.control)

    def seen(self) -> set[str]:
        boards = Client(self.folder / "cn").call("GET", "/boards")["boards"]
        return {board["board"] for board in boards}

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    # ---- tasks -----------------------------------------------------------------------------------------------------

    def light(self, name: str, *, ticks: int = 8, wish: str = "wait", site: str = "", at: str = "cn") -> str:
        where = f", regions: [{site}]" if site else ""
        text = LIGHT.format(
            name=name, python=sys.executable, script=HERE / "light.py", wish=wish, time_s=ticks // 2 + 3, where=where,
            log=self.log, ticks=ticks,
        )  # fmt: skip
        return self._submit(name, text, at)

    def training(self, name: str, steps: int) -> str:
        return self._submit(
            name,
            TRAINING.format(name=name, python=sys.executable, script=HERE / "train.py", steps=steps),
            "cn",
        )

    def gang(self, name: str, site: str, steps: int) -> str:
        script = HERE / "gang.py"
        return self._submit(
            name, GANG.format(name=name, python=sys.executable, script=script, site=site, steps=steps), "cn"
        )

    def _submit(self, name: str, text: str, at: str) -> str:
        """Against a board that may be down: the key makes it once."""
        found: list[str] = []

        def handed() -> bool:
            try:
                job = Client(self.folder / at).submit(
                    Task(text, "task.yaml", str(self.folder)), f"key-{name}"
                )
            except Unreachable:
                return False
            found.append(job.task_id)
            return True

        until(handed, 60, f"{name} is taken")
        self.submitted[found[0]] = at
        return found[0]

    def states(self) -> dict[str, str]:
        try:
            tasks = Client(self.folder / "cn").list("/tasks", "tasks")
            return {task["task_id"]: task["state"] for task in tasks}
        except QipanError:
            return {}

    def runs(self, count: int) -> None:
        """Wait until so many lives of tasks have begun."""
        until(
            lambda: self.log.read_text().count("begin ") >= count,
            60,
            lambda: f"{self.states()} {self.logs()}",
        )

    def finish(self, limit_s: float = 120.0) -> None:
        def over() -> bool:
            states = self.states()
            return len(states) == len(self.submitted) and set(states.values()) <= {"done"}

        until(over, limit_s, lambda: f"{self.states()}\n{self.logs()}")

    def first_step_s(self, name: str, site: str) -> float:
        """Seconds from now until a task at this site has begun, by its own log: how soon all is as before."""
        began_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        task_id = self.light(name, ticks=1, site=site)
        until(
            lambda: f"begin {task_id} " in self.log.read_text(), 90, lambda: f"{self.states()}\n{self.logs()}"
        )
        return self.lives()[task_id][0].began_s - began_s

    def slow_of(self, task_id: str) -> list[dict]:
        """What facts of the nation say of slow ranks of a task."""
        events = Client(self.folder / "cn").list(f"/tasks/{task_id}/events", "events")
        details = [event["fact"]["detail"] for event in events if "detail" in event["fact"]]
        return [told for told in map(json.loads, filter(None, details)) if told.get("event") == "slow"]

    def devices_of(self, task_id: str) -> list[int]:
        """That an attempt was given, by its own environment."""
        path = next(self.folder.glob(f"*/engines/*/control/{task_id}-1/spec"))
        return [int(device) for device in Spec.read(str(path)).env["QIPAN_DEVICES"].split(",")]

    # ---- what is true at the end -------------------------------------------------------------------------------------

    def lives(self) -> dict[str, "list[Life]"]:
        """task -> its lives by the processes' own log, in the order of their beginning."""
        found: dict[tuple[str, str], Life] = {}
        for line in self.log.read_text().splitlines():
            what, task, attempt, fence, pid, at = line.split()
            life = found.setdefault(
                (task, pid),
                Life(task, int(attempt), tuple(map(int, fence.split("."))), int(pid), float(at), float(at)),
            )
            if what == "begin":
                life.began_s = float(at)
            life.last_s, life.ended = float(at), what == "end"
        lives: dict[str, list[Life]] = {}
        for life in sorted(found.values(), key=lambda life: life.began_s):
            lives.setdefault(life.task, []).append(life)
        return lives

    def check(self) -> dict[str, int]:
        """What must hold at the end: nothing lost, run twice or billed twice.  Returns the three counts."""
        states = self.states()
        lost = sum(states.get(task) != "done" for task in self.submitted)
        twice = bills = 0
        client = Client(self.folder / "cn")
        for task, lives in self.lives().items():
            wrong = sum(
                first.last_s > second.began_s or first.fence >= second.fence
                for first, second in itertools.pairwise(lives)
            )
            ends, moved = sum(life.ended for life in lives), 0
            if (
                ends > 1
            ):  # at a board silent for its lease and the margin, where its owner asked for `restart`
                decisions = client.call("GET", f"/tasks/{task}/why")["decisions"]
                moved = sum(decision["verdict"] == "moved" for decision in decisions)
            wrong += not 1 <= ends <= 1 + moved
            twice += wrong
            if wrong:
                print(f"{task} ran twice, or never to its end; it was moved {moved} times: {lives}")
        for task in self.submitted:
            bill = client.call("GET", f"/tasks/{task}/bill")
            lines = bill["receipt"]["lines"]
            keys = [(line["usage"]["attempt"], line["usage"]["board"]) for line in lines]
            if len(keys) != len(set(keys)) or bill["receipt"]["cost_micro_cny"] != bill["charged_micro_cny"]:
                bills += 1
                print(f"{task} is billed twice or not as it is charged: {bill}")
            ran = self.lives().get(task, [])
            if ran:
                billed_s = sum(line["usage"]["device_s"] for line in lines)
                ran_s = sum(life.last_s - life.born_s for life in ran)
                if billed_s > ran_s + 3.0 * len(ran) + self.unwatched_s.get(task, 0.0):
                    bills += 1
                    print(
                        f"{task} is billed {billed_s:.1f} device-seconds and ran {ran_s:.1f}: {lines} {ran}"
                    )
        bills += client.call("GET", "/ledger")["sum_micro_cny"] != 0
        return {"lost_tasks": lost, "double_runs": twice, "double_bills": bills}

    def close(self) -> None:
        for board in self.boards.values():
            board.send_signal(signal.SIGCONT)
            board.kill()
            board.wait()
        for path in self.folder.glob("*/engines/*/control/*/pid.json"):
            if not (path.parent / "exit.json").exists():
                shim = json.loads(path.read_text())["shim"]
                if str(path.parent).encode() in _command_of(shim):
                    (path.parent / "until").write_text(f"0 {boot_id()} 0 0")
        if self.wan.stdin is not None:
            self.wan.stdin.close()
        self.wan.wait(20)
        for board in HOSTS:
            subprocess.run(["umount", "-l", str(self.folder / board)], check=False)


@dataclass
class Life:
    task: str
    attempt: int
    fence: tuple[int, ...]
    pid: int
    born_s: float  # when its supervisor made its process
    began_s: float
    last_s: float = 0.0
    ended: bool = False


def _command_of(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""
