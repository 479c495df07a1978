"""Any file that a person submits: Qipan's own, or another tool's."""

from pathlib import Path

from qipan.errors import InvalidInput, NotFound
from qipan.workload.imports import Directive, foreign_format, parse_job
from qipan.workload.parse import parse_task
from qipan.workload.task import Task


def read_text(text: str, file: str, workdir: str = "") -> tuple[Task, list[Directive]]:
    """The checked task, and for another tool's file what became of each directive.  Raises InvalidInput."""
    if foreign_format(text, file):
        return parse_job(text, file, workdir)
    return parse_task(text, file, workdir), []


def read_file(path: Path) -> tuple[Task, list[Directive]]:
    """Raises NotFound, InvalidInput."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file; name a task file such as examples/train-poems.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InvalidInput(f"cannot be read as UTF-8 text: {error}", str(path)) from None
    return read_text(text, str(path), str(path.resolve().parent))
