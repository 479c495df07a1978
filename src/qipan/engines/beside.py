"""A person's command beside a running attempt: in its environment, its folder, its sandbox and its share of the cores, under a
supervisor of its own (`beside_shim`), which ends it with the attempt.  All that is known of it lies in its folder, so a
board that starts again finds it."""

import codecs
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qipan.engines.launcher import read_json, supervisor
from qipan.engines.processes import stat_of
from qipan.engines.sandbox import opening
from qipan.engines.shim import Spec
from qipan.engines.throttle import read_pid
from qipan.errors import InvalidInput, NotFound, OverLimit

AT_ONCE_MAX = 8  # of one attempt
PIECE_BYTES = 256 << 10
ARGUMENTS_MAX, COMMAND_BYTES_MAX = 1000, 64 << 10
LIMIT_S_MAX = 24 * 3600.0
START_S = 10.0  # from its folder to its supervisor
NAME = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Piece:
    """What it printed from byte `after` to `next`; `over`: it ended, and all is here.  `code` None: it was ended, by `ended_by`."""

    text: str
    next: int
    over: bool
    code: int | None = None
    ended_by: str = ""


def check_command(command: list[str], limit_s: float) -> None:
    """Raises InvalidInput."""
    size = sum(len(word.encode(errors="replace")) + 1 for word in command)
    if not command or not command[0] or len(command) > ARGUMENTS_MAX or size > COMMAND_BYTES_MAX:
        raise InvalidInput(f"a command has 1 to {ARGUMENTS_MAX} words and {COMMAND_BYTES_MAX} bytes at most; this has {len(command)} and {size}")  # fmt: skip
    if any("\x00" in word for word in command):
        raise InvalidInput("a word of the command holds a zero byte; remove it")
    if not 0 < limit_s <= LIMIT_S_MAX:
        raise InvalidInput(f"a time limit of {limit_s:g} s; give more than 0, {LIMIT_S_MAX:.0f} at most")


def begin(place: Path, control: Path, command: list[str], limit_s: float) -> str:
    """Starts it; returns its number.  `place` holds those of the attempt whose supervisor writes in `control`.  Raises OverLimit, NotFound."""
    if not (control / "spec").exists() or (control / "exit.json").exists():
        raise NotFound("the attempt is not running")
    place.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(path.name) for path in place.iterdir() if NAME.fullmatch(path.name))
    running = [place / str(number) for number in numbers if not (place / str(number) / "exit.json").exists()]
    if sum(map(_lives, running)) >= AT_ONCE_MAX:
        raise OverLimit(f"{AT_ONCE_MAX} commands run beside this attempt already; end one")
    for number in numbers[: -AT_ONCE_MAX * 4]:
        if (place / str(number) / "exit.json").exists():
            shutil.rmtree(place / str(number))
    folder = place / str(numbers[-1] + 1 if numbers else 1)
    folder.mkdir()
    try:
        _start(folder, control, command, limit_s)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder.name


def _start(folder: Path, control: Path, command: list[str], limit_s: float) -> None:
    spec = Spec.read(str(control / "spec"))
    told = {"command": [*opening(spec.command), *command], "env": spec.env, "cwd": spec.cwd, "group": spec.group, "limit_s": limit_s}  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(told))
    subprocess.Popen(
        supervisor(sys.executable, str(control), str(folder), program="beside_shim"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "shim.err").open("w"), start_new_session=True,
    )  # fmt: skip


def read(place: Path, number: str, after: int) -> Piece:
    """Raises NotFound."""
    folder = _folder(place, number)
    lives = _lives(folder)
    ended = read_json(folder / "exit.json")  # before the text: then that is whole
    if ended is None and not lives:
        ended = {"code": None, "ended_by": "machine"}
    log = folder / "log.txt"
    body = b""
    if log.exists():
        with log.open("rb") as file:
            file.seek(after)
            body = file.read(PIECE_BYTES)
    whole = codecs.getincrementaldecoder("utf-8")("replace")
    text = whole.decode(body, final=False)
    last = after + len(body) - len(whole.getstate()[0])
    size = log.stat().st_size if log.exists() else 0
    if ended is None or after + len(body) < size:
        return Piece(text, last, False)
    code = ended["code"] if isinstance(ended["code"], int) else None
    return Piece(text + whole.decode(b"", final=True), size, True, code, str(ended["ended_by"]))


def end(place: Path, number: str) -> None:
    """Raises NotFound."""
    (_folder(place, number) / "stop").touch()


def _lives(folder: Path) -> bool:
    """Whether its supervisor does, which notes its pid: one that has none is being started, unless the board died over it."""
    try:
        if not (folder / "pid").exists():
            return time.time() < folder.stat().st_mtime + START_S
        pid = read_pid(str(folder / "pid"))
        return (
            stat_of(pid)[0] not in "ZX" and str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return False


def _folder(place: Path, number: str) -> Path:
    if not NAME.fullmatch(number) or not (place / number / "spec.json").exists():
        raise NotFound(
            f"no command {number[:20]!r} beside this task; it may have been one of an earlier attempt"
        )
    return place / number
