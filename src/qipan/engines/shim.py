"""The supervisor of one attempt: standard library only, own session, outlives the board.  Its argument is CONTROL (`launcher.supervisor`).
`--hold DIR [NODES]` is its waiting form, the program of a job in another tool's queue: it says that it has its
devices (`granted.json`), and waits for an attempt (`go`), for `release`, or for the lease to lapse.  A lease over several nodes
has one on each (QIPAN_NODE_RANK): the first grants once all are there, starts the attempt with the others, and ends when all have.

CONTROL lies apart from the task's own folder, where no sandbox reaches; `spec` in it says what to start.  The supervisor starts
the task's process group, keeps the lease (file `until`), passes on a stop (file `stop`, made in the task's folder too), holds the
task to its share of the cores where there is no cgroup, bounds the log, and at the end writes `exit.json` once every process of
the attempt is gone.  A process that joins the others later is ordered by `join-N.spec`; `worker-N.exit` says how it ended.
It is started for every attempt, so it imports little: modules cost more than all that it does.
"""

import ctypes
import os
import select
import signal
import sys
import time

from qipan.engines.plain import PLAIN, read_text, write_text
from qipan.engines.processes import SANDBOX, descendants, end_all, reap, signal_one, signal_task
from qipan.engines.throttle import Throttle

POLL_S = 0.1
BEAT_S = 1.0
HOLD_POLL_S = 0.05
LOG_BYTES_MAX = 16 * 2**20
FAILED_STOP_S = 5.0  # for the rest of a gang of which one node failed
MARGIN_S = 2.0  # beyond the lease, after which a node of the gang that says nothing is taken for gone
EXITED = "exited"  # in the folder of a task in a sandbox: its code is its own, though it reads as a signal's
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
#: what a queue tells its jobs about their devices; kept for the task
FROM_QUEUE = ("SLURM_", "CUDA_", "ROCR_", "HIP_", "ASCEND_", "GPU_", "ZE_", "RAY_", "PMI", "KUBERNETES_")
DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
    "SLURM_JOB_GPUS",
    "QIPAN_DEVICES",
)


def main() -> None:
    run()
    os._exit(0)  # all is written, and taking an interpreter down costs as much as all that was done


def run() -> None:
    signals = Signals()
    if sys.argv[1] != "--hold":
        supervise(sys.argv[1], {}, Start(), signals)
        return
    nodes = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    rank = int(os.environ.get("QIPAN_NODE_RANK", "0")) if nodes > 1 else 0
    if "QIPAN_PARENT" in os.environ:  # who holds the devices: they are gone with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signals.told = os.getppid() != int(os.environ.pop("QIPAN_PARENT"))
    hold(sys.argv[2], rank, nodes, signals)


def hold(folder: str, rank: int, nodes: int, signals: "Signals") -> None:
    until, start, granted = Until(f"{folder}/until"), Start(), False
    own = here(start.unix_s)
    if rank:
        write(f"{folder}/node-{rank}.json", own)
    while not signals.told and not os.path.exists(f"{folder}/release") and not until.over():
        if not rank and not granted:
            others = [read_json(f"{folder}/node-{other}.json") for other in range(1, nodes)]
            if None not in others:
                start, granted = Start(), True
                hosts = [one["host"] for one in (own, *others) if one is not None]
                write(f"{folder}/granted.json", {**own, "granted_s": start.unix_s, "hosts": hosts})
        if os.path.exists(f"{folder}/go"):
            supervise(read_text(f"{folder}/go"), dict(os.environ), start, signals, own, rank, nodes)
            return
        signals.wait(HOLD_POLL_S)


def here(now_s: float) -> dict[str, object]:
    return {
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("RAY_JOB_ID") or "",
        "host": os.environ.get("QIPAN_NODE_ADDRESS") or os.uname().nodename,
        "given": [name for name in DEVICES if os.environ.get(name)],
        "devices": next((os.environ[name] for name in DEVICES if os.environ.get(name)), ""),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "granted_s": now_s,
        "control": 1,  # it knows that it has a folder apart from the task's
    }


def supervise(
    control: str,
    inherited: dict[str, str],
    start: "Start",
    signals: "Signals",
    own: "dict[str, object] | None" = None,
    rank: int = 0,
    nodes: int = 1,
) -> None:
    """`inherited`: the environment of the job around it.  The attempt is metered from `start`.  What is not of the
    gang's first node lies in a folder of its own."""
    folder = f"{control}/node-{rank}" if rank else control
    os.makedirs(folder, exist_ok=True)
    spec = Spec.read(f"{control}/spec")
    kept = {key: value for key, value in inherited.items() if key.startswith(FROM_QUEUE)}
    if rank and own is not None:
        kept |= {"QIPAN_NODE_RANK": str(rank), "QIPAN_DEVICES": str(own["devices"])}
    ctypes.CDLL(None).prctl(
        PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # orphans of the task become ours, and are ended
    if spec.group:
        write_text(f"{spec.group}/cgroup.procs", str(os.getpid()))
    log = Log(f"{folder}/log.txt")
    child = spawn(spec, {**inherited, **spec.env, **kept}, log)
    joined = Joined(folder, spec.task, {**inherited, **kept}, log)
    beat = Beat(folder)
    beat.give()
    try:
        write(
            f"{folder}/pid.json",
            {
                "pid": child,
                "shim": os.getpid(),
                "started_s": start.unix_s,
                "lease_s": start.lease_s,
                "boot_id": boot_id(),
            },
        )
    except OSError:
        end_all()  # nobody could find it: it must not run
        raise
    others = [Other(f"{control}/node-{other}", log) for other in range(1, nodes)] if not rank else []
    code, ended = watch(child, control, spec, signals, log, others, beat, joined)
    end_all()
    log.close()
    if others:
        code, ended = await_others(control, code, ended, signals, others, beat)
    told = {"code": code, "started_s": start.unix_s, "ended_s": start.now_s(), "ended_by": ended}
    while os.path.exists(folder):
        try:
            write(f"{folder}/exit.json", told)
            return
        except OSError:
            beat.give()
            time.sleep(BEAT_S)  # a full disk: how it ended is worth the wait, else it would be done again


def spawn(spec: "Spec", env: dict[str, str], log: "Log") -> int:
    """A process of the task, in a session of its own; its output goes to the log.  Code 127: it could not be started.  It is there to be
    signalled: before it has its session and the usual handlers an order to stop would be lost."""
    ready, not_ready = os.pipe()
    pid = os.fork()
    if pid:
        os.close(not_ready)
        os.read(ready, 1)  # until it is closed there
        os.close(ready)
        return pid
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log.write_end, 1)
        os.dup2(log.write_end, 2)
        os.closerange(3, 65536)
        if spec.cwd:
            os.chdir(spec.cwd)
        os.execvpe(spec.command[0], spec.command, env)
    except OSError as error:
        os.write(2, f"{spec.command[0]} cannot be started in {spec.cwd or os.getcwd()}: {error}\n".encode())
    finally:
        os._exit(127)


def watch(
    child: int,
    control: str,
    spec: "Spec",
    signals: "Signals",
    log: "Log",
    others: "list[Other]",
    beat: "Beat",
    joined: "Joined",
) -> tuple[int, str]:
    """Until the task's main process is gone, or one that joined it failed.  Returns the code and what ended it: itself, "stop",
    "lease" or "signal"; "gang" where another node did."""
    stop, until = f"{control}/stop", Until(f"{control}/until")
    asked, kill_at_s, look_at_s, to_tell = "itself", float("inf"), 0.0, False
    throttle = Throttle(spec.task, child, spec.shares, spec.enclosed) if spec.shares else None
    while True:
        beat.give()
        signals.wait(throttle.turn() if throttle else POLL_S, log)
        ended = reap()
        joined.note(ended)
        if child in ended:
            # A queue's signal reaches the task and this supervisor at about the same time.
            if asked == "itself" and sys.argv[1] == "--hold" and not signals.told:
                signals.wait(0.2)
            if asked == "itself" and not spec.signal_on_stop and os.path.exists(stop):
                asked = "stop"  # another node told it, and it was faster than we
            code = joined.failed or (code_inside(ended[child], spec.task) if spec.enclosed else ended[child])
            return code, "signal" if asked == "itself" and signals.told else asked
        if joined.failed:
            return joined.failed, asked
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if now_s < look_at_s and not signals.told:
            continue
        look_at_s = now_s + POLL_S
        joined.look()
        for other in others:
            other.look()
        if asked == "itself":
            if os.path.exists(stop):
                said = read_text(stop)  # empty where the board asks; another node's supervisor says why
                asked = said if said in ("lease", "signal") else "stop"
            elif until.over(spec.park_s) or signals.told:
                asked = "signal" if signals.told else "lease"
                mark(stop, asked)
            elif os.path.exists(f"{control}/gang.end") or any(other.failed for other in others):
                asked = "gang"
                mark(f"{control}/gang.end")
            if asked not in ("itself", "gang") and spec.task:
                mark(f"{spec.task}/stop")  # which the task looks for
            if asked != "itself":
                grace_s = {"lease": spec.park_s, "gang": FAILED_STOP_S}
                kill_at_s = now_s + grace_s.get(asked, spec.grace_s)
                to_tell = spec.signal_on_stop or asked == "gang"
        elif now_s > kill_at_s:
            for pid in descendants(os.getpid()):
                signal_one(pid, signal.SIGKILL)
        if to_tell:
            if throttle:
                throttle.release()
            to_tell = not signal_task(child, signal.SIGTERM, spec.enclosed)


class Start:
    """When an attempt began to be metered, by the wall clock and by the one that nobody sets; what passes is counted by the latter."""

    def __init__(self) -> None:
        self.unix_s, self.lease_s = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)

    def now_s(self) -> float:
        """Unix seconds, whatever has become of the wall clock since."""
        return self.unix_s + time.clock_gettime(time.CLOCK_BOOTTIME) - self.lease_s


class Spec:
    """What a process of an attempt is to be.  In its file each entry is NAME=VALUE with a NUL behind it, as in
    /proc/PID/environ, since a reader of that needs no module.  `shares` of a core, one a device, where no cgroup keeps them.
    `task`: its folder.  `folders`: where it may write, besides that and `cwd`, if it is in a sandbox."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        cwd: str = "",
        group: str = "",
        shares: "list[float] | None" = None,
        grace_s: float = 0.0,
        park_s: float = 0.0,
        signal_on_stop: bool = False,
        folders: "list[str] | None" = None,
        task: str = "",
    ) -> None:
        self.command, self.env, self.cwd, self.group, self.shares = command, env, cwd, group, shares or []
        self.grace_s, self.park_s, self.signal_on_stop = grace_s, park_s, signal_on_stop
        self.folders, self.task = folders or [], task

    @property
    def enclosed(self) -> bool:
        """In a sandbox, whose main process only waits for those in it."""
        return self.command[0] == SANDBOX

    def write(self, path: str) -> None:
        """Whole or not at all.  Raises OSError."""
        entries = [
            ("cwd", self.cwd), ("group", self.group), ("task", self.task), ("grace_s", str(self.grace_s)), ("park_s", str(self.park_s)),
            ("signal_on_stop", "1" if self.signal_on_stop else ""), *(("share", str(share)) for share in self.shares),
            *(("folder", folder) for folder in self.folders),
            *(("word", word) for word in self.command), *(("env", f"{name}={value}") for name, value in self.env.items()),
        ]  # fmt: skip
        with open(f"{path}.part", "wb") as file:
            file.write(os.fsencode("".join(f"{name}={value}\0" for name, value in entries)))
        os.rename(f"{path}.part", path)

    @staticmethod
    def read(path: str) -> "Spec":
        with open(path, "rb") as file:
            entries = [entry.partition("=")[::2] for entry in os.fsdecode(file.read()).split("\0")[:-1]]
        one = dict(entries)
        env = [value.partition("=")[::2] for name, value in entries if name == "env"]
        return Spec(
            [value for name, value in entries if name == "word"], dict(env), one["cwd"], one["group"],
            [float(value) for name, value in entries if name == "share"], float(one["grace_s"]), float(one["park_s"]),
            bool(one["signal_on_stop"]), [value for name, value in entries if name == "folder"],
            one.get("task", ""),
        )  # fmt: skip


class Joined:
    """Processes that came later than the main one.  One that ends badly before it was ready is the engine's to see; after
    that the others wait for it in vain, so the attempt ends with its exit code, `failed`."""

    def __init__(self, folder: str, task: str, inherited: dict[str, str], log: "Log") -> None:
        self._folder, self._task, self._inherited, self._log = folder, task, inherited, log
        self._running: dict[int, str] = {}  # pid -> worker
        self._untold: dict[str, int] = {}  # worker -> code
        self._seen: set[str] = set()
        self.failed = 0

    def look(self) -> None:
        """Start what was ordered, and say what a full disk did not take."""
        self._tell()
        for name in sorted(os.listdir(self._folder)):
            if name.startswith("join-") and name.endswith(".spec") and name not in self._seen:
                self._seen.add(name)
                spec = Spec.read(f"{self._folder}/{name}")
                pid = spawn(spec, {**self._inherited, **spec.env}, self._log)
                self._running[pid] = name[len("join-") : -len(".spec")]

    def note(self, ended: dict[int, int]) -> None:
        for pid in self._running.keys() & ended.keys():
            worker, code = self._running.pop(pid), ended[pid]
            self._untold[worker] = code
            if code and os.path.exists(f"{self._task}/worker-{worker}.ready"):
                self.failed = code
        self._tell()

    def _tell(self) -> None:
        for worker, code in list(self._untold.items()):
            try:
                write(f"{self._folder}/worker-{worker}.exit", {"code": code})
            except OSError:
                return  # at the next look
            del self._untold[worker]


class Other:
    """The supervisor of another node of the gang, as the first sees it: by its folder in the first one's."""

    def __init__(self, folder: str, log: "Log") -> None:
        self.folder = folder
        self.ended: dict[str, object] | None = None
        self._log, self._read = log, 0

    @property
    def failed(self) -> bool:
        return self.ended is not None and bool(self.ended["code"])

    def look(self) -> None:
        self.ended = self.ended or read_json(f"{self.folder}/exit.json")
        try:
            with open(f"{self.folder}/log.txt", "rb") as file:
                file.seek(self._read)
                fresh = file.read(1 << 20)
        except OSError:
            return  # it has written nothing yet
        self._read += len(fresh)
        self._log.add(fresh)


def await_others(
    control: str, code: int, ended: str, signals: "Signals", others: "list[Other]", beat: "Beat"
) -> tuple[int, str]:
    """Until every node of the gang has ended, or the lease has, by which they end themselves.  A gang's code is that of the
    first that failed by itself."""
    if code and ended == "itself":
        mark(f"{control}/gang.end")
    until = Until(f"{control}/until")
    while not until.over(-MARGIN_S):
        beat.give()
        for other in others:
            other.look()
        if all(other.ended is not None for other in others):
            break
        if any(other.failed for other in others):
            mark(f"{control}/gang.end")
        signals.wait(POLL_S / 2)
    ends = [other.ended for other in others if other.ended is not None]
    if ended not in ("itself", "gang"):
        return code, ended
    failed = [int(str(end["code"])) for end in ends if end["code"] and end["ended_by"] == "itself"]
    told = [str(end["ended_by"]) for end in ends if end["ended_by"] in ("stop", "lease", "signal")]
    if ended == "itself" and code:
        return code, ended
    if failed:
        return failed[0], "itself"
    if told and code == 0:
        return code, told[0]
    return (code, "itself") if len(ends) == len(others) else (code, "lease")


class Signals:
    """SIGTERM, by which whoever owns the devices wants them back, and SIGCHLD wake whoever waits."""

    def __init__(self) -> None:
        self.told = False
        self._wakeups, write_end = os.pipe()
        for end in (self._wakeups, write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._tell)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _tell(self, *_: object) -> None:
        self.told = True

    def wait(self, seconds: float, log: "Log | None" = None) -> None:
        """So long at most; less when a signal comes, or the task has said something, which goes to the log."""
        poll = select.poll()
        poll.register(self._wakeups, select.POLLIN)
        if log is not None and log.open:
            poll.register(log.read_end, select.POLLIN)
        for ready, _ in poll.poll(seconds * 1000):
            if ready == self._wakeups:
                os.read(ready, 512)
            elif log is not None:
                log.copy_some()


class Log:
    """What the task says: the first LOG_BYTES_MAX bytes; the rest is read and dropped, so that the task never blocks."""

    def __init__(self, path: str) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.open = True
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | PLAIN, 0o644)
        self._written = 0

    def close(self) -> None:
        """Nobody writes any more: what is left is copied."""
        os.close(self.write_end)
        while self.open and self.copy_some():
            pass

    def copy_some(self) -> bool:
        try:
            said = os.read(self.read_end, 65536)
        except BlockingIOError:
            return False
        self.open = bool(said)
        self.add(said)
        return self.open

    def add(self, said: bytes) -> None:
        if self._written < LOG_BYTES_MAX:
            try:
                while said:
                    count = os.write(self._file, said)
                    self._written, said = self._written + count, said[count:]
            except OSError:
                self._written = LOG_BYTES_MAX  # a full disk ends the log, not the task


class Beat:
    """A sign every second that somebody watches: the time of the file `beat`, which needs no room on the disk."""

    def __init__(self, folder: str) -> None:
        self._path, self._given_s = f"{folder}/beat", float("-inf")

    def give(self) -> None:
        now_s = time.monotonic()
        if now_s < self._given_s + BEAT_S:
            return
        self._given_s = now_s
        try:
            beat = os.open(self._path, os.O_CREAT | os.O_WRONLY | PLAIN)
            os.utime(beat)
            os.close(beat)
        except OSError:
            return  # its file system is away: the next sign may be seen


class Until:
    """The end of the lease, from a file "UNTIL BOOT LEFT UNIX": on this machine's own clock where the boot is ours, on
    another machine as the seconds that were left when it was written, counted from when it was seen, at most to UNIX."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._text = ""
        self._until_s = float("inf")

    def over(self, early_s: float = 0.0) -> bool:
        try:
            text = read_text(self._path)
        except OSError:
            text = self._text  # not written yet, or its file system is away: what was seen last counts
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if text and text != self._text:
            self._text = text
            until_s, boot, left_s, unix_s = text.split()
            ours = boot == boot_id()
            self._until_s = (
                float(until_s) if ours else now_s + min(float(left_s), float(unix_s) - time.time())
            )
        return now_s > self._until_s - early_s


def code_inside(code: int, task: str) -> int:
    """Bubblewrap says 128 + N, as a shell does, where signal N ended what it ran: -N without it, unless the program itself said so."""
    by_signal = 128 < code <= 128 + signal.NSIG and not os.path.exists(f"{task}/{EXITED}")
    return 128 - code if by_signal else code


def read_json(path: str) -> "dict[str, object] | None":
    import json  # for gangs only

    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError):
        return None  # not written yet
    return value if isinstance(value, dict) else None


def write(path: str, value: dict[str, object]) -> None:
    """Whole or not at all, for readers in other processes."""
    write_text(f"{path}.part", json_of(value))
    os.rename(f"{path}.part", path)


def json_of(value: object) -> str:
    """JSON of what is said here: numbers, texts, lists and mappings of them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_of(key)}: {json_of(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_of, value)) + "]"
    if isinstance(value, str):
        plain = (one if one >= " " and one not in '"\\' else f"\\u{ord(one):04x}" for one in value)
        return '"' + "".join(plain) + '"'
    return repr(value)


def mark(path: str, why: str = "") -> None:
    """That the file is there tells the others; a full disk may leave it without its text, or out altogether."""
    try:
        write_text(path, why)
    except OSError:
        return


def boot_id() -> str:
    return read_text("/proc/sys/kernel/random/boot_id").strip()
