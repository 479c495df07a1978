"""The supervisor of a person's command beside a running attempt, started as the shim is and with what that has: CONTROL FOLDER.

FOLDER holds `spec.json`.  The command ends by itself, on `stop` in FOLDER, after its limit, or when the attempt is over
(`exit.json` in CONTROL); then all that it started is ended, and FOLDER has an `exit.json` of its own."""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qipan.engines.processes import end_all
from qipan.engines.shim import LOG_BYTES_MAX, PR_SET_CHILD_SUBREAPER

POLL_S = 0.1
NOT_FOUND, NOT_RUNNABLE = 127, 126  # as a shell says it


def main() -> None:
    control, folder = Path(sys.argv[1]), Path(sys.argv[2])
    note_pid(folder)
    spec = json.loads((folder / "spec.json").read_text())
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what it leaves behind becomes ours to end
    if spec["group"]:
        Path(spec["group"], "cgroup.procs").write_text(str(os.getpid()))
    try:
        child = subprocess.Popen(
            spec["command"],
            env=spec["env"],
            cwd=spec["cwd"] or None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        (folder / "log.txt").write_text(f"{error.strerror}: {spec['command'][0]}\n")
        write_end(folder, NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE, "itself")
        return
    copier = threading.Thread(target=copy_log, args=(child.stdout, folder / "log.txt"), daemon=True)
    copier.start()
    ended = watch(child, control, folder, spec["limit_s"])
    if ended:
        child.kill()
        child.wait()
    end_all()
    copier.join(timeout=2)
    write_end(folder, None if ended else child.returncode, ended or "itself")


def note_pid(folder: Path) -> None:
    part = folder / "pid.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / "pid")


def watch(child: "subprocess.Popen[bytes]", control: Path, folder: Path, limit_s: float) -> str:
    """Until the command is gone (""), or is to end: "stop", "attempt" or "limit"."""
    end_s = time.clock_gettime(time.CLOCK_BOOTTIME) + limit_s
    while True:
        try:
            child.wait(POLL_S)
            return ""
        except subprocess.TimeoutExpired:
            if (folder / "stop").exists() or not folder.exists():
                return "stop"
            if (control / "exit.json").exists() or not control.exists():
                return "attempt"
            if time.clock_gettime(time.CLOCK_BOOTTIME) > end_s:
                return "limit"


def copy_log(source: Any, target: Path) -> None:
    """The first LOG_BYTES_MAX bytes; the rest is read and dropped, so that the command never blocks."""
    written = 0
    with target.open("ab") as file:
        while chunk := source.read1(65536):
            if written < LOG_BYTES_MAX:
                try:
                    file.write(chunk[: LOG_BYTES_MAX - written])
                    file.flush()
                except OSError:
                    written = LOG_BYTES_MAX  # a full disk ends the log, not the command
                written += len(chunk)


def write_end(folder: Path, code: int | None, by: str) -> None:
    """A full disk is waited for."""
    part = folder / "exit.part"
    while folder.exists():
        try:
            part.write_text(json.dumps({"code": code, "ended_by": by}))
            part.rename(folder / "exit.json")
            return
        except OSError:
            time.sleep(1.0)
