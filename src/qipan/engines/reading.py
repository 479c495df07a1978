"""What an attempt's folders tell: how far it has come, which rank is slow, whether its supervisor is silent, when and how it
ended."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qipan.engines import alive, plain
from qipan.engines.held import Held
from qipan.engines.launcher import Ended, Folders
from qipan.engines.pace import Pace
from qipan.events import Outcome
from qipan.leases import RAN_OUT

DIGITS_MAX = 20  # of a whole number in an event
READ_BYTES_MAX = 1 << 20  # of an events file at one look
#: of it at the end, the newest: progress counts from the start, so the last lines say all
REST_BYTES_MAX = 16 << 20
REPORTS_MAX = 20  # each second that are said at once
DETAIL_BYTES_MAX = 1 << 16  # of a line that is said as it is
PARKED_BESIDE = re.compile(r"exitcode\s*:\s*75\b")  # the trainer's word: another part of its site was stopped
KILLED = re.compile(
    r"exitcode\s*:\s*-9|Signal 9 \(SIGKILL\)|Connection closed by peer|Connection reset by peer"
)
MACHINE = "its supervisor is gone or gave no sign and nothing of it ran (killed, stopped, or the machine was started again)"


@dataclass(slots=True)
class Reading:
    """How far an attempt's folders were read."""

    folders: Folders
    offset: int = 0  # of the events file, in bytes
    done_s: float = 0.0
    reported_s: float = 0.0
    reports: int = 0  # said at once since `reports_from_s`
    reports_from_s: float = 0.0
    started: bool = False
    finished: bool = False
    waited_since_s: float = 0.0  # for the supervisor's first sign
    lived: bool = False  # this engine has seen its supervisor
    pace: Pace | None = None
    beat_ns: int = 0  # the supervisor's last sign, as the file has it
    beat_s: float = 0.0  # when it was new, on the lease clock
    left_s: float = 0.0  # when processes of the task were last seen without it, on the lease clock
    gone_s: float = 0.0  # when it ended, once its supervisor is gone: keeping what it saved is not charged
    busy: tuple[float, float] | None = None  # (when, device-seconds worked by then) of the last look
    busy_share: float | None = None  # as it was said last


def unread_lines(reading: Reading) -> list[bytes]:
    """Whole lines of the events file from `offset` on, which stays: the caller counts what it takes.  What is longer than a look is no
    line, and passed over."""
    try:
        with plain.opened(reading.folders.task / "events.jsonl") as file:
            file.seek(reading.offset)
            fresh = file.read(READ_BYTES_MAX)
    except OSError:
        return []  # not written yet
    whole = fresh[: fresh.rfind(b"\n") + 1]
    if not whole and len(fresh) == READ_BYTES_MAX:
        reading.offset += len(fresh)
    return whole.splitlines(keepends=True)


def skip_to_the_rest(reading: Reading) -> None:
    """Nobody writes any more, and what is read at once holds up the board: of more than REST_BYTES_MAX only the newest is read."""
    try:
        size = os.stat(reading.folders.task / "events.jsonl", follow_symlinks=False).st_size
    except OSError:
        return  # not written
    reading.offset = max(reading.offset, size - REST_BYTES_MAX)


def parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_int=_bounded)
    except (ValueError, RecursionError):
        return {}  # a task may write what it likes; only whole JSON objects mean something
    return value if isinstance(value, dict) else {}


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bounded(text: str) -> int:
    """Longer ones are no counts, and do not become floats."""
    if len(text) > DIGITS_MAX:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def may_say(reading: Reading, now_s: float) -> bool:
    """Whether one more report is said at once: a task writes what it likes, and every board above keeps it."""
    if now_s >= reading.reports_from_s + 1.0:
        reading.reports_from_s, reading.reports = now_s, 0
    reading.reports += 1
    return reading.reports <= REPORTS_MAX


def write_steps(reading: Reading, steps: int) -> None:
    """A checkpoint tells its step alone: of how many is kept for it, also for the next engine on the folder."""
    plain.write_text(reading.folders.control / "steps", str(steps))


def steps_known(reading: Reading) -> int:
    """0: none yet."""
    try:
        return int(plain.read_text(reading.folders.control / "steps", 20))
    except (OSError, ValueError):
        return 0


def slow_ranks(reading: Reading, held: Held, event: dict[str, Any], now_s: float) -> dict[int, float]:
    """rank -> its share of its like's speed, of ranks that compute slower.  `now_s`: on the lease clock."""
    rates = event.get("forward_rows_per_s")
    if (
        not isinstance(rates, list)
        or len(rates) != len(held.devices)
        or not all(_is_number(rate) for rate in rates)
    ):
        return {}
    reading.pace = reading.pace or Pace(_alike(held))
    return reading.pace.slow(now_s, rates)


def silent_s(reading: Reading, now_s: float) -> float:
    """Since the supervisor's last sign, as seen from here: clocks and file times may jump, that the file changes may not.
    `now_s`: on the lease clock."""
    try:
        beat_ns = (reading.folders.control / "beat").stat().st_mtime_ns
    except OSError:
        return 0.0  # of an earlier release: it gives no signs
    if beat_ns != reading.beat_ns:
        reading.beat_ns, reading.beat_s = beat_ns, now_s
    return now_s - reading.beat_s


def gone_s(reading: Reading, started_s: float, engine_began_s: float, now_s: float, lease_s: float) -> float:
    """When an attempt whose supervisor is gone ended.  One that was never seen alive by this engine went with the
    machine, or its store was restored: it ended when it last wrote before that, and nobody pays for what lies between.  One whose
    supervisor had fallen silent ended with its last sign, or when a process of it was last seen.  All Unix seconds but `lease_s`,
    now on the lease clock."""
    if reading.lived or started_s >= engine_began_s:
        silence_s = silent_s(reading, lease_s)
        if silence_s <= alive.SILENT_S:
            return now_s
        unseen_s = min(silence_s, lease_s - reading.left_s)
        return max(started_s, now_s - unseen_s)
    written = [path.stat().st_mtime for path in reading.folders.control.iterdir() if path.is_file()]
    return max([started_s, *(at_s for at_s in written if at_s < engine_began_s)])


def outcome_of(reading: Reading, held: Held, ended: Ended) -> tuple[Outcome, str]:
    """How it ended and why."""
    code = ended.code
    if reading.finished:
        return "done", "finished"
    if held.stop_outcome == "cancelled":
        return "cancelled", "cancelled"
    if held.broken:
        return "failed", held.broken
    match ended.ended_by:
        case "stop" if held.resize is not None:
            point_id = held.resize.points[0].point_id
            return "resized", f"goes on at {point_id}, started again: {held.restart_why}"
        case "stop" if held.doubtful:
            return "lost", "its queue lost it; it was ended by its own supervisor"
        case "stop":
            return "parked", held.called_in or held.stop_why or "ordered to stop"
        case "lease":
            return "parked", RAN_OUT
        case "signal":
            return "parked", "the engine's own scheduler asked for the devices back"
        case "machine":
            return "lost", MACHINE
    if held.order.hours is not None and isinstance(code, int) and code >= 0:
        return "lost", f"a replica of a service ended by itself with exit code {code}"
    if code == 0:
        return "done", "finished"
    tail = _tail(reading.folders.control / "log.txt")
    if isinstance(code, int) and code < 0:
        return "lost", f"killed by signal {-code}"
    if PARKED_BESIDE.search(tail):
        return "parked", "another part of its site was stopped"
    if KILLED.search(tail):
        return "lost", "a worker was killed (SIGKILL)"
    last = [line for line in tail.splitlines() if line.strip()][-5:]
    return "failed", f"exit code {code}; last lines: " + " | ".join(last)


def _alike(held: Held) -> tuple[range, ...]:
    """Ranks that compute the same part of the model, and so as fast as each other: those of one pipeline stage."""
    point = held.point()
    sites = point.strategy.sites if point is not None and point.strategy is not None else ()
    if len(sites) != 1 or sites[0].devices != len(held.devices):
        return (range(len(held.devices)),)
    groups, at = [], 0
    for stage in sites[0].stages:
        groups.append(range(at, at + stage.devices))
        at += stage.devices
    return tuple(groups)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tail(path: Path, size: int = 16_384) -> str:
    try:
        with plain.opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size).decode(errors="replace")
    except OSError:
        return ""  # it has said nothing
