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


def printed(folder: Path, task_id: str, names: Iterable[str]) -> str:
    """By all attempts of its parts, joined."""
    texts = []
    for name in names:
        for attempt in attempts_of(folder, name):
            body = _said(attempt.control / "log.txt")
            part = name.removeprefix(task_id).replace(".", " ", 1)
            texts.append(f"---{part} attempt {_number(attempt.task)} ---\n{body}")
    return "".join(texts)


def printed_bytes(folder: Path, names: Iterable[str]) -> int:
    """Grows when one of these parts prints."""
    logs = [one.control / "log.txt" for name in names for one in attempts_of(folder, name)]
    return sum(log.stat().st_size for log in logs if log.exists()) + len(logs)


def _number(attempt: Path) -> int:
    return int(attempt.name.rsplit("-", 1)[1])


def _said(log: Path) -> str:
    try:
        return plain.read_text(log, LOG_BYTES_MAX)
    except OSError:
        return ""  # nothing yet
