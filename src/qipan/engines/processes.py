"""Processes of this machine as the supervisor sees them: whose they are, and that they end.  Standard library, little of it: `shim` needs it."""

import os
import signal
import time

from qipan.engines.plain import read_text

SANDBOX = "bwrap"


def end_all() -> None:
    """Kill every process that is left below this one, and wait until they are gone, however long they take to give back what they
    hold.  What has become another user's cannot be killed, and is left."""
    while True:
        reap()
        if not have_children():
            return  # orphans of the task are our children: where there are none, nothing is left
        below = descendants(os.getpid())
        reached = [signal_one(pid, signal.SIGKILL) for pid in below]
        if below and not any(reached):
            return
        time.sleep(0.02)


def reap() -> dict[int, int]:
    """Children that ended, the task's orphans among them: pid -> exit code."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def have_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def is_below(pid: int, root: int) -> bool:
    """Whether a process is a descendant of another."""
    while pid > 1 and pid != root:
        try:
            above = int(stat_of(pid)[1])
        except (OSError, IndexError):
            return False  # it ended, or never was
        if above == root:
            return True
        pid = above
    return False


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                above = int(stat_of(int(entry))[1])
            except OSError:
                continue  # it ended while we looked
            children.setdefault(above, []).append(int(entry))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def stat_of(pid: int) -> list[str]:
    """/proc/PID/stat behind the name, which may hold any bytes: the state, the parent's pid, and on.  Raises OSError once it is gone."""
    return read_text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()


def name_of(pid: int) -> str:
    """Of the program that it runs; empty once it is gone."""
    try:
        stat = read_text(f"/proc/{pid}/stat")
    except OSError:
        return ""
    return stat[stat.index("(") + 1 : stat.rindex(")")]


def outside_of(root: int) -> dict[int, int]:
    """Of the processes below one: their numbers in their own namespace -> ours."""
    found = {}
    for pid in descendants(root):
        try:
            lines = read_text(f"/proc/{pid}/status").splitlines()
        except OSError:
            continue  # it ended while we looked
        inside = next((line.split()[-1] for line in lines if line.startswith("NSpid:")), str(pid))
        found[int(inside)] = pid
    return found


def signal_task(pid: int, number: int, enclosed: bool) -> bool:
    """To the group of the task's main process; in a sandbox to all in it, since its main process would end it at once.  Returns whether
    the task was there to hear it: until then there is only what makes its sandbox."""
    if enclosed:
        below = {one: name_of(one) for one in descendants(pid)}
        for one in below:
            signal_one(one, number)
        return not set(below.values()) <= {SANDBOX, ""}
    signal_one(-pid, number)
    return True


def signal_one(pid: int, number: int) -> bool:
    """False: it has become another user's.  One that ended by itself needs none."""
    try:
        os.kill(pid, number)
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return True
