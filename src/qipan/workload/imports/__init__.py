"""Other people's job files: Slurm, Kubernetes Job, PyTorchJob, JobSet, RayJob, SkyPilot, dstack, Compose."""

from pathlib import Path

from qipan.errors import InvalidInput
from qipan.files import text_in
from qipan.workload.imports.cloud import compose_task, dstack_task, skypilot_task
from qipan.workload.imports.directive import Directive, Fate, Source, read_documents
from qipan.workload.imports.kubernetes import TRANSLATORS
from qipan.workload.imports.slurm import sbatch_task
from qipan.workload.reader import SIZE_MAX
from qipan.workload.task import Task

__all__ = ["Directive", "Fate", "foreign_format", "parse_job", "read_job"]


def read_job(path: str | Path) -> tuple[Task, list[Directive]]:
    """The task in another tool's file, and what became of every directive in it.  Raises NotFound, InvalidInput."""
    path = Path(path)
    text = text_in(path, "no such file; name a job file such as job.sbatch", SIZE_MAX)
    return parse_job(text, str(path), str(path.resolve().parent))


def parse_job(text: str, file: str = "job.yaml", workdir: str = "") -> tuple[Task, list[Directive]]:
    """`read_job` of a text already read."""
    if text.startswith("#!"):
        return sbatch_task(text, file, workdir)
    documents = read_documents(text, file)
    known = [(source, name) for source in documents if (name := _format(source))]
    if not known:
        raise InvalidInput(
            "is no job file that Qipan reads: Slurm (#!...), Kubernetes Job, PyTorchJob, JobSet, RayJob, SkyPilot, "
            "dstack, Compose; or a task file beginning with `kind: train`",
            f"{file}:1:1",
        )
    if len(known) > 1:
        raise InvalidInput(
            f"holds {len(known)} jobs ({', '.join(name for _, name in known)}); submit one at a time", file
        )
    chosen, name = known[0]
    translate = TRANSLATORS.get(name) or {"skypilot": skypilot_task, "dstack": dstack_task}.get(
        name, compose_task
    )
    task = translate(chosen, workdir)
    others = [
        Directive(
            f"{source.text('kind', 'document')}.{row.name}", row.value, row.line, "ignored", "not the job"
        )
        for source in documents
        if source is not chosen
        for row in source.directives()
    ]
    return task, chosen.directives() + others


def foreign_format(text: str, file: str = "job.yaml") -> str:
    """The tool whose file this is, `""` for a task file of Qipan or no file that is known."""
    if text.startswith("#!"):
        return "slurm"
    names = [_format(source) for source in read_documents(text, file)]
    return next((name for name in names if name), "")


def _format(source: Source) -> str:
    top = source.root
    if "apiVersion" in top:
        return source.text("kind") if source.text("kind") in TRANSLATORS else ""
    if "kind" in top:
        return ""
    if isinstance(top.get("services"), dict):
        return "compose"
    if top.get("type") in ("task", "service", "dev-environment", "fleet"):
        return "dstack"
    if any(key in top for key in ("run", "resources", "num_nodes", "setup")):
        return "skypilot"
    return ""
