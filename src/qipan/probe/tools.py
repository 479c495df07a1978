"""Vendor tools as child processes: within a time, a size, and one locale."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

TOOL_S = 1.0
TOOL_BYTES = 4 * 2**20
Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one command: its text, or why there is none that can be used (`text` then holds the last words)."""

    text: str
    failure: str
    at_s: float
    took_s: float


def run_tools(commands: Iterable[Command], limit_s: float = TOOL_S) -> dict[Command, Ran]:
    """All of them at once; those that are not on PATH are left out."""
    found = sorted({command for command in commands if shutil.which(command[0])})
    with ThreadPoolExecutor(max(1, len(found))) as pool:
        return dict(zip(found, pool.map(lambda command: run_tool(command, limit_s), found), strict=True))


def run_tool(command: Command, limit_s: float = TOOL_S) -> Ran:
    """At most TOOL_BYTES: its file may not grow further.  What it started is ended with it."""
    limited = ["sh", "-c", f'ulimit -f {TOOL_BYTES // 512}; exec "$@"', "sh", *command]
    at_s, began_s = time.time(), time.monotonic()

    def ran(text: str, failure: str) -> Ran:
        return Ran(text, failure, at_s, time.monotonic() - began_s)

    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(
                limited, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return ran("", f"could not be started: {error}")
        try:
            status: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):  # it is gone, and all it started
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        output.seek(0)
        text = output.read(TOOL_BYTES).decode("utf-8", errors="replace")
    if status is None:
        return ran("", f"gave no answer in {limit_s:g} s: it, its driver or a device hangs")
    if status:
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        said = "".join(c if c.isprintable() else "?" for c in last[:160])
        return ran("", f"ended with status {status}" + (f": {said}" if said else ""))
    return ran(text, "")
