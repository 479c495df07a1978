"""The folders of a task's attempts at this host's engines: where it ran, and what it printed."""

from collections.abc import Iterable
from pathlib import Path

from qipan.engines import plain
from qipan.engines.launcher import Folders, folders_of
from qipan.engines.shim import LOG_BYTES_MAX
from qipan.hardware import BoardId


def attempts_of(folder: Path, task_id: str) -> list[Folders]:
    found = [
        path
        for path in (folder / "engines").glob(f"*/attempts/{task_id}-*")
        if path.name.rsplit("-", 1)[1].isdigit() and path.name.rsplit("-", 1)[0] == task_id
    ]
    return [folders_of(path.parent.parent, path.name) for path in sorted(found, key=_number)]


def last_at(folder: Path, task_id: str) -> BoardId | None:
    """The board here whose engine runs it, or ran it last."""
    ran = [(_number(one.task), one.task.parent.parent.name) for one in attempts_of(folder, task_id)]
    return BoardId(max(ran)[1]) if ran else None


def printed(folder: Path, task_id: str, names: Iterable[str], first: int, most: int) -> tuple[bytes, int]:
    """At most `most` bytes from byte `first` on of what all attempts of its parts printed, joined, and how many bytes that is.  Nothing
    else is read, however long the logs are."""
    found, at = b"", 0
    for name in names:
        part = name.removeprefix(task_id).replace(".", " ", 1)
        for attempt in attempts_of(folder, name):
            head = f"---{part} attempt {_number(attempt.task)} ---\n".encode()
            log = attempt.control / "log.txt"
            found += head[max(0, first - at) :][: most - len(found)]
            at += len(head)
            size = min(plain.size_of(log), LOG_BYTES_MAX)
            if len(found) < most and first < at + size:
                found += _piece(log, max(0, first - at), min(most - len(found), at + size - max(first, at)))
            at += size
    return found, at


def printed_bytes(folder: Path, names: Iterable[str]) -> int:
    """Grows when one of these parts prints."""
    logs = [one.control / "log.txt" for name in names for one in attempts_of(folder, name)]
    return sum(plain.size_of(log) for log in logs) + len(logs)


def _number(attempt: Path) -> int:
    return int(attempt.name.rsplit("-", 1)[1])


def _piece(log: Path, first: int, most: int) -> bytes:
    try:
        return plain.read_piece(log, first, most)
    except OSError:
        return b""  # it went, or something else stands in its place
