"""The supervisor of one attempt.  `python -S shim.py DIR`: standard library only, own session, outlives the board.
`shim.py --hold DIR` is its waiting form, the program of a job in another tool's queue: it says that it has its devices
(`granted.json`), and waits for an attempt (`go`), for `release`, or for the lease to lapse.

It starts the task's process group, keeps the lease (file `until`), passes on a stop (file `stop`), holds the task to
its share of the cores where there is no cgroup, bounds the log, and at the end writes `exit.json` once every process
of the attempt is gone.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

POLL_S = 0.1
LOG_BYTES_MAX = 16 * 2**20
PR_SET_CHILD_SUBREAPER = 36


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
    signal.signal(signal.SIGTERM, lambda *_: TOLD.set())
    if sys.argv[1] != "--hold":
        supervise(Path(sys.argv[1]), {}, time.time())
        return
    hold, granted_s = Path(sys.argv[2]), time.time()
    job = {
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("RAY_JOB_ID") or "",
        "host": socket.gethostname(),
        "given": [name for name in DEVICES if os.environ.get(name)],
        "devices": next((os.environ[name] for name in DEVICES if os.environ.get(name)), ""),
        "granted_s": granted_s,
    }
    write(hold / "granted.json", job)
    until = Until(hold / "until")
    while not TOLD.is_set() and not (hold / "release").exists() and not until.over():
        if (hold / "go").exists():
            supervise(Path((hold / "go").read_text()), dict(os.environ), granted_s)
            return
        TOLD.wait(POLL_S / 2)


#: set by SIGTERM: whoever owns the devices wants them back
TOLD = threading.Event()


def supervise(folder: Path, inherited: dict[str, str], started_s: float) -> None:
    """`inherited`: the environment of the job around it.  The attempt is metered from `started_s` (Unix)."""
    spec = json.loads((folder / "spec.json").read_text())
    kept = {key: value for key, value in inherited.items() if key.startswith(FROM_QUEUE)}
    ctypes.CDLL(None).prctl(
        PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # orphans of the task become ours, and are ended
    if spec["group"]:
        Path(spec["group"], "cgroup.procs").write_text(str(os.getpid()))
    child = subprocess.Popen(
        spec["command"],
        env={**inherited, **spec["env"], **kept},
        cwd=spec["cwd"] or None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    write(
        folder / "pid.json",
        {"pid": child.pid, "shim": os.getpid(), "started_s": started_s, "boot_id": boot_id()},
    )
    copier = threading.Thread(target=copy_log, args=(child.stdout, folder / "log.txt"), daemon=True)
    copier.start()
    ended = watch(child, folder, spec)
    end_all()
    copier.join(timeout=2)
    code = child.returncode
    write(
        folder / "exit.json",
        {"code": code, "started_s": started_s, "ended_s": time.time(), "ended_by": ended},
    )


def watch(child: "subprocess.Popen[bytes]", folder: Path, spec: dict[str, Any]) -> str:
    """Until the task's main process is gone.  Returns what ended it: itself, "stop", "lease" or "signal"."""
    stop, until = folder / "stop", Until(folder / "until")
    asked, kill_at_s = "itself", float("inf")
    throttle = Throttle(folder, child.pid, spec["shares"]) if spec["shares"] else None
    while True:
        wait_s = throttle.turn() if throttle else POLL_S
        try:
            child.wait(wait_s)
            # A queue's signal reaches the task and this supervisor at about the same time.
            told = asked == "itself" and TOLD.wait(0.2 if sys.argv[1] == "--hold" else 0)
            return "signal" if told else asked
        except subprocess.TimeoutExpired:
            pass  # still running: look at the lease and at orders
        reap_orphans(child.pid)
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if asked == "itself":
            if stop.exists():
                asked = "stop"
            elif until.over(spec["park_s"]) or TOLD.is_set():
                asked = "signal" if TOLD.is_set() else "lease"
                stop.touch()
            if asked != "itself":
                kill_at_s = now_s + spec["park_s" if asked == "lease" else "grace_s"]
                if spec["signal_on_stop"]:
                    if throttle:
                        throttle.release()
                    signal_group(child.pid, signal.SIGTERM)
        elif now_s > kill_at_s:
            for pid in descendants(os.getpid()):
                signal_one(pid, signal.SIGKILL)


class Until:
    """The end of the lease, from a file "UNTIL BOOT LEFT UNIX": on this machine's own clock where the boot is ours, on
    another machine as the seconds that were left when it was written, counted from when it was seen, at most to UNIX."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._until_s = float("inf")

    def over(self, early_s: float = 0.0) -> bool:
        try:
            text = self._path.read_text()
        except OSError:
            text = self._text  # not written yet, or its file system is away: what was seen last counts
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if text and text != self._text:
            self._text = text
            until_s, boot, left_s, unix_s = text.split()
            here = boot == boot_id()
            self._until_s = (
                float(until_s) if here else now_s + min(float(left_s), float(unix_s) - time.time())
            )
        return now_s > self._until_s - early_s


class Throttle:
    """A duty cycle by SIGSTOP and SIGCONT: each rank (or the whole group) runs `share` of every period."""

    PERIOD_S = 0.1

    def __init__(self, folder: Path, pid: int, shares: list[float]) -> None:
        self._folder, self._pid, self._shares = folder, pid, shares
        self._began_s = time.monotonic()

    def turn(self) -> float:
        """Stop and continue what is due; returns how long to sleep."""
        at = (time.monotonic() - self._began_s) % self.PERIOD_S / self.PERIOD_S
        marks = sorted(self._folder.glob("rank-*"))
        if marks:
            for mark in marks:
                share = self._shares[int(mark.name.split("-")[1]) % len(self._shares)]
                signal_one(int(read_number(mark)), signal.SIGCONT if at < share else signal.SIGSTOP)
        else:
            share = min(1.0, sum(self._shares))
            signal_group(self._pid, signal.SIGCONT if at < share else signal.SIGSTOP)
        return self.PERIOD_S / 20

    def release(self) -> None:
        signal_group(self._pid, signal.SIGCONT)


def end_all() -> None:
    """Kill every process that is left below this one, and wait until they are gone."""
    for _ in range(100):
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            signal_one(pid, signal.SIGKILL)
        reap_orphans(0)
        time.sleep(0.02)


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended while we looked
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def reap_orphans(main: int) -> None:
    for pid in descendants(os.getpid()):
        if pid != main:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue  # not ours to reap: its parent lives


def copy_log(source: Any, target: Path) -> None:
    """The first LOG_BYTES_MAX bytes; the rest is read and dropped, so that the task never blocks."""
    written = 0
    with target.open("ab") as file:
        while chunk := source.read1(65536):
            if written < LOG_BYTES_MAX:
                try:
                    file.write(chunk[: LOG_BYTES_MAX - written])
                    file.flush()
                except OSError:
                    written = LOG_BYTES_MAX  # a full disk ends the log, not the task
                written += len(chunk)


def signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # it ended by itself


def signal_one(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended by itself


def read_number(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return float("inf")  # not written yet


def write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


if __name__ == "__main__":
    main()
