"""Checkpoints that any strategy can read: torch.distributed.checkpoint with whole-model names, and a COMMIT record
written last.  Readers look only at COMMIT, so a half-written checkpoint does not exist."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

KEEP = 2


@dataclass(frozen=True, slots=True)
class Commit:
    step: int
    strategy: str  # label
    validation_loss: float | None
    path: Path


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, step: int, strategy: str, validation: float | None
) -> int:
    """Write `folder/step-N`, then its COMMIT.  All ranks call it.  Returns the bytes written."""
    import torch.distributed.checkpoint as dcp

    target = folder / f"step-{step:08d}"
    if _rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    _barrier()
    dcp.save(  # type: ignore[attr-defined]
        _state(model, optimizer), checkpoint_id=str(target), no_dist=not dist.is_initialized()
    )
    size = 0
    if _rank() == 0:
        files = {path.name: _digest(path) for path in sorted(target.iterdir()) if path.is_file()}
        size = sum(path.stat().st_size for path in target.iterdir())
        record = {"step": step, "strategy": strategy, "validation_loss": validation, "files": files}
        _write(target / "COMMIT", record)
        _keep_best(folder, target, validation)
        for old in committed(folder)[:-KEEP]:
            shutil.rmtree(old.path)
    _barrier()
    return size


def committed(folder: Path, *, digests: bool = True) -> list[Commit]:
    """Valid checkpoints, oldest first; without `digests`, what this process just wrote is trusted."""
    found = []
    for path in sorted(folder.glob("step-*")):
        record = _read(path / "COMMIT", digests)
        if record is not None:
            found.append(Commit(record["step"], record["strategy"], record["validation_loss"], path))
    return found


def best(folder: Path) -> Commit | None:
    """The checkpoint with the lowest validation loss so far."""
    record = _read(folder / "best" / "COMMIT")
    return (
        Commit(record["step"], record["strategy"], record["validation_loss"], folder / "best")
        if record
        else None
    )


def load(path: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Read into the model's and optimiser's own shards, whatever strategy wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    state = _state(model, optimizer)
    dcp.load(  # type: ignore[attr-defined]
        state, checkpoint_id=str(path), no_dist=not dist.is_initialized()
    )
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def _keep_best(folder: Path, target: Path, validation: float | None) -> None:
    now = best(folder)
    if validation is None or (
        now is not None and now.validation_loss is not None and now.validation_loss <= validation
    ):
        return
    fresh, kept = folder / "best.new", folder / "best"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(target, fresh, copy_function=os.link)
    shutil.rmtree(kept, ignore_errors=True)
    fresh.rename(kept)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _write(path: Path, record: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    with part.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _read(path: Path, digests: bool = True) -> Any:
    """A COMMIT whose files are there with the sizes and digests it names; else None."""
    try:
        record = json.loads(path.read_text())
        whole = not digests or all(
            _digest(path.parent / name) == digest for name, digest in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None  # not committed: it does not exist for a reader
    return record if whole else None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
