"""Checkpoints that any strategy can read: torch.distributed.checkpoint with whole-model names, and a COMMIT record
written last.  Readers look only at COMMIT, so a half-written checkpoint does not exist."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from qipan.disk import is_full, says_full, takes_a_file
from qipan.disk import told as words
from qipan.errors import DiskFull
from qipan.trainer.device import device

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
    """Write a new folder, then its COMMIT; then it takes the name `folder/step-N`.  All ranks call it.  Returns the bytes written.
    Raises DiskFull on all ranks alike where there is no room for it: nothing of it is left, and what was saved before stays, also of
    the same step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    target, fresh = folder / f"step-{step:08d}", folder / "step.new"
    state = state_of(model, optimizer)
    size = 0

    def begin() -> None:
        if _rank() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)

    def write() -> None:
        try:
            dcp.save(  # type: ignore[attr-defined]
                state, checkpoint_id=str(fresh), no_dist=not dist.is_initialized()
            )
        except CheckpointException as error:  # PyTorch's writer loses the number of the system's error
            full = says_full(str(error)) or not takes_a_file(folder)
            raise OSError(errno.ENOSPC if full else 0, str(error)) from error

    def commit() -> None:
        nonlocal size
        if _rank() == 0:
            files = {path.name: _digest(path) for path in sorted(fresh.iterdir()) if path.is_file()}
            size = sum(path.stat().st_size for path in fresh.iterdir())
            record = {"step": step, "strategy": strategy, "validation_loss": validation, "files": files}
            _write(fresh / "COMMIT", record)
            _keep_best(folder, fresh, validation)
            _replace(target, fresh)
            for old in committed(folder)[:-KEEP]:
                shutil.rmtree(old.path)

    for act in (begin, write, commit):
        _all_or_full(act, folder, fresh, target.name)
    return size


def _all_or_full(act: Callable[[], None], folder: Path, fresh: Path, name: str) -> None:
    """Raises DiskFull on every rank when one of them had no room."""
    full = False
    try:
        act()
    except OSError as error:
        if not is_full(error):
            raise
        full = True
    told = torch.tensor([float(full)])
    if dist.is_initialized():
        dist.all_reduce(told)
    if told.item():
        if _rank() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        raise DiskFull(f"no checkpoint was written to {name}: {words(folder)}")


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
    for name in ("best", "best.old"):  # the old one alone: killed while another was to take its place
        record = _read(folder / name / "COMMIT")
        if record is not None:
            return Commit(record["step"], record["strategy"], record["validation_loss"], folder / name)
    return None


def load(path: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Read into the model's and optimiser's own shards, whatever strategy wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    state = state_of(model, optimizer)
    dcp.load(  # type: ignore[attr-defined]
        state, checkpoint_id=str(path), no_dist=not dist.is_initialized()
    )
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def spread(model: nn.Module, optimizer: Optimizer) -> None:
    """Every rank takes rank 0's model and optimiser.  All ranks hold the whole of both, and all call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = state_of(model, optimizer)
    for part in ("model", "optimizer"):
        for _, value in sorted(state[part].items()):
            if isinstance(value, torch.Tensor):
                sent = value.to(device())  # a step's number lies on the CPU
                dist.broadcast(sent, src=0)
                value.copy_(sent)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def state_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
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


def _replace(target: Path, fresh: Path) -> None:
    """A kill in between leaves the old one under `old`, or both."""
    old = target.with_name(f"{target.name.partition('-')[0]}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _keep_best(folder: Path, target: Path, validation: float | None) -> None:
    now = best(folder)
    if validation is None or (
        now is not None and now.validation_loss is not None and now.validation_loss <= validation
    ):
        return
    fresh = folder / "best.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(target, fresh, copy_function=os.link)
    _replace(folder / "best", fresh)


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
