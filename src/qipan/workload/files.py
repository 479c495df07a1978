"""Any file that a person submits: Qipan's own, or another tool's."""

from pathlib import Path

from qipan.files import text_in
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
    text = text_in(path, "no such file; name a task file such as examples/train-poems.yaml")
    return read_text(text, str(path), str(path.resolve().parent))
