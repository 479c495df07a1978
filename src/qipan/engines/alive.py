"""Does an attempt that is said to run really run?  Its supervisor gives a sign every second (`beat`); where it gives none, its
processes themselves are looked for.  The rule is pure; looking and ending are below it."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qipan.engines.processes import descendants, signal_one, stat_of

SILENT_S = 20.0  # a supervisor without a sign for so long no longer watches: it is stopped, hangs, or waits for a dead file system


def judge(
    supervisor: bool, silent_s: float, left: Sequence[int] | None, lease_over: bool
) -> Literal["runs", "end", "gone"]:
    """`left`: processes of the task that live; None where that cannot be seen from here.  "end": nobody keeps them to their lease,
    so they are ended before the attempt counts as lost: the next one never runs beside them."""
    if supervisor and silent_s <= SILENT_S:
        return "runs"
    if left is None:
        return "runs" if supervisor else "gone"
    if supervisor and left and not lease_over:
        return "runs"
    return "end" if left or supervisor else "gone"


def left_of(attempt: Path, supervisor: int) -> list[int]:
    """Processes of the attempt that live, without its supervisor (0: that is gone): those below it, and those that have left it and
    have the task's folder, `attempt`, in their environment."""
    mark = b"QIPAN_ATTEMPT_DIR=" + os.fsencode(attempt)
    below = set(descendants(supervisor)) if supervisor else set()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (supervisor, os.getpid()):
            pid = int(entry)
            try:
                state = stat_of(pid)[0]
                marked = pid in below or mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended while we looked, or is somebody else's
            if marked and state not in "ZX":
                found.append(pid)
    return sorted(found)


def end(attempt: Path, supervisor: int) -> None:
    """Kill what `left_of` finds, after the supervisor, which else would tell of it."""
    left = left_of(attempt, supervisor)
    for pid in [*([supervisor] if supervisor else []), *left]:
        signal_one(pid, signal.SIGKILL)
