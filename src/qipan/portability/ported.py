"""A task file for the target: the rewritten script behind a trial of two steps."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from qipan.errors import InvalidInput


def read_task(path: Path, script: str) -> tuple[dict[str, Any], list[str]]:
    """(the task, the script's arguments in its `run`).  Raises InvalidInput."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"is no task file: {error}", str(path)) from None
    run = str(value.get("run", "")) if isinstance(value, dict) else ""
    words = shlex.split(run)
    at = next((i for i, word in enumerate(words) if Path(word).name == script), None)
    if at is None:
        raise InvalidInput(f"its `run` does not name {script}; found {run[:80]!r}", str(path))
    stop = next(
        (i for i in range(at + 1, len(words)) if words[i] in ("&&", "||", "|", ";", ">", "2>&1")), len(words)
    )
    return value, words[at + 1 : stop]


def ported_task(
    value: dict[str, Any], script: str, arguments: list[str], target: Path, losses: Path, stack: str, torch_device: str
) -> str:  # fmt: skip
    """YAML.  Its `limits.vendors` is the target's vendor; its `run` first makes the trial there."""
    run = str(value["run"])
    whole = " ".join(target.name if Path(word).name == script else word for word in run.split(" "))
    trial = [
        "python",
        "-m",
        "qipan.portability.trial",
        losses.name,
        stack,
        torch_device,
        target.name,
        *arguments,
    ]
    limits = {**(value.get("limits") or {}), "vendors": [stack.split("_")[0]]}
    made = {**value, "limits": limits, "run": f"{shlex.join(trial)} -- sh -c {shlex.quote(whole)}"}
    return yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=1000)
